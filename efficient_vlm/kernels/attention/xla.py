"""Attention in blocks of the map, in plain XLA: O(N) memory on every backend.

Each batch row and key head is one problem of G x N queries (of the G heads that share its keys) and
M keys. On a CPU the problems form a loop, empty blocks are skipped, and the logits of a block stay
in the cache: XLA's batched products on a CPU are several times slower than the same products one by
one. Elsewhere the problems form one batch.

The formulas are the recurrence of online softmax (arXiv 2205.14135, section 3.1).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_vlm.kernels import hints
from efficient_vlm.kernels.attention import blocks as tables
from efficient_vlm.kernels.attention.mask import K_FIELDS, NEGATIVE, Q_FIELDS, Mask, all_seen
from efficient_vlm.kernels.manual import zeros

__all__ = ["backward", "forward", "importance"]

# Queries (of all heads that share keys) and keys of one block on a CPU, at most: 4 MiB of logits in
# float32. Smaller blocks make the products inefficient and rescale sums more often (measured with
# 729 to 4096 keys, forward and backward: with 512 keys 2 to 13 % slower, at 729 keys 60 %).
_BLOCK_QUERIES = 1024
_BLOCK_KEYS = 1024
# The same where problems form one batch.
_BATCHED_QUERIES, _BATCHED_KEYS = 2048, 512
# With a mask, smaller blocks skip more, but a problem of so few keys is one block.
_MASKED_KEYS, _FEW_KEYS = 256, 512


def forward(q, k, v, key_bias, mask, *, scale, softcap, looped):
    """q [B, H, N, D], k and v [B, Hk, M, D and Dv] -> (out [B, H, N, Dv], lse [B, H, N])."""
    cut = _Cut(q, k, mask, looped)
    logits = functools.partial(_logits, scale=scale, softcap=softcap)

    def problem(item):
        q, k, v, bias, mask, live = item

        def queries(item):
            q, i = item

            def step(t, carry):
                acc, total, top = carry
                j = t if live is None else live[0][i, t]
                s, seen = logits(q, k[j], _at(bias, j), cut.part(mask, i, j))
                higher = jnp.maximum(top, s.max(axis=-1, keepdims=True))
                p = jnp.exp(s - higher)
                if seen is not None:
                    p = jnp.where(seen, p, 0)
                shrink = jnp.exp(top - higher)
                total = total * shrink + p.sum(axis=-1, keepdims=True)
                acc = acc * shrink.reshape(-1, 1) + _dot(_flat(p).astype(cut.operand), v[j])
                return acc, total, higher

            rows = (*q.shape[:2], 1)
            start = (
                zeros((rows[0] * rows[1], v.shape[-1]), cut.exact, q),
                zeros(rows, cut.exact, q),
                zeros(rows, cut.exact, q, NEGATIVE),
            )
            acc, total, top = cut.over_keys(step, start, live, i)
            some = total != 0  # NaN stays one.
            total = jnp.where(some, total, 1)
            out = jnp.where(_flat(some), acc / _flat(total), 0).reshape(*q.shape[:2], -1)
            lse = jnp.where(some, top + jnp.log(total), jnp.inf)[..., 0]
            return out, lse

        return _loop(queries, (q, jnp.arange(len(q))), True)

    items = (cut.queries(q), cut.keys(k), cut.keys(v), cut.bias(key_bias), *cut.mask_items())
    out, lse = _loop(problem, items, looped)
    return cut.back(out).astype(v.dtype), cut.back(lse[..., None])[..., 0]


def backward(q, k, v, key_bias, mask, lse, delta, d_out, weights, gain, *, scale, softcap, looped):
    """(dq, dk, dv, d key_bias [B, M] or None) from results of the forward pass.

    Args:
      lse: [B, H, N]; `inf` in rows that see no key.
      delta: [B, H, N], the sum over keys of P dP, minus the cotangent of lse.
      d_out: [B, H, N, Dv].
      weights, gain: [B, N] and [B, M], or None: dP is d_out.v + weights gain.
    """
    cut = _Cut(q, k, mask, looped)
    logits = functools.partial(_logits, scale=scale, softcap=softcap, slope=True)
    dims = (k.shape[-1], v.shape[-1])

    def problem(item):
        q, d_out, lse, delta, weights, k, v, bias, gain, mask, live = item
        keys = k.shape[:2]

        def queries(sums, item):
            q, d_out, lse, delta, weights, i = item
            flat_q, flat_d = _flat(q).astype(cut.operand), _flat(d_out).astype(cut.operand)

            def step(t, carry):
                dq, sums = carry
                j = t if live is None else live[0][i, t]
                s, seen, slope = logits(q, k[j], _at(bias, j), cut.part(mask, i, j))
                p = jnp.exp(s - lse[..., None])
                if seen is not None:
                    p = jnp.where(seen, p, 0)
                d_p = _dot(flat_d, v[j].T).reshape(p.shape)
                if gain is not None:
                    d_p = d_p + weights[..., None] * gain[j]
                d_s = p * (d_p - delta[..., None])
                parts = [_dot(_flat(p).T.astype(cut.operand), flat_d)]
                if bias is not None:
                    parts.append(d_s.sum(axis=(0, 1)))
                d_s = _flat(d_s if slope is None else d_s * slope).astype(cut.operand)
                parts.append(_dot(d_s.T, flat_q))
                sums = [
                    lax.dynamic_update_index_in_dim(total, total[j] + part, j, 0)
                    for total, part in zip(sums, parts, strict=True)
                ]
                return dq + _dot(d_s, k[j]), sums

            start = (zeros(flat_q.shape, cut.exact, q), sums)
            dq, sums = cut.over_keys(step, start, live, i)
            return sums, dq.reshape(q.shape)

        sums = [zeros((*keys, dim), cut.exact, q) for dim in (dims[1], dims[0])]
        if bias is not None:
            sums.insert(1, zeros(keys, cut.exact, q))
        return lax.scan(queries, sums, (q, d_out, lse, delta, weights, jnp.arange(len(q))))

    if weights is not None:
        weights = jnp.broadcast_to(weights[:, None], lse.shape)
    items = (
        cut.queries(q),
        cut.queries(d_out),
        cut.numbers(lse, jnp.inf),
        cut.numbers(delta),
        cut.numbers(weights),
        cut.keys(k),
        cut.keys(v),
        cut.bias(key_bias),
        cut.bias(gain),
        *cut.mask_items(),
    )
    sums, dq = _loop(problem, items, looped)
    dv, dk = cut.whole_keys(sums[0]), cut.whole_keys(sums[-1])
    d_bias = None
    if key_bias is not None:
        d_bias = cut.whole_keys(sums[1][..., None])[..., 0].sum(axis=1).astype(key_bias.dtype)
    return (
        (cut.back(dq) * scale).astype(q.dtype),
        (dk * scale).astype(k.dtype),
        dv.astype(v.dtype),
        d_bias,
    )


def importance(q, k, key_bias, mask, lse, weights, *, scale, softcap, looped):
    """[B, M]: mean over heads of sum_i exp(logit_ij - lse_i).

    Args:
      lse: [B, H, N], minus the logarithm of the weights [B, N]; `inf` where a weight is 0.
    """
    cut = _Cut(q, k, mask, looped, weights)
    logits = functools.partial(_logits, scale=scale, softcap=softcap)

    def problem(item):
        q, lse, k, bias, mask, live = item

        def queries(total, item):
            q, lse, i = item

            def step(t, total):
                j = t if live is None else live[0][i, t]
                s, seen = logits(q, k[j], _at(bias, j), cut.part(mask, i, j))
                p = jnp.exp(s - lse[..., None])
                p = p if seen is None else jnp.where(seen, p, 0)
                return lax.dynamic_update_index_in_dim(total, total[j] + p.sum((0, 1)), j, 0)

            return cut.over_keys(step, total, live, i), None

        start = zeros(k.shape[:2], cut.exact, q)
        return lax.scan(queries, start, (q, lse, jnp.arange(len(q))))[0]

    items = (
        cut.queries(q),
        cut.numbers(lse, jnp.inf),
        cut.keys(k),
        cut.bias(key_bias),
        *cut.mask_items(),
    )
    total = _loop(problem, items, looped)
    return cut.whole_keys(total[..., None])[..., 0].sum(axis=1) / q.shape[1]


def _logits(q, k, bias, mask, *, scale, softcap, slope=False):
    """One block: q [G, bq, D], k [bk, D] -> logits [G, bq, bk], and which are visible, or None.

    With `slope` also the derivative of the cap, or None without one.
    """
    exact = jnp.promote_types(q.dtype, jnp.float32)
    # float32 queries are scaled before the product: a block of q has fewer numbers than its logits.
    early = q.dtype == exact
    s = _dot(_flat(q * jnp.asarray(scale, q.dtype) if early else q), k.T)
    s = s if early else s * scale
    bent = None
    if softcap is not None:
        bent = jnp.tanh(s / softcap)
        s = softcap * bent
        bent = (1 - bent * bent).reshape(*q.shape[:2], -1)
    s = s if bias is None else s + bias
    s = s.reshape(*q.shape[:2], -1)
    seen = None
    if mask is not None:
        seen = mask.rule.seen(
            lambda name: getattr(mask, name)[:, None], lambda name: getattr(mask, name)
        )
        s = jnp.where(seen, s, NEGATIVE)
    return (s, seen, bent) if slope else (s, seen)


def _even(count: int, most: int) -> int:
    """The size of the fewest blocks of up to `most` that hold `count`: little is padding."""
    return -(-count // -(-count // most))


class _Cut:
    """How a problem is cut into blocks, and its arrays in that form."""

    def __init__(self, q, k, mask: Mask | None, looped: bool, weights=None):
        self.batch, self.heads, self.count, _ = q.shape
        self.kv_heads, self.num_keys = k.shape[1:3]
        self.groups = self.heads // self.kv_heads
        self.exact = jnp.promote_types(q.dtype, jnp.float32)
        # On a CPU only float32 and float64 products are fast.
        self.operand = self.exact if looped else q.dtype
        most = max(1, _BLOCK_QUERIES // self.groups) if looped else _BATCHED_QUERIES
        keys = _BLOCK_KEYS if looped else _BATCHED_KEYS
        keys = keys if mask is None else _MASKED_KEYS
        logits = self.groups * self.count * self.num_keys
        if looped and self.num_keys <= _FEW_KEYS and logits <= _BLOCK_QUERIES * _FEW_KEYS:
            # A small problem is one block without loops, which also halves compile time.
            most, keys = self.count, self.num_keys
        self.block_k = _even(self.num_keys, keys) if looped else min(self.num_keys, keys)
        self.block_q = _even(self.count, most)
        self.blocks_q = -(-self.count // self.block_q)
        self.blocks_k = -(-self.num_keys // self.block_k)
        self.padded_q = self.blocks_q * self.block_q
        self.padded_k = self.blocks_k * self.block_k
        if mask is None and self.padded_k > self.num_keys:
            mask = all_seen(self.count, self.num_keys)
        self.mask = None
        if mask is not None:
            self.mask = tables.pad_mask(mask, self.padded_q, self.padded_k)
        self.live = None
        blocks = self.blocks_q * self.blocks_k
        if looped and blocks > 1 and (self.mask is not None or weights is not None):
            live = jnp.ones((1, self.blocks_q, self.blocks_k), bool)
            if self.mask is not None:
                live = tables.live_blocks(self.mask, self.block_q, self.block_k)
            if weights is not None:
                weighs = tables.weighed_blocks(weights, self.padded_q, self.block_q)
                live = live & weighs[..., None]
            self.live = tables.listed(live)

    def _pad(self, x, count, fill=0):
        widths = [(0, 0)] * x.ndim
        axis = 1 if x.ndim == 2 else 2
        widths[axis] = (0, count - x.shape[axis])
        return jnp.pad(x, widths, constant_values=fill)

    def queries(self, x, fill=0):
        """[B, H, N, C] -> [B * Hk, blocks, G, block, C]"""
        x = self._pad(x, self.padded_q, fill)
        x = x.reshape(-1, self.groups, self.blocks_q, self.block_q, x.shape[-1])
        return x.swapaxes(1, 2)

    def numbers(self, x, fill=0):
        """[B, H, N], or None, -> [B * Hk, blocks, G, block]"""
        return None if x is None else self.queries(x[..., None], fill)[..., 0]

    def back(self, x):
        """The inverse of `queries`."""
        x = x.swapaxes(1, 2).reshape(self.batch, self.heads, self.padded_q, x.shape[-1])
        return x[:, :, : self.count]

    def keys(self, x):
        """[B, Hk, M, C] -> [B * Hk, blocks, block, C]"""
        x = self._pad(x, self.padded_k).astype(self.operand)
        return x.reshape(-1, self.blocks_k, self.block_k, x.shape[-1])

    def whole_keys(self, x):
        """The inverse of `keys`."""
        x = x.reshape(self.batch, self.kv_heads, self.padded_k, x.shape[-1])
        return x[:, :, : self.num_keys]

    def bias(self, bias):
        """[B, M] -> [B * Hk, blocks, block]"""
        if bias is None:
            return None
        bias = self._pad(bias.astype(self.exact), self.padded_k)
        return self._each_head(bias.reshape(-1, self.blocks_k, self.block_k))

    def mask_items(self) -> tuple:
        """(mask in blocks, lists of live blocks), each with leading axis B * Hk, or None."""
        mask = live = None
        if self.mask is not None:
            cut = {}
            for names, block in ((Q_FIELDS, self.block_q), (K_FIELDS, self.block_k)):
                for name in names:
                    if (x := getattr(self.mask, name)) is not None:
                        cut[name] = self._each_head(x.reshape(len(x), -1, block))
            mask = self.mask.replace(**cut)
        if self.live is not None:
            live = jax.tree.map(self._each_head, self.live)
        return mask, live

    def _each_head(self, x):
        x = jnp.broadcast_to(x[:, None], (self.batch, self.kv_heads, *x.shape[1:]))
        return x.reshape(-1, *x.shape[2:])

    def part(self, mask: Mask | None, i, j) -> Mask | None:
        """The mask of one block."""
        if mask is None:
            return None
        fields = {name: _at(getattr(mask, name), i) for name in Q_FIELDS}
        fields |= {name: _at(getattr(mask, name), j) for name in K_FIELDS}
        return mask.replace(**fields)

    def over_keys(self, step, start, live, i):
        """Runs `step` over the blocks of keys, or only over the live ones if they are listed."""
        if live is not None:
            shape = self.count, self.num_keys, self.block_q, self.block_k
            usual = tables.expected_blocks(self.mask, *shape) / self.blocks_q
            with hints.about_turns(usual):
                return lax.fori_loop(0, live[1][i], step, start)
        if self.blocks_k == 1:
            return step(0, start)
        return lax.fori_loop(0, self.blocks_k, step, start)


def _dot(a, b):
    exact = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.matmul(a, b.astype(a.dtype), preferred_element_type=exact)


def _flat(x):
    """[G, block, C] -> [G * block, C]"""
    return x.reshape(-1, x.shape[-1])


def _at(x, i):
    return None if x is None else x[i]


def _loop(function, items, looped: bool):
    """`lax.map`, without a loop for a single item; with `looped` False all items at once."""
    if not looped:
        return jax.vmap(function)(items)
    if len(jax.tree.leaves(items)[0]) > 1:
        return lax.map(function, items)
    return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], items)))
