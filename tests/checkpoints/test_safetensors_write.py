"""Writing checkpoints: bytes of the safetensors library, kills, full disks, memory."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tensor_files import BF16, F32, as_bytes, declare, library_read, random_arrays, refused

from efficient_vlm.checkpoints import safetensors_format, safetensors_write
from efficient_vlm.checkpoints.safetensors_read import INDEX, SINGLE, Checkpoint
from efficient_vlm.checkpoints.safetensors_write import write
from efficient_vlm.errors import UserError

safetensors = pytest.importorskip("safetensors")
numpy_api = pytest.importorskip("safetensors.numpy")


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
from efficient_vlm.checkpoints.safetensors_write import write
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
        "from efficient_vlm.checkpoints.safetensors_write import write\n"
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
    with pytest.raises(ValueError, match="not allowed by the format"):
        write(tmp_path, declare({"x": np.ones(1, "datetime64[s]")}))
    with pytest.raises(ValueError, match="not allowed by the format"):
        write(tmp_path, declare({"__metadata__": one}))
    with pytest.raises(UserError, match="max_shard_bytes"):
        write(tmp_path, declare({"x": one}), max_shard_bytes=0)


# Memory, imports, the bar.

_MEMORY = """
import json, sys, tracemalloc
import numpy as np
from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.checkpoints.safetensors_write import write

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
        "import sys; from efficient_vlm.byte_bar import progress\n"
        "from efficient_vlm.checkpoints.safetensors_read import Checkpoint\n"
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
