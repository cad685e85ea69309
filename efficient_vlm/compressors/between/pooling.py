"""Methods that merge the cells of a grid: average_pool, pool, pixel_shuffle, downsample."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Shaped

from efficient_vlm import checks
from efficient_vlm.compressors import fold, grids
from efficient_vlm.compressors.base import Compressor, as_tuple, describe
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.tokens import VisualTokens, zero_padding
from efficient_vlm.errors import UserError, short, unknown
from efficient_vlm.nn.linear import product, weight_of
from efficient_vlm.shapes import Array


class AveragePool(Compressor):
    """`average_pool`: the mean of each cell of a coarser grid (DeCo, arXiv 2405.20985; Gemma 3).

    Budgets: those of `grids.pooled_grids` (8 x 8: 64, 16, 4, 1). `pool` reaches all others. Where
    images of unlike sizes share a padded grid, each has the cells that `pool` gives it alone.
    """

    label = "average_pool"

    @nn.nowrap
    def reachable(self, grid):
        return tuple(grids.pooled_grids(grid))

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        if tokens.uneven:
            return fold.pool_each(
                tokens, grids.resolve(self.grid, tokens.mask.shape[1]), self.budget
            )
        grid = self.check_call(tokens, signals, needs_grid=True)
        if self.budget == tokens.mask.shape[1]:
            return tokens
        return fold.pool(tokens, grid, grids.pooled_grids(grid)[self.budget])


class Pool(Compressor):
    """`pool`: means over cells of equal area, the baseline that exists at every budget.

    The image is cut into bands of rows, and each band into columns of equal width (`grids.bands`).
    A band with c of the T cells has c / T of the image's height, so that every cell covers N / T
    patches for any T. A patch that is cut belongs to several cells in proportion to its area; sizes
    are areas (and sum to the number of real patches), `source` names the cell with the largest
    share. At the budgets of `average_pool` the result is that of `average_pool`; with equal bands
    it is area resampling to a grid; otherwise (T prime, say) the bands differ by one column.

    A cell without real patches is padding at its own index. Where images of unlike sizes share a
    padded grid, each is cut as it would be alone, and one of no more than T patches keeps them all.
    """

    label = "pool"

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        """0 where cells are whole patches; else the area matrices."""
        if self.budget == num_tokens:
            return 0
        grid = grids.resolve(self.grid, num_tokens)
        columns = grids.bands(grid, self.budget)
        if len(set(columns)) == 1:
            return _area_flops(grid, (len(columns), columns[0]), width)
        # One matrix acts on the embedding, the two coordinates and the size.
        return 2 * self.budget * num_tokens * (width + 3)

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid = self.check_call(tokens, signals, needs_grid=True)
        if self.budget == tokens.mask.shape[1]:
            return tokens
        if tokens.uneven:
            return fold.pool_each(tokens, grid, self.budget)
        columns = grids.bands(grid, self.budget)
        if len(set(columns)) == 1:
            return fold.pool(tokens, grid, (len(columns), columns[0]))
        return fold.area_pool(tokens, grids.cover(grid, columns))


class Downsample(Compressor):
    """`downsample`: a smaller image, the baseline that is easily forgotten.

    The model calls `image_grid` and runs its encoder on an image of that many patches, which also
    saves compute in the encoder. The image keeps its aspect ratio (up to rounding, see
    `grids.fitted_grid`), so only some numbers of patches are possible (squares for a square image).
    The largest one within the budget is used; padding, which the decoder masks, fills the remaining
    slots.

    Called on more tokens than the budget, it applies area resampling to the features instead: a
    different method (the encoder has processed the full image) with the same shapes and `source`.

    Attributes:
      grid: (rows, columns) of the patches of the *full* image; None for a square.
    """

    label = "downsample"

    @nn.nowrap
    def image_grid(self, grid):
        grid = tuple(grid)
        if self.budget > grid[0] * grid[1]:
            raise UserError(
                f"compressor.budget: downsample cannot give {self.budget} tokens from an image of "
                f"{grid[0]} x {grid[1]} patches",
                allowed=describe(self.reachable(grid)),
                fix=f"compressor.budget={grid[0] * grid[1]}",
            )
        return grids.fitted_grid(grid, self.budget)

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        """0 for a resized image; the area matrices if features are resampled by a fraction."""
        if self.budget >= num_tokens:
            return 0
        grid = grids.resolve(self.grid, num_tokens)
        return _area_flops(grid, self.image_grid(grid), width)

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        num_tokens, num_patches = tokens.mask.shape[1], tokens.source.shape[1]
        if self.budget == num_tokens:
            return tokens
        if num_tokens < min(self.budget, num_patches):
            return _pad(tokens, self.budget)  # The encoder ran on the resized image.
        grid = self.check_call(tokens, signals, needs_grid=True)
        return _pad(fold.pool(tokens, grid, self.image_grid(grid)), self.budget)


def _area_flops(grid: grids.Grid, cells: grids.Grid, width: int) -> int:
    """FLOPs of `fold.pool`: both matrices act on embedding, two coordinates and size."""
    (rows, columns), (new_rows, new_columns) = grid, cells
    if rows % new_rows == 0 and columns % new_columns == 0:
        return 0
    return 2 * (width + 3) * columns * new_rows * (rows + new_columns)


def _pad(tokens: VisualTokens, budget: int) -> VisualTokens:
    """Appends padding up to `budget` slots."""
    tokens = zero_padding(tokens)
    more = budget - tokens.mask.shape[1]

    def extend(x):
        return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))

    return tokens.replace(
        embed=extend(tokens.embed),
        position=extend(tokens.position),
        size=extend(tokens.size),
        mask=extend(tokens.mask),
        bias=None if tokens.bias is None else extend(tokens.bias),
    )


# Order of a cell's channels (the last named varies fastest) -> the permutation of the axes (rows of
# cells, row, columns of cells, column, feature) that produces it.
ORDERS = {
    "row_column_feature": (0, 2, 1, 3, 4),
    "column_row_feature": (0, 2, 3, 1, 4),
    "feature_row_column": (0, 2, 4, 1, 3),
}


class PixelShuffle(Compressor):
    """`pixel_shuffle`: s x s neighbours side by side in the channels, then one matrix.

    Three channel orders before the matrix are in use, and weights only transfer with the order they
    were trained with (the last named varies fastest):

    * "row_column_feature" (default): Idefics3, SmolVLM, Llama 4, LFM2-VL, Qwen-VL, and
      InternVL with ps_version "v2". InternVL calls the axes w, h and swaps them twice, which gives
      the same order. Its old "v1" omits the second swap: same channels, but the *tokens* are in
      column-major order; it is not supported, because our tokens are in raster order.
    * "column_row_feature": (0,0), (1,0), (0,1), (1,1) as (row, column), the patch merging of Swin.
    * "feature_row_column": torch `unfold` and `pixel_unshuffle`, DeepSeek-VL2.

    Padded neighbours are zeros. Budgets: square cells whose side divides both rows and columns.
    Each s has a matrix of its own, because the input widths differ.

    Attributes:
      order: channel order, see above.
      features: output width; None for the input width. If it differs from the input width, the full
        budget is not the identity but the matrix with s = 1.
      budgets: all budgets that one checkpoint must serve (elastic training), each with its matrix;
        None for `budget` alone.
    """

    features: int | None = None
    budgets: tuple[int, ...] | None = None
    order: str = "row_column_feature"

    label = "pixel_shuffle"
    makes_tokens = True

    def __post_init__(self):
        if self.budgets is not None:
            values = as_tuple("compressor.budgets", self.budgets)
            budgets = tuple(checks.whole("compressor.budgets", b) for b in values)
            object.__setattr__(self, "budgets", budgets)
        super().__post_init__()

    @nn.nowrap
    def check_options(self):
        if self.order not in tuple(ORDERS):
            raise unknown("compressor.order", str(self.order), ORDERS)
        if self.features is not None:
            checks.whole("compressor.features", self.features)
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
            shape = (side * side * width, features)
            kernels[budget] = self._kernel(f"kernel_{side}x{side}", shape, tokens.embed.dtype)
        if self.budget == num_tokens and features == width:
            return tokens
        folded = fold.pool(tokens, grid, sizes[self.budget])
        x = jnp.where(tokens.mask[..., None], tokens.embed, 0)
        x = space_to_depth(x, grid, sizes[self.budget], self.order)
        return folded.replace(embed=product(x, kernels[self.budget], x.dtype))

    @nn.nowrap
    def _kernel(self, name, shape, dtype):
        if not self.is_initializing() and not self.has_variable("params", name):
            raise UserError(
                f"compressor.budget: this checkpoint holds no pixel_shuffle matrix {short(name)}",
                allowed="the budgets it was trained at",
                fix="train with compressor.budgets=(...) naming all the budgets to be used",
            )
        return weight_of(self, name, nn.initializers.lecun_normal(), shape, ("mlp", "embed"), dtype)


def space_to_depth(
    x: Shaped[Array, "B N D"],
    grid: grids.Grid,
    cells: grids.Grid,
    order: str = "row_column_feature",
) -> Shaped[Array, "B cells channels"]:
    """[B, h*w, D] to [B, h'*w', r*c*D] with r = h / h', c = w / w' and channels in `order`."""
    (rows, columns), (cell_rows, cell_columns) = grid, cells
    r, c = rows // cell_rows, columns // cell_columns
    x = x.reshape(x.shape[0], cell_rows, r, cell_columns, c, x.shape[-1])
    x = x.transpose(0, *(axis + 1 for axis in ORDERS[order]))
    return x.reshape(x.shape[0], cell_rows * cell_columns, -1)
