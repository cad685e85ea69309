"""Preferences of published models: the loss of packed pairs against every answer by itself."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import efficient_vlm as evlm
from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.cli import config_file as configs
from efficient_vlm.cli import run as commands
from efficient_vlm.data.chat import ChatPipeline
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.preference_rows import PairSource
from efficient_vlm.data.row_source import Reading
from efficient_vlm.data.tables.memory import MemoryTable
from efficient_vlm.errors import UserError
from efficient_vlm.processing.gather import fitted
from efficient_vlm.processing.labels import labelled
from efficient_vlm.processing.request import Example
from efficient_vlm.train.config import read_config
from efficient_vlm.train.metrics import read_metrics
from efficient_vlm.train.objective import DistilConfig, PreferenceConfig, check_aims
from efficient_vlm.train.preferred import make_preferring

LORA = dict(name="lora", rank=4, alpha=8.0)
PAIRS = (
    ("What shape is this?", "A circle.", "It may be a square, or a triangle."),
    ("Which colour?", "It is red, as far as one can see.", "Green."),
    ("How many?", "One.", "Two."),
)


@pytest.fixture(scope="module")
def vlm(pytestconfig):
    return evlm.from_pretrained(pytestconfig.rootpath / "tests/samples/smolvlm")


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)) for _ in PAIRS]
    named = ("prompt", "chosen", "rejected")
    return [
        {"images": [picture], **dict(zip(named, pair, strict=True))}
        for picture, pair in zip(pictures, PAIRS, strict=True)
    ]


@pytest.fixture(scope="module")
def trained(vlm, rows):
    """(the model after 20 steps, metrics of each)."""
    steps = []
    tuned = vlm.finetune(
        rows,
        steps=20,
        learning_rate=1e-2,
        adapt=LORA,
        preference=dict(name="dpo", labels=0.1),
        log=lambda number, values: steps.append(values),
    )
    return tuned, steps


def test_the_margin_rises(trained):
    """It begins at the reference, where both answers are equal to it."""
    _, steps = trained
    np.testing.assert_allclose(steps[0]["loss"], math.log(2), rtol=1e-5)
    assert abs(steps[0]["margin"]) < 1e-5
    assert all(step["ok"] and 0 < step["grad_norm"] < np.inf for step in steps)
    assert steps[-1]["margin"] > 0.5 and steps[-1]["accuracy"] == 1
    assert steps[-1]["loss"] < 0.6


def alone(vlm, row, answer):
    """float64 log-probability of one answer, by itself, and its tokens."""
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]},
        {"role": "assistant", "content": answer},
    ]
    pictured = [vlm.pictures(picture) for picture in row["images"]]
    how = (vlm.processor.style, vlm.template, vlm.tokenizer)
    ids, targets = labelled(*how, messages, pictured, end=True)
    request = vlm.batch([Example([ids], pictured, [targets])])
    logits = np.asarray(vlm.logits(request), np.float64)[0]
    (labels,) = request.inputs.labels
    total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    values = [logits[s, y] - total[s] for s, y in enumerate(labels) if y >= 0]
    return sum(values), len(values)


def objective_of(vlm, rows, config, **fields):
    """(loss, metrics) of all rows in one batch of pairs, and the batch."""
    config = PreferenceConfig(**config)
    given = dict(path="rows.json", max_images=4, num_threads=0, batch_size=4, **fields)
    source = PairSource(MemoryTable(rows), Reading())
    model = vlm.processor.seeing(vlm.model)
    data = DataConfig(**given)
    pipeline = ChatPipeline(data, source, vlm.processor, [model], programs=1, pairs=True)
    (batch,) = pipeline.epoch()
    model = fitted(pipeline.model, batch.inputs.pictures, vlm.family.variable)
    bare = SimpleNamespace(whole=lambda trained, frozen: trained)
    objective = make_preferring(model, bare, config, {}, pipeline.apart)
    inputs = jax.tree.map(jnp.asarray, batch.inputs)
    uneven = model.make_compressor().in_decoder
    inputs = inputs.replace(uneven=uneven)
    total, metrics = jax.jit(objective)(vlm.params, None, inputs, jax.random.key(0))
    return float(total), {name: (float(a), float(b)) for name, (a, b) in metrics.items()}, batch


def answers_alone(vlm, rows):
    return np.array([[alone(vlm, row, row[k]) for k in ("chosen", "rejected")] for row in rows])


@pytest.mark.parametrize("compressor", [None, "fastv"])
def test_dpo_of_packed_pairs(vlm, rows, trained, compressor):
    """Several pairs in a row of a batch, or where a row holds one conversation two rows each."""
    tuned, base = trained[0], vlm
    if compressor:
        options = dict(name="fastv", layer=1, keep=2)
        tuned, base = tuned.with_compressor(**options), base.with_compressor(**options)
    config = dict(name="dpo", beta=0.3, label_smoothing=0.1, labels=0.5)
    total, metrics, batch = objective_of(tuned, rows, config)
    now, before = answers_alone(tuned, rows), answers_alone(base, rows)
    x = 0.3 * ((now - before)[:, 0, 0] - (now - before)[:, 1, 0])
    losses = 0.9 * np.log1p(np.exp(-x)) + 0.1 * np.log1p(np.exp(x))
    written = (-now[:, 0, 0] / now[:, 0, 1]).sum()
    np.testing.assert_allclose(metrics["loss"], (losses.sum(), 3), rtol=2e-5)
    np.testing.assert_allclose(metrics["margin"], (x.sum(), 3), rtol=1e-4)
    assert metrics["accuracy"] == ((x > 0).sum(), 3)
    np.testing.assert_allclose(metrics["chosen_loss"], (written, 3), rtol=1e-5)
    np.testing.assert_allclose(total, losses.sum() + 0.5 * written, rtol=2e-5)
    most = batch.inputs.segments.max()
    assert (most == 1 and len(batch.inputs.text) == 8) if compressor else most % 2 == 0


def test_simpo_of_packed_pairs(rows, trained):
    total, metrics, _ = objective_of(trained[0], rows, dict(name="simpo", beta=2.0, gamma=0.5))
    now = answers_alone(trained[0], rows)
    x = 2 * (now[:, 0, 0] / now[:, 0, 1] - now[:, 1, 0] / now[:, 1, 1])
    losses = np.log1p(np.exp(0.5 - x))
    np.testing.assert_allclose(metrics["loss"], (losses.sum(), 3), rtol=2e-5)
    np.testing.assert_allclose(metrics["margin"], (x.sum(), 3), rtol=1e-4)
    np.testing.assert_allclose(total, losses.sum(), rtol=2e-5)


def test_only_the_last_answer_counts(vlm):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e f"},
    ]
    how = (vlm.processor.style, vlm.template, vlm.tokenizer, turns, [])
    ids, both = labelled(*how, end=True)
    same, last = labelled(*how, end=True, last=True)
    first, _ = labelled(*how[:3], turns[:2], [], end=True)
    assert ids == same and sum(last) < sum(both)
    assert not any(last[: len(first)]) and last[len(first) :] == both[len(first) :]


def test_what_cannot_be_learnt():
    dpo, simpo, none = PreferenceConfig("dpo"), PreferenceConfig("simpo"), PreferenceConfig()
    plain, lora = DistilConfig(), AdaptConfig()
    for adapt in (AdaptConfig("full"), AdaptConfig("prompt"), AdaptConfig(train="connector")):
        with pytest.raises(UserError, match="preference.name: dpo with adapt.name") as error:
            check_aims(plain, dpo, adapt)
        assert len(str(error.value).splitlines()) == 3
        check_aims(plain, simpo, adapt)
    check_aims(plain, dpo, lora, True)
    for preference, pairs in ((dpo, False), (none, True)):
        with pytest.raises(UserError, match="data.pairs"):
            check_aims(plain, preference, lora, pairs)
    with pytest.raises(UserError, match="one of both"):
        check_aims(DistilConfig("forward_kl"), dpo, lora)
    for bad in (dict(name="ppo"), dict(beta=0), dict(label_smoothing=0.5), dict(labels=-1)):
        with pytest.raises(UserError, match="preference"):
            PreferenceConfig(**bad)


def test_models_of_our_own_have_no_pairs():
    for fields in ({"data": {"pairs": True}}, {"preference": {"name": "simpo"}}):
        with pytest.raises(UserError, match="published models alone"):
            read_config({"train": {"steps": 1}, "model": {}, **fields})


@pytest.mark.slow
def test_the_config(pytestconfig, tmp_path):
    root = pytestconfig.rootpath
    overrides = [f"model.pretrained={root / 'tests/samples/smolvlm'}", "train.log_every=1"]
    overrides += [f"data.path={root / 'tests/samples/llava/pairs.jsonl'}", "data.batch_size=1"]
    overrides += ["train.steps=4", "train.checkpoint_every=4", "data.test_fraction=0.2"]
    overrides += ["train.optimizer.learning_rate=1e-2", "train.optimizer.warmup_steps=0"]
    overrides += ["eval.new_tokens=2"]
    config = configs.load(str(root / "configs/dpo.py"), overrides)
    results = commands.fit(config, tmp_path / "run", say=lambda line: None)
    assert results["train"]["steps"] == 4 and results["train"]["skipped_samples"] == {}
    metrics = read_metrics(tmp_path / "run")
    np.testing.assert_allclose(metrics[0]["loss"], math.log(2), rtol=1e-5)
    assert metrics[-1]["margin"] > metrics[0]["margin"]
