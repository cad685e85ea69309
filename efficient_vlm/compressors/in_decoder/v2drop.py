"""`v2drop`: drops the tokens that a layer changes least, and all tokens at the last stage."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from efficient_vlm.compressors.base import as_tuple
from efficient_vlm.compressors.in_decoder.base import (
    InDecoder,
    Keep,
    check_falling,
    check_keep,
    count_of,
)
from efficient_vlm.errors import UserError

DEPTH, LAYERS = 32, (3, 17, 22)  # as published for LLaVA-1.5-7B


class V2Drop(InDecoder):
    """`v2drop`: drops the tokens that a layer changes least, and all at the last of three cuts.

    Chen et al., "V2Drop: variation-aware vision token dropping", arXiv 2509.01552 (CVPR 2026),
    section 4: the variation of token t is ||h_t(after) - h_t(before)||_2 over the layer before the
    cut; the tokens that vary least ("lazy" tokens) are dropped. No attention is needed, and because
    visual tokens precede the text, the selection does not depend on the question.

    Defaults of the official code for LLaVA-1.5-7B: after layers 3, 17 and 22 of 32 keep .5, .5
    and 0 of the remaining tokens. Positions are retained.

    Deviations: keep 0 drops all tokens, as in the paper's table; the official code keeps one
    (max(1, int(0 * T))), which is keep=(.5, .5, 1) here. The squared norm has the same ranking and
    is rounded only once.

    Attributes:
      budget: of the one-cut form only; may be 0.
      layers: numbers of layers before each cut; None for the published ones, rescaled to the depth.
      keep: for each cut, a fraction of the tokens before it (rounded down, at least 1), a count, or
        0; for all images of a row together. None for .5, and 0 at the last.
    """

    layers: Sequence[int] | None = None
    keep: Sequence[Keep] | None = None
    position_policy: str | None = "retain"

    label = "v2drop"
    min_budget = 0

    @nn.nowrap
    def check_options(self):
        for name in ("layers", "keep"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_tuple(f"compressor.{name}", value))
        for keep in self.keep or ():
            check_keep("compressor.keep", keep, zero=True)
        check_falling("compressor.keep", [k for k in self.keep or () if isinstance(k, int)])
        if self.keep and len(self.keep) != len(self.layers or LAYERS):
            raise UserError(
                f"compressor.keep: {self.keep} for the cuts after {self.layers or 'three layers'}",
                allowed="one number for each layer of compressor.layers",
            )

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False):
        self.no_budget("compressor.keep")
        layers = (
            self.scaled(LAYERS, DEPTH, num_layers)
            if self.layers is None
            else self.check_layers("compressor.layers", self.layers, num_layers)
        )
        none = (None,) * len(layers)

        def counts(now):
            left = []
            for keep in self.keep or (0.5,) * (len(layers) - 1) + (0,):
                now = count_of(keep, now) if now else 0
                left.append(now)
            return left

        fields = dict(rows=counts, layers=none, keep=none)
        return self.cuts(layers, counts(num_tokens), num_tokens, **fields)

    @nn.nowrap
    def knobs(self, num_layers, num_tokens):
        """For each first count, the same fraction at every cut but the last, which drops all."""
        number = len(self.layers or LAYERS)
        settings = []
        for first in range(num_tokens + 1):
            counts, now = [], num_tokens
            for _ in range(number - 1):
                now = first * now // num_tokens
                counts.append(now)
            settings.append({"keep": (*counts, 0)})
        return settings

    @nn.nowrap
    def score_flops(self, num_places, width):
        return 0

    @nn.nowrap
    def scores(self, tokens, state):
        count = tokens.mask.shape[1]
        real = tokens.mask[..., None]
        after = jnp.where(real, state.after[:, :count], 0).astype(jnp.float32)
        before = jnp.where(real, state.before[:, :count], 0).astype(jnp.float32)
        return jnp.sum(jnp.square(after - before), axis=-1)
