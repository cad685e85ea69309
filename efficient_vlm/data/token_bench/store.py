"""Builds of token_bench on the disk: their folders, atomic building, and verification."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efficient_vlm import checks
from efficient_vlm.data.glyphs import TRAIN_GLYPHS
from efficient_vlm.data.scenes import SPLITS, SceneConfig, check
from efficient_vlm.errors import UserError

MANIFEST = "manifest.json"
_LEFTOVER_SECONDS = 86_400
SOURCE = (
    "handwritten digits of scikit-learn (E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten"
    " Digits, UCI Machine Learning Repository, 1998); text in the DejaVu fonts of matplotlib"
)
LICENCE = "digits CC-BY-4.0 (UCI); DejaVu fonts Bitstream Vera licence; composition Apache-2.0"


def default_root() -> Path:
    """`$EFFICIENT_VLM_DATA`, or `~/.cache/efficient_vlm/data`."""
    chosen = os.environ.get("EFFICIENT_VLM_DATA")
    return Path(chosen) if chosen else Path.home() / ".cache" / "efficient_vlm" / "data"


def location(root: Path, scene: SceneConfig, sizes: dict[str, int]) -> Path:
    """Folder of one build; its name contains a hash of every setting."""
    from efficient_vlm.data.token_bench.token_bench import TokenBench, TokenBenchConfig

    config = TokenBenchConfig.make(scene, sizes)
    return Path(root) / TokenBench.name / config.name / str(TokenBench.VERSION)


def ensure(root: Path, scene: SceneConfig, sizes: dict[str, int], *, full: bool = False) -> Path:
    """The folder of a verified build, built first if it is missing.

    Any number of processes may call this at once: each builds in its own folder, the first to
    finish moves its folder to the final name, and the others use that one.

    Args:
      root: data folder.
      scene: settings of the build.
      sizes: images per split, {"train": n, "test": m}.
      full: also compare the SHA-256 of every file.

    Raises:
      UserError: bad settings, a folder that cannot be written, or a damaged build.
    """
    check(scene)
    for split in SPLITS:
        checks.whole(f"data.{split}_images", sizes.get(split, 0))
    final = location(root, scene, sizes)
    if not (final / MANIFEST).is_file():
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            _build(final, scene, sizes)
        except OSError as error:
            raise UserError(
                f"data.dir: cannot write {final}: {error.strerror or error}",
                fix="choose a writable folder with free space: data.dir=... or EFFICIENT_VLM_DATA",
            ) from error
    verify(final, full=full)
    return final


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a build: settings, counts, SHA-256 of every file, source and licence.

    Raises:
      UserError: no manifest, or one that cannot be read.
    """
    try:
        return json.loads((Path(folder) / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read") from error


def verify(folder: Path, *, full: bool = False) -> None:
    """Compares every file with the manifest: sizes, and with `full` the SHA-256 as well.

    Raises:
      UserError: names the first file that differs.
    """
    folder = Path(folder)
    for name, expected in manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise _damaged(folder, f"{name} has {path.stat().st_size} bytes")
        if full and sha256(path) != expected["sha256"]:
            raise _damaged(folder, f"{name} has another SHA-256")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_source(folder: Path, split: str) -> Any:
    """Random access to the records of a build; images stay PNG bytes.

    Returns:
      A TFDS data source: `len`, and `[i]` -> dict of features.
    """
    with _quiet():
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(
        f"dataset {folder} is damaged: {what}", fix="delete that folder; the next run rebuilds it"
    )


def _build(final: Path, scene: SceneConfig, sizes: dict[str, int]) -> None:
    """Builds beside `final` and renames the folder, so that no incomplete build has the name."""
    with _quiet():
        from efficient_vlm.data.token_bench.token_bench import TokenBench, TokenBenchConfig

        number = sum(sizes.values())
        print(f"building token_bench, {number} images, once: {final}", file=sys.stderr, flush=True)
        _remove_leftovers(final.parent)
        scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=final.parent))
        try:
            builder = TokenBench(
                config=TokenBenchConfig.make(scene, sizes),
                data_dir=scratch,
                file_format="array_record",
            )
            builder.download_and_prepare()
            made = Path(builder.data_dir)
            _write_manifest(made, builder)
            try:
                made.rename(final)
            except OSError as error:
                # Another process was faster, unless the folder has no manifest: not one of ours.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if not (final / MANIFEST).is_file():
                    raise _damaged(final, f"it holds files but no {MANIFEST}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Deletes the folders of killed builds that are older than a day; newer ones may be in use."""
    for path in folder.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _write_manifest(folder: Path, builder: Any) -> None:
    scene = builder.builder_config.scene
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    splits = {
        split: {
            "images": builder.info.splits[split].num_examples,
            "questions": counts,
            "content_sha256": builder.content[split],
        }
        for split, counts in builder.task_counts.items()
    }
    content = {
        "name": builder.name,
        "version": str(builder.version),
        "knobs": {f: getattr(scene, f) for f in scene.__dataclass_fields__},
        "splits": splits,
        "split_rule": f"by source glyph: train < {TRAIN_GLYPHS} <= test",
        "source": SOURCE,
        "licence": LICENCE,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides messages of TFDS (progress bars, notes about custom configs), but not its errors."""
    from absl import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        import tensorflow_datasets as tfds

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            tfds.disable_progress_bar()
            with open(os.devnull, "w") as hole, contextlib.redirect_stdout(hole):
                yield
    finally:
        logging.set_verbosity(level)
