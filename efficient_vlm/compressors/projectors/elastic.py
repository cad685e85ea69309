"""Methods that serve many budgets with one model: m3 (nested pools), mqt (nested queries)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from efficient_vlm import checks
from efficient_vlm.compressors import fold, grids
from efficient_vlm.compressors.base import Compressor, as_tuple, describe
from efficient_vlm.compressors.projectors.mlp import Projector
from efficient_vlm.compressors.projectors.resampler import position_code, query_tokens
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.tokens import zero_padding
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.nn.cross_attention import cross_attention
from efficient_vlm.shapes import Array

KEYS = ("position", "content")


class M3(Compressor):
    """`m3`: nested average pools, each scale the mean of the next finer one.

    Matryoshka Multimodal Models (arXiv 2405.17430, section 3; mu-cai/matryoshka-mm@ec30cd3): on 24
    x 24 patches the scales are 576, 144, 36, 9 and 1 tokens, pools with a stride of 1, 2, 4, 8, 24.
    The method has no parameters; it is a way to train. Published: every step runs the model once
    per scale on the same batch, and the loss is the mean over the M scales,

        L = 1/M sum_s loss(answer | X_s),

    at the cost of M steps. This trainer draws one scale per step instead (the config's `elastic`
    list with one entry per scale), which has the same expectation at the cost of one step. As
    published, the pools follow the projector (`projected`).

    Scales of other grids: the cell's side doubles while it divides rows and columns, and the last
    scale is one token (`grids.nested_grids`). Padding is excluded from the means.

    Attributes:
      scales: token counts to offer instead, each a budget of `average_pool` whose cells are unions
        of whole cells of the next finer scale; the full budget is always included.
    """

    scales: tuple[int, ...] | None = None

    label = "m3"
    projected = True

    def __post_init__(self):
        if self.scales is not None:
            values = as_tuple("compressor.scales", self.scales)
            scales = tuple(checks.whole("compressor.scales", s) for s in values)
            object.__setattr__(self, "scales", scales)
        super().__post_init__()

    @nn.nowrap
    def pools(self, grid: grids.Grid) -> dict[int, grids.Grid]:
        """Budget -> pooled grid, largest budget first.

        Raises:
          UserError: `scales` has a count that this grid cannot be pooled to, or is not nested.
        """
        if self.scales is None:
            return grids.nested_grids(grid)
        possible = grids.pooled_grids(grid)
        for scale in self.scales:
            if scale not in possible:
                raise UserError(
                    f"compressor.scales: {scale} is not an average pool of {grid[0]} x {grid[1]}",
                    allowed=describe(tuple(possible)),
                )
        pools = {n: possible[n] for n in sorted({*self.scales, max(possible)}, reverse=True)}
        ordered = list(pools.values())
        for fine, coarse in zip(ordered, ordered[1:], strict=False):
            if fine[0] % coarse[0] or fine[1] % coarse[1]:
                raise UserError(
                    f"compressor.scales: cells of {coarse} are not whole cells of {fine}",
                    allowed="nested scales, such as " + describe(tuple(grids.nested_grids(grid))),
                )
        return pools

    @nn.nowrap
    def reachable(self, grid):
        return tuple(self.pools(tuple(grid)))

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        if tokens.uneven:  # As `average_pool`, whose cells are those of each scale.
            return fold.pool_each(
                tokens, grids.resolve(self.grid, tokens.mask.shape[1]), self.budget
            )
        grid = self.check_call(tokens, signals, needs_grid=True)
        if self.budget == tokens.mask.shape[1]:
            return tokens
        return fold.pool(tokens, grid, self.pools(grid)[self.budget])


class MQT(Projector):
    """`mqt`: the first m of 256 learned queries, which read the patches by one cross-attention.

    Matryoshka Query Transformer (arXiv 2405.19315, section 3; gordonhu608/MQT-LLaVA@92c35d0). With
    c a fixed 2-D sine code, m the budget and x the patches:

        q_t = LN_q(query_t + c(t)),  k_n = LN_k(c(n)),  v_n = LN_v(x_n)
        token_t = W_p (b_o + W_o attention(W_q q_t + b_q; W_k k + b_k; W_v v + b_v)),  t < m

    As published, keys hold positions only: a token's attention does not depend on the image, it
    is a fixed, learned mixture of positions. With keys="content", k_n = LN_k(x_n) + c(n) instead.
    Queries do not attend to each other, so the m tokens are the first m of any larger budget, and
    one checkpoint serves all. Published training: a first stage with m = 256, then one m per step,
    drawn from 2, 4, ..., 256 (here the config's `elastic` list with those budgets).

    Positions, sizes and `source` as in `resampler`. No budget is the identity, and there are at
    most as many tokens as patches.

    Deviations: c is evaluated at the positions of the patches in the grid of queries (16 x 16 for
    256), where the published code interpolates its table bicubically; frequencies and axis order
    (column, row) are the same. Kernels are initialised by lecun_normal.

    Attributes:
      num_queries: number of learned queries, the largest budget.
      num_heads: must divide the width.
      keys: "position" (default, as published) or "content".
      features: output width (W_p); None for the width of the input.
    """

    num_queries: int = 256
    num_heads: int = 16
    keys: str = "position"

    label = "mqt"

    @nn.nowrap
    def check_options(self):
        super().check_options()
        checks.whole("compressor.num_queries", self.num_queries)
        checks.whole("compressor.num_heads", self.num_heads)
        if self.keys not in KEYS:
            raise unknown("compressor.keys", str(self.keys), KEYS)

    @nn.nowrap
    def reachable(self, grid):
        return tuple(range(min(self.num_queries, grid[0] * grid[1]), 0, -1))

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        queries = 2 * self.budget * width * (2 * width + (self.features or width))
        patches = 2 * 2 * num_tokens * width * width
        attention = 2 * 2 * self.budget * num_tokens * width
        return queries + patches + attention + 2 * self.budget * num_tokens * 2  # ... and positions

    @nn.compact
    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid = self.check_call(tokens, signals, needs_grid=True)
        width, dtype = tokens.embed.shape[-1], tokens.embed.dtype
        if width % self.num_heads:
            raise UserError(
                f"compressor.num_heads: {self.num_heads} does not divide the width {width}",
                allowed=f"a divisor of {width}",
            )
        tokens = zero_padding(tokens)
        side = math.isqrt(self.num_queries - 1) + 1
        slot = jnp.stack(jnp.divmod(jnp.arange(self.budget), side), axis=-1)
        extent = jnp.asarray(grid, jnp.float32)
        patch = (tokens.position + 0.5) * side / extent - 0.5

        init, shape = nn.initializers.normal(0.02), (self.num_queries, width)
        queries = self.weight("queries", init, shape, ("queries", "embed"), jnp.float32)
        queries = queries[: self.budget] + self._code(slot.astype(jnp.float32), width)
        code = self._code(patch, width)
        if self.keys == "position":
            keys = self.layer_norm("key_norm", code, "embed", 1e-6)
        else:
            content = tokens.embed.astype(jnp.float32)
            keys = self.layer_norm("key_norm", content, "embed", 1e-6) + code
        queries = self.layer_norm("query_norm", queries, "embed", 1e-6)
        values = self.layer_norm("value_norm", tokens.embed, "embed", 1e-6)

        def heads(name, x):
            x = self.dense(name, x.astype(dtype), width, ("embed", "heads"))
            return x.reshape(*x.shape[:-1], self.num_heads, width // self.num_heads)

        q, k, v = heads("query", queries), heads("key", keys), heads("value", values)
        mixed, attention, _ = cross_attention(q, k, v, tokens.mask, tokens.bias)
        mixed = self.dense("out", mixed.reshape(*mixed.shape[:2], width), width, ("heads", "embed"))
        embed = self.dense(
            "projection", mixed, self.features or width, ("heads", "embed"), bias=False
        )
        return query_tokens(tokens, embed, jax.lax.stop_gradient(attention.mean(axis=1)))

    @nn.nowrap
    def _code(self, position: Float[Array, "*batch 2"], width: int) -> Float[Array, "*batch D"]:
        """The sine code with the column first."""
        return position_code(position[..., ::-1], width)
