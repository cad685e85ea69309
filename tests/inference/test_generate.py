"""Generation: end tokens, empty slots, the size of the cache, and which programs are shared.

That the cache gives what a model without one gives is shown in tests/models/test_vlm.py.
"""

import jax
import numpy as np
import pytest
from flax import linen as nn

from efficient_vlm.inference import generate as module
from efficient_vlm.inference import stages
from efficient_vlm.inference.generate import generate
from efficient_vlm.inference.options import SamplingOptions
from efficient_vlm.inference.sampling import Sampling
from efficient_vlm.processing.batch import question_inputs
from efficient_vlm.train.step import init_params

SMALL = dict(encoder=dict(depth=1), decoder=dict(segments=[dict(layers=1)]))
EOS = 1


@pytest.fixture(scope="module")
def batch(make_batch):
    """3 images with 2 questions each; one slot is empty."""
    batch = make_batch(3, 2, 6)
    lengths = batch["prompt_lengths"].copy()
    lengths[1, 1] = 0
    inside = np.arange(6) < lengths[..., None]
    return batch | {"lengths": lengths, "tokens": np.where(inside, batch["tokens"], 0)}


@pytest.fixture(scope="module")
def trained(make_model, init):
    """(model, parameters) of which some answers end early: the end token is a likely one."""
    model = make_model("none", 16, **SMALL)
    params = init(model)
    kernel = params["language"]["head"]["kernel"]
    params["language"]["head"]["kernel"] = kernel.at[:, EOS].multiply(4.0)
    return model, params


def answers(model, params, batch, new_tokens=4, **options):
    inputs = question_inputs({**batch, "prompt_lengths": batch["lengths"]})
    return generate(model, params, inputs, new_tokens=new_tokens, eos_id=EOS, **options)


def test_behind_the_end_there_is_only_the_end(trained, batch):
    out = answers(*trained, batch, new_tokens=5)
    assert out.tokens.shape == (3, 2, 5) and out.tokens.dtype == np.int32
    ended = (out.tokens == EOS).cumsum(axis=-1) > 0
    assert (out.tokens[ended] == EOS).all()
    assert ended.any() and not ended.all()  # Both kinds occur, so this has shown something.
    assert (out.tokens[1, 1] == EOS).all()  # The empty slot.


def test_a_shorter_answer_is_the_beginning_of_a_longer_one(trained, batch):
    long = answers(*trained, batch, new_tokens=5).tokens
    for count in (1, 3):
        np.testing.assert_array_equal(
            answers(*trained, batch, new_tokens=count).tokens, long[..., :count]
        )


def test_decoding_ends_when_every_answer_has(trained, batch):
    model, params = trained
    always = jax.tree.map(lambda x: x, params)
    kernel = params["language"]["head"]["kernel"]
    always["language"]["head"]["kernel"] = kernel * 0
    out = answers(model, always, batch, new_tokens=5)
    first = out.tokens[..., 0]
    # The most likely of equal logits is token 0, which ends nothing: four steps follow.
    assert (first[batch["lengths"] > 0] == 0).all() and len(out.seconds["decode"]) == 4
    empty = batch | {"lengths": batch["lengths"] * 0}
    out = answers(model, params, empty, new_tokens=5)
    assert (out.tokens == EOS).all() and out.seconds["decode"] == []


def test_padding_of_the_prompt_does_not_matter(trained, batch):
    """Neither what stands behind the end of a prompt nor a question in another slot."""
    expected = answers(*trained, batch).tokens
    inputs = question_inputs({**batch, "prompt_lengths": batch["lengths"]})
    dirty = inputs.replace(text=np.where(inputs.live, inputs.text, 7))
    found = generate(*trained, dirty, new_tokens=4, eos_id=EOS)
    np.testing.assert_array_equal(found.tokens, expected)
    swapped = batch | {k: batch[k][:, ::-1] for k in ("tokens", "lengths")}
    np.testing.assert_array_equal(answers(*trained, swapped).tokens, expected[:, ::-1])


@pytest.mark.parametrize(("name", "budget"), [("none", 16), ("random", 4), ("text_topk", 1)])
def test_the_cache_holds_what_the_formula_says(trained, batch, name, budget):
    model, params = trained
    variant = model.with_compressor(name, budget)
    if name == "text_topk":
        params = nn.unbox(init_params([variant], 0))
    out = answers(variant, params, batch, rng=jax.random.key(0))
    layers, heads, size, slots = 1, 2, 32 // 4, budget + 6 + 4
    assert out.kv_bytes == 6 * layers * slots * heads * size * 2 * np.dtype(np.float32).itemsize
    assert out.visual.embed.shape[:2] == (6, budget)
    kept = (np.asarray(out.visual.source) >= 0).sum(axis=1)
    assert (kept == budget).all() and out.visual.source.shape == (6, 16)


def test_the_draw_of_a_random_compressor_is_that_of_its_key(trained, batch):
    model, params = trained
    variant = model.with_compressor("random", 4)

    def sources(seed):
        out = answers(variant, params, batch, rng=jax.random.key(seed))
        return np.asarray(out.visual.source)

    first = sources(0)
    np.testing.assert_array_equal(sources(0), first)
    assert not np.array_equal(sources(1), first)


def test_programs_are_shared_between_compressors_of_one_budget(trained, batch):
    """One encoder for all, one prefill and one decode per budget: what evaluation compiles."""
    model, params = trained
    programs = {
        "encode": module.encode_stage,
        "compress": module.compress_stage,
        "prefill": module.prefill_stage,
        "decode": module.decode_stage,
    }

    def new_programs(name, budget, **options):
        before = {k: f._cache_size() for k, f in programs.items()}
        variant = model.with_compressor(name, budget, **options)
        answers(variant, params, batch, rng=jax.random.key(0))
        return {k for k, f in programs.items() if f._cache_size() > before[k]}

    answers(model, params, batch)
    assert new_programs("none", 16) <= {"compress"}  # The same, now with a key.
    # Budget 9 is used by no other test of this session.
    first = new_programs("stride", 9)
    assert {"compress", "prefill", "decode"} == first
    assert new_programs("random", 9) == {"compress"}
    assert new_programs("random", 9) == set()
    # Its encoder sees a smaller image, so it has one of its own.
    assert new_programs("downsample", 9) == {"encode", "compress"}
    # Methods with the same signals share an encoder. Under another policy text starts at another
    # place, which is part of the program that reads the prompt.
    row = {"attention": "mean_query"}
    assert new_programs("fastervlm", 9, **row) == {"encode", "compress", "prefill"}
    assert new_programs("scope", 9, **row) == {"compress"}
    assert new_programs("fastervlm", 8, **row) == {"compress", "prefill", "decode"}


def drawn(model, params, batch, new_tokens=5, fields=(), **options):
    """Answers of slots with seeds 0, 1, 2, ..., and what `fields` says of each."""
    rows = [
        SamplingOptions(temperature=1.5, seed=row, **(fields[row] if fields else {}))
        for row in range(batch["lengths"].size)
    ]
    return answers(model, params, batch, new_tokens, sampling=Sampling.of(rows, 20), **options)


@pytest.mark.parametrize("name", ["none", "stride", "fastv"])
def test_a_seed_draws_the_same_alone_and_again(trained, batch, make_model, init, name):
    model, params = trained
    if name == "fastv":
        model = make_model(
            "none", 16, encoder=dict(depth=1), decoder=dict(segments=[dict(layers=2)])
        )
        params = init(model)
        model = model.with_compressor("fastv", layer=1, keep=4)
    elif name == "stride":
        model = model.with_compressor("stride", 4)
    together = drawn(model, params, batch).tokens
    np.testing.assert_array_equal(drawn(model, params, batch).tokens, together)
    assert not np.array_equal(answers(model, params, batch, 5).tokens, together)
    for row in range(3):  # Seeds 2 row and 2 row + 1.
        own = {key: value[row : row + 1] for key, value in batch.items()}
        fields = [SamplingOptions(temperature=1.5, seed=2 * row + slot) for slot in range(2)]
        alone = answers(model, params, own, 5, sampling=Sampling.of(fields, 20)).tokens
        np.testing.assert_array_equal(alone[0], together[row])


def test_drawn_answers_end_and_stay_ended(trained, batch):
    out = drawn(*trained, batch, new_tokens=6, logprobs=3)
    ended = (out.tokens == EOS).cumsum(axis=-1) > 0
    assert (out.tokens[ended] == EOS).all() and ended.any() and not ended.all()
    np.testing.assert_array_equal(out.lengths, (~ended).sum(axis=-1))
    # The end token has a log-probability, what is behind it has none.
    behind = np.arange(6) > out.lengths[..., None]
    behind[batch["lengths"] == 0] = True
    np.testing.assert_array_equal(np.isnan(out.logprobs.chosen), behind)
    np.testing.assert_array_equal(np.isnan(out.logprobs.values[..., 0]), behind)
    assert (out.logprobs.ids[behind] == -1).all() and (out.logprobs.ids[~behind] >= 0).all()
    assert out.logprobs.ids.shape == (3, 2, 6, 3)


def test_a_caller_ends_answers(trained, batch):
    """By what `on_token` gives, row by row; decoding ends when all have."""
    model, params = trained
    seen = []

    def second_ends_all(tokens):
        seen.append(tokens)
        return np.full(6, len(seen) == 2)

    out = answers(model, params, batch, 5, on_token=second_ends_all)
    whole = answers(model, params, batch, 5)
    np.testing.assert_array_equal(out.tokens[..., :2], whole.tokens[..., :2])
    assert (out.tokens[..., 2:] == EOS).all() and len(out.seconds["decode"]) == 1
    np.testing.assert_array_equal(out.lengths, np.minimum(whole.lengths, 2))


def test_one_program_for_settings_of_one_structure(trained, batch):
    """Other values and seeds are arguments; a setting that no row has is no part of a program."""
    model, params = trained
    programs = (module.prefill_stage, module.decode_stage)

    def new_programs(**fields):
        before = [program._cache_size() for program in programs]
        drawn(model, params, batch, fields=[fields] * 6)
        return [program._cache_size() - b for program, b in zip(programs, before, strict=True)]

    assert new_programs(top_k=3) == [1, 1]
    assert new_programs(top_k=7) == new_programs(top_k=2) == [0, 0]
    assert new_programs(frequency_penalty=0.5) == [1, 1]
    assert new_programs(frequency_penalty=-0.5) == [0, 0]


@pytest.mark.parametrize("cache", [dict(kind="paged", page=8), dict(kind="paged", dtype="int8")])
def test_other_caches(trained, batch, cache):
    """Pages give the same tokens; the bytes are those of whole pages."""
    plain = answers(*trained, batch, new_tokens=5)
    out = answers(*trained, batch, new_tokens=5, cache=cache)
    if "dtype" not in cache:
        np.testing.assert_array_equal(out.tokens, plain.tokens)
    vectors = 6 * 2 * 2  # Rows, heads, keys and values.
    sizes = {None: 32 * 8 * 4, "int8": 128 * (8 + 4)}  # 16 + 6 + 5 slots in pages of 8, of 128.
    assert out.kv_bytes == vectors * sizes[cache.get("dtype")]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("none", dict(budget=16)),
        ("hiprune", dict(budget=8, middle_layer=0.5, attention="column_mean")),
        ("tome", dict(budget=8)),
        ("encoder_cut", dict(keep=(0.5,), layers=(1,))),
    ],
)
def test_pictures_one_by_one_are_encoded_as_in_a_batch(
    monkeypatch, make_model, make_batch, init, inputs, name, options
):
    """Tokens, signals and what is missing."""
    model = make_model("none", 16, encoder=dict(scan_unroll=2))
    params = init(model)
    model = model.with_compressor(name, **options)
    pictures = inputs(make_batch(2, 1, images=2)).pictures
    pictures = pictures.replace(mask=np.array([[True, True], [True, False]]))
    static = stages.programs_of(model, model.layout(pictures)).encode
    loops = _new_program(static, params, pictures).count("stablehlo.while")
    together = stages.encode_stage(*static, params, pictures)
    monkeypatch.setattr(stages, "_LEAST_VALUES", 1)
    assert _new_program(static, params, pictures).count("stablehlo.while") > loops
    alone = stages.encode_stage(*static, params, pictures)
    stages.encode_stage.clear_cache()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone, together)


def _new_program(static, params, pictures) -> str:
    """The text of the encoder's program, made anew."""
    stages.encode_stage.clear_cache()
    return stages.encode_stage.lower(*static, params, pictures).as_text()
