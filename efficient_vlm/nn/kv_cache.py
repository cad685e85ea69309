"""Keys and values of one layer between steps of generation: how they are stored and attended to.

Each row has one contiguous stretch of slots, or pages listed in a table (arXiv 2309.06180). Numbers
are in the model's dtype, or int8 with one scale per token and head.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, Int, Shaped

from efficient_vlm import checks
from efficient_vlm.errors import UserError, short
from efficient_vlm.kernels.attention import Mask, attention
from efficient_vlm.kernels.paged_attention import attention_decode, quantise
from efficient_vlm.nn.linear import Dtype
from efficient_vlm.shapes import Array
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

KINDS, DTYPES = ("contiguous", "paged"), ("int8",)
PAGE = 128  # The smallest page that kernels on TPUs read in place.
_LARGEST_PAGE = 2**16

# Keys and values, each [B, Hkv, M, Dh] with M slots per row, or a pool of pages [P, Hkv, page, Dh];
# int8 ones are followed by the scales of the keys and of the values, float32 without the axis Dh.
LayerCache = tuple[Shaped[Array, "..."], ...]


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """How keys and values are stored.

    Attributes:
      kind: "contiguous" or "paged".
      page: slots per page, 128 by default. TPUs read pages of 128, 256, ... slots in place; pages
        of other sizes are gathered first.
      dtype: None for the model's dtype. "int8" takes half the bytes of bfloat16, plus 4 per token
        and head, and rounds to 1/127 of the largest number of a token and head.

    Raises:
      UserError: another kind, page or dtype.
    """

    kind: str = "contiguous"
    page: int | None = None
    dtype: str | None = None

    def __post_init__(self):
        checks.one_of("cache.kind", self.kind, KINDS)
        if self.dtype is not None:
            checks.one_of("cache.dtype", self.dtype, DTYPES)
        if self.page is not None and self.kind != "paged":
            raise UserError(
                f"cache.page: {short(self.page)}, but kind={short(self.kind)}", fix="kind='paged'"
            )
        page = checks.whole("cache.page", self.page, high=_LARGEST_PAGE, none=True)
        if self.kind == "paged":
            object.__setattr__(self, "page", page or PAGE)

    @classmethod
    def of(cls, given: "CacheOptions | Mapping[str, Any] | None") -> "CacheOptions":
        """Options from a mapping of fields, or from None for all defaults."""
        if isinstance(given, cls):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise UserError(f"cache: {given!r:.40}", allowed="a mapping of kind, page and dtype")
        names = [field.name for field in dataclasses.fields(cls)]
        checks.known_fields("cache", given or {}, names)
        return cls(**(given or {}))


CONTIGUOUS = CacheOptions()


@struct.dataclass
class Slots:
    """Slots of the cache for the new tokens of each row; the same in all layers of a segment.

    Attributes:
      at: int32 [B, S], distinct within a row; tokens with slots past the end are not written.
      pages: int32 [B, T], the pages of each row in order; None for a contiguous cache.
    """

    at: Int[Array, "B S"]
    pages: Int[Array, "B T"] | None = None


def empty(
    options: CacheOptions, rows: int, slots: int, heads: int, dim: int, dtype: Dtype
) -> LayerCache:
    """An empty cache of one layer with `slots` per row, rounded up to whole pages."""
    shape = (rows, heads, slots, dim)
    if options.kind == "paged":
        shape = (rows * -(-slots // options.page), heads, options.page, dim)
    part = jnp.zeros(shape, options.dtype or dtype)
    scales = (jnp.zeros(shape[:-1], jnp.float32),) * 2 if options.dtype == "int8" else ()
    return part, part, *scales


def cache_axes(order: int, paged: bool) -> tuple[str | None, ...]:
    """Logical axes of one array of a `LayerCache`; any row may use any page of a pool."""
    axes = (None if paged else CACHE_AXES[0], *CACHE_AXES[1:])
    return axes if order < 2 else axes[:-1]


def fill(
    cache: LayerCache, k: Float[Array, "B S Hkv Dh"], v: Float[Array, "B S Hkv Dh"]
) -> LayerCache:
    """An empty cache with k and v in the first S slots of each row; pages are in row order."""
    rows, pages = len(k), len(cache[0]) // len(k)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        if pages == 1:
            return jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)
        room = pages * old.shape[2] - new.shape[2]
        new = jnp.pad(new, [(0, room if axis == 2 else 0) for axis in range(new.ndim)])
        new = new.reshape(rows, new.shape[1], pages, old.shape[2], *new.shape[3:])
        return new.swapaxes(1, 2).reshape(old.shape)

    parts = map(put, cache, _stored(cache, k, v))
    return _constrained(parts, paged=pages > 1)


def write(
    cache: LayerCache,
    k: Float[Array, "B S Hkv Dh"],
    v: Float[Array, "B S Hkv Dh"],
    slots: Slots,
) -> LayerCache:
    """A cache with k and v written to the given slots of each row.

    A scatter of S tokens, which leaves the rest of a donated cache in place. (A
    `dynamic_update_slice` of each row would shift tokens that reach past the end.)
    """

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        if slots.pages is None:
            if slots.at.size > 1:
                return _scatter(old, new, slots.at)
            forms = dict(cpu=_with_another, default=_scatter)
            return jax.lax.platform_dependent(old, new, slots.at, **forms)
        size, count = old.shape[2], slots.pages.shape[1]
        page = jnp.take_along_axis(slots.pages, jnp.minimum(slots.at // size, count - 1), axis=1)
        page = jnp.where(slots.at < size * count, page, len(old))
        return old.at[page, :, slots.at % size].set(new.swapaxes(1, 2), mode="drop")

    parts = map(put, cache, _stored(cache, k, v))
    return _constrained(parts, paged=slots.pages is not None)


def _scatter(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """new [B, Hkv, S, ...] written into old [B, Hkv, M, ...] at slots [B, S] below M."""

    def row(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return old.at[:, at].set(new, mode="drop", unique_indices=True)

    return jax.vmap(row)(old, new, at)


def _with_another(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """`_scatter` of one token and of another one past the end.

    XLA turns a scatter of one token into a `dynamic_update_slice`, and on a CPU repeats that for
    each of its readers, from copies of the whole cache: a tenth of the time of a step.
    """
    past = jnp.full_like(at, old.shape[2])
    return _scatter(old, jnp.concatenate([new, new], 2), jnp.concatenate([at, past], 1))


def attend(
    cache: LayerCache,
    q: Float[Array, "B H S Dh"],
    slots: Slots,
    *,
    mask: Mask,
    key_bias: Float[Array, "B M"],
    scale: float,
    softcap: float | None,
) -> tuple[Float[Array, "B H S Dh"], Float[Array, "B H S"]]:
    """Attention of new tokens to a cache that holds them already.

    Args:
      cache: with M slots per row.
      q: [B, H, S, Dh], queries of the new tokens.
      slots: those of the new tokens.
      mask: causal by places that grow with the slots of text, +inf for slots without a token.
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
    # Absent tokens attend to nothing.
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


def _stored(cache: LayerCache, k: jax.Array, v: jax.Array) -> LayerCache:
    """k and v [B, S, Hkv, Dh] as the arrays of a cache hold them, [B, Hkv, S, Dh]."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if len(cache) == 2:
        return k.astype(cache[0].dtype), v.astype(cache[1].dtype)
    (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
    return k, v, k_scale, v_scale


def _constrained(parts: Any, paged: bool) -> LayerCache:
    return tuple(constrain(x, *cache_axes(order, paged)) for order, x in enumerate(parts))
