"""Checkpoints of several files: directories, indexes, digests; and pickles."""

import hashlib
import json
import os
import warnings

import numpy as np
import pytest
from tensor_files import random_arrays, refused

from efficient_vlm.checkpoints.safetensors_format import CheckpointError
from efficient_vlm.checkpoints.safetensors_index import locate
from efficient_vlm.checkpoints.safetensors_read import INDEX, SINGLE, Checkpoint

numpy_api = pytest.importorskip("safetensors.numpy")


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
    refused(tmp_path, f"name the file you mean: {tmp_path / 'adapter.safetensors'}")
    numpy_api.save_file(random_arrays(1), tmp_path / "model-00001-of-00002.safetensors")
    refused(tmp_path, f"download {INDEX}")


def test_a_file_beside_an_index(tmp_path):
    """Its own, a stale or a damaged index: the file is read. With all shards, there are two."""
    arrays = random_arrays(2)
    numpy_api.save_file(arrays, tmp_path / SINGLE)

    def index(content):
        (tmp_path / INDEX).write_text(content)
        return set(Checkpoint.open(tmp_path).names)

    own = {"weight_map": dict.fromkeys(arrays, SINGLE)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert index(json.dumps(own)) == set(arrays)
    gone = {"weight_map": dict.fromkeys(["layer.0", "old"], "model-00001-of-00002.safetensors")}
    with pytest.warns(UserWarning, match="other files, which are not there"):
        assert index(json.dumps(gone)) == set(arrays)
    with pytest.warns(UserWarning, match="lists other tensors than model.safetensors"):
        assert index(json.dumps({"weight_map": dict.fromkeys(["old"], SINGLE)})) == set(arrays)
    with pytest.warns(UserWarning, match="model.safetensors is read; .*not JSON"):
        assert index("") == set(arrays)
    make_shards(tmp_path, random_arrays(4))
    with pytest.raises(CheckpointError, match="two checkpoints") as caught:
        Checkpoint.open(tmp_path)
    advice = str(caught.value).rpartition("name one: ")[2].split(" or ")
    assert [len(Checkpoint.open(path).names) for path in advice] == [2, 4]
    (tmp_path / SINGLE).rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / INDEX).unlink()
    for shard in tmp_path.glob("*-00002.safetensors"):
        shard.unlink()
    with pytest.raises(CheckpointError, match="name the file you mean") as caught:
        Checkpoint.open(tmp_path)
    assert len(Checkpoint.open(str(caught.value).rpartition("mean: ")[2]).names) == 2


def test_a_shard_is_no_model(tmp_path):
    """By its name with or without an index, or by the index alone; the advice opens the model."""
    make_shards(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    with pytest.raises(CheckpointError, match="one of 2 shards") as caught:
        locate(shard)
    folder, weights = locate(str(caught.value).rpartition("give ")[2])
    assert len(Checkpoint.open(weights).names) == 4
    assert locate(tmp_path / INDEX) == (folder, tmp_path / INDEX)
    index = (tmp_path / INDEX).read_text()
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"one of 2 shards(?s:.)*download {INDEX}"):
        locate(shard)
    shard.rename(tmp_path / "vision.safetensors")
    assert locate(tmp_path / "vision.safetensors") == (tmp_path, tmp_path / "vision.safetensors")
    (tmp_path / INDEX).write_text(index.replace(shard.name, "vision.safetensors"))
    with pytest.raises(CheckpointError, match="one of 2 shards"):
        locate(tmp_path / "vision.safetensors")
    with pytest.raises(CheckpointError, match="no such directory"):
        locate(tmp_path / "absent")


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
