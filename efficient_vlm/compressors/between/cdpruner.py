"""cdpruner: a diverse subset, weighted by relevance to the instruction (arXiv 2506.10967)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficient_vlm.compressors import fold, score, select
from efficient_vlm.compressors.base import Compressor
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.tokens import zero_padding
from efficient_vlm.errors import UserError, unknown

RELEVANCES = ("negative", "positive", "none")


class CDPruner(Compressor):
    """`cdpruner` (arXiv 2506.10967): greedy MAP of a determinantal point process on the tokens.

    L = diag(r) S diag(r) with S_ij = cos(x_i, x_j) of the projected tokens and r the relevance of
    each token to the instruction, shifted and scaled to 0..1 over the image. Fast greedy MAP
    inference (`select.map_dpp`, arXiv 1709.05135) builds the kept set: each step takes the token
    that increases det L of the set by the largest factor.

    Deviations from the paper and its code: their relevance compares CLIP's image and text
    embeddings, averaged over segments of the text. Without CLIP's text tower we compare the
    decoder's instruction embedding (`Signals.text`, one for the whole text) with the projected
    tokens (without their deepstack features), so both must have the decoder's width. Tokens in the
    span of the kept ones (within 1e-5) add nothing and come last, lowest index first, where the
    official code depends on rounding noise or divides by zero. Equal relevances give r = 1, not
    0 / 0.

    Attributes:
      relevance: "negative", r from -cos(token, text) as in the official code (CLIP's patch features
        are known to be anti-correlated with the text they depict); "positive", r from +cos, as
        expected of embeddings in one space; "none", r = 1, a plain DPP that needs no text.
      position_policy: "reindex", as in the official code.
    """

    position_policy: str | None = "reindex"
    relevance: str = "negative"

    label = "cdpruner"
    needs = frozenset({"text"})
    projected = True
    text_guided = True

    def __post_init__(self):
        if self.relevance == "none":
            object.__setattr__(self, "needs", frozenset())
            object.__setattr__(self, "text_guided", False)
        super().__post_init__()

    @nn.nowrap
    def check_options(self):
        if self.relevance not in RELEVANCES:
            raise unknown("compressor.relevance", str(self.relevance), RELEVANCES)

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        if self.budget == num_tokens:
            return 0
        relevance = 0 if self.relevance == "none" else 2 * num_tokens * width
        return relevance + select.map_dpp_flops(num_tokens, width, self.budget)

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        self.check_call(tokens, signals, needs_grid=False)
        if self.budget == tokens.mask.shape[1]:
            return tokens
        unit = score.unit(jax.lax.stop_gradient(zero_padding(tokens).embed))
        if self.relevance == "none":
            quality = tokens.mask.astype(jnp.float32)
        else:
            text = score.unit(jax.lax.stop_gradient(signals.text))
            width = text.shape[-1]
            if unit.shape[-1] % width:
                raise UserError(
                    f"signals.text: width {width}, but the tokens have {unit.shape[-1]}",
                    allowed="one width: cdpruner compares projected tokens with the instruction",
                    fix="compress after the connector, or set compressor.relevance=none",
                )
            # Deepstack features for deeper layers follow the embedding.
            embed = unit if unit.shape[-1] == width else score.unit(unit[..., :width])
            cosine = jnp.einsum("btd,bd->bt", embed, text, precision=jax.lax.Precision.HIGHEST)
            sign = -1.0 if self.relevance == "negative" else 1.0
            quality = score.min_max(sign * cosine, tokens.mask)
        return fold.drop(tokens, select.map_dpp(unit, quality, tokens.mask, self.budget))
