"""ipcv: patches sit out most layers of the encoder, and are back in front of the projector."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from efficient_vlm import checks
from efficient_vlm.compressors import grids, select
from efficient_vlm.compressors.base import Stage
from efficient_vlm.compressors.in_encoder.unit_cut import UnitCut, exact_share
from efficient_vlm.compressors.in_encoder.unit_scores import SCORES
from efficient_vlm.compressors.tokens import VisualTokens, at_slots, slot_of
from efficient_vlm.errors import UserError
from efficient_vlm.kernels import ordering
from efficient_vlm.shapes import Array

_PUBLISHED = 0.35


class IPCV(UnitCut):
    """`ipcv`: prune inside the vision encoder, restore before the decoder (arXiv 2512.18747).

    Behind `layer` layers the patches that the last of these changed most, |h_l - h_(l-1)|, stay,
    and the others sit out the rest. In front of the projector each of those is put back as its
    state when it left, plus the mean change since then of its `nearest` neighbours (by L2 distance
    at that moment) among the patches that stayed. In the first `stabilised` layers behind the cut
    the absent patches still give keys and values, from states put back in the same way ("attention
    stabilisation"). So the whole grid reaches the projector, whatever blocks it reads, and the
    decoder gets all tokens: only the encoder saves.

    Features of several layers are put back each from the change up to that layer. Rows with padding
    keep the same share of their own patches, rounded up; they put back as alone.

    Called as a module it performs the cut only.

    Attributes:
      budget: patches that stay; None for `keep`.
      keep: share of the patches that stay, instead of a budget; None for the published .35.
      layer: layers in front of the cut (published: 3 for Qwen2-VL, 7 for InternVL).
      stabilised: layers behind it in which absent patches give keys and values (published: 7 and
        3).
      nearest: neighbours that say how an absent patch changes.
    """

    keep: float | None = None
    layer: int = 3
    stabilised: int = 7
    nearest: int = 10

    label = "ipcv"
    needs = frozenset({"attention_row"})
    whole_grid = True
    observes = {"attention_row": "change"}

    @nn.nowrap
    def check_options(self):
        checks.whole("compressor.layer", self.layer)
        checks.whole("compressor.stabilised", self.stabilised, 0)
        checks.whole("compressor.nearest", self.nearest)
        if self.keep is not None and self.budget is not None:
            raise UserError(
                f"compressor.keep: {self.keep} with compressor.budget={self.budget}",
                allowed="one of the two: a share of the patches, or a number of them",
            )
        checks.number("compressor.keep", self.keep, above=0, below=1, none=True)

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False, patches=None, side=1):
        if self.layer >= num_layers:
            raise UserError(
                f"compressor.layer: {self.layer}, but the encoder has {num_layers} layers",
                allowed=f"1 to {num_layers - 1}: behind the last one nothing is saved",
            )
        share, budget = self._step(num_tokens)
        if budget == num_tokens:
            return ()
        step = dict(patches=tuple(patches or grids.resolve(self.grid, num_tokens)), share=share)
        step |= dict(budget=budget, keep=None)
        return (Stage(self.layer, self.clone(parent=None, **step)),)

    @nn.nowrap
    def _step(self, num_tokens: int) -> tuple[tuple[int, int] | None, int]:
        """The share of its own patches that a row keeps, or None, and the number in all."""
        if self.budget is not None:
            if self.budget > num_tokens:
                raise UserError(
                    f"compressor.budget: {self.budget} of {num_tokens} patches",
                    allowed=f"1 to {num_tokens}",
                )
            return None, self.budget
        exact = exact_share(_PUBLISHED if self.keep is None else self.keep)
        share = exact.numerator, exact.denominator
        return share, -(-num_tokens * share[0] // share[1])

    @nn.nowrap
    def knobs(self, num_layers, num_tokens):
        return [{"budget": budget, "keep": None} for budget in range(1, num_tokens + 1)]

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        """FLOPs of the distances between all patches and those that stay."""
        return 2 * num_tokens * self._step(num_tokens)[1] * width

    @nn.nowrap
    def whole_flops(self, num_tokens: int, width: int) -> int:
        """FLOPs of `Absent.whole`, for one image: as many as of the distances."""
        return self.flops(num_tokens, width)

    @nn.nowrap
    def alone(self, num_tokens):
        share, budget = self._step(num_tokens)
        return dict(budget=budget, keep=None, share=share)

    @nn.nowrap
    def choose(self, seen, kept):
        return select.top_k(SCORES["change"][1](seen), seen.live, kept, self.limit(seen, kept))

    @nn.nowrap
    def absent(self, tokens: VisualTokens, slots: Int[Array, "B K"]) -> "Absent":
        """What the patches that leave are put back from.

        Args:
          tokens: N patches in front of the cut.
          slots: of `self.slots`.
        """
        num_tokens, kept = tokens.mask.shape[1], slots.shape[1]
        x = jax.lax.stop_gradient(tokens.embed.astype(jnp.float32))
        near = at_slots(x, slots)
        product = jnp.einsum("bnd,bkd->bnk", x, near, precision=jax.lax.Precision.HIGHEST)
        # The length of the patch itself does not change the order of its neighbours.
        score = 2 * product - jnp.sum(near**2, axis=-1)[:, None]
        real = (slots < num_tokens)[:, None]
        value, index = ordering.top_k(score, min(self.nearest, kept), real)
        found = value > -jnp.inf
        each = found / jnp.maximum(found.sum(axis=-1, keepdims=True), 1)
        rows = jnp.arange(len(slots))[:, None, None]
        place = (rows, jnp.arange(num_tokens)[:, None], index)
        weights = jnp.zeros(score.shape, jnp.float32).at[place].add(each)
        return Absent(tokens, slots, slot_of(slots, num_tokens), weights)


@flax.struct.dataclass
class Absent:
    """The patches in front of a cut, and which of those that stay tell how the others change.

    Attributes:
      tokens: N patches in front of the cut.
      slots: int32 [B, K], the patches that stay, from N on for padding.
      held: int32 [B, N], the slot of each patch; -1 for one that left.
      weights: float32 [B, N, K], of the slots whose mean change is that of a patch.
    """

    tokens: VisualTokens
    slots: Int[Array, "B K"]
    held: Int[Array, "B N"]
    weights: Float[Array, "B N K"]

    def whole(self, x: Float[Array, "B K D"]) -> Float[Array, "B N D"]:
        """All patches, from the states now of those that stayed."""
        before = self.tokens.embed
        change = (x - at_slots(before, self.slots)).astype(jnp.float32)
        change = jnp.where((self.slots < before.shape[1])[..., None], change, 0)
        mean = jnp.einsum("bnk,bkd->bnd", self.weights, change, precision=jax.lax.Precision.HIGHEST)
        own = at_slots(x, jnp.maximum(self.held, 0))
        return jnp.where((self.held >= 0)[..., None], own, before + mean.astype(before.dtype))
