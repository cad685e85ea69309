"""Losses of preferences and rewards, on log-probabilities; (sum, denominator) each.

What a policy is compared with (a reference, the policy that drew the samples) gives no gradients.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int

from efficient_vlm.errors import UserError
from efficient_vlm.shapes import Array
from efficient_vlm.train.distil import Pair

# Differences of log-probabilities of one token count up to here, so that exponentials stay finite.
_LARGEST = 30.0


def token_log_probs(
    logits: Float[Array, "B S V"], labels: Int[Array, "B S"]
) -> Float32[Array, "B S"]:
    """Log-probabilities of the labels, in nats; 0 where there is none (-1)."""
    live = labels >= 0
    logits = jnp.where(live[..., None], logits.astype(jnp.float32), 0)
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(live, chosen - jax.nn.logsumexp(logits, axis=-1), 0)


def sequence_log_probs(
    logits: Float[Array, "B S V"], labels: Int[Array, "B S"]
) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
    """Log-probability of each row's labels, and how many there are."""
    return token_log_probs(logits, labels).sum(-1), (labels >= 0).sum(-1, dtype=jnp.float32)


def dpo(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    reference_chosen: Float[Array, " B"],
    reference_rejected: Float[Array, " B"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    live: Bool[Array, " B"] | None = None,
) -> dict[str, Pair]:
    """Direct preference optimisation (arXiv 2305.18290, equation 7).

    -(1 - e) log sigmoid(x) - e log sigmoid(-x) with the smoothing e and
    x = beta ((log pi - log pi_ref of the chosen) - (the same of the rejected)).

    Args:
      chosen, rejected: log-probabilities of whole answers under the policy.
      reference_chosen, reference_rejected: likewise under the reference.
      beta: strength of the reference.
      label_smoothing: e, how often the other answer is the better one; below 0.5.
      live: pairs that count; None for all.

    Returns:
      "loss"; "accuracy", pairs with x > 0; "margin", x. Each (sum over pairs, pairs).
    """
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"label_smoothing: {label_smoothing}", allowed="from 0, below 0.5")
    reference = jax.lax.stop_gradient(reference_chosen - reference_rejected)
    x = beta * (chosen - rejected - reference)
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(x)
    return _preferred(losses - label_smoothing * jax.nn.log_sigmoid(-x), x, live)


def simpo(
    chosen: tuple[Float[Array, " B"], Float[Array, " B"]],
    rejected: tuple[Float[Array, " B"], Float[Array, " B"]],
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    live: Bool[Array, " B"] | None = None,
) -> dict[str, Pair]:
    """Preferences without a reference (SimPO, arXiv 2405.14734, equation 6).

    -log sigmoid(x - gamma), x = beta (log pi / tokens of the chosen - the same of the rejected).

    Args:
      chosen, rejected: from `sequence_log_probs`.
      beta: scale of the rewards.
      gamma: the margin that is asked for.
      live: see `dpo`.

    Returns:
      As `dpo`; "accuracy" is of x > 0, without the margin.
    """
    (won, long), (lost, short) = chosen, rejected
    x = beta * (won / jnp.maximum(long, 1) - lost / jnp.maximum(short, 1))
    return _preferred(-jax.nn.log_sigmoid(x - gamma), x, live)


def group_advantages(rewards: Float[Array, "G K"], *, scale: bool = True) -> Float32[Array, "G K"]:
    """(reward - mean) / standard deviation within each group of K answers to one question.

    GRPO with rewards of outcomes (arXiv 2402.03300, section 4.1.2). The deviation is that of the
    group as a whole (divided by K); a group of equal rewards has advantages of 0.

    Args:
      rewards: float [G, K].
      scale: False leaves the division out (arXiv 2503.20783, section 3.1). With it, a group whose
        answers differ in a small price alone counts as much as one that differs in right and wrong.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    equal = rewards.max(-1, keepdims=True) == rewards.min(-1, keepdims=True)
    deviation = jnp.where(equal | (not scale), 1, rewards.std(-1, keepdims=True))
    return jnp.where(equal, 0, (rewards - rewards.mean(-1, keepdims=True)) / deviation)


def grpo(
    log_probs: Float[Array, "B S"],
    sampled: Float[Array, "B S"],
    advantages: Float[Array, " B"],
    labels: Int[Array, "B S"],
    *,
    reference: Float[Array, "B S"] | None = None,
    clip: float = 0.2,
    beta: float = 0.04,
) -> dict[str, Pair]:
    """Group relative policy optimisation (arXiv 2402.03300, equations 3 and 4), to be minimised.

    The mean over an answer's tokens of -min(r A, clip(r, 1 - clip, 1 + clip) A) + beta k3, where
    r = pi / pi_sampled and k3 = pi_ref / pi - log(pi_ref / pi) - 1, which estimates
    KL(pi || pi_ref) without bias and is never negative.

    Args:
      log_probs: of the tokens of answers, `token_log_probs`.
      sampled: likewise, under the policy that drew them.
      advantages: of each answer, `group_advantages`.
      labels: int, -1 where there is no token.
      reference: likewise under the reference; None for no KL.
      clip: of the ratio.
      beta: weight of the KL.

    Returns:
      "loss", "kl" (k3) and "clipped" (share of tokens whose ratio the clipping decides); each (sum
      over answers of the mean over tokens, answers with tokens).
    """
    live = labels >= 0
    advantages = jax.lax.stop_gradient(advantages.astype(jnp.float32))[:, None]
    ratio = _ratio(log_probs - jax.lax.stop_gradient(sampled), live)
    plain, limited = ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages
    losses, kl = -jnp.minimum(plain, limited), jnp.zeros(labels.shape, jnp.float32)
    if reference is not None:
        difference = jax.lax.stop_gradient(reference) - log_probs
        kl = _ratio(difference, live) - _bounded(difference, live) - 1
        losses = losses + beta * kl
    count = live.sum(-1, dtype=jnp.float32)

    def mean(values):
        means = jnp.where(live, values, 0).sum(-1) / jnp.maximum(count, 1)
        return means.sum(), (count > 0).sum(dtype=jnp.float32)

    clipped = (limited < plain).astype(jnp.float32)
    return {"loss": mean(losses), "kl": mean(kl), "clipped": mean(clipped)}


def _bounded(difference: jax.Array, live: jax.Array) -> jax.Array:
    return jnp.clip(jnp.where(live, difference.astype(jnp.float32), 0), -_LARGEST, _LARGEST)


def _ratio(difference: jax.Array, live: jax.Array) -> jax.Array:
    return jnp.exp(_bounded(difference, live))


def _preferred(losses: jax.Array, x: jax.Array, live: jax.Array | None) -> dict[str, Pair]:
    live = jnp.ones(x.shape, bool) if live is None else live
    count = live.sum(dtype=jnp.float32)
    named = {"loss": losses, "accuracy": (x > 0).astype(jnp.float32), "margin": x}
    return {name: (jnp.where(live, values, 0).sum(), count) for name, values in named.items()}
