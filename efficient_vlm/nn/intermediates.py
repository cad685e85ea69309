"""What compressors may ask of the encoder's layers: features, keys, rows of attention."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from efficient_vlm.errors import UserError, unknown
from efficient_vlm.kernels.attention import attention_importance


def _row(query: jax.Array, keys: jax.Array, seen: dict, scale: float) -> jax.Array:
    """Attention of one query [B, H, Dh] to keys [B, S, H, Dh], mean over heads: float32 [B, S]."""
    logits = jnp.einsum("bhd,bkhd->bhk", query.astype(jnp.float32), keys.astype(jnp.float32))
    live = None if seen["live"] is None else seen["live"][:, None]
    return jax.nn.softmax(scale * logits, axis=-1, where=live).mean(axis=1)


def _all_heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], 1, -1)


def _column_mean(seen: dict, scale: float) -> jax.Array:
    """Attention that each key receives, mean over queries and heads: float32 [B, S], sums to 1."""
    q, k = (seen[name].swapaxes(1, 2) for name in ("query", "key"))
    weights = jnp.full((q.shape[0], q.shape[2]), 1 / q.shape[2], jnp.float32)
    if seen["live"] is not None:
        weights = seen["live"] / seen["live"].sum(axis=1, keepdims=True, dtype=jnp.float32)
    told = dict(key_bias=seen["key_bias"], mask=seen["mask"])
    return attention_importance(q, k, seen["lse"], weights, scale=scale, **told)


def _mean_query(seen: dict) -> jax.Array:
    """Mean over the real patches: float32 [B, H, Dh]."""
    where = None if seen["live"] is None else seen["live"][:, :, None, None]
    return seen["query"].astype(jnp.float32).mean(axis=1, where=where)


# What can be asked of a layer: (states behind it, what its attention saw and "live" [B, S], which
# places are no padding, or None; scale of the logits) -> array. One-row signals are computed beside
# the attention from one query, never from a whole matrix.
INTERMEDIATES: dict[str, Callable[[jax.Array, dict, float], jax.Array]] = {
    "features": lambda x, seen, scale: x,
    "keys": lambda x, seen, scale: seen["key"],
    "cls_row": lambda x, seen, scale: _row(seen["query"][:, 0], seen["key"], seen, scale),
    "cls_row_full": lambda x, seen, scale: _row(
        _all_heads(seen["query"][:, 0]),
        _all_heads(seen["key"]),
        seen,
        scale * seen["query"].shape[-2] ** -0.5,
    ),
    "mean_query_row": lambda x, seen, scale: _row(_mean_query(seen), seen["key"], seen, scale),
    "column_mean": lambda x, seen, scale: _column_mean(seen, scale),
}


def parse_intermediate(asked: str, layers: int, class_token: bool) -> tuple[str, int]:
    """ "name/layer" -> (name, layer from 0).

    Args:
      asked: see `ViT.__call__`.
      layers: that run.
      class_token: whether the encoder has one.

    Raises:
      UserError: unknown name or layer, or a CLS row of an encoder without CLS.
    """
    name, _, layer = asked.partition("/")
    if name not in INTERMEDIATES:
        raise unknown("encoder intermediate", name, INTERMEDIATES)
    if 0 < (part := _fraction(layer)) < 1:
        layer = str(int(part * layers))
    if not layer.lstrip("-").isdigit() or not -layers <= int(layer) < layers:
        raise UserError(
            f"compressor.layer (or middle_layer): {layer}, no layer of this encoder ({asked})",
            allowed=f"{-layers} to {layers - 1}, or a fraction of the depth",
        )
    if name.startswith("cls_") and not class_token:
        raise UserError(
            "compressor.attention: 'cls', but this encoder has no CLS token",
            allowed="'column_mean' (attention received from all patches), 'mean_query'; "
            "divprune, dart, stride need no attention",
            fix="--compressor.attention=column_mean",
        )
    return name, int(layer) % layers


def _fraction(layer: str) -> float:
    try:
        return float(layer)
    except ValueError:
        return 0.0
