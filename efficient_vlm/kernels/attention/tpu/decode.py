"""Attention of a few queries to a cache on TPUs: pages are read in place, int8 as int8.

One grid step is one block of a page, or of a contiguous cache, of one key head. The page table and
the lengths are prefetched scalars that drive the index maps, so that blocks after the end of a row
are neither fetched nor computed; the queries that share a key head are the rows of one product.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_vlm.kernels.attention.mask import NEGATIVE
from efficient_vlm.kernels.attention.platforms import interpretation
from efficient_vlm.kernels.manual import out_shape

_LANES = 128
_SUBLANES = 8
_ROWS = 16  # Queries of a product are padded to whole tiles, which for bfloat16 have 16 rows.
_BLOCKS = (512, 384, 256, 128)  # Keys of a block; a page is a whole number of blocks.
VMEM_BYTES = 16 * 2**20


def decode(
    q,
    k,
    v,
    lengths,
    pages,
    columns,
    k_scale,
    v_scale,
    limits=None,
    window=None,
    *,
    scale,
    softcap,
):
    """(out [B, H, R, Dv] in the dtype of q, lse float32 [B, H, R]).

    Args:
      q: [B, H, R, D].
      k, v: [P, Hk, S, D and Dv] with pages int32 [B, T], or [B, Hk, M, D and Dv] with pages None.
      lengths: int32 [B].
      columns: float32 [B, M], the bias of each key; -1e30 for hidden ones.
      k_scale, v_scale: float32, the shape of k and v without D, for int8; else None.
      limits: int32 [B, R], how many keys each query sees, at most `lengths`; None for these.
      window: (`places` float32 [B, M], `after` float32 [B, R]), see `attention_decode`, or None.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[-1]
    rows = heads // kv_heads * queries
    padded = -(-rows // _ROWS) * _ROWS
    packed = q.reshape(batch, kv_heads, rows, dim)
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, padded - rows), (0, 0)))
    size, contiguous = k.shape[2], pages is None
    if contiguous:
        # The last block may reach beyond the cache, where `lengths` hide everything. The table is
        # unused; it lets both layouts share one kernel.
        block = min(max(size, _LANES), _BLOCKS[0])
        pages = jnp.zeros((batch, 1), jnp.int32)
        steps = pl.cdiv(size, block)
        lengths = jnp.minimum(lengths, size)
    else:
        block = next(block for block in _BLOCKS if size % block == 0)
        steps = pages.shape[1] * (size // block)
    counts = (jnp.minimum(lengths, steps * block) + block - 1) // block

    def last(b, t, counts):
        return jnp.minimum(t, jnp.maximum(counts[b] - 1, 0))

    def page(b, h, t, lengths, counts, pages):
        number = last(b, t, counts)
        if contiguous:
            return b, h, number, 0
        return pages[b, number // (size // block)], h, number % (size // block), 0

    def scale_row(b, h, t, lengths, counts, pages):
        first, head, number, _ = page(b, h, t, lengths, counts, pages)
        return first, head, 0, number

    def of_row(b, h, t, lengths, counts, pages):
        return b, h, 0, 0

    def column(b, h, t, lengths, counts, pages):
        return b, 0, last(b, t, counts)

    operands = [packed, k, v, columns[:, None]]
    in_specs = [
        pl.BlockSpec((1, 1, padded, dim), of_row),
        pl.BlockSpec((1, 1, block, dim), page),
        pl.BlockSpec((1, 1, block, value_dim), page),
        pl.BlockSpec((1, 1, block), column),
    ]
    for x in (k_scale, v_scale):
        if x is not None:
            operands.append(x.astype(jnp.float32)[:, :, None])
            in_specs.append(pl.BlockSpec((1, 1, 1, block), scale_row))
    places, after = window or (None, None)
    if places is not None:
        operands.append(places[:, None])
        in_specs.append(pl.BlockSpec((1, 1, block), column))
    for x in (limits, after):
        if x is not None:
            operands.append(_by_row(x, heads // kv_heads, padded))
            in_specs.append(pl.BlockSpec((1, padded, _LANES), lambda b, *_: (b, 0, 0)))
    kernel = functools.partial(
        _kernel,
        scale=scale,
        softcap=softcap,
        block=block,
        steps=steps,
        given=[x is not None for x in (k_scale, v_scale, places, limits, after)],
    )
    out, lse = pl.pallas_call(
        kernel,
        out_shape=(
            out_shape((batch, kv_heads, padded, value_dim), q.dtype, q),
            out_shape((batch, kv_heads, padded, _LANES), jnp.float32, q),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, kv_heads, steps),
            in_specs=in_specs,
            out_specs=(
                pl.BlockSpec((1, 1, padded, value_dim), of_row),
                pl.BlockSpec((1, 1, padded, _LANES), of_row),
            ),
            scratch_shapes=[
                pltpu.VMEM((padded, _LANES), jnp.float32),
                pltpu.VMEM((padded, _LANES), jnp.float32),
                pltpu.VMEM((padded, value_dim), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * heads * queries * steps * block * (dim + value_dim),
            transcendentals=batch * heads * queries * steps * block,
            bytes_accessed=batch * kv_heads * steps * block * (dim + value_dim) * k.dtype.itemsize,
        ),
        interpret=interpretation(),
        name="attention_decode",
    )(lengths.astype(jnp.int32), counts.astype(jnp.int32), pages.astype(jnp.int32), *operands)
    shape = (batch, heads, queries)
    out = out[:, :, :rows].reshape(*shape, value_dim)
    return out, lse[:, :, :rows, 0].reshape(shape)


def _by_row(x, groups, padded):
    """[B, R] numbers of the queries -> [B, padded, lanes] for the rows of a product."""
    x = jnp.tile(x, (1, groups))
    x = jnp.pad(x, ((0, 0), (0, padded - x.shape[1])))
    return jnp.broadcast_to(x[..., None], (*x.shape, _LANES))


def _kernel(lengths, counts, pages, q, k, v, columns, *rest, scale, softcap, block, steps, given):
    del pages  # The index maps read it.
    rest = list(rest)
    k_scale, v_scale, places, limits, after = (rest.pop(0) if has else None for has in given)
    out, lse, top, total, acc = rest
    b, t = pl.program_id(0), pl.program_id(2)

    @pl.when(t == 0)
    def _():
        top[...] = jnp.full_like(top, NEGATIVE)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(t < counts[b])
    def _():
        queries = q[0, 0]
        s = _dot(queries, k[0, 0].astype(queries.dtype), 1) * scale
        if k_scale is not None:
            s = s * k_scale[0, 0]
        if softcap is not None:
            s = softcap * jnp.tanh(s / softcap)
        bias = columns[0]
        slot = t * block + lax.broadcasted_iota(jnp.int32, bias.shape, 1)
        held = (bias > 0.5 * NEGATIVE) & (slot < lengths[b])
        seen = held
        if limits is not None:
            seen = seen & (slot < limits[0][:, :1])
        if after is not None:
            seen = seen & (places[0] > after[0][:, :1])
        s = jnp.where(seen, s + bias, NEGATIVE)
        before = top[:, :1]
        higher = jnp.maximum(before, s.max(axis=-1, keepdims=True))
        p = jnp.where(seen, jnp.exp(s - higher), 0.0)
        shrink = jnp.exp(before - higher)
        total[...] = jnp.broadcast_to(
            total[:, :1] * shrink + p.sum(axis=-1, keepdims=True), total.shape
        )
        top[...] = jnp.broadcast_to(higher, top.shape)
        values = v[0, 0].astype(queries.dtype)
        if v_scale is not None:
            p = jnp.where(seen, p * v_scale[0, 0], 0.0)
        else:
            # Hidden slots may hold NaN, and 0 times NaN is NaN.
            visible = jnp.broadcast_to(held.astype(jnp.float32), (_SUBLANES, block)).T[:, :1]
            values = jnp.where(visible > 0, values, 0)
        acc[...] = acc[...] * shrink + _dot(p.astype(queries.dtype), values, 0)

    @pl.when(t == steps - 1)
    def _():
        some = total[:, :1] != 0  # NaN stays one.
        norm = jnp.where(some, total[:, :1], 1.0)
        out[0, 0] = jnp.where(some, acc[...] / norm, 0.0).astype(out.dtype)
        lse[0, 0] = jnp.where(some, top[...] + jnp.log(norm), jnp.inf)


def _dot(a, b, axis):
    """a [R, K] with b, contracted over its `axis`; float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )
