"""Runs that start from a published model: stopped, killed, loaded, exported, and in a notebook."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import QUICK_TO_COMPILE
from tuned_models import SMOLVLM, Stop, mixed_rows, tuning_config, write_rows

import efficient_vlm as evlm
from efficient_vlm.cli import run as commands
from efficient_vlm.errors import UserError
from efficient_vlm.families.weights import Weights
from efficient_vlm.fields import to_dict
from efficient_vlm.inference.pretrained import Pretrained
from efficient_vlm.processing.labels import labelled
from efficient_vlm.processing.request import Example
from efficient_vlm.sharding import path_of
from efficient_vlm.train import guards, loop
from efficient_vlm.train.base import open_base
from efficient_vlm.train.metrics import read_metrics
from efficient_vlm.train.pretrained_fields import PretrainedFields

LORA = dict(name="lora", rank=3, alpha=6.0, targets="decoder")
ADAPTED = ("query/kernel", "key/kernel", "value/kernel", "out/kernel", "gate/kernel", "up/kernel")
ADAPTED += ("down/kernel",)


def train(config, workdir, after=None):
    workdir.mkdir(exist_ok=True)
    guards.check_workdir_config(workdir, to_dict(config), ignore=())
    return loop.train(config, workdir, stop=Stop(after), say=lambda line: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A copy of the tiny SmolVLM, which some test changes."""
    folder = tmp_path_factory.mktemp("base") / "smolvlm"
    shutil.copytree(SMOLVLM, folder)
    return folder


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return write_rows(folder / "rows.jsonl", mixed_rows(folder, 12))


@pytest.fixture(scope="module")
def lora(base, rows_file, tmp_path_factory):
    """(workdir, what `loop.train` gave) of six undisturbed steps."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    return workdir, train(tuning_config(base, rows_file, adapt=LORA), workdir)


def named_leaves(params):
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def assert_goes_on(config, workdir, whole):
    """Stopped after three steps, then on to where an undisturbed run ends, to the last bit."""
    with pytest.raises(loop.Stopped, match="stopped after step 3"):
        train(config, workdir, after=3)
    again = train(config, workdir)
    for name in ("params_sha256", "state_sha256"):
        assert again.summary[name] == whole.summary[name]
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2, 3, 4, 5, 6]


def test_a_stopped_run_goes_on(lora, base, rows_file, tmp_path):
    assert_goes_on(tuning_config(base, rows_file, adapt=LORA), tmp_path / "run", lora[1])
    losses = [row["loss"] for row in read_metrics(lora[0])]
    assert losses == [row["loss"] for row in read_metrics(tmp_path / "run")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapt", [dict(name="full"), dict(name="qlora", rank=2, targets="all-linear")]
)
def test_a_stopped_run_goes_on_whatever_is_trained(base, rows_file, tmp_path, adapt):
    config = tuning_config(base, rows_file, adapt=adapt)
    assert_goes_on(config, tmp_path / "run", train(config, tmp_path / "whole"))


def test_a_checkpoint_has_what_is_trained_alone(lora, base):
    """Factors of the products of the decoder and their moments; all else is as it was."""
    stored = json.loads((lora[0] / "checkpoints" / "6" / "checkpoint.json").read_text())
    paths = {leaf["path"] for leaf in stored["leaves"]}
    params = {path.removeprefix("params/") for path in paths if path.startswith("params/")}
    known = open_base(PretrainedFields(str(base))).parameters()
    products = {p for p in known if p.startswith("language/layers/") and p.endswith(ADAPTED)}
    assert len(products) == 7
    assert params == {f"{path}/{factor}" for path in products for factor in "ab"}
    moments = [p for p in paths if "/mu/" in p or "/nu/" in p]
    assert len(moments) == 2 * len(params)
    shapes = [leaf["shape"] for leaf in stored["leaves"] if leaf["path"].startswith("params/")]
    assert lora[1].summary["trained_params"] == sum(map(math.prod, shapes))
    moved = 0
    for name, leaf in named_leaves(lora[1].params).items():
        if name in params:
            moved += name.endswith("/b") and np.abs(leaf).max() > 0
            continue
        was = known[name if name in known else name.rpartition("/")[0]]
        np.testing.assert_array_equal(leaf, was, err_msg=name)
    assert moved == len(products)


@pytest.fixture(scope="module")
def loaded(lora):
    """(the run as a model, a question to it, its logits)."""
    vlm = evlm.from_pretrained(lora[0])
    request = vlm.request(["what is this ?"], [[SMOLVLM.parents[0] / "llava" / "00.jpg"]])
    return vlm, request, np.asarray(vlm.logits(request))


def test_a_run_is_loaded_as_it_was_in_memory(lora, loaded):
    vlm, request, logits = loaded
    trained = lora[1]
    memory = Pretrained(trained.model, Weights(trained.params), trained.processor, {})
    np.testing.assert_allclose(memory.logits(request), logits, rtol=1e-5, atol=1e-5)
    plain = np.asarray(evlm.from_pretrained(SMOLVLM).logits(request))
    assert np.abs(plain - logits).max() > 1e-2
    assert vlm.generate("what ?", max_new_tokens=3) == memory.generate("what ?", max_new_tokens=3)


def test_an_exported_run_answers_alike(lora, loaded, tmp_path, monkeypatch):
    """By the command line: plain weights in the published layout, tokenizer and all."""
    from efficient_vlm.cli import main as cli

    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["efficient-vlm", "export", str(lora[0]), str(out)])
    assert cli.main() == 0
    _, request, logits = loaded
    again = evlm.from_pretrained(out)
    assert again.tokenizer.fingerprint == loaded[0].tokenizer.fingerprint
    scale = np.abs(logits).max()
    np.testing.assert_allclose(again.logits(request), logits, atol=2e-5 * scale)


def test_a_base_that_changed_is_refused(lora, base, rows_file):
    """Neither trained on nor loaded; and again once it is restored."""
    file = base / "model.safetensors"
    was = file.read_bytes()
    config = tuning_config(base, rows_file, adapt=LORA)
    file.write_bytes(was[:-1] + bytes([was[-1] ^ 1]))
    try:
        for do in (lambda: train(config, lora[0]), lambda: evlm.from_pretrained(lora[0])):
            with pytest.raises(UserError, match="model.safetensors is not the file") as caught:
                do()
            assert len(str(caught.value).splitlines()) == 3
    finally:
        file.write_bytes(was)
    assert train(config, lora[0]).summary["state_sha256"] == lora[1].summary["state_sha256"]


def test_fit_writes_results_and_report(base, rows_file, tmp_path):
    """With a row held out, which is evaluated."""
    config = tuning_config(base, rows_file, adapt=LORA, data=dict(test_fraction=0.1))
    config.train.update(steps=2, checkpoint_every=2)
    said = []
    results = commands.fit(config, tmp_path / "run", say=said.append)
    (row,) = results["losses"]
    assert row["compressor"] == "none" and row["targets"] > 0 and 0 < row["loss"] < 20
    assert results["train"]["steps"] == 2 and results["train"]["skipped_samples"] == {}
    assert json.loads((tmp_path / "run" / "results.json").read_text())["losses"] == [row]
    assert (tmp_path / "run" / "report.html").is_file()
    # Once more: nothing is trained, and the same is found.
    again = commands.fit(config, tmp_path / "run", say=said.append)
    assert again["losses"] == results["losses"]
    assert any("already finished" in line for line in said)


# ---- in a notebook -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vlm():
    return evlm.from_pretrained(SMOLVLM)


@pytest.fixture(scope="module")
def own_rows(tmp_path_factory):
    """Rows whose pictures are bytes, in front of the question; and of text alone."""
    folder, found = tmp_path_factory.mktemp("own"), []
    for each in mixed_rows(folder, 4):
        question, *others = each["messages"]
        text = question["content"].replace("<image> ", "")
        parts = [{"type": "image"}] * len(each["images"]) + [{"type": "text", "text": text}]
        images = [(folder / name).read_bytes() for name in each["images"]]
        found.append(dict(images=images, messages=[{**question, "content": parts}, *others]))
    return found


def test_finetune_leaves_the_model_alone(vlm, own_rows):
    """Seeds reproduce; a step that trains everything donates nothing of the model's own."""
    before = flatten_dict(jax.tree.map(lambda x: np.array(x, copy=True), vlm.params), sep="/")
    answer = vlm.generate("what ?", max_new_tokens=4)
    given = dict(steps=2, learning_rate=0.05, batch_size=1, data=dict(pack_tokens=256))
    seen = []
    tuned = [
        vlm.finetune(own_rows, adapt=LORA, seed=seed, log=lambda n, m: seen.append(n), **given)
        for seed in (1, 1, 2)
    ]
    full = vlm.finetune(own_rows, log=lambda n, m: seen.append(n), **given)
    assert seen == [1, 2] * 4
    leaves = [named_leaves(each.params) for each in tuned]
    assert leaves[0].keys() == leaves[1].keys()
    assert all(np.array_equal(leaves[0][name], leaves[1][name]) for name in leaves[0])
    assert not all(np.array_equal(leaves[0][name], leaves[2][name]) for name in leaves[0])
    after = flatten_dict(vlm.params, sep="/")
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[name], err_msg=name)
    moved = flatten_dict(full.params, sep="/")
    assert sum(not np.array_equal(before[name], moved[name]) for name in before) > 0.9 * len(before)
    assert vlm.generate("what ?", max_new_tokens=4) == answer
    assert isinstance(full.generate("what ?", max_new_tokens=4), str)
    with pytest.raises(UserError, match="has adapters"):
        tuned[0].finetune(own_rows, **given)
    merged = tuned[0].merge()
    request = vlm.request(["what is it ?"])
    scale = np.abs(tuned[0].logits(request)).max()
    np.testing.assert_allclose(merged.logits(request), tuned[0].logits(request), atol=2e-5 * scale)


def test_loss_is_the_mean_cross_entropy(vlm, own_rows):
    """In float64, from the logits of each row alone."""
    total = count = 0.0
    processor = vlm.processor
    for row in own_rows:
        pictured = [vlm.pictures(data) for data in row["images"]]
        how = (processor.style, processor.template, processor.tokenizer)
        ids, targets = labelled(*how, row["messages"], pictured, end=True)
        logits = np.asarray(vlm.logits(vlm.batch([Example([ids], pictured)])), np.float64)[0]
        keep = np.array(ids) != vlm.family.image_token(vlm.config)
        words, wanted = np.array(ids)[keep], np.flatnonzero(np.array(targets)[keep])
        chosen = logits[wanted - 1, words[wanted]]
        total += (np.log(np.exp(logits[wanted - 1]).sum(axis=-1)) - chosen).sum()
        count += len(wanted)
    found = vlm.loss(own_rows, pack_tokens=256, batch_size=2)
    assert found == pytest.approx(total / count, rel=1e-5)
    assert vlm.loss(own_rows, pack=False) == pytest.approx(found, rel=1e-5)


# ---- killed --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_ends_with_equal_weights(base, rows_file, tmp_path):
    """Twice, at any moment behind a checkpoint; and once by a signal that is caught."""
    steps = 24
    words = (
        *("-m", "efficient_vlm.cli.main", "train", "--config=configs/finetune.py"),
        *(f"--config.model.pretrained={base}", f"--config.data.path={rows_file}"),
        *("--config.data.test_fraction=0.0", "--config.data.batch_size=2"),
        *("--config.data.pack_tokens=96", "--config.data.max_length=512"),
        *(f"--config.train.steps={steps}", "--config.train.checkpoint_every=4"),
        *("--config.train.log_every=1", "--config.adapt.rank=3"),
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_TO_COMPILE}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    environment |= {"PYTHONPATH": str(SMOLVLM.parents[2])}

    def start(workdir):
        log = (tmp_path / f"{time.monotonic_ns()}.log").open("w")
        return subprocess.Popen(
            [sys.executable, *words, f"--workdir={workdir}"],
            cwd=SMOLVLM.parents[2],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(600) == 0
    for step, number in ((5, signal.SIGKILL), (13, signal.SIGKILL), (18, signal.SIGTERM)):
        process, end = start(killed), time.monotonic() + 600
        while not any(row["step"] >= step for row in read_metrics(killed)):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait(120) in (-number, 128 + number, 0)
    assert start(killed).wait(600) == 0
    found, expected = (json.loads((w / "results.json").read_text()) for w in (killed, whole))
    for name in ("params_sha256", "state_sha256", "steps"):
        assert found["train"][name] == expected["train"][name]
    assert [row["step"] for row in read_metrics(killed)] == list(range(1, steps + 1))
    digests = [json.loads((w / "base.json").read_text()) for w in (killed, whole)]
    assert digests[0] == digests[1] and len(digests[0]) == 1
