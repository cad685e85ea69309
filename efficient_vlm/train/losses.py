"""Losses as (sum, denominator), so that micro-batches and devices add up to the exact mean."""

import jax
import jax.numpy as jnp
import optax


def token_cross_entropy(
    logits: jax.Array, labels: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Cross-entropy in nats, and the share of targets that are the most likely token.

    Args:
      logits: [..., vocab].
      labels: int32 [...], the token to predict; -1 for none.

    Returns:
      {"loss", "accuracy"}, each (sum over targets, number of targets).
    """
    targets, mask = jnp.maximum(labels, 0), (labels >= 0).astype(jnp.float32)
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    count = mask.sum()
    return {"loss": ((losses * mask).sum(), count), "accuracy": ((hits * mask).sum(), count)}


def ratio(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    """sum / denominator; 0 where the denominator is 0."""
    total, count = pair
    return jnp.where(count > 0, total / jnp.maximum(count, 1), 0.0)
