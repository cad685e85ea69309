"""scope: salient tokens that cover the others (arXiv 2510.24214)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficient_vlm import checks
from efficient_vlm.compressors import fold, score, select
from efficient_vlm.compressors.between.cls_attention import AttentionGuided
from efficient_vlm.compressors.tokens import NO_SIGNALS, zero_padding


class Scope(AttentionGuided):
    """`scope` (arXiv 2510.24214): greedy, coverage gain times saliency.

    With kept set K, c_i = max(0, max_{s in K} cos(x_i, x_s)); the next token is

        argmax_{j not in K}  a_j^alpha * sum_i max(0, cos(x_i, x_j) - c_i),

    a_j the attention that patch j receives from CLS (the official code sums it over heads, here it
    is the mean: the same argmax), x the encoder features in front of the projector, as in the
    official code for LLaVA. Scores within a relative 1e-5 are ties and go to the lowest index; a
    rise in coverage below 1e-5 counts as none.

    Memory: every step needs all cosines, so the matrix of N x N float32 is held for each image
    (1.3 MB for 576 patches, 64 MB for 4096).

    Deviations: the sum instead of the product, a switch of the official code, is left out. Padding
    is not covered and does not cover.

    Attributes:
      alpha: exponent of the saliency, 1.0 in the official scripts; 0 is pure coverage.
      attention, layer, position_policy: as in `AttentionGuided`. Layer -1 is the official one:
        LLaVA executes all but the last layer of CLIP.
    """

    alpha: float = 1.0

    label = "scope"

    @nn.nowrap
    def check_options(self):
        super().check_options()
        checks.number("compressor.alpha", self.alpha, 0)

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        return 0 if self.budget == num_tokens else 2 * num_tokens * num_tokens * width

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        self.check_call(tokens, signals, needs_grid=False)
        if self.budget == tokens.mask.shape[1]:
            return tokens
        unit = score.unit(jax.lax.stop_gradient(zero_padding(tokens).embed))
        row = jax.lax.stop_gradient(self.row(tokens, signals))
        weight = jnp.power(jnp.maximum(row, 0.0), self.alpha)
        return fold.drop(tokens, select.coverage(unit, weight, tokens.mask, self.budget))
