"""Reading Hugging Face checkpoints: memory-mapped, tensor by tensor, nothing unpickled.

Opening a checkpoint loads no values, so an interrupted import simply opens it again. A file that is
shortened while it is mapped ends the process (SIGBUS), as with any memory map.
"""

import hashlib
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.byte_bar import progress
from efficient_vlm.checkpoints.safetensors_format import (
    CheckpointError,
    Entry,
    damaged,
    read_header,
    show,
)
from efficient_vlm.checkpoints.safetensors_index import (
    INDEX,
    SINGLE,
    find_index,
    map_file,
    read_index,
)
from efficient_vlm.errors import closest

__all__ = ["INDEX", "SINGLE", "Checkpoint"]

_CHUNK = 1 << 20


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
        index = find_index(path)
        weight_map = None if index is None else read_index(index)
        if weight_map is not None:
            files = tuple(index.parent / name for name in sorted(set(weight_map.values())))
        else:
            files = (path / SINGLE if os.path.isdir(path) else path,)
        tensors: dict[str, tuple[Path, Any, Entry]] = {}
        for file in files:
            data = map_file(file)
            for name, entry in read_header(data, file).items():
                if name in tensors:
                    other = tensors[name][0].name
                    raise damaged(file, f"tensor {show(name)} is also in {other}")
                tensors[name] = (file, data, entry)
        if weight_map is not None:
            _check_index(index, weight_map, tensors)
        elif os.path.isdir(path):
            _compare_index(path / INDEX, tensors)
        if sha256 is not None:
            _check_sha256(files, sha256)
        return cls(files, tensors)

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> "Checkpoint":
        """Maps one safetensors file that is no checkpoint of a model, such as an adapter's.

        Raises:
          CheckpointError: see `safetensors_format.read_header`.
        """
        path = Path(path)
        data = map_file(path)
        entries = read_header(data, path)
        return cls((path,), {name: (path, data, entry) for name, entry in entries.items()})

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


def _check_index(
    index: Path, weight_map: dict[str, str], tensors: dict[str, tuple[Path, Any, Entry]]
) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name][0].name != file:
            raise damaged(index, f"tensor {show(name)} is not in {file}")
    for name, (file, _, _) in tensors.items():
        if name not in weight_map:
            raise damaged(index, f"tensor {show(name)} of {file.name} is not in the index")


def _compare_index(index: Path, tensors: Mapping[str, Any]) -> None:
    """Warns of an index of the only file that lists other tensors than the file holds."""
    try:
        weight_map = read_index(index) if index.is_file() else {}
    except CheckpointError:
        return  # `find_index` has said so.
    if set(weight_map.values()) == {SINGLE} and set(weight_map) != set(tensors):
        warnings.warn(f"{index}: lists other tensors than {SINGLE}, which is read", stacklevel=3)


def _blocks(paths: list[Path]) -> Iterator[tuple[Path, Any]]:
    for path in paths:
        data = map_file(path)
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
    total = sum(len(map_file(path)) for path in paths)
    digests = {path: hashlib.sha256() for path in paths}
    for path, block in progress(_blocks(paths), lambda item: len(item[1]), total, "checking"):
        digests[path].update(block)
    for path, digest in digests.items():
        if digest.hexdigest() != sha256[path.name].lower():
            raise damaged(path, f"SHA-256 is {digest.hexdigest()}", sha256[path.name].lower())
