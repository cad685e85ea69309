"""tome: bipartite merging of similar tokens inside the encoder (arXiv 2210.09461)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from efficient_vlm import checks
from efficient_vlm.compressors import score
from efficient_vlm.compressors.base import Compressor, Stage, as_tuple
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.tokens import VisualTokens, remap, weighted_means, zero_padding
from efficient_vlm.errors import UserError
from efficient_vlm.kernels import ordering
from efficient_vlm.shapes import Array

# Cosines are rounded to this step, so that equal tokens tie for any order of summation.
STEP = 2.0**-16


class ToMe(Compressor):
    """`tome` (Token Merging, arXiv 2210.09461, section 3): removes r tokens in every encoder layer.

    Between attention and feed-forward of a layer, tokens are compared by that layer's keys, mean
    over heads, normalised to length 1. They alternate between sets A (even indices) and B (odd
    ones); CLS counts as index 0, which puts it in A, protected. Each token of A is paired with its
    most similar token of B by cosine, and the r best pairs merge: size-weighted mean, sizes added.
    r is at most half of the patch tokens, (N - protected) // 2. In later layers log(size) is added
    to the attention logits of a key, so that a token of size n counts as n tokens (proportional
    attention, equation 1; the encoder computes it from `VisualTokens.size`).

    Set `r` (the same in each layer, as published) or `budget` (the smallest r that ends at exactly
    `budget`; the last layers merge less). Cosines are rounded to 2^-16, ties go to the lowest
    index.

    Deviations: tokens stay in source order, a merged one at the index of its partner in B; the
    official code lists the unmerged part of A (in score order, or sorted with CLS) before B.
    Attention is invariant to the order, but the alternation of the next layer is not, so pairs
    differ from layer 2 on. In a row with padding only the real tokens alternate, and only as many
    pairs merge as the row has real tokens above the requested count.

    Called as a module it performs one such step, from N to `budget` >= N - N // 2 (or by `r`), with
    `Signals.keys`.

    Attributes:
      r: tokens merged in each layer; None if `budget` is set.
      layers: indices of the layers that merge; None for all.
      proportional: whether log(size) is added to the logits.
      class_token: whether a CLS token precedes the tokens (`stages` sets it).
      head_dim: width of the keys, for `flops` only (CLIP ViT-L: 64).
    """

    budget: int | None = None
    r: int | None = None
    layers: tuple[int, ...] | None = None
    proportional: bool = True
    class_token: bool = False
    head_dim: int = 64

    label = "tome"
    needs = frozenset({"keys"})
    where = "encoder"
    optional_budget = True
    internal = frozenset({"class_token"})

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
    def stages(self, num_layers, num_tokens, *, class_token=False):
        layers = self._layers(num_layers)
        rate = self.r
        if rate is None:
            rate = _rate(num_tokens, len(layers), self.budget)
        stages, tokens = [], num_tokens
        for layer in layers:
            left = max(tokens - min(rate, tokens // 2), self.budget or 1)
            if left == tokens:
                break
            module = self.clone(
                parent=None, budget=left, r=None, layers=None, class_token=class_token
            )
            stages.append(Stage(layer, module, inside=True))
            tokens = left
        return tuple(stages)

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
        match = 2 * (num_tokens // 2) * (num_tokens - num_tokens // 2) * self.head_dim
        # The matrix of merges acts on the embedding, the two coordinates and the size.
        return match + 2 * budget * (num_tokens - budget) * (width + 3)

    @nn.nowrap
    def _target(self, num_tokens: int) -> int:
        if self.budget is not None:
            return self.budget
        return num_tokens - min(self.r, num_tokens // 2)

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        num_tokens = tokens.mask.shape[1]
        budget = self._target(num_tokens)
        self.clone(parent=None, budget=budget, r=None).check_call(tokens, signals, needs_grid=False)
        if budget == num_tokens:
            return tokens
        metric = signals.keys.astype(jnp.float32).mean(axis=2)
        return bipartite_merge(tokens, metric, num_tokens - budget, class_token=self.class_token)


def bipartite_merge(
    tokens: VisualTokens, metric: Float[Array, "B N C"], r: int, *, class_token: bool = False
) -> VisualTokens:
    """Merges r tokens into others (bipartite soft matching, arXiv 2210.09461, section 3).

    Args:
      tokens: N tokens per row.
      metric: [B, N, C], compared by cosine, without gradient.
      r: static, at most N // 2.
      class_token: whether the alternation starts with a protected token that is not in `tokens`.

    Returns:
      N - r tokens per row in source order, padding last. A row with R real tokens merges
      R - (N - r) of them, or none if that is negative.
    """
    batch, num_tokens = tokens.mask.shape
    kept = num_tokens - r
    tokens = zero_padding(tokens)
    # Real tokens first, in source order: indices in this order alternate between the sets.
    order = jnp.argsort(~tokens.mask, axis=1, stable=True)
    real = jnp.sum(tokens.mask, axis=1, keepdims=True, dtype=jnp.int32)
    in_a = int(class_token)  # First index of A; B has the other parity.
    metric = jnp.where(tokens.mask[..., None], jax.lax.stop_gradient(metric), 0)
    unit = score.unit(jnp.take_along_axis(metric, order[..., None], axis=1))
    a, b = unit[:, in_a::2], unit[:, 1 - in_a :: 2]
    a_index = in_a + 2 * jnp.arange(a.shape[1], dtype=jnp.int32)
    b_index = 1 - in_a + 2 * jnp.arange(b.shape[1], dtype=jnp.int32)

    cosine = jnp.einsum("bxc,byc->bxy", a, b, precision=jax.lax.Precision.HIGHEST)
    cosine = jnp.round(cosine / STEP) * STEP  # Small negative ones become -0.0.
    cosine = ordering.comparable(cosine, (b_index < real)[:, None, :])
    partner = jnp.argmax(cosine, axis=2)
    _, pairs = ordering.top_k(jnp.max(cosine, axis=2), r, a_index < real)
    live = jnp.arange(r)[None, :] < real - kept  # Never more pairs than real tokens in A.
    moved = a_index[pairs]
    target = b_index[jnp.take_along_axis(partner, pairs, axis=1)]

    rows = jnp.arange(batch)[:, None]
    dropped = jnp.where(live, moved, num_tokens)  # Out of range: no effect.
    gone = jnp.zeros((batch, num_tokens), bool).at[rows, dropped].set(True, mode="drop")
    slot = jnp.cumsum(~gone, axis=1, dtype=jnp.int32) - 1
    new = jnp.take_along_axis(slot, target, axis=1)
    assignment = slot.at[rows, dropped].set(new, mode="drop")
    holder = jnp.zeros_like(assignment).at[rows, order].set(assignment)

    survivors = jnp.argsort(gone, axis=1, stable=True)[:, :kept]
    stay = jnp.take_along_axis(order, survivors, axis=1)[..., None]
    come = jnp.take_along_axis(order, moved, axis=1)[..., None]
    joins = jax.nn.one_hot(jnp.where(live, new, -1), kept, dtype=jnp.float32, axis=1)

    def sums(x):
        # A kept x r matrix instead of kept x N: the other tokens are only gathered.
        added = jnp.take_along_axis(x, come, axis=1)
        added = jnp.einsum("bkr,brc->bkc", joins, added, precision=jax.lax.Precision.HIGHEST)
        return jnp.take_along_axis(x, stay, axis=1) + added

    holder = jnp.where(tokens.mask, holder, -1)
    return VisualTokens(**weighted_means(tokens, sums), source=remap(tokens.source, holder))


def _smallest(num_tokens: int, num_layers: int) -> int:
    """Fewest tokens after `num_layers` halvings."""
    return -(-num_tokens // 2**num_layers)


def _rate(num_tokens: int, num_layers: int, budget: int) -> int:
    """The smallest r with which `num_layers` layers reach `budget` tokens."""
    smallest = _smallest(num_tokens, num_layers)
    if not smallest <= budget <= num_tokens:
        raise UserError(
            f"compressor.budget: tome cannot give {budget} of {num_tokens} tokens "
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
