"""tofu: similar units of patches are dropped, then merged, in the encoder (arXiv 2312.01026)."""

import flax.linen as nn

from efficient_vlm import checks
from efficient_vlm.compressors.in_encoder.bipartite import Merge
from efficient_vlm.compressors.in_encoder.tome import ToMe


class ToFu(ToMe):
    """`tofu` (Token Fusion, arXiv 2312.01026): units are dropped in early layers, merged in later
    ones.

    Units are paired as by `tome`. In the first `prune_layers` layers the unit of set A of each of
    the r best pairs is dropped, for layers there answer far from linearly to a mean of two inputs.
    In the others the pair merges, and the merged state keeps the direction of the mean and has the
    length of the longest of its members (MLERP), so that lengths do not shrink from layer to layer.

    Set `r` or `budget`, see `tome`, whose deviations hold here too. Which layers drop is the
    paper's to find for each model; half of them is the default here.

    Attributes:
      prune_layers: layers, from the first one, that drop; None for half of the encoder's.
      drops: of one step; `stages` sets it.
    """

    prune_layers: int | None = None
    drops: bool = False

    label = "tofu"
    internal = ToMe.internal | {"drops"}

    @nn.nowrap
    def check_options(self):
        super().check_options()
        if self.prune_layers is not None:
            checks.whole("compressor.prune_layers", self.prune_layers, 0)

    @nn.nowrap
    def _at(self, layer, num_layers):
        first = num_layers // 2 if self.prune_layers is None else self.prune_layers
        return {"drops": layer < first}

    @nn.nowrap
    def _merge(self, tokens, units, pairs):
        return Merge(tokens, units, pairs, drops=self.drops, keeps_norm=True)
