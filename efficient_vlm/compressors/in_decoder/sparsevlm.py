"""sparsevlm: words that see the image rate its tokens; a part of the losers is merged."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficient_vlm.compressors import fold, select
from efficient_vlm.compressors.base import positive_int
from efficient_vlm.compressors.in_decoder import sparsevlm_plan as plan
from efficient_vlm.compressors.in_decoder.base import (
    InDecoder,
    Keep,
    as_tuple,
    check_falling,
    check_keep,
)
from efficient_vlm.compressors.in_decoder.clusters import dpc_knn
from efficient_vlm.compressors.in_decoder.rows import judges, range_flops, range_sums
from efficient_vlm.compressors.tokens import (
    NO_SIGNALS,
    VisualTokens,
    remap,
    take,
    weighted_means,
    zero_padding,
)
from efficient_vlm.errors import UserError, unknown

# Below this share of its largest value the rotary bias is not divided out any further.
FLOOR = 0.05


class SparseVLM(InDecoder):
    """`sparsevlm` (arXiv 2410.04417): three cuts, rated by the words that matter for the image.

    Raters (section 3.2): of R = softmax over the text of v t^T, unscaled dot products of what
    enters the decoder's first layer, each word gets the mean over the visual tokens; words above
    the mean of those numbers are raters. Score (section 3.3): attention from the raters to each
    visual token in the layer in front of the cut, mean over heads and raters. Version "1.5":

    * the `keep` best tokens are kept; of the p others the floor(recycle p) + 1 best are clustered
      (section 3.4, `clusters.dpc_knn` on hidden states) into floor(that / 10) + 1 tokens;
    * a merged token stands where the centre of its cluster stood, so all tokens are in source
      order; its place, size and `source` are those of its members.

    Version "2.0" (SparseVLM+, sections 4.2 and 4.3, known from third-party ports of the official
    code) has other counts, no merging, and another score: attention A_mn is divided by the bias
    that rotary positions alone cause, D_mn = (1 / Dh) <rotate_m(1), rotate_n(1)> with 1 the vector
    of ones; then only the `num_heads` heads that pay most to the visual tokens are averaged.
    UNCERTAIN: whether the published code divides weights or logits (weights here).

    Cuts are at the output of layers 2, 6 and 15 (from 0) of 32, `Stage.layer` 3, 7 and 16. See
    `sparsevlm_plan` for what a `budget` means. Positions: "reindex" by default for 1.5 and
    "retain" for 2.0, as in the official code; None takes that default, not the decoder's policy.

    DEVIATIONS: (a) the official code appends the merged tokens behind the kept ones; (b) it takes
    plain means of embeddings, here they are weighted by size, which matters from the second cut
    on; (c) it adds noise in the clustering, here ties go to the lowest index; (d) only the prompt
    can rate; with no word above the mean (all alike) the whole prompt does; (e) in a row with fewer
    real tokens than places, p counts the real ones, but at least as many are clustered as there are
    clusters; (f) D_mn is floored at 0.05, for it can be 0 or negative; (g) the raters, fixed by the
    first layer's input, are computed again at each cut.

    Attributes:
      budget: name of a published schedule; in the one-cut form the tokens behind the cut, merged
        ones included. None for a third of the tokens.
      keep: tokens kept at each cut without the merged ones, counts or fractions of those that
        enter the decoder. Takes the place of `budget`.
      layers: layers whose output is cut, from 0; None for the published ones, at the same part of
        the depth.
      version: "1.5" or "2.0".
      recycle: share of the losers that is clustered (1.5).
      num_heads: heads that count (2.0); all if the decoder has fewer.
      rope_fraction: of the decoder; which channels of queries and keys turn together (2.0).
      entering: visual tokens in front of the first layer, for `flops`; set by `stages`.
    """

    keep: Sequence[Keep] | None = None
    layers: Sequence[int] | None = None
    version: str = "1.5"
    recycle: float = 0.3
    num_heads: int = 14
    rope_fraction: float = 1.0
    entering: int | None = None

    label = "sparsevlm"
    text_guided = True

    def __post_init__(self):
        if self.position_policy is None:
            policy = "retain" if self.version == "2.0" else "reindex"
            object.__setattr__(self, "position_policy", policy)
        super().__post_init__()

    @nn.nowrap
    def check_options(self):
        if self.version not in plan.SCHEDULES:
            raise unknown("compressor.version", str(self.version), plan.SCHEDULES)
        for name in ("keep", "layers"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_tuple(f"compressor.{name}", value))
        for keep in self.keep or ():
            check_keep("compressor.keep", keep)
        check_falling("compressor.keep", self.keep or ())
        cuts = plan.CUTS if self.layers is None else self.layers
        one_cut = self.budget is not None and len(self.keep or ()) == 1
        if self.keep is not None and len(self.keep) != len(cuts) and not one_cut:
            raise UserError(
                f"compressor.keep: {len(self.keep)} numbers for {len(cuts)} cuts",
                allowed="one number for each of compressor.layers, which are three by default",
            )
        positive_int("compressor.num_heads", self.num_heads)
        for name, low in (("recycle", 0), ("rope_fraction", 0)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and low <= value <= 1):
                raise UserError(f"compressor.{name}: {value!r}", allowed="a number from 0 to 1")

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False):
        if self.budget is not None and self.keep is not None:
            raise UserError(
                f"compressor.keep: {self.keep}, and compressor.budget={self.budget} beside it",
                allowed="one of the two: a budget is the name of a schedule",
                fix="leave one of them out",
            )
        if self.layers is None:
            layers = plan.moved_cuts(num_layers)
        else:
            behind = [k + 1 if isinstance(k, int) else k for k in self.layers]
            layers = self.check_layers("compressor.layers", behind, num_layers)
        keep = plan.keeps(self, layers, num_layers, num_tokens)
        counts = plan.counts(keep, num_tokens, self.merged)
        none = (None,) * len(layers)
        kept = [(min(k, n),) for k, n in zip(keep, counts, strict=True)]
        entering = (num_tokens,) * len(layers)
        return self.cuts(
            [layer for layer, _ in layers] if self.layers is None else layers,
            counts,
            num_tokens,
            layers=none,
            keep=kept,
            entering=entering,
        )
