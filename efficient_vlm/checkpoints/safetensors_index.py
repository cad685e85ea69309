"""Which files a checkpoint is made of: one file, or shards with an index in Hugging Face's form."""

import contextlib
import mmap
import os
import re
import stat
import warnings
from pathlib import Path

from efficient_vlm.checkpoints import foreign
from efficient_vlm.checkpoints.safetensors_format import (
    MAX_HEADER_BYTES,
    CheckpointError,
    damaged,
    parse_json,
    refuse_pointer,
    show,
)
from efficient_vlm.errors import first_line, short_path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# No separator of any system, and no control character: the name is shown in messages.
_PLAIN_NAME = re.compile(r"[\w.+ -]+\.safetensors")
_SHARD = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")


def locate(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The directory of a model, and its weights: that directory, or the file in it that was named.

    Args:
      path: a directory, or a `.safetensors` file or an index in one.

    Raises:
      CheckpointError: there is nothing, it is of another kind (a directory with an adapter alone, a
        pickle, GGUF, ...), or it is one of several shards.
    """
    path = Path(path)
    if os.path.isdir(path):
        if not any(os.path.lexists(path / name) for name in (SINGLE, INDEX)):
            foreign.refuse_directory(path)
        return path, path
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{short_path(path)}: no such directory",
            fix='give a directory with the model\'s files, or "org/name" of a model on a hub',
        )
    if find_index(path) is None:
        _refuse_shard(path)
    return path.parent, path


def _refuse_shard(path: Path) -> None:
    """Raises CheckpointError for a file that holds only a part of a model."""
    numbered = _SHARD.fullmatch(path.name)
    count = int(numbered[2]) if numbered else 1
    index = path.parent / INDEX
    if os.path.isfile(index) and path.name != SINGLE:
        with contextlib.suppress(CheckpointError):  # It need not be that of this file.
            shards = set(read_index(index).values())
            count = max(count, len(shards)) if path.name in shards else count
    if count > 1:
        fix = f"give {path.parent}"
        if not os.path.lexists(index):
            fix = f"download {INDEX} and all shards, then give {path.parent}"
        raise CheckpointError(f"{path}: one of {count} shards of a model", fix=fix)


def find_index(path: Path) -> Path | None:
    """The index of the checkpoint at `path`; None if it is one file.

    Raises:
      CheckpointError: no checkpoint, or two.
    """
    if os.path.isdir(path):
        single, index = (os.path.lexists(path / name) for name in (SINGLE, INDEX))
        if single and index:
            return _beside_a_file(path)
        if not single and not index:
            raise _no_weights(path)
        return path / INDEX if index else None
    foreign.refuse_file(path)
    if path.name.endswith(".safetensors.index.json"):
        return path
    if not path.name.endswith(".safetensors"):
        exists = os.path.lexists(path)
        raise CheckpointError(
            f"{path}: not a checkpoint" if exists else f"{path}: does not exist",
            allowed=f"a directory with {SINGLE} or {INDEX}, or one of these files",
            fix=f"give its directory, {path.parent}" if exists else None,
        )
    return None


def _beside_a_file(folder: Path) -> Path | None:
    """The index beside a `model.safetensors`, if it is the checkpoint; None if the file is.

    Savers that always write an index leave one that names only this file, and merging shards into
    one file leaves the old one: the file is the checkpoint unless all shards are there as well.
    """
    index = folder / INDEX
    try:
        shards = set(read_index(index).values())
    except CheckpointError as error:
        warnings.warn(f"{SINGLE} is read; {first_line(error)}", stacklevel=2)
        return None
    if shards == {SINGLE}:
        return None
    if not all(os.path.lexists(folder / shard) for shard in shards):
        warnings.warn(
            f"{folder}: {SINGLE} is read; {INDEX} names other files, which are not there",
            stacklevel=2,
        )
        return None
    if SINGLE in shards:
        return index
    raise CheckpointError(
        f"{folder}: holds two checkpoints",
        allowed=f"{SINGLE} or {INDEX}",
        fix=f"name one: {folder / SINGLE} or {index}",
    )


def _no_weights(path: Path) -> CheckpointError:
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        return CheckpointError(f"{path}: cannot be read ({error.strerror})")
    foreign.refuse_directory(path)
    weights = [name for name in names if name.endswith(".safetensors")]
    shards = [match for match in map(_SHARD.fullmatch, weights) if match and int(match[2]) > 1]
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    if indexes:
        fix = f"name the one you mean: {path / indexes[0]}"
    elif shards:
        fix = f"download {INDEX} as well, or finish writing this checkpoint"
    elif weights:
        fix = f"name the file you mean: {' or '.join(str(path / name) for name in weights[:3])}"
    else:
        fix = "download the weights of the model into this directory"
    return CheckpointError(f"{path}: holds neither {SINGLE} nor {INDEX}", fix=fix)


def map_file(path: Path) -> mmap.mmap | bytes:
    """All bytes of a file; its pages are read from disk when they are first used.

    Raises:
      CheckpointError: it cannot be read, or is not a plain file.
    """
    try:
        # Before opening: opening a named pipe would wait for a writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise damaged(path, "not a plain file")
        with open(path, "rb") as file:
            # An empty file cannot be mapped.
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: the file is missing", fix="download it into the same directory"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index.

    `metadata.total_size` is not compared: it is wrong in many published checkpoints.

    Raises:
      CheckpointError: the index is damaged, or names files elsewhere.
    """
    data = map_file(path)
    refuse_pointer(data, path)
    # One byte more than allowed is enough for parse_json to refuse it.
    weight_map = parse_json(data[: MAX_HEADER_BYTES + 1], path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path, "weight_map is not an object that names files")
    for name in weight_map.values():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            allowed = "plain names *.safetensors in the index's own directory"
            raise damaged(path, f"names the file {show(name)}", allowed)
    return weight_map
