"""The keys and values of one layer between steps of generation: how they are kept and attended to.

In one stretch of slots for each row, or in pages that a table strings together (arXiv 2309.06180);
in the model's dtype, or in int8 with a scale for each token and head.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from efficient_vlm.errors import UserError, check_fields, unknown
from efficient_vlm.kernels.attention import Mask, attention
from efficient_vlm.kernels.paged_attention import attention_decode, quantise
from efficient_vlm.sharding import CACHE_AXES, constrain

__all__ = [
    "CONTIGUOUS",
    "CacheOptions",
    "LayerCache",
    "Slots",
    "attend",
    "cache_axes",
    "empty",
    "fill",
    "write",
]

KINDS, DTYPES = ("contiguous", "paged"), (None, "int8")
# What kernels on TPUs read from where it lies.
PAGE = 128
_LARGEST_PAGE = 2**16

# Keys and values, each [B, Hkv, M, Dh] of M slots a row or a pool of pages [P, Hkv, page, Dh]; with
# int8 also the scales of the keys and of the values, float32 of these shapes without Dh.
LayerCache = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """How keys and values are kept.

    Attributes:
      kind: "contiguous", or "paged".
      page: slots of a page, for "paged": 128 unless given. TPUs read pages of 128, 256, ... from
        where they lie; others are gathered first.
      dtype: None for the model's; "int8" has half the bytes of bfloat16, and 4 more a token and
        head. What is read from it is rounded to 1/127 of the largest number of a token and head.

    Raises:
      UserError: another kind, page or dtype.
    """

    kind: str = "contiguous"
    page: int | None = None
    dtype: str | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown("cache.kind", str(self.kind), KINDS)
        if self.dtype not in DTYPES:
            raise UserError(
                f"cache.dtype: {self.dtype!r:.40}", allowed="int8, or None for the model's"
            )
        if self.page is not None and self.kind != "paged":
            raise UserError(f"cache.page: {self.page!r:.40}, but kind={self.kind!r}", fix="paged")
        whole = isinstance(self.page, int) and not isinstance(self.page, bool)
        if self.page is not None and not (whole and 1 <= self.page <= _LARGEST_PAGE):
            raise UserError(
                f"cache.page: {self.page!r:.40}",
                allowed=f"a whole number from 1 to {_LARGEST_PAGE}; multiples of {PAGE} on TPUs",
            )
        if self.page is None and self.kind == "paged":
            object.__setattr__(self, "page", PAGE)

    @classmethod
    def of(cls, given: "CacheOptions | Mapping[str, Any] | None") -> "CacheOptions":
        """From what a user gave: a mapping of fields, or None for all defaults."""
        if isinstance(given, cls):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise UserError(f"cache: {given!r:.40}", allowed="a mapping of kind, page and dtype")
        check_fields("cache", given or {}, [field.name for field in dataclasses.fields(cls)])
        return cls(**(given or {}))


CONTIGUOUS = CacheOptions()


@struct.dataclass
class Slots:
    """Where in the cache the new tokens of each row go; the same in all layers of a segment.

    Attributes:
      at: int32 [B, S], no slot twice in a row; a slot behind the last one writes nothing.
      pages: int32 [B, T], the pages of each row in order; None for a contiguous cache.
    """

    at: jax.Array
    pages: jax.Array | None = None


def empty(
    options: CacheOptions, rows: int, slots: int, heads: int, dim: int, dtype: Any
) -> LayerCache:
    """A layer's cache without a token, of `slots` a row or of whole pages for that many."""
    shape = (rows, heads, slots, dim)
    if options.kind == "paged":
        shape = (rows * -(-slots // options.page), heads, options.page, dim)
    part = jnp.zeros(shape, options.dtype or dtype)
    scales = (jnp.zeros(shape[:-1], jnp.float32),) * 2 if options.dtype == "int8" else ()
    return part, part, *scales


def cache_axes(order: int, paged: bool) -> tuple[str | None, ...]:
    """Logical axes of a part of a layer's cache. Any row may have any page of a pool."""
    axes = (None if paged else CACHE_AXES[0], *CACHE_AXES[1:])
    return axes if order < 2 else axes[:-1]


def fill(cache: LayerCache, k: jax.Array, v: jax.Array) -> LayerCache:
    """An empty cache with k, v [B, S, Hkv, Dh] in the first S slots; pages in the order of rows."""
    rows, pages = len(k), len(cache[0]) // len(k)

    def put(kept: jax.Array, new: jax.Array) -> jax.Array:
        if pages == 1:
            return jax.lax.dynamic_update_slice(kept, new, (0,) * kept.ndim)
        more = pages * kept.shape[2] - new.shape[2]
        new = jnp.pad(new, [(0, more if axis == 2 else 0) for axis in range(new.ndim)])
        new = new.reshape(rows, new.shape[1], pages, kept.shape[2], *new.shape[3:])
        return new.swapaxes(1, 2).reshape(kept.shape)

    parts = map(put, cache, _kept(cache, k, v))
    return _constrained(parts, paged=pages > 1)


def write(cache: LayerCache, k: jax.Array, v: jax.Array, slots: Slots) -> LayerCache:
    """A cache with k, v [B, S, Hkv, Dh] in slots of their own in each row.

    A scatter of S tokens: where the cache is donated nothing else of it is touched or copied. (A
    `dynamic_update_slice` of each row would move tokens that reach over the end to its front.)
    """

    def row(kept: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return kept.at[:, at].set(new, mode="drop", unique_indices=True)

    def put(kept: jax.Array, new: jax.Array) -> jax.Array:
        if slots.pages is None:
            return jax.vmap(row)(kept, new, slots.at)
        size, count = kept.shape[2], slots.pages.shape[1]
        page = jnp.take_along_axis(slots.pages, jnp.minimum(slots.at // size, count - 1), axis=1)
        page = jnp.where(slots.at < size * count, page, len(kept))
        return kept.at[page, :, slots.at % size].set(new.swapaxes(1, 2), mode="drop")

    parts = map(put, cache, _kept(cache, k, v))
    return _constrained(parts, paged=slots.pages is not None)


def attend(
    cache: LayerCache,
    q: jax.Array,
    slots: Slots,
    *,
    mask: Mask,
    key_bias: jax.Array,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """New tokens, which are in the cache already, attend to it.

    Args:
      cache: of M slots a row.
      q: [B, H, S, Dh].
      slots: where the S tokens are.
      mask: causal, by places that grow with the slots of text; +inf for a slot that holds nothing.
      key_bias: float32 [B, M].
      scale, softcap: see `kernels.attention.attention`.

    Returns:
      [B, H, S, Dh], and the log-sum-exp of the logits, float32 [B, H, S].
    """
    k, v, *scales = cache
    options = dict(key_bias=key_bias, scale=scale, softcap=softcap)
    if slots.pages is None and not scales:
        k, v = (part.astype(q.dtype) for part in (k, v))
        return attention(q, k, v, mask=mask, **options)[:2]
    k_scale, v_scale = scales or (None, None)
    if not scales:
        k, v = (part.astype(q.dtype) for part in (k, v))
    # A token that is not there sees nothing.
    lengths = jnp.where(slots.at < mask.position.shape[1], slots.at + 1, 0)
    found = attention_decode(
        *(q, k, v, lengths),
        pages=slots.pages,
        k_scale=k_scale,
        v_scale=v_scale,
        live=jnp.isfinite(mask.position),
        places=None if mask.low is None else mask.near,
        after=mask.low,
        **options,
    )
    return found.out, found.lse


def _kept(cache: LayerCache, k: jax.Array, v: jax.Array) -> LayerCache:
    """New keys and values [B, S, Hkv, Dh] as [B, Hkv, S, Dh] in the form of a cache."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if len(cache) == 2:
        return k.astype(cache[0].dtype), v.astype(cache[1].dtype)
    (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
    return k, v, k_scale, v_scale


def _constrained(parts: Any, paged: bool) -> LayerCache:
    return tuple(constrain(x, *cache_axes(order, paged)) for order, x in enumerate(parts))
