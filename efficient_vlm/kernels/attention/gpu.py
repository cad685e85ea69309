"""Attention on Hopper GPUs: Pallas (Mosaic GPU) kernels with TMA and wgmma.

One thread block owns 128 queries (or keys), 64 for each of two warpgroups, and goes through the
listed blocks of the other side, which a third warpgroup fetches ahead; blocks without keys are in
no list. The passes are those of arXiv 2205.14135 and 2407.08608 with a bias for each key,
importance and their gradients.

The kernels are checked in Pallas' GPU interpreter (JAX 0.11 and newer), exported for CUDA and
compiled for sm_90a without spills; they have not been run on a GPU. They are used by explicit
choice only until tests/kernels/attention/test_attention_gpu.py has passed on one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_vlm.kernels.attention import blocks as tables
from efficient_vlm.kernels.attention import gpu_kernels as kernels
from efficient_vlm.kernels.attention.compat import kernel_options
from efficient_vlm.kernels.attention.gpu_call import NUMBERS, OWN, ROWS, WARPGROUPS, Call

__all__ = ["backward", "forward", "importance", "unserved"]

_MOST_DIM = 128


def unserved(q, k, v) -> str | None:
    """The feature that these kernels lack for a call, or None."""
    del k
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype} (bfloat16 and float16 only)"
    if (dim := max(q.shape[-1], v.shape[-1])) > _MOST_DIM:
        return f"head dim {dim} (at most {_MOST_DIM})"
    return None


def forward(q, k, v, key_bias, mask, *, scale, softcap):
    """(out [B, H, N, Dv], lse float32 [B, H, N]); see `xla.forward`."""
    call = Call("queries", 128, q, k, v, key_bias, mask, scale, softcap)
    wide, value = call.q.shape[-1], call.v.shape[-1]
    # The result leaves through the queries' place in fast memory, which has the wider of the two.
    if value > wide:
        call.q = jnp.pad(call.q, ((0, 0),) * 3 + ((0, value - wide),))
        call.k = jnp.pad(call.k, ((0, 0),) * 3 + ((0, value - wide),))
    elif value < wide:
        call.v = jnp.pad(call.v, ((0, 0),) * 3 + ((0, wide - value),))
    wide = max(wide, value)
    shapes = (
        jax.ShapeDtypeStruct((*call.q.shape[:3], wide), q.dtype),
        jax.ShapeDtypeStruct(call.q.shape[:3], jnp.float32),
    )
    scratch = [
        kernels.matrix(WARPGROUPS, ROWS, wide, dtype=q.dtype),
        plgpu.SMEM((WARPGROUPS, NUMBERS, ROWS), jnp.float32),
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
    ]
    run = _kernel("forward", kernels.forward_kernel, call, call.heads, shapes, scratch)
    out, lse = run(*call.lists, call.q, call.k, call.v, call.rows(), call.columns())
    return out[:, :, : call.count, : v.shape[-1]], lse[:, :, : call.count]


def backward(q, k, v, key_bias, mask, lse, delta, d_out, *, scale, softcap):
    """(dq, dk, dv, d key_bias [B, M] or None); see `xla.backward`."""
    whole, weight, gain = v, None, None
    if tables.padded(v.shape[-1], 64) > tables.padded(v.shape[-1] - 1, 64):
        # The column that importance adds: an outer product beside 64 or 128 columns of values.
        weight, gain = d_out[..., -1].astype(jnp.float32), v[:, 0, :, -1].astype(jnp.float32)
        v, d_out = v[..., :-1], d_out[..., :-1]
    given, weighed = (q, k, v, key_bias, mask, scale, softcap), weight is not None
    dtype = q.dtype

    call = Call("queries", 64, *given)
    wide, value = call.q.shape[-1], call.v.shape[-1]
    scratch = [
        kernels.matrix(WARPGROUPS, ROWS, wide, dtype=dtype),
        kernels.matrix(WARPGROUPS, ROWS, value, dtype=dtype),
        plgpu.SMEM((WARPGROUPS, NUMBERS, ROWS), jnp.float32),
        kernels.matrix(WARPGROUPS, ROWS, wide, dtype=dtype),
        plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
    ]
    shape = jax.ShapeDtypeStruct(call.q.shape, dtype)
    arrays = (call.q, call.k, call.v, call.queries(d_out), call.rows(lse, delta, weight))
    run = _kernel(
        "backward_q", kernels.backward_q_kernel, call, call.heads, shape, scratch, weighed
    )
    dq = run(*call.lists, *arrays, call.columns(gain))[:, :, : call.count, : call.dim]

    call = Call("keys", 64, *given)
    scratch = [
        kernels.matrix(WARPGROUPS, ROWS, wide, dtype=dtype),
        kernels.matrix(WARPGROUPS, ROWS, value, dtype=dtype),
        plgpu.SMEM((WARPGROUPS, NUMBERS, ROWS), jnp.float32),
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
    ]
    shapes = (
        jax.ShapeDtypeStruct(call.k.shape, dtype),
        jax.ShapeDtypeStruct(call.v.shape, dtype),
        jax.ShapeDtypeStruct(call.k.shape[:3], jnp.float32),
    )
    arrays = (call.q, call.k, call.v, call.queries(d_out), call.rows(lse, delta, weight))
    arrays += (call.columns(gain),)

    def sums(**parts):
        body = functools.partial(kernels.backward_kv_kernel, **parts)
        run = _kernel("backward_kv", body, call, call.kv_heads, shapes, scratch, weighed)
        return run(*call.lists, *arrays)

    if softcap is not None and max(wide, value) > 64:
        # With the cap's slope there are no registers for both sums of a head of 128.
        (dk, _, d_bias), (_, dv, _) = sums(keys=True, values=False), sums(keys=False, values=True)
    else:
        dk, dv, d_bias = sums(keys=True, values=True)
    dk, dv = dk[:, :, : call.num_keys, : call.dim], dv[:, :, : call.num_keys, : v.shape[-1]]
    # Nobody asks for the gradient of that column.
    dv = jnp.pad(dv, ((0, 0),) * 3 + ((0, whole.shape[-1] - v.shape[-1]),))
    if key_bias is not None:
        d_bias = d_bias[:, :, : call.num_keys].sum(axis=1).astype(key_bias.dtype)
    return dq, dk, dv, None if key_bias is None else d_bias


def importance(q, k, key_bias, mask, lse, weights, *, scale, softcap):
    """float32 [B, M]; see `xla.importance`."""
    call = Call("keys", 64, q, k, None, key_bias, mask, scale, softcap, weights)
    # One vector carries the normalisation of a row and its weight, and leaves out rows of weight 0.
    share = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1)), -jnp.inf)
    lse = jnp.where(share[:, None] > -jnp.inf, lse - share[:, None], jnp.inf)
    shape = jax.ShapeDtypeStruct((call.batch, call.heads, call.padded_k), jnp.float32)
    scratch = [
        kernels.matrix(WARPGROUPS, ROWS, call.k.shape[-1], dtype=q.dtype),
        plgpu.SMEM((WARPGROUPS, NUMBERS, ROWS), jnp.float32),
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
    ]
    run = _kernel("importance", kernels.importance_kernel, call, call.heads, shape, scratch)
    found = run(*call.lists, call.q, call.k, call.rows(lse), call.columns())
    return found[:, :, : call.num_keys].sum(axis=1) / call.heads


def _kernel(name, body, call: Call, heads: int, shapes, scratch, weighed=False):
    static = call.static(weighed)
    own = call.padded_q if call.by == "queries" else call.padded_k
    return plgpu.kernel(
        functools.partial(body, call=static),
        out_type=shapes,
        scratch_types=scratch,
        grid=(heads, own // OWN, call.batch),
        grid_names=("head", "block", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=f"attention_{name}",
        **kernel_options(),
    )
