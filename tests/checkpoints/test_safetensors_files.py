"""Reading one file, against the safetensors library and hostile files."""

import json
import os
import random
import time

import ml_dtypes
import numpy as np
import pytest
from tensor_files import BF16, declare, entry, library_read, our_read, pack, random_arrays, refused

from efficient_vlm.checkpoints import safetensors_format
from efficient_vlm.checkpoints.safetensors_format import DTYPES, CheckpointError
from efficient_vlm.checkpoints.safetensors_read import SINGLE, Checkpoint
from efficient_vlm.checkpoints.safetensors_write import write

safetensors = pytest.importorskip("safetensors")
numpy_api = pytest.importorskip("safetensors.numpy")


@pytest.fixture
def file(tmp_path):
    """file(content) -> path of a safetensors file with these bytes."""

    def make(content, name="x.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return make


# Reading what the library wrote.


def test_reads_what_the_library_wrote(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": rng.standard_normal((7, 3)).astype(np.float32),
        "half": rng.standard_normal((2, 2, 2)).astype(np.float16),
        "long": np.arange(5),
        "flag": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float32),
        "complex": np.array([1 + 2j], np.complex64),
        "ünïcode 名": np.arange(3, dtype=np.uint8),
    }
    numpy_api.save_file(arrays, tmp_path / SINGLE, {"format": "pt"})
    ckpt = Checkpoint.open(tmp_path)
    assert set(ckpt.names) == set(arrays)
    assert ckpt.nbytes == sum(array.nbytes for array in arrays.values())
    for name, array in arrays.items():
        got = ckpt.read(name, finite=True)
        assert got.dtype == array.dtype == ckpt.dtype(name)
        assert got.shape == array.shape == ckpt.shape(name)
        np.testing.assert_array_equal(got, array)
        assert not got.flags.writeable and not got.flags.owndata


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_goes_through_the_library(name, file):
    dtype = DTYPES[name]
    data = bytes(range(3 * dtype.itemsize)) if name != "BOOL" else b"\0\1\1"
    path = file(pack({"a": entry([3, 1], 0, len(data), name), "s": entry([], 0, 0, name)}, data))
    refused(path, "'s'", "needs")  # a scalar has one element
    path = file(pack({"a": entry([3, 1], 0, len(data), name)}, data))
    assert our_read(path) == library_read(path) == {"a": (name, (3, 1), data)}


def test_unaligned_data_and_any_header_order(file):
    value = np.array([1.5, -2], ml_dtypes.bfloat16)
    header = {"later": entry([2], 1, 5, "BF16"), "first": entry([1], 0, 1, "U8")}
    path = file(pack(header, b"\7" + value.tobytes()))
    ckpt = Checkpoint.open(path)
    assert ckpt.names == ("first", "later")
    np.testing.assert_array_equal(ckpt.read("later", finite=True), value)
    assert library_read(path) == our_read(path)


def test_an_array_outlives_its_checkpoint_and_the_name(tmp_path):
    arrays = random_arrays(1)
    numpy_api.save_file(arrays, tmp_path / SINGLE)
    array = Checkpoint.open(tmp_path).read("layer.0")
    os.unlink(tmp_path / SINGLE)
    np.testing.assert_array_equal(array, arrays["layer.0"])
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_unknown_tensor(tmp_path):
    numpy_api.save_file(random_arrays(), tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="did you mean 'layer.1'"):
        Checkpoint.open(tmp_path).read("layr.1")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, BF16, DTYPES["F8_E4M3"]])
def test_nan_is_counted_and_named(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("efficient_vlm.checkpoints.safetensors_read._CHUNK", 7)  # several pieces
    array = np.ones((5, 5), dtype)
    array[[0, 2, 4], [0, 3, 4]] = np.nan
    fine = np.ones((5, 5), dtype)
    write(tmp_path, declare({"good": fine, "bad": array}))
    ckpt = Checkpoint.open(tmp_path)
    assert np.isnan(ckpt.read("bad").astype(np.float32)).sum() == 3  # nothing read, nothing refused
    ckpt.read("good", finite=True)
    with pytest.raises(CheckpointError, match="'bad': 3 of 25 values are NaN or Inf"):
        ckpt.read("bad", finite=True)


def test_infinity_is_refused(tmp_path):
    write(tmp_path, declare({"x": np.array([1, -np.inf], np.float32)}))
    with pytest.raises(CheckpointError, match="1 of 2"):
        Checkpoint.open(tmp_path).read("x", finite=True)


# Hostile single files.

HOSTILE = {
    "empty file": (b"", "0 bytes"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "too few"),
    "header longer than the file": (pack({})[:8] + b"{", "truncated: header"),
    "header of 2**64 - 1 bytes": (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
    "header of 101 MB": ((101 * 10**6).to_bytes(8, "little") + b"{}", "at most"),
    "not UTF-8": (pack(b'{"\xff\xfe": 1}'), "not UTF-8"),
    "UTF-16": (pack("{}".encode("utf-16")), "not UTF-8"),
    "not JSON": (pack(b"hello"), "not JSON"),
    "no header": (pack(b""), "not JSON"),
    "a list": (pack([1]), "list, not a JSON object"),
    "JSON bomb": (pack(b'{"a":' + b"[" * 9 * 10**4), "nested too deeply"),
    "JSON bomb of objects": (pack(b'{"a":' * 4 * 10**4), "nested too deeply"),
    "number of a million digits": (pack(b'{"a":' + b"9" * 10**6 + b"}"), "not JSON"),
    "duplicate tensor": (
        pack(b'{"w":%s,"w":%s}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), b"1234"),
        "key 'w' appears twice",
    ),
    "duplicate field": (
        pack(b'{"w":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', b"1234"),
        "key 'shape' appears twice",
    ),
    "half a surrogate": (
        pack(rb'{"\ud800":%s}' % json.dumps(entry([0], 0, 0)).encode()),
        "Unicode",
    ),
    "not an object": (pack({"w": 3}), "other fields"),
    "missing field": (pack({"w": {"dtype": "F32", "shape": [1]}}), "other fields"),
    "unknown dtype": (pack({"w": entry([1], 0, 4, "F31")}, b"1234"), "'F31'"),
    "dtype is a list": (pack({"w": entry([1], 0, 4, ["F32"])}, b"1234"), "dtype"),
    "negative shape": (pack({"w": entry([-1, -1], 0, 4)}, b"1234"), "shape [-1, -1]"),
    "huge dimension": (pack({"w": entry([2**64], 0, 4)}, b"1234"), "shape"),
    # In 64 bits the product would wrap to the 4 bytes that are there.
    "overflowing shape": (pack({"w": entry([2**31 + 1, 2**33, 4], 0, 4)}, b"1234"), "2**63"),
    "wraps to zero": (pack({"w": entry([2**32, 2**30], 0, 0)}), "2**63"),
    "nothing of a huge shape": (pack({"w": entry([0, 2**62, 2**62], 0, 0)}), "2**63"),
    "fraction in shape": (pack({"w": entry([1.0], 0, 4)}, b"1234"), "shape [1.0]"),
    "bool in shape": (pack({"w": entry([True], 0, 4)}, b"1234"), "shape [True]"),
    "shape is a number": (pack({"w": entry(1, 0, 4)}, b"1234"), "shape 1"),
    "a thousand dimensions": (pack({"w": entry([1] * 1000, 0, 4)}, b"1234"), "at most 32"),
    "shape does not fit": (pack({"w": entry([2], 0, 4)}, b"1234"), "needs 8 bytes"),
    "three offsets": (
        pack({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"1234"),
        "[begin, end]",
    ),
    "negative offset": (pack({"w": entry([1], -4, 0)}, b"1234"), "data_offsets"),
    "bool offset": (pack({"w": entry([0], False, 0)}), "data_offsets"),
    "end before begin": (pack({"w": entry([1], 4, 0)}, b"1234"), "data_offsets [4, 0]"),
    "outside the file": (pack({"w": entry([1], 400, 404)}, b"1234"), "truncated"),
    "truncated data": (pack({"w": entry([2], 0, 8)}, b"1234567"), "truncated"),
    "overlap": (
        pack({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
        "tensors 'a' and 'b' overlap",
    ),
    "same bytes twice": (pack({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "overlap"),
    "gap": (
        pack({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
        "4 unused bytes before tensor 'b'",
    ),
    "gap at the start": (pack({"a": entry([1], 4, 8)}, bytes(8)), "4 unused bytes"),
    "trailing bytes": (pack({"a": entry([1], 0, 4)}, bytes(5)), "1 bytes after the last tensor"),
    "metadata with numbers": (pack({"__metadata__": {"n": 1}}), "__metadata__"),
    "metadata is a list": (pack({"__metadata__": ["pt"]}), "__metadata__"),
    "LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "Git LFS pointer",
    ),
    "a web page": (b"<!DOCTYPE html><html>Not found</html>", "not a safetensors file"),
    "a renamed pickle": (b"PK\x03\x04" + bytes(60), "never opened"),
    "a long name": (pack({"n" * 10**6: entry([1], 0, 8)}, bytes(8)), "nnn..."),
    "terminal codes": (pack({"\x1b[2Jx": entry([1], 0, 8)}, bytes(8)), r"\x1b[2Jx"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(case, file):
    content, part = HOSTILE[case]
    text = refused(file(content), part)
    assert "\x1b" not in text


def test_a_million_tensors(file):
    entries = ",".join(
        f'"{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(10**6)
    )
    refused(file(pack(f"{{{entries}}}".encode(), bytes(10**6))), "at most")
    # Small enough in bytes, too many in number.
    entries = ",".join(f'"{i}":{{}}' for i in range(600_000))
    refused(file(pack(f"{{{entries}}}".encode())), "too many tensors")


@pytest.mark.parametrize("item", ['"{}":1', '"{}":[]', '"{}":{{"a":0}}'])
def test_the_busiest_header_is_refused_in_time(item, file):
    items = ",".join(item.format(i) for i in range(safetensors_format.MAX_TENSORS - 2))
    refused(file(pack(f"{{{items}}}".encode())), "other fields")


@pytest.mark.parametrize("number", ["1", "0.5", "9" * 4000])
def test_the_largest_header_is_refused_in_time(number, file):
    count = safetensors_format.MAX_HEADER_BYTES // (len(number) + 1) - 100
    shape = ",".join([number] * count)
    header = f'{{"w":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,4]}}}}'
    refused(file(pack(header.encode(), bytes(4))), "shape")


def test_the_largest_honest_header_opens_in_time(file):
    count = safetensors_format.MAX_TENSORS - 2
    header = {f"{i}": entry([1, 1], i, i + 1, "U8") for i in range(count)}
    path = file(pack(json.dumps(header, separators=(",", ":")).encode(), bytes(count)))
    start = time.process_time()
    assert len(Checkpoint.open(path).names) == count
    assert time.process_time() - start < 2


def test_accepts_only_what_the_library_accepts(file):
    """Random changes of one byte: whatever we read, the library reads to the same bytes."""
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int8)}
    good = numpy_api.save(arrays, {"format": "pt"})
    length = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(0)
    accepted = stricter = 0
    for _ in range(1500):
        content = bytearray(good)
        content[rng.randrange(length)] = rng.choice(b'0123456789"{}[],:-FIU abt_\x00\xff')
        path = file(bytes(content))
        try:
            ours = our_read(path)
        except CheckpointError:
            ours = None
        try:
            theirs = library_read(path)
        except safetensors.SafetensorError:
            theirs = None
        if ours is not None:
            accepted += 1
            assert ours == theirs
        elif theirs is not None:
            stricter += 1
    assert accepted > 100  # changes of a name, of the metadata, of white space
    assert stricter < accepted / 10
