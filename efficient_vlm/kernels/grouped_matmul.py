"""Grouped matrix multiplication: the one entry point of every mixture-of-experts layer.

`grouped_matmul(lhs, rhs, group_sizes)` multiplies consecutive groups of rows, each by its own
matrix. The implementation is chosen when the program is lowered, not when it is traced, so that a
program compiled for a TPU on a CPU host gets the TPU form:

  TPU        `jax.lax.ragged_dot`, and for the gradient of the matrices `tgmm` of JAX's MegaBlox
             kernels (arXiv 2211.15841): XLA would expand that to one masked product per group.
  GPU        a loop over batched products: one block of rows of every group at a time, as many as
             the largest group needs. No matrix is copied, and every sum has one order.
  CPU        a loop over blocks of rows of one group each, sliced in place.

On GPUs and CPUs XLA expands `ragged_dot` to one masked product per group: as many times the work as
there are groups.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from efficient_vlm.errors import UserError
from efficient_vlm.kernels import hints
from efficient_vlm.kernels.attention.platforms import interpretation
from efficient_vlm.kernels.manual import alike, varies, zeros
from efficient_vlm.shapes import Array

__all__ = ["grouped_matmul", "grouped_matmul_reference"]

# Gradient on a TPU: rows of a tile; largest number of tiles (the kernel builds its lists with
# float32 bins, some of which are wrong from 3,000 on); largest number of columns of a tile.
_TILE_ROWS, _MOST_TILES, _TILE, _LANES = 128, 1024, 512, 128


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
    room: int = 1,
) -> Float[Array, "M N"]:
    """Multiplies each group of rows of `lhs` by its own matrix of `rhs`.

    Args:
      lhs: [M, K], rows sorted by group.
      rhs: [E, K, N], one matrix per group.
      group_sizes: int32 [E] with sum M or less; a group may be empty.
      room: M over the usual number of rows in use, for estimates of the work.

    Returns:
      [M, N] in the dtype of `lhs`, undefined in rows after the last group; products are accumulated
      in float32. Differentiable in `lhs` and `rhs`.

    Raises:
      UserError: shapes that do not fit.
    """
    # NumPy arrays could not be indexed by a traced block number inside a loop.
    lhs, rhs, sizes = map(jnp.asarray, (lhs, rhs, group_sizes))
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1]:
        raise UserError(
            f"grouped_matmul: lhs {lhs.shape} and rhs {rhs.shape} do not fit",
            allowed="[M, K] and [E, K, N]",
        )
    if not len(rhs):
        raise UserError(f"grouped_matmul: rhs has shape {rhs.shape}", allowed="one matrix or more")
    if sizes.shape != rhs.shape[:1] or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise UserError(
            f"grouped_matmul: group_sizes is {sizes.dtype} of shape {sizes.shape}",
            allowed=f"integers [{len(rhs)}], one for each matrix",
        )
    return _grouped_matmul(room, *alike(lhs, rhs, sizes.astype(jnp.int32)))


def grouped_matmul_reference(
    lhs: Float[Array, "M K"], rhs: Float[Array, "E K N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M N"]:
    """The same by definition: every row times the matrix of its group; for tests."""
    group = jnp.repeat(jnp.arange(rhs.shape[0]), group_sizes, total_repeat_length=lhs.shape[0])
    return jnp.einsum("mk,mkn->mn", lhs, rhs[group])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(room, lhs, rhs, group_sizes):
    # The default is what `costs.traced` counts.
    gpus = ((name, _side_by_side) for name in ("cuda", "rocm"))
    forms = (("cpu", _blocked), *gpus, ("default", _ragged))
    return _by_platform(forms, room)(lhs, rhs, group_sizes)


def _forward(room, lhs, rhs, group_sizes):
    return _grouped_matmul(room, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(room, residuals, cotangent):
    lhs, rhs, group_sizes = residuals
    d_lhs = _grouped_matmul(room, cotangent, rhs.swapaxes(1, 2), group_sizes)
    # JAX's kernel cannot state over which axes of a caller's mesh its result varies.
    tpu = _side_by_side_outer if varies(lhs) else _tiled_outer
    forms = (("cpu", _blocked_outer), ("tpu", tpu), ("default", _side_by_side_outer))
    return d_lhs, _by_platform(forms, room, rhs.dtype)(lhs, cotangent, group_sizes), None


_grouped_matmul.defvjp(_forward, _backward)


@functools.lru_cache(maxsize=64)
def _by_platform(forms: tuple, room: int, dtype=None):
    """A function of arrays that lowers to the form of the platform."""
    options = dict(room=room) if dtype is None else dict(room=room, dtype=dtype)
    forms = {name: functools.partial(form, **options) for name, form in forms}

    # Sequential under `vmap`, because `ragged_dot` has no batching rule on any platform. `jit` and
    # the cache are for calls outside of a program, each of which would otherwise compile again.
    @jax.jit
    @jax.custom_batching.sequential_vmap
    def run(*args):
        with hints.room_for(room) if room > 1 else contextlib.nullcontext():
            return lax.platform_dependent(*args, **forms)

    return run


_dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


def _block_rows(rows: int, groups: int, most: int = 256) -> int:
    """Rows per block: large enough for an efficient product, small enough to waste little."""
    mean = max(1, rows // groups)
    return min(most, max(16, (1 << (mean - 1).bit_length()) // 2))


# --- TPU -----------------------------------------------------------------------------------------


def _ragged(lhs, rhs, group_sizes, room=1):
    del room
    return lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=jnp.float32).astype(
        lhs.dtype
    )


def _tiled_outer(lhs, cotangent, group_sizes, dtype=jnp.float32, room=1):
    """[E, K, N]: lhs^T @ cotangent per group, summed in float32, in row tiles masked by group."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    del room
    sums, rows = dtype, _TILE_ROWS
    while len(lhs) > rows * _MOST_TILES:
        rows *= 2
    if {lhs.dtype.name, jnp.dtype(dtype).name} & {"float16", "float64"}:  # Not supported.
        lhs, cotangent, sums = lhs.astype(jnp.float32), cotangent.astype(jnp.float32), jnp.float32
    more = -len(lhs) % rows
    lhs, cotangent = (jnp.pad(x, ((0, more), (0, 0))) for x in (lhs, cotangent))
    wide = (min(_TILE, -(-x.shape[1] // _LANES) * _LANES) for x in (lhs, cotangent))
    return tgmm(
        *(lhs.T, cotangent, group_sizes),
        preferred_element_type=sums,
        tiling=(rows, *wide),
        interpret=interpretation(),
    ).astype(dtype)


# --- GPU -----------------------------------------------------------------------------------------


def _side_by_side(lhs, rhs, group_sizes, room=1):
    rows, outer = lhs.shape[0], rhs.shape[2]
    if not rows:
        return zeros((0, outer), lhs.dtype, lhs)

    def step(at, valid, y):
        part = _dot(jnp.take(lhs, at, axis=0, mode="clip"), rhs).astype(y.dtype)
        # Invalid rows go to distinct indices after the end, where the scatter drops them.
        at = jnp.where(valid, at, rows + jnp.arange(at.size).reshape(at.shape))
        return y.at[at].set(part, mode="drop", unique_indices=True)

    return _over_blocks(group_sizes, rows, room, step, zeros((rows, outer), lhs.dtype, lhs))


def _side_by_side_outer(lhs, cotangent, group_sizes, dtype=jnp.float32, room=1):
    (rows, inner), outer = lhs.shape, cotangent.shape[1]

    def step(at, valid, total):
        at = jnp.where(valid, at, rows)
        x, g = (jnp.take(a, at, axis=0, mode="fill", fill_value=0) for a in (lhs, cotangent))
        return total + _dot(x.swapaxes(1, 2), g)

    total = zeros((len(group_sizes), inner, outer), jnp.float32, lhs)
    total = _over_blocks(group_sizes, rows, room, step, total) if rows else total
    return total.astype(dtype)


def _over_blocks(group_sizes, rows: int, room: int, step, carry):
    """Runs step(at, valid, carry) for the first block of rows of every group, then the second, ...

    at int32 and valid bool [E, block]: numbers of rows, and which of them belong to the group.
    """
    block = _block_rows(rows, len(group_sizes) * room, 512)
    ends = jnp.cumsum(group_sizes)[:, None]
    first = ends - group_sizes[:, None] + jnp.arange(block)

    def turn(i, carry):
        at = first + i * block
        return step(at, at < ends, carry)

    turns = (jnp.max(group_sizes, initial=0) + block - 1) // block
    with hints.about_turns(-(-rows // (len(group_sizes) * room * block))):
        return lax.fori_loop(0, turns, turn, carry)


# --- CPU -----------------------------------------------------------------------------------------


def _blocks(group_sizes, rows: int, block: int):
    """Blocks of rows that cover each group; the last one of a group may reach into the next.

    Returns:
      group, first [P]: the group and the first row of each block; P is the worst case.
      end [E]: one after the last row of each group.
      used: the number of blocks in use.
    """
    groups = group_sizes.shape[0]
    end = jnp.cumsum(group_sizes)
    blocks = (group_sizes + block - 1) // block
    block_ends = jnp.cumsum(blocks)
    index = jnp.arange(rows // block + groups, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(block_ends, index, side="right"), groups - 1)
    first = (end - group_sizes)[group] + (index - (block_ends - blocks)[group]) * block
    return group, first, end, block_ends[-1]


def _blocked(lhs, rhs, group_sizes, room=1):
    rows, outer = lhs.shape[0], rhs.shape[2]
    if not rows:
        return zeros((0, outer), lhs.dtype, lhs)
    block = min(rows, _block_rows(rows, rhs.shape[0]))
    _, first, _, _ = _blocks(group_sizes, rows, block)
    counts = (group_sizes + block - 1) // block
    # Only groups with rows, each once: slicing a matrix copies it.
    some = jnp.argsort(group_sizes == 0, stable=True)
    until = jnp.cumsum(counts)[some]
    usual = -(-rows // (block * room))
    groups = min(len(rhs), usual)

    def of_group(i, y):
        matrix = rhs[some[i]]

        def of_block(j, y):
            # Rows of the next group first get a wrong product, then their own: blocks are in order.
            # The last blocks start earlier, to stay inside the array; `done` keeps finished rows.
            start = jnp.minimum(first[j], rows - block)
            part = _dot(lax.dynamic_slice_in_dim(lhs, start, block), matrix)
            done = (start + jnp.arange(block) < first[j])[:, None]
            part = jnp.where(done, lax.dynamic_slice_in_dim(y, start, block), part)
            return lax.dynamic_update_slice_in_dim(y, part, start, 0)

        with hints.about_turns(-(-usual // groups)):
            return lax.fori_loop(until[i] - counts[some[i]], until[i], of_block, y)

    with hints.about_turns(groups):
        y = zeros((rows, outer), jnp.float32, lhs)
        y = lax.fori_loop(0, jnp.sum(group_sizes > 0), of_group, y)
    return y.astype(lhs.dtype)


def _blocked_outer(lhs, cotangent, group_sizes, dtype=jnp.float32, room=1):
    rows, inner = lhs.shape
    outer, groups = cotangent.shape[1], group_sizes.shape[0]
    block = min(128, 2 * _block_rows(rows, groups))
    group, first, end, used = _blocks(group_sizes, rows, block)

    def in_group(i):
        """bool [..., block]: which rows of block i belong to its group."""
        at = first[i][..., None] + jnp.arange(block)
        return (at < end[group[i]][..., None]) & (i < used)[..., None]

    if len(group) * inner * outer <= rows * (inner + outer):
        # The products of all blocks are no larger than the operands: one batched product, then one
        # with a one-hot matrix that sums the blocks of a group. A scatter is far slower.
        index = jnp.arange(len(group))
        at = jnp.where(in_group(index), first[:, None] + jnp.arange(block), rows)
        x, g = (jnp.take(a, at, axis=0, mode="fill", fill_value=0) for a in (lhs, cotangent))
        member = jax.nn.one_hot(group, groups, axis=0, dtype=jnp.float32)
        return jnp.einsum("ep,pkn->ekn", member, _dot(x.swapaxes(1, 2), g)).astype(dtype)
    x, g = (jnp.pad(a, ((0, block), (0, 0))) for a in (lhs, cotangent))

    def body(i, total):
        mine = in_group(i)[:, None]
        rows = (jnp.where(mine, lax.dynamic_slice_in_dim(a, first[i], block), 0) for a in (x, g))
        return total.at[group[i]].add(_dot(next(rows).T, next(rows)))

    with hints.about_turns(-(-rows // (block * room))):
        total = lax.fori_loop(0, used, body, zeros((groups, inner, outer), jnp.float32, lhs))
    return total.astype(dtype)
