"""encoder_exit: the encoder ends early, the baseline of every method that saves inside it."""

import flax.linen as nn

from efficient_vlm import checks
from efficient_vlm.compressors.base import Compressor, Stage
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.errors import UserError


class EncoderExit(Compressor):
    """`encoder_exit`: all patches leave the encoder behind `layer` layers, through its last norm.

    The baseline of savings inside the encoder, beside a smaller picture (`downsample`): no patch is
    lost, the layers behind `layer` are. Features of layers that do not run are those of the last
    that does. The decoder gets all tokens. Called as a module it changes nothing.

    Attributes:
      budget: None, or the number of patches.
      layer: layers that run.
    """

    budget: int | None = None
    layer: int = 2

    label = "encoder_exit"
    where = "encoder"
    optional_budget = True
    whole_grid = True
    ends_encoder = True

    @nn.nowrap
    def check_options(self):
        checks.whole("compressor.layer", self.layer)

    @nn.nowrap
    def reachable(self, grid):
        return (grid[0] * grid[1],)

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False, **units):
        if self.layer >= num_layers:
            raise UserError(
                f"compressor.layer: {self.layer}, but the encoder has {num_layers} layers",
                allowed=f"1 to {num_layers - 1}: behind the last one nothing is saved",
            )
        return (Stage(self.layer, self.clone(parent=None, budget=num_tokens)),)

    @nn.nowrap
    def knobs(self, num_layers, num_tokens):
        return [{"layer": layer} for layer in range(1, num_layers)]

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        if self.budget is not None:
            self.check_call(tokens, signals, needs_grid=False)
        return tokens
