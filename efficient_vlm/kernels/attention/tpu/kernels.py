"""The bodies of the TPU kernels: one block of the map at a time, in fast memory.

Forward and the gradient of q keep queries as rows; the gradients of k, v and of the bias, and
importance keep keys as rows (S^T = K Q^T), so that sums over queries are sums of rows.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from efficient_vlm.kernels.attention.mask import NEGATIVE
from efficient_vlm.kernels.attention.packing import COLUMNS, ROWS, Static
from efficient_vlm.kernels.attention.tpu.call import LANES

__all__ = ["backward_kv_kernel", "backward_q_kernel", "forward_kernel", "importance_kernel"]


def forward_kernel(
    counts, whole, table, q, k, v, rows, columns, out, lse, top, total, acc, own, *, call: Static
):
    """Online softmax over the listed blocks of keys."""
    del table  # The index maps read it.
    t = pl.program_id(3)
    row, column = _own(own, ROWS), _met(columns[0], COLUMNS)

    @pl.when(t == 0)
    def _():
        top[...] = jnp.full_like(top, NEGATIVE)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)
        own[...] = _turned(rows[0, 0])

    def step(masked: bool):
        s, _ = _logits(call, _dot(q[0, 0], k[0, 0], 1), column)
        if masked:
            seen = call.rule.seen(row, column)
            s = jnp.where(seen, s, NEGATIVE)
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

    _on_live(call, counts, whole, t, step)

    @pl.when(t == call.steps - 1)
    def _():
        some = total[:, :1] != 0  # NaN stays one.
        norm = jnp.where(some, total[:, :1], 1.0)
        out[0, 0] = jnp.where(some, acc[...] / norm, 0.0).astype(out.dtype)
        lse[0, 0] = _row(jnp.where(some, top[:, :1] + jnp.log(norm), jnp.inf), top.shape)


def backward_q_kernel(
    counts, whole, table, q, k, v, d_out, rows, columns, dq, acc, own, *, call: Static
):
    """The gradient of a block of queries, over the listed blocks of keys."""
    del table
    t = pl.program_id(3)
    row, column = _own(own, ROWS), _met(columns[0], COLUMNS)

    @pl.when(t == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        own[...] = _turned(rows[0, 0])

    def step(masked: bool):
        s, slope = _logits(call, _dot(q[0, 0], k[0, 0], 1), column)
        p = _probabilities(call, s, row, column, masked)
        d_s = p * _pulled(call, _dot(d_out[0, 0], v[0, 0], 1), row, column)
        d_s = d_s if slope is None else d_s * slope
        acc[...] += _dot(d_s.astype(k.dtype), k[0, 0], 0)

    _on_live(call, counts, whole, t, step)

    @pl.when(t == call.steps - 1)
    def _():
        dq[0, 0] = acc[...] * call.scale


def backward_kv_kernel(
    counts, whole, table, q, k, v, d_out, rows, columns, dk, dv, d_bias, k_acc, v_acc, b_acc, own,
    *, call: Static,
):  # fmt: skip
    """The gradients of a block of keys, over the listed blocks of queries of all their heads."""
    del table
    row, column = _met(rows[0, 0], ROWS), _own(own, COLUMNS)

    @pl.when(_first())
    def _():
        k_acc[...] = jnp.zeros_like(k_acc)
        v_acc[...] = jnp.zeros_like(v_acc)
        b_acc[...] = jnp.zeros_like(b_acc)
        own[...] = _turned(columns[0])

    def step(masked: bool):
        s, slope = _logits(call, _dot(k[0, 0], q[0, 0], 1), column)
        p = _probabilities(call, s, row, column, masked)
        v_acc[...] += _dot(p.astype(d_out.dtype), d_out[0, 0], 0)
        d_s = p * _pulled(call, _dot(v[0, 0], d_out[0, 0], 1), row, column)
        b_acc[...] += jnp.broadcast_to(d_s.sum(axis=1, keepdims=True), b_acc.shape)
        d_s = d_s if slope is None else d_s * slope
        k_acc[...] += _dot(d_s.astype(q.dtype), q[0, 0], 0)

    _on_live(call, counts, whole, pl.program_id(4), step)

    @pl.when(_last())
    def _():
        dk[0, 0] = k_acc[...] * call.scale
        dv[0, 0] = v_acc[...]
        d_bias[0, 0] = _row(b_acc[...], b_acc.shape)


def importance_kernel(counts, whole, table, q, k, rows, columns, out, acc, own, *, call: Static):
    """The importance of a block of keys, over the listed blocks of queries of all heads."""
    del table
    row, column = _met(rows[0, 0], ROWS), _own(own, COLUMNS)

    @pl.when(_first())
    def _():
        acc[...] = jnp.zeros_like(acc)
        own[...] = _turned(columns[0])

    def step(masked: bool):
        s, _ = _logits(call, _dot(k[0, 0], q[0, 0], 1), column)
        p = _probabilities(call, s, row, column, masked)
        acc[...] += jnp.broadcast_to(p.sum(axis=1, keepdims=True), acc.shape)

    _on_live(call, counts, whole, pl.program_id(4), step)

    @pl.when(_last())
    def _():
        out[0, 0] = _row(acc[...], acc.shape)


def _first():
    """Whether this is the first step of a block of keys: first query block of the first head."""
    return (pl.program_id(3) == 0) & (pl.program_id(4) == 0)


def _last():
    """Whether this is the last step of a block of keys."""
    heads, steps = pl.num_programs(3), pl.num_programs(4)
    return (pl.program_id(3) == heads - 1) & (pl.program_id(4) == steps - 1)


def _on_live(call: Static, counts, whole, t, step) -> None:
    """Runs `step` for a listed block, without the mask where nothing is hidden."""
    line = (pl.program_id(0) if call.list_rows > 1 else 0) * call.lines + pl.program_id(2)
    live = t < counts[line]
    if call.rule is None:
        pl.when(live)(lambda: step(False))
        return
    pl.when(t < whole[line])(lambda: step(False))
    pl.when(live & (t >= whole[line]))(lambda: step(True))


def _own(turned, names):
    """A function from a name to that number of the owned tokens, [n, 1]."""

    def of(name):
        at = names.index(name)
        return turned[:, at : at + 1]

    return of


def _met(numbers, names):
    """A function from a name to that number of the tokens of this step, [1, n]."""

    def of(name):
        at = names.index(name)
        return numbers[at : at + 1]

    return of


def _logits(call: Static, s, column):
    """Logits scaled, capped and biased, and the derivative of the cap, or None without one."""
    s, slope = s * call.scale, None
    if call.softcap is not None:
        bent = jnp.tanh(s / call.softcap)
        s, slope = call.softcap * bent, 1.0 - bent * bent
    return (s + column("bias") if call.biased else s), slope


def _probabilities(call: Static, s, row, column, masked: bool):
    """Probabilities from the lse of the forward pass."""
    p = jnp.exp(s - row("lse"))
    return jnp.where(call.rule.seen(row, column), p, 0.0) if masked else p


def _pulled(call: Static, d_p, row, column):
    """The gradient of the logits over the probabilities: dP (with importance) minus delta."""
    if call.weighed:
        d_p = d_p + row("weight") * column("gain")
    return d_p - row("delta")


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
