"""Optimizers against closed forms: schedules, groups, freezing, decay, orthogonal updates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_models import MOE

from efficient_vlm.errors import UserError
from efficient_vlm.fields import construct
from efficient_vlm.train.optimizer import OptimizerConfig, make_optimizer, schedule
from efficient_vlm.train.step import init_params


def config(**fields):
    defaults = dict(schedule="constant", warmup_steps=0, clip_norm=None, weight_decay=0.0)
    return construct(OptimizerConfig, {**defaults, **fields}, "train.optimizer")


def box(shape, *names, seed=0):
    value = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return nn.Partitioned(jnp.asarray(value), names)


@pytest.fixture
def tree():
    """One parameter of each kind that the model has."""
    return {
        "encoder": {"kernel": box((24, 16), "embed", "mlp"), "scale": box((16,), "embed")},
        "decoder": {
            "stack": box((3, 16, 8), "layers", "embed", "mlp"),
            "experts": box((2, 4, 8, 6), "layers", "experts", "embed", "mlp"),
            "norm": box((3, 16), "layers", "embed"),
            "query": box((12, 2, 3), "embed", "heads", "head_dim"),
            "out": box((2, 3, 12), "heads", "head_dim", "embed"),
        },
        "tables": {
            "vocab": box((20, 12), "vocab", "embed"),
            "rows": box((5, 12), "rows", "embed"),
            "columns": box((6, 12), "columns", "embed"),
            "queries": box((7, 12), "queries", "embed"),
        },
    }


def gradients(tree, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32)), nn.unbox(tree)
    )


def first_update(tree, grads=None, **fields):
    tx = make_optimizer(config(**fields), 100, tree)
    params = nn.unbox(tree)
    grads = gradients(tree) if grads is None else grads
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)


# ---- schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(10, 50), (0, 20), (100, 30)])
def test_schedules_against_closed_forms(name, warmup, steps):
    peak = 0.3
    rate = schedule(config(schedule=name, warmup_steps=warmup), steps, peak)
    decay = max(1, round(0.4 * steps))
    warm = min(warmup, steps - 1)  # A warm-up longer than the run still ends inside it.
    for step in range(steps + 5):
        if step < warm:
            expected = peak * step / warm
        else:
            done = min((step - warm) / (steps - warm), 1.0)
            expected = {
                "cosine": peak * 0.5 * (1 + math.cos(math.pi * done)),
                "linear": peak * (1 - done),
                "wsd": peak * min(1.0, (1 - done) * (steps - warm) / min(steps - warm, decay)),
                "constant": peak,
            }[name]
        assert float(rate(step)) == pytest.approx(expected, abs=1e-6), (step, expected)


def test_decay_may_take_longer_than_the_run():
    """It is then the beginning of a longer run's schedule."""
    short = schedule(config(schedule="cosine", warmup_steps=5, decay_steps=40), 20, 0.3)
    long = schedule(config(schedule="cosine", warmup_steps=5), 40, 0.3)
    assert [float(short(i)) for i in range(20)] == [float(long(i)) for i in range(20)]


def test_a_warm_up_may_be_a_share_of_the_run():
    given = schedule(config(schedule="cosine", warmup_steps=7, warmup_fraction=0.03), 200, 0.3)
    same = schedule(config(schedule="cosine", warmup_steps=6), 200, 0.3)
    assert [float(given(i)) for i in range(200)] == [float(same(i)) for i in range(200)]


def test_a_run_of_one_step_learns():
    """With nothing but a warm-up the only step would have a rate of 0."""
    assert float(schedule(config(schedule="cosine", warmup_steps=100), 1, 0.5)(0)) == 0.5


# ---- groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_get_no_update_and_no_state(tree, name):
    groups = [{"pattern": "^encoder/", "freeze": True}]
    tx = make_optimizer(config(name=name, groups=groups, weight_decay=0.1), 100, tree)
    params = nn.unbox(tree)
    state = tx.init(params)
    updates, _ = tx.update(gradients(tree), state, params)
    for update in jax.tree.leaves(updates["encoder"]):
        assert not np.asarray(update).any()
    for update in jax.tree.leaves([updates["decoder"], updates["tables"]]):
        assert np.asarray(update).any()
    held = [path for path in _paths(state) if "kernel" in path or "scale" in path]
    assert held == []
    # The check can fail: without freezing the same search finds their moments.
    everything = make_optimizer(config(name=name), 100, tree).init(params)
    assert [path for path in _paths(everything) if "kernel" in path]


def _paths(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [jax.tree_util.keystr(path) for path, leaf in leaves if getattr(leaf, "ndim", 0)]


def test_frozen_gradients_do_not_count_for_clipping(tree):
    """What is not trained must not make the steps of the rest smaller."""
    grads = gradients(tree)
    grads["encoder"] = jax.tree.map(lambda g: 1e4 * g, grads["encoder"])
    fields = dict(
        name="adamw", clip_norm=1.0, groups=[{"pattern": "encoder", "freeze": True}], b1=0.0
    )
    tx = make_optimizer(config(**fields), 100, tree)
    state = tx.init(nn.unbox(tree))
    _, state = tx.update(grads, state, nn.unbox(tree))
    trained = jax.tree.leaves([grads["decoder"], grads["tables"]])
    norm = math.sqrt(sum(float((g**2).sum()) for g in trained))
    expected = np.asarray(grads["decoder"]["query"]) / norm
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if "query" in jax.tree_util.keystr(path) and "mu" in jax.tree_util.keystr(path)
    ]
    assert len(moments) == 1
    np.testing.assert_allclose(moments[0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_groups_scale_the_rate_and_the_first_match_wins(tree, name):
    plain = first_update(tree, name=name, learning_rate=0.1, adam_learning_rate=0.02)
    groups = [
        {"pattern": "decoder/stack$", "scale": 0.5},
        {"pattern": "decoder|tables/vocab", "scale": 0.1},
    ]
    scaled = first_update(
        tree, name=name, learning_rate=0.1, adam_learning_rate=0.02, groups=groups
    )
    factors = {"stack": 0.5, "experts": 0.1, "norm": 0.1, "query": 0.1, "out": 0.1, "vocab": 0.1}
    for section in plain:
        for leaf, before in plain[section].items():
            expected = np.asarray(before) * factors.get(leaf, 1.0)
            np.testing.assert_allclose(scaled[section][leaf], expected, rtol=1e-4, atol=1e-7)


def test_a_pattern_that_matches_nothing_is_an_error(tree):
    with pytest.raises(UserError, match="resamplr") as caught:
        make_optimizer(config(groups=[{"pattern": "resamplr", "freeze": True}]), 10, tree)
    assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(UserError, match="groups"):
        make_optimizer(config(groups=[{"pattern": "encoder", "frozen": True}]), 10, tree)


@pytest.mark.parametrize("pattern", ["(", "*x"])
def test_a_pattern_that_is_no_regular_expression_is_an_error(tree, pattern):
    with pytest.raises(UserError, match="pattern"):
        make_optimizer(config(groups=[{"pattern": pattern}]), 10, tree)


@pytest.mark.parametrize("fields", [dict(name="mu0n"), dict(schedule="cosin")])
def test_unknown_names_are_suggested(tree, fields):
    (value,) = fields.values()
    with pytest.raises(UserError, match="did you mean") as caught:
        make_optimizer(config(**fields), 10, tree)
    assert value in str(caught.value)


# ---- decay -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(tree, name):
    """With a gradient of 0 the update is the decay alone: -rate * decay * value."""
    zero = jax.tree.map(jnp.zeros_like, nn.unbox(tree))
    updates = first_update(tree, zero, name=name, learning_rate=0.1, weight_decay=0.2)
    matrices = {"kernel", "stack", "experts", "query", "out"}
    for section, leaves in updates.items():
        for leaf, update in leaves.items():
            value = np.asarray(nn.unbox(tree)[section][leaf])
            expected = -0.1 * 0.2 * value if leaf in matrices else np.zeros_like(value)
            np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-8, err_msg=leaf)


# ---- Muon --------------------------------------------------------------------------------------


def matrices_of(leaf, update):
    """Every independent (input, output) matrix of a parameter."""
    update = np.asarray(update)
    if leaf in ("stack", "experts"):
        return update.reshape(-1, *update.shape[-2:])
    if leaf == "query":
        return update.reshape(1, update.shape[0], -1)
    if leaf == "out":
        return update.reshape(1, -1, update.shape[-1])
    return update[None]


def test_muon_updates_are_nearly_orthonormal_matrix_by_matrix(tree):
    """The first update is -rate * sqrt(max(1, out / in)) * (nearly) U V^T of the gradient."""
    grads = gradients(tree)
    updates = first_update(tree, grads, name="muon", learning_rate=0.1)
    for section, leaf in (
        ("encoder", "kernel"),
        ("decoder", "stack"),
        ("decoder", "experts"),
        ("decoder", "query"),
        ("decoder", "out"),
    ):
        found = matrices_of(leaf, updates[section][leaf])
        for update, gradient in zip(found, matrices_of(leaf, grads[section][leaf]), strict=True):
            rows, columns = update.shape
            scaled = -update / 0.1 / math.sqrt(max(1.0, columns / rows))
            values = np.linalg.svd(scaled, compute_uv=False)
            # Five Newton-Schulz steps leave singular values between about 0.7 and 1.2.
            assert values.min() > 0.5 and values.max() < 1.3, (leaf, values)
            u, _, vt = np.linalg.svd(gradient.astype(np.float64), full_matrices=False)
            polar = u @ vt
            cosine = (scaled * polar).sum() / np.linalg.norm(scaled) / np.linalg.norm(polar)
            assert cosine > 0.97, (leaf, cosine)


def test_a_stack_is_not_one_big_matrix(tree):
    """One matrix of a stack does not see the others' gradients, however large."""
    grads = gradients(tree)
    before = first_update(tree, grads, name="muon")["decoder"]
    grads["decoder"]["stack"] = grads["decoder"]["stack"].at[1].multiply(100.0)
    grads["decoder"]["experts"] = grads["decoder"]["experts"].at[1, 2].multiply(100.0)
    after = first_update(tree, grads, name="muon")["decoder"]
    for leaf in ("stack", "experts"):
        np.testing.assert_allclose(after[leaf], before[leaf], rtol=1e-3, atol=1e-6)


def first_adam_update(rate, gradient, b1=0.9):
    """Nesterov's Adam after one step: every entry has the same size, whatever the gradient's."""
    return -rate * (1 + b1 / (1 + b1)) * np.sign(np.asarray(gradient))


def test_tables_and_vectors_are_updated_by_adam(tree):
    grads = gradients(tree)
    updates = first_update(tree, grads, name="muon", learning_rate=0.1, adam_learning_rate=0.02)
    leaves = [("tables", name) for name in ("vocab", "rows", "columns", "queries")]
    for section, leaf in [*leaves, ("encoder", "scale"), ("decoder", "norm")]:
        expected = first_adam_update(0.02, grads[section][leaf])
        np.testing.assert_allclose(updates[section][leaf], expected, rtol=1e-3, err_msg=leaf)


def test_clipping_bounds_the_gradient(tree):
    """Adam with b1 = b2 = 0 would hide it; the first moment shows what it was given."""
    tx = make_optimizer(config(clip_norm=0.5, b1=0.0), 100, tree)
    params = nn.unbox(tree)
    _, state = tx.update(gradients(tree), tx.init(params), params)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    mu = [leaf for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)]
    assert math.sqrt(sum(float((m**2).sum()) for m in mu)) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("position", ["factorised", "learned"])
def test_the_parameters_of_the_model_go_where_they_belong(make_model, position):
    """Muon has every matrix of the real model, Adam the tables, head and norms and nothing else."""
    model = make_model("none", 16, moe=MOE, encoder=dict(position=position))
    boxed = jax.eval_shape(lambda: init_params([model], 0))
    shapes = nn.unbox(boxed)
    tx = make_optimizer(config(name="muon"), 10, boxed)
    state = jax.eval_shape(tx.init, shapes)
    # Adam has a second moment of each of its parameters, Muon has none.
    second = {path for path in _names(state) if "nu/" in path}
    everything = _names(shapes)
    by_adam = {p for p in everything if any(s.endswith(f"nu/{p}") for s in second)}
    assert len(by_adam) == len(second)
    words = ("scale", "embedding", "position", "head")
    assert {p for p in everything if any(word in p for word in words)} == by_adam
    assert len(everything - by_adam) >= 10


def _names(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}


def test_a_matrix_from_heads_has_one_input_axis():
    """The output product of the resampler is [heads, embed]: a matrix like any other."""
    shape = {"out": nn.Partitioned(jnp.zeros((6, 4)), ("heads", "embed"))}
    tx = make_optimizer(config(name="muon", learning_rate=1.0), 10, shape)
    params = nn.unbox(shape)
    grads = {"out": jax.random.normal(jax.random.key(0), (6, 4))}
    update = tx.update(grads, tx.init(params), params)[0]["out"]
    values = np.linalg.svd(np.asarray(update), compute_uv=False)
    assert values.min() > 0.5 * values.max() > 0
