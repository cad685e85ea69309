"""Grouped matrix multiplication: the one entry behind every mixture-of-experts layer.

`grouped_matmul(lhs, rhs, group_sizes)` multiplies consecutive groups of rows, each by a matrix of
its own. The implementation is chosen when the program is lowered, not when it is traced, so that a
program compiled for a TPU on a CPU host gets the TPU form:

  TPU, GPU   `jax.lax.ragged_dot`, native on both.
  CPU        a blocked form: rows are copied to blocks that belong to one group each. There
             `ragged_dot` is expanded to one masked product per group, 10 to 100 times the work.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["grouped_matmul", "grouped_matmul_reference"]


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Multiplies each group of rows of `lhs` by its own matrix of `rhs`.

    Args:
      lhs: [M, K], rows sorted by group.
      rhs: [E, K, N], one matrix per group.
      group_sizes: int32 [E] with sum M; a group may be empty.

    Returns:
      [M, N] in the dtype of `lhs`; products are accumulated in float32. Differentiable in `lhs`
      and `rhs`.
    """
    # NumPy arrays, too: inside a loop they could not be indexed by a traced block number.
    sizes = jnp.asarray(group_sizes, jnp.int32)
    return _grouped_matmul(jnp.asarray(lhs), jnp.asarray(rhs), sizes)


def grouped_matmul_reference(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The same by definition: every row times the matrix of its group; for tests."""
    group = jnp.repeat(jnp.arange(rhs.shape[0]), group_sizes, total_repeat_length=lhs.shape[0])
    return jnp.einsum("mk,mkn->mn", lhs, rhs[group])


@jax.custom_vjp
def _grouped_matmul(lhs, rhs, group_sizes):
    return lax.platform_dependent(lhs, rhs, group_sizes, cpu=_blocked, default=_ragged)


def _forward(lhs, rhs, group_sizes):
    return _grouped_matmul(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(residuals, cotangent):
    lhs, rhs, group_sizes = residuals
    d_lhs = _grouped_matmul(cotangent, rhs.swapaxes(1, 2), group_sizes)
    d_rhs = lax.platform_dependent(
        lhs, cotangent, group_sizes, cpu=_blocked_outer, default=_ragged_outer
    )
    return d_lhs, d_rhs.astype(rhs.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def _ragged(lhs, rhs, group_sizes):
    return lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=jnp.float32).astype(
        lhs.dtype
    )


def _ragged_outer(lhs, cotangent, group_sizes):
    """[E, K, N]: per group, lhs^T @ cotangent (the ragged dimension is contracted)."""
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return lax.ragged_dot_general(
        lhs, cotangent, group_sizes, numbers, preferred_element_type=jnp.float32
    )


# --- CPU -----------------------------------------------------------------------------------------


def _block_rows(rows: int, groups: int) -> int:
    """Rows per block: large enough for an efficient product, small enough to pad little."""
    mean = max(1, rows // groups)
    return min(128, max(16, 1 << (mean - 1).bit_length()))


def _copies_are_cheap(num_blocks: int, rows: int, inner: int, outer: int) -> bool:
    """Whether one weight matrix per block is no more data than the activations themselves.

    If so, all blocks go through one batched product; otherwise a loop reads each matrix in place.
    """
    return num_blocks * inner * outer <= rows * (inner + outer)


def _layout(group_sizes, rows: int, block: int):
    """Where each row goes when every group is padded to whole blocks.

    Returns:
      group [P]: the group of each block; P is static, the worst case over all group sizes.
      source [P, block]: the row in each slot, or `rows` for an empty slot.
      slot [rows]: the slot of each row, counted over all blocks.
      used: the number of blocks that hold a row.
    """
    groups = group_sizes.shape[0]
    num_blocks = rows // block + groups
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    blocks = (group_sizes + block - 1) // block
    block_ends = jnp.cumsum(blocks)
    block_starts = block_ends - blocks

    index = jnp.arange(num_blocks, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(block_ends, index, side="right"), groups - 1)
    first = starts[group] + (index - block_starts[group]) * block
    source = first[:, None] + jnp.arange(block, dtype=jnp.int32)
    live = (source < ends[group][:, None]) & (index < block_ends[-1])[:, None]

    row = jnp.arange(rows, dtype=jnp.int32)
    row_group = jnp.minimum(jnp.searchsorted(ends, row, side="right"), groups - 1)
    slot = block_starts[row_group] * block + row - starts[row_group]
    return group, jnp.where(live, source, rows), slot, block_ends[-1]


def _to_blocks(x, source):
    return jnp.take(x, source, axis=0, mode="fill", fill_value=0)


_dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


def _blocked(lhs, rhs, group_sizes):
    rows, inner = lhs.shape
    groups, _, outer = rhs.shape
    block = _block_rows(rows, groups)
    group, source, slot, used = _layout(group_sizes, rows, block)
    x = _to_blocks(lhs, source)
    if _copies_are_cheap(len(group), rows, inner, outer):
        y = _dot(x, rhs[group])
    else:

        def body(i, y):
            return lax.dynamic_update_index_in_dim(y, _dot(x[i], rhs[group[i]]), i, 0)

        y = jnp.zeros((len(group), block, outer), jnp.float32)
        y = lax.fori_loop(0, used, body, y)
    return y.reshape(-1, outer)[slot].astype(lhs.dtype)


def _blocked_outer(lhs, cotangent, group_sizes):
    rows, inner = lhs.shape
    outer = cotangent.shape[1]
    groups = group_sizes.shape[0]
    block = _block_rows(rows, groups)
    group, source, _, used = _layout(group_sizes, rows, block)
    x = _to_blocks(lhs, source).swapaxes(1, 2)
    g = _to_blocks(cotangent, source)
    if _copies_are_cheap(len(group), rows, inner, outer):
        # A product with a one-hot matrix adds up the blocks of a group: a scatter is far slower.
        member = jax.nn.one_hot(group, groups, axis=0, dtype=jnp.float32)
        return jnp.einsum("ep,pkn->ekn", member, _dot(x, g))

    def body(i, total):
        return total.at[group[i]].add(_dot(x[i], g[i]))

    return lax.fori_loop(0, used, body, jnp.zeros((groups, inner, outer), jnp.float32))
