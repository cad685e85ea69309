"""One training step: exact means, guarded updates, averages, one executable per arm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import MOE

from efficient_vlm.processing.batch import training_inputs
from efficient_vlm.train import step as steps
from efficient_vlm.train.losses import ratio, token_cross_entropy

SGD = optax.sgd(1.0)
# One layer each: what is tested here does not depend on depth, and compiles in seconds.
SMALL = dict(encoder=dict(depth=1), decoder=dict(segments=[dict(layers=1)]))


def fresh(params, tx=SGD, **options):
    """A state of its own arrays: a step donates what it is given."""
    return steps.init_state(jax.tree.map(jnp.copy, params), tx, **options)


def bits(tree):
    return [(np.asarray(x).dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def largest_difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max()) for x, y in pairs)


@pytest.fixture(scope="module")
def batch(make_batch):
    """4 rows: many targets in the first half, few in the second."""
    batch = make_batch(4, 2, 6)
    mask = batch["loss_mask"].copy()
    mask[2:] = False
    for row, slot in ((2, 1), (3, 0)):
        mask[row, slot, batch["lengths"][row, slot] - 1] = True
    batch["loss_mask"] = mask
    counts = mask.reshape(2, -1).sum(axis=1)
    assert counts[0] > 2 * counts[1] > 0, counts  # Equal halves would prove nothing.
    return batch


@pytest.fixture(scope="module")
def guarded(make_model, init):
    """(step with an average, new_state()), for a model with a random compressor."""
    model, tx = make_model("random", 4, **SMALL), optax.adamw(1e-2)
    params = init(model)
    step = steps.make_train_step(model, tx, ema=0.75)
    return step, lambda: fresh(params, tx, ema=True)


def test_losses_are_a_sum_and_a_denominator():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 7)).astype(np.float32)  # None for the last token.
    tokens = rng.integers(0, 7, (3, 5))
    mask = rng.random((3, 5)) < 0.5
    mask[:, 0] = False
    labels = np.where(mask, tokens, -1)[:, 1:]
    found = token_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    loss = hits = count = 0.0
    for row, place in zip(*np.nonzero(mask), strict=True):
        before = logits[row, place - 1].astype(np.float64)
        loss += np.log(np.exp(before).sum()) - before[tokens[row, place]]
        hits += before.argmax() == tokens[row, place]
        count += 1
    np.testing.assert_allclose(found["loss"], (loss, count), rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], (hits, count))
    assert float(ratio(found["accuracy"])) == pytest.approx(hits / count)
    nothing = token_cross_entropy(jnp.asarray(logits), jnp.full((3, 4), -1))
    assert float(ratio(nothing["loss"])) == 0.0


def test_accumulated_gradient_is_that_of_the_whole_batch(make_model, init, inputs, batch):
    """One step of plain SGD with rate 1: the change of the parameters is the gradient."""
    model = make_model("none", 16, **SMALL)
    params = init(model)

    def mean_loss(p, mask):
        out = model.apply({"params": p}, inputs(batch))
        # Of the whole sequence; the step leaves out the last token, which predicts nothing.
        logits = out.logits.reshape(*batch["tokens"].shape, -1)[..., :-1, :]
        labels = jnp.where(mask, batch["tokens"], -1)[..., 1:]
        return ratio(token_cross_entropy(logits, labels)["loss"])

    gradient = jax.jit(jax.value_and_grad(mean_loss))
    loss, expected = gradient(params, batch["loss_mask"])
    first = np.arange(4)[:, None, None] < 2
    halves = [gradient(params, batch["loss_mask"] & half)[1] for half in (first, ~first)]
    biased = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    # The mean of the means is another number here, so the comparison below means something.
    assert largest_difference(biased, expected) > 1e-2

    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(expected)))
    for accumulate in (1, 2):
        step = steps.make_train_step(model, SGD, accumulate=accumulate)
        new, metrics = step(fresh(params), training_inputs(batch))
        found = jax.tree.map(jnp.subtract, params, new["params"])
        assert largest_difference(found, expected) < 2e-6, accumulate
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)


def test_router_losses_are_means_whatever_the_number_of_targets(make_model, make_batch, init):
    """The weight of a router loss does not depend on how many targets a batch has."""
    model, batch = make_model("none", 16, moe=MOE, **SMALL), make_batch()
    params = init(model)
    found = {}
    for weight in (0.0, 0.5):
        step = steps.make_train_step(model, SGD, aux={"load_balance": weight})
        new, metrics = step(fresh(params), training_inputs(batch))
        found[weight] = jax.tree.map(jnp.subtract, params, new["params"])
    # The last token is only ever a target: it is not routed.
    inputs = training_inputs(batch)

    def balance(p):
        return ratio(model.apply({"params": p}, inputs).stats["load_balance"]).mean()

    expected = jax.jit(jax.grad(balance))(params)
    change = jax.tree.map(lambda a, b: (a - b) / 0.5, found[0.5], found[0.0])
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected)) > 1e-3
    assert largest_difference(change, expected) < 1e-5
    assert float(metrics["load_balance"]) == pytest.approx(float(balance(params)), rel=1e-5)
    load = np.asarray(metrics["expert_load"])
    assert load.shape == (1, MOE["num_experts"])
    np.testing.assert_allclose(load.sum(axis=1), 1.0, atol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing(guarded, batch):
    step, new_state = guarded
    good, metrics = step(new_state(), training_inputs(batch))
    assert bool(metrics["ok"]) and int(good["skipped"]) == 0
    params = jax.tree.map(jnp.copy, good["params"])
    state = good
    for count, value in enumerate((np.nan, np.inf, -np.inf), start=1):
        leaves, structure = jax.tree.flatten(jax.tree.map(jnp.copy, params))
        leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].set(value)
        state["params"] = jax.tree.unflatten(structure, leaves)
        before = {name: bits(state[name]) for name in ("params", "opt", "ema")}
        state, metrics = step(state, training_inputs(batch))
        assert not bool(metrics["ok"])
        for name, expected in before.items():
            assert bits(state[name]) == expected, (name, value)
        assert (int(state["step"]), int(state["skipped"])) == (1 + count, count)
    # The same executable applies a good step afterwards, from the state that it has kept.
    state["params"] = jax.tree.map(jnp.copy, params)
    after, metrics = step(state, training_inputs(batch))
    assert bool(metrics["ok"]) and int(after["skipped"]) == 3
    assert largest_difference(after["params"], params) > 1e-4


def test_a_gradient_that_overflows_is_skipped_although_the_loss_is_finite(guarded, batch):
    step, new_state = guarded
    state = new_state()
    # Logits, and so the gradient of the head, of 1e25: their squares are no float32.
    scale = state["params"]["language"]["norm"]["scale"]
    state["params"]["language"]["norm"]["scale"] = scale * 1e25
    before = bits(state["params"])
    state, metrics = step(state, training_inputs(batch))
    assert np.isfinite(float(metrics["loss"])) and not np.isfinite(float(metrics["grad_norm"]))
    assert not bool(metrics["ok"]) and int(state["skipped"]) == 1
    assert bits(state["params"]) == before


def test_average_follows_its_formula(guarded, batch):
    step, new_state = guarded
    state = new_state()
    average = [np.asarray(x, np.float64) for x in jax.tree.leaves(state["params"])]
    for _ in range(3):
        state, _ = step(state, training_inputs(batch))
        now = [np.asarray(x, np.float64) for x in jax.tree.leaves(state["params"])]
        average = [0.75 * a + 0.25 * x for a, x in zip(average, now, strict=True)]
    for found, expected in zip(jax.tree.leaves(state["ema"]), average, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert largest_difference(state["ema"], state["params"]) > 1e-3


def test_random_choices_differ_between_steps_and_repeat_on_a_second_run(guarded, batch):
    step, new_state = guarded

    def losses(start):
        found = []
        for number in range(start, start + 4):
            # The same parameters every time, so only the draw can differ.
            state = new_state()
            state["step"] = jnp.asarray(number, jnp.int32)
            found.append(float(step(state, training_inputs(batch))[1]["loss"]))
        return found

    first = losses(0)
    assert len(set(first)) == 4
    assert losses(0) == first
    assert losses(2)[:2] == first[2:]  # A resumed run draws what the run would have drawn.
    assert step._cache_size() == 1  # Through every test that used it.


def test_arms_share_parameters_and_compile_once_each(make_model, make_batch):
    """Budgets of one compressor add no parameters; a compressor of its own adds its own."""
    arms = [
        make_model(name, budget, **SMALL)
        for name, budget in (("none", 16), ("average_pool", 4), ("resampler", 4))
    ]
    batches = [make_batch(seed=s) for s in range(3)]
    alone = steps.nn.unbox(steps.init_params(arms[:1], 0))
    params = steps.nn.unbox(steps.init_params(arms, 0))
    extra = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    } - {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(alone)
    }
    assert extra and all(path.startswith("reduce/") for path in extra)
    pair = steps.init_params([arms[0], arms[1]], 0)
    assert jax.tree.structure(steps.nn.unbox(pair)) == jax.tree.structure(alone)

    tx = optax.sgd(0.1)
    functions = [steps.make_train_step(arm, tx) for arm in arms]
    state = fresh(params, tx)
    for number in (0, 1, 2, 1, 0, 2, 0):
        before = bits(state["params"])
        state, metrics = functions[number](state, training_inputs(batches[number]))
        assert bits(state["params"]) != before and bool(metrics["ok"])
    assert [f._cache_size() for f in functions] == [1, 1, 1]
    assert int(state["step"]) == 7
