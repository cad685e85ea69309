"""Rewards of sampled answers: what is scored, the batch that is made of them, the step."""

import jax
import numpy as np
import optax
import pytest

import efficient_vlm as evlm
from efficient_vlm.errors import UserError
from efficient_vlm.inference.generate import generate
from efficient_vlm.inference.sampling import Sampling
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.processing.batch import question_inputs
from efficient_vlm.train.preference import token_log_probs
from efficient_vlm.train.rewards import exact_match, make_grpo_step, repeated, rollouts
from efficient_vlm.train.step import init_state

SMALL = dict(encoder=dict(depth=1), decoder=dict(segments=[dict(layers=1)]))
EOS, GROUP, NEW = 1, 4, 3


def hot(rows, seed):
    return Sampling(
        temperature=np.ones(rows, np.float32),
        seed=np.random.default_rng(seed).integers(2**32, size=rows, dtype=np.uint32),
    )


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("none", 16, **SMALL)


@pytest.fixture(scope="module")
def params(model, init):
    return init(model)


@pytest.fixture(scope="module")
def asked(make_batch):
    """Two images with two questions each, every question four times; one slot is empty."""
    batch = make_batch(2, 2, 6)
    batch["lengths"][1, 1] = 0
    return repeated(question_inputs(batch), GROUP)


def drawn(model, params, asked, seed=0, **options):
    how = hot(len(asked.text), seed)
    out = generate(model, params, asked, new_tokens=NEW, eos_id=EOS, sampling=how, **options)
    return out, out.tokens.reshape(-1, NEW), out.lengths.reshape(-1)


def test_exact_match():
    tokens = np.array([[5, 1, 1], [5, 6, 1], [6, 1, 1], [5, 6, 7], [1, 1, 1], [5, 6, 7]])
    lengths = np.array([1, 2, 1, 3, 0, 3])
    one, two = np.array([[5]] * 6), np.array([[5, 6]] * 6)
    found = exact_match(tokens, lengths, one, np.ones(6, int))
    np.testing.assert_array_equal(found, [1, 0, 0, 0, 0, 0])
    found = exact_match(tokens, lengths, two, np.full(6, 2))
    np.testing.assert_array_equal(found, [0, 1, 0, 0, 0, 0])
    whole = exact_match(tokens, lengths, tokens, np.full(6, 3))
    np.testing.assert_array_equal(whole, np.zeros(6))  # Three tokens have not ended.


def test_a_batch_by_hand():
    """Prompts of 2, 1 and 0 tokens; answers that end, and one that does not."""
    text = np.array([[7, 8], [7, 8], [9, 0], [9, 0], [0, 0], [0, 0]])
    asked = ModelInputs.of_rows(text, [2, 2, 1, 1, 0, 0])
    tokens = np.array([[4, 1], [1, 1], [5, 6], [5, 1], [1, 1], [1, 1]])
    rewards = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]])
    log_probs = -np.arange(12.0).reshape(6, 2)
    found = rollouts(asked, tokens, np.array([1, 0, 2, 1, 0, 0]), rewards, log_probs)
    inputs = found.inputs
    np.testing.assert_array_equal(
        inputs.text, [[7, 8, 4], [7, 8, 0], [9, 5, 0], [9, 5, 0], [0, 0, 0], [0, 0, 0]]
    )
    np.testing.assert_array_equal(
        inputs.labels, [[-1, 4, 1], [-1, 1, -1], [5, 6, -1], [5, 1, -1], [-1] * 3, [-1] * 3]
    )
    np.testing.assert_array_equal(inputs.lengths, [3, 2, 2, 2, 0, 0])
    np.testing.assert_array_equal(inputs.prompt.sum(1), [2, 2, 1, 1, 0, 0])
    np.testing.assert_allclose(found.advantages, [1, -1, 0, 0, 0, 0])
    np.testing.assert_allclose(
        found.sampled[:4], [[0, 0, -1], [0, -2, 0], [-4, -5, 0], [-6, -7, 0]]
    )
    with pytest.raises(UserError, match="6 prompts"):
        rollouts(asked, tokens, np.zeros(6), rewards[:2])


@pytest.mark.parametrize("method", ["none", "text_topk"])
def test_the_batch_has_the_log_probabilities_of_the_draws(make_model, init, asked, method):
    """One pass over whole answers, against what drawing with a cache has told; of words in an
    answer none chooses visual tokens."""
    model = make_model(method, 16 if method == "none" else 3, **SMALL)
    params = init(model)
    out, tokens, lengths = drawn(model, params, asked, logprobs=0)
    told = out.logprobs.chosen.reshape(-1, NEW)
    batch = rollouts(asked, tokens, lengths, np.zeros((4, GROUP)), told)
    logits = model.apply({"params": params}, batch.inputs).logits
    found = token_log_probs(logits, batch.inputs.labels)
    np.testing.assert_allclose(found, batch.sampled, rtol=1e-4, atol=1e-5)
    assert (batch.inputs.labels >= 0).sum() == np.isfinite(told).sum() > 12
    assert not (batch.inputs.labels[-GROUP:] >= 0).any()  # The empty slot.


def test_published_prompts(pytestconfig):
    """The same where a picture stands in the middle of a prompt (`Placement`)."""
    tests = pytestconfig.rootpath / "tests"
    vlm = evlm.from_pretrained(tests / "samples/smolvlm")
    request = vlm.request(["What is shown?"], [[tests / "samples/llava/00.jpg"]])
    asked = repeated(request.inputs, 3)
    how = hot(3, 0)
    given = dict(new_tokens=NEW, eos_id=vlm.tokenizer.eos_ids, sampling=how, logprobs=0)
    out = generate(request.model, vlm.fused, asked, **given)
    told = out.logprobs.chosen.reshape(-1, NEW)
    tokens, lengths = out.tokens.reshape(-1, NEW), out.lengths.reshape(-1)
    batch = rollouts(asked, tokens, lengths, np.zeros((1, 3)), told)
    batch.inputs.check(request.model.layout(batch.inputs.pictures))
    logits = request.model.apply({"params": vlm.fused}, batch.inputs).logits
    found = token_log_probs(logits, batch.inputs.labels)
    np.testing.assert_allclose(found, batch.sampled, rtol=1e-4, atol=1e-5)


def test_a_step_follows_the_gradient_of_the_reward(model, params, asked):
    """On samples of the policy itself: - mean over answers of A times the mean log-probability."""
    _, tokens, lengths = drawn(model, params, asked)
    rewards = np.random.default_rng(0).normal(size=(4, GROUP))
    batch = rollouts(asked, tokens, lengths, rewards)
    state = init_state(jax.tree.map(np.copy, params), optax.sgd(1.0))
    step = make_grpo_step(model, optax.sgd(1.0), reference=params, beta=0.3)
    state, metrics = step(state, batch)
    assert metrics["ok"] and abs(metrics["kl"]) < 1e-6 and metrics["clipped"] == 0

    def objective(params):
        values = token_log_probs(
            model.apply({"params": params}, batch.inputs).logits, batch.inputs.labels
        )
        count = (batch.inputs.labels >= 0).sum(1)
        means = values.sum(1)[count > 0] / count[count > 0]
        return -(batch.advantages[count > 0] * means).mean()

    wanted = jax.grad(objective)(params)
    moved = jax.tree.map(lambda new, old: old - new, state["params"], params)
    assert optax.tree.norm(wanted) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), moved, wanted)


def test_the_reward_rises(model, params, asked):
    """Answers of one token that is asked for: from chance to most of them."""
    tx = optax.adam(1e-2)
    state = init_state(jax.tree.map(np.copy, params), tx)
    step, curve = make_grpo_step(model, tx, beta=0.0), []
    for number in range(40):
        _, tokens, lengths = drawn(model, state["params"], asked, seed=number)
        right = (tokens[:, 0] == 7).astype(np.float32)
        state, metrics = step(state, rollouts(asked, tokens, lengths, right.reshape(-1, GROUP)))
        assert metrics["ok"]
        curve.append(right[:-GROUP].mean())
    assert np.mean(curve[:5]) < 0.3 and np.mean(curve[-5:]) > 0.7, curve
