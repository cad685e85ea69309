"""Which layout a path has, and which files of it belong to a split."""

import glob
import re
from pathlib import Path
from typing import NamedTuple

from efficient_vlm.data.tables.tfds import INFO
from efficient_vlm.errors import UserError, short, short_path

JSON, PARQUET, CSV, TAR, TFDS = "llava_json", "parquet", "csv", "webdataset", "tfds"
LAYOUTS = (JSON, PARQUET, CSV, TAR, TFDS)
_ENDINGS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), JSON),
    **dict.fromkeys((".parquet", ".pq"), PARQUET),
    **dict.fromkeys((".csv", ".tsv"), CSV),
    ".tar": TAR,
}
_TFDS_NAME = re.compile(r"[a-z]\w*(/\w+)*(:\d+\.\d+\.\d+)?")
# Words in the names of shards: train-00000-of-00004.parquet, data/validation/0.tar.
_SPLIT = re.compile(r"(?:^|[-_./])(train|training|test|validation|valid|val|dev)(?=[-_./])", re.I)


class Found(NamedTuple):
    """What lies at a path.

    Attributes:
      layout: one of `LAYOUTS`.
      files: the files, in the order of their names; () for TFDS, which is found by its name.
      several: whether they were named by a folder or a pattern.
    """

    layout: str
    files: tuple[Path, ...]
    several: bool = False


def find(path: str, layout: str = "auto") -> Found:
    """What lies at a path: a file, a folder, a pattern such as "shards/*.parquet", a TFDS name.

    Args:
      path: as given.
      layout: one of `LAYOUTS`, or "auto" to see it in the names and the first bytes.

    Raises:
      UserError: nothing is there, or its layout cannot be told.
    """
    here = Path(path).expanduser()
    if layout == TFDS or (here / INFO).is_file():
        return Found(TFDS, ())
    if here.is_dir():
        files = [each for each in sorted(here.rglob("*")) if each.suffix.lower() in _ENDINGS]
        return _of_files(path, [each for each in files if each.is_file()], layout)
    if not here.exists() and glob.has_magic(str(here)):
        names = sorted(glob.glob(str(here), recursive=True))
        return _of_files(path, [Path(name) for name in names if Path(name).is_file()], layout)
    if layout != "auto":
        return Found(layout, (here,))
    known = _ENDINGS.get(here.suffix.lower())
    if known is None and not here.exists() and _TFDS_NAME.fullmatch(path):
        return Found(TFDS, ())
    return Found(known or _by_content(here), (here,))


def _of_files(path: str, files: list[Path], layout: str) -> Found:
    """Several files: those of one layout."""
    layouts = {_ENDINGS.get(each.suffix.lower(), "") for each in files}
    if layout == "auto" and len(layouts) > 1:
        raise UserError(
            f"data.path: {short(path)} holds files of several layouts",
            allowed=", ".join(sorted(name or "others" for name in layouts)),
            fix="name one by a pattern: --config.data.path='DIR/*.parquet'",
        )
    if layout != "auto" and layout in layouts:
        files = [each for each in files if _ENDINGS.get(each.suffix.lower()) == layout]
    if not files:
        raise UserError(
            f"data.path: no files in {short(path)}",
            allowed=", ".join(_ENDINGS),
            fix="give a file, a folder or a pattern: --config.data.path='DIR/*.parquet'",
        )
    found = layout if layout != "auto" else layouts.pop() or _by_content(files[0])
    if found in (JSON, CSV) and len(files) > 1:
        raise UserError(
            f"data.path: {len(files)} files of layout {found} in {short(path)}",
            allowed="one such file",
            fix="name it, or several in data.mixture",
        )
    return Found(found, tuple(files), several=True)


def _by_content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(
            f"data.path: cannot read {short_path(path)} ({error.strerror or error})",
            fix="give a file that is there: --config.data.path=my.jsonl",
        ) from error
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"PAR1"):
        return PARQUET
    if head[257:262] == b"ustar":
        return TAR
    if text[:1] in (b"{", b"[") or head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return JSON
    raise UserError(
        f"data.path: the layout of {short_path(path)} cannot be told from its name or beginning",
        allowed=", ".join(LAYOUTS),
        fix="name it: --config.data.source=csv",
    )


def of_split(found: Found, split: str) -> tuple[tuple[Path, ...], bool]:
    """Files of "train" or "test", where the names of several shards say so.

    Returns:
      (files, whether the other split has files of its own). Where no name says "train", all files
      are for either split.
    """
    words = {path: _SPLIT.findall(str(Path(*path.parts[-2:]))) for path in found.files}
    train = tuple(p for p, said in words.items() if said and said[-1].lower().startswith("train"))
    if not found.several or not train:
        return found.files, False
    said = {path: each[-1].lower() for path, each in words.items() if each}
    for kinds in (("test",), ("validation", "valid", "val", "dev")):
        test = tuple(path for path, word in said.items() if word in kinds)
        if test:
            return (train if split == "train" else test), True
    return train, False
