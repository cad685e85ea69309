"""Files of tensors for tests, by hand and by the safetensors library."""

import json
import time

import ml_dtypes
import numpy as np
import pytest

from efficient_vlm.checkpoints.safetensors_format import DTYPES, CheckpointError
from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.errors import UserError

safetensors = pytest.importorskip("safetensors")

F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)


def pack(header, data=b""):
    """A file from a header (an object, or raw bytes) and its data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(path, *parts, **options):
    """Opens `path`, checks the error (typed, three lines, under 2 s) and gives its text."""
    start = time.process_time()
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(path, **options)
    assert time.process_time() - start < 2
    text = str(error.value)
    assert isinstance(error.value, UserError) and len(text.splitlines()) <= 3
    assert len(text) < 1500
    for part in parts:
        assert part in text
    return text


def as_bytes(array):
    return np.ascontiguousarray(array).tobytes()


def declare(arrays):
    return [(k, v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()]


def random_arrays(count=6, seed=0, dtype=F32):
    rng = np.random.default_rng(seed)
    return {f"layer.{i}": rng.standard_normal((3 + i, 5)).astype(dtype) for i in range(count)}


def library_read(path):
    """name -> (dtype name, shape, bytes), by the safetensors library."""
    return {
        name: (value["dtype"], tuple(value["shape"]), bytes(value["data"]))
        for name, value in safetensors.deserialize(path.read_bytes())
    }


def our_read(path):
    ckpt = Checkpoint.open(path)
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {
        name: (names[ckpt.dtype(name)], ckpt.shape(name), as_bytes(ckpt.read(name)))
        for name in ckpt.names
    }
