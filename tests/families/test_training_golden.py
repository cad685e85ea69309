"""Losses and gradients of training steps against those of the reference, in golden/training.json.

`tests/parity/training_reference.py` wrote them; `tests/parity/test_training.py` compares the
gradient of every parameter, and the trained weights, live. Of the original Molmo there are logits
alone, which give the loss; its gradients are compared with differences of losses in float64.
"""

import functools
import json

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from training_steps import CASES, GOLDEN, open_golden, train

from efficient_vlm.kernels import grouped_matmul
from efficient_vlm.nn import moe
from efficient_vlm.nn.linear import Linear
from efficient_vlm.train.step import loss_fn

RECORD = json.loads((GOLDEN / "training.json").read_text())
LOGITS_ALONE = [name for name, case in RECORD["cases"].items() if case["grad_norm"] is None]


def test_every_family_is_there():
    assert sorted(RECORD["cases"]) == CASES


@pytest.mark.parametrize("name", [name for name in CASES if name not in LOGITS_ALONE])
def test_losses_and_gradient_are_the_reference_s(name):
    golden, wanted = open_golden(name, RECORD["answer"]), RECORD["cases"][name]
    given = golden.read(GOLDEN / name), golden.inputs, len(wanted["losses"])
    trained = train(golden.model, *given, RECORD["adamw"])
    np.testing.assert_allclose(trained.losses, wanted["losses"], rtol=1e-5)
    assert trained.norms[0] == pytest.approx(wanted["grad_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGITS_ALONE)
def test_original_molmo(name, monkeypatch):
    """The gradient of every parameter along a random direction."""
    golden = open_golden(name, RECORD["answer"])
    params, key = golden.read(GOLDEN / name), jax.random.key(0)

    def mean(model, inputs):
        def loss(params):
            total, metrics = loss_fn(model, params, inputs, key, {})
            return total / metrics["loss"][1]

        return loss

    loss, gradient = jax.jit(jax.value_and_grad(mean(golden.model, golden.inputs)))(params)
    assert float(loss) == pytest.approx(RECORD["cases"][name]["losses"][0], rel=1e-5)
    gradient = jax.tree_util.tree_leaves_with_path(jax.tree.map(np.float64, gradient))
    top = max(np.abs(leaf).max() for _, leaf in gradient)

    rng = np.random.default_rng(0)
    with jax.enable_x64(True), monkeypatch.context() as patch:
        # What is float32 in a model of any dtype.
        patch.setattr(jnp, "float32", jnp.float64)
        patch.setattr(moe, "Linear", functools.partial(Linear, dtype=jnp.float64))
        wide = functools.partial(jnp.matmul, preferred_element_type=jnp.float64)
        patch.setattr(grouped_matmul, "_dot", wide)
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # Signatures say float32.
        model = golden.model.clone(dtype=jnp.float64)
        precise = jax.jit(mean(model, widened(golden.inputs)))
        leaves, tree = jax.tree.flatten(widened(params))
        assert float(precise(jax.tree.unflatten(tree, leaves))) == pytest.approx(
            float(loss), rel=1e-6
        )
        for i, (path, found) in enumerate(gradient):
            direction = rng.normal(size=found.shape)
            direction /= np.linalg.norm(direction)

            def at(step, i=i, direction=direction):
                moved = [*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]]
                return float(precise(jax.tree.unflatten(tree, moved)))

            error, where = abs(slope(at) - (found * direction).sum()), jax.tree_util.keystr(path)
            largest = np.abs(found).max()
            if largest < 1e-6 * top:  # Rounding of 0: a bias of keys adds the same to all logits.
                assert where.endswith("['key']['bias']") and error < 1e-6 * top
            else:
                assert error < 1e-4 * largest, where


def slope(at, step=1e-2):
    """The derivative at 0 from four values, up to the fourth power of `step` (Richardson)."""
    wide, narrow = ((at(h) - at(-h)) / (2 * h) for h in (step, step / 2))
    return (4 * narrow - wide) / 3


def widened(tree):
    """float32 arrays as float64."""
    return jax.tree.map(lambda x: np.float64(x) if x.dtype == np.float32 else np.asarray(x), tree)
