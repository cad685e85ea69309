"""mlp and deco, and the base classes of trained projectors: parameters, layers, pooling costs."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from efficient_vlm import checks
from efficient_vlm.compressors import fold, grids
from efficient_vlm.compressors.base import Compressor
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.tokens import VisualTokens, zero_padding
from efficient_vlm.nn.linear import Dtype, Weight, product, weight_of
from efficient_vlm.nn.norms import layer_normalised
from efficient_vlm.shapes import Array


class Parametric(Compressor):
    """A compressor with parameters, named `<label>_<layer>_<part>`.

    The label distinguishes the methods of one elastic checkpoint. Parameters are float32 and cast
    to the dtype of the tokens; norms are computed in float32.
    """

    @nn.nowrap
    def weight(self, name: str, init: Callable, shape: tuple, axes: tuple, dtype: Dtype) -> Weight:
        """The parameter `<label>_<name>` with logical axes, in `dtype`."""
        return weight_of(self, f"{self.label}_{name}", init, shape, axes, dtype)

    @nn.nowrap
    def dense(
        self,
        name: str,
        x: Float[Array, "*batch D"],
        features: int,
        axes: tuple,
        *,
        bias: bool = True,
    ) -> Float[Array, "*batch {features}"]:
        """x @ kernel + bias over the last axis."""
        kernel = nn.initializers.lecun_normal()
        kernel = self.weight(f"{name}_kernel", kernel, (x.shape[-1], features), axes, x.dtype)
        y = product(x, kernel, x.dtype)
        if bias:
            y = y + self.weight(
                f"{name}_bias", nn.initializers.zeros, (features,), axes[1:], x.dtype
            )
        return y

    @nn.nowrap
    def mlp(
        self,
        x: Float[Array, "*batch D"],
        features: int,
        hidden: int,
        activation: Callable,
        *,
        bias: bool = True,
    ) -> Float[Array, "*batch {features}"]:
        """Two matrices with `activation` between them."""
        x = activation(self.dense("up", x, hidden, ("embed", "mlp"), bias=bias))
        return self.dense("down", x, features, ("mlp", "embed"), bias=bias)

    @nn.nowrap
    def layer_norm(
        self, name: str, x: Float[Array, "*batch D"], axis: str, epsilon: float
    ) -> Float[Array, "*batch D"]:
        """LayerNorm over the last axis, with the logical name `axis`; returns the dtype of x."""
        shape, ones, zeros = x.shape[-1:], nn.initializers.ones, nn.initializers.zeros
        scale = self.weight(f"{name}_scale", ones, shape, (axis,), jnp.float32)
        shift = self.weight(f"{name}_bias", zeros, shape, (axis,), jnp.float32)
        return (layer_normalised(x, epsilon) * scale + shift).astype(x.dtype)


class Projector(Parametric):
    """A trained projector: it may change the width, and no budget is the identity.

    Attributes:
      features: output width; None for the width of the input.
    """

    features: int | None = None

    makes_tokens = True

    @nn.nowrap
    def check_options(self):
        if self.features is not None:
            checks.whole("compressor.features", self.features)


class Mlp(Projector):
    """`mlp`: Linear, GELU, Linear on every token, without removing any.

    LLaVA-1.5 (arXiv 2310.03744, section 3.3), the projector `mlp2x_gelu`: both matrices with bias
    and `features` columns, GELU with the exact erf. The only budget is the number of patches (or
    None), at which it is the perceptron, not the identity.

    Positions, sizes and `source` are those of the input; padding becomes zeros.
    """

    budget: int | None = None

    label = "mlp"
    optional_budget = True

    @nn.nowrap
    def reachable(self, grid):
        return (grid[0] * grid[1],)

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        features = self.features or width
        return 2 * num_tokens * features * (width + features)

    @nn.compact
    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        if self.budget is not None:
            self.check_call(tokens, signals, needs_grid=False)
        tokens = zero_padding(tokens)
        features = self.features or tokens.embed.shape[-1]
        return with_embed(tokens, self.mlp(tokens.embed, features, features, exact_gelu))


class Deco(Projector):
    """`deco`: adaptive average pooling to a coarser grid, then Linear, GELU, Linear.

    DeCo (arXiv 2405.20985, section 4: "2D adaptive pooling as a down-sampler at the patch level",
    yaolinli/DeCo@103416e). Published: 144 tokens from 24 x 24. Both matrices have a bias and
    `features` columns, GELU is exact. The full budget omits only the pooling and is not the
    identity.

    Budgets: those of `adaptive_grids` (8 x 8: 64, 49, 36, 25, 16, 9, 4, 1).

    Deviations: padding is excluded from the means. If the cells do not divide the grid, patches are
    weighted by the area they share with the cell (`fold.pool`), while torch's adaptive pooling
    gives every patch that a cell touches the same weight; otherwise both agree.
    """

    label = "deco"

    @nn.nowrap
    def reachable(self, grid):
        return tuple(adaptive_grids(grid))

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        features, grid = self.features or width, grids.resolve(self.grid, num_tokens)
        pooling = pool_flops(grid, adaptive_grids(grid)[self.budget], width)
        return pooling + 2 * self.budget * features * (width + features)

    @nn.compact
    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid = self.check_call(tokens, signals, needs_grid=True)
        tokens = pool(tokens, grid, adaptive_grids(grid)[self.budget])
        features = self.features or tokens.embed.shape[-1]
        return with_embed(tokens, self.mlp(tokens.embed, features, features, exact_gelu))


def exact_gelu(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """x times the normal distribution function, by erf (JAX's default uses tanh)."""
    return nn.gelu(x, approximate=False)


def with_embed(tokens: VisualTokens, embed: Float[Array, "B T D"]) -> VisualTokens:
    """`tokens` with other embeddings, whose padding (non-zero by biases) is zeroed."""
    return tokens.replace(embed=jnp.where(tokens.mask[..., None], embed, 0))


def adaptive_grids(grid: grids.Grid) -> dict[int, grids.Grid]:
    """Budget -> grid for adaptive pooling, largest budget first.

    A square grid gives all smaller squares. Other grids use equal cells for the budgets of
    `grids.pooled_grids`, and also every number of rows with the number of columns closest to the
    aspect ratio, and vice versa; of several grids for one budget, the closest in shape, then the
    one with fewer rows.
    """
    rows, columns = grid
    if rows == columns:
        return {side * side: (side, side) for side in range(rows, 0, -1)}

    def nearest(length, own, other):
        return max(1, (2 * length * other + own) // (2 * own))

    kept = [(h, nearest(h, rows, columns)) for h in range(1, rows + 1)]
    kept += [(nearest(w, columns, rows), w) for w in range(1, columns + 1)]
    kept.sort(key=lambda c: (round(abs(math.log(c[0] * columns / (c[1] * rows))), 9), c[0]))
    sizes = dict(grids.pooled_grids(grid))
    for cells in kept:
        sizes.setdefault(cells[0] * cells[1], cells)
    return dict(sorted(sizes.items(), reverse=True))


def pool(tokens: VisualTokens, grid: grids.Grid, cells: grids.Grid) -> VisualTokens:
    """`fold.pool`, which is exact where the cells are the tokens."""
    if tuple(grid) == tuple(cells):
        return zero_padding(tokens)
    return fold.pool(tokens, grid, cells)


def pool_flops(grid: grids.Grid, cells: grids.Grid, width: int) -> int:
    """Matmul FLOPs of `pool` for tokens of `width` without a bias: 0 where the cells divide."""
    (rows, columns), (cell_rows, cell_columns) = grid, cells
    if rows % cell_rows == 0 and columns % cell_columns == 0:
        return 0
    # Both area matrices act on the embedding, the two coordinates and the size.
    return 2 * (width + 3) * columns * cell_rows * (rows + cell_columns)
