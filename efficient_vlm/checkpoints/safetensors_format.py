"""The safetensors header: built, and checked in full before any of the data is used.

A file is the header's length (8 bytes, little endian), a JSON header, and the tensors' bytes
without gaps or overlaps: https://huggingface.co/docs/safetensors, section "Format". The limits
MAX_HEADER_BYTES, MAX_TENSORS and MAX_RANK are our own; no sensible file exceeds them.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from efficient_vlm.errors import UserError

# Of one file or index. Together with MAX_TENSORS this keeps parsing under two seconds; a shard of
# a dense model has some 100 kB.
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 50_000
MAX_RANK = 32
_MAX_SIZE = 2**63 - 1  # NumPy's limit, even for the shape of an empty array

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "C64": np.dtype("<c8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_DOWNLOAD = "the file is incomplete or damaged: download it again"
_CONVERT = (
    'python -c "import torch; from safetensors.torch import save_file; save_file({k: v.clone()'
    ".contiguous() for k, v in torch.load('model.bin', weights_only=True, map_location='cpu')"
    ".items()}, 'model.safetensors')\""
)


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, hostile or not in the safetensors format."""


class Entry(NamedTuple):
    """Where one tensor is stored: `begin` and `end` are bytes from the start of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def damaged(path: str | os.PathLike[str], what: str, allowed: str | None = None) -> CheckpointError:
    """The error for a file whose content cannot be right."""
    return CheckpointError(f"{path}: {what}", allowed=allowed, fix=_DOWNLOAD)


def pickle_refused(path: str | os.PathLike[str]) -> CheckpointError:
    """The error for PyTorch's own format: unpickling runs whatever code the file holds."""
    return CheckpointError(
        f"{path}: a pickle file; loading one can run any code, so it is never opened",
        allowed="safetensors (many repositories have both)",
        fix=f"only if you trust its source, convert it: {_CONVERT}",
    )


def show(value: Any) -> str:
    """`repr` without control characters and short enough for an error message."""
    text = repr(value[:200] if isinstance(value, str | list) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse_pointer(data: Any, path: str | os.PathLike[str]) -> None:
    """Raises CheckpointError if the file is what Git leaves in place of a large file."""
    if data[:23] == b"version https://git-lfs":
        raise CheckpointError(
            f"{path}: this is a Git LFS pointer, not the file itself",
            fix="fetch the file: git lfs pull (or download it from the model's page)",
        )


def parse_json(raw: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object without duplicate keys.

    Raises:
      CheckpointError: more than MAX_HEADER_BYTES, or more parts than MAX_TENSORS have; not UTF-8;
        not JSON; nested too deeply; a key twice in one object; not an object.
    """
    if len(raw) > MAX_HEADER_BYTES:
        raise damaged(path, "too much JSON", f"at most {MAX_HEADER_BYTES} bytes")
    # Counted before parsing: a million small objects take seconds and a gigabyte. A tensor has one
    # object, two lists and five strings.
    for mark, each in ((b"{", 1), (b"[", 2), (b'"', 10)):
        if raw.count(mark) > each * MAX_TENSORS:
            raise damaged(path, "too many tensors", f"at most {MAX_TENSORS} in one file")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise damaged(path, f"key {show(twice)} appears twice")
        return result

    try:
        # Decoded here because json would also accept UTF-16 and UTF-32.
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError:
        raise damaged(path, "not UTF-8") from None
    except RecursionError:
        raise damaged(path, "JSON nested too deeply") from None
    except ValueError as error:
        raise damaged(path, f"not JSON ({show(str(error))})") from None
    if not isinstance(value, dict):
        raise damaged(path, f"{type(value).__name__}, not a JSON object")
    return value


def _is_size(value: Any) -> bool:
    # bool is an int in Python, and `true` is not a number in JSON.
    return type(value) is int and 0 <= value <= _MAX_SIZE


def _parse_entry(name: str, value: Any, start: int, path: str | os.PathLike[str]) -> Entry:
    tensor = f"tensor {show(name)}"
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise damaged(path, f"{tensor} has other fields than {', '.join(sorted(_FIELDS))}")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{path}: {tensor} has dtype {show(value['dtype'])}", allowed=", ".join(DTYPES)
        )
    shape, offsets = value["shape"], value["data_offsets"]
    if not (isinstance(shape, list) and len(shape) <= MAX_RANK and all(map(_is_size, shape))):
        allowed = f"at most {MAX_RANK} whole numbers from 0 to 2**63 - 1"
        raise damaged(path, f"{tensor} has shape {show(shape)}", allowed)
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))):
        raise damaged(path, f"{tensor} has data_offsets {show(offsets)}", "[begin, end]")
    begin, end = offsets
    # Python integers do not overflow. NumPy leaves zeros out when it checks the size it can hold.
    if math.prod(size or 1 for size in shape) * dtype.itemsize > _MAX_SIZE:
        raise damaged(path, f"{tensor} has shape {show(shape)}", "less than 2**63 bytes")
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        where = f"data_offsets {show(offsets)}"
        raise damaged(path, f"{tensor} has {where}, its shape {show(shape)} needs {nbytes} bytes")
    return Entry(dtype, tuple(shape), start + begin, start + end)


def _check_metadata(value: Any, path: str | os.PathLike[str]) -> None:
    plain = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    if not plain:
        raise damaged(path, f"{_METADATA} is not an object whose values are strings")


def read_header(data: Any, path: str | os.PathLike[str]) -> dict[str, Entry]:
    """The tensors of one file, in the order of their bytes.

    Args:
      data: the whole file: bytes or a memory map; only the header is read.
      path: for error messages.

    Raises:
      CheckpointError: any deviation of the header from the format.
    """
    refuse_pointer(data, path)
    size = len(data)
    if size < 8:
        raise damaged(path, f"{size} bytes are too few for a safetensors file", "8 or more")
    if data[:4] == b"PK\x03\x04":  # a zip: what torch.save writes, renamed
        raise pickle_refused(path)
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        what = f"not a safetensors file, or a damaged one (header of {length} bytes)"
        raise damaged(path, what, f"at most {MAX_HEADER_BYTES} bytes")
    if 8 + length > size:
        raise damaged(path, f"truncated: header of {length} bytes in a file of {size} bytes")
    start = 8 + length
    header = parse_json(bytes(data[8:start]), path)
    if _METADATA in header:
        _check_metadata(header.pop(_METADATA), path)
    try:
        "".join(header).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, written as an escape
        raise damaged(path, "a tensor's name is not Unicode text") from None
    entries = {name: _parse_entry(name, value, start, path) for name, value in header.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    position, previous = start, None
    for name, entry in ordered:
        if entry.end > size:
            what = f"tensor {show(name)} ends at byte {entry.end}, the file at {size}"
            raise damaged(path, f"truncated: {what}")
        if entry.begin < position:
            raise damaged(path, f"tensors {show(previous)} and {show(name)} overlap")
        if entry.begin > position:
            what = f"{entry.begin - position} unused bytes before tensor {show(name)}"
            raise damaged(path, what, "no gaps")
        position, previous = entry.end, name
    if position != size:
        raise damaged(path, f"{size - position} bytes after the last tensor", "no trailing bytes")
    return dict(ordered)


def build_header(
    tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]], metadata: Mapping[str, str]
) -> bytes:
    """Length and JSON header of a file that holds `tensors` in this order.

    Args:
      tensors: (name, shape, dtype).
      metadata: strings for `__metadata__`; left out if empty.

    Returns:
      Bytes, a multiple of 8 long, so that data sorted by falling item size are aligned.

    Raises:
      ValueError: a header so large that `read_header` would refuse it.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, shape, dtype in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        offsets = [position, end]
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES or len(header) >= MAX_TENSORS:
        raise ValueError("too many tensors for one safetensors file: write smaller shards")
    return len(text).to_bytes(8, "little") + text
