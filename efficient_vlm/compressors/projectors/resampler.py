"""resampler: learned queries that read the patches through one cross-attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from efficient_vlm import checks
from efficient_vlm.compressors.base import Compressor
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.tokens import VisualTokens, remap, zero_padding
from efficient_vlm.errors import UserError
from efficient_vlm.kernels import ordering
from efficient_vlm.nn.cross_attention import cross_attention
from efficient_vlm.nn.linear import product, weight_of
from efficient_vlm.nn.norms import rms_normalised
from efficient_vlm.shapes import Array


class Resampler(Compressor):
    """`resampler`: token t = query_t + W_o attention(W_q query_t; W_k (n(x) + position), W_v n(x)).

    n divides by the root mean square, the position is a fixed 2-D sine code. Only the first
    `budget` of `num_queries` queries are used (the nested queries of MQT-LLaVA, but with content in
    the keys, which the published code omits), so one checkpoint serves every budget.

    Positions, sizes and `source` follow from a_tn, the attention of query t to patch n averaged
    over heads, without gradients. The position of a token is the mean of the patches' positions
    weighted by a. Each patch is shared among the queries in proportion to a; the shares of a query
    sum to its size (so sizes sum to the number of real patches, and none is 0), and `source` names
    the query with the largest share. In a row with r < budget real patches only the first r queries
    are real.

    At the full budget the tokens are unchanged; the parameters exist nevertheless.

    Attributes:
      num_queries: number of learned queries, the largest budget below the full one.
      num_heads: must divide the width.
    """

    num_queries: int = 64
    num_heads: int = 4

    label = "resampler"
    makes_tokens = True

    @nn.nowrap
    def check_options(self):
        checks.whole("compressor.num_queries", self.num_queries)
        checks.whole("compressor.num_heads", self.num_heads)

    @nn.nowrap
    def reachable(self, grid):
        num_tokens = grid[0] * grid[1]
        budgets = range(min(self.num_queries, num_tokens), 0, -1)
        return (num_tokens, *(b for b in budgets if b != num_tokens))

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        if self.budget == num_tokens:
            return 0
        projections = 2 * width * width * (2 * self.budget + 2 * num_tokens)
        attention = 2 * 2 * self.budget * num_tokens * width
        return projections + attention + 2 * self.budget * num_tokens * 2  # ... and positions.

    @nn.compact
    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        self.check_call(tokens, signals, needs_grid=False)
        num_tokens, width = tokens.embed.shape[1:]
        if width % self.num_heads:
            raise UserError(
                f"compressor.num_heads: {self.num_heads} does not divide the width {width}",
                allowed=f"a divisor of {width}",
            )

        def param(name, init, axes, shape):
            return weight_of(self, name, init, shape, axes, tokens.embed.dtype)

        matrix, square = nn.initializers.lecun_normal(), (width, width)
        normal = nn.initializers.normal(1.0)
        queries = param("queries", normal, ("queries", "embed"), (self.num_queries, width))
        query_kernel = param("resampler_query", matrix, ("embed", "heads"), square)
        key_kernel = param("resampler_key", matrix, ("embed", "heads"), square)
        value_kernel = param("resampler_value", matrix, ("embed", "heads"), square)
        out_kernel = param("resampler_out", matrix, ("heads", "embed"), square)
        if self.budget == num_tokens:
            return tokens

        tokens = zero_padding(tokens)
        queries = queries[: self.budget]
        x = rms_normalised(tokens.embed)
        code = position_code(tokens.position, width)
        dtype = tokens.embed.dtype

        def heads(y):
            return y.reshape(*y.shape[:-1], self.num_heads, width // self.num_heads)

        q = heads(product(queries, query_kernel, dtype))
        k = heads(product(x + code, key_kernel, dtype))
        v = heads(product(x, value_kernel, dtype))
        mixed, attention, _ = cross_attention(q, k, v, tokens.mask, tokens.bias)
        mixed = mixed.reshape(*mixed.shape[:2], width)
        embed = queries + product(mixed, out_kernel, dtype)
        return query_tokens(tokens, embed, jax.lax.stop_gradient(attention.mean(axis=1)))


def query_tokens(
    tokens: VisualTokens, embed: Float[Array, "B K D"], attention: Float[Array, "B K T"]
) -> VisualTokens:
    """The tokens of K queries, with positions, sizes and `source` as in `Resampler`.

    Args:
      tokens: T patches per row, after `zero_padding`.
      embed: [B, K, D]; in a row with r < K real patches only the first r count.
      attention: float32 [B, K, T] of queries to patches; rows sum to 1, 0 for padding.

    Returns:
      K tokens per row.
    """
    real = jnp.sum(tokens.mask, axis=1, keepdims=True)
    mask = jnp.arange(embed.shape[1])[None, :] < real
    tiny = jnp.finfo(jnp.float32).tiny  # A patch without attention is shared equally.
    share = jnp.where(mask[..., None], jnp.maximum(attention, tiny), 0.0)
    holder = ordering.best(share, axis=1)
    share = share / jnp.maximum(share.sum(axis=1, keepdims=True), tiny)
    position = jnp.einsum(
        "bkt,btc->bkc", attention, tokens.position, precision=jax.lax.Precision.HIGHEST
    )
    return VisualTokens(
        embed=jnp.where(mask[..., None], embed, 0),
        position=jnp.where(mask[..., None], position, 0.0),
        size=jnp.where(mask, jnp.sum(share * tokens.size[:, None, :], axis=-1), 0.0),
        mask=mask,
        source=remap(tokens.source, jnp.where(tokens.mask, holder, -1)),
    )


def position_code(
    position: Float[Array, "*batch 2"], width: int
) -> Float32[Array, "*batch {width}"]:
    """Sines and cosines of row and column, float32 [..., width].

    A quarter of the width each for sin(row w), cos(row w), sin(column w), cos(column w), with w
    decreasing from 1 towards 1/10000 in geometric steps; the remaining channels are 0.

    Args:
      position: float32 [..., 2], in patches, may be fractional.
      width: D.
    """
    quarter = width // 4
    frequency = 10000.0 ** (-jnp.arange(quarter, dtype=jnp.float32) / max(quarter, 1))
    angle = position[..., None] * frequency  # [..., 2, quarter]
    code = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-2)  # [..., 2, 2, quarter]
    code = code.reshape(*position.shape[:-1], 4 * quarter)
    return jnp.pad(code, [(0, 0)] * (code.ndim - 1) + [(0, width - 4 * quarter)])
