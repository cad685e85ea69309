"""Tokens to their experts and back: dropless or up to a capacity, on one device or many.

On a mesh every device sorts its own tokens, sends each to the device that has its expert, all to
all, and adds up what comes back (GShard, arXiv 2006.16668). Nothing is sorted or gathered over the
whole batch, which is what XLA's partitioner would make of the same lines.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from efficient_vlm.kernels import hints
from efficient_vlm.nn.linear import Weight, batched, beside, grouped
from efficient_vlm.shapes import Array
from efficient_vlm.sharding import BATCH, auto_axes

__all__ = ["Kernels", "capacity_of", "dispatch"]

# Gate and up [E, D, F], down [E, F, D].
Kernels = tuple[Weight, Weight, Weight]
AXIS = "expert"


def capacity_of(factor: float, tokens: int, top_k: int, experts: int) -> int:
    """Tokens of one row that one expert takes (Switch, arXiv 2101.03961, eq. 3).

    Never above `tokens`; there it drops nothing, as in decoding, whose rows have one token.
    """
    return min(tokens, max(1, math.ceil(factor * tokens * top_k / experts)))


def dispatch(
    x: Float[Array, "B S D"],
    chosen: Int[Array, "B S k"],
    weights: Float[Array, "B S k"],
    valid: Bool[Array, "B S"],
    kernels: Kernels,
    act: Callable[[jax.Array], jax.Array],
    capacity: float | None = None,
) -> tuple[Float[Array, "B S D"], Bool[Array, "B S k"]]:
    """Each token through its experts.

    Args:
      x: [B, S, D].
      chosen: int [B, S, k], experts of each token, all different.
      weights: [B, S, k].
      valid: bool [B, S]; padding takes no capacity.
      kernels: of all experts.
      act: of the gate.
      capacity: an expert takes `capacity_of` tokens of each row, first choices first, then in
        order; what does not fit gets nothing from it. None for dropless, as is one that takes all.

    Returns:
      [B, S, D], and bool [B, S, k], which choices were served.
    """
    sizes = auto_axes()
    experts, tokens = kernels[0].shape[0], x.shape[1]
    room = tokens if capacity is None else capacity_of(capacity, tokens, chosen.shape[-1], experts)
    across = sizes.get(AXIS, 1) if experts % sizes.get(AXIS, 1) == 0 else 1
    rows = tuple(name for name in BATCH if name in sizes)
    stored = "fsdp" if "fsdp" in sizes and x.shape[-1] % sizes["fsdp"] == 0 else None

    def part(x, chosen, weights, valid, gate, up, down):
        # One product for gate and up: the rows are laid out in blocks once. Gathered in here, so
        # that a gradient is added up and cut in one: outside, every device would get all of it.
        both = beside(gate, up)
        if stored:
            both = lax.all_gather(both, stored, axis=1, tiled=True)
            down = lax.all_gather(down, stored, axis=2, tiled=True)
        kernels = both, down
        if room < x.shape[1]:
            y, served = _limited(x, chosen, weights, valid, kernels, act, across, room)
        else:
            y, served = _dropless(x, chosen, weights, kernels, act, across)
        return (lax.psum(y, "tensor") if width else y), served

    inner = kernels[0].shape[-1]
    width = "tensor" if "tensor" in sizes and inner % sizes["tensor"] == 0 else None
    if len(x) % math.prod(sizes[name] for name in rows) or not (rows or width):
        across, width, stored = 1, None, None
        return part(x, chosen, weights, valid, *kernels)
    spread = AXIS if across > 1 else None
    wide = PartitionSpec(spread, stored, width)
    cut = PartitionSpec(rows)
    return jax.shard_map(
        part,
        in_specs=(cut, cut, cut, cut, wide, wide, PartitionSpec(spread, width, stored)),
        out_specs=(cut, cut),
        check_vma=False,
    )(x, chosen, weights, valid, *kernels)


def _gated(rows, sizes, kernels, act, room=1):
    """[M, D] sorted by expert -> [M, D], each row through the gated layer of its expert."""
    both, down = kernels
    hidden, linear = jnp.split(grouped(rows, both, sizes, room), 2, axis=-1)
    return grouped(act(hidden) * linear, down, sizes, room)


# --- dropless ------------------------------------------------------------------------------------


def _dropless(x, chosen, weights, kernels, act, across):
    """Sort the k copies of every token by expert, multiply, put them back and add them up."""
    shape, k = x.shape, chosen.shape[-1]
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=kernels[0].shape[0] * across)
    rows = x.reshape(-1, shape[-1])[order // k]
    rows = _gated(rows, sizes, kernels, act) if across == 1 else _far(rows, sizes, kernels, act)
    back = jnp.argsort(order)
    y = rows[back].reshape(-1, k, shape[-1])
    y = jnp.einsum("tkd,tk->td", y, weights.reshape(-1, k).astype(y.dtype))
    return y.reshape(shape), jnp.ones(chosen.shape, bool)


def _far(rows, sizes, kernels, act):
    """`_gated` of rows whose experts are on other devices; `sizes` counts those of all experts."""
    own = kernels[0].shape[0]
    here = lax.axis_index(AXIS)
    # [from, to, expert of the receiver]: what every device sends to every other.
    table = lax.all_gather(sizes, AXIS).reshape(-1, len(sizes) // own, own)
    counts = table.sum(axis=-1)
    received = _exchange(rows, counts, here)
    # From each sender rows sorted by expert: sort those of all, and what is not there behind them.
    mine = table[:, here]
    place = jnp.arange(len(rows))
    ends = jnp.cumsum(mine, axis=-1)
    group = jax.vmap(lambda end: jnp.searchsorted(end, place, side="right"))(ends).reshape(-1)
    order = jnp.argsort(group, stable=True)
    total = mine.sum(axis=0)
    there = (jnp.arange(len(order)) < total.sum())[:, None]
    y = _gated(received.reshape(len(order), -1)[order], total, kernels, act, len(counts))
    y = jnp.where(there, y, 0)
    y = y[jnp.argsort(order)].reshape(received.shape)
    return _return(y, counts, here)


def _exchange(rows, counts, here):
    """[M, D] sorted by receiver -> [devices, M, D], what each device has sent to this one.

    No device knows how much it will be sent, so there is room for everything of everyone. A TPU or
    GPU moves only what is there; a CPU has no such instruction and moves the room.
    """
    devices, room = len(counts), len(rows)
    starts = jnp.cumsum(counts, axis=1) - counts

    def ragged(rows):
        empty = jnp.zeros((devices * room, rows.shape[1]), rows.dtype)
        to = jnp.full((devices,), here * room)
        return lax.ragged_all_to_all(
            *(rows, empty, starts[here], counts[here], to, counts[:, here]), axis_name=AXIS
        ).reshape(devices, room, -1)

    def padded(rows):
        place = jnp.arange(room)
        taken = jnp.where(place < counts[here][:, None], starts[here][:, None] + place, room)
        parts = jnp.take(rows, taken, axis=0, mode="fill", fill_value=0)
        with hints.room_for(devices):
            return lax.all_to_all(parts, AXIS, 0, 0)

    return lax.platform_dependent(rows, cpu=padded, default=ragged)


def _return(parts, counts, here):
    """[devices, M, D], for each device what it had sent -> [M, D], what this one gets back."""
    devices, room = parts.shape[:2]
    starts = jnp.cumsum(counts, axis=1) - counts

    def ragged(parts):
        rows = parts.reshape(devices * room, -1)
        sent = counts[:, here]
        return lax.ragged_all_to_all(
            rows,
            jnp.zeros((room, rows.shape[1]), rows.dtype),
            jnp.arange(devices) * room,
            sent,
            starts[:, here],
            counts[here],
            axis_name=AXIS,
        )

    def padded(parts):
        with hints.room_for(devices):
            back = lax.all_to_all(parts, AXIS, 0, 0)
        place = jnp.arange(room)
        device = jnp.searchsorted(jnp.cumsum(counts[here]), place, side="right")
        device = jnp.minimum(device, devices - 1)
        return back[device, place - starts[here][device]]

    return lax.platform_dependent(parts, cpu=padded, default=ragged)


# --- up to a capacity ----------------------------------------------------------------------------


def _limited(x, chosen, weights, valid, kernels, act, across, room):
    """Every expert a fixed number of places for each row, so that all products are dense."""
    batch, tokens, width = x.shape
    k, experts = chosen.shape[-1], kernels[0].shape[0] * across
    # First choices of all tokens, then second choices, ...
    flat = chosen.swapaxes(1, 2).reshape(batch, -1)
    asks = jnp.tile(valid, (1, k))
    wanted = jax.nn.one_hot(flat, experts, dtype=jnp.int32) * asks[..., None]
    turn = jnp.take_along_axis(jnp.cumsum(wanted, axis=1), flat[..., None], axis=2)[..., 0] - 1
    served = asks & (turn < room)
    slot = jnp.where(served, flat * room + turn, experts * room)
    rows = jnp.arange(batch)[:, None]
    token = jnp.tile(jnp.arange(tokens), k)
    places = jnp.zeros((batch, experts * room, width), x.dtype)
    places = places.at[rows, slot].set(x[:, token], mode="drop")
    places = places.reshape(batch, experts, room, width)
    if across > 1:
        places = lax.all_to_all(places, AXIS, 1, 0, tiled=True)
    both, down = kernels
    hidden, linear = jnp.split(batched(places, both), 2, axis=-1)
    places = batched(act(hidden) * linear, down)
    if across > 1:
        places = lax.all_to_all(places, AXIS, 0, 1, tiled=True)
    places = places.reshape(batch, experts * room, width)
    y = jnp.take_along_axis(places, jnp.minimum(slot, experts * room - 1)[..., None], axis=1)
    y = jnp.where(served[..., None], y, 0).reshape(batch, k, tokens, width)
    served = served.reshape(batch, k, tokens).swapaxes(1, 2)
    return jnp.einsum("bksd,bsk->bsd", y, weights.astype(y.dtype)), served
