"""tome: bipartite merging of similar units of patches in the encoder (arXiv 2210.09461)."""

import math

import flax.linen as nn
import jax.numpy as jnp

from efficient_vlm import checks
from efficient_vlm.compressors.base import Stage, as_tuple
from efficient_vlm.compressors.in_encoder.bipartite import Merge, pair
from efficient_vlm.compressors.in_encoder.unit_cut import UnitMethod
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.units import units_of_grid
from efficient_vlm.errors import UserError


class ToMe(UnitMethod):
    """`tome` (Token Merging, arXiv 2210.09461, section 3): removes r units in every encoder layer.

    Where a projector reads blocks of patches, whole blocks merge, patch by patch at their places;
    elsewhere a unit is one patch, a token of the paper.

    Between attention and feed-forward of a layer, units are compared by that layer's keys, mean
    over heads and patches, normalised to length 1. They alternate between sets A (even indices) and
    B (odd ones); CLS counts as index 0, which puts it in A, protected. Each unit of A is paired
    with its most similar one of B by cosine, and the r best pairs merge: size-weighted mean, sizes
    added. r is at most half of the units, (N - protected) // 2. In later layers log(size) is added
    to the attention logits of a key, so that a token of size n counts as n tokens (proportional
    attention, equation 1; the encoder computes it from `VisualTokens.size`). In an encoder with
    windows a merged patch attends in the window of its mean position.

    Set `r` (the same in each layer, as published) or `budget` (the smallest r that ends at exactly
    `budget`; the last layers merge less). Cosines are rounded to 2^-16, ties go to the lowest
    index.

    Deviations: units stay in source order, a merged one at the index of its partner in B; the
    official code lists the unmerged part of A (in score order, or sorted with CLS) before B.
    Attention is invariant to the order, but the alternation of the next layer is not, so pairs
    differ from layer 2 on. In a row with padding only the real units alternate: by `r` as many
    pairs merge as alone, by `budget` as many as the row has units above the requested count.

    Called as a module it performs one such step, from N to `budget` >= N - N // 2 (or by `r`), with
    `Signals.keys`.

    Attributes:
      r: units merged in each layer; None if `budget` is set.
      layers: indices of the layers that merge; None for all.
      proportional: whether log(size) is added to the logits.
      class_token: whether a CLS token precedes the tokens (`stages` sets it).
      head_dim: width of the keys, for `flops` only (CLIP ViT-L: 64).
      every: of one step, whether rows with padding merge as alone; `stages` sets it.
    """

    r: int | None = None
    layers: tuple[int, ...] | None = None
    proportional: bool = True
    class_token: bool = False
    head_dim: int = 64
    every: bool = False

    label = "tome"
    needs = frozenset({"keys"})
    internal = UnitMethod.internal | {"class_token", "every"}

    def __post_init__(self):
        if self.layers is not None:
            object.__setattr__(self, "layers", as_tuple("compressor.layers", self.layers))
        super().__post_init__()

    @nn.nowrap
    def check_options(self):
        if (self.r is None) == (self.budget is None):
            raise UserError(
                f"compressor.r: {self.r} with compressor.budget={self.budget}",
                allowed="one of the two: r tokens per layer, or a budget after the last layer",
                fix="for example compressor.r=23 compressor.budget=None",
            )
        if self.r is not None:
            checks.whole("compressor.r", self.r)
        checks.flag("compressor.proportional", self.proportional)
        checks.whole("compressor.head_dim", self.head_dim)
        for layer in self.layers or ():
            checks.whole("compressor.layers", layer, 0)

    @nn.nowrap
    def reachable(self, grid):
        """The budgets of one step, which merges at most half of the tokens."""
        num_tokens = grid[0] * grid[1]
        return tuple(range(num_tokens, num_tokens - num_tokens // 2 - 1, -1))

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False, patches=None, side=1):
        layers, patches = self._layers(num_layers), tuple(patches or (1, num_tokens))
        units = len(units_of_grid(patches, side).places)
        rate = _rate(self.label, units, len(layers), self.budget) if self.r is None else self.r
        common = dict(r=None, layers=None, every=self.r is not None, class_token=class_token)
        common |= dict(side=side, patches=patches)
        stages = []
        for layer in layers:
            left = max(units - min(rate, units // 2), self.budget or 1)
            if left == units:
                break
            step = dict(budget=left * side**2, order="units" if stages else "raster")
            module = self.clone(parent=None, **common, **step, **self._at(layer, num_layers))
            stages.append(Stage(layer, module, inside=True))
            units = left
        return tuple(stages)

    @nn.nowrap
    def _at(self, layer: int, num_layers: int) -> dict[str, int]:
        """Options of the step in one layer."""
        del layer, num_layers
        return {}

    @nn.nowrap
    def knobs(self, num_layers, num_tokens):
        smallest = _smallest(num_tokens, len(self._layers(num_layers)))
        return [{"budget": b, "r": None} for b in range(smallest, num_tokens + 1)]

    @nn.nowrap
    def _layers(self, num_layers: int) -> tuple[int, ...]:
        layers = range(num_layers) if self.layers is None else sorted(set(self.layers))
        if layers and layers[-1] >= num_layers:
            raise UserError(
                f"compressor.layers: {layers[-1]}, but the encoder has {num_layers} layers",
                allowed=f"0 to {num_layers - 1}",
            )
        return tuple(layers)

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        """FLOPs of one step, with keys of width `head_dim`."""
        budget = self._target(num_tokens)
        if budget == num_tokens:
            return 0
        units, kept = num_tokens // self.side**2, budget // self.side**2
        match = 2 * (units // 2) * (units - units // 2) * self.head_dim
        # The matrix of merges acts on the embedding, the two coordinates and the size.
        return match + 2 * kept * (units - kept) * self.side**2 * (width + 3)

    @nn.nowrap
    def _target(self, num_tokens: int) -> int:
        if self.budget is not None:
            return self.budget
        return num_tokens - min(self.r, num_tokens // 2)

    @nn.nowrap
    def reduced(self, tokens, signals):
        units = self.units(tokens.mask.shape[1])
        metric = units.mean(signals.keys.astype(jnp.float32).mean(axis=2), tokens.mask)
        left = len(units.places) - self._target(tokens.mask.shape[1]) // self.side**2
        real = units.real(tokens.mask).any(axis=2)
        options = dict(every=self.every, class_token=self.class_token)
        merge = self._merge(tokens, units, pair(metric, real, left, **options))
        return merge(), merge.features

    @nn.nowrap
    def _merge(self, tokens, units, pairs) -> Merge:
        return Merge(tokens, units, pairs)

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        num_tokens = tokens.mask.shape[1]
        budget = self._target(num_tokens)
        step = self.clone(parent=None, budget=budget, r=None, every=self.r is not None)
        step.check_call(tokens, signals, needs_grid=False)
        if budget == num_tokens:
            return tokens
        if step.patches is None:
            step = step.clone(patches=(1, num_tokens))
        return step.reduced(tokens, signals)[0]


def _smallest(num_tokens: int, num_layers: int) -> int:
    """Fewest tokens after `num_layers` halvings."""
    return -(-num_tokens // 2**num_layers)


def _rate(label: str, num_tokens: int, num_layers: int, budget: int) -> int:
    """The smallest r with which `num_layers` layers reach `budget` tokens."""
    smallest = _smallest(num_tokens, num_layers)
    if not smallest <= budget <= num_tokens:
        raise UserError(
            f"compressor.budget: {label} cannot give {budget} of {num_tokens} tokens "
            f"in {num_layers} layers",
            allowed=f"{smallest} to {num_tokens}: each layer merges at most half of the tokens",
            fix=f"compressor.budget={max(smallest, min(budget, num_tokens))}",
        )
    rate = math.ceil((num_tokens - budget) / num_layers)
    while True:
        left = num_tokens
        for _ in range(num_layers):
            left -= min(rate, left // 2)
        if left <= budget:
            return rate
        rate += 1
