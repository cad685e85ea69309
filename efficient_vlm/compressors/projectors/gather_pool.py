"""Pools that gather by position: molmo_pool (attention in a window), position_pool (one-hot)."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from efficient_vlm import checks
from efficient_vlm.compressors import grids
from efficient_vlm.compressors.base import Compressor
from efficient_vlm.compressors.projectors.mlp import Projector
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.tokens import (
    VisualTokens,
    merge,
    remap,
    weighted_means,
    zero_padding,
)
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.nn.cross_attention import window_attention
from efficient_vlm.shapes import Array

QUERIES = ("mean", "first")


def windows(grid: grids.Grid, side: int) -> Int[np.ndarray, "windows {side*side}"]:
    """Indices of the patches of each side x side window, starting at the upper left corner.

    Returns:
      int32 [windows, side * side], both in raster order; -1 outside the grid.
    """
    rows, columns = grid
    down, across = -(-rows // side), -(-columns // side)
    index = np.full((down * side, across * side), -1, np.int32)
    index[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    index = index.reshape(down, side, across, side).swapaxes(1, 2)
    return index.reshape(down * across, side * side)


class MolmoPool(Projector):
    """`molmo_pool`: one query per k x k window, made from its patches, attends to them.

    Molmo (arXiv 2409.17146, section 2; allenai/molmo@793fa38). In a window with patches x_n:

        y = b_o + W_o attention(W_q q + b_q; W_k x + b_k; W_v x + b_v),  q = mean of x_n
        token = W_2 (silu(W_1 y) * W_3 y)     with `hidden_dim`; otherwise y

    Windows that cross the border (Molmo2's 27 x 27 patches) are padded; padding is excluded from
    the mean and the keys. Published: 2 x 2 windows, 24 x 24 patches to 144 tokens, 27 x 27 to 196,
    16 heads of 64, hidden_dim the MLP width of the decoder. All budgets share their parameters.

    Budgets: ceil(rows / k) * ceil(columns / k); k is the smallest side with that budget. k = 1 is
    not the identity, because a window of one patch still passes W_v, W_o and the projector.

    Deviations: the input is the encoder's output (published: two layers side by side, so that 16
    heads of 64 are half of its width); for query="first", a window whose first patch is padding
    uses its first real one. Keys and values are computed before the gather, once per patch. A bias
    of the tokens is added to the logits of the patches as keys and then discarded.

    Attributes:
      query: "mean" (default, `attention_meanq`) or "first" (`attention`), the upper left patch.
      num_heads: number of attention heads.
      head_dim: width of each head; None for the width of the input / num_heads.
      hidden_dim: inner width of the SwiGLU projector, which has no biases; None for no projector.
      features: output width; None for the width of the input.
    """

    query: str = "mean"
    num_heads: int = 16
    head_dim: int | None = None
    hidden_dim: int | None = None

    label = "molmo_pool"

    @nn.nowrap
    def check_options(self):
        super().check_options()
        checks.whole("compressor.num_heads", self.num_heads)
        for name in ("head_dim", "hidden_dim"):
            if getattr(self, name) is not None:
                checks.whole(f"compressor.{name}", getattr(self, name))
        if self.query not in QUERIES:
            raise unknown("compressor.query", str(self.query), QUERIES)

    @nn.nowrap
    def reachable(self, grid):
        return tuple(grids.covering_grids(grid))

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        inner, features = self._inner(width), self.features or width
        side, _ = grids.covering_grids(grids.resolve(self.grid, num_tokens))[self.budget]
        total = 2 * width * inner * (2 * num_tokens + self.budget)
        total += 2 * 2 * self.budget * side * side * inner
        if self.hidden_dim is None:
            return total + 2 * self.budget * inner * features
        return total + 2 * self.budget * (inner * inner + self.hidden_dim * (2 * inner + features))

    @nn.nowrap
    def _inner(self, width: int) -> int:
        """Width of queries, keys and values."""
        if self.head_dim is None and width % self.num_heads:
            raise UserError(
                f"compressor.num_heads: {self.num_heads} does not divide the width {width}",
                allowed=f"a divisor of {width}, or any number with compressor.head_dim",
            )
        return self.num_heads * (self.head_dim or width // self.num_heads)

    @nn.compact
    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid = self.check_call(tokens, signals, needs_grid=True)
        width = tokens.embed.shape[-1]
        inner, features = self._inner(width), self.features or width
        side, _ = grids.covering_grids(grid)[self.budget]
        index = windows(grid, side)
        inside = jnp.asarray(index >= 0)
        tokens = zero_padding(tokens)

        def gather(x):  # [B, N, ...] -> [B, windows, k * k, ...], zeros outside the grid
            x = x[:, np.maximum(index, 0)]
            inside_x = inside.reshape(inside.shape + (1,) * (x.ndim - 3))
            return jnp.where(inside_x, x, jnp.zeros_like(x))

        real = gather(tokens.mask)
        bias, tokens = tokens.bias, tokens.replace(bias=None)
        pooled = weighted_means(tokens, lambda x: gather(x).sum(axis=2))
        query = pooled["embed"]
        if self.query == "first":
            first = jnp.argmax(real, axis=2)[:, :, None, None]
            query = jnp.take_along_axis(gather(tokens.embed), first, axis=2)[:, :, 0]

        def heads(name, x):
            x = self.dense(name, x, inner, ("embed", "heads"))
            return x.reshape(*x.shape[:-1], self.num_heads, inner // self.num_heads)

        q = heads("query", query)
        k, v = gather(heads("key", tokens.embed)), gather(heads("value", tokens.embed))
        x = window_attention(q, k, v, real, None if bias is None else gather(bias))
        x = x.reshape(*x.shape[:2], inner)
        if self.hidden_dim is None:
            x = self.dense("out", x, features, ("heads", "embed"))
        else:
            x = self.dense("out", x, inner, ("heads", "embed"))
            gate = nn.silu(self.dense("gate", x, self.hidden_dim, ("embed", "mlp"), bias=False))
            up = self.dense("up", x, self.hidden_dim, ("embed", "mlp"), bias=False)
            x = self.dense("down", gate * up, features, ("mlp", "embed"), bias=False)
        pooled["embed"] = jnp.where(pooled["mask"][..., None], x, 0)

        holder = np.zeros(grid[0] * grid[1], np.int32)
        holder[index[index >= 0]] = np.nonzero(index >= 0)[0]
        holder = jnp.broadcast_to(jnp.asarray(holder), tokens.mask.shape)
        return VisualTokens(**pooled, source=remap(tokens.source, holder))


class PositionPool(Compressor):
    """`position_pool`: means over cells that positions define, not the order of the tokens.

    The pooler of Gemma 4 (google-deepmind/gemma `gm/nn/gemma4/vision`; transformers `gemma4`). With
    (r, c) the row and column of a patch in the image and w the columns of that image:

        cell = floor(r / k) * ceil(w / k) + floor(c / k),  token_t = mean of the patches of cell t

    as a product with one_hot(cell, L), L the budget. The shape is static, yet the image of each row
    may have its own height and width: the bounding box of its real tokens. Slots after the last
    cell, and cells of padding alone, are masked. Published: k = 3 and L = 70, 140, 280 (default),
    560 or 1120 for at most 9 L patches.

    All budgets are possible: without `cell`, k = ceil(sqrt(N / L)) for the N real patches of a row,
    which equals the published sqrt(N / L) if that is whole. If the shape of an image would give
    more than L cells, k grows for that row until they fit. The full budget without `cell` is the
    identity (except for `scaled`).

    Deviations: a cell's sum is divided by the number of its patches (published: by k^2, the same
    for whole cells, the only ones in its images); `scaled` is off, because a connector with a norm
    or a matrix follows.

    Attributes:
      cell: k, the side of a cell in patches; None derives it from N and the budget.
      scaled: whether to multiply by sqrt(width), as published. Default False.
    """

    cell: int | None = None
    scaled: bool = False

    label = "position_pool"

    @nn.nowrap
    def check_options(self):
        if self.cell is not None:
            checks.whole("compressor.cell", self.cell)
        checks.flag("compressor.scaled", self.scaled)

    @nn.nowrap
    def side(self, num_tokens: int | Int[Array, " B"]) -> int | Int[Array, " B"]:
        """k: the smallest side whose cells have at least N / budget patches, for each N."""
        if self.cell is not None:
            return self.cell
        per_token = -(-num_tokens // self.budget)
        if isinstance(per_token, int):
            return math.isqrt(per_token - 1) + 1
        # Just below a whole root, which may be inexact, then rounded up.
        root = jnp.sqrt(jnp.maximum(per_token, 1).astype(jnp.float32) - 0.25)
        return jnp.ceil(root).astype(jnp.int32)

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        if self.budget == num_tokens and self.side(num_tokens) == 1:
            return 0
        # The one-hot product of the embedding, the two coordinates and the size.
        return 2 * self.budget * num_tokens * (width + 3)

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        self.check_call(tokens, signals, needs_grid=False)
        num_tokens, width = tokens.embed.shape[1:]
        if self.budget < num_tokens or self.side(num_tokens) > 1:
            tokens = zero_padding(tokens)
            side = self.side(tokens.mask.sum(axis=1))
            cell = position_cells(tokens.position, tokens.mask, side, self.budget)
            tokens = merge(tokens, cell, self.budget)
        if not self.scaled:
            return tokens
        return tokens.replace(embed=tokens.embed * jnp.asarray(width**0.5, tokens.embed.dtype))


def position_cells(
    position: Float[Array, "B T 2"],
    mask: Bool[Array, "B T"],
    side: int | Int[Array, " B"],
    budget: int,
) -> Int[Array, "B T"]:
    """The cell of each token in the bounding box of its row's real tokens.

    Args:
      position: float32 [B, T, 2], (row, column).
      mask: bool [B, T].
      side: least side of a cell, for all rows or each; larger in rows that would have more cells
        than `budget`.
      budget: largest number of cells.

    Returns:
      int32 [B, T] in raster order of the cells, below `budget`; arbitrary for padding.
    """
    patch = jnp.floor(position).astype(jnp.int32)
    real = mask[..., None]
    corner = jnp.min(jnp.where(real, patch, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
    patch = jnp.where(real, patch - corner, 0)
    extent = jnp.max(patch, axis=1) + 1  # [B, 2]

    least = side if isinstance(side, int) else 1
    sides = jnp.arange(least, max(least, position.shape[1]) + 1)
    cells = jnp.prod(-(-extent[:, None, :] // sides[:, None]), axis=-1)
    fits = (cells <= budget) & (sides >= jnp.reshape(side, (-1, 1)))
    # A sparse box may be longer than the number of tokens and fit none of them: one cell for all.
    grown = jnp.where(jnp.any(fits, axis=1), sides[jnp.argmax(fits, axis=1)], extent.max(axis=1))
    grown = grown[:, None]
    across = -(-extent[:, 1:] // grown)
    return patch[..., 0] // grown * across + patch[..., 1] // grown
