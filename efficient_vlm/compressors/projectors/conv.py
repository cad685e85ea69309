"""Projectors that convolve over the grid of patches: c_abstractor, ldp, ldpv2.

Padding is treated like the outside of the image: zeros in a convolution, excluded from a mean. An
image that fills only the upper left of its grid therefore gets the tokens of the smaller image.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from efficient_vlm import checks
from efficient_vlm.compressors import grids
from efficient_vlm.compressors.projectors.mlp import (
    Parametric,
    Projector,
    adaptive_grids,
    exact_gelu,
    pool,
    pool_flops,
    with_embed,
)
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.tokens import zero_padding
from efficient_vlm.shapes import Array

# Epsilons of the official norms: timm's LayerNorm2d in RegStage, its LayerNormAct2d in LDP.
_REG_EPSILON, _LDP_EPSILON = 1e-6, 1e-5


class CAbstractor(Projector):
    """`c_abstractor`: residual convolutions, adaptive average pooling, convolutions, an MLP.

    Honeybee (arXiv 2312.06742, section 3.2 and figure 3b; kakaobrain/honeybee@68a8d84):

        x + learned positions -> RegStage(depth) -> average pool -> RegStage(depth) -> MLP

    A RegStage is `depth` bottlenecks of RegNet-Y with group width 1, bottleneck ratio 1:

        h = SiLU(LN(W_1 x));  h = SiLU(LN(depthwise 3 x 3 of h));  h = h * squeeze_excite(h)
        SiLU(LN(W_3 h) + shortcut),  squeeze_excite(h) = sigmoid(W_b SiLU(W_a mean(h)))

    Its convolutions have no bias, LN is over the channels, W_a (with bias) narrows to a quarter of
    the block's input width, and the shortcut is the input, or LN(W_s x) where the width changes.
    The MLP has `mlp_depth` matrices with SiLU between. Published: 144 of 576 tokens, hidden 1024,
    both depths as below. The full budget omits only the pooling and is not the identity.

    Budgets: those of `adaptive_grids`, as in `deco`, with its deviation for cells that do not
    divide the grid.

    Deviations: padding, see the top of this file (squeeze_excite averages over real positions
    only). The depthwise product is a sum of nine shifted copies and counts no matmul FLOPs.

    Attributes:
      hidden: inner width; None for the width of the input.
      depth: number of bottlenecks before the pooling, and after it.
      mlp_depth: number of matrices at the end.
    """

    hidden: int | None = None
    depth: int = 3
    mlp_depth: int = 2

    label = "c_abstractor"

    @nn.nowrap
    def check_options(self):
        super().check_options()
        for name in ("hidden", "depth", "mlp_depth"):
            if (value := getattr(self, name)) is not None or name != "hidden":
                checks.whole(f"compressor.{name}", value)

    @nn.nowrap
    def reachable(self, grid):
        return tuple(adaptive_grids(grid))

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        hidden, features = self.hidden or width, self.features or width
        grid = grids.resolve(self.grid, num_tokens)

        def block(places, inputs):
            shortcut = 0 if inputs == hidden else inputs * hidden
            squeeze = 2 * hidden * _squeezed(inputs)
            return 2 * (places * (inputs * hidden + hidden * hidden + shortcut) + squeeze)

        total = block(num_tokens, width) + (self.depth - 1) * block(num_tokens, hidden)
        total += pool_flops(grid, adaptive_grids(grid)[self.budget], hidden)
        total += self.depth * block(self.budget, hidden)
        return total + 2 * self.budget * features * (hidden + (self.mlp_depth - 1) * features)

    @nn.compact
    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid = self.check_call(tokens, signals, needs_grid=True)
        cells = adaptive_grids(grid)[self.budget]
        width, dtype = tokens.embed.shape[-1], tokens.embed.dtype
        init = nn.initializers.truncated_normal(0.02)
        position = self.weight(
            "position", init, (*grid, width), ("rows", "columns", "embed"), dtype
        )

        tokens = zero_padding(tokens)
        x = with_embed(tokens, tokens.embed + position.reshape(-1, width)).embed
        x, live = on_grid(x, grid), on_grid(tokens.mask[..., None], grid)
        for i in range(self.depth):
            x = self._bottleneck(f"before_{i}", x, live)
        tokens = pool(tokens.replace(embed=off_grid(x)), grid, cells)
        x, live = on_grid(tokens.embed, cells), on_grid(tokens.mask[..., None], cells)
        for i in range(self.depth):
            x = self._bottleneck(f"after_{i}", x, live)
        features = self.features or width
        x = self.dense("mlp_0", off_grid(x), features, ("embed", "mlp"))
        for i in range(1, self.mlp_depth):
            axes = ("mlp", "embed") if i % 2 else ("embed", "mlp")
            x = self.dense(f"mlp_{i}", nn.silu(x), features, axes)
        return with_embed(tokens, x)

    @nn.nowrap
    def _bottleneck(self, name: str, x: jax.Array, live: jax.Array) -> jax.Array:
        """One block on [B, h, w, C]; `live` is bool [B, h, w, 1]."""
        inputs, hidden = x.shape[-1], self.hidden or x.shape[-1]

        def norm(part, y, axis):
            return self.layer_norm(f"{name}_{part}_norm", y, axis, _REG_EPSILON)

        y = self.dense(f"{name}_in", x, hidden, ("embed", "mlp"), bias=False)
        y = nn.silu(norm("in", y, "mlp"))
        y = nn.silu(norm("depthwise", depthwise(self, f"{name}_depthwise", y, live), "mlp"))
        y = squeeze_excite(self, name, y, live, _squeezed(inputs), nn.silu, nn.sigmoid)
        y = norm("out", self.dense(f"{name}_out", y, hidden, ("mlp", "embed"), bias=False), "embed")
        if inputs != hidden:
            x = self.dense(f"{name}_shortcut", x, hidden, ("embed", "mlp"), bias=False)
            x = norm("shortcut", x, "mlp")
        return nn.silu(y + x)


class LDP(Projector):
    """`ldp`: MLP, an inverted residual of stride 1, an inverted residual of stride 2.

    The lightweight down-sample projector of MobileVLM (arXiv 2312.16886, section 3.3 and equation
    1; Meituan-AutoML/MobileVLM@688fdec). The MLP is Linear, GELU (exact), Linear, with bias and
    `features` columns. An inverted residual (MobileNetV3, expansion 1, kernel 3) is

        h = hardswish(LN(depthwise 3 x 3 of x));  h = h * squeeze_excite(h);  LN(W h)

    plus x if its stride is 1; squeeze_excite(h) = hardsigmoid(W_b ReLU(W_a mean(h))), with biases
    and a quarter of the channels between, rounded to a multiple of 8 and at least 8.

    Budgets: a quarter of the tokens, where both sides are even (published: 144 of 576), and all of
    them, with stride 1 in the second block as well: not the identity.

    A token of stride 2 holds the 2 x 2 patches (2i, 2i + 1) of each axis, though its kernel also
    reaches 2i - 1. It is real if any of the four is.

    Deviations: padding, see the top of this file. The depthwise product is a sum of nine shifted
    copies and counts no matmul FLOPs.
    """

    label = "ldp"

    @nn.nowrap
    def reachable(self, grid):
        return tuple(_halved(grid))

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        features = self.features or width
        squeeze = 2 * 2 * features * _divisible(features)
        total = 2 * num_tokens * features * (width + features) + 2 * squeeze
        return total + 2 * (num_tokens + self.budget) * features * features

    @nn.compact
    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid = self.check_call(tokens, signals, needs_grid=True)
        cells = _halved(grid)[self.budget]
        features = self.features or tokens.embed.shape[-1]
        tokens = zero_padding(tokens)
        x = on_grid(self.mlp(tokens.embed, features, features, exact_gelu), grid)
        live = on_grid(tokens.mask[..., None], grid)
        x = self._inverted("block_0", x, live, live, 1)
        tokens = pool(tokens, grid, cells)
        new_live = on_grid(tokens.mask[..., None], cells)
        x = self._inverted("block_1", x, live, new_live, grid[0] // cells[0])
        return with_embed(tokens, off_grid(x))

    @nn.nowrap
    def _inverted(
        self, name: str, x: jax.Array, live: jax.Array, new_live: jax.Array, stride: int
    ) -> jax.Array:
        """One block on [B, h, w, C]; `live` and `new_live` are the masks before and after it."""
        features = x.shape[-1]
        y = depthwise(self, f"{name}_depthwise", x, live, stride)
        y = nn.hard_swish(self.layer_norm(f"{name}_depthwise_norm", y, "mlp", _LDP_EPSILON))
        y = squeeze_excite(self, name, y, new_live, _divisible(features), nn.relu, nn.hard_sigmoid)
        y = self.dense(f"{name}_out", y, features, ("mlp", "embed"), bias=False)
        y = self.layer_norm(f"{name}_out_norm", y, "embed", _LDP_EPSILON)
        return x + y if stride == 1 else y


class LDPv2(Projector):
    """`ldpv2`: MLP, adaptive average pooling, then x + depthwise 3 x 3 of x.

    MobileVLM V2 (arXiv 2402.03766, section 3.3 and equation 3; Meituan-AutoML/MobileVLM@688fdec).
    The MLP is Linear, GELU (exact), Linear, with bias and `features` columns; the convolution,
    which encodes positions (PEG), has a bias. Published: 144 of 576 tokens. The full budget omits
    only the pooling and is not the identity.

    Budgets: those of `adaptive_grids`, as in `deco`, with its deviation for cells that do not
    divide the grid.

    Deviations: padding, see the top of this file. The depthwise product is a sum of nine shifted
    copies and counts no matmul FLOPs.
    """

    label = "ldpv2"

    @nn.nowrap
    def reachable(self, grid):
        return tuple(adaptive_grids(grid))

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        features, grid = self.features or width, grids.resolve(self.grid, num_tokens)
        pooling = pool_flops(grid, adaptive_grids(grid)[self.budget], features)
        return pooling + 2 * num_tokens * features * (width + features)

    @nn.compact
    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid = self.check_call(tokens, signals, needs_grid=True)
        cells = adaptive_grids(grid)[self.budget]
        features = self.features or tokens.embed.shape[-1]
        tokens = zero_padding(tokens)
        x = self.mlp(tokens.embed, features, features, exact_gelu)
        tokens = pool(tokens.replace(embed=x), grid, cells)
        x, live = on_grid(tokens.embed, cells), on_grid(tokens.mask[..., None], cells)
        bias = self.weight("peg_bias", nn.initializers.zeros, (features,), ("mlp",), x.dtype)
        return with_embed(tokens, off_grid(x + depthwise(self, "peg", x, live) + bias))


def on_grid(x: Shaped[Array, "B N C"], grid: grids.Grid) -> Shaped[Array, "B h w C"]:
    """[B, h*w, C] to [B, h, w, C]."""
    return x.reshape(x.shape[0], *grid, x.shape[-1])


def off_grid(x: Shaped[Array, "B h w C"]) -> Shaped[Array, "B N C"]:
    """[B, h, w, C] to [B, h*w, C]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def depthwise(
    module: Parametric,
    name: str,
    x: Float[Array, "B h w C"],
    live: Bool[Array, "B h w 1"],
    stride: int = 1,
) -> Float[Array, "B rows columns C"]:
    """Depthwise 3 x 3 convolution without bias; zeros surround the grid and replace padding.

    A sum of shifted copies: XLA's grouped convolution takes 24 times as long on a CPU (24 x 24 x
    256), and its gradient 6 times; on other machines the copies are one fused pass.

    Args:
      module: owner of the parameter `<label>_<name>_kernel` [3, 3, C].
      name: of the parameter.
      x: [B, h, w, C].
      live: bool [B, h, w, 1].
      stride: 1, or 2 for even h and w; the kernel is centred on every `stride`-th position.
    """
    init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", (0, 1), (2,))
    # These names tell optimizers that the first axes are positions, not inputs of a matrix.
    axes = ("rows", "columns", "mlp")
    kernel = module.weight(f"{name}_kernel", init, (3, 3, x.shape[-1]), axes, jnp.float32)
    rows, columns = x.shape[1:3]
    dtype = x.dtype
    x = jnp.where(live, x, 0).astype(jnp.float32)
    # Without the barrier XLA recomputes the input for each of the nine copies.
    x = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
    taps = [(i, j) for i in range(3) for j in range(3)]
    total = sum(
        x[:, i : i + rows : stride, j : j + columns : stride] * kernel[i, j] for i, j in taps
    )
    return total.astype(dtype)


def squeeze_excite(
    module: Parametric,
    name: str,
    x: Float[Array, "B h w C"],
    live: Bool[Array, "B h w 1"],
    squeezed: int,
    activation: Callable[[jax.Array], jax.Array],
    gate: Callable[[jax.Array], jax.Array],
) -> Float[Array, "B h w C"]:
    """x times gate(W_b activation(W_a mean(x))), with the mean over the real positions of the row.

    Args:
      module: owner of the parameters.
      name: of the parameters.
      x: [B, h, w, C].
      live: bool [B, h, w, 1].
      squeezed: width of the product with W_a.
      activation, gate: functions.
    """
    count = jnp.maximum(live.sum(axis=(1, 2)), 1)
    mean = jnp.sum(jnp.where(live, x, 0).astype(jnp.float32), axis=(1, 2)) / count
    y = module.dense(f"{name}_squeeze", mean.astype(x.dtype), squeezed, ("mlp", None))
    y = module.dense(f"{name}_excite", activation(y), x.shape[-1], (None, "mlp"))
    return x * gate(y)[:, None, None]


def _squeezed(inputs: int) -> int:
    """A quarter of the width, at least 1 (tiny models keep the branch)."""
    return max(1, round(inputs / 4))


def _divisible(features: int) -> int:
    """A quarter of the width as a multiple of 8, as MobileNetV3 rounds: never below 90 %."""
    nearest = max(8, (features // 4 + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * (features // 4) else nearest


def _halved(grid: grids.Grid) -> dict[int, grids.Grid]:
    """Budget -> grid after stride 1 and, if both sides are even, stride 2."""
    sizes = grids.shuffled_grids(grid)
    return {b: cells for b, cells in sizes.items() if grid[0] // cells[0] in (1, 2)}
