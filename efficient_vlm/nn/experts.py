"""Dispatch of tokens to experts: dropless or with a capacity, on one device or many.

On a mesh every device sorts its own tokens, sends each to the device of its expert by an
all-to-all, and sums what returns (GShard, arXiv 2006.16668). Nothing is sorted or gathered over the
whole batch, unlike in the program that XLA's partitioner would derive from single-device code.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from efficient_vlm.kernels import hints
from efficient_vlm.nn.linear import Pair, Weight, batched, beside, grouped, specs_of
from efficient_vlm.shapes import Array
from efficient_vlm.sharding import BATCH, auto_axes

__all__ = ["Kernels", "capacity_of", "dispatch"]

# Gate and up [E, D, F], down [E, F, D].
Kernels = tuple[Weight, Weight, Weight]
AXIS = "expert"


def capacity_of(factor: float, tokens: int, top_k: int, experts: int) -> int:
    """Number of tokens of one row that an expert accepts (Switch, arXiv 2101.03961, eq. 3).

    At most `tokens`, at which nothing is dropped, as in decoding, whose rows have one token.
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
    """Applies to each token its experts.

    Args:
      x: [B, S, D].
      chosen: int [B, S, k], distinct experts of each token.
      weights: [B, S, k].
      valid: bool [B, S]; padding takes no capacity.
      kernels: weights of all experts.
      act: activation of the gate.
      capacity: factor of `capacity_of`. An expert accepts that many tokens of each row, first
        choices first, then in order, and contributes nothing to others. None for dropless.

    Returns:
      [B, S, D], and bool [B, S, k], the choices that were served.
    """
    sizes = auto_axes()
    experts, tokens = kernels[0].shape[0], x.shape[1]
    room = tokens if capacity is None else capacity_of(capacity, tokens, chosen.shape[-1], experts)
    across = sizes.get(AXIS, 1) if experts % sizes.get(AXIS, 1) == 0 else 1
    rows = tuple(name for name in BATCH if name in sizes)
    stored = "fsdp" if "fsdp" in sizes and x.shape[-1] % sizes["fsdp"] == 0 else None

    def part(x, chosen, weights, valid, gate, up, down):
        # One product for gate and up lays out the rows in blocks once. Gathered inside, so that
        # gradients are reduced and scattered in one step; outside, every device would hold all.
        both = beside(gate, up)
        if stored:
            each = Pair(*specs[:2]) if isinstance(both, Pair) else specs[0]
            both, down = _gathered(both, each), _gathered(down, specs[2])
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
    narrow = PartitionSpec(spread, width, stored)
    specs = tuple(map(specs_of, kernels, (wide, wide, narrow)))
    return jax.shard_map(
        part,
        in_specs=(cut, cut, cut, cut, *specs),
        out_specs=(cut, cut),
        check_vma=False,
    )(x, chosen, weights, valid, *kernels)


def _gathered(kernel, specs):
    """The whole of a kernel, of which each device along "fsdp" has a part."""

    def gather(array, spec):
        if "fsdp" not in spec:
            return array
        return lax.all_gather(array, "fsdp", axis=tuple(spec).index("fsdp"), tiled=True)

    return jax.tree.map(gather, kernel, specs)


def _gated(rows, sizes, kernels, act, room=1):
    """[M, D] sorted by expert -> [M, D], the gated layer of each row's expert."""
    both, down = kernels
    hidden, linear = jnp.split(grouped(rows, both, sizes, room), 2, axis=-1)
    return grouped(act(hidden) * linear, down, sizes, room)


# --- dropless ------------------------------------------------------------------------------------


def _dropless(x, chosen, weights, kernels, act, across):
    """Sorts the k copies of every token by expert, multiplies, restores the order and sums."""
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
    """`_gated` of rows whose experts are on other devices; `sizes` has the rows of all experts."""
    own = kernels[0].shape[0]
    device = lax.axis_index(AXIS)
    # [sender, receiver, expert of the receiver]: rows that each device sends to each other.
    table = lax.all_gather(sizes, AXIS).reshape(-1, len(sizes) // own, own)
    counts = table.sum(axis=-1)
    received = _exchange(rows, counts, device)
    # Rows are sorted by expert within each sender: sort them all, empty slots last.
    mine = table[:, device]
    slots = jnp.arange(len(rows))
    ends = jnp.cumsum(mine, axis=-1)
    group = jax.vmap(lambda end: jnp.searchsorted(end, slots, side="right"))(ends).reshape(-1)
    order = jnp.argsort(group, stable=True)
    total = mine.sum(axis=0)
    filled = (jnp.arange(len(order)) < total.sum())[:, None]
    y = _gated(received.reshape(len(order), -1)[order], total, kernels, act, len(counts))
    y = jnp.where(filled, y, 0)
    y = y[jnp.argsort(order)].reshape(received.shape)
    return _return(y, counts, device)


def _exchange(rows, counts, own):
    """[M, D] sorted by receiver -> [devices, M, D], the rows that each device sent to this one.

    The number of received rows is unknown, so each sender gets room for all of its rows. TPUs and
    GPUs transfer only the filled part; CPUs lack that operation and transfer everything.
    """
    devices, room = len(counts), len(rows)
    starts = jnp.cumsum(counts, axis=1) - counts

    def ragged(rows):
        empty = jnp.zeros((devices * room, rows.shape[1]), rows.dtype)
        to = jnp.full((devices,), own * room)
        return lax.ragged_all_to_all(
            *(rows, empty, starts[own], counts[own], to, counts[:, own]), axis_name=AXIS
        ).reshape(devices, room, -1)

    def padded(rows):
        slots = jnp.arange(room)
        taken = jnp.where(slots < counts[own][:, None], starts[own][:, None] + slots, room)
        parts = jnp.take(rows, taken, axis=0, mode="fill", fill_value=0)
        with hints.room_for(devices):
            return lax.all_to_all(parts, AXIS, 0, 0)

    return lax.platform_dependent(rows, cpu=padded, default=ragged)


def _return(parts, counts, own):
    """The inverse of `_exchange`: [devices, M, D] -> [M, D], the rows that this device had sent."""
    devices, room = parts.shape[:2]
    starts = jnp.cumsum(counts, axis=1) - counts

    def ragged(parts):
        rows = parts.reshape(devices * room, -1)
        sent = counts[:, own]
        return lax.ragged_all_to_all(
            rows,
            jnp.zeros((room, rows.shape[1]), rows.dtype),
            jnp.arange(devices) * room,
            sent,
            starts[:, own],
            counts[own],
            axis_name=AXIS,
        )

    def padded(parts):
        with hints.room_for(devices):
            back = lax.all_to_all(parts, AXIS, 0, 0)
        slots = jnp.arange(room)
        device = jnp.searchsorted(jnp.cumsum(counts[own]), slots, side="right")
        device = jnp.minimum(device, devices - 1)
        return back[device, slots - starts[own][device]]

    return lax.platform_dependent(parts, cpu=padded, default=ragged)


# --- with a capacity -----------------------------------------------------------------------------


def _limited(x, chosen, weights, valid, kernels, act, across, room):
    """Gives every expert a fixed number of slots per row, so that all products are dense."""
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
    slots = jnp.zeros((batch, experts * room, width), x.dtype)
    slots = slots.at[rows, slot].set(x[:, token], mode="drop")
    slots = slots.reshape(batch, experts, room, width)
    if across > 1:
        slots = lax.all_to_all(slots, AXIS, 1, 0, tiled=True)
    both, down = kernels
    hidden, linear = jnp.split(batched(slots, both), 2, axis=-1)
    slots = batched(act(hidden) * linear, down)
    if across > 1:
        slots = lax.all_to_all(slots, AXIS, 0, 1, tiled=True)
    slots = slots.reshape(batch, experts * room, width)
    y = jnp.take_along_axis(slots, jnp.minimum(slot, experts * room - 1)[..., None], axis=1)
    y = jnp.where(served[..., None], y, 0).reshape(batch, k, tokens, width)
    served = served.reshape(batch, k, tokens).swapaxes(1, 2)
    return jnp.einsum("bksd,bsk->bsd", y, weights.astype(y.dtype)), served
