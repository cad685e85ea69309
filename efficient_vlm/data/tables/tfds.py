"""Data sets that TensorFlow Datasets prepared, read without TensorFlow.

They must lie in a format with random access (ArrayRecord), as `tfds.builder(..., file_format=
"array_record")` writes them. Pictures stay encoded, numbers of classes become names.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.data.tables.base import digest_of
from efficient_vlm.errors import UserError, first_line, short, short_path, unknown
from efficient_vlm.processing.decode_image import BadRecord

INFO = "dataset_info.json"  # What each of their folders holds.


class TfdsTable:
    """Random access to the examples of one split.

    A field inside another is named "outer/inner"; a list of texts or classes stays a list.

    Args:
      path: folder of a prepared data set; or its name, "name", "name:1.0.0" or "name/config", which
        is looked for in `root`. Nothing is downloaded or prepared here.
      split: name of the split, or part of one as TFDS writes it ("train[:80%]").
      root: folder of prepared data sets; "" for $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      UserError: no such data set or split, or a format without random access.
    """

    kind = "tfds 1"

    def __init__(self, path: str, split: str = "train", root: str = ""):
        self.folder = folder_of(path, root)
        builder = _builder(self.folder)
        name = split.split("[")[0].split("+")[0]
        if name not in builder.info.splits:
            raise unknown("data.train_split", name, builder.info.splits)
        features = builder.info.features
        self.labels = _labels(features)
        self.names = _names(features)
        self._images = [name for name in features if _kind(features[name]) == "Image"]
        encoded = dict.fromkeys(self._images, _import().decode.SkipDecoding())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self._data = builder.as_data_source(split, decoders=encoded)
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"data.path: {short_path(self.folder)}, split {short(split)}: {first_line(error)}",
                allowed="data prepared with file_format='array_record'",
                fix="prepare it again with that format, or correct the split",
            ) from error
        files = sorted(Path(str(file)) for file in builder.info.splits[name].filepaths)
        self.digest = digest_of([*files, self.folder / "features.json"])
        self.kind = f"tfds 1 {builder.name} {builder.version} {split}"

    def __len__(self) -> int:
        return len(self._data)

    def row(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            example = self._data[index]
        except Exception as error:  # Damaged records, in all kinds of exceptions.
            raise BadRecord("corrupt", f"record {index}: {first_line(error)}") from error
        return {name: _plain(value, name in self._images) for name, value in example.items()}

    def scan(self, pictures: bool, used: Sequence[str] = ()) -> Iterator[Any]:
        del used
        for index in range(len(self)):
            try:
                row = self.row(index)
            except BadRecord as error:
                yield error
                continue
            yield row if pictures else {k: v for k, v in row.items() if k not in self._images}


def folder_of(path: str, root: str = "") -> Path:
    """The folder of a prepared data set that a path or a name means.

    Raises:
      UserError: there is none.
    """
    direct = Path(path).expanduser()
    if (direct / INFO).is_file():
        return direct
    home = Path(root or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    name, _, version = path.partition(":")
    for start in dict.fromkeys((direct, home / name)):
        found = sorted(start.glob(f"{version or '*'}/{INFO}"), key=_version)
        if found:
            return found[-1].parent
        below = sorted(start.glob(f"*/{version or '*'}/{INFO}"))
        if below:
            configs = sorted({each.parts[-3] for each in below})
            if len(configs) == 1:
                return max(below, key=_version).parent
            raise UserError(
                f"data.path: {short(path)} has several configurations",
                allowed=", ".join(configs),
                fix=f"--config.data.path={short_path(path)}/{configs[0]}",
            )
    raise UserError(
        f"data.path: no prepared data set {short(path)} in {short_path(home)}",
        fix="prepare it where TensorFlow is: tfds build NAME --file_format=array_record; data.dir "
        "is the folder that it lies in",
    )


def splits_of(folder: Path) -> list[str]:
    """The splits of a prepared data set."""
    return list(_builder(folder).info.splits)


def _version(path: Path) -> tuple:
    return tuple(int(part) if part.isdigit() else -1 for part in path.parent.name.split("."))


def _builder(folder: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return _import().builder_from_directory(folder)
    except Exception as error:  # Damaged files, and features that need TensorFlow.
        raise UserError(
            f"data.path: {short_path(folder)} cannot be read as a TFDS data set "
            f"({first_line(error)})",
            fix="prepare it again",
        ) from error


def _import() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import tensorflow_datasets as tfds
    return tfds


def _kind(feature: Any) -> str:
    return type(feature).__name__


def _names(features: Any) -> list[str]:
    """Names of fields, those inside others as "outer/inner"."""
    names = []
    for name, feature in features.items():
        names.append(name)
        inner = getattr(feature, "feature", feature)  # What a sequence is of.
        with contextlib.suppress(AttributeError, TypeError):
            names += [f"{name}/{below}" for below in inner.keys()]  # noqa: SIM118 (no mapping)
    return names


def _labels(features: Any, prefix: str = "") -> dict[str, list[str]]:
    found = {}
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if _kind(inner) == "ClassLabel":
            found[prefix + name] = list(inner.names)
        elif hasattr(inner, "items"):
            found |= _labels(inner, f"{prefix}{name}/")
    return found


def _plain(value: Any, picture: bool) -> Any:
    """Python's own values: texts for bytes that are no picture, numbers for scalars, lists."""
    if isinstance(value, bytes):
        return value if picture else value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), picture)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {name: _plain(each, False) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, picture) for each in value]
    return value
