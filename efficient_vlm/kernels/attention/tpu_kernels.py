"""The bodies of the TPU kernels: one block of the map at a time, in fast memory.

Forward and the gradient of q keep queries as rows; the gradients of k, v and of the bias, and
importance keep keys as rows (S^T = K Q^T), so that sums over queries are sums of rows.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from efficient_vlm.kernels.attention.mask import SHARED
from efficient_vlm.kernels.attention.tpu_call import (
    BIAS,
    BLOCK,
    DELTA,
    HIGH,
    KEY_BLOCK,
    KEY_SEGMENT,
    LANES,
    LOW,
    LSE,
    NEAR,
    POSITION,
    SEGMENT,
    Static,
)

_NEGATIVE = -1e30


def forward_kernel(
    counts, table, whole, q, k, v, rows, columns, out, lse, top, total, acc, own, *, call: Static
):
    """Online softmax over the listed blocks of keys."""
    del table  # The index maps read it.
    line, t = call.line_of_queries(), pl.program_id(3)

    @pl.when(t == 0)
    def _():
        top[...] = jnp.full_like(top, _NEGATIVE)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)
        own[...] = _turned(rows[0, 0])

    def step(masked: bool):
        s, _ = _logits(call, _dot(q[0, 0], k[0, 0], 1), columns[0][BIAS : BIAS + 1])
        if masked:
            seen = _seen(call, lambda c: own[:, c : c + 1], lambda c: columns[0][c : c + 1])
            s = jnp.where(seen, s, _NEGATIVE)
        before = top[:, :1]
        higher = jnp.maximum(before, s.max(axis=-1, keepdims=True))
        p = jnp.exp(s - higher)
        if masked:
            p = jnp.where(seen, p, 0.0)
        shrink = jnp.exp(before - higher)
        summed = total[:, :1] * shrink + p.sum(axis=-1, keepdims=True)
        total[...] = jnp.broadcast_to(summed, total.shape)
        top[...] = jnp.broadcast_to(higher, top.shape)
        acc[...] = acc[...] * shrink + _dot(p.astype(v.dtype), v[0, 0], 0)

    _on_live(call, counts, whole, line, t, call.blocks_k, step)

    @pl.when(t == call.blocks_k - 1)
    def _():
        some = total[:, :1] > 0
        norm = jnp.where(some, total[:, :1], 1.0)
        out[0, 0] = jnp.where(some, acc[...] / norm, 0.0).astype(out.dtype)
        lse[0, 0] = _row(jnp.where(some, top[:, :1] + jnp.log(norm), jnp.inf), top.shape)


def backward_q_kernel(
    counts, table, whole, q, k, v, d_out, rows, columns, dq, acc, own, *, call: Static
):
    """The gradient of a block of queries, over the listed blocks of keys."""
    del table
    line, t = call.line_of_queries(), pl.program_id(3)

    @pl.when(t == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        own[...] = _turned(rows[0, 0])

    def step(masked: bool):
        def row(c):
            return own[:, c : c + 1]

        s, slope = _logits(call, _dot(q[0, 0], k[0, 0], 1), columns[0][BIAS : BIAS + 1])
        p = jnp.exp(s - row(LSE))
        if masked:
            p = jnp.where(_seen(call, row, lambda c: columns[0][c : c + 1]), p, 0.0)
        d_s = p * (_dot(d_out[0, 0], v[0, 0], 1) - row(DELTA))
        d_s = d_s if slope is None else d_s * slope
        acc[...] += _dot(d_s.astype(k.dtype), k[0, 0], 0)

    _on_live(call, counts, whole, line, t, call.blocks_k, step)

    @pl.when(t == call.blocks_k - 1)
    def _():
        dq[0, 0] = acc[...] * call.scale


def backward_kv_kernel(
    counts, table, whole, q, k, v, d_out, rows, columns, dk, dv, d_bias, k_acc, v_acc, b_acc, own,
    *, call: Static,
):  # fmt: skip
    """The gradients of a block of keys, over the listed blocks of queries of all their heads."""
    del table
    line, head, t = call.line_of_keys(), pl.program_id(3), pl.program_id(4)

    @pl.when((head == 0) & (t == 0))
    def _():
        k_acc[...] = jnp.zeros_like(k_acc)
        v_acc[...] = jnp.zeros_like(v_acc)
        b_acc[...] = jnp.zeros_like(b_acc)
        own[...] = _turned(columns[0])

    def step(masked: bool):
        def row(c):
            return rows[0, 0][c : c + 1]

        s, slope = _logits(call, _dot(k[0, 0], q[0, 0], 1), own[:, BIAS : BIAS + 1])
        p = jnp.exp(s - row(LSE))
        if masked:
            p = jnp.where(_seen(call, row, lambda c: own[:, c : c + 1]), p, 0.0)
        v_acc[...] += _dot(p.astype(d_out.dtype), d_out[0, 0], 0)
        d_s = p * (_dot(v[0, 0], d_out[0, 0], 1) - row(DELTA))
        b_acc[...] += jnp.broadcast_to(d_s.sum(axis=1, keepdims=True), b_acc.shape)
        d_s = d_s if slope is None else d_s * slope
        k_acc[...] += _dot(d_s.astype(q.dtype), q[0, 0], 0)

    _on_live(call, counts, whole, line, t, call.blocks_q, step)

    @pl.when((head == call.inner_heads - 1) & (t == call.blocks_q - 1))
    def _():
        dk[0, 0] = k_acc[...] * call.scale
        dv[0, 0] = v_acc[...]
        d_bias[0, 0] = _row(b_acc[...], b_acc.shape)


def importance_kernel(counts, table, whole, q, k, rows, columns, found, acc, own, *, call: Static):
    """What a block of keys receives, over the listed blocks of queries of all heads."""
    del table
    line, head, t = call.line_of_keys(), pl.program_id(3), pl.program_id(4)

    @pl.when((head == 0) & (t == 0))
    def _():
        acc[...] = jnp.zeros_like(acc)
        own[...] = _turned(columns[0])

    def step(masked: bool):
        def row(c):
            return rows[0, 0][c : c + 1]

        s, _ = _logits(call, _dot(k[0, 0], q[0, 0], 1), own[:, BIAS : BIAS + 1])
        p = jnp.exp(s - row(LSE))
        if masked:
            p = jnp.where(_seen(call, row, lambda c: own[:, c : c + 1]), p, 0.0)
        acc[...] += jnp.broadcast_to(p.sum(axis=1, keepdims=True), acc.shape)

    _on_live(call, counts, whole, line, t, call.blocks_q, step)

    @pl.when((head == call.inner_heads - 1) & (t == call.blocks_q - 1))
    def _():
        found[0, 0] = _row(acc[...], acc.shape)


def _on_live(call: Static, counts, whole, line, t, steps: int, step) -> None:
    """`step` for a listed block, without the mask where everything is seen."""
    live = t < counts[line]
    if not call.masked:
        pl.when(live)(lambda: step(False))
        return
    seen = whole[line * steps + t] != 0
    pl.when(live & seen)(lambda: step(False))
    pl.when(live & jnp.logical_not(seen))(lambda: step(True))


def _logits(call: Static, s, bias):
    """Scaled, capped and biased; and what the cap multiplies gradients by, or None."""
    s, slope = s * call.scale, None
    if call.softcap is not None:
        bent = jnp.tanh(s / call.softcap)
        s, slope = call.softcap * bent, 1.0 - bent * bent
    return (s + bias if call.biased else s), slope


def _seen(call: Static, row, column):
    """`mask.visible` of one block; `row` and `column` give one number of queries and of keys."""
    seen = column(POSITION) <= row(HIGH)
    same = None
    if call.blocked:
        same = row(BLOCK) == column(KEY_BLOCK)
        seen |= same
    if call.windowed:
        near = column(NEAR) > row(LOW)
        seen &= near | same if call.spares else near
    if call.segmented:
        segment = column(KEY_SEGMENT)
        seen &= (segment == row(SEGMENT)) | (segment == SHARED)
    return seen


def _turned(rows):
    """[8, n] -> [n, 128], numbers of a token as columns."""
    return jnp.transpose(jnp.concatenate([rows] * (LANES // rows.shape[0]), axis=0))


def _row(column, shape):
    """[n, 1], or equal lanes [n, 128], -> [1, n]."""
    return jnp.transpose(jnp.broadcast_to(column, shape))[:1]


def _dot(a, b, axis: int):
    """a [R, K] with b, contracted over its `axis`; float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )
