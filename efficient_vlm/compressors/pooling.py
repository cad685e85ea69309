"""Methods that merge the cells of a regular grid: average_pool, pixel_shuffle, downsample."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficient_vlm.compressors import fold, grids
from efficient_vlm.compressors.base import Compressor, describe, positive_int
from efficient_vlm.compressors.tokens import NO_SIGNALS
from efficient_vlm.errors import UserError


class AveragePool(Compressor):
    """`average_pool`: the mean of each cell of a coarser grid (DeCo, M3).

    Budgets: those of `grids.pooled_grids` (8 x 8: 64, 16, 4, 1).
    """

    label = "average_pool"

    @nn.nowrap
    def reachable(self, grid):
        return tuple(grids.pooled_grids(grid))

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid = self.check_call(tokens, signals, needs_grid=True)
        if self.budget == tokens.mask.shape[1]:
            return tokens
        return fold.pool(tokens, grid, grids.pooled_grids(grid)[self.budget])


class Downsample(Compressor):
    """`downsample`: the image itself is made smaller, the baseline that is easy to forget.

    The model asks `image_grid` and runs its encoder on an image of that many patches, which saves
    in the encoder too; the tokens then arrive at the budget and pass unchanged. Called on more
    tokens than the budget, it applies the same area resampling to the features instead: not the
    same method (the encoder has then seen the full image), but the same shapes and book-keeping.

    Budgets: those of `grids.resized_grids` (8 x 8: 64, 49, 36, 25, 16, 9, 4, 1).

    Attributes:
      grid: (rows, columns) of the patches of the *full* image; None for a square.
    """

    label = "downsample"

    @nn.nowrap
    def reachable(self, grid):
        return tuple(grids.resized_grids(grid))

    @nn.nowrap
    def image_grid(self, grid):
        sizes = grids.resized_grids(tuple(grid))
        if self.budget not in sizes:
            raise UserError(
                f"compressor.budget: downsample cannot give {self.budget} tokens from an image of "
                f"{grid[0]} x {grid[1]} patches",
                allowed=describe(tuple(sizes)),
                fix=f"compressor.budget={min(sizes, key=lambda b: (abs(b - self.budget), b))}",
            )
        return sizes[self.budget]

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        """0 behind a resized image; the area matrices if features are resampled by a fraction."""
        if self.budget == num_tokens:
            return 0
        rows, columns = grids.resolve(self.grid, num_tokens)
        new_rows, new_columns = self.image_grid((rows, columns))
        if rows % new_rows == 0 and columns % new_columns == 0:
            return 0
        # Both matrices act on the embedding, the two coordinates and the size.
        return 2 * (width + 3) * columns * new_rows * (rows + new_columns)

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        num_tokens = tokens.mask.shape[1]
        if self.budget == num_tokens:
            return tokens
        grid = self.check_call(tokens, signals, needs_grid=True)
        return fold.pool(tokens, grid, self.image_grid(grid))


class PixelShuffle(Compressor):
    """`pixel_shuffle`: s x s neighbours side by side in the channels, then one matrix.

    Channel order before the matrix: row in the cell, column in the cell, feature (the last varies
    fastest). Padded neighbours are zeros. Budgets: square cells whose side divides both rows and
    columns. There is one matrix for each s, as their inputs differ in width.

    Attributes:
      features: width of the result; None for the width of the input. If it is another width, the
        full budget is not the identity but the matrix with s = 1.
      budgets: all the budgets that one checkpoint must serve (elastic training), each with its
        matrix; None for `budget` alone.
    """

    features: int | None = None
    budgets: tuple[int, ...] | None = None

    label = "pixel_shuffle"

    def __post_init__(self):
        if self.budgets is not None:
            values = [self.budgets] if isinstance(self.budgets, int) else self.budgets
            budgets = tuple(positive_int("compressor.budgets", b) for b in values)
            object.__setattr__(self, "budgets", budgets)
        super().__post_init__()

    @nn.nowrap
    def check_options(self):
        if self.features is not None:
            positive_int("compressor.features", self.features)
        if self.budgets is not None and self.budget not in self.budgets:
            raise UserError(
                f"compressor.budget: {self.budget} has no matrix, it is not in compressor.budgets",
                allowed=describe(self.budgets),
                fix="add it to compressor.budgets",
            )

    @nn.nowrap
    def reachable(self, grid):
        return tuple(grids.shuffled_grids(grid))

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        features = self.features or width
        if self.budget == num_tokens and features == width:
            return 0
        return 2 * num_tokens * width * features  # budget x (s^2 width) x features

    @nn.compact
    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid = self.check_call(tokens, signals, needs_grid=True)
        width, num_tokens = tokens.embed.shape[-1], tokens.embed.shape[1]
        features, sizes = self.features or width, grids.shuffled_grids(grid)
        kernels = {}
        for budget in self.budgets or (self.budget,):
            if budget not in sizes:
                raise UserError(
                    f"compressor.budgets: {budget} is not a budget of pixel_shuffle on {grid}",
                    allowed=describe(tuple(sizes)),
                )
            if budget == num_tokens and features == width:
                continue
            side = grid[0] // sizes[budget][0]
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("mlp", "embed"))
            shape = (side * side * width, features)
            kernels[budget] = self._kernel(f"kernel_{side}x{side}", init, shape)
        if self.budget == num_tokens and features == width:
            return tokens
        folded = fold.pool(tokens, grid, sizes[self.budget])
        x = jnp.where(tokens.mask[..., None], tokens.embed, 0)
        x = space_to_depth(x, grid, sizes[self.budget]) @ kernels[self.budget].astype(x.dtype)
        return folded.replace(embed=x)

    @nn.nowrap
    def _kernel(self, name, init, shape):
        if not self.is_initializing() and not self.has_variable("params", name):
            raise UserError(
                f"compressor.budget: this checkpoint holds no pixel_shuffle matrix {name!r}",
                allowed="the budgets it was trained at",
                fix="train with compressor.budgets=(...) naming all the budgets to be used",
            )
        return self.param(name, init, shape, jnp.float32)


def space_to_depth(x: jax.Array, grid: grids.Grid, cells: grids.Grid) -> jax.Array:
    """[B, h*w, D] to [B, h'*w', r*c*D] with r = h / h', c = w / w', in (row, column, D) order."""
    (rows, columns), (cell_rows, cell_columns) = grid, cells
    r, c = rows // cell_rows, columns // cell_columns
    x = x.reshape(x.shape[0], cell_rows, r, cell_columns, c, x.shape[-1])
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(x.shape[0], cell_rows * cell_columns, -1)
