"""minicpm_merger: merges 2 x 2 windows inside the vision encoder, and again after it."""

import flax.linen as nn
import jax.numpy as jnp

from efficient_vlm import checks
from efficient_vlm.compressors import fold, grids
from efficient_vlm.compressors.base import Compressor, Stage, describe
from efficient_vlm.compressors.between.pooling import space_to_depth
from efficient_vlm.compressors.projectors.mlp import Parametric, exact_gelu, with_embed
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.tokens import VisualTokens, zero_padding
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.nn.cross_attention import cross_attention

QUARTERS = ("window", "final")


class _Halving(Parametric):
    """A merger of 2 x 2 windows, whose only budget is a quarter of its input."""

    @nn.nowrap
    def reachable(self, grid):
        return (grid[0] // 2 * (grid[1] // 2),) if grid[0] % 2 == grid[1] % 2 == 0 else ()

    @nn.nowrap
    def _cells(self, tokens: VisualTokens, signals) -> tuple[grids.Grid, grids.Grid]:
        rows, columns = grid = self.check_call(tokens, signals, needs_grid=True)
        return grid, (rows // 2, columns // 2)


class WindowMerger(_Halving):
    """The merger inside the encoder, a stage of `MiniCPMMerger`, which describes it."""

    num_heads: int = 16
    hidden_dim: int | None = None

    label = "minicpm_window"

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        attention = 4 * 2 * num_tokens * width * width + 2 * 2 * num_tokens * 4 * width
        hidden = self.hidden_dim or 16 * width
        return attention + 2 * (num_tokens // 4) * hidden * (4 * width + width)

    @nn.compact
    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid, cells = self._cells(tokens, signals)
        tokens = zero_padding(tokens)
        x, (batch, _, width) = tokens.embed, tokens.embed.shape
        if width % self.num_heads:
            raise UserError(
                f"compressor.num_heads: {self.num_heads} does not divide the width {width}",
                allowed=f"a divisor of {width}",
            )
        dim = width // self.num_heads

        def window(y):  # [B, N, D] -> [B, windows, 4, D]
            return space_to_depth(y, grid, cells).reshape(batch, -1, 4, y.shape[-1])

        real = window(tokens.mask[..., None])[..., 0]
        x = window(x)
        normal = self.layer_norm("norm", x, "embed", 1e-6)

        def heads(name):
            y = self.dense(name, normal, width, ("embed", "heads"))
            return y.reshape(*y.shape[:-1], self.num_heads, dim)

        q, k, v = heads("query"), heads("key"), heads("value")
        bias = None if tokens.bias is None else window(tokens.bias[..., None])[..., 0]
        y = cross_attention(q, k, v, real, bias).values.reshape(x.shape)
        x = x + self.dense("out", y, width, ("heads", "embed"))
        x = jnp.where(real[..., None], x, 0)

        count = jnp.maximum(real.sum(axis=-1), 1)[..., None].astype(jnp.float32)
        mean = (x.astype(jnp.float32).sum(axis=2) / count).astype(x.dtype)
        y = self.layer_norm("merge_norm", x.reshape(batch, -1, 4 * width), "mlp", 1e-6)
        y = self.dense("up", y, self.hidden_dim or 16 * width, ("embed", "mlp"))
        y = self.dense("down", nn.gelu(y, approximate=True), width, ("mlp", "embed"))
        return with_embed(fold.pool(tokens.replace(bias=None), grid, cells), mean + y)


class FinalMerger(_Halving):
    """The merger after the encoder, a stage of `MiniCPMMerger`, which describes it."""

    label = "minicpm_final"

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        return 2 * (num_tokens // 4) * 4 * width * (4 * width + width)

    @nn.compact
    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid, cells = self._cells(tokens, signals)
        tokens = zero_padding(tokens)
        width = tokens.embed.shape[-1]
        x = self.layer_norm("norm", space_to_depth(tokens.embed, grid, cells), "mlp", 1e-6)
        return with_embed(fold.pool(tokens, grid, cells), self.mlp(x, width, 4 * width, exact_gelu))


class MiniCPMMerger(Compressor):
    """`minicpm_merger`: 2 x 2 windows of patches merge early in the encoder and again after it.

    MiniCPM-V 4.6 (model card; transformers `minicpmv4_6`). Two mergers, each to a quarter:

    * window (inside the encoder, after `layer` layers): x += attention(LN(x)) within each window,
      then token = mean of the window + MLP(LN(window side by side)), MLP with the tanh GELU. The
      remaining layers run on a quarter of the tokens, which saves the compute.
    * final (after the last layer): token = MLP(LN(window side by side)), exact GELU, inner width
      four times the width.

    All matrices have biases. Budgets: N (the identity), N / 4 and, with both mergers, N / 16, the
    published "16x" (448 pixels: 32 x 32 patches to 64 tokens).

    N / 4 uses one merger. The published "4x" omits the *window* merger, so the whole encoder runs
    on N tokens: quarter="final". The default quarter="window" saves compute in the encoder.

    Deviations: the final merger keeps the encoder's width and precedes the encoder's last norm
    (published: after it, mapping to the decoder's width, which the connector does here). Padded
    neighbours are excluded from keys and mean, and are zeros side by side. A bias of the tokens is
    added to the logits of the window attention and then discarded. Kernels are initialised by
    lecun_normal (published: block-diagonal normals).

    Called outside an encoder it applies its mergers one after the other.

    Attributes:
      layer: number of encoder layers before the window merger. Default 7: the published
        insert_layer_id 6 is the 0-based index of the layer after which it acts.
      quarter: the merger used for budget N / 4, "window" (default) or "final".
      num_heads: heads of the window attention.
      hidden_dim: inner width of the window MLP; None for 16 times the width (published: 4 times
        the encoder's MLP width, 17216 for 1152).
    """

    layer: int = 7
    quarter: str = "window"
    num_heads: int = 16
    hidden_dim: int | None = None

    label = "minicpm_merger"
    where = "encoder"

    @nn.nowrap
    def check_options(self):
        checks.whole("compressor.layer", self.layer, 0)
        checks.whole("compressor.num_heads", self.num_heads)
        if self.hidden_dim is not None:
            checks.whole("compressor.hidden_dim", self.hidden_dim)
        if self.quarter not in QUARTERS:
            raise unknown("compressor.quarter", str(self.quarter), QUARTERS)

    @nn.nowrap
    def reachable(self, grid):
        rows, columns = grid
        return tuple(
            rows // side * (columns // side)
            for side in (1, 2, 4)
            if rows % side == columns % side == 0
        )

    @nn.nowrap
    def mergers(self, num_tokens: int) -> tuple[tuple[str, Compressor], ...]:
        """Names and modules of the mergers from N tokens to the budget, in order."""
        rows, columns = grid = grids.resolve(self.grid, num_tokens)
        budgets = self.reachable(grid)
        if self.budget not in budgets:
            raise UserError(
                f"compressor.budget: {self.label} cannot give {self.budget} tokens on a {rows} x "
                f"{columns} grid",
                allowed=describe(budgets),
                fix=f"compressor.budget={min(budgets, key=lambda b: abs(b - self.budget))}",
            )
        if self.budget == num_tokens:
            return ()
        if self.budget == num_tokens // 4:
            return ((self.quarter, self._merger(self.quarter, grid)),)
        half = (rows // 2, columns // 2)
        return ("window", self._merger("window", grid)), ("final", self._merger("final", half))

    @nn.nowrap
    def _merger(self, name: str, grid: grids.Grid) -> Compressor:
        fields = {"budget": grid[0] * grid[1] // 4, "grid": grid, "parent": None}
        if name == "final":
            return FinalMerger(**fields)
        return WindowMerger(num_heads=self.num_heads, hidden_dim=self.hidden_dim, **fields)

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False):
        del class_token
        if not self.layer <= num_layers:
            raise UserError(
                f"compressor.layer: {self.layer}, but the encoder has {num_layers} layers",
                allowed=f"0 to {num_layers}",
            )
        layers = {"window": self.layer, "final": num_layers}
        return tuple(Stage(layers[name], module) for name, module in self.mergers(num_tokens))

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        total = 0
        for _, module in self.mergers(num_tokens):
            total += module.flops(num_tokens, width)
            num_tokens //= 4
        return total

    @nn.compact
    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid = self.check_call(tokens, signals, needs_grid=True)
        used = dict(self.mergers(tokens.mask.shape[1]))
        if self.is_initializing() and grid[0] % 2 == grid[1] % 2 == 0:
            # One checkpoint for all budgets includes the parameters of unused mergers.
            for name in ("window", "final"):
                if name not in used:
                    self._merger(name, grid).copy(name=name)(tokens)
        for name, module in used.items():
            tokens = module.copy(name=name)(tokens)
        return tokens
