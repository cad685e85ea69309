"""visionselector: a trained scorer that says which tokens are kept."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float32

from efficient_vlm import checks
from efficient_vlm.compressors import fold, select
from efficient_vlm.compressors.projectors.mlp import Parametric
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.soft_select import hard_top_k, soft_top_k
from efficient_vlm.compressors.tokens import VisualTokens
from efficient_vlm.errors import UserError
from efficient_vlm.nn.linear import product
from efficient_vlm.shapes import Array


class VisionSelector(Parametric):
    """`visionselector`: the tokens that a trained scorer likes best.

    VisionSelector (arXiv 2510.16598). With x the tokens behind the connector, q = W_q x and
    k = W_k x (without biases, initial standard deviation 1e-4),

        score_i = mean over j of <q_i, k_j> / sqrt(dim) = <q_i, mean_j k_j> / sqrt(dim),

    and the `budget` best are kept, in source order and with their positions. A selection has no
    gradient, so training has another form (`soft`, which the trainer sets): all tokens go on, each
    times its p of `soft_select.soft_top_k`, and for each token (p - m)^2 is a `penalty`, with m the
    selection itself (`soft_select.hard_top_k`), which the trainer weights (`train.penalty`). So
    training costs what all tokens cost. Published: `dim` 1792, trained alone, which is 12.85
    million parameters for tokens of width 3584.

    Deviations: published training anneals the weight by a curriculum of its own; here it grows
    linearly over a part of the run (`train.penalty_ramp`). The mean of the keys is the key of the
    mean token, so the products take O(tokens). Scores are float32.

    Attributes:
      budget: tokens to keep; None for all, in the form for training alone.
      dim: width of queries and keys.
      soft: K of the form for training; None for the selection. The trainer sets it.
    """

    budget: int | None = None
    position_policy: str | None = "retain"
    dim: int = 1792
    soft: int | None = None

    label = "visionselector"
    projected = True
    optional_budget = True

    @nn.nowrap
    def check_options(self):
        checks.whole("compressor.dim", self.dim)
        if self.soft is not None:
            checks.whole("compressor.soft", self.soft)
        elif self.budget is None:
            raise UserError(
                "compressor.budget: missing",
                allowed="the number of tokens that visionselector keeps, from 1",
                fix="for example compressor.budget=16",
            )

    @nn.nowrap
    def training_options(self):
        return {"soft": self.budget, "budget": None} if self.soft is None else {}

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        if self.soft is None and self.budget == num_tokens:
            return 0
        return 2 * width * self.dim * (num_tokens + 1) + 2 * num_tokens * self.dim

    @nn.compact
    def scores(self, tokens: VisualTokens) -> Float32[Array, "B T"]:
        """The score of each token; 0 for padding."""
        mask = tokens.mask[..., None]
        x = jnp.where(mask, tokens.embed, 0).astype(jnp.float32)
        init, shape = nn.initializers.normal(1e-4), (x.shape[-1], self.dim)
        query, key = (
            self.weight(name, init, shape, ("embed", "heads"), jnp.float32)
            for name in ("query", "key")
        )
        mean = x.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)
        keys = product(mean, key, jnp.float32) / math.sqrt(self.dim)
        scores = jnp.einsum("btd,bd->bt", product(x, query, jnp.float32), keys)
        return jnp.where(tokens.mask, scores, 0.0)

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        num_tokens = tokens.mask.shape[1]
        budget = num_tokens if self.budget is None else self.budget
        if self.budget is not None:
            self.check_call(tokens, signals, needs_grid=False)
        if self.soft is None and budget == num_tokens and not self.is_initializing():
            return tokens
        scores = self.scores(tokens)
        if self.soft is not None:
            tokens = self._softened(tokens, scores)
        if budget == num_tokens:
            return tokens
        return fold.drop(tokens, select.top_k(scores, tokens.mask, budget))

    @nn.nowrap
    def _softened(self, tokens: VisualTokens, scores: Float32[Array, "B T"]) -> VisualTokens:
        p = soft_top_k(scores, tokens.mask, self.soft)
        penalty = jnp.square(p - hard_top_k(scores, tokens.mask, self.soft))
        embed = jnp.where(tokens.mask[..., None], tokens.embed, 0)
        embed = (embed.astype(jnp.float32) * p[..., None]).astype(tokens.embed.dtype)
        return tokens.replace(embed=embed, penalty=penalty)
