"""`vtw`: drops all visual tokens after one layer of the decoder."""

import flax.linen as nn

from efficient_vlm.compressors.in_decoder.base import InDecoder
from efficient_vlm.errors import UserError

DEPTH, LAYER = 32, 15  # as published for LLaVA-1.5-7B


class VisualTokensWithdrawal(InDecoder):
    """`vtw`: drops all visual tokens, of all images, after one layer of the decoder.

    Lin et al., "Boosting multimodal large language models with visual tokens withdrawal", arXiv
    2405.05803 (AAAI 2025), section 3.3: no visual token remains after the K-th layer, when the text
    has absorbed the information it needs. The paper chooses K on a small set as the first layer
    whose withdrawal changes the output distribution (KL divergence) by less than a threshold: 15 of
    32 for LLaVA-1.5-7B. Here K is an option; its choice on data is not part of the module.

    Text keeps its positions ("retain"). With rotary positions this makes no difference, because
    only text remains and all of it shifts together.

    Attributes:
      budget: None or 0.
      layer: K, number of layers before the cut; None for 15/32 of the depth.
    """

    layer: int | None = None
    position_policy: str | None = "retain"

    label = "vtw"
    needs = frozenset()
    min_budget = 0

    @nn.nowrap
    def reachable(self, grid):
        return (0,)

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False):
        if self.budget:
            raise UserError(
                f"compressor.budget: {self.budget}, but vtw drops all visual tokens",
                allowed="0 or None; its cost is set by compressor.layer",
            )
        layers = (
            self.scaled((LAYER,), DEPTH, num_layers)
            if self.layer is None
            else self.check_layers("compressor.layer", (self.layer,), num_layers)
        )
        return self.cuts(layers, (0,), num_tokens, layer=(None,))

    @nn.nowrap
    def knobs(self, num_layers, num_tokens):
        return [{"layer": layer} for layer in range(1, num_layers)]

    @nn.nowrap
    def score_flops(self, num_places, width):
        return 0
