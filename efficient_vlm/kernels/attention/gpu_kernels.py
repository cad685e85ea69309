"""The bodies of the Hopper kernels: two warpgroups compute 64 rows of the map each, one fetches.

Forward and the gradient of q keep queries as rows; the gradients of k, v and of the bias, and
importance keep keys as rows (S^T = K Q^T), so that sums over queries are sums of rows.
Exponentials are in base 2.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_vlm.kernels.attention.compat import load, transposed
from efficient_vlm.kernels.attention.gpu_call import (
    BIAS,
    BLOCK,
    DELTA,
    GAIN,
    HIGH,
    KEY_BLOCK,
    KEY_SEGMENT,
    LOG2E,
    LOW,
    LSE,
    NEAR,
    NUMBERS,
    POSITION,
    ROWS,
    SEGMENT,
    WARPGROUPS,
    WEIGHT,
    Static,
)
from efficient_vlm.kernels.attention.mask import SHARED

_NEGATIVE = -1e30
_OF_ROWS = plgpu.Layout.WGMMA.reduce(1)
_OF_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_STAGES = 2


def matrix(*shape, dtype):
    """Fast memory for matrices that wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=_SWIZZLED)


def matrix_spec(rows: int, dim: int, index):
    """One step's matrix."""
    return plgpu.BlockSpec(block_shape=(rows, dim), index_map=index, transforms=list(_SWIZZLED))


def numbers_spec(count: int, index):
    """One step's numbers of tokens."""
    return plgpu.BlockSpec(block_shape=(NUMBERS, count), index_map=index)


def pipeline(step, context, grid, in_specs, operands):
    """`step` over a list of blocks, which the third warpgroup fetches ahead."""
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(grid,),
        max_concurrent_steps=_STAGES,
        num_compute_wgs=WARPGROUPS,
        memory_registers=24,
        wg_axis="warpgroup",
        manual_consumed_barriers=True,
        compute_context=context,
        in_specs=in_specs,
    )(*operands)


def forward_kernel(
    counts, table, q, k, v, rows, columns, out, lse, q_own, rows_own, lse_own, barriers,
    *, call: Static,
):  # fmt: skip
    """Online softmax over the listed blocks of keys."""
    batch, head, group = _place()
    kv_head = lax.div(head, jnp.int32(call.groups))
    base = lax.axis_index("block") * (WARPGROUPS * ROWS) + group * ROWS
    line = _line(call, batch)

    def context(loop):
        _fetch(q.at[batch, head, pl.ds(base, ROWS)], q_own.at[group], barriers.at[group])
        _fetch(rows.at[batch, 0, :, pl.ds(base, ROWS)], rows_own.at[group], barriers.at[group])
        plgpu.barrier_wait(barriers.at[group])
        acc = plgpu.layout_cast(jnp.zeros((ROWS, v.shape[-1]), jnp.float32), plgpu.Layout.WGMMA)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), _OF_ROWS)
        top = plgpu.layout_cast(jnp.full((ROWS,), _NEGATIVE, jnp.float32), _OF_ROWS)
        acc, total, top = loop((acc, total, top))
        some = total > 0
        norm = jnp.where(some, total, 1.0)
        share = jnp.where(some, 1.0 / norm, 0.0)
        q_own[group] = (acc * _by_row(share, acc.shape)).astype(out.dtype)
        log = (top + jnp.log2(norm)) / LOG2E
        lse_own[group] = jnp.where(some, log, jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_own.at[group], out.at[batch, head, pl.ds(base, ROWS)])
        plgpu.copy_smem_to_gmem(lse_own.at[group], lse.at[batch, head, pl.ds(base, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    def step(_, k_now, v_now, columns_now, k_done, v_done, columns_done, carry):
        acc, total, top = carry
        s = _product(q_own.at[group], transposed(k_now))
        plgpu.barrier_arrive(k_done)
        s, _ = _logits(call, s, _columns(columns_now, BIAS) if call.biased else None, _by_column)
        if call.masked:
            seen = _seen(call, s.shape, rows_own.at[group], columns_now, _row, _columns)
            s = jnp.where(seen, s, _NEGATIVE)
        plgpu.barrier_arrive(columns_done)
        higher = jnp.maximum(top, s.max(axis=1))
        p = jnp.exp2(s - _by_row(higher, s.shape))
        if call.masked:
            p = jnp.where(seen, p, 0.0)
        shrink = jnp.exp2(top - higher)
        total = total * shrink + p.sum(axis=1)
        acc = acc * _by_row(shrink, acc.shape)
        acc = _added(acc, p.astype(v.dtype), v_now)
        plgpu.barrier_arrive(v_done)
        return acc, total, higher

    pipeline(
        step,
        context,
        counts[line],
        [
            matrix_spec(call.step, k.shape[-1], lambda t: (table[line * call.steps + t], 0)),
            matrix_spec(call.step, v.shape[-1], lambda t: (table[line * call.steps + t], 0)),
            numbers_spec(call.step, lambda t: (0, table[line * call.steps + t])),
        ],
        (k.at[batch, kv_head], v.at[batch, kv_head], columns.at[batch]),
    )


def backward_q_kernel(
    counts, table, q, k, v, d_out, rows, columns, dq, q_own, d_own, rows_own, dq_own, barriers,
    *, call: Static,
):  # fmt: skip
    """The gradient of a block of queries, over the listed blocks of keys."""
    batch, head, group = _place()
    kv_head = lax.div(head, jnp.int32(call.groups))
    base = lax.axis_index("block") * (WARPGROUPS * ROWS) + group * ROWS
    line = _line(call, batch)

    def context(loop):
        here = pl.ds(base, ROWS)
        _fetch(q.at[batch, head, here], q_own.at[group], barriers.at[group])
        _fetch(d_out.at[batch, head, here], d_own.at[group], barriers.at[group])
        _fetch(rows.at[batch, head, :, here], rows_own.at[group], barriers.at[group])
        plgpu.barrier_wait(barriers.at[group])
        acc = plgpu.layout_cast(jnp.zeros((ROWS, q.shape[-1]), jnp.float32), plgpu.Layout.WGMMA)
        (acc,) = loop((acc,))
        dq_own[group] = (acc * call.scale).astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dq_own.at[group], dq.at[batch, head, here])
        plgpu.wait_smem_to_gmem(0)

    def step(_, k_now, v_now, columns_now, k_done, v_done, columns_done, carry):
        (acc,) = carry
        own = rows_own.at[group]
        s = _product(q_own.at[group], transposed(k_now))
        bias = _columns(columns_now, BIAS) if call.biased else None
        s, slope = _logits(call, s, bias, _by_column)
        p = jnp.exp2(s - _by_row(_row(own, LSE), s.shape))
        if call.masked:
            p = jnp.where(_seen(call, s.shape, own, columns_now, _row, _columns), p, 0.0)
        d_p = _product(d_own.at[group], transposed(v_now))
        plgpu.barrier_arrive(v_done)
        if call.weighed:
            weight = _by_row(_row(own, WEIGHT), s.shape)
            d_p = d_p + weight * _by_column(_columns(columns_now, GAIN), s.shape)
        plgpu.barrier_arrive(columns_done)
        d_s = p * (d_p - _by_row(_row(own, DELTA), s.shape))
        d_s = d_s if slope is None else d_s * slope
        acc = _added(acc, d_s.astype(k.dtype), k_now)
        plgpu.barrier_arrive(k_done)
        return (acc,)

    pipeline(
        step,
        context,
        counts[line],
        [
            matrix_spec(call.step, k.shape[-1], lambda t: (table[line * call.steps + t], 0)),
            matrix_spec(call.step, v.shape[-1], lambda t: (table[line * call.steps + t], 0)),
            numbers_spec(call.step, lambda t: (0, table[line * call.steps + t])),
        ],
        (k.at[batch, kv_head], v.at[batch, kv_head], columns.at[batch]),
    )


def backward_kv_kernel(
    counts, table, q, k, v, d_out, rows, columns, dk, dv, d_bias,
    k_own, v_own, columns_own, bias_own, barriers, *, call: Static, keys: bool, values: bool,
):  # fmt: skip
    """The gradients of a block of keys, over the listed blocks of queries of all their heads.

    Either that of k and of the bias, or that of v, or all: what registers there are for.
    """
    batch, kv_head, group = _place()
    base = lax.axis_index("block") * (WARPGROUPS * ROWS) + group * ROWS
    line = _line(call, batch)
    count = counts[line]

    def context(loop):
        here = pl.ds(base, ROWS)
        _fetch(k.at[batch, kv_head, here], k_own.at[group], barriers.at[group])
        _fetch(v.at[batch, kv_head, here], v_own.at[group], barriers.at[group])
        _fetch(columns.at[batch, :, here], columns_own.at[group], barriers.at[group])
        plgpu.barrier_wait(barriers.at[group])
        zeros = (jnp.zeros((ROWS, x.shape[-1]), jnp.float32) for x in (k, v))
        k_acc, v_acc = (plgpu.layout_cast(x, plgpu.Layout.WGMMA) for x in zeros)
        b_acc = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), _OF_ROWS)
        start = (k_acc if keys else None, v_acc if values else None, b_acc if keys else None)
        k_acc, v_acc, b_acc = loop(start)
        if keys:
            k_own[group] = (k_acc * call.scale).astype(dk.dtype)
            bias_own[group] = b_acc
        if values:
            v_own[group] = v_acc.astype(dv.dtype)
        plgpu.commit_smem()
        if keys:
            plgpu.copy_smem_to_gmem(k_own.at[group], dk.at[batch, kv_head, here])
            plgpu.copy_smem_to_gmem(bias_own.at[group], d_bias.at[batch, kv_head, here])
        if values:
            plgpu.copy_smem_to_gmem(v_own.at[group], dv.at[batch, kv_head, here])
        plgpu.wait_smem_to_gmem(0)

    def step(_, q_now, d_now, rows_now, q_done, d_done, rows_done, carry):
        k_acc, v_acc, b_acc = carry
        own = columns_own.at[group]
        s = _product(k_own.at[group], transposed(q_now))
        s, slope = _logits(call, s, _row(own, BIAS) if call.biased else None, _by_row)
        p = jnp.exp2(s - _by_column(_columns(rows_now, LSE), s.shape))
        if call.masked:
            p = jnp.where(_seen(call, s.shape, rows_now, own, _columns, _row), p, 0.0)
        # From here on in 16 bits, as the products take them: with both sums of a head of 128 in
        # registers there is no room for more.
        p = p.astype(v.dtype)
        slope = None if slope is None else slope.astype(v.dtype)
        if values:
            v_acc = _added(v_acc, p, d_now)
        if not keys:
            for barrier in (d_done, rows_done, q_done):
                plgpu.barrier_arrive(barrier)
            return None, v_acc, None
        d_p = _product(v_own.at[group], transposed(d_now))
        plgpu.barrier_arrive(d_done)
        if call.weighed:
            weight = _by_column(_columns(rows_now, WEIGHT), s.shape)
            d_p = d_p + weight * _by_row(_row(own, GAIN), s.shape)
        d_s = p.astype(jnp.float32) * (d_p - _by_column(_columns(rows_now, DELTA), s.shape))
        plgpu.barrier_arrive(rows_done)
        b_acc = b_acc + d_s.sum(axis=1)
        d_s = d_s if slope is None else d_s * slope.astype(jnp.float32)
        k_acc = _added(k_acc, d_s.astype(k.dtype), q_now)
        plgpu.barrier_arrive(q_done)
        return k_acc, v_acc, b_acc

    def matrix_at(t):
        head = kv_head * call.groups + lax.div(t, count)
        return head, table[line * call.steps + lax.rem(t, count)], 0

    def numbers_at(t):
        head, block, _ = matrix_at(t)
        return head, 0, block

    pipeline(
        step,
        context,
        count * call.groups,
        [
            _headed(call.step, q.shape[-1], matrix_at),
            _headed(call.step, v.shape[-1], matrix_at),
            plgpu.BlockSpec(block_shape=(None, NUMBERS, call.step), index_map=numbers_at),
        ],
        (q.at[batch], d_out.at[batch], rows.at[batch]),
    )


def importance_kernel(
    counts, table, q, k, rows, columns, found, k_own, columns_own, found_own, barriers,
    *, call: Static,
):  # fmt: skip
    """What a block of keys receives from one head, over the listed blocks of queries."""
    batch, head, group = _place()
    kv_head = lax.div(head, jnp.int32(call.groups))
    base = lax.axis_index("block") * (WARPGROUPS * ROWS) + group * ROWS
    line = _line(call, batch)

    def context(loop):
        here = pl.ds(base, ROWS)
        _fetch(k.at[batch, kv_head, here], k_own.at[group], barriers.at[group])
        _fetch(columns.at[batch, :, here], columns_own.at[group], barriers.at[group])
        plgpu.barrier_wait(barriers.at[group])
        acc = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), _OF_ROWS)
        (acc,) = loop((acc,))
        found_own[group] = acc
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(found_own.at[group], found.at[batch, head, here])
        plgpu.wait_smem_to_gmem(0)

    def step(_, q_now, rows_now, q_done, rows_done, carry):
        (acc,) = carry
        own = columns_own.at[group]
        s = _product(k_own.at[group], transposed(q_now))
        plgpu.barrier_arrive(q_done)
        s, _ = _logits(call, s, _row(own, BIAS) if call.biased else None, _by_row)
        p = jnp.exp2(s - _by_column(_columns(rows_now, LSE), s.shape))
        if call.masked:
            p = jnp.where(_seen(call, s.shape, rows_now, own, _columns, _row), p, 0.0)
        plgpu.barrier_arrive(rows_done)
        return (acc + p.sum(axis=1),)

    pipeline(
        step,
        context,
        counts[line],
        [
            matrix_spec(call.step, q.shape[-1], lambda t: (table[line * call.steps + t], 0)),
            numbers_spec(call.step, lambda t: (0, table[line * call.steps + t])),
        ],
        (q.at[batch, head], rows.at[batch, head]),
    )


def _place():
    """Batch row, head and warpgroup of this thread."""
    return lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")


def _line(call: Static, batch):
    return (batch if call.list_rows > 1 else 0) * call.lines + lax.axis_index("block")


def _headed(rows: int, dim: int, index):
    return plgpu.BlockSpec(
        block_shape=(None, rows, dim), index_map=index, transforms=list(_SWIZZLED)
    )


def _fetch(source, target, barrier):
    plgpu.copy_gmem_to_smem(source, target, barrier)


def _product(a, b):
    """a [64, K] @ b [K, N], both in fast memory -> float32 [64, N]."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, b.shape[1]), jnp.float32))


def _added(total, a, b):
    """total + a [64, K] @ b [K, N], a in registers, b in fast memory."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)

    return pl.run_state(multiply)(plgpu.ACC.init(total))


def _row(numbers, which: int):
    return load(numbers.at[which], _OF_ROWS)


def _columns(numbers, which: int):
    return load(numbers.at[which], _OF_COLUMNS)


def _by_row(x, shape):
    return lax.broadcast_in_dim(x, shape, [0])


def _by_column(x, shape):
    return lax.broadcast_in_dim(x, shape, [1])


def _logits(call: Static, s, bias, spread):
    """Scaled, capped, biased, in base 2; and what the cap multiplies gradients by, or None."""
    slope = None
    if call.softcap is None:
        s = s * (call.scale * LOG2E)
    else:
        bent = jnp.tanh(s * (call.scale / call.softcap))
        s, slope = bent * (call.softcap * LOG2E), 1.0 - bent * bent
    return (s if bias is None else s + spread(bias * LOG2E, s.shape)), slope


def _seen(call: Static, shape, queries, keys, query, key):
    """`mask.visible` of one block; `query` and `key` load one number along their axis."""
    of_rows = query is _row
    spread_q, spread_k = (_by_row, _by_column) if of_rows else (_by_column, _by_row)

    def of_query(which):
        return spread_q(query(queries, which), shape)

    def of_key(which):
        return spread_k(key(keys, which), shape)

    seen = of_key(POSITION) <= of_query(HIGH)
    same = None
    if call.blocked:
        same = of_query(BLOCK) == of_key(KEY_BLOCK)
        seen = seen | same
    if call.windowed:
        near = of_key(NEAR) > of_query(LOW)
        seen = seen & (near | same if call.spares else near)
    if call.segmented:
        segment = of_key(KEY_SEGMENT)
        seen = seen & ((segment == of_query(SEGMENT)) | (segment == float(SHARED)))
    return seen
