"""Methods inside the encoder and decoder, in whole models: shapes, caches, positions, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MOE

from efficient_vlm.compressors import names
from efficient_vlm.errors import UserError
from efficient_vlm.inference.generate import generate
from efficient_vlm.models.layers import unstack

DEEP = dict(segments=[dict(layers=4)])
IN_DECODER = {
    "fastv": dict(layer=1, keep=4),
    "fastv-mean": dict(layer=2, keep=0.25, row="mean"),
    "pyramiddrop": dict(layers=(1, 2, 3), keep=(0.5, 0.25, 0.125)),
    "feather": dict(layers=(1, 2)),
    "sparsevlm": dict(layers=(0, 1, 2), keep=(10, 6, 3)),
    "dart": dict(layer=1, keep=9),
    "fitprune": dict(rate=0.5),
    "v2drop": dict(layers=(1, 2, 3)),
    "vtw": dict(layer=2),
}


def answer(model, params, batch, new_tokens=3):
    return generate(
        model,
        params,
        batch["images"],
        batch["image_mask"],
        batch["tokens"],
        batch["prompt_lengths"],
        new_tokens=new_tokens,
        eos_id=-1,
    )


@pytest.fixture(scope="module")
def plain(make_model, make_batch, init):
    """(model with four layers, batch, parameters): what every method here runs on."""
    model, batch = make_model(decoder=DEEP), make_batch()
    batch["image_mask"][1] = False
    return model, batch, init(model, batch)


@pytest.mark.parametrize("case", IN_DECODER)
@pytest.mark.parametrize("policy", ["retain", "reindex"])
def test_cache_equals_no_cache(plain, inputs, case, policy):
    """Tokens generated through the shortened caches are those of the full forward pass."""
    model, batch, params = plain
    options = {**IN_DECODER[case], "position_policy": policy}
    model = model.with_compressor(case.partition("-")[0], **options)
    out = answer(model, params, batch)
    forward = jax.jit(lambda p, **b: model.apply({"params": p}, **b).logits)
    tokens = np.pad(batch["tokens"], ((0, 0), (0, 0), (0, 3)))
    full = {**inputs(batch), "tokens": tokens, "lengths": batch["prompt_lengths"].copy()}
    for step in range(3):
        logits = np.asarray(forward(params, **full))
        for b, q in np.ndindex(batch["lengths"].shape):
            place = batch["prompt_lengths"][b, q] + step
            tokens[b, q, place] = logits[b, q, place - 1].argmax()
            assert tokens[b, q, place] == out.tokens[b, q, step], (b, q, step)
        full["lengths"] = full["lengths"] + 1


@pytest.mark.parametrize("name", ["none", "pyramiddrop", "tome"])
def test_split_layers_give_the_same_answers(plain, name):
    """Inference on one tree per layer, with layers apart before a cut, is that on the stack."""
    model, batch, params = plain
    options = {**dict(none=dict(budget=16), tome=dict(budget=6)), **IN_DECODER}[name]
    model = model.with_compressor(name, **options)
    split = unstack(params)
    assert set(split["language"]["layers"]) == {"0", "1", "2", "3"}
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), unstack(split), split))
    stacked, apart = answer(model, params, batch), answer(model, split, batch)
    np.testing.assert_array_equal(stacked.tokens, apart.tokens)
    np.testing.assert_allclose(stacked.visual.embed, apart.visual.embed, rtol=1e-4, atol=1e-5)


def test_caches_are_as_long_as_the_tokens_left(plain):
    model, batch, params = plain
    rows, slots, per_slot = 6, 6 + 3, 2 * 2 * 8 * 4  # text and new; kv, kv heads, dim, float32
    full = answer(model, params, batch).kv_bytes
    assert full == 4 * (16 + slots) * rows * per_slot
    for name, left in {
        "fastv": (16, 4, 4, 4),
        "pyramiddrop": (16, 8, 4, 2),
        "v2drop": (16, 8, 4, 0),
        "vtw": (16, 16, 0, 0),
    }.items():
        short = answer(model.with_compressor(name, **IN_DECODER[name]), params, batch)
        assert short.kv_bytes == sum(n + slots for n in left) * rows * per_slot, name


def test_vtw_leaves_the_images_no_word_after_the_cut(plain, inputs):
    """With every layer behind the cut blind, the last layers' input alone carries the image."""
    model, batch, params = plain
    early = model.with_compressor("vtw", layer=1)
    late = model.with_compressor("vtw", layer=3)
    logits = [
        np.asarray(jax.jit(lambda p, m=m, **b: m.apply({"params": p}, **b).logits)(params, **b))
        for m in (early, late)
        for b in [inputs(batch)]
    ]
    missing = batch["image_mask"][:, 0] == 0
    valid = np.arange(6) < batch["lengths"][..., None]
    # Without an image there is nothing to withdraw.
    same = np.abs(logits[0] - logits[1]).max(-1)
    assert same[missing][valid[missing]].max() < 1e-4
    assert same[~missing][valid[~missing]].max() > 1e-3


def test_training_through_pyramiddrop(make_model, make_batch, init, inputs):
    """Gradients flow through what is kept, with a mixture of experts too."""
    batch = make_batch()
    model = make_model(decoder=DEEP, moe=MOE).with_compressor(
        "pyramiddrop", **IN_DECODER["pyramiddrop"]
    )
    params = init(model, batch)
    loss = lambda p: (model.apply({"params": p}, **inputs(batch)).logits ** 2).mean()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.abs(grads["vit"]["layers"]["up"]["kernel"]).max() > 0


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_position_policies(make_model, make_batch, init, inputs, position):
    """In both kinds of positions: they differ for kept tokens, agree when all are kept."""
    batch = make_batch()
    decoder = dict(position=position, max_positions=40)
    for budget, same in ((16, True), (4, False)):
        out = []
        for policy in ("retain", "reindex"):
            model = make_model(
                "stride", budget, decoder=decoder, options=dict(position_policy=policy)
            )
            params = init(model, batch)
            run = jax.jit(lambda p, m=model, **b: m.apply({"params": p}, **b).logits)
            out.append(run(params, **inputs(batch)))
        assert np.allclose(*out, atol=1e-5) == same


def test_learned_positions_through_the_cache(make_model, make_batch, init, inputs):
    batch = make_batch()
    model = make_model("stride", 4, decoder=dict(position="learned", max_positions=40), options={})
    params = init(model, batch)
    out = answer(model, params, batch, new_tokens=2)
    tokens = np.pad(batch["tokens"], ((0, 0), (0, 0), (0, 2)))
    full = {**inputs(batch), "tokens": tokens, "lengths": batch["prompt_lengths"].copy()}
    forward = jax.jit(lambda p, **b: model.apply({"params": p}, **b).logits)
    for step in range(2):
        logits = np.asarray(forward(params, **full))
        for b, q in np.ndindex(batch["lengths"].shape):
            place = batch["prompt_lengths"][b, q] + step
            tokens[b, q, place] = logits[b, q, place - 1].argmax()
            assert tokens[b, q, place] == out.tokens[b, q, step]
        full["lengths"] = full["lengths"] + 1


@pytest.mark.parametrize("class_token", [False, True])
def test_tome_in_the_encoder(make_model, make_batch, init, inputs, class_token):
    """Every patch stays in some token, sizes add up, and the decoder runs on fewer."""
    batch = make_batch()
    encoder = dict(class_token=class_token)
    model = make_model(encoder=encoder)
    params = init(model, batch)
    model = model.with_compressor("tome", 6)
    tokens, _ = jax.jit(
        lambda p: model.apply({"params": p}, batch["images"], batch["image_mask"], method="encode")
    )(params)
    assert tokens.embed.shape == (3, 6, 24)
    np.testing.assert_allclose(tokens.size.sum(1), 16)
    assert (np.sort(np.unique(tokens.source)) == np.arange(6)).all()
    out = answer(model, params, batch)
    assert out.visual.embed.shape[1] == 6


def test_merger_in_the_encoder_is_trained(make_model, make_batch, init, inputs):
    batch = make_batch()
    model = make_model("minicpm_merger", 4, options=dict(layer=1, num_heads=2))
    params = init(model, batch)
    loss = lambda p: (model.apply({"params": p}, **inputs(batch)).logits ** 2).mean()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    merger = [k for k in grads["vit"] if k.startswith("minicpm")]
    assert merger, list(grads["vit"])
    for leaf in jax.tree.leaves([grads["vit"][k] for k in merger]):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0
    assert answer(model, params, batch).visual.embed.shape[1] == 4


def test_wrong_places_are_told(make_model, make_batch, init):
    batch = make_batch()
    model = make_model(decoder=DEEP)
    for name, options, words in (
        ("fastv", dict(layer=4, keep=3), "layer"),
        ("fastv", dict(layer=0, keep=3), "layer"),
        ("fastv", dict(layer=1, keep=17), "keep"),
        ("pyramiddrop", dict(layers=(1, 9), keep=(0.5, 0.2)), "layers"),
        ("visionzip", dict(budget=4), "no CLS token"),
        ("tome", dict(budget=1), "tome"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            init(model.with_compressor(name, **options), batch)
        assert len(str(caught.value).splitlines()) <= 3
    stride = dict(name="stride", budget=4)
    both = make_model(decoder=dict(segments=[dict(layers=1), dict(layers=1, compressor=stride)]))
    both = both.with_compressor("fastv", layer=1)
    with pytest.raises(UserError, match="leave one of the two out"):
        init(both, batch)
    blind = [dict(layers=2, compressor=dict(name="fastv", budget=4))]
    with pytest.raises(UserError, match="in front of it"):
        init(make_model(decoder=dict(segments=blind)), batch)


# Options with which a method fits the tiny model: 16 patches of width 24, three encoder layers with
# CLS, four decoder layers of width 32.
OPTIONS = {
    **{name: options for name, options in IN_DECODER.items() if "-" not in name},
    **{name: dict(budget=16) for name in ("none", "mlp")},
    "tokenpacker": dict(num_heads=2),
    "mqt": dict(num_heads=2, num_queries=8),
    "molmo_pool": dict(num_heads=2),
    "minicpm_merger": dict(layer=1, num_heads=2),
    "hiprune": dict(middle_layer=1),
    "visionzip": dict(attention="column_mean"),
    "cdpruner": dict(),
    "c_abstractor": dict(depth=1),
}


@pytest.mark.parametrize("name", names())
def test_every_method_is_one_config_line(make_model, make_batch, inputs, name):
    """Training pass and generation stages of every method are traced, with two images a row."""
    batch = make_batch(batch=2, images=2)
    model = make_model(decoder=DEEP, encoder=dict(class_token=True, depth=3))
    options = OPTIONS.get(name, {})
    if name not in IN_DECODER:
        options = {"budget": 4, **options}
    model = model.with_compressor(name, **options)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs(batch))["params"])
    out = jax.eval_shape(lambda p: model.apply({"params": p}, **inputs(batch)), params)
    assert out.logits.shape == (2, 2, 6, 20)

    def stages(params):
        apply = functools.partial(model.apply, {"params": params})
        layout = model.layout(batch["images"])
        tokens, signals = apply(batch["images"], batch["image_mask"], method="encode")
        instruction = jnp.zeros((2, 32))
        visual = apply(tokens, signals, instruction, layout, method="compress")
        prompts, lengths = batch["tokens"][:, 0], batch["prompt_lengths"][:, 0]
        return visual, apply(visual, prompts, lengths, layout, new_tokens=2, method="prefill")

    visual, (_, _, sources) = jax.eval_shape(stages, params)
    entering = 16 if name in IN_DECODER else options["budget"]
    assert visual.embed.shape == (2, 2 * entering, 32)
    assert visual.source.shape == (2, 32)
    assert len(sources) == (1 if name not in IN_DECODER else len(sources))


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "scope", "hiprune", "visionzip"])
def test_training_free_methods_in_a_model(make_model, make_batch, init, inputs, name):
    """At the full budget the logits are the uncompressed ones; at 4 only 4 tokens are left."""
    batch = make_batch()
    model = make_model(encoder=dict(class_token=True, depth=3))
    params = init(model, batch)
    options = dict(middle_layer=1) if name == "hiprune" else {}
    run = lambda m: jax.jit(lambda p, **b: m.apply({"params": p}, **b).logits)  # noqa: E731
    whole = run(model.with_compressor(name, 16, **options))(params, **inputs(batch))
    np.testing.assert_allclose(whole, run(model)(params, **inputs(batch)), rtol=1e-4, atol=1e-4)
    fewer = answer(model.with_compressor(name, 4, **options), params, batch)
    assert fewer.visual.embed.shape[1] == 4
    assert jnp.isfinite(fewer.visual.embed).all()
