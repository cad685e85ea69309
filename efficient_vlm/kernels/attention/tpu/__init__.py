"""Attention on TPUs: Pallas (Mosaic) kernels that neither fetch nor compute empty blocks.

The O(N + M) numbers of a mask (`mask.Mask`) tell which blocks of the map are live. Lists of live
blocks are prefetched scalars that drive the index maps of the pipeline: a block that is not listed
is never fetched, and blocks in which nothing is hidden skip the arithmetic of the mask. The numbers
of a token (mask, bias, lse and delta) are stored together, 32 bytes; lse and sums over queries are
written as rows, 4 bytes per number instead of the 512 of a row of lanes.

The passes are those of arXiv 2205.14135 (section 3.1, appendix B.4) with a bias per key and its
gradient, one more row sum. The kernels are checked in Pallas' interpreters, for races as well, and
compiled ahead of time for v5e, v5p, v6e and tpu7x; they have never run on a TPU.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from efficient_vlm.kernels.attention.platforms import interpretation
from efficient_vlm.kernels.attention.tpu import kernels
from efficient_vlm.kernels.attention.tpu.call import LANES, Call
from efficient_vlm.kernels.manual import out_shape

__all__ = ["backward", "forward", "importance", "unserved"]

_MOST_DIM = 256


def unserved(q, k, v) -> str | None:
    """The feature that these kernels lack for a call, or None."""
    del k
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return str(q.dtype)
    dim = max(q.shape[-1], v.shape[-1])
    return f"head dim {dim} (at most {_MOST_DIM})" if dim > _MOST_DIM else None


def forward(q, k, v, key_bias, mask, *, scale, softcap):
    """(out [B, H, N, Dv], lse float32 [B, H, N]); see `xla.forward`."""
    call = Call("forward", "queries", q, k, v, key_bias, mask, scale, softcap)
    wide, rows = call.v.shape[-1], call.block_q
    out = out_shape((*call.q.shape[:3], wide), call.dtype, q)
    scratch = ((rows, LANES), (rows, LANES), (rows, wide), (rows, LANES))
    spec = call.by_queries(("q", "k", "v", "rows", "columns"), ("out", "lse"), scratch)
    shapes = out, call.row(call.heads, call.padded_q)
    run = _kernel(call, kernels.forward_kernel, shapes, spec, call.dim + call.value_dim)
    out, lse = run(*call.lists, call.q, call.k, call.v, call.rows(), call.columns)
    out = out[:, :, : call.count, : call.value_dim].astype(v.dtype)
    return out, lse[:, :, 0, : call.count]


def backward(q, k, v, key_bias, mask, lse, delta, d_out, weights, gain, *, scale, softcap):
    """(dq, dk, dv, d key_bias [B, M] or None); see `xla.backward`."""
    args = (q, k, v, key_bias, mask, scale, softcap)
    names = ("q", "k", "v", "d_out", "rows", "columns")

    def run(call, body, shapes, spec, products):
        kernel = _kernel(call, body, shapes, spec, products)
        rows = call.rows(lse, delta, weights)
        return kernel(*call.lists, call.q, call.k, call.v, call.queries(d_out), rows, call.columns)

    call = Call("backward_q", "queries", *args, gain=gain)
    shape = out_shape(call.q.shape, jnp.float32, q)
    scratch = ((call.block_q, call.q.shape[-1]), (call.block_q, LANES))
    spec = call.by_queries(names, ("q",), scratch)
    products = 2 * call.dim + call.value_dim
    (dq,) = run(call, kernels.backward_q_kernel, (shape,), spec, products)
    dq = dq[:, :, : call.count, : call.dim].astype(q.dtype)

    call = Call("backward_kv", "keys", *args, gain=gain)
    shapes = [out_shape(x.shape, jnp.float32, q) for x in (call.k, call.v)]
    shapes.append(call.row(call.kv_heads, call.padded_k))
    lanes = (call.block_k, LANES)
    scratch = ((call.block_k, call.k.shape[-1]), (call.block_k, call.v.shape[-1]), lanes, lanes)
    spec = call.by_keys(names, ("k", "v", "key_row"), scratch)
    products = 2 * (call.dim + call.value_dim)
    dk, dv, d_bias = run(call, kernels.backward_kv_kernel, shapes, spec, products)
    dk = dk[:, :, : call.num_keys, : call.dim].astype(k.dtype)
    dv = dv[:, :, : call.num_keys, : call.value_dim].astype(v.dtype)
    if key_bias is None:
        return dq, dk, dv, None
    return dq, dk, dv, d_bias[:, :, 0, : call.num_keys].sum(axis=1).astype(key_bias.dtype)


def importance(q, k, key_bias, mask, lse, weights, *, scale, softcap):
    """float32 [B, M]; see `xla.importance`."""
    call = Call("importance", "keys", q, k, None, key_bias, mask, scale, softcap, weights=weights)
    spec = call.by_keys(("q", "k", "rows", "columns"), ("key_row",), ((call.block_k, LANES),) * 2)
    shape = call.row(1, call.padded_k)
    run = _kernel(call, kernels.importance_kernel, (shape,), spec, call.dim)
    (total,) = run(*call.lists, call.q, call.k, call.rows(lse), call.columns)
    return total[:, 0, 0, : call.num_keys] / call.heads


def _kernel(call: Call, body, shapes, spec, products: int):
    return pl.pallas_call(
        functools.partial(body, call=call.static),
        out_shape=shapes,
        grid_spec=spec,
        interpret=interpretation(),
        name=f"attention_{call.name}",
        **call.options(products, spec.grid),
    )
