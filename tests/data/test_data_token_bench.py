"""Builds of token_bench: reproducible, whole or absent, and verified."""

import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from efficient_vlm.data import questions, scenes
from efficient_vlm.data.sources import build_token_bench, open_source, scene_config
from efficient_vlm.data.token_bench import store
from efficient_vlm.errors import UserError
from efficient_vlm.processing import decode_image as images

SIZES = {"train": 10, "test": 3}
SCENE = scenes.SceneConfig(question_pool=8)


def shards(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*array_record*")
    }


@pytest.fixture
def built(tmp_path):
    return store.ensure(tmp_path, SCENE, SIZES)


def test_two_builds_are_equal(tmp_path, built):
    other = store.ensure(tmp_path / "other", SCENE, SIZES)
    assert shards(built) == shards(other) and len(shards(built)) == 2
    assert store.manifest(built) == store.manifest(other)


def test_manifest(built):
    manifest = store.manifest(built)
    for name, digest in shards(built).items():
        assert manifest["files"][name] == {
            "bytes": (built / name).stat().st_size,
            "sha256": digest,
        }
    assert set(manifest["files"]) == {p.name for p in built.iterdir()} - {"manifest.json"}
    assert manifest["splits"]["train"]["images"] == 10
    assert sum(manifest["splits"]["test"]["questions"].values()) == 3 * 8
    assert "UCI" in manifest["source"] and "CC-BY" in manifest["licence"]
    assert manifest["knobs"]["canvas"] == 64


def test_records_are_the_scenes(built):
    for split, number in SIZES.items():
        source = store.data_source(built, split)
        assert len(source) == number
        for index in range(number):
            scene, rng = scenes.compose(SCENE, split, index)
            asked = questions.draw(scene, SCENE, rng)
            row = source[index]
            assert row["index"] == index and row["background"] == scene.background
            np.testing.assert_array_equal(images.decode(row["image"]), scene.image)
            np.testing.assert_array_equal(row["glyphs"], scene.glyphs)
            assert [p.decode() for p in row["prompts"]] == [q.prompt for q in asked]
            assert [a.decode() for a in row["answers"]] == [q.answer for q in asked]
            assert [SCENE.tasks[t] for t in row["tasks"]] == [q.task for q in asked]


def test_no_source_glyph_crosses_in_a_build(small):
    used = {}
    for split in scenes.SPLITS:
        source = open_source(small, split)
        used[split] = {int(g) for i in range(len(source)) for g in source[i].meta["glyphs"][:, 6]}
    assert used["train"] and used["test"] and not used["train"] & used["test"]


def test_different_knobs_never_share_a_folder(tmp_path):
    variants = [
        SCENE,
        scenes.SceneConfig(question_pool=8, seed=1),
        scenes.SceneConfig(question_pool=8, noise=0.02),
        scenes.SceneConfig(question_pool=8, tasks=("needle",)),
    ]
    places = {store.location(tmp_path, v, SIZES) for v in variants}
    places |= {store.location(tmp_path, SCENE, SIZES | {"test": 4})}
    assert len(places) == 5


@pytest.mark.parametrize("damage", ["missing", "short", "flip", "manifest"])
def test_damage_is_found(built, damage):
    shard = next(built.glob("*train*"))
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(data[:-1])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        store.verify(built)  # Sizes alone cannot tell.
    else:
        (built / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged") as caught:
        store.verify(built, full=True)
    assert len(str(caught.value).splitlines()) <= 3


def test_builds_at_once_do_not_disturb_each_other(tmp_path):
    code = (
        "import sys; from efficient_vlm.data import scenes; "
        "from efficient_vlm.data.token_bench import store; "
        f"store.ensure(sys.argv[1], scenes.SceneConfig(question_pool=8), {SIZES!r}, full=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command) for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = [pool.submit(store.ensure, tmp_path, SCENE, SIZES) for _ in range(2)]
        folders = {future.result() for future in futures}
    assert [process.wait(120) for process in running] == [0, 0]
    (folder,) = folders
    store.verify(folder, full=True)
    assert not list(tmp_path.rglob(".building-*"))


def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("stopped")

    monkeypatch.setattr(store, "_write_manifest", broken)
    with pytest.raises(RuntimeError, match="stopped"):
        store.ensure(tmp_path, SCENE, SIZES)
    assert not store.location(tmp_path, SCENE, SIZES).exists()
    assert not list(tmp_path.rglob(".building-*"))


def test_leftovers_of_killed_builds_go_after_a_day(tmp_path):
    folder = store.location(tmp_path, SCENE, SIZES).parent
    for name, age in ((".building-old", 2 * 86_400), (".building-new", 60)):
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (time.time() - age,) * 2)
    store.ensure(tmp_path, SCENE, SIZES)
    assert [p.name for p in folder.glob(".building-*")] == [".building-new"]


def test_default_root(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFICIENT_VLM_DATA", str(tmp_path))
    assert store.default_root() == tmp_path
    monkeypatch.delenv("EFFICIENT_VLM_DATA")
    assert store.default_root().parts[-3:] == (".cache", "efficient_vlm", "data")


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.dir"):
        store.ensure(tmp_path / "file", SCENE, SIZES)


def test_no_images_asked_for(tmp_path):
    with pytest.raises(UserError, match="data.train_images"):
        store.ensure(tmp_path, SCENE, {"train": 0, "test": 1})


def test_scene_config_has_every_knob(small):
    scene = scene_config(small)
    assert scene.canvas == 64 and scene.tasks == small.tasks
    folder = build_token_bench(small)
    assert json.loads((folder / "manifest.json").read_text())["knobs"]["tasks"] == list(small.tasks)


def test_import_is_light():
    code = (
        "import sys, efficient_vlm.data as d; d.DataConfig; "
        "print([m for m in ('jax', 'grain', 'tensorflow_datasets', 'PIL', 'matplotlib')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_tensorflow():
    assert "tensorflow" not in sys.modules
    assert not [
        p
        for p in Path(store.__file__).parent.glob("*.py")
        if "import tensorflow\n" in p.read_text()
    ]
