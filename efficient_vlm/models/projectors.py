"""Projectors of published models that read several patches at once, before any compression.

A projector is part of a model, not a method under study: its weights come with the checkpoint, and
what it gives back are the tokens that methods then choose from. It is a module called on patch
features [B, h*w, C] of one grid, and says with `cells` what grid it makes of it. `flops` counts its
matrix products for one image, 2 for a multiply-add, as `compressors.base.Compressor.flops` does.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from efficient_vlm import compressors
from efficient_vlm.compressors import VisualTokens
from efficient_vlm.compressors.between.pooling import ORDERS, space_to_depth
from efficient_vlm.compressors.projectors.gather_pool import windows
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.fields import construct
from efficient_vlm.nn.cross_attention import window_attention
from efficient_vlm.nn.linear import Dtype, Linear
from efficient_vlm.nn.mlp import activate
from efficient_vlm.nn.norms import make_norm

Grid = tuple[int, int]


class PatchMerger(nn.Module):
    """Blocks of side x side patches side by side in the channels, then one or two products.

    Idefics3 and SmolVLM (one product), Qwen2-VL (a norm before, two products), InternVL (a norm
    behind the concatenation, two products).

    Attributes:
      features: channels of the result.
      side: patches along a side of a block.
      hidden_dim: channels between two products; None for one product.
      norm, norm_epsilon: "rms" or "layernorm", see `norms.make_norm`; None for none.
      norm_after: whether the norm acts on the concatenation, or on each patch.
      order: of the channels, see `compressors.pooling.ORDERS`.
      deepstack: how many of the feature layers, the first ones, get a merger of their own, with the
        norm behind the concatenation; their results stand behind the main one, side by side
        (Qwen3-VL).
    """

    features: int
    side: int = 2
    hidden_dim: int | None = None
    norm: str | None = None
    norm_epsilon: float = 1e-6
    norm_after: bool = False
    activation: str = "gelu_erf"
    bias: bool = True
    order: str = "row_column_feature"
    deepstack: int = 0
    dtype: Dtype = jnp.float32

    blockwise = True

    def cells(self, grid: Grid) -> Grid:
        """The grid of tokens that a grid of patches becomes."""
        if grid[0] % self.side or grid[1] % self.side:
            raise UserError(
                f"images of {grid[0]} x {grid[1]} patches: not a multiple of the {self.side} x "
                f"{self.side} that one token reads",
                fix="resize the picture as the model's image processor does",
            )
        return grid[0] // self.side, grid[1] // self.side

    @nn.nowrap
    def flops(self, grid: Grid, width: int) -> int:
        """FLOPs for one image of `grid` patches of `width` channels."""
        rows, columns = self.cells(grid)
        parts = self.deepstack + 1
        inputs = width // parts * self.side**2
        if self.hidden_dim is None:
            weights = inputs * self.features
        else:
            weights = self.hidden_dim * (inputs + self.features)
        return 2 * rows * columns * parts * weights

    @nn.compact
    def __call__(self, x: jax.Array, grid: Grid, real: jax.Array | None = None) -> jax.Array:
        """[B, h*w, C] -> [B, cells, features * (1 + deepstack)]."""
        if self.order not in ORDERS:
            raise unknown("model.projector.order", self.order, ORDERS)
        parts = jnp.split(x, self.deepstack + 1, axis=-1)
        out = [self._merge(parts[-1], grid, "", self.norm_after)]
        out += [self._merge(part, grid, f"deep_{i}_", True) for i, part in enumerate(parts[:-1])]
        return jnp.concatenate(out, axis=-1)

    def _merge(self, x: jax.Array, grid: Grid, prefix: str, norm_after: bool) -> jax.Array:
        def norm(x):
            fields = dict(axis="vision", dtype=self.dtype, name=f"{prefix}norm")
            return make_norm(self.norm, self.norm_epsilon, **fields)(x)

        x = norm(x) if self.norm and not norm_after else x
        x = space_to_depth(x, grid, self.cells(grid), self.order)
        x = norm(x) if self.norm and norm_after else x
        fields = dict(dtype=self.dtype, bias=self.bias)
        axis = "vision"
        if self.hidden_dim is not None:
            up = Linear((axis,), (self.hidden_dim,), ("mlp",), name=f"{prefix}up", **fields)
            x, axis = activate(self.activation)(up(x)), "mlp"
        return Linear((axis,), (self.features,), ("embed",), name=f"{prefix}out", **fields)(x)


class AveragePool(nn.Module):
    """The mean of blocks of side x side patches (Gemma 3, arXiv 2503.19786)."""

    side: int = 4
    dtype: Dtype = jnp.float32

    blockwise = True

    cells = PatchMerger.cells

    @nn.nowrap
    def flops(self, grid: Grid, width: int) -> int:
        """None: means count as 0."""
        del grid, width
        return 0

    @nn.compact
    def __call__(self, x: jax.Array, grid: Grid, real: jax.Array | None = None) -> jax.Array:
        """[B, h*w, C] -> [B, cells, C]."""
        rows, columns = self.cells(grid)
        x = x.reshape(len(x), rows, self.side, columns, self.side, -1)
        return x.mean(axis=(2, 4)).reshape(len(x), rows * columns, -1)


# Not one class with `gather_pool.MolmoPool`, though both use `windows` and `window_attention`. Our
# checkpoints hold that method's parameters under flat names with its label, and its tokens have
# sizes, padding and a bias. Published checkpoints map to the modules of this class
# (families/molmo.py), and an index over several crops may name the patches of a token.
class AttentionPool(nn.Module):
    """Molmo's connector: each block of patches is read by its mean, then a SwiGLU product.

    Molmo (arXiv 2409.17146, section 2): attention of the mean of a block to its patches, then
    W_2 (silu(W_1 y) * W_3 y). Molmo2 pools the patches that an index names, over all crops of a
    picture, and leaves out those that are missing.

    Attributes:
      features: channels of the result.
      hidden_dim: inner width of the SwiGLU.
      num_heads, head_dim: of the attention.
      side: patches along a side of a block.
    """

    features: int
    hidden_dim: int
    num_heads: int
    head_dim: int
    side: int = 2
    dtype: Dtype = jnp.float32

    blockwise = True

    def cells(self, grid: Grid) -> Grid:
        """The grid of tokens that a grid of patches becomes."""
        return -(-grid[0] // self.side), -(-grid[1] // self.side)

    @nn.nowrap
    def flops(self, grid: Grid, width: int, tokens: int | None = None) -> int:
        """FLOPs for `grid` patches of `width` channels; `tokens` that read side x side of them
        each where an index names these, None for those of the blocks."""
        patches, inner = grid[0] * grid[1], self.num_heads * self.head_dim
        if tokens is None:
            rows, columns = self.cells(grid)
            tokens = rows * columns
        total = 2 * inner * width * (tokens + 2 * patches)
        total += 2 * 2 * tokens * self.side**2 * inner
        return total + 2 * tokens * (inner**2 + self.hidden_dim * (2 * inner + self.features))

    @nn.compact
    def __call__(self, x: jax.Array, grid: Grid, real: jax.Array | None = None) -> jax.Array:
        """[B, h*w, C] -> [B, cells, features]; with `real`, int32 [B, P, k], patches of B rows
        that each of P tokens reads (-1 for none), in place of the blocks of the grid."""
        index = jnp.asarray(windows(grid, self.side))[None] if real is None else real
        there = (index >= 0)[..., None]

        def gather(x):
            if real is None:
                return x[:, np.maximum(windows(grid, self.side), 0)]
            return jax.vmap(lambda row, at: row[jnp.maximum(at, 0)])(x, index)

        def heads(name, x):
            shape, axes = (self.num_heads, self.head_dim), ("heads", "head_dim")
            return Linear(("vision",), shape, axes, dtype=self.dtype, bias=True, name=name)(x)

        patches = jnp.where(there, gather(x), 0)
        count = jnp.maximum(there.sum(axis=2), 1)
        q = heads("query", patches.sum(axis=2) / count.astype(x.dtype))
        k, v = gather(heads("key", x)), gather(heads("value", x))
        y = window_attention(q, k, v, there[..., 0])
        inner = self.num_heads * self.head_dim
        out = Linear(
            ("heads", "head_dim"), (inner,), ("vision",), dtype=self.dtype, bias=True, name="pooled"
        )
        y = out(y)

        def wide(name):
            mlp = (self.hidden_dim,), ("mlp",)
            return Linear(("vision",), *mlp, dtype=self.dtype, name=name)(y)

        y = nn.silu(wide("gate")) * wide("up")
        return Linear(("mlp",), (self.features,), ("embed",), dtype=self.dtype, name="down")(y)


class Method(nn.Module):
    """A trained compressor of `compressors.build` as the model's own projector (MobileVLM).

    Attributes:
      method: name of the compressor.
      features: channels of the result.
      side: patches along a side of what one token stands for.
    """

    method: str
    features: int
    side: int = 2
    dtype: Dtype = jnp.float32

    blockwise = False

    cells = PatchMerger.cells

    @nn.nowrap
    def flops(self, grid: Grid, width: int) -> int:
        """FLOPs for one image of `grid` patches of `width` channels."""
        return self._module(grid, parent=None).flops(grid[0] * grid[1], width)

    @nn.compact
    def __call__(self, x: jax.Array, grid: Grid, real: jax.Array | None = None) -> jax.Array:
        """[B, h*w, C] -> [B, cells, features]."""
        return self._module(grid)(VisualTokens.from_grid(x, grid)).embed

    @nn.nowrap
    def _module(self, grid: Grid, **fields: Any) -> compressors.Compressor:
        rows, columns = self.cells(grid)
        options = dict(budget=rows * columns, grid=grid, features=self.features)
        return compressors.build(self.method, **options, **fields)


PROJECTORS: dict[str, type[nn.Module]] = {
    "patch_merger": PatchMerger,
    "average_pool": AveragePool,
    "attention_pool": AttentionPool,
    "method": Method,
}


def make_projector(config: Mapping[str, Any], **fields: Any) -> nn.Module:
    """The projector of a config section: "name" and the fields of its class."""
    options = dict(config)
    name = options.pop("name", None)
    if name not in PROJECTORS:
        raise unknown("model.projector.name", str(name), PROJECTORS)
    return construct(PROJECTORS[name], options, "model.projector", **fields)
