"""Compressors with weights of their own in fine-tunes, and the loss of all budgets at once."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import DECODER, ENCODER, VOCAB

import efficient_vlm as evlm
from efficient_vlm.errors import UserError
from efficient_vlm.models.init import init_params
from efficient_vlm.models.inputs import ModelInputs, Pictures
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.train import loop
from efficient_vlm.train.arms import Arm, joined
from efficient_vlm.train.base import open_base
from efficient_vlm.train.config import TrainConfig
from efficient_vlm.train.joint import of_all
from efficient_vlm.train.prepare import prepare
from efficient_vlm.train.pretrained_fields import PretrainedFields
from efficient_vlm.train.step import loss_fn

SMOLVLM, PICTURES = "tests/samples/smolvlm", "tests/samples/llava"


def rows(count):
    """Conversations that name their picture."""
    answers = ("A red circle.", "A green square.", "Blue.")
    return [
        dict(
            images=[f"{PICTURES}/0{i}.jpg"],
            messages=[
                dict(role="user", content="<image>What is it?"),
                dict(role="assistant", content=answers[i]),
            ],
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def vlm():
    # One tile of 4 x 4 patches, of which the model's own projector makes 2 x 2 tokens.
    return evlm.from_pretrained(SMOLVLM, split=False)


def tuned(vlm, compressor, **options):
    losses = []

    def log(step, metrics):
        del step
        losses.append(metrics)

    model = vlm.finetune(rows(2), compressor=compressor, log=log, **options)
    return model, losses


def test_a_selector_learns_beside_adapters(vlm):
    lora = dict(name="lora", rank=2)
    selector = dict(name="visionselector", budget=2, dim=4)
    after, log = tuned(vlm, selector, steps=10, learning_rate=2e-2, adapt=lora)
    assert log[-1]["loss"] < log[0]["loss"] * 0.8
    # Scores are about equal at first: p is 1/2 everywhere, 1/4 from the choice.
    assert log[0]["penalty"] == pytest.approx(0.25, rel=1e-3)
    own = {p: v for p, v in flatten_dict(after.params, sep="/").items() if "visionselector" in p}
    assert sorted(own) == ["reduce/visionselector_key", "reduce/visionselector_query"]
    assert all(np.abs(value).max() > 1e-3 for value in own.values()), "they stayed as they were"
    assert after.model.compressor["budget"] == 2
    assert "soft" not in after.model.compressor
    assert np.isfinite(after.loss(rows(2)))

    assert after.with_compressor("visionselector", 1, dim=4).model.compressor["budget"] == 1
    for model in (vlm, after):
        with pytest.raises(UserError, match="weights of its own") as caught:
            model.with_compressor("visionselector", 1, dim=8)
        assert len(str(caught.value).splitlines()) <= 3
    for leave in (after.save, after.save_adapter):
        with pytest.raises(UserError, match="Hugging Face") as caught:
            leave("runs/never")
        assert len(str(caught.value).splitlines()) <= 3


def test_pyramiddrop_in_training(vlm):
    drop = dict(name="pyramiddrop", layers=(1,), keep=(0.5,))
    _, log = tuned(vlm, drop, steps=6, learning_rate=1e-2)
    losses = [step["loss"] for step in log]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] * 0.9


def run_config(**train):
    return ml_collections.ConfigDict(
        dict(
            model=dict(
                pretrained=SMOLVLM,
                compressor=dict(name="mqt", budget=4, num_queries=4, num_heads=4),
                pictures=dict(split=False),
            ),
            adapt=dict(name="full"),
            data=dict(
                source="auto",
                path=f"{PICTURES}/my.json",
                batch_size=1,
                pack_tokens=256,
                num_threads=0,
                max_images=16,
                max_length=512,
            ),
            train=dict(steps=6, optimizer=dict(name="adamw", learning_rate=1e-2), **train),
        )
    )


def test_a_published_model_learns_all_budgets_at_every_step(tmp_path):
    elastic = [dict(name="mqt", budget=b, num_queries=4, num_heads=4) for b in (4, 1)]
    elastic.append(dict(name="m3", budget=1))
    config = run_config(elastic=elastic, elastic_all=True)
    setup = prepare(config.to_dict(), tmp_path, lambda line: None)
    assert [arm.label for arm in setup.arms] == ["mqt@4+mqt@1+m3@1"]
    state, batches, losses = setup.start.state(), iter(setup.pipeline), []
    for _ in range(6):
        state, metrics = setup.programs[0](state, setup.inputs(next(batches)))
        each = [metrics[f"loss_{name}"] for name in ("mqt@4", "mqt@1", "m3@1")]
        assert metrics["loss"] == pytest.approx(np.mean(each), rel=1e-5)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] * 0.9


class Never:
    """A `StopSignal` that never comes."""

    requested, exit_code = False, 0


def test_a_run_gives_its_selector_back(tmp_path):
    config = run_config()
    config.model.compressor = dict(name="visionselector", budget=2, dim=4)
    config.adapt = dict(name="full", train="^reduce/")
    config.train.steps = 1
    config.train.optimizer.warmup_steps = 0
    trained = loop.train(config.to_dict(), tmp_path, stop=Never(), say=lambda line: None)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert trained.summary["trained_params"] == 2 * 36 * 4
    again = evlm.from_pretrained(tmp_path)
    assert again.model.compressor["name"] == "visionselector"
    found, wanted = (flatten_dict(p, sep="/") for p in (again.params, trained.params))
    name = "reduce/visionselector_query"
    np.testing.assert_array_equal(found[name], wanted[name])
    assert again.with_compressor("visionselector", 1, dim=4)
    fewer = evlm.from_pretrained(tmp_path, compressor=dict(name="visionselector", budget=1, dim=4))
    assert fewer.model.compressor["budget"] == 1


def test_the_joint_gradient_is_the_mean_of_gradients():
    model = VisionLanguageModel(
        vocab_size=VOCAB,
        encoder=ENCODER,
        decoder=DECODER,
        compressor=dict(name="mqt", budget=4, num_queries=4, num_heads=2),
    )
    arms = [Arm(model, 1.0), Arm(model.with_compressor("mqt", 1), 3.0)]
    params = jax.tree.map(
        lambda x: x.value,
        init_params(model, jax.random.key(0)),
        is_leaf=lambda x: hasattr(x, "names"),
    )
    rng = np.random.default_rng(0)
    text = rng.integers(VOCAB, size=(2, 5))
    pixels = rng.integers(256, size=(2, 1, 32, 32, 3)).astype(np.uint8)
    pictures = Pictures(pixels=pixels, mask=np.ones((2, 1), bool))
    inputs = ModelInputs.of_rows(text, [5, 4], labels=np.int32(text), pictures=pictures)
    objective = of_all(arms, [arm.trained for arm in arms], {})

    def gradient(loss):
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    key = jax.random.key(1)
    (total, metrics), found = gradient(lambda p: objective(p, None, inputs, key))
    parts = [gradient(lambda p, m=a.model: loss_fn(m, p, inputs, key, {})) for a in arms]
    (first, one), (second, other) = ((loss, grads) for (loss, _), grads in parts)
    assert float(total) == pytest.approx(float(0.25 * first + 0.75 * second), rel=1e-5)
    assert float(metrics["loss"][1]) == 10
    mean = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, one, other)
    for path, value in flatten_dict(found, sep="/").items():
        wanted = flatten_dict(mean, sep="/")[path]
        scale = max(float(jnp.abs(wanted).max()), 1e-6)
        np.testing.assert_allclose(value, wanted, atol=1e-5 * scale + 1e-6, err_msg=path)


def test_an_entry_that_starts_later_cannot_share_every_step():
    model = VisionLanguageModel(
        vocab_size=VOCAB, encoder=ENCODER, decoder=DECODER, compressor=dict(name="none")
    )
    settings = TrainConfig(steps=4, elastic_all=True)
    with pytest.raises(UserError, match=r"train\.elastic.*start"):
        joined([Arm(model), Arm(model, start=0.5)], settings)


IN_PLACE = [
    dict(name="resampler", budget=2, num_queries=4),
    dict(name="tokenpacker", budget=4, num_heads=4),
    dict(name="ldpv2", budget=1),
]


@pytest.mark.parametrize("compressor", IN_PLACE, ids=lambda c: c["name"])
def test_in_place_of_the_projector(compressor):
    base = open_base(PretrainedFields(pretrained=SMOLVLM, compressor=compressor, in_place=True))
    shapes = flatten_dict(jax.eval_shape(lambda: init_params(base.model, jax.random.key(0))))
    names = {"/".join(path) for path in shapes}
    assert not any(name.startswith("project/") for name in names)
    assert any(name.startswith(f"reduce/{compressor['name']}") for name in names)
    # Everything else comes from the files.
    assert {n.split("/")[0] for n in names - base.held()} <= {"reduce", "connect"}
    pixels = np.zeros((1, 1, 64, 64, 3), np.uint8)
    pictures = Pictures(pixels=pixels, mask=np.ones((1, 1), bool))
    inputs = ModelInputs.of_rows(np.zeros((1, 3), np.int32), [3], pictures=pictures)

    def seen(key):
        params = init_params(base.model, key)
        layout = base.model.layout(pictures)

        def stages(model):
            tokens, signals = model.encode(pictures)
            return tokens, model.compress(tokens, signals, inputs, layout)

        return base.model.apply({"params": params}, method=stages)

    patches, visual = jax.jit(seen)(jax.random.key(0))
    assert patches.embed.shape == (1, 16, 32)
    assert visual.embed.shape == (1, compressor["budget"], 36)
    assert visual.source.shape == (1, 4), "a token for each slot of the prompt"
    assert visual.position.min() >= -0.5
    assert visual.position.max() <= 1.5
    assert float(visual.size.sum()) == pytest.approx(4, rel=1e-5)


def test_pooling_is_where_a_resampler_starts(vlm):
    resampler = dict(name="resampler", budget=1, num_queries=4)
    model = vlm.model.clone(compressor=resampler, pooled_start=True)
    fresh = jax.tree.map(
        lambda x: x.value,
        init_params(model, jax.random.key(0)),
        is_leaf=lambda x: hasattr(x, "names"),
    )
    request = vlm.with_compressor("pool", 1).request(["What?"], [[f"{PICTURES}/00.jpg"]])
    pooled = request.model.apply({"params": fresh}, request.inputs).logits
    start = request.model.clone(compressor=resampler, pooled_start=True)
    made = start.apply({"params": fresh}, request.inputs).logits
    np.testing.assert_allclose(made, pooled, atol=1e-5)
    opened = {**fresh, "start": {"gate": jnp.ones(1)}}
    other = start.apply({"params": opened}, request.inputs).logits
    assert np.abs(other - made).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(pretrained="tests/golden/molmo_qwen2"), "across crops"),
        (dict(pretrained="tests/golden/qwen3_vl"), "several layers"),
        (dict(pretrained="tests/golden/llava"), "keeps the width"),
    ],
)
def test_in_place_is_refused(fields, message):
    compressor = dict(name="resampler", budget=1, num_heads=1)
    with pytest.raises(UserError, match=message) as caught:
        open_base(PretrainedFields(**fields, compressor=compressor, in_place=True))
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("compressor", [dict(name="mlp"), dict(name="mqt", budget=5, num_heads=4)])
def test_more_tokens_than_slots_are_refused(compressor):
    base = open_base(PretrainedFields(pretrained=SMOLVLM, compressor=compressor, in_place=True))
    with pytest.raises(UserError, match="up to the 4 slots") as caught:
        jax.eval_shape(lambda: init_params(base.model, jax.random.key(0)))
    assert len(str(caught.value).splitlines()) <= 3


def test_an_mlp_in_place_starts_as_the_connector():
    compressor = dict(name="mlp")
    fields = PretrainedFields(
        pretrained="tests/golden/llava", compressor=compressor, in_place=True, remat="none"
    )
    base = open_base(fields)
    given = base.parameters()
    shapes = flatten_dict(jax.eval_shape(lambda: init_params(base.model, jax.random.key(0))))
    assert {"/".join(path) for path in shapes} == base.held() == set(given)
    assert "connect/up/kernel" not in given
