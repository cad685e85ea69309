"""Bodies of the Hopper kernels: warpgroups compute 64 rows of the map each, one more fetches.

Forward and the gradient of q keep queries as rows; the gradients of k, v and of the bias, and
importance keep keys as rows (S^T = K Q^T), so that sums over queries are sums of rows.
Matrices are [B, N, H, D], the layout of projections, so nothing is transposed. Exponentials, and
the lse and the bias that kernels read, are in base 2.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_vlm.kernels.attention.compat import load
from efficient_vlm.kernels.attention.mask import NEGATIVE
from efficient_vlm.kernels.attention.packing import COLUMNS, NUMBERS, ROWS, Static

__all__ = [
    "HEIGHT",
    "LOG2E",
    "backward_kv_kernel",
    "backward_q_kernel",
    "forward_kernel",
    "importance_kernel",
    "matrix",
]

HEIGHT = 64  # Rows of the map that a warpgroup holds: those of one wgmma.
LOG2E = 1.4426950408889634
_OF_ROWS = plgpu.Layout.WGMMA.reduce(1)
_OF_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def matrix(*shape, dtype):
    """Fast memory for matrices that wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=_SWIZZLED)


def forward_kernel(
    counts, whole, table, q, k, v, rows, columns, out, lse,
    q_own, rows_own, out_own, lse_own, arrived, turn, *, call: Static,
):  # fmt: skip
    """Online softmax over the listed blocks of keys.

    The two warpgroups take turns: one multiplies while the other computes exponentials (arXiv
    2407.08608, section 3.1).
    """
    at = _place(call, counts, whole, table)
    q_own, rows_own, out_own, lse_own = (
        x.at[at.group] for x in (q_own, rows_own, out_own, lse_own)
    )
    row = _own(call, rows_own, ROWS)

    def context(loop):
        _fetch(arrived.at[at.group], (q.at[at.batch, at.here, at.head], q_own),
               (rows.at[at.batch, 0, :, at.here], rows_own))  # fmt: skip
        pl.when(at.group == 1)(lambda: _meet(turn))
        acc, total, top = loop((_zeros(v.shape[-1]), _zeros(), _zeros() + NEGATIVE))
        pl.when(at.group == 0)(lambda: _meet(turn))
        some = total != 0  # NaN stays one.
        norm = jnp.where(some, total, 1.0)
        share = jnp.where(some, 1.0 / norm, 0.0)
        out_own[...] = (acc * _by_row(share, acc.shape[1])).astype(out.dtype)
        lse_own[...] = jnp.where(some, (top + jnp.log2(norm)) / LOG2E, jnp.inf)
        _store((out_own, out.at[at.batch, at.here, at.head]),
               (lse_own, lse.at[at.batch, at.head, at.here]))  # fmt: skip

    def step(indices, k_now, v_now, columns_now, k_done, v_done, columns_done, carry):
        acc, total, top = carry
        column = _met(call, columns_now, COLUMNS)
        bias = column("bias") if call.biased else None
        s = _product(q_own, k_now.transpose((1, 0)), meanwhile=lambda: _meet(turn))
        plgpu.barrier_arrive(k_done)
        factor = call.scale * LOG2E
        if call.softcap is None and not call.biased and factor > 0:
            # Maximum first: scaling and subtraction then become one instruction.
            s = _hidden(call, indices[0] < at.whole, s, row, column)
            higher = jnp.maximum(top, s.max(axis=1) * factor)
            s = s * factor
        else:
            s, _ = _logits(call, s, bias)
            s = _hidden(call, indices[0] < at.whole, s, row, column)
            higher = jnp.maximum(top, s.max(axis=1))
        plgpu.barrier_arrive(columns_done)
        p = jnp.exp2(s - _by_row(higher, call.step))
        shrink = jnp.exp2(top - higher)
        total = total * shrink + p.sum(axis=1)
        acc = acc * _by_row(shrink, acc.shape[1])
        # Finish the exponentials before it is the other warpgroup's turn to compute its own.
        acc, total, higher, p = lax.optimization_barrier((acc, total, higher, p.astype(v.dtype)))
        _meet(turn)
        acc = _added(acc, p, v_now)
        plgpu.barrier_arrive(v_done)
        return acc, total, higher

    _through_keys(call, at, step, context, k, v, columns)


def backward_q_kernel(
    counts, whole, table, q, k, v, d_out, rows, columns, dq,
    q_own, d_own, rows_own, arrived, *, call: Static,
):  # fmt: skip
    """The gradient of a block of queries, over the listed blocks of keys."""
    at = _place(call, counts, whole, table)
    q_own, d_own, rows_own = (x.at[at.group] for x in (q_own, d_own, rows_own))
    row = _own(call, rows_own, ROWS)

    def context(loop):
        _fetch(arrived.at[at.group], (q.at[at.batch, at.here, at.head], q_own),
               (d_out.at[at.batch, at.here, at.head], d_own),
               (rows.at[at.batch, at.head, :, at.here], rows_own))  # fmt: skip
        (acc,) = loop((_zeros(q.shape[-1]),))
        q_own[...] = (acc * call.scale).astype(dq.dtype)
        _store((q_own, dq.at[at.batch, at.here, at.head]))

    def step(indices, k_now, v_now, columns_now, k_done, v_done, columns_done, carry):
        (acc,) = carry
        column = _met(call, columns_now, COLUMNS)
        bias = column("bias") if call.biased else None
        s, slope = _logits(call, _product(q_own, k_now.transpose((1, 0))), bias)
        s = _hidden(call, indices[0] < at.whole, s, row, column)
        p = jnp.exp2(s - row("lse"))
        d_p = _product(d_own, v_now.transpose((1, 0)))
        plgpu.barrier_arrive(v_done)
        if call.weighed:
            d_p = d_p + row("weight") * column("gain")
        plgpu.barrier_arrive(columns_done)
        d_s = p * (d_p - row("delta"))
        d_s = d_s if slope is None else d_s * slope
        acc = _added(acc, d_s.astype(k.dtype), k_now)
        plgpu.barrier_arrive(k_done)
        return (acc,)

    _through_keys(call, at, step, context, k, v, columns)


def backward_kv_kernel(
    counts, whole, table, q, k, v, d_out, rows, columns, dk, dv, d_bias,
    k_own, v_own, columns_own, bias_own, arrived, *, call: Static, keys: bool, values: bool,
):  # fmt: skip
    """The gradients of a block of keys, over the listed blocks of queries of all their heads.

    Those of k and the bias, that of v, or all three, as far as the registers allow.
    """
    at = _place(call, counts, whole, table)
    k_own, v_own, columns_own, bias_own = (
        x.at[at.group] for x in (k_own, v_own, columns_own, bias_own)
    )
    column = _own(call, columns_own, COLUMNS)

    def context(loop):
        _fetch(arrived.at[at.group], (k.at[at.batch, at.here, at.head], k_own),
               (v.at[at.batch, at.here, at.head], v_own),
               (columns.at[at.batch, :, at.here], columns_own))  # fmt: skip
        k_acc, v_acc, b_acc = loop((
            _zeros(k.shape[-1]) if keys else None,
            _zeros(v.shape[-1]) if values else None,
            _zeros() if keys and call.biased else None,
        ))  # fmt: skip
        stores = []
        if keys:
            k_own[...] = (k_acc * call.scale).astype(dk.dtype)
            stores += [(k_own, dk.at[at.batch, at.here, at.head])]
        if keys and call.biased:
            bias_own[...] = b_acc
            stores += [(bias_own, d_bias.at[at.batch, at.head, at.here])]
        if values:
            v_own[...] = v_acc.astype(dv.dtype)
            stores += [(v_own, dv.at[at.batch, at.here, at.head])]
        _store(*stores)

    def step(indices, q_now, d_now, rows_now, q_done, d_done, rows_done, carry):
        k_acc, v_acc, b_acc = carry
        row = _met(call, rows_now, ROWS)
        bias = column("bias") if call.biased else None
        s, slope = _logits(call, _product(k_own, q_now.transpose((1, 0))), bias)
        s = _hidden(call, lax.rem(indices[0], at.count) < at.whole, s, row, column)
        # From here on in 16 bits, like the operands of the products: with both sums of a head of
        # 128 the registers have no room for float32.
        p = jnp.exp2(s - row("lse")).astype(v.dtype)
        slope = None if slope is None else slope.astype(v.dtype)
        if values:
            v_acc = _added(v_acc, p, d_now)
        if not keys:
            for barrier in (d_done, rows_done, q_done):
                plgpu.barrier_arrive(barrier)
            return None, v_acc, None
        d_p = _product(v_own, d_now.transpose((1, 0)))
        plgpu.barrier_arrive(d_done)
        if call.weighed:
            d_p = d_p + row("weight") * column("gain")
        d_s = p.astype(jnp.float32) * (d_p - row("delta"))
        plgpu.barrier_arrive(rows_done)
        b_acc = b_acc + d_s.sum(axis=1) if call.biased else None
        d_s = d_s if slope is None else d_s * slope.astype(jnp.float32)
        k_acc = _added(k_acc, d_s.astype(k.dtype), q_now)
        plgpu.barrier_arrive(q_done)
        return k_acc, v_acc, b_acc

    _through_queries(call, at, step, context, (q, d_out), rows)


def importance_kernel(
    counts, whole, table, q, k, rows, columns, out,
    k_own, columns_own, out_own, arrived, turn, *, call: Static,
):  # fmt: skip
    """The importance of a block of keys, over the listed query blocks of its heads; in turns."""
    at = _place(call, counts, whole, table)
    k_own, columns_own, out_own = (x.at[at.group] for x in (k_own, columns_own, out_own))
    column = _own(call, columns_own, COLUMNS)

    def context(loop):
        _fetch(arrived.at[at.group], (k.at[at.batch, at.here, at.head], k_own),
               (columns.at[at.batch, :, at.here], columns_own))  # fmt: skip
        pl.when(at.group == 1)(lambda: _meet(turn))
        (acc,) = loop((_zeros(),))
        pl.when(at.group == 0)(lambda: _meet(turn))
        out_own[...] = acc
        _store((out_own, out.at[at.batch, at.head, at.here]))

    def step(indices, q_now, rows_now, q_done, rows_done, carry):
        (acc,) = carry
        row = _met(call, rows_now, ROWS)
        lse, bias = row("lse"), column("bias") if call.biased else None
        s = _product(k_own, q_now.transpose((1, 0)), meanwhile=lambda: _meet(turn))
        plgpu.barrier_arrive(q_done)
        s, _ = _logits(call, s, bias)
        s = _hidden(call, lax.rem(indices[0], at.count) < at.whole, s, row, column)
        p = jnp.exp2(s - lse)
        plgpu.barrier_arrive(rows_done)
        acc = lax.optimization_barrier(acc + p.sum(axis=1))
        _meet(turn)
        return (acc,)

    _through_queries(call, at, step, context, (q,), rows)


class _Place(NamedTuple):
    """The part of the map that a warpgroup computes.

    Attributes:
      head: of queries if it owns queries, else of keys.
      group: the number of the warpgroup.
      here: slice of its 64 queries or keys.
      count, whole: number of blocks in the list, and of those at its start that hide nothing.
      block: index in the list -> number of the block.
    """

    batch: Any
    head: Any
    group: Any
    here: Any
    count: Any
    whole: Any
    block: Any


def _place(call: Static, counts, whole, table) -> _Place:
    batch, group = lax.axis_index("batch"), lax.axis_index("warpgroup")
    line = (batch if call.list_rows > 1 else 0) * call.lines + lax.axis_index("block")
    return _Place(
        batch=batch,
        head=lax.axis_index("head"),
        group=group,
        here=pl.ds(lax.axis_index("block") * call.own + group * HEIGHT, HEIGHT),
        count=counts[line],
        whole=whole[line],
        block=lambda t: table[line * call.steps + t],
    )


def _through_keys(call: Static, at: _Place, step, context, k, v, columns) -> None:
    """Runs `step` over the listed blocks of keys, which the last warpgroup prefetches."""
    head = lax.div(at.head, jnp.int32(call.groups))
    specs = [_matrix_spec(call, x, lambda t: (at.block(t), head, 0)) for x in (k, v)]
    specs.append(plgpu.BlockSpec((NUMBERS, call.step), lambda t: (0, at.block(t))))
    operands = (x.at[at.batch] for x in (k, v, columns))
    _pipeline(call, step, context, at.count, specs)(*operands)


def _through_queries(call: Static, at: _Place, step, context, matrices, rows) -> None:
    """Runs `step` over the listed blocks of queries of all heads that share the keys."""

    def head_and_block(t):
        head = at.head * call.groups + lax.div(t, at.count)
        return head, at.block(lax.rem(t, at.count))

    def of_matrix(t):
        head, block = head_and_block(t)
        return block, head, 0

    def of_numbers(t):
        head, block = head_and_block(t)
        return head, 0, block

    specs = [_matrix_spec(call, x, of_matrix) for x in matrices]
    specs.append(plgpu.BlockSpec((None, NUMBERS, call.step), of_numbers))
    operands = (x.at[at.batch] for x in (*matrices, rows))
    _pipeline(call, step, context, at.count * call.groups, specs)(*operands)


def _matrix_spec(call: Static, x, place):
    """Spec of one block [step, D] of x [B, N, H, D] per step."""
    shape = (call.step, None, x.shape[-1])
    return plgpu.BlockSpec(shape, place, transforms=list(_SWIZZLED))


def _pipeline(call: Static, step, context, steps, specs):
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        max_concurrent_steps=call.stages,
        num_compute_wgs=call.own // HEIGHT,
        memory_registers=24,
        wg_axis="warpgroup",
        manual_consumed_barriers=True,
        compute_context=context,
        in_specs=specs,
    )


def _fetch(barrier, *pairs) -> None:
    """Copies into fast memory and waits until all have arrived."""
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def _store(*pairs) -> None:
    """Copies out of fast memory."""
    plgpu.commit_smem()
    for source, target in pairs:
        plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)


def _meet(barrier) -> None:
    """Waits for the other warpgroup."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def _zeros(columns: int | None = None):
    """float32 [64, columns], or [64]."""
    if columns is None:
        return plgpu.layout_cast(jnp.zeros((HEIGHT,), jnp.float32), _OF_ROWS)
    return plgpu.layout_cast(jnp.zeros((HEIGHT, columns), jnp.float32), plgpu.Layout.WGMMA)


def _product(a, b, meanwhile=lambda: None):
    """a [64, K] @ b [K, N], both in fast memory -> float32 [64, N]."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        meanwhile()
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((HEIGHT, b.shape[1]), jnp.float32))


def _added(total, a, b):
    """total + a [64, K] @ b [K, N], a in registers, b in fast memory."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)

    return pl.run_state(multiply)(plgpu.ACC.init(total))


def _own(call: Static, numbers, names):
    """A function from a name to that number of the owned tokens, as rows of the map."""

    def of(name):
        return _by_row(load(numbers.at[names.index(name)], _OF_ROWS), call.step)

    return of


def _met(call: Static, numbers, names):
    """A function from a name to that number of the tokens of this step, as columns of the map."""

    def of(name):
        x = load(numbers.at[names.index(name)], _OF_COLUMNS)
        return lax.broadcast_in_dim(x, (HEIGHT, call.step), [1])

    return of


def _by_row(x, columns: int):
    return lax.broadcast_in_dim(x, (HEIGHT, columns), [0])


def _logits(call: Static, s, bias):
    """Logits scaled, capped and biased, in base 2; and the derivative of the cap, or None."""
    slope = None
    if call.softcap is None:
        s = s * (call.scale * LOG2E)
    else:
        bent = jnp.tanh(s * (call.scale / call.softcap))
        s, slope = bent * (call.softcap * LOG2E), 1.0 - bent * bent
    return (s if bias is None else s + bias), slope


def _hidden(call: Static, whole, s, row, column):
    """Logits with -inf for hidden keys; a block that hides nothing needs no mask."""
    if call.rule is None:
        return s

    def masked(s):
        return jnp.where(call.rule.seen(row, column), s, -jnp.inf)

    return lax.cond(whole, lambda s: s, masked, s)
