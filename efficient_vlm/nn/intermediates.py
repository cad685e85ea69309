"""Intermediates of encoder layers that compressors request: features, keys, attention rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from efficient_vlm.errors import UserError, unknown
from efficient_vlm.kernels.attention import attention_importance


def _row(query: jax.Array, keys: jax.Array, inner: dict, scale: float) -> jax.Array:
    """Attention of one query [B, H, Dh] to keys [B, S, H, Dh], mean over heads: float32 [B, S]."""
    logits = jnp.einsum("bhd,bkhd->bhk", query.astype(jnp.float32), keys.astype(jnp.float32))
    live = None if inner["live"] is None else inner["live"][:, None]
    return jax.nn.softmax(scale * logits, axis=-1, where=live).mean(axis=1)


def _all_heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], 1, -1)


def _column_mean(inner: dict, scale: float) -> jax.Array:
    """Attention that each key receives, mean over queries and heads: float32 [B, S], sums to 1."""
    q, k = (inner[name].swapaxes(1, 2) for name in ("query", "key"))
    weights = jnp.full((q.shape[0], q.shape[2]), 1 / q.shape[2], jnp.float32)
    if inner["live"] is not None:
        weights = inner["live"] / inner["live"].sum(axis=1, keepdims=True, dtype=jnp.float32)
    options = dict(key_bias=inner["key_bias"], mask=inner["mask"])
    return attention_importance(q, k, inner["lse"], weights, scale=scale, **options)


def _mean_query(inner: dict) -> jax.Array:
    """Mean over the real patches: float32 [B, H, Dh]."""
    where = None if inner["live"] is None else inner["live"][:, :, None, None]
    return inner["query"].astype(jnp.float32).mean(axis=1, where=where)


# Name -> function of (output of the layer, inputs of its attention, scale of the logits). Inputs
# include "live" [B, S], positions that are not padding, or None, and "before", the input of the
# layer. Signals of one row are computed
# from one query, never from a whole matrix.
INTERMEDIATES: dict[str, Callable[[jax.Array, dict, float], jax.Array]] = {
    "features": lambda x, inner, scale: x,
    "keys": lambda x, inner, scale: inner["key"],
    "cls_row": lambda x, inner, scale: _row(inner["query"][:, 0], inner["key"], inner, scale),
    "cls_row_full": lambda x, inner, scale: _row(
        _all_heads(inner["query"][:, 0]),
        _all_heads(inner["key"]),
        inner,
        scale * inner["query"].shape[-2] ** -0.5,
    ),
    "mean_query_row": lambda x, inner, scale: _row(_mean_query(inner), inner["key"], inner, scale),
    "column_mean": lambda x, inner, scale: _column_mean(inner, scale),
    "change": lambda x, inner, scale: jnp.linalg.norm(
        (x - inner["before"]).astype(jnp.float32), axis=-1
    ),
}


def parse_intermediate(asked: str, layers: int, class_token: bool) -> tuple[str, int]:
    """ "name/layer" -> (name, layer from 0).

    Args:
      asked: see `ViT.__call__`.
      layers: number of layers that run.
      class_token: whether the encoder has a CLS token.

    Raises:
      UserError: unknown name or layer, or a CLS row of an encoder without CLS token.
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
