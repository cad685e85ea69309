"""Attention in blocks: the contract, float64 against autodiff, memory, platforms."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import AttentionContract
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import api as op
from efficient_vlm.kernels.attention import attention, attention_importance, make_mask, xla


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few dozen, so that small problems have many."""
    monkeypatch.setattr(xla, "_BLOCK_QUERIES", 128)
    monkeypatch.setattr(xla, "_BLOCK_KEYS", 128)
    monkeypatch.setattr(xla, "_FEW_KEYS", 128)
    monkeypatch.setattr(xla, "_MASKED_KEYS", 64)


def batched(*args, default, **_):
    """`lax.platform_dependent` as on a GPU."""
    return default(*args)


class TestLooped(AttentionContract):
    """As on a CPU."""

    implementation = "xla"


class TestBatched(AttentionContract):
    """As on an accelerator without a kernel."""

    implementation = "xla"

    @pytest.fixture(autouse=True)
    def elsewhere(self, monkeypatch):
        monkeypatch.setattr(op.lax, "platform_dependent", batched)


class TestReference(AttentionContract):
    """The oracle itself, against loops and identities."""

    implementation = "reference"


FEATURES = [name for name in cases.FEATURES if name != "importance"]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    features=st.lists(st.sampled_from(FEATURES), min_size=1, max_size=3, unique=True),
    importance=st.booleans(),
    groups=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    looped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_float64_agrees_with_autodiff(features, importance, groups, looped, seed):
    """Closed-form gradients in blocks against autodiff of the definition: 1e-12."""
    features = [*features, "importance"] if importance else features
    shape = (2, *groups, 21, 27, 8, 5)
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_BLOCK_QUERIES", 8 * groups[0] // groups[1])
        patch.setattr(xla, "_BLOCK_KEYS", 8)
        patch.setattr(xla, "_FEW_KEYS", 8)
        patch.setattr(xla, "_MASKED_KEYS", 8)
        if not looped:
            patch.setattr(op.lax, "platform_dependent", batched)
        q, k, v = cases.arrays(shape, seed, np.float64)
        options = cases.options(features, shape, seed, np.float64)
        names = [name for name in ("key_bias", "importance_weights") if name in options]
        moved = [q, k, v, *(options.pop(name) for name in names)]
        rng = np.random.default_rng(seed)
        sizes = [(2, 4, 21, 5), (2, 4, 21), (2, 27)]
        ways = [jnp.asarray(rng.normal(size=size)) for size in sizes]

        def everything(implementation):
            def function(q, k, v, *rest):
                more = dict(zip(names, rest, strict=True))
                found = attention(q, k, v, implementation=implementation, **more, **options)
                lse = jnp.where(jnp.isfinite(found.lse), found.lse, 0)
                return tuple(x for x in (found.out, lse, found.importance) if x is not None)

            @jax.jit
            def both(*moved):
                found, pull = jax.vjp(function, *moved)
                return *found, *pull(tuple(ways[: len(found)]))

            return both(*moved)

        for one, two in zip(everything("xla"), everything("reference"), strict=True):
            assert one.dtype == jnp.float64
            np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-12)
        loops = cases.by_hand(q, k, v, **dict(zip(names, moved[3:], strict=True)), **options)
        found = attention(
            *(q, k, v),
            implementation="reference",
            **dict(zip(names, moved[3:], strict=True)),
            **options,
        )
        for one, two in zip(found, loops, strict=True):
            if two is not None:
                np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("looped", [True, False])
def test_memory_grows_with_tokens_not_with_their_square(backward, looped, monkeypatch):
    monkeypatch.undo()
    if not looped:
        monkeypatch.setattr(op.lax, "platform_dependent", batched)

    def temporaries(count):
        def function(q, k, v, bias, weights):
            given = dict(key_bias=bias, importance_weights=weights, implementation="xla")
            found = attention(q, k, v, causal=True, **given)
            return found.out.sum() + found.importance[:, :9].sum()

        function = jax.grad(function, (0, 1, 2, 3)) if backward else function
        shapes = [jax.ShapeDtypeStruct((1, 2, count, 64), jnp.float32)] * 3
        shapes += [jax.ShapeDtypeStruct((1, count), jnp.float32)] * 2
        compiled = jax.jit(function).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    if looped:
        assert temporaries(8192) < 8192 * 8192 * 4 / 4
    assert temporaries(16384) < 2.3 * temporaries(8192)


LARGE = [jax.ShapeDtypeStruct((1, 12, 1024, 64), jnp.float32)] * 3


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_platform_lowered_for_decides(platform, backward):
    def function(q, k, v):
        return attention(q, k, v).out.sum()

    function = jax.grad(function, (0, 1, 2)) if backward else function
    text = jax.jit(function).trace(*LARGE).lower(lowering_platforms=(platform,)).as_text()
    assert "12x1024x1024xf32" not in text
    assert ("12x1x1024x64xf32" in text) == (platform == "cuda")


def test_small_problems_take_the_whole_map():
    small = [jax.ShapeDtypeStruct((2, 4, 64, 16), jnp.float32)] * 3
    text = jax.jit(lambda q, k, v: attention(q, k, v).out).lower(*small).as_text()
    assert "while" not in text and "2x4x64x64xf32" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(implementation="cuda"), "reference, tpu, xla"),
        (dict(key_bias=np.zeros((2, 5))), "[2, 27]"),
        (dict(window=-1), "from 1"),
        (dict(q_segments=np.zeros((2, 21))), "pass both of them"),
        (dict(kv_positions=np.arange(3)), "[batch, 27]"),
        (dict(importance_weights=np.zeros((2, 27))), "[2, 21]"),
        (dict(importance_weights=np.zeros(2), importance_rows=np.zeros(2, int)), "[2, R]"),
        (dict(softcap=np.inf), "above 0"),
        (dict(scale="one"), "a Python number"),
    ],
)
def test_mistakes_are_named(change, words):
    with pytest.raises(UserError) as error:
        attention(*cases.arrays(cases.SMALL), **change)
    assert words in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_what_is_traced_and_should_not_be():
    q, k, v = cases.arrays(cases.SMALL)
    with pytest.raises(UserError, match="(?s)scale.*multiply q"):
        jax.jit(lambda s: attention(q, k, v, scale=s).out)(0.3)
    with pytest.raises(UserError, match="no lse"):
        attention_importance(q, k, None, np.ones((2, 21)))
    with pytest.raises(UserError, match="bfloat16, float16"):
        attention(*(jnp.asarray(x, jnp.float8_e4m3fn) for x in (q, k, v)))


def test_float16_under_a_loss_scale():
    """Gradients of probabilities leave its range where those of q and k do not."""
    q, k, v = (jnp.asarray(x, jnp.float16) for x in cases.arrays((1, 2, 2, 200, 200, 64, 64)))
    way = 6e3 * jax.random.normal(jax.random.key(0), q.shape)

    def gradients(implementation, *given):
        def loss(q, k, v):
            out = attention(q, k, v, implementation=implementation).out
            return jnp.sum(out.astype(jnp.float32) * way)

        return jax.grad(loss, (0, 1, 2))(*given)

    exact = gradients("reference", *(x.astype(jnp.float32) for x in (q, k, v)))
    for name in ("reference", "xla", None):
        for one, two in zip(gradients(name, q, k, v), exact, strict=True):
            np.testing.assert_allclose(one / 6e3, two / 6e3, atol=4e-3)


@pytest.mark.parametrize(("rows", "whole"), [(8, True), (64, False)])
def test_small_heads_have_a_map_where_there_are_few(rows, whole):
    q = jax.ShapeDtypeStruct((rows, 12, 200, 64), jnp.float32)
    text = jax.jit(lambda q: attention(q, q, q).out).lower(q).as_text()
    assert ("200x200xf32" in text) == whole


def test_second_derivatives_are_refused_and_first_ones_of_gradients_are_not():
    """As a step of first-order meta-learning takes them."""
    q = jnp.asarray(cases.arrays((1, 2, 2, 40, 40, 8, 8))[0])

    def loss(q, implementation):
        return jnp.sum(attention(q, q, q, causal=True, implementation=implementation).out ** 2)

    def behind_a_step(q, implementation, keep=jax.lax.stop_gradient):
        return loss(q - keep(jax.grad(loss)(q, implementation)), implementation)

    *ours, reference = (jax.grad(behind_a_step)(q, name) for name in ("xla", None, "reference"))
    for name, found in zip(("xla", None), ours, strict=True):  # None: the whole map, for so few.
        np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-3)
        with pytest.raises(UserError, match="a second derivative\n.*reference"):
            jax.grad(behind_a_step)(q, name, keep=lambda x: x)
    assert np.isfinite(jax.grad(behind_a_step)(q, "reference", keep=lambda x: x)).all()


@pytest.mark.parametrize("used", [("out",), ("lse",), ("out", "lse", "importance")])
def test_the_whole_map_has_the_gradients_of_autodiff_at_its_price(used):
    """None is the whole map here; an lse that nobody differentiates costs no exponentials."""
    shape = (2, 4, 2, 24, 24, 8, 8)
    q, k, v = map(jnp.asarray, cases.arrays(shape))
    given = cases.options(["bias", "importance"], shape)
    bias, weights = map(jnp.asarray, (given["key_bias"], given["importance_weights"]))

    def loss(args, implementation):
        q, k, v, bias, weights = args
        results = attention(
            q, k, v, key_bias=bias, causal=True, importance_weights=weights,
            implementation=implementation,
        )  # fmt: skip
        return sum(jnp.sum(jnp.sin(getattr(results, name))) for name in used)

    args, compiled = (q, k, v, bias, weights), {}
    for name in (None, "reference"):
        gradient = jax.jit(lambda args, name=name: jax.grad(loss)(args, name))
        compiled[name] = gradient.lower(args).compile()
    ours, theirs = (program(args) for program in compiled.values())
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if "lse" not in used:
        ours, theirs = (program.as_text().count(" exponential(") for program in compiled.values())
        assert ours == theirs


@pytest.mark.parametrize("tokens", [8, 1200])
def test_forward_mode_needs_the_reference_at_any_length(tokens):
    """Else a program that runs on a short prompt would fail on a long one."""
    q, k, v = map(jnp.asarray, cases.arrays((1, 1, 1, tokens, tokens, 4, 4)))
    way = jnp.cos(q)

    def loss(q, implementation=None):
        return jnp.sum(attention(q, k, v, implementation=implementation).out ** 2)

    for function in (lambda: jax.jvp(loss, (q,), (way,)), lambda: jax.linearize(loss, q)[1](way)):
        with pytest.raises(TypeError, match="forward-mode"):
            function()
    _, along = jax.jvp(lambda q: loss(q, "reference"), (q,), (way,))
    np.testing.assert_allclose(along, jnp.vdot(jax.grad(loss)(q), way), rtol=1e-4)


@pytest.mark.parametrize(
    ("shapes", "given"),
    [
        (((1, 300, 4, 8),) * 3, {}),
        (((1, 12, 4, 8), (1, 8, 4, 8), (1, 8, 4, 8)), {}),  # Cross attention: 12 over 8 "heads".
        (((1, 12, 4, 8), (1, 12, 2, 8), (1, 12, 2, 8)), dict(key_bias=np.zeros((1, 12)))),
        (((1, 12, 4, 8),) * 3, dict(importance_weights=np.zeros((1, 12)))),
        (((1, 12, 4, 8),) * 3, dict(kv_lengths=np.array([12]))),
        (((1, 12, 4, 8),) * 3, dict(mask=make_mask(12, 12, causal=True))),
    ],
)
def test_tokens_before_heads_are_refused_where_anything_tells(shapes, given):
    x = [jnp.ones(shape) for shape in shapes]
    with pytest.raises(UserError) as error:
        attention(*x, **given)
    lines = str(error.value).splitlines()
    assert len(lines) <= 3 and "[B, N, H, D]" in lines[-1] and "x.swapaxes(1, 2)" in lines[-1]
    attention(*(x.swapaxes(1, 2) for x in x), **given)  # The advice is followed.


def test_small_cotangents_of_importance():
    """Of a mean over many keys: float16 has nothing below 6e-8."""
    q, k, v = (jnp.asarray(x, jnp.float16) for x in cases.arrays((1, 2, 2, 40, 50, 8, 8)))
    weights, way = np.random.default_rng(0).random((2, 1, 50)).astype(np.float32)

    def gradient(implementation, q, k, v):
        def total(weights, bias):
            given = dict(importance_weights=weights, key_bias=bias, implementation=implementation)
            return 1e-7 * jnp.sum(way * attention(q, k, v, **given).importance)

        return jax.grad(total, (0, 1))(weights[:, :40], np.zeros((1, 50), np.float32))

    with jax.enable_x64(True):
        exact = gradient("reference", *(x.astype(jnp.float64) for x in (q, k, v)))
    for one, two in zip(gradient("xla", q, k, v), exact, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-3 * np.abs(two).max())
