"""Reading Hugging Face checkpoints: memory-mapped, tensor by tensor, nothing unpickled.

Opening a checkpoint loads no values, so an interrupted import simply opens it again. A file that is
shortened while it is mapped ends the process (SIGBUS), as with any memory map.
"""

import hashlib
import mmap
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.byte_bar import progress
from efficient_vlm.checkpoints.safetensors_format import (
    MAX_HEADER_BYTES,
    CheckpointError,
    Entry,
    damaged,
    parse_json,
    pickle_refused,
    read_header,
    refuse_pointer,
    show,
)
from efficient_vlm.errors import closest

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin.index.json")
_CHUNK = 1 << 20
# No separator of any system, and no control character: the name is shown in messages.
_PLAIN_NAME = re.compile(r"[\w.+ -]+\.safetensors")


class Checkpoint:
    """The tensors of one checkpoint, in one file or several shards. Made by `open`.

    Attributes:
      files: the safetensors files, sorted by name.
      names: all tensor names, in the order of their bytes on disk.
      nbytes: bytes of all tensors.
    """

    def __init__(self, files: tuple[Path, ...], tensors: dict[str, tuple[Path, Any, Entry]]):
        self.files = files
        self.names = tuple(tensors)
        self.nbytes = sum(entry.end - entry.begin for _, _, entry in tensors.values())
        self._tensors = tensors

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], sha256: Mapping[str, str] | None = None
    ) -> "Checkpoint":
        """Maps a checkpoint and checks its headers and its index.

        Args:
          path: a directory with `model.safetensors`, or with `model.safetensors.index.json` and
            its shards; or one `.safetensors` file; or an index.
          sha256: file name -> hexadecimal digest. Every file named is read and compared; every
            safetensors file of the checkpoint must be named.

        Raises:
          CheckpointError: no such file, a pickle, a header or index that is not exactly right
            (see `safetensors_format`), or another SHA-256.
        """
        path = Path(path)
        index = _find_index(path)
        weight_map = None if index is None else _read_index(index)
        if weight_map is not None:
            files = tuple(index.parent / name for name in sorted(set(weight_map.values())))
        else:
            files = (path / SINGLE if os.path.isdir(path) else path,)
        tensors: dict[str, tuple[Path, Any, Entry]] = {}
        for file in files:
            data = _map(file)
            for name, entry in read_header(data, file).items():
                if name in tensors:
                    other = tensors[name][0].name
                    raise damaged(file, f"tensor {show(name)} is also in {other}")
                tensors[name] = (file, data, entry)
        if weight_map is not None:
            _check_index(index, weight_map, tensors)
        if sha256 is not None:
            _check_sha256(files, sha256)
        return cls(files, tensors)

    def release(self, name: str) -> None:
        """Returns to the system the pages that reading a tensor has brought into memory."""
        _, data, entry = self._find(name)
        page = mmap.PAGESIZE
        first, last = -(-entry.begin // page) * page, entry.end // page * page
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            data.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _find(self, name: str) -> tuple[Path, Any, Entry]:
        if name not in self._tensors:
            guess = closest(name, self.names)
            raise CheckpointError(
                f"{self.files[0].parent}: no tensor named {show(name)}",
                allowed=f"{len(self.names)} other names",
                fix=f"did you mean {guess!r}?" if guess else "use the checkpoint of this model",
            )
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape. Raises CheckpointError for an unknown name."""
        return self._find(name)[2].shape

    def dtype(self, name: str) -> np.dtype:
        """NumPy's or ml_dtypes' dtype. Raises CheckpointError for an unknown name."""
        return self._find(name)[2].dtype

    def read(self, name: str, *, finite: bool = False) -> np.ndarray:
        """The tensor as a read-only view of the mapped file: slices read only what they cover.

        Args:
          name: one of `names`.
          finite: read all values once and refuse NaN and Inf.

        Returns:
          An array of `shape(name)` and `dtype(name)`. Files of other writers may be unaligned,
          which NumPy handles and JAX copies.

        Raises:
          CheckpointError: an unknown name, or (if `finite`) the number of NaN and Inf values.
        """
        path, data, entry = self._find(name)
        array = np.ndarray(entry.shape, entry.dtype, data, entry.begin)
        if finite and entry.dtype.kind not in "iub":
            flat = array.reshape(-1)
            # In pieces: the mask of a whole tensor would be half as large as its bfloat16 values.
            good = sum(
                int(np.count_nonzero(np.isfinite(flat[first : first + _CHUNK])))
                for first in range(0, flat.size, _CHUNK)
            )
            if good != flat.size:
                bad = f"{flat.size - good} of {flat.size} values are NaN or Inf"
                raise damaged(path, f"tensor {show(name)}: {bad}", "finite values")
        return array


def _find_index(path: Path) -> Path | None:
    """The index of the checkpoint at `path`; None if it is one file."""
    if os.path.isdir(path):
        single, index = os.path.lexists(path / SINGLE), os.path.lexists(path / INDEX)
        if single and index:
            raise CheckpointError(
                f"{path}: holds two checkpoints", allowed=f"{SINGLE} or {INDEX}", fix="name one"
            )
        if not single and not index:
            raise _no_weights(path)
        return path / INDEX if index else None
    if path.name.endswith(_PICKLES):
        raise pickle_refused(path)
    if path.name.endswith(".safetensors.index.json"):
        return path
    if not path.name.endswith(".safetensors"):
        raise CheckpointError(
            f"{path}: not a checkpoint" if os.path.lexists(path) else f"{path}: does not exist",
            allowed=f"a directory with {SINGLE} or {INDEX}, or one of these files",
        )
    return None


def _no_weights(path: Path) -> CheckpointError:
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        return CheckpointError(f"{path}: cannot be read ({error.strerror})")
    weights = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles and not weights:
        return pickle_refused(path / pickles[0])
    if any("-of-" in name for name in weights):
        fix = f"download {INDEX} as well, or finish writing this checkpoint"
    elif weights:
        fix = f"name the file you mean: {', '.join(weights[:4])}"
    else:
        fix = "download the weights of the model into this directory"
    return CheckpointError(f"{path}: holds neither {SINGLE} nor {INDEX}", fix=fix)


def _map(path: Path) -> mmap.mmap | bytes:
    """All bytes of a file; its pages are read from disk when they are first used."""
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


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index in Hugging Face's form.

    `metadata.total_size` is not compared: it is wrong in many published checkpoints.
    """
    data = _map(path)
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


def _check_index(
    index: Path, weight_map: dict[str, str], tensors: dict[str, tuple[Path, Any, Entry]]
) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name][0].name != file:
            raise damaged(index, f"tensor {show(name)} is not in {file}")
    for name, (file, _, _) in tensors.items():
        if name not in weight_map:
            raise damaged(index, f"tensor {show(name)} of {file.name} is not in the index")


def _blocks(paths: list[Path]) -> Iterator[tuple[Path, Any]]:
    for path in paths:
        data = _map(path)
        for first in range(0, len(data), _CHUNK):
            yield path, data[first : first + _CHUNK]


def _check_sha256(files: tuple[Path, ...], sha256: Mapping[str, str]) -> None:
    directory = files[0].parent
    for file in files:
        if file.name not in sha256:
            raise CheckpointError(
                f"{file}: no SHA-256 was given for it", fix="list every file, or none"
            )
    for name, digest in sha256.items():
        if len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef"):
            allowed = "64 hexadecimal digits"
            raise CheckpointError(f"SHA-256 of {show(name)}: {show(digest)}", allowed=allowed)
        if os.path.basename(name) != name:
            allowed = "names of files beside the weights"
            raise CheckpointError(f"SHA-256 of {show(name)}: not a file name", allowed=allowed)
    paths = [directory / name for name in sha256]
    total = sum(len(_map(path)) for path in paths)
    digests = {path: hashlib.sha256() for path in paths}
    for path, block in progress(_blocks(paths), lambda item: len(item[1]), total, "checking"):
        digests[path].update(block)
    for path, digest in digests.items():
        if digest.hexdigest() != sha256[path.name].lower():
            raise damaged(path, f"SHA-256 is {digest.hexdigest()}", sha256[path.name].lower())
