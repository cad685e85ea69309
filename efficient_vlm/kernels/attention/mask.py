"""Which keys a query sees, as a few numbers per query and per key: never an N x M map.

All masks of the models are of this kind: causal by position, prefix, sliding window, packed
segments, blocks with bidirectional attention, and lengths. Query i sees key j when

    (position_j <= high_i  or  same block)  and  (near_j > low_i  or  same block that is spared)
    and (same segment or the key's segment is shared)

with `high` from causality, the prefix and the window's right side, `low` from its left side.
Padding sees nothing and is not seen: `high` of a padding query is -inf, `position` of a padding key
+inf.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from efficient_vlm.errors import UserError, short

__all__ = [
    "Mask",
    "Rule",
    "all_seen",
    "check_mask",
    "choose",
    "key_mask",
    "make_mask",
    "mask_rows",
    "visible",
]

# Logit of a hidden key: finite, so that gradients of a row that sees nothing are not NaN.
NEGATIVE = -1e30
# Above every position, below the +inf of padding keys.
EVERYTHING = 1e30
# Two numbers, so that queries and keys outside of all blocks are never in the same block.
_NO_QUERY_BLOCK, _NO_KEY_BLOCK = -1, -2
# The segment of keys that all queries see; segments of callers are not negative.
SHARED = -2


Q_FIELDS = ("high", "low", "q_segment", "q_block")
K_FIELDS = ("position", "near", "kv_segment", "kv_block")


class Rule(NamedTuple):
    """The parts of the rule that a mask uses; kernels are specialised for them."""

    windowed: bool
    segmented: bool
    blocked: bool
    spares: bool

    def seen(self, row: Callable[[str], jax.Array], column: Callable[[str], jax.Array]):
        """bool, which queries see which keys: the one implementation of the rule of the module.

        Args:
          row, column: return a field of the queries (Q_FIELDS) and of the keys (K_FIELDS) by name,
            in shapes that broadcast to the map.
        """
        seen = column("position") <= row("high")
        same = None
        if self.blocked:
            same = row("q_block") == column("kv_block")
            seen = seen | same
        if self.windowed:
            near = column("near") > row("low")
            seen = seen & (near | same if self.spares else near)
        if self.segmented:
            segment = column("kv_segment")
            seen = seen & ((segment == row("q_segment")) | (segment == SHARED))
        return seen


@struct.dataclass
class Mask:
    """The numbers of a mask, see the module. B rows, or 1 that holds for all; N queries, M keys.

    Attributes:
      high: float32 [B, N]; -inf for padding queries.
      position: float32 [B, M]; +inf for padding keys.
      low, near: float32 [B, N] and [B, M], or None without a window; `near` is the position, or
        +inf for keys that no window cuts.
      q_segment, kv_segment: int32 [B, N] and [B, M], or None; kv_segment is SHARED for keys that
        every query sees.
      q_block, kv_block: int32 [B, N] and [B, M], or None; equal numbers see each other.
      spares: whether tokens of one block see each other outside the window, too.
      causal: whether the mask is causal (and perhaps more); used for estimates of work only.
    """

    high: jax.Array
    position: jax.Array
    low: jax.Array | None = None
    near: jax.Array | None = None
    q_segment: jax.Array | None = None
    kv_segment: jax.Array | None = None
    q_block: jax.Array | None = None
    kv_block: jax.Array | None = None
    spares: bool = struct.field(pytree_node=False, default=False)
    causal: bool = struct.field(pytree_node=False, default=False)

    @property
    def rule(self) -> Rule:
        """The parts of the rule that this mask uses."""
        fields = (self.low, self.q_segment, self.q_block)
        return Rule(*(field is not None for field in fields), self.spares)


def make_mask(
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    shared_segment: int | None = None,
    prefix_length: jax.Array | int | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    q_blocks: jax.Array | None = None,
    kv_blocks: jax.Array | None = None,
    window_spares_blocks: bool = False,
    q_lengths: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    kv_live: jax.Array | None = None,
) -> Mask | None:
    """The mask of a batch, made once for all layers; None where every query sees every key.

    Args:
      queries, keys: N and M.
      causal: a query sees the keys up to its own position.
      q_positions, kv_positions: [B, N] and [B, M], or without B, int or float (a merged token may
        lie between two others); kept tokens keep their original ones. None counts from 0. Below
        2**24.
      q_segments, kv_segments: int [B, N] and [B, M], both or none: a query sees only keys of its
        segment. Negative segments are padding, which sees nothing and is not seen. Below 2**24.
      shared_segment: all queries see the keys of this segment.
      prefix_length: int or [B]; tokens at positions below it see each other even under `causal`,
        and its keys are exempt from the window.
      window: a number w: a query sees the last w keys up to and including its own position, and
        all later keys unless `causal` hides them; or (left, right): the largest distance of a key
        before and after the query, None for any distance.
      q_blocks, kv_blocks: int [B, N] and [B, M]; tokens of one block see each other in both
        directions; 0 for tokens outside of blocks. Below 2**24.
      window_spares_blocks: whether tokens of one block see each other at any distance; otherwise
        the window applies inside blocks as well (under `causal` only one without a right side).
      q_lengths, kv_lengths: int [B]; positions at or beyond the length are padding.
      kv_live: bool [B, M], or without B; False for padding keys.

    Raises:
      UserError: one of a pair without the other, or other shapes than those above.
    """
    for one, two, name in (
        (q_segments, kv_segments, "segments"),
        (q_blocks, kv_blocks, "blocks"),
    ):
        if (one is None) != (two is None):
            raise UserError(
                f"attention: only one of q_{name} and kv_{name}",
                fix="pass both of them, or neither",
            )
    window = _checked(window)
    q = _each(q_positions, queries, "q_positions")
    k = _each(kv_positions, keys, "kv_positions")
    q_segments = None if q_segments is None else _each(q_segments, queries, "q_segments", jnp.int32)
    kv_segments = (
        None if kv_segments is None else _each(kv_segments, keys, "kv_segments", jnp.int32)
    )
    limits = (window, q_segments, q_lengths, kv_lengths, kv_live)
    if not causal and all(limit is None for limit in limits):
        return None

    high = q if causal else jnp.full_like(q, EVERYTHING)
    low = near = None
    left, right = (window - 1, None) if isinstance(window, int) else (window or (None, None))
    if q_blocks is not None and not window_spares_blocks:
        if not causal:
            q_blocks = None  # The window alone decides.
        elif right is not None:
            raise UserError(
                f"attention: window {short(window)} within blocks, and causal: its right side "
                "would not hold there",
                allowed="(left, None), or window_spares_blocks=True",
            )
    if right is not None:
        high = jnp.minimum(high, q + right)
    if left is not None:
        # Keys are seen strictly above `low`: all at or above q - left, fractional ones as well.
        low = q - left - 1 if isinstance(window, int) else _below(q - left)
        near = k
    if prefix_length is not None:
        prefix = jnp.asarray(prefix_length, jnp.float32).reshape(-1, 1)
        prefix = jax.lax.stop_gradient(prefix)
        high = jnp.where(q < prefix, jnp.maximum(high, _below(prefix)), high)
        if near is not None:
            near = jnp.where(k < prefix, jnp.inf, k)

    padding_q = jnp.zeros((1, queries), bool)
    padding_k = jnp.zeros((1, keys), bool)
    if q_lengths is not None:
        padding_q = padding_q | (
            jnp.arange(queries) >= jnp.reshape(jnp.asarray(q_lengths), (-1, 1))
        )
    if kv_lengths is not None:
        padding_k = padding_k | (jnp.arange(keys) >= jnp.reshape(jnp.asarray(kv_lengths), (-1, 1)))
    if kv_live is not None:
        padding_k = padding_k | ~_each(kv_live, keys, "kv_live", bool)
    if q_segments is not None:
        padding_q, padding_k = padding_q | (q_segments < 0), padding_k | (kv_segments < 0)
        if shared_segment is not None:
            kv_segments = jnp.where(kv_segments == shared_segment, SHARED, kv_segments)
    q_block = kv_block = None
    if q_blocks is not None and (causal or window is not None):
        q_blocks = _each(q_blocks, queries, "q_blocks", jnp.int32)
        kv_blocks = _each(kv_blocks, keys, "kv_blocks", jnp.int32)
        q_block = jnp.where((q_blocks > 0) & ~padding_q, q_blocks, _NO_QUERY_BLOCK)
        kv_block = jnp.where((kv_blocks > 0) & ~padding_k, kv_blocks, _NO_KEY_BLOCK)
    return Mask(
        high=jnp.where(padding_q, -jnp.inf, high),
        position=jnp.where(padding_k, jnp.inf, k),
        low=low,
        near=near,
        q_segment=q_segments,
        kv_segment=kv_segments,
        q_block=q_block,
        kv_block=kv_block,
        spares=window_spares_blocks and q_block is not None,
        causal=causal,
    )


def visible(mask: Mask) -> jax.Array:
    """bool [B, N, M], or [1, N, M]: the whole map, for the reference and for tests."""

    return mask.rule.seen(
        lambda name: getattr(mask, name)[:, :, None], lambda name: getattr(mask, name)[:, None]
    )


def key_mask(live: jax.Array, queries: int) -> Mask:
    """The mask under which every query sees exactly the keys `live`, bool [B, M]."""
    return Mask(
        high=jnp.full((1, queries), EVERYTHING, jnp.float32),
        position=jnp.where(live, 0.0, jnp.inf).astype(jnp.float32),
    )


def all_seen(queries: int, keys: int) -> Mask:
    """A mask that hides nothing, for code that needs a mask."""
    return key_mask(jnp.ones((1, keys), bool), queries)


def mask_rows(mask: Mask, rows: jax.Array) -> Mask:
    """The mask of a subset of the queries, whose numbers are `rows`, int [B, R]."""

    fields = {name: x for name in Q_FIELDS if (x := getattr(mask, name)) is not None}
    for name, x in fields.items():
        x = jnp.broadcast_to(x, (len(rows), x.shape[1]))
        fields[name] = jnp.take_along_axis(x, rows, axis=1)
    return mask.replace(**fields)


def check_mask(mask: Mask, batch: int, queries: int, keys: int) -> None:
    """Raises UserError for a mask of other shapes, or for something that is not a mask."""
    if not isinstance(mask, Mask):
        raise UserError(f"attention: mask is a {type(mask).__name__}", fix="make it by `make_mask`")
    for names, count in ((Q_FIELDS, queries), (K_FIELDS, keys)):
        for name in names:
            x = getattr(mask, name)
            if x is not None and x.shape not in ((batch, count), (1, count)):
                raise UserError(
                    f"attention: the mask is for {name} {x.shape}, the call has {(batch, count)}",
                    allowed="[B, N] for q [B, H, N, D] and [B, M] for k [B, Hk, M, D]",
                    fix="x.swapaxes(1, 2) if q and k are [B, N, H, D], or a mask of their tokens",
                )


def choose(pick: jax.Array | bool, one: Mask, two: Mask) -> Mask:
    """`one` where `pick` is true, else `two`; both must have the same segments and blocks.

    Args:
      pick: bool, static or traced scalar: one program serves layers with and without a window.
    """
    if isinstance(pick, (bool, np.bool_)):
        return one if pick else two

    def windowed(mask):
        if mask.low is not None:
            return mask
        return mask.replace(low=jnp.full_like(mask.high, -jnp.inf), near=mask.position)

    if one.low is not None and two.low is not None and one.spares != two.spares:
        raise UserError(
            "attention: one of two masks spares blocks from its window, the other does not"
        )
    # A mask without a window has nothing to spare, so the other one decides.
    spares = two.spares if one.low is None else one.spares
    if (one.low is None) != (two.low is None):
        one, two = windowed(one), windowed(two)
    static = dict(spares=spares, causal=one.causal and two.causal)
    one, two = one.replace(**static), two.replace(**static)
    return jax.tree.map(lambda a, b: jnp.where(pick, a, b), one, two)


def _each(x, count: int, name: str, dtype=jnp.float32) -> jax.Array:
    """[B, count], or [1, count]."""
    if x is None:
        return jnp.arange(count, dtype=dtype)[None]
    # Masks have no gradients, and JAX has none for `nextafter`.
    x = jax.lax.stop_gradient(jnp.asarray(x))
    if x.ndim not in (1, 2) or x.shape[-1] != count:
        raise UserError(
            f"attention: {name} has shape {x.shape}", allowed=f"[batch, {count}] or [{count}]"
        )
    return x.astype(dtype).reshape(-1, count)


def _below(x: jax.Array) -> jax.Array:
    """The next lower float; for 0 a normal number, since processors may flush subnormals to 0."""
    return jnp.where(x == 0, -1e-30, jnp.nextafter(x, jnp.full_like(x, -jnp.inf)))


def _checked(window):
    """The window with Python numbers; UserError for an invalid one."""
    parts = window if isinstance(window, tuple) else (window,)
    parts = tuple(int(p) if isinstance(p, np.integer) else p for p in parts)
    window = parts if isinstance(window, tuple) else parts[0]
    good = all(p is None or (isinstance(p, int) and p >= 0) for p in parts)
    if not good or len(parts) > 2 or (isinstance(window, int) and window < 1):
        raise UserError(
            f"attention: window {short(window)}",
            allowed="a number of keys from 1, or (left, right) of numbers from 0 or None",
        )
    return window
