import flax.linen as nn
import jax
import jax.numpy as jnp

from efficient_vlm import compressors
from efficient_vlm.compressors import fold, score, select
from efficient_vlm.compressors.base import Compressor
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.errors import unknown

CENTRES = ("all", "border")


@compressors.register
class Contrast(Compressor):
    """`contrast`: the tokens that are least similar to the mean token of their image.

    Example method of docs/adding_a_compressor.md, unpublished. With u_t = x_t / |x_t| and c the
    mean of u over the real tokens, score_t = -<u_t, c>; the `budget` best are kept, in source
    order. Ties: lowest index.

    Attributes:
      centre: "all", c over all tokens; "border", over the first and last row of the grid.
      position_policy: "retain" by default: where a token was is all that is left of the others.
    """

    centre: str = "all"
    position_policy: str | None = "retain"

    label = "contrast"

    @nn.nowrap
    def check_options(self):
        if self.centre not in CENTRES:
            raise unknown("compressor.centre", str(self.centre), CENTRES)

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        return 0 if self.budget == num_tokens else 2 * num_tokens * width

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        grid = self.check_call(tokens, signals, needs_grid=True)
        if self.budget == tokens.mask.shape[1]:
            return tokens
        real = tokens.mask
        # Padding may hold NaN: it is zeroed before anything is computed from it.
        unit = score.unit(jnp.where(real[..., None], tokens.embed, 0))
        if self.centre == "border":
            row = jnp.arange(grid[0] * grid[1]) // grid[1]
            real = real & ((row == 0) | (row == grid[0] - 1))
        count = jnp.maximum(real.sum(axis=1, keepdims=True), 1)
        centre = jnp.sum(jnp.where(real[..., None], unit, 0), axis=1) / count
        scores = -jnp.einsum("btd,bd->bt", unit, centre, precision=jax.lax.Precision.HIGHEST)
        return fold.drop(tokens, select.top_k(scores, tokens.mask, self.budget))
