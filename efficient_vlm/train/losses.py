"""Losses as (sum, denominator), so that micro-batches and devices add up to the exact mean."""

import jax
import jax.numpy as jnp
import optax


def token_cross_entropy(
    logits: jax.Array, tokens: jax.Array, loss_mask: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Next-token cross-entropy in nats, and the share of targets that are the most likely token.

    Args:
      logits: [..., L - 1, vocab]; position t predicts token t + 1, the last token predicts nothing.
      tokens: int32 [..., L].
      loss_mask: bool [..., L], True at tokens that are targets; index 0 never is.

    Returns:
      {"loss", "accuracy"}, each (sum over targets, number of targets).
    """
    targets, mask = tokens[..., 1:], loss_mask[..., 1:].astype(jnp.float32)
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    count = mask.sum()
    return {"loss": ((losses * mask).sum(), count), "accuracy": ((hits * mask).sum(), count)}


def ratio(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    """sum / denominator; 0 where the denominator is 0."""
    total, count = pair
    return jnp.where(count > 0, total / jnp.maximum(count, 1), 0.0)
