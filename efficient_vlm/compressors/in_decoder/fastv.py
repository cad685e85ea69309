"""`fastv`: one early cut in the decoder, by the attention of the last prompt token."""

import flax.linen as nn

from efficient_vlm.compressors.in_decoder import rows
from efficient_vlm.compressors.in_decoder.base import InDecoder, Keep, check_keep, count_of
from efficient_vlm.errors import UserError, unknown

ROWS = ("last", "mean")


class FastV(InDecoder):
    """FastV: drops visual tokens that receive little attention in layer K after that layer.

    Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764, section 4.1: with
    A the softmax map of layer K (the K-th, so `layer` layers run on all tokens), averaged over
    heads, phi_j is the attention that visual token j receives, and the best are kept, in order.

    Paper and code use different queries, see `row`. Positions are retained, as in the official
    code. Defaults: K = 2, half of the tokens, row "last".

    Deviations: a fraction is rounded down (at least 1). With teacher forcing the "last" token is
    the last of the prompt; answers never contribute.

    Attributes:
      budget: a count to keep, for all images of a row together; an alternative to `keep`.
      layer: K, number of layers before the cut.
      keep: fraction of the N visual tokens of all images of a row together (1 - R in the paper),
        or a count of them. None is 0.5.
      row: "last", phi_j = A_ij for i the last prompt token (the official code); "mean", phi_j the
        mean of A_ij over all visual and prompt rows i, including the token's own row, with rows
        before j counted as 0 (the paper's "average attention received from all other tokens"; rows
        are computed in blocks, the whole map is never materialised).
    """

    layer: int = 2
    keep: Keep | None = None
    row: str = "last"
    position_policy: str | None = "retain"

    label = "fastv"
    text_guided = True

    @nn.nowrap
    def check_options(self):
        if self.row not in ROWS:
            raise unknown("compressor.row", str(self.row), ROWS)
        if self.keep is not None:
            check_keep("compressor.keep", self.keep)

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False):
        if self.keep is not None and self.budget is not None:
            raise UserError(
                f"compressor.keep: {self.keep}, and compressor.budget={self.budget} beside it",
                allowed="one of the two: a budget is a count to keep",
                fix=f"omit budget, or keep (fastv then keeps {self.budget} tokens)",
            )
        layers = self.check_layers("compressor.layer", (self.layer,), num_layers)
        keep = 0.5 if self.keep is None else self.keep
        keep = keep if self.budget is None else self.budget

        def counts(total):
            return (count_of(keep, total),)

        return self.cuts(layers, counts(num_tokens), num_tokens, rows=counts, keep=(None,))

    @nn.nowrap
    def knobs(self, num_layers, num_tokens):
        return [{"keep": count} for count in range(1, num_tokens + 1)]

    @nn.nowrap
    def score_flops(self, num_places, width):
        if self.row == "last":
            return rows.row_flops(1, num_places, width)
        return rows.column_flops(num_places, width)

    @nn.nowrap
    def scores(self, tokens, state):
        count = tokens.mask.shape[1]
        if self.row == "last":
            attention = rows.attention_rows(state, state.last[:, None])
            return attention.mean(axis=1)[:, 0, :count]
        return rows.column_means(state, rows.judges(state))[:, :count]
