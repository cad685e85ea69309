"""Writing Hugging Face checkpoints: tensor by tensor, in shards, never half a checkpoint.

Every file is written under a temporary name and renamed once it is complete and on the disk; the
index, without which shards are not a checkpoint, is written last.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

import numpy as np

from efficient_vlm import checks
from efficient_vlm.byte_bar import byte_bar
from efficient_vlm.checkpoints.safetensors_format import DTYPE_NAMES, build_header
from efficient_vlm.checkpoints.safetensors_read import INDEX, SINGLE
from efficient_vlm.errors import UserError
from efficient_vlm.files import fsync_directory, write_atomic

_CHUNK = 1 << 24


class Tensor(NamedTuple):
    """One tensor to write.

    Attributes:
      name: its key in the checkpoint.
      shape: known before the values.
      dtype: NumPy's or ml_dtypes'.
      make: returns the values; called when they are needed, at most twice.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def data(self) -> np.ndarray:
        """The values as a flat array of bytes.

        Raises:
          ValueError: `make` returned another shape or dtype.
        """
        array = np.asarray(self.make())
        if array.shape != self.shape or array.dtype != self.dtype:
            what = f"{array.shape} {array.dtype} instead of {self.shape} {self.dtype}"
            raise ValueError(f"tensor {self.name!r}: {what}")
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write(
    directory: str | os.PathLike[str],
    tensors: Iterable[tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]],
    *,
    max_shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> tuple[Path, ...]:
    """Writes `model.safetensors`, or shards `model-0000x-of-0000n.safetensors` and their index.

    Holds one tensor at a time. To resume after a kill, call it again: a file that is already
    complete is compared with the tensors and written again only if a byte differs (names and
    shapes alone would keep the weights of an older training step). One writer per directory.

    Args:
      directory: created if needed.
      tensors: the fields of `Tensor`. Shards are filled in this order; inside a file larger item
        sizes come first, so that all data are aligned.
      max_shard_bytes: of the tensors in one file; a larger tensor gets its own file.
      metadata: the files' `__metadata__`; transformers requires {"format": "pt"}.

    Returns:
      The safetensors files.

    Raises:
      UserError: the directory holds other weights, cannot be written, or the disk is full.
      ValueError: a name twice, a dtype outside the format, or values unlike their declaration.
    """
    directory = Path(directory)
    checks.whole("max_shard_bytes", max_shard_bytes)
    declared = [
        Tensor(name, tuple(shape), np.dtype(dtype), make) for name, shape, dtype, make in tensors
    ]
    shards = _plan(declared, max_shard_bytes)
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    if len(shards) == 1:
        names, index = [SINGLE], None
    else:
        numbers = range(1, len(shards) + 1)
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in numbers]
        index = _build_index(dict(zip(names, shards, strict=True)), total)
    headers = [build_header([tensor[:3] for tensor in shard], metadata) for shard in shards]
    _prepare(directory, {*names, *([INDEX] if index else [])})

    with byte_bar(total, "writing") as advance:
        for name, header, shard in zip(names, headers, shards, strict=True):
            path = directory / name
            if _is_written(path, header, shard):
                advance(sum(tensor.nbytes for tensor in shard))
                continue
            with writing(directory / INDEX):
                # From here on the old index would combine old and new shards.
                (directory / INDEX).unlink(missing_ok=True)
                fsync_directory(directory)
            _write_file(path, header, shard, advance)
    if index:
        with writing(directory / INDEX):
            write_atomic(directory / INDEX, index)
    return tuple(directory / name for name in names)


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one file whose name is not that of a model's weights; it is there whole or not at all.

    Raises:
      UserError: it cannot be written, or the disk is full.
      ValueError: a dtype outside the format.
    """
    path = Path(path)
    declared = [Tensor(n, x.shape, x.dtype, lambda x=x: x) for n, x in tensors.items()]
    (shard,) = _plan(declared, sum(tensor.nbytes for tensor in declared) + 1)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    header = build_header([tensor[:3] for tensor in shard], {"format": "pt"})
    _write_file(path, header, shard, lambda _: None)


def _plan(tensors: list[Tensor], max_shard_bytes: int) -> list[list[Tensor]]:
    """Fills shards in order; sorts each by falling item size."""
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("two tensors have the same name")
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if tensor.dtype not in DTYPE_NAMES or tensor.name == "__metadata__":
            raise ValueError(f"tensor {tensor.name!r} of {tensor.dtype}: not allowed by the format")
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _build_index(shards: Mapping[str, list[Tensor]], total: int) -> bytes:
    weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns errors of the operating system into a UserError; not for errors of `Tensor.make`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error})",
            fix="solve that or choose another directory; the same call resumes where it stopped",
        ) from None


def _prepare(directory: Path, planned: set[str]) -> None:
    """Makes the directory, removes the leftovers of a killed writer, refuses other weights."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".model*.tmp"):
            leftover.unlink()
        present = {path.name for path in directory.glob("*.safetensors*")}
    if others := sorted(present - planned):
        raise UserError(
            f"{directory}: holds other weights ({', '.join(others[:3])})",
            allowed="an empty directory, or one to resume with the same tensors and shard size",
            fix="choose another directory, or delete these files",
        )


def _is_written(path: Path, header: bytes, shard: list[Tensor]) -> bool:
    """Whether the file holds exactly this header and these values."""
    try:
        with open(path, "rb") as file:
            size = len(header) + sum(tensor.nbytes for tensor in shard)
            if os.fstat(file.fileno()).st_size != size or file.read(len(header)) != header:
                return False
            return all(_holds(file, tensor) for tensor in shard)
    except OSError:
        return False


def _holds(file: BinaryIO, tensor: Tensor) -> bool:
    data = tensor.data()
    pieces = (data[first : first + _CHUNK] for first in range(0, data.size, _CHUNK))
    return all(file.read(piece.size) == piece.tobytes() for piece in pieces)


def _write_file(
    path: Path, header: bytes, shard: list[Tensor], advance: Callable[[int], None]
) -> None:
    # The process id keeps two writers from sharing a temporary name.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            # Unbuffered: closing the file can then not fail on a full disk.
            file = open(temporary, "wb", buffering=0)  # noqa: SIM115
        with file:
            with writing(path):
                _write_all(file, header)
            for tensor in shard:
                _append(file, tensor, path)
                advance(tensor.nbytes)
            with writing(path):
                os.fsync(file.fileno())
        with writing(path):
            os.replace(temporary, path)
            fsync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _append(file: BinaryIO, tensor: Tensor, path: Path) -> None:
    # A separate function, so that its array is freed before the next one is made.
    data = tensor.data()
    with writing(path):
        _write_all(file, data)


def _write_all(file: BinaryIO, data: bytes | np.ndarray) -> None:
    view = memoryview(data)
    while view:  # one call writes 2 GiB at most
        view = view[file.write(view) :]
