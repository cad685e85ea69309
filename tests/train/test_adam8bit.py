"""Adam with moments of one byte: the code book, the steps, the bytes, the sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from efficient_vlm.errors import UserError
from efficient_vlm.sharding import MeshConfig, make_mesh, param_shardings
from efficient_vlm.train.adam8bit import Codes, code_book, scale_by_adam8bit
from efficient_vlm.train.optimizer import OptimizerConfig, make_optimizer
from efficient_vlm.train.state_layout import state_shardings


def test_the_code_book():
    """256 values each; the relative error grows tenfold finer towards the largest (figure 2)."""
    signed, unsigned = code_book(True), code_book(False)
    for book, fractions in ((signed, 64), (unsigned, 128)):
        assert len(set(book.tolist())) == 256 and (np.diff(book) > 0).all()
        assert book.max() == 1 and 0 in book
        top = book[(book > 0.1) & (book < 1)]
        np.testing.assert_allclose(np.diff(top), 0.9 / fractions, rtol=1e-4)
        assert len(book[(book > 0.01) & (book < 0.1)]) == fractions // 2
        assert book[book > 0].min() < 1e-6
    np.testing.assert_allclose(signed[:127], -signed[128:255][::-1], rtol=1e-6)
    assert unsigned.min() == 0


@pytest.mark.parametrize("shape", [(3, 700), (5, 64), (2, 3, 256)])
def test_values_come_back_from_codes(shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[0] *= 1e-3  # Blocks have scales of their own.
    form = Codes.of(jnp.asarray(values), True)
    assert form.codes.shape == shape and form.codes.dtype == jnp.uint8
    again = np.asarray(form.values())
    book = np.asarray(code_book(True), np.float64)
    for start in range(0, shape[-1], 256):
        block = values[..., start : start + 256].astype(np.float64)
        largest = np.abs(block).max(axis=-1, keepdims=True)
        nearest = np.abs(block[..., None] / largest[..., None] - book).min(axis=-1) * largest
        error = np.abs(again[..., start : start + 256] - block)
        np.testing.assert_allclose(error, nearest, atol=1e-6 * largest.max())


def test_a_small_second_moment_is_not_rounded_to_nothing():
    values = jnp.asarray([[1.0, 1e-12, 0.0]])
    assert (np.asarray(Codes.of(values, False).values()) > 0).tolist() == [[True, True, False]]


def test_steps_are_nearly_those_of_adam():
    """A badly scaled quadratic, 300 steps: the distance left is within a tenth of Adam's."""
    rng = np.random.default_rng(1)
    scales = jnp.asarray(10.0 ** rng.uniform(-2, 1, (64, 128)).astype(np.float32))
    target = jnp.asarray(rng.normal(size=(64, 128)).astype(np.float32))

    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(scales * (x - target) ** 2))(x)

    left = {}
    for name, moments in (("adam", optax.scale_by_adam()), ("8 bits", scale_by_adam8bit())):
        tx = optax.chain(moments, optax.scale(-0.02))
        x = jnp.zeros((64, 128))
        state, update = tx.init(x), jax.jit(tx.update)
        for step in range(300):
            updates, state = update(gradient(x), state, x)
            if step == 0:  # Nothing is rounded yet.
                np.testing.assert_allclose(updates, -0.02 * jnp.sign(gradient(x)), atol=1e-4)
            x = optax.apply_updates(x, updates)
        left[name] = float(jnp.sqrt(jnp.mean((x - target) ** 2)))
    assert left["adam"] < 0.02
    assert left["8 bits"] < 1.1 * left["adam"] + 0.003


def box(shape, *names):
    return nn.Partitioned(jnp.ones(shape), names)


TREE = {"kernel": box((512, 256), "embed", "mlp"), "scale": box((256,), "embed")}


def bytes_of(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_bytes_of_the_state():
    params = nn.unbox(TREE)
    settings = dict(schedule="constant", warmup_steps=0)
    states = {
        kind: make_optimizer(OptimizerConfig(moments=kind, **settings), 10, TREE).init(params)
        for kind in ("float32", "int8")
    }
    matrix, rest = 512 * 256, 2 * 4 * 256
    counts = bytes_of(states["float32"]) - 8 * matrix - rest
    assert 0 <= counts <= 16
    # A byte for each moment, 4 bytes for a block of 256; small parameters as before.
    assert bytes_of(states["int8"]) - counts == 2 * matrix + 2 * 4 * 512 + rest


def test_codes_are_sharded_as_their_parameters():
    tx = make_optimizer(OptimizerConfig(moments="int8"), 10, TREE)
    params = nn.unbox(TREE)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    spec = {
        "kernel": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")),
        "scale": NamedSharding(mesh, PartitionSpec("fsdp")),
    }
    assert jax.tree.structure(param_shardings(TREE, mesh)) == jax.tree.structure(spec)
    state = {"params": params, "opt": tx.init(params)}
    placed = state_shardings(state, spec, tx, mesh)["opt"]
    assert jax.tree.structure(placed) == jax.tree.structure(state["opt"])
    leaves = jax.tree.leaves(placed, is_leaf=lambda x: isinstance(x, Codes))
    codes = [leaf for leaf in leaves if isinstance(leaf, Codes)]
    assert [leaf.codes.spec for leaf in codes] == [PartitionSpec("fsdp", "tensor")] * 2
    assert [leaf.largest.spec for leaf in codes] == [PartitionSpec("fsdp")] * 2
    jax.device_put(state["opt"], placed)


def test_only_adamw_has_moments_of_8_bits():
    with pytest.raises(UserError, match=r"train.optimizer.moments: int8 with name='muon'"):
        OptimizerConfig(name="muon", moments="int8")
    with pytest.raises(UserError, match="did you mean 'int8'"):
        OptimizerConfig(moments="int4")
