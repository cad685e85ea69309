"""Reading and writing checkpoints, against the safetensors library and hostile files."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.interop import safetensors_format, safetensors_write
from efficient_vlm.interop.safetensors_format import DTYPES, CheckpointError
from efficient_vlm.interop.safetensors_read import INDEX, SINGLE, Checkpoint
from efficient_vlm.interop.safetensors_write import write

safetensors = pytest.importorskip("safetensors")
numpy_api = pytest.importorskip("safetensors.numpy")

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
    monkeypatch.setattr("efficient_vlm.interop.safetensors_read._CHUNK", 7)  # several pieces
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


# Directories, indexes, pickles.


def make_shards(directory, arrays=None):
    """Two shards and an index, written by the library and by hand; gives the index."""
    arrays = arrays or random_arrays(4)
    names = list(arrays)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        numpy_api.save_file({name: arrays[name] for name in part}, directory / shard)
        weight_map.update(dict.fromkeys(part, shard))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return index


def test_shards_with_an_index(tmp_path):
    arrays = random_arrays(4)
    make_shards(tmp_path, arrays)
    for path in (tmp_path, tmp_path / INDEX):
        ckpt = Checkpoint.open(path)
        assert set(ckpt.names) == set(arrays) and len(ckpt.files) == 2
        for name, array in arrays.items():
            np.testing.assert_array_equal(ckpt.read(name), array)
    # One shard by its name is a checkpoint of its own.
    assert len(Checkpoint.open(ckpt.files[0]).names) == 2


def test_links_are_followed(tmp_path):
    """The cache of huggingface_hub is a directory of links to blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    make_shards(tmp_path / "blobs")
    for number, path in enumerate(sorted((tmp_path / "blobs").iterdir())):
        path.rename(tmp_path / "blobs" / f"{number:040x}")
        (tmp_path / "snapshot" / path.name).symlink_to(tmp_path / "blobs" / f"{number:040x}")
    assert len(Checkpoint.open(tmp_path / "snapshot").names) == 4
    next((tmp_path / "blobs").iterdir()).unlink()
    refused(tmp_path / "snapshot", "missing")


def break_index(tmp_path, change):
    index = make_shards(tmp_path)
    change(index["weight_map"])
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def test_index_names_a_missing_shard(tmp_path):
    make_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors: the file is missing")


def test_index_names_a_tensor_the_shard_lacks(tmp_path):
    path = break_index(tmp_path, lambda m: m.update(extra="model-00001-of-00002.safetensors"))
    refused(path, "'extra' is not in model-00001-of-00002.safetensors")


def test_index_names_the_other_shard(tmp_path):
    path = break_index(
        tmp_path, lambda m: m.update({"layer.0": "model-00002-of-00002.safetensors"})
    )
    refused(path, "'layer.0' is not in model-00002-of-00002.safetensors")


def test_shard_holds_a_tensor_the_index_lacks(tmp_path):
    refused(break_index(tmp_path, lambda m: m.pop("layer.3")), "'layer.3'", "not in the index")


def test_tensor_in_two_shards(tmp_path):
    make_shards(tmp_path)
    arrays = random_arrays(4)
    numpy_api.save_file(
        {name: arrays[name] for name in ("layer.0", "layer.2", "layer.3")},
        tmp_path / "model-00002-of-00002.safetensors",
    )
    refused(tmp_path, "'layer.0' is also in model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/etc/x.safetensors", "a/../x.safetensors", "sub/x.safetensors"),
        *("..\\x.safetensors", "C:x.safetensors", "x\0.safetensors", "x\n.safetensors"),
        *("..", "", "x.bin", 7, None, ["x.safetensors"]),
    ],
)
def test_index_leaves_the_directory(name, tmp_path):
    (tmp_path / "in").mkdir()
    numpy_api.save_file(random_arrays(1), tmp_path / "x.safetensors")
    (tmp_path / "in" / INDEX).write_text(json.dumps({"weight_map": {"layer.0": name}}))
    refused(tmp_path / "in", "names the file", "own directory")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": ["a"]}', "weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice"),
        ("[" * 9 * 10**4, "nested too deeply"),
        ("[" * 10**6, "too many tensors"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (" " * (9 << 20) + "{}", "too much JSON"),
    ],
)
def test_broken_index(content, part, tmp_path):
    (tmp_path / INDEX).write_text(content)
    refused(tmp_path, part)


def test_huge_sparse_index_is_not_read(tmp_path):
    (tmp_path / INDEX).touch()
    os.truncate(tmp_path / INDEX, 1 << 40)
    refused(tmp_path, "too much JSON")


def test_directories_without_a_checkpoint(tmp_path):
    refused(tmp_path / "absent", "does not exist")
    refused(tmp_path / "absent.safetensors", "missing")
    refused(tmp_path, "neither")
    (tmp_path / "notes.txt").touch()
    refused(tmp_path / "notes.txt", "not a checkpoint")
    numpy_api.save_file(random_arrays(1), tmp_path / "adapter.safetensors")
    refused(tmp_path, "name the file you mean: adapter.safetensors")
    numpy_api.save_file(random_arrays(1), tmp_path / "model-00001-of-00002.safetensors")
    refused(tmp_path, f"download {INDEX}")
    (tmp_path / SINGLE).touch()
    (tmp_path / INDEX).touch()
    refused(tmp_path, "two checkpoints")


def test_a_directory_or_a_pipe_in_place_of_a_file(tmp_path):
    (tmp_path / "a" / SINGLE).mkdir(parents=True)
    refused(tmp_path / "a", "not a plain file")
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / SINGLE)
    refused(tmp_path / "b", "not a plain file")


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "x.pt", "x.pth", "x.ckpt", "x.pkl"],
)
def test_pickles_are_refused_and_never_opened(name, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    import pickle

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    for path in (tmp_path, tmp_path / name):
        refused(path, "never opened", "weights_only=True", "save_file")
    assert not (tmp_path / "exploded").exists()


def test_sha256(tmp_path):
    make_shards(tmp_path)
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()}
    Checkpoint.open(tmp_path, sha256=digests)
    shard = "model-00001-of-00002.safetensors"
    Checkpoint.open(tmp_path / shard, sha256={shard: digests[shard].upper()})
    refused(tmp_path, "no SHA-256", sha256={shard: digests[shard]})
    refused(tmp_path, "64 hexadecimal", sha256={**digests, shard: "abc"})
    refused(tmp_path, "not a file name", sha256={**digests, "../x": "0" * 64})
    refused(tmp_path, "missing", sha256={**digests, "config.json": "0" * 64})
    content = bytearray((tmp_path / shard).read_bytes())
    content[-1] ^= 1
    (tmp_path / shard).write_bytes(content)
    refused(tmp_path, shard, digests[shard], sha256=digests)


# Writing.


def test_single_file_is_the_librarys_byte_for_byte(tmp_path):
    arrays = {**random_arrays(3), "z": np.arange(3, dtype=np.uint8), "y": np.ones(3, np.float16)}
    arrays["zero"] = np.zeros((0, 2), np.uint8)
    assert write(tmp_path, declare(arrays)) == (tmp_path / SINGLE,)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    # The library sorts by item size, then by name: the order above, apart from the dtype.
    assert (tmp_path / SINGLE).read_bytes() == numpy_api.save(arrays, {"format": "pt"})


def test_written_shards_are_read_by_the_library(tmp_path):
    arrays = random_arrays(7) | {
        "scalar": np.asarray(2.5, np.float64),
        "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
        "bf16": np.ones((3, 3), BF16),
    }
    files = write(tmp_path, declare(arrays), max_shard_bytes=300)
    assert [path.name for path in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert index["weight_map"].keys() == arrays.keys()
    for path in files:
        with safetensors.safe_open(path, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
        header = len(path.read_bytes()) - sum(len(v[2]) for v in library_read(path).values())
        assert header % 8 == 0
        sizes = [arrays[n].nbytes for n, file in index["weight_map"].items() if file == path.name]
        assert sum(sizes) <= 300 or len(sizes) == 1
        for name, (_, shape, data) in library_read(path).items():
            assert index["weight_map"][name] == path.name
            assert shape == arrays[name].shape and data == as_bytes(arrays[name])
    ckpt = Checkpoint.open(tmp_path)
    assert all(ckpt.read(name).flags.aligned for name in ckpt.names)


def test_mixed_item_sizes_stay_aligned(tmp_path):
    write(tmp_path, declare({"odd": np.ones(3, np.uint8), "wide": np.ones(2, np.float64)}))
    ckpt = Checkpoint.open(tmp_path)
    assert ckpt.names == ("wide", "odd") and ckpt.read("wide").flags.aligned


_KILLED = """
import os, signal, sys
import numpy as np
from efficient_vlm.interop.safetensors_write import write
directory, stop = sys.argv[1], int(sys.argv[2])
def make(i):
    if i == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    return np.full((100,), i, np.float32)
write(
    directory,
    [(f"t{i}", (100,), np.dtype("float32"), lambda i=i: make(i)) for i in range(6)],
    max_shard_bytes=int(sys.argv[3]),
)
"""


def numbered(count=6, add=0):
    return declare({f"t{i}": np.full((100,), i + add, np.float32) for i in range(count)})


def kill_a_writer(directory, stop, max_shard_bytes):
    result = subprocess.run(
        [sys.executable, "-c", _KILLED, str(directory), str(stop), str(max_shard_bytes)]
    )
    assert result.returncode == -9


def test_killed_writer_resumes(tmp_path):
    kill_a_writer(tmp_path, 5, 800)  # two tensors a shard: dies in the middle of the third
    assert any(path.suffix == ".tmp" for path in tmp_path.iterdir())
    refused(tmp_path, "finish writing")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == 2
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in shards]
    files = write(tmp_path, numbered(), max_shard_bytes=800)
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in shards] == before
    assert {path.name for path in tmp_path.iterdir()} == {INDEX, *(path.name for path in files)}
    ckpt = Checkpoint.open(tmp_path)
    for i in range(6):
        np.testing.assert_array_equal(ckpt.read(f"t{i}"), np.full(100, i))


def test_killed_writer_of_one_file_leaves_nothing_to_load(tmp_path):
    kill_a_writer(tmp_path, 3, 10**6)
    refused(tmp_path, "neither")
    write(tmp_path, numbered())
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_resume_never_keeps_the_weights_of_another_step(tmp_path):
    """Same names, shapes and shard sizes, other values."""
    write(tmp_path, numbered(), max_shard_bytes=800)
    tensors = numbered(add=7)

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, [*tensors[:5], (*tensors[5][:3], fail)], max_shard_bytes=800)
    refused(tmp_path, "finish writing")  # old and new shards: not a checkpoint
    write(tmp_path, tensors, max_shard_bytes=800)
    ckpt = Checkpoint.open(tmp_path)
    assert [ckpt.read(f"t{i}")[0] for i in range(6)] == [7, 8, 9, 10, 11, 12]


def test_writing_again_changes_nothing(tmp_path):
    for size in (800, 10**6):
        directory = tmp_path / str(size)
        files = write(directory, numbered(), max_shard_bytes=size)
        before = [path.stat().st_mtime_ns for path in files]
        write(directory, numbered(), max_shard_bytes=size)
        assert [path.stat().st_mtime_ns for path in files] == before
        Checkpoint.open(directory)


@pytest.mark.parametrize("sizes", [(10**6, 800), (800, 10**6), (800, 1200)])
def test_other_weights_in_the_directory_are_refused(sizes, tmp_path):
    write(tmp_path, numbered(), max_shard_bytes=sizes[0])
    with pytest.raises(UserError, match="holds other weights"):
        write(tmp_path, numbered(), max_shard_bytes=sizes[1])
    Checkpoint.open(tmp_path)


def test_full_disk(tmp_path):
    """A limit on the size of a file stands in for the disk: the same system call fails."""
    script = (
        "import resource, signal, sys, numpy as np\n"
        "from efficient_vlm.interop.safetensors_write import write\n"
        "from efficient_vlm.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "make = lambda: np.ones(4000, np.uint8)\n"
        "try:\n"
        "    write(sys.argv[1], [(n, (4000,), np.dtype('u1'), make) for n in 'ab'])\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "model.safetensors: cannot be written (File too large)" in run.stdout
    assert len(run.stdout.splitlines()) == 2 and not run.stderr
    assert not list(tmp_path.iterdir())  # the space is given back


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "x", numbered())


def test_an_error_of_the_source_is_not_called_a_full_disk(tmp_path):
    def fail():
        raise FileNotFoundError("source")

    with pytest.raises(FileNotFoundError, match="source"):
        write(tmp_path, [("x", (1,), F32, fail)])
    assert not list(tmp_path.iterdir())


def test_wrong_declarations(tmp_path):
    one = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="instead of"):
        write(tmp_path, [("x", (2,), F32, lambda: one)])
    with pytest.raises(ValueError, match="instead of"):
        write(tmp_path, [("x", (1,), BF16, lambda: one)])
    with pytest.raises(ValueError, match="same name"):
        write(tmp_path, declare({"x": one}) * 2)
    with pytest.raises(ValueError, match="no place"):
        write(tmp_path, declare({"x": np.ones(1, "datetime64[s]")}))
    with pytest.raises(ValueError, match="no place"):
        write(tmp_path, declare({"__metadata__": one}))
    with pytest.raises(UserError, match="max_shard_bytes"):
        write(tmp_path, declare({"x": one}), max_shard_bytes=0)


# Memory, imports, the bar.

_MEMORY = """
import json, sys, tracemalloc
import numpy as np
from efficient_vlm.interop.safetensors_read import Checkpoint
from efficient_vlm.interop.safetensors_write import write

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("RssAnon"))

directory, MB = sys.argv[1], 1 << 20
rng = np.random.default_rng(0)
bits = rng.integers(0, 2**14, 10 * MB, dtype=np.uint16).view("float16")
tracemalloc.start()
declared = [(f"t{i}", bits.shape, bits.dtype, lambda i=i: bits + i) for i in range(10)]
write(directory, declared, max_shard_bytes=50 * MB)
result = {"write": tracemalloc.get_traced_memory()[1]}
del bits, declared
tracemalloc.reset_peak()
floor, base = tracemalloc.get_traced_memory()[0], anonymous()
ckpt = Checkpoint.open(directory)
views = [ckpt.read(name, finite=True) for name in ckpt.names]
result["read"] = tracemalloc.get_traced_memory()[1] - floor
result["anonymous"] = anonymous() - base
del views
tracemalloc.reset_peak()
floor = tracemalloc.get_traced_memory()[0]
for name in ckpt.names:
    np.array(ckpt.read(name)).sum(dtype="float64")
result["copy"] = tracemalloc.get_traced_memory()[1] - floor
result["total"] = ckpt.nbytes
assert "jax" not in sys.modules
print(json.dumps(result))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory(tmp_path):
    """200 MiB in ten tensors of 20: never two tensors at once, and none by only reading."""
    run = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert not run.stderr  # not a terminal: no bar
    peaks = {name: value / (1 << 20) for name, value in json.loads(run.stdout).items()}
    print({name: round(value, 1) for name, value in peaks.items()}, "MiB")
    assert peaks["total"] == 200
    assert peaks["write"] < 30  # one tensor
    assert peaks["read"] < 5 and peaks["anonymous"] < 10
    assert peaks["copy"] < 30  # one tensor


def test_bar_only_on_a_terminal(tmp_path):
    pty = pytest.importorskip("pty")
    write(tmp_path, numbered(), max_shard_bytes=800)
    script = (
        "import sys; from efficient_vlm.interop.progress import progress\n"
        "from efficient_vlm.interop.safetensors_read import Checkpoint\n"
        "ckpt = Checkpoint.open(sys.argv[1])\n"
        "size = lambda name: ckpt.read(name).nbytes\n"
        "names = list(progress(ckpt.names, size, ckpt.nbytes, 'reading [x]'))\n"
        "assert names == list(ckpt.names)\n"
    )
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(command, stderr=slave, check=True, env=environment)
    os.close(slave)
    shown = os.read(master, 10**6).decode()
    os.close(master)
    assert "reading [x]" in shown and "2.4/2.4 kB" in shown
    run = subprocess.run(command, capture_output=True, check=True)
    assert run.stdout == run.stderr == b""


def test_a_header_we_would_refuse_is_never_written(monkeypatch, tmp_path):
    monkeypatch.setattr(safetensors_format, "MAX_HEADER_BYTES", 100)
    with pytest.raises(ValueError, match="smaller shards"):
        safetensors_write.write(tmp_path, numbered())
