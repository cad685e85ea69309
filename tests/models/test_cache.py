"""The cache whose rows have lengths of their own: tokens put behind it give what one pass gives."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MOE

from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.cli import verify
from efficient_vlm.errors import UserError
from efficient_vlm.families import architecture, load
from efficient_vlm.families.table import family_of
from efficient_vlm.models.cache import KVCache
from efficient_vlm.nn.kv_cache import CONTIGUOUS, CacheOptions
from efficient_vlm.nn.stack import unstack
from efficient_vlm.processing.batch import question_inputs

GOLDEN = Path(__file__).parents[1] / "golden"
LAYERS = 4
LOCAL = dict(layer_types=["local", "global", "local", "local"], window=5)
CASES = {
    "dense": {},
    "moe": dict(moe=MOE),
    "soft caps": dict(decoder=dict(attention_softcap=3.0, final_softcap=2.0)),
    "windows": dict(decoder=dict(**LOCAL, local_rope=dict(theta=100.0))),
    "learned positions": dict(decoder=dict(position="learned", max_positions=32)),
    "dynamic rotary positions": dict(
        decoder=dict(rope_scaling=dict(type="dynamic", factor=2.0, original_length=64))
    ),
    "merged tokens": dict(
        method=("tome", dict(budget=6)),
        decoder=dict(bidirectional_visual=False, proportional_attention=True),
    ),
    "fastv": dict(method=("fastv", dict(layer=1, keep=4)), decoder=LOCAL),
    "pyramiddrop": dict(
        method=("pyramiddrop", dict(layers=(1, 2, 3), keep=(0.5, 0.25, 0.125))), moe=MOE
    ),
    "sparsevlm": dict(method=("sparsevlm", dict(layers=(1, 2, 3), keep=(10, 6, 3)))),
    "feather": dict(method=("feather", dict(layers=(1, 2)))),
    "v2drop": dict(method=("v2drop", dict(layers=(1, 2, 3)))),
    "dart": dict(method=("dart", dict(layer=1, keep=9))),
    "fitprune": dict(method=("fitprune", dict(rate=0.5))),
    "vtw": dict(method=("vtw", dict(layer=2))),
}
PROMPTS, COUNTS = np.array([2, 6, 4], np.int32), np.array([4, 1, 3], np.int32)
FOLLOW = 4


@pytest.fixture(scope="module")
def batch(make_batch):
    """Three rows with prompts of 2, 6 and 4 tokens and 4, 1 and 3 behind them; one has no image."""
    batch = make_batch(3, 1, 6 + FOLLOW)
    batch["image_mask"][1] = False
    tokens = np.random.default_rng(3).integers(2, 20, (3, 6 + FOLLOW)).astype(np.int32)
    inside = np.arange(tokens.shape[1]) < (PROMPTS + COUNTS)[:, None]
    return batch | {
        "tokens": np.where(inside, tokens, 0)[:, None],
        "lengths": (PROMPTS + COUNTS)[:, None],
        "prompt_lengths": PROMPTS[:, None],
    }


def made(case, make_model, init):
    """The model of a case and its parameters, of which methods have none."""
    fields = dict(CASES[case])
    name, options = fields.pop("method", ("none", dict(budget=16)))
    fields["decoder"] = dict(segments=[dict(layers=LAYERS)], **fields.get("decoder", {}))
    model = make_model("none", 16, **fields)
    return model.with_compressor(name, **options), init(model)


def following(batch):
    """int32 [3, FOLLOW], what stands behind each prompt."""
    at = np.minimum(PROMPTS[:, None] + np.arange(FOLLOW), batch["tokens"].shape[-1] - 1)
    return np.take_along_axis(batch["tokens"][:, 0], at, axis=1)


def prefilled(model, params, batch, kept=CONTIGUOUS):
    """Logits after the prompts [B, vocab], and the cache."""
    prompts = question_inputs({**batch, "tokens": batch["tokens"][..., :6]})
    return read_prompts(model, params, prompts, FOLLOW, kept)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def read_prompts(model, params, prompts, room, kept=CONTIGUOUS):
    apply = functools.partial(model.apply, {"params": params})
    layout = model.layout(prompts.pictures)
    if prompts.pictures is None:
        visual = model.no_pictures(len(prompts.text))
    else:
        patches, signals = apply(prompts.pictures, method="encode")
        visual = apply(patches, signals, prompts, layout, method="compress")
    options = dict(new_tokens=room, cache_options=kept, method="prefill")
    return apply(visual, prompts, layout, **options)[:2]


@functools.partial(jax.jit, static_argnums=0)
def extended(model, params, tokens, cache, counts):
    return model.apply({"params": params}, tokens, cache, counts, method="extend")


def one_by_one(model, params, tokens, cache, counts):
    """As `extended`, a token at a time; rows stop at their own counts."""
    logits = []
    for step in range(tokens.shape[1]):
        more = (step < counts).astype(np.int32)
        found, cache = extended(model, params, tokens[:, step : step + 1], cache, more)
        logits.append(found)
    return jnp.concatenate(logits, axis=1), cache


def near(found, expected, there):
    scale = np.abs(expected[there]).max()
    np.testing.assert_allclose(found[there], expected[there], atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_all_ways_to_the_same_logits(make_model, init, inputs, batch, case):
    """At once, one by one, and behind what was rolled back, against one whole pass."""
    model, params = made(case, make_model, init)
    whole = jax.jit(lambda p, b: model.apply({"params": p}, b).logits)(params, inputs(batch))
    whole = np.asarray(whole)
    at = PROMPTS[:, None] + np.arange(FOLLOW)
    expected = np.take_along_axis(whole, np.minimum(at, whole.shape[1] - 1)[..., None], axis=1)
    there = np.arange(FOLLOW) < COUNTS[:, None]

    params, follow = unstack(params), following(batch)
    first, cache = prefilled(model, params, batch)
    near(np.asarray(first), whole[np.arange(3), PROMPTS - 1], np.full(3, True))
    assert cache.lengths.tolist() == PROMPTS.tolist() and cache.room == 6 + FOLLOW
    at_once, longer = extended(model, params, follow, cache, COUNTS)
    near(np.asarray(at_once), expected, there)
    assert longer.lengths.tolist() == (PROMPTS + COUNTS).tolist()
    found, same = one_by_one(model, params, follow, cache, COUNTS)
    near(np.asarray(found), expected, there)
    assert same.lengths.tolist() == longer.lengths.tolist()

    # Rejected tokens leave no trace: what comes behind is bit for bit what it is without them.
    _, tried = extended(model, params, (follow + 7) % 20, cache, np.array([2, 4, 4], np.int32))
    back = tried.rolled_back(PROMPTS)
    assert not any(np.array_equal(a, b) for a, b in zip(leaves(tried), leaves(cache), strict=True))
    np.testing.assert_array_equal(*(
        np.asarray(extended(model, params, follow, c, COUNTS)[0])[there] for c in (cache, back)
    ))  # fmt: skip


def leaves(cache: KVCache):
    return jax.tree.leaves([part.parts for part in cache.segments])


@pytest.mark.parametrize("case", ["moe", "windows", "pyramiddrop"])
def test_a_row_alone_is_the_row_in_a_batch(make_model, init, batch, case):
    (model, params), follow = made(case, make_model, init), following(batch)

    def asked(rows):
        own = {key: value[rows] for key, value in batch.items()}
        _, cache = prefilled(model, params, own)
        return np.asarray(extended(model, params, follow[rows], cache, COUNTS[rows])[0])

    together, there = asked(slice(None)), np.arange(FOLLOW) < COUNTS[:, None]
    for row in range(3):
        near(asked(slice(row, row + 1)), together[row : row + 1], there[row : row + 1])


def test_stacked_layers_and_one_step(make_model, init, batch):
    """A cache with an axis over the layers, as training's parameters give it; `decode`."""
    model = make_model("fastv", options=dict(layer=1, keep=4), budget=None)
    params = init(make_model())
    follow, found = following(batch), []
    for given in (params, unstack(params)):
        _, cache = prefilled(model, given, batch)
        logits, cache = extended(model, given, follow, cache, COUNTS)
        step = jax.jit(lambda p, t, c: model.apply({"params": p}, t, c, method="decode"))
        found.append((logits, *step(given, follow[:, 0], cache.rolled_back(PROMPTS))))
        assert found[-1][2].lengths.tolist() == (PROMPTS + 1).tolist()
        np.testing.assert_allclose(found[-1][1], logits[:, 0], atol=1e-5)
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-4)
    assert found[0][2].nbytes == found[1][2].nbytes


# Windows and soft caps; images in blocks and two rotary bases; learned positions; M-RoPE; features
# for several layers; a mixture of experts.
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_neo", "qwen2_vl", "qwen3_vl", "mixtral"])
def test_published_layouts(name):
    """Images between the text of rows of different lengths, by the layout of each family."""
    config = architecture.read_config(GOLDEN / name)
    family, model = family_of(config), architecture.build_model(config)
    source = load.FamilyCheckpoint(Checkpoint.open(GOLDEN / name), family, config, model)
    params = load.load_parameters(source)
    with np.load(GOLDEN / name / "io.npz") as io:
        inputs = verify.read_inputs(family, config, model, dict(io))
    rng, counts = np.random.default_rng(0), np.array([3, 1, 2])[: len(inputs.prompts)]
    text = [p.ids[p.ids != inputs.place["image_token"]] for p in inputs.prompts]
    follow = np.stack([rng.choice(row, 3) for row in text]).astype(np.int32)
    prompts = [p._replace(types=None) for p in inputs.prompts]
    longer = [
        p._replace(ids=np.concatenate([p.ids, new[:n]]))
        for p, new, n in zip(prompts, follow, counts, strict=True)
    ]
    whole = verify.logits(inputs._replace(prompts=longer), params)
    first, found = cached(inputs._replace(prompts=prompts), params, follow, counts)
    for row, n in enumerate(counts):
        scale = np.abs(whole[row]).max()
        both = np.concatenate([first[row : row + 1], found[row, :n]])
        np.testing.assert_allclose(both, whole[row][-n - 1 :], atol=2e-5 * scale, rtol=0)


def cached(inputs, params, follow, counts):
    """Logits after the prompts, and after what follows, through the cache."""
    first, cache = read_prompts(inputs.model, params, inputs.placed(), follow.shape[1])
    return np.asarray(first), np.asarray(extended(inputs.model, params, follow, cache, counts)[0])


PAGED, INT8 = CacheOptions("paged", page=8), CacheOptions(dtype="int8")
BOTH = CacheOptions("paged", page=8, dtype="int8")


@pytest.mark.parametrize("case", ["moe", "windows", "merged tokens", "pyramiddrop"])
def test_pages_and_int8(make_model, init, batch, case):
    """Pages change nothing, wherever they lie; int8 as much as its rounding does."""
    model, params = made(case, make_model, init)
    params, follow = unstack(params), following(batch)
    there = np.arange(FOLLOW) < COUNTS[:, None]
    logits, caches = {}, {}
    for kept in (CONTIGUOUS, PAGED, INT8, BOTH):
        first, cache = prefilled(model, params, batch, kept)
        caches[kept] = cache
        found, _ = extended(model, params, follow, shuffled(cache), COUNTS)
        if kept in (PAGED, BOTH):
            pieces, _ = one_by_one(model, params, follow, shuffled(cache), COUNTS)
            near(np.asarray(pieces), np.asarray(found), there)
        logits[kept] = np.asarray(first), np.asarray(found)
    np.testing.assert_array_equal(logits[INT8][0], logits[CONTIGUOUS][0])  # Prompts are read first.
    near(logits[PAGED][1], logits[CONTIGUOUS][1], there)
    near(logits[BOTH][1], logits[INT8][1], there)
    exact, rounded = logits[CONTIGUOUS][1][there], logits[INT8][1][there]
    # On average: a token may go to another expert.
    assert 0 < np.sqrt(np.mean((rounded - exact) ** 2)) < 0.02 * np.sqrt(np.mean(exact**2))
    for one, two in zip(caches[CONTIGUOUS].segments, caches[INT8].segments, strict=True):
        for part in range(2):
            for x, y, scale in zip(one.parts[part], two.parts[part], two.parts[part + 2]):
                scale = np.asarray(scale, np.float64)[..., None]
                off = np.abs(np.asarray(y, np.float64) * scale - np.asarray(x, np.float64))
                assert y.dtype == np.int8 and (off <= scale * 0.5001).all()


@pytest.mark.parametrize("kept", [CONTIGUOUS, PAGED], ids=["contiguous", "paged"])
def test_tokens_without_room_are_told(make_model, init, batch, kept):
    """Their logits are NaN, those of the others as ever."""
    model, params = made("dense", make_model, init)
    _, cache = prefilled(model, params, batch, kept)
    follow = np.tile(following(batch), cache.room)[:, : cache.room]
    logits, longer = extended(model, params, follow, cache, np.full(3, cache.room, np.int32))
    stored = PROMPTS[:, None] + np.arange(cache.room) < cache.room
    np.testing.assert_array_equal(np.isfinite(logits).all(-1), stored)
    fewer, _ = extended(model, params, follow, cache, stored.sum(1).astype(np.int32))
    near(np.asarray(logits), np.asarray(fewer), stored)


def shuffled(cache):
    """A cache whose pages lie in another order, and its tables."""

    def moved(segment):
        if segment.pages is None:
            return segment
        count = segment.pages.size
        order = np.random.default_rng(0).permutation(count)
        parts = jax.tree.map(lambda pool: pool[order], segment.parts)
        return segment.replace(parts=parts, pages=jnp.asarray(np.argsort(order))[segment.pages])

    return cache.replace(segments=tuple(map(moved, cache.segments)))


def test_bytes_of_keys_and_values(make_model, init, batch):
    """Of all layers, whole pages, and with int8 one number of 4 bytes for each token and head."""
    model = make_model(dtype="bfloat16", decoder=dict(segments=[dict(layers=2)]))
    params, vectors = unstack(init(model)), 2 * 2 * 3 * 2  # K and V, layers, rows, heads.
    found = {
        kept: jax.eval_shape(lambda p, k=kept: prefilled(model, p, batch, k)[1], params)
        for kept in (CONTIGUOUS, PAGED, INT8, BOTH)
    }
    sizes = {kept: sum(x.size * x.dtype.itemsize for x in leaves(c)) for kept, c in found.items()}
    slots, paged = 16 + 6 + FOLLOW, 32
    assert sizes[CONTIGUOUS] == vectors * slots * 8 * 2
    assert sizes[PAGED] == vectors * paged * 8 * 2
    assert sizes[INT8] == vectors * slots * (8 + 4)
    assert sizes[BOTH] == vectors * paged * (8 + 4)
    assert prefilled(model, params, batch)[1].nbytes == sizes[CONTIGUOUS]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(kind="page"), "did you mean 'paged'"),
        (dict(kind="paged", page=0), "1 to 65536"),
        (dict(kind="paged", page=128.0), "1 to 65536"),
        (dict(page=128), "paged"),
        (dict(dtype="int4"), "int8"),
        (dict(sort="paged"), "kind"),
        ("paged", "a mapping"),
    ],
)
def test_mistakes_are_told_in_three_lines(given, words):
    with pytest.raises(UserError, match=words) as error:
        CacheOptions.of(given)
    assert len(str(error.value).splitlines()) <= 3
    assert CacheOptions.of(dict(kind="paged")).page == 128


# What may give an array of the size of the cache: places of it, and writing a few tokens into it.
WRITES = {"dynamic-update-slice", "scatter"}
IN_PLACE = WRITES | {"parameter", "get-tuple-element", "bitcast", "fusion"}


@pytest.mark.parametrize("rows", [8, 1])
def test_a_step_copies_no_cache(make_model, init, batch, rows):
    """Rows at different places are written where they are, in a cache that is donated."""
    model = make_model(decoder=dict(segments=[dict(layers=2)]))
    params = unstack(init(model))
    slots = 400
    segment = prefilled(model, params, batch)[1].segments[0]
    parts = jax.tree.map(lambda p: jnp.zeros((rows, p.shape[1], slots, p.shape[3])), segment.parts)
    numbers = jnp.zeros((rows, slots))
    own = dict(parts=parts, bias=numbers, index=numbers, offset=jnp.zeros(rows, jnp.int32))
    cache = KVCache((segment.replace(**own),), jnp.arange(rows, dtype=jnp.int32))

    def step(params, tokens, cache):
        return model.apply({"params": params}, tokens, cache, method="decode")

    lowered = jax.jit(step, donate_argnums=2).lower(params, jnp.zeros(rows, jnp.int32), cache)
    program = lowered.compile()
    memory, keys = program.memory_analysis(), parts[0][0]
    assert memory.alias_size_in_bytes >= cache.nbytes
    # For one row the keys of one layer at a time are transposed.
    assert memory.temp_size_in_bytes < (2 if rows == 1 else 1) * keys.nbytes
    shape = ",".join(map(str, keys.shape))
    operations = set(re.findall(rf"= f32\[{shape}\]\S* ([\w-]+)\(", program.as_text()))
    assert operations <= IN_PLACE and operations & WRITES
