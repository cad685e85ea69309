"""`pyramiddrop`: fewer visual tokens at each of several depths, by the last instruction token."""

import math
from collections.abc import Sequence

import flax.linen as nn

from efficient_vlm.compressors.base import as_tuple
from efficient_vlm.compressors.in_decoder import rows
from efficient_vlm.compressors.in_decoder.base import (
    InDecoder,
    Keep,
    check_falling,
    check_keep,
    count_of,
)
from efficient_vlm.errors import UserError


class PyramidDrop(InDecoder):
    """PyramidDrop: S segments of the decoder, each with a part lambda of the tokens of the last.

    Xing et al., "PyramidDrop", arXiv 2410.17247, section 3.2: at the end of a segment a visual
    token is scored by the attention between the last instruction token (the query) and it (the
    key), through the projections of the *next* layer, mean over heads; the best are kept. As in
    the official code the softmax runs over all tokens, counts are int(keep * N), rotary positions
    are in the score, and what is kept is reindexed from 0.

    It can be trained with: the judge is the last token in front of the answer, and the score is
    cut off from the gradient, so training and inference see the same.

    Defaults: lambda = 0.5, S = 4: layers 8, 16, 24 of 32 and keep .5, .25, .125 of N. The variants
    of the paper's table with S = 3 and 5 are keep=(.5, .25) and keep=(.5, .25, .125, .0625).

    Deviations: a stage keeps at least one token, and one that would drop nothing is left out. In
    training on several turns the official code averages over the last instruction tokens of all
    turns; here `DecoderState.last`, one token a row, judges.

    Attributes:
      budget: of the one-cut form only.
      layers: layers in front of each cut; None for the end of each of S equal segments (rounded
        down; the last segment gets the rest).
      keep: for each cut, a fraction of the N visual tokens that entered the decoder, those of all
        images of a row together, or a count of them. None for 0.5, 0.25, 0.125, ...
    """

    layers: Sequence[int] | None = None
    keep: Sequence[Keep] | None = None
    position_policy: str | None = "reindex"

    label = "pyramiddrop"
    text_guided = True
    looks = "next"

    @nn.nowrap
    def check_options(self):
        for name in ("layers", "keep"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_tuple(f"compressor.{name}", value))
        for keep in self.keep or ():
            check_keep("compressor.keep", keep)
        check_falling("compressor.keep", self.keep or ())
        if self.layers and self.keep and len(self.layers) != len(self.keep):
            raise UserError(
                f"compressor.keep: {self.keep} for the cuts behind layers {self.layers}",
                allowed="one number for each layer of compressor.layers",
            )

    @nn.nowrap
    def _cuts(self) -> int:
        return len(self.layers or self.keep or (0.5, 0.25, 0.125))

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False):
        self.no_budget("compressor.keep")
        number = self._cuts()
        layers = self.layers or [num_layers // (number + 1) * (i + 1) for i in range(number)]
        layers = self.check_layers("compressor.layers", layers, num_layers)
        keep = self.keep or [0.5 ** (i + 1) for i in range(number)]
        counts = [count_of(k, num_tokens) for k in keep]
        none = (None,) * number
        return self.cuts(layers, counts, num_tokens, layers=none, keep=none)

    @nn.nowrap
    def knobs(self, num_layers, num_tokens):
        """Counts that fall by the same factor lambda from cut to cut, for each first count."""

        def counts(first):
            share = first / num_tokens
            falling = [math.floor(num_tokens * share ** (i + 1) + 0.5) for i in range(self._cuts())]
            return tuple(max(1, count) for count in falling)

        return [{"keep": counts(first)} for first in range(1, num_tokens + 1)]

    @nn.nowrap
    def score_flops(self, num_places, width):
        return rows.row_flops(1, num_places, width)

    @nn.nowrap
    def scores(self, tokens, state):
        paid = rows.attention_rows(state, state.last[:, None])
        return paid.mean(axis=1)[:, 0, : tokens.mask.shape[1]]
