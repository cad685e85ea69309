"""scope: salient tokens that cover the other ones (arXiv 2510.24214)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficient_vlm import checks
from efficient_vlm.compressors import fold, score, select
from efficient_vlm.compressors.between.cls_attention import AttentionGuided
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.tokens import zero_padding


class Scope(AttentionGuided):
    """`scope` (arXiv 2510.24214): greedy, coverage gain times saliency.

    With kept set K, c_i = max(0, max_{s in K} cos(x_i, x_s)); the next token is

        argmax_{j not in K}  a_j^alpha * sum_i max(0, cos(x_i, x_j) - c_i),

    where a_j is the attention that patch j receives from CLS (the official code sums it over heads,
    we take the mean: the same argmax) and x are the encoder features before the projector, as in
    the official code for LLaVA. Scores within a relative 1e-5 are ties, which the lowest index
    wins; an increase in coverage below 1e-5 is ignored.

    Memory: every step needs all cosines, so the N x N float32 matrix of each image is kept (1.3 MB
    for 576 patches, 64 MB for 4096).

    Deviations: the official code's switch to a sum instead of the product is not supported. Padding
    is neither covered nor covers.

    Attributes:
      alpha: exponent of the saliency, 1.0 in the official scripts; 0 is pure coverage.
      attention, layer, position_policy: as in `AttentionGuided`. Layer -1 is the official one,
        because LLaVA runs all but the last layer of CLIP.
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
