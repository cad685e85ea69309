"""`pyramiddrop`: drops visual tokens at several depths, scored by the last instruction token."""

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
    """PyramidDrop: each of S decoder segments keeps a fraction lambda of the last one's tokens.

    Xing et al., "PyramidDrop", arXiv 2410.17247, section 3.2: at the end of a segment a visual
    token is scored by the attention between the last instruction token (the query) and it (the
    key), through the projections of the *next* layer, mean over heads; the best are kept. As in
    the official code the softmax runs over all tokens, counts are int(keep * N), rotary positions
    are in the score, and what is kept is reindexed from 0.

    Models can train with it: the query is the last token before the answer, and the score carries
    no gradient, so training and inference cut alike.

    Defaults: lambda = 0.5, S = 4: layers 8, 16, 24 of 32 and keep .5, .25, .125 of N. The variants
    of the paper's table with S = 3 and 5 are keep=(.5, .25) and keep=(.5, .25, .125, .0625).

    Deviations: a stage keeps at least one token, and stages that would drop nothing are omitted. In
    training on several turns the official code averages over the last instruction tokens of all
    turns; here the query is `DecoderState.last`, one token per row.

    Attributes:
      budget: of the one-cut form only.
      layers: numbers of layers before each cut; None for the ends of S equal segments (rounded
        down; the last segment takes the remainder).
      keep: for each cut, a fraction of the N visual tokens that entered the decoder, of all images
        of a row together, or a count of them. None for 0.5, 0.25, 0.125, ...
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
                f"compressor.keep: {self.keep} for the cuts after layers {self.layers}",
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
        none = (None,) * number

        def counts(total):
            return [count_of(k, total) for k in keep]

        fields = dict(rows=counts, layers=none, keep=none)
        return self.cuts(layers, counts(num_tokens), num_tokens, **fields)

    @nn.nowrap
    def knobs(self, num_layers, num_tokens):
        """For each first count, counts that decrease by the same factor lambda at every cut."""

        def counts(first):
            share = first / num_tokens
            decreasing = [
                math.floor(num_tokens * share ** (i + 1) + 0.5) for i in range(self._cuts())
            ]
            return tuple(max(1, count) for count in decreasing)

        return [{"keep": counts(first)} for first in range(1, num_tokens + 1)]

    @nn.nowrap
    def score_flops(self, num_places, width):
        return rows.row_flops(1, num_places, width)

    @nn.nowrap
    def scores(self, tokens, state):
        attention = rows.attention_rows(state, state.last[:, None])
        return attention.mean(axis=1)[:, 0, : tokens.mask.shape[1]]
