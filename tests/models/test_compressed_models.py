"""Methods inside the encoder and decoder, in whole models: shapes, caches, positions, gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MOE

from efficient_vlm.compressors import Signals, VisualTokens, build, names
from efficient_vlm.compressors.in_decoder.base import InDecoder
from efficient_vlm.compressors.in_decoder.rows import attention_rows
from efficient_vlm.compressors.methods import METHODS
from efficient_vlm.compressors.tokens import merge, take
from efficient_vlm.errors import UserError
from efficient_vlm.inference.generate import generate
from efficient_vlm.kernels.attention import make_mask
from efficient_vlm.models.decoder_stack import LAYERS
from efficient_vlm.models.encoder import ViT
from efficient_vlm.models.init import abstract_parameters
from efficient_vlm.nn.decoder_block import DecoderBlock, LayerInputs
from efficient_vlm.nn.stack import unstack
from efficient_vlm.processing.batch import question_inputs

DEEP = dict(segments=[dict(layers=4)])
IN_DECODER = {
    "fastv": dict(layer=1, keep=4),
    "fastv-mean": dict(layer=2, keep=0.25, row="mean"),
    "pyramiddrop": dict(layers=(1, 2, 3), keep=(0.5, 0.25, 0.125)),
    "feather": dict(layers=(1, 2)),
    "sparsevlm": dict(layers=(1, 2, 3), keep=(10, 6, 3)),
    "dart": dict(layer=1, keep=9),
    "fitprune": dict(rate=0.5),
    "v2drop": dict(layers=(1, 2, 3)),
    "vtw": dict(layer=2),
}


def answer(model, params, batch, new_tokens=3):
    asked = {**batch, "lengths": batch["prompt_lengths"]}
    return generate(model, params, question_inputs(asked), new_tokens=new_tokens, eos_id=-1)


def check_generation(model, params, batch, logits_of, steps=2):
    """Tokens generated through the caches are the best ones of the full forward pass."""
    out = answer(model, params, batch, new_tokens=steps)
    tokens = np.pad(batch["tokens"], ((0, 0), (0, 0), (0, steps)))
    full = {**batch, "tokens": tokens, "lengths": batch["prompt_lengths"].copy()}
    for step in range(steps):
        logits = np.asarray(logits_of(model, params, full))
        for b, q in np.ndindex(batch["lengths"].shape):
            place = batch["prompt_lengths"][b, q] + step
            tokens[b, q, place] = logits[b, q, place - 1].argmax()
            assert tokens[b, q, place] == out.tokens[b, q, step], (b, q, step)
        full["lengths"] = full["lengths"] + 1


@pytest.fixture(scope="module")
def plain(make_model, make_batch, init):
    """(model with four layers, batch, parameters): what every method here runs on."""
    model, batch = make_model(decoder=DEEP), make_batch()
    batch["image_mask"][1] = False
    return model, batch, init(model)


@pytest.mark.parametrize(
    ("case", "policy"),
    [
        *((case, "reindex") for case in IN_DECODER),
        *((case, "retain") for case in ("fastv", "pyramiddrop", "sparsevlm")),
    ],
)
def test_cache_equals_no_cache(plain, logits_of, case, policy):
    """Tokens generated through the shortened caches are those of the full forward pass."""
    model, batch, params = plain
    options = {**IN_DECODER[case], "position_policy": policy}
    model = model.with_compressor(case.partition("-")[0], **options)
    check_generation(model, params, batch, logits_of)


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


def test_vtw_leaves_the_images_no_word_after_the_cut(plain, logits_of):
    """With every layer behind the cut blind, the last layers' input alone carries the image."""
    model, batch, params = plain
    early = model.with_compressor("vtw", layer=1)
    late = model.with_compressor("vtw", layer=3)
    logits = [np.asarray(logits_of(m, params, batch)) for m in (early, late)]
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
    params = init(model)
    loss = lambda p: (model.apply({"params": p}, inputs(batch)).logits ** 2).mean()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.abs(grads["vit"]["layers"]["up"]["kernel"]).max() > 0


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_position_policies(make_model, make_batch, init, logits_of, position):
    """In both kinds of positions: they differ for kept tokens, agree when all are kept."""
    batch = make_batch()
    decoder = dict(position=position, max_positions=40)
    for budget, same in ((16, True), (4, False)):
        out = []
        for policy in ("retain", "reindex"):
            model = make_model(
                "stride", budget, decoder=decoder, options=dict(position_policy=policy)
            )
            params = init(model)
            out.append(logits_of(model, params, batch))
        assert np.allclose(*out, atol=1e-5) == same


def test_learned_positions_through_the_cache(make_model, make_batch, init, logits_of):
    batch = make_batch()
    model = make_model("stride", 4, decoder=dict(position="learned", max_positions=40), options={})
    params = init(model)
    check_generation(model, params, batch, logits_of)


@pytest.mark.parametrize("class_token", [False, True])
def test_tome_in_the_encoder(make_model, make_batch, init, inputs, class_token):
    """Every patch stays in some token, sizes add up, and the decoder runs on fewer."""
    batch = make_batch()
    encoder = dict(class_token=class_token)
    model = make_model(encoder=encoder)
    params = init(model)
    model = model.with_compressor("tome", 6)
    tokens, _ = jax.jit(
        lambda p: model.apply({"params": p}, inputs(batch).pictures, method="encode")
    )(params)
    assert tokens.embed.shape == (3, 6, 24)
    np.testing.assert_allclose(tokens.size.sum(1), 16)
    assert (np.sort(np.unique(tokens.source)) == np.arange(6)).all()
    out = answer(model, params, batch)
    assert out.visual.embed.shape[1] == 6


def test_merger_in_the_encoder_is_trained(make_model, make_batch, init, inputs):
    batch = make_batch()
    model = make_model("minicpm_merger", 4, options=dict(layer=1, num_heads=2))
    params = init(model)
    loss = lambda p: (model.apply({"params": p}, inputs(batch)).logits ** 2).mean()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    merger = [k for k in grads["vit"] if k.startswith("minicpm")]
    assert merger, list(grads["vit"])
    for leaf in jax.tree.leaves([grads["vit"][k] for k in merger]):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0
    assert answer(model, params, batch).visual.embed.shape[1] == 4


def test_wrong_places_are_told(make_model, init):
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
            init(model.with_compressor(name, **options))
        assert len(str(caught.value).splitlines()) <= 3
    stride = dict(name="stride", budget=4)
    both = make_model(decoder=dict(segments=[dict(layers=1), dict(layers=1, compressor=stride)]))
    both = both.with_compressor("fastv", layer=1)
    with pytest.raises(UserError, match="leave one of the two out"):
        init(both)
    blind = [dict(layers=2, compressor=dict(name="fastv", budget=4))]
    with pytest.raises(UserError, match="in front of it"):
        init(make_model(decoder=dict(segments=blind)))


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
    "ipcv": dict(layer=1),
    "encoder_exit": dict(budget=None),
}


@pytest.mark.parametrize("name", names())
def test_every_method_is_one_config_line(make_model, make_batch, inputs, prompts, name):
    """Training pass and generation stages of every method are traced, with two images a row."""
    batch = make_batch(batch=2, images=2)
    model = make_model(decoder=DEEP, encoder=dict(class_token=True, depth=3))
    options = OPTIONS.get(name, {})
    if name not in IN_DECODER:
        options = {"budget": 4, **options}
    model = model.with_compressor(name, **options)
    params = abstract_parameters(model)
    out = jax.eval_shape(lambda p: model.apply({"params": p}, inputs(batch)), params)
    assert out.logits.shape == (2, 2 * 6, 20)

    def stages(params):
        apply = functools.partial(model.apply, {"params": params})
        given = prompts(batch)
        layout = model.layout(given.pictures)
        tokens, signals = apply(given.pictures, method="encode")
        visual = apply(tokens, signals, given, layout, method="compress")
        return visual, apply(visual, given, layout, new_tokens=2, method="prefill")

    visual, (_, _, sources) = jax.eval_shape(stages, params)
    whole = name in IN_DECODER or METHODS[name].whole_grid
    entering = 16 if whole else options["budget"]
    assert visual.embed.shape == (4, 2 * entering, 32)
    assert visual.source.shape == (4, 32)
    assert len(sources) == len(model.make_decoder().runs(2 * entering))
    assert (len(sources) > 1) == (name in IN_DECODER)


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "scope", "hiprune", "visionzip"])
def test_training_free_methods_in_a_model(make_model, make_batch, init, logits_of, name):
    """At the full budget the logits are the uncompressed ones; at 4 only 4 tokens are left."""
    batch = make_batch()
    model = make_model(encoder=dict(class_token=True, depth=3))
    params = init(model)
    options = dict(middle_layer=1) if name == "hiprune" else {}
    whole = logits_of(model.with_compressor(name, 16, **options), params, batch)
    np.testing.assert_allclose(whole, logits_of(model, params, batch), rtol=1e-4, atol=1e-4)
    fewer = answer(model.with_compressor(name, 4, **options), params, batch)
    assert fewer.visual.embed.shape[1] == 4
    assert jnp.isfinite(fewer.visual.embed).all()


class Watcher(InDecoder):
    """Keeps the first tokens, and what it was shown."""

    looks: str = "previous"
    position_policy: str | None = "retain"

    label = "watcher"
    text_guided = True
    seen = {}

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False):
        return self.cuts((2,), (self.budget,), num_tokens)

    def __call__(self, tokens, signals=None, *, rng=None):
        self.seen[self.looks] = signals.decoder
        keep = jnp.broadcast_to(jnp.arange(self.budget), (len(tokens.mask), self.budget))
        return take(tokens, keep, jnp.ones_like(keep, bool))


@pytest.mark.parametrize("looks", ["previous", "next"])
def test_what_methods_in_the_decoder_see(plain, inputs, monkeypatch, looks):
    """Queries, keys and states are those of the layer they are said to be, applied by hand."""
    monkeypatch.setitem(METHODS, "watcher", Watcher)
    model, batch, params = plain
    model = model.with_compressor("watcher", 4, looks=looks)
    model.apply({"params": params}, inputs(batch))  # Not compiled: the state has values.
    state = Watcher.seen[looks]
    decoder = model.make_decoder()
    block = DecoderBlock(**decoder.blocks()[LAYERS])
    layers = params["language"]["layers"]
    count = 16
    x = jnp.concatenate([state.first_visual, state.first_text], axis=1)
    text = state.prompt.shape[1]
    positions = jnp.concatenate([jnp.arange(count), count + jnp.arange(text)])
    positions = jnp.broadcast_to(positions, state.live.shape).astype(jnp.float32)
    place = jnp.arange(count + text)
    sizes = (len(place),) * 2
    mask = make_mask(*sizes, causal=True, prefix_length=count, kv_live=state.live)
    given = LayerInputs(positions, mask, jnp.zeros(state.live.shape), state.live)
    states, saw = [x], []
    for layer in range(3):
        own = jax.tree.map(lambda p, layer=layer: p[layer], layers)
        x, (_, inner) = block.apply({"params": own}, x, given, None)
        states.append(x)
        saw.append(inner)
    live = np.asarray(state.live)

    def same(a, b, where=live):
        np.testing.assert_allclose(np.asarray(a)[where], np.asarray(b)[where], atol=1e-5)

    same(state.before, states[1])
    same(state.after, states[2])
    expected = saw[1] if looks == "previous" else saw[2]
    same(state.key, expected["key"])
    same(state.plain_key, expected["plain_key"])
    rows = np.arange(len(live))
    asked = (rows, np.asarray(state.last))
    where = live if looks == "previous" else asked
    same(state.query, expected["query"], where)
    same(state.plain_query, expected["plain_query"], where)
    # What the layer masked and summed is what the rows of attention are made of.
    index = jnp.broadcast_to(place, state.live.shape) if looks == "previous" else asked[1][:, None]
    alone = state.replace(mask=None, lse=None)
    assert (state.lse is not None) == (looks == "previous")
    np.testing.assert_allclose(
        attention_rows(state, index), attention_rows(alone, index), atol=1e-6
    )
    lengths = batch["prompt_lengths"].reshape(-1)
    np.testing.assert_array_equal(state.last, count + lengths - 1)
    np.testing.assert_array_equal(state.prompt.sum(1), lengths)


def test_a_merged_token_is_its_copies_in_the_encoder(monkeypatch):
    """ToMe with proportional attention on pairs of equal patches changes no feature; without, it
    does."""
    fields = dict(image_size=32, patch_size=8, width=24, depth=3, num_heads=2, mlp_dim=32)
    rng = np.random.default_rng(0)
    halves = rng.integers(0, 256, (2, 4, 8, 2, 1, 8, 3))
    images = np.broadcast_to(halves, (2, 4, 8, 2, 2, 8, 3)).reshape(2, 32, 32, 3).astype(np.uint8)
    for class_token in (False, True):
        vit = ViT(**fields, class_token=class_token, position_scale=0.0)
        params = nn.unbox(vit.init(jax.random.key(1), images))
        params = jax.tree.map(lambda p: p * 3.0, params)  # Attention that is far from uniform.
        plain = vit.apply(params, images)[0]
        for proportional in (True, False):
            # Four of eight pairs are merged in the first layer: sizes of 2 and of 1.
            tome = build("tome", r=4, layers=(0,), proportional=proportional)
            stages = tome.stages(3, 16, class_token=class_token)
            tokens = vit.apply(params, images, stages=stages)[1]["tokens"]
            assert sorted(np.asarray(tokens.size[0]).tolist()) == [1.0] * 8 + [2.0] * 4
            back = jnp.take_along_axis(tokens.embed, tokens.source[..., None], axis=1)
            apart = float(jnp.abs(back - plain).max())
            assert (apart < 1e-3) == proportional, (class_token, proportional, apart)


def test_a_merged_token_is_its_copies_in_the_decoder(make_model, init):
    model = make_model(decoder=dict(rope_fraction=0.0, bidirectional_visual=True))
    params = init(model)["language"]
    embed = jax.random.normal(jax.random.key(0), (1, 4, 32))
    copied = VisualTokens.from_grid(embed[:, jnp.array([0, 0, 0, 1, 2, 2, 3, 3])], (2, 4))
    members = jnp.array([[0, 0, 0, 1, 2, 2, 3, 3]])
    merged = merge(copied, members, 4)
    text = jax.random.normal(jax.random.key(1), (1, 3, 32))

    def run(tokens, proportional):
        decoder = model.make_decoder().clone(proportional_attention=proportional)
        place = jnp.arange(3)[None]
        marks = jnp.ones((1, 3), jnp.int32)
        options = dict(columns=4, signals=Signals())
        return decoder.apply({"params": params}, tokens, text, place, marks, **options)[0]

    whole = run(copied, True)
    np.testing.assert_allclose(run(merged, True), whole, atol=1e-5)
    assert np.abs(run(merged, False) - whole).max() > 1e-3


@pytest.mark.parametrize("case", ["sparsevlm", "fastv-mean", "feather", "tome"])
def test_cache_equals_no_cache_for_two_images_and_a_causal_decoder(
    make_model, make_batch, init, logits_of, case
):
    batch = make_batch(batch=2, images=2)
    batch["image_mask"][0, 1] = False
    decoder = dict(**DEEP, bidirectional_visual=False, proportional_attention=True)
    model = make_model(decoder=decoder)
    params = init(model)
    options = {**dict(tome=dict(budget=6)), **IN_DECODER}[case]
    model = model.with_compressor(
        case.partition("-")[0], **{**options, "position_policy": "reindex"}
    )
    check_generation(model, params, batch, logits_of)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "cdpruner", "dart"])
def test_answers_do_not_choose_tokens(plain, logits_of, name):
    """In training, neither the answer nor another question changes what a prompt sees."""
    model, batch, params = plain
    options = IN_DECODER.get(name, dict(budget=4))
    model = model.with_compressor(name, **options)
    assert model.selects_by_text
    place = np.arange(6)
    before = np.asarray(logits_of(model, params, batch))
    changed = {**batch, "tokens": batch["tokens"].copy()}
    answers = (place >= batch["prompt_lengths"][..., None]) & (place < batch["lengths"][..., None])
    changed["tokens"][answers] = 19 - changed["tokens"][answers]
    changed["tokens"][:, 1] = 19 - changed["tokens"][:, 1]  # the whole second question
    after = np.asarray(logits_of(model, params, changed))
    prompts = place < batch["prompt_lengths"][..., None]
    np.testing.assert_array_equal(before[:, 0][prompts[:, 0]], after[:, 0][prompts[:, 0]])
    assert not np.array_equal(before[:, 1], after[:, 1])


def test_a_missing_second_image_is_no_image(make_model, make_batch, init, logits_of):
    """Methods in the decoder see two images in a row; one that is missing has no say."""
    batch = make_batch(batch=2, images=2)
    batch["image_mask"][:, 1] = False
    single = {**batch, "images": batch["images"][:, :1], "image_mask": batch["image_mask"][:, :1]}
    model = make_model(decoder=dict(**DEEP, position_policy="reindex", rope_fraction=0.0))
    params = init(model)
    model = model.with_compressor("fastv", layer=1, keep=4)
    two, one = (logits_of(model, params, given) for given in (batch, single))
    valid = np.arange(6) < batch["lengths"][..., None]
    np.testing.assert_allclose(np.asarray(two)[valid], np.asarray(one)[valid], atol=1e-4)


def test_learned_positions_must_fit_the_table(make_model, make_batch, init, inputs):
    model = make_model(decoder=dict(position="learned", max_positions=21))
    params = init(model)
    with pytest.raises(UserError, match="max_positions: 21") as caught:
        model.apply({"params": params}, inputs(make_batch()))
    assert "22" in str(caught.value)


def test_learned_positions_are_fixed_in_front_of_the_first_layer(
    make_model, make_batch, init, logits_of
):
    batch = make_batch()
    model = make_model(decoder=dict(**DEEP, position="learned", max_positions=40))
    params = init(model)
    out = []
    for policy in ("retain", "reindex"):
        cut = model.with_compressor("fastv", layer=1, keep=4, position_policy=policy)
        out.append(logits_of(cut, params, batch))
    np.testing.assert_array_equal(*out)
