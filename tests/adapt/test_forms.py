"""Each form against float64 arithmetic of its definition, wherever a weight can stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from qwix._src.core import numerics

from efficient_vlm.adapt.forms import DoRA, LoRA, plain
from efficient_vlm.adapt.prompts import Extended
from efficient_vlm.adapt.quantised import BLOCK, NF4, NF4_CODE, Doubled, Int8
from efficient_vlm.nn.linear import batched, beside, grouped, head_product, product, take

RANK, SCALE = 3, 1.7
INPUTS, OUTPUTS = (6, 24), (2, 5)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def flat(weight, contracted, leading=0):
    """float64 [*leading, inputs, outputs]."""
    weight = np.asarray(weight, np.float64)
    lead, inner = weight.shape[:leading], weight.shape[leading:]
    return weight.reshape(*lead, int(np.prod(inner[:contracted])), -1)


def make(kind, shape, contracted, leading=0, base=None):
    """(form, float64 matrix [*leading, inputs, outputs] of its definition)."""
    lead, inputs, outputs = shape[:leading], shape[leading : leading + contracted], ()
    outputs = shape[leading + contracted :]
    weight = jnp.asarray(normal(*shape))
    if base == "int8":
        weight = Int8.of(weight, range(leading, leading + contracted))
    elif base is not None:
        weight = NF4.of(weight, contracted, leading, double=base == "nf4_doubled")
    matrix = flat(plain(weight), contracted, leading)
    a, b = normal(*lead, *inputs, RANK, seed=1), normal(*lead, RANK, *outputs, seed=2)
    if kind == "plain":
        return weight, matrix
    total = matrix + SCALE * flat(a, contracted, leading) @ flat(b, 1, leading)
    a, b = jnp.asarray(a), jnp.asarray(b)
    if kind == "lora":
        return LoRA(weight, a, b, SCALE), total
    form = DoRA.of(weight, a, b, SCALE)
    norms = np.linalg.norm(matrix, axis=-2)
    np.testing.assert_allclose(form.magnitude.reshape(norms.shape), norms, rtol=1e-5)
    magnitude = 1 + np.abs(normal(*lead, *outputs, seed=3))
    form = form.replace(magnitude=jnp.asarray(magnitude))
    scale = magnitude.reshape(*lead, -1) / np.linalg.norm(total, axis=-2)
    return form, total * scale[..., None, :]


FORMS = [
    *(("plain", "int8"), ("plain", "nf4")),
    *(("lora", None), ("lora", "int8"), ("lora", "nf4_doubled")),
    *(("dora", None), ("dora", "nf4")),
]


@pytest.mark.parametrize(("kind", "base"), FORMS)
def test_a_product_is_that_of_its_definition(kind, base):
    contracted, shape = 2, (*INPUTS, *OUTPUTS)
    form, matrix = make(kind, shape, contracted, base=base)
    x = normal(4, 3, *shape[:contracted], seed=5)
    expected = x.reshape(4, 3, -1).astype(np.float64) @ matrix
    found = product(jnp.asarray(x), form, jnp.float32, contracted)
    assert found.shape == (4, 3, *OUTPUTS)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(flat(plain(form), contracted), matrix, rtol=1e-4, atol=1e-5)
    assert form.shape == shape


@pytest.mark.parametrize(("kind", "base"), FORMS)
def test_experts_have_a_weight_each(kind, base):
    """Rows sorted by expert, and slots of each expert, one with no rows; side by side as well."""
    form, matrix = make(kind, (3, 24, 5), 1, leading=1, base=base)
    sizes = jnp.asarray([4, 0, 3], jnp.int32)
    x = normal(7, 24, seed=5)
    expected = np.concatenate([x[:4] @ matrix[0], x[4:] @ matrix[2]])
    found = grouped(jnp.asarray(x), form, sizes)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)
    slots = normal(2, 3, 4, 24, seed=6)
    expected = np.einsum("becd,edf->becf", slots.astype(np.float64), matrix)
    np.testing.assert_allclose(batched(jnp.asarray(slots), form), expected, rtol=1e-4, atol=2e-4)
    other = normal(3, 24, 2, seed=7)
    for first, second in ((form, jnp.asarray(other)), (jnp.asarray(other), form)):
        pair = beside(first, second)
        both = [matrix, other] if first is form else [other, matrix]
        both = np.concatenate(both, axis=-1)
        assert pair.shape == both.shape
        expected = np.einsum("becd,edf->becf", slots.astype(np.float64), both)
        found = batched(jnp.asarray(slots), pair)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)
        expected = np.concatenate([x[:4] @ both[0], x[4:] @ both[2]])
        np.testing.assert_allclose(
            grouped(jnp.asarray(x), pair, sizes), expected, rtol=1e-4, atol=2e-4
        )


@pytest.mark.parametrize(("kind", "base"), FORMS)
def test_a_layer_of_a_stack_is_the_layer(kind, base):
    """All arrays lead with the axis of layers: indexing them gives the form of one layer."""
    form, matrix = make(kind, (3, *INPUTS, 5), 2, leading=1, base=base)
    assert form.shape == (3, *INPUTS, 5)
    np.testing.assert_allclose(flat(plain(form), 2, 1), matrix, rtol=1e-4, atol=1e-5)
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], form)
        assert layer.shape == (*INPUTS, 5)
        np.testing.assert_allclose(flat(plain(layer), 2), matrix[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [None, "int8"])
def test_tables_are_looked_up_and_are_heads(base):
    table = jnp.asarray(normal(11, 8))
    stored = Int8.of(table, (1,)) if base else table
    a, b = normal(11, RANK, seed=1), normal(RANK, 8, seed=2)
    form = LoRA(stored, jnp.asarray(a), jnp.asarray(b), SCALE)
    rows, x = np.array([[3, 0], [10, 3]]), normal(2, 8, seed=4)
    whole = np.asarray(plain(stored), np.float64)
    for weight, matrix in ((stored, whole), (form, whole + SCALE * a.astype(np.float64) @ b)):
        found = take(weight, jnp.asarray(rows), jnp.float32)
        np.testing.assert_allclose(found, matrix[rows], rtol=1e-4, atol=1e-5)
        found = head_product(jnp.asarray(x), weight, jnp.float32, 9)
        np.testing.assert_allclose(found, x @ matrix[:9].T, rtol=1e-4, atol=1e-4)


def test_rows_behind_a_table_are_read_and_never_said():
    table, soft = normal(5, 4), normal(3, 4, seed=1)
    form = Extended(jnp.asarray(table), jnp.asarray(soft))
    ids = np.array([0, 4, 5, 7])
    found = take(form, jnp.asarray(ids), jnp.float32)
    np.testing.assert_array_equal(found, np.concatenate([table, soft])[ids])
    logits = head_product(jnp.asarray(normal(2, 4, seed=2)), form, jnp.float32)
    assert logits.shape == (2, 5)
    gradient = jax.grad(lambda form: take(form, jnp.asarray([6, 1]), jnp.float32).sum())(form)
    np.testing.assert_array_equal(gradient.rows, [[0] * 4, [1] * 4, [0] * 4])


def test_gradients_of_factors_are_those_of_the_sum():
    """With W = base + scale A B: dA = scale dW B^T, dB = scale A^T dW, for any base."""
    for base in (None, "int8", "nf4"):
        form, _ = make("lora", (24, 5), 1, base=base)
        x = jnp.asarray(normal(7, 24, seed=5))
        weights = jnp.asarray(normal(7, 5, seed=6))

        def loss(ab, x, form=form, weights=weights):
            changed = form.replace(a=ab[0], b=ab[1])
            return jnp.sum(weights * product(x, changed, jnp.float32))

        (da, db), dx = jax.jit(jax.grad(loss, argnums=(0, 1)))((form.a, form.b), x)
        dw = np.asarray(x, np.float64).T @ np.asarray(weights)
        np.testing.assert_allclose(da, SCALE * dw @ np.asarray(form.b).T, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(db, SCALE * np.asarray(form.a).T @ dw, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dx, weights @ plain(form).T, rtol=1e-4, atol=2e-4)


def test_the_norm_of_dora_is_a_constant_for_the_gradient():
    """Equation 11 of the paper without its second term: d V' = m / ||V|| dW."""
    form, matrix = make("dora", (24, 5), 1)
    x, weights = normal(7, 24, seed=5), normal(7, 5, seed=6)

    def loss(b, magnitude):
        changed = form.replace(b=b, magnitude=magnitude)
        return jnp.sum(weights * product(jnp.asarray(x), changed, jnp.float32))

    db, dm = jax.grad(loss, argnums=(0, 1))(form.b, form.magnitude)
    dw, m = x.astype(np.float64).T @ weights, np.asarray(form.magnitude, np.float64)
    total = flat(plain(form.base), 1) + SCALE * np.asarray(form.a, np.float64) @ form.b
    norms = np.linalg.norm(total, axis=0)
    expected = SCALE * np.asarray(form.a, np.float64).T @ (dw * (m / norms))
    np.testing.assert_allclose(db, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dm, (dw * total / norms).sum(axis=0), rtol=1e-4, atol=1e-4)


def test_columns_of_zeros_stay_zero():
    weight = jnp.asarray(normal(8, 3)).at[:, 1].set(0)
    form = DoRA.of(weight, jnp.ones((8, 2)), jnp.zeros((2, 3)), 1.0)
    np.testing.assert_allclose(plain(form), weight, atol=1e-6)
    for coded in (Int8.of(weight, (0,)), NF4.of(weight, 1), NF4.of(weight * 0, 1)):
        assert np.isfinite(np.asarray(plain(coded))).all()
        np.testing.assert_array_equal(plain(coded)[:, 1], 0)


# --- codes ----------------------------------------------------------------------------------------


def test_codes_take_the_bytes_that_they_claim():
    """1 byte a weight and 4 a channel; half a byte and 4 (or about 1, arXiv 2305.14314) a block."""
    weight = jnp.asarray(normal(512, 16, 8))
    count = lambda form: sum(leaf.nbytes for leaf in jax.tree.leaves(form))  # noqa: E731
    assert count(Int8.of(weight, (0,))) == 512 * 128 + 4 * 128
    blocks = 512 * 128 // BLOCK
    assert count(NF4.of(weight, 1, double=False)) == 512 * 128 // 2 + 4 * blocks
    assert count(NF4.of(weight, 1)) == 512 * 128 // 2 + blocks + 4 * blocks // 256 + 4
    # The published saving: from 0.5 to 0.127 bits a weight.
    bits = 8 * (count(NF4.of(weight, 1)) - 512 * 128 // 2) / weight.size
    assert bits == pytest.approx(8 / 64 + 32 / (64 * 256), abs=1e-3)


def test_the_code_book_is_the_published_one():
    """The rule of appendix E, by SciPy: quantiles of a normal distribution, of each half apart."""
    from scipy.stats import norm

    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    upper = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    lower = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([upper, [0], lower]))
    np.testing.assert_allclose(NF4_CODE, values / values.max(), atol=1e-6)
    np.testing.assert_allclose(NF4_CODE, numerics.get_nf4_buckets(), atol=1e-6)


def test_nf4_equals_qwix():
    weight = jnp.asarray(normal(128, 6))
    other = qwix.dequantize(
        qwix.quantize(weight, "nf4", channelwise_axes=[1], tiled_axes={0: BLOCK})
    )
    np.testing.assert_allclose(plain(NF4.of(weight, 1, double=False)), other, atol=1e-6)


def test_errors_of_codes():
    """Each value goes to the nearest code: half a step at most; constants within 8 bits."""
    weight = jnp.asarray(normal(256, 8))
    scale = np.abs(weight).max(axis=0) / 127
    error = np.abs(plain(Int8.of(weight, (0,))) - weight)
    assert (error <= 0.5001 * scale).all()
    form = NF4.of(weight, 1, double=False)
    constants = np.repeat(np.asarray(form.constants), BLOCK, axis=0)
    steps = np.abs(np.asarray(weight)[..., None] / constants[..., None] - np.asarray(NF4_CODE))
    error = np.abs(plain(form) - weight)
    np.testing.assert_allclose(error, steps.min(axis=-1) * constants, atol=1e-5)
    constants = jnp.abs(jnp.asarray(normal(700)))
    again = Doubled.of(constants).constants((700,))
    spread = np.abs(constants - constants.mean())
    assert (np.abs(again - constants) <= spread / 16 + spread.max() / 448).all()


def test_inputs_that_no_block_divides():
    """The last block is padded: what is padded comes back to nothing."""
    weight = jnp.asarray(normal(70, 3))
    form = NF4.of(weight, 1, double=False)
    assert form.codes.shape == (64, 3)
    assert plain(form).shape == (70, 3)
    np.testing.assert_allclose(plain(form)[:64], plain(NF4.of(weight[:64], 1, double=False)))


def test_a_backward_pass_keeps_no_numbers_of_codes():
    """Of a quantised layer only the input is kept, never the weight in float."""
    form = NF4.of(jnp.asarray(normal(64, 256)), 1)
    kept = jax.eval_shape(
        lambda x: jax.vjp(lambda x: product(x, form, jnp.float32), x)[1], jnp.ones((2, 64))
    )
    floats = [leaf for leaf in jax.tree.leaves(kept) if leaf.dtype == jnp.float32]
    assert max(leaf.size for leaf in floats) < 64 * 256
