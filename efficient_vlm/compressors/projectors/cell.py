"""tokenpacker: each pooled point attends to the patches of its own cell only."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from efficient_vlm import checks
from efficient_vlm.compressors import grids
from efficient_vlm.compressors.between.pooling import space_to_depth
from efficient_vlm.compressors.projectors.mlp import Projector, exact_gelu, pool, with_embed
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.nn.cross_attention import window_attention
from efficient_vlm.shapes import Array

STYLES = ("paper", "official")


class TokenPacker(Projector):
    """`tokenpacker`: coarse points that attend to the s x s patches around them.

    TokenPacker (arXiv 2407.02392, section 3.2). With p the patches bilinearly down-sampled by s,

        q = W_q p,  k = MLP_k(x),  v = MLP_v(x)      one MLP: Linear, GELU (exact), Linear, width D
        a = softmax over the cell of <q, k> / sqrt(D / heads), for each head
        y = MLP(LayerNorm(q + W_o a v))              Linear(D, features), GELU, Linear(features)

    All matrices of perceptrons have a bias, W_q and W_o have none. That is style "paper" (default).
    The official module (CircleRadon/TokenPacker), style "official", has LayerNorms on all three
    (epsilon 1e-6), then an attention with projections of its own, and neither residual nor
    LayerNorm before the last perceptron:

        q' = A_q LN(q) + b_q,  k' = A_k LN(k) + b_k,  v' = A_v LN(v) + b_v
        y = MLP(W_o a' v' + b_o)                     a' the softmax of <q', k'>

    Parameters that both styles have share their names; the other names distinguish the styles.
    Published: s = 2, 3, 4, which gives 144, 64, 36 of 576 tokens, and 8 heads. Budgets: those of
    `grids.shuffled_grids`; s follows from the budget. With s = 1 every point attends to its own
    patch only, which is not the identity.

    Bilinear down-sampling samples the centres of the cells: the middle patch for odd s, the mean of
    the four middle patches for even s.

    Deviations: keys and values come from the one layer that the tokens hold, not from four layers
    side by side. Padding is excluded from the keys. A point whose middle patches are all padding is
    the mean of the real patches of its cell; a cell of padding alone is padding. A bias of the
    tokens is added to the logits of the patches as keys and then discarded.

    Attributes:
      num_heads: must divide the width D.
      style: "paper" or "official", see above.
    """

    num_heads: int = 8
    style: str = "paper"

    label = "tokenpacker"

    @nn.nowrap
    def check_options(self):
        super().check_options()
        checks.whole("compressor.num_heads", self.num_heads)
        if self.style not in STYLES:
            raise unknown("compressor.style", str(self.style), STYLES)

    @nn.nowrap
    def reachable(self, grid):
        return tuple(grids.shuffled_grids(grid))

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        features = self.features or width
        keys_values = 2 * 2 * num_tokens * 2 * width * width
        attention = 2 * 2 * num_tokens * width
        if self.style == "official":  # The projections of the attention.
            attention += 2 * width * width * (2 * num_tokens + self.budget)
        return (
            keys_values
            + attention
            + 2 * self.budget * 2 * width * width
            + 2 * self.budget * features * (width + features)
        )

    @nn.compact
    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid = self.check_call(tokens, signals, needs_grid=True)
        width = tokens.embed.shape[-1]
        if width % self.num_heads:
            raise UserError(
                f"compressor.num_heads: {self.num_heads} does not divide the width {width}",
                allowed=f"a divisor of {width}",
            )
        cells = grids.shuffled_grids(grid)[self.budget]
        side = grid[0] // cells[0]
        bias = tokens.bias
        folded = pool(tokens.replace(bias=None), grid, cells)

        def by_cell(x):
            """[B, h*w, C] to [B, cells, s*s, C]."""
            return space_to_depth(x, grid, cells).reshape(
                x.shape[0], self.budget, side * side, x.shape[-1]
            )

        def heads(x):
            return x.reshape(*x.shape[:-1], self.num_heads, width // self.num_heads)

        x = jnp.where(tokens.mask[..., None], tokens.embed, 0)
        live = by_cell(tokens.mask[..., None])[..., 0]
        points = cell_points(by_cell(x), live, side)
        q = self.dense("query", points, width, ("embed", "heads"), bias=False)
        k, v = (self._perceptron(name, x) for name in ("key", "value"))
        official = self.style == "official"
        if official:
            q, k, v = (
                self.dense(f"attention_{name}", self._normal(name, y), width, ("embed", "heads"))
                for name, y in (("query", q), ("key", k), ("value", v))
            )
        k, v = by_cell(k), by_cell(v)
        if bias is not None:
            bias = by_cell(jnp.where(tokens.mask, bias, 0)[..., None])[..., 0]
        mixed = window_attention(heads(q), heads(k), heads(v), live, bias).reshape(q.shape)
        y = self.dense("out", mixed, width, ("mlp", "embed"), bias=official)
        if not official:
            y = self.layer_norm("norm", q + y, "embed", 1e-5)
        features = self.features or width
        return with_embed(folded, self.mlp(y, features, features, exact_gelu))

    @nn.nowrap
    def _normal(self, name: str, x: jax.Array) -> jax.Array:
        return self.layer_norm(f"{name}_norm", x, "embed", 1e-6)

    @nn.nowrap
    def _perceptron(self, name: str, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = exact_gelu(self.dense(f"{name}_up", x, width, ("embed", "mlp")))
        return self.dense(f"{name}_down", x, width, ("mlp", "embed"))


def cell_points(
    x: Float[Array, "B cells P D"], live: Bool[Array, "B cells P"], side: int
) -> Float[Array, "B cells D"]:
    """Bilinearly down-samples the patches of each cell to one point.

    Args:
      x: [B, cells, s*s, D], row by row, 0 in padding.
      live: bool [B, cells, s*s].
      side: s.

    Returns:
      [B, cells, D] in the dtype of x; 0 for a cell without real patches.
    """
    middle = np.zeros(side, bool)
    middle[(side - 1) // 2 : side // 2 + 1] = True
    central = live & jnp.asarray(np.outer(middle, middle).reshape(-1))
    used = jnp.where(central.any(axis=-1, keepdims=True), central, live)
    count = jnp.maximum(used.sum(axis=-1), 1)[..., None]
    total = jnp.sum(jnp.where(used[..., None], x, 0).astype(jnp.float32), axis=-2)
    return (total / count).astype(x.dtype)
