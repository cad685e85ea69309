"""The inputs and outputs of all compressors, VisualTokens, and how they are updated.

Notation: B images, T current tokens, N patches of the source grid, D channels. All methods keep one
invariant: `source` names the token that holds each patch, `size` the number of patches per token.
"""

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from efficient_vlm.compressors import grids
from efficient_vlm.shapes import Array


@flax.struct.dataclass
class VisualTokens:
    """A batch of visual tokens, real or padding.

    Attributes:
      embed: [B, T, D], any float dtype.
      position: float32 [B, T, 2], (row, column) in patch units of the source grid; the
        size-weighted mean for merged tokens.
      size: float32 [B, T], number of patches that the token represents; 0 for padding.
      mask: bool [B, T], True for real tokens.
      source: int32 [B, N], for each patch the index of the token that holds it; -1 for a patch that
        was dropped or is padding.
      bias: float32 [B, T], added to the attention logits of these tokens as keys, or None.
      penalty: float32 [B, T], what each adds to the loss while a selector is trained, or None.
      uneven: static, whether images of unlike sizes share the grid, each in its upper left corner:
        methods with cells then look at the grid of each image, not at the padded one.
    """

    embed: Float[Array, "B T D"]
    position: Float[Array, "B T 2"]
    size: Float[Array, "B T"]
    mask: Bool[Array, "B T"]
    source: Int[Array, "B N"]
    bias: Float[Array, "B T"] | None = None
    penalty: Float[Array, "B T"] | None = None
    uneven: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def from_grid(
        cls,
        embed: Float[Array, "B T D"],
        grid: grids.Grid,
        source_grid: grids.Grid | None = None,
        mask: Bool[Array, "B T"] | None = None,
        uneven: bool = False,
    ) -> "VisualTokens":
        """Tokens of an encoder that ran on `grid`.

        Args:
          embed: [B, h*w, D] in raster order.
          grid: (h, w).
          source_grid: (H, W) of the image before it was resized, at least `grid`; None if it was
            not resized. A token then covers H*W / (h*w) patches, its position is the mean of these
            weighted by the covered area, and each patch belongs to the token that covers most of
            it.
          mask: bool [B, h*w]; None if all tokens are real.
          uneven: see the class.

        Raises:
          ValueError: shapes that do not match.
        """
        fine, coarse = tuple(source_grid or grid), tuple(grid)
        batch, num_tokens, _ = embed.shape
        if num_tokens != coarse[0] * coarse[1]:
            raise ValueError(f"embed has {num_tokens} tokens, the grid {coarse} another number")
        if fine[0] < coarse[0] or fine[1] < coarse[1]:
            raise ValueError(f"source_grid {fine} is smaller than the grid {coarse}")
        if mask is None:
            mask = jnp.ones((batch, num_tokens), bool)
        centres = []
        for f, c in zip(fine, coarse, strict=True):
            cover = grids.overlap(f, c)
            centres.append(cover @ np.arange(f) / cover.sum(axis=1))
        position = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2)
        covered = fine[0] * fine[1] / num_tokens
        holder = jnp.asarray(grids.holders(fine, coarse))
        held = mask if fine == coarse else mask[:, holder]
        return cls(
            embed=embed,
            position=jnp.broadcast_to(jnp.asarray(position, jnp.float32), (batch, num_tokens, 2)),
            size=jnp.where(mask, jnp.float32(covered), 0.0),
            mask=mask,
            source=jnp.where(held, holder, -1),
            uneven=uneven,
        )

    def log_sizes(self) -> Float[Array, "B T"]:
        """The logarithm of each size, the bias of a key that stands for that many patches.

        0 for padding, whose logarithm of 0 would make gradients NaN although masks hide it, and for
        tokens of less than one patch (cells finer than patches).
        """
        return jnp.log(jnp.maximum(self.size, 1.0))

    def extent(self, grid: grids.Grid) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """Rows and columns of each image, at least 1, where the tokens fill a padded `grid`."""
        mask = self.mask.reshape(-1, *grid)
        sides = []
        for axis, size in enumerate(grid):
            used = jnp.any(mask, axis=2 - axis)
            sides.append(jnp.max(jnp.where(used, jnp.arange(1, size + 1), 1), axis=1))
        return sides[0], sides[1]


_OPTIONAL = ("bias", "penalty")  # Numbers of a token that most tokens do not have.


def zero_padding(tokens: VisualTokens) -> VisualTokens:
    """Zeroes what padding holds, so that not even a NaN reaches a value or a gradient."""
    mask = tokens.mask
    more = {n: jnp.where(mask, x, 0) for n in _OPTIONAL if (x := getattr(tokens, n)) is not None}
    return tokens.replace(
        embed=jnp.where(mask[..., None], tokens.embed, 0),
        position=jnp.where(mask[..., None], tokens.position, 0),
        size=jnp.where(mask, tokens.size, 0),
        **more,
    )


def remap(source: Int[Array, "B N"], holder: Int[Array, "B T"]) -> Int[Array, "B N"]:
    """Updates `source` after one more step.

    Args:
      source: int32 [B, N], patch -> token before the step, -1 for none.
      holder: int32 [B, T], token before -> token after the step, -1 for dropped.

    Returns:
      int32 [B, N], patch -> token after the step.
    """
    after = jnp.take_along_axis(holder, jnp.maximum(source, 0), axis=1)
    return jnp.where(source >= 0, after, -1)


def take(
    tokens: VisualTokens, indices: Int[Array, "B K"], valid: Bool[Array, "B K"]
) -> VisualTokens:
    """Keeps the tokens at `indices` and drops the others.

    Args:
      tokens: T tokens per row.
      indices: int32 [B, K] in any order, distinct where valid.
      valid: bool [B, K]; the other slots become padding (zeros, size 0) at the end.

    Returns:
      K tokens per row in source order, for any order of `indices`.
    """
    num_tokens = tokens.mask.shape[1]
    valid = valid & jnp.take_along_axis(tokens.mask, indices, axis=1)
    # T is larger than every real index: one sort gives source order with padding last.
    return arranged(tokens, jnp.sort(jnp.where(valid, indices, num_tokens), axis=1))


def arranged(tokens: VisualTokens, slots: Int[Array, "B K"]) -> VisualTokens:
    """The tokens at `slots` in this order; distinct real ones, from T on for padding."""
    num_tokens = tokens.mask.shape[1]
    each = {name: getattr(tokens, name) for name in ("embed", "position", "size", *_OPTIONAL)}
    held = slot_of(slots, num_tokens)
    each = {name: at_slots(x, slots) for name, x in each.items() if x is not None}
    return zero_padding(
        VisualTokens(**each, mask=slots < num_tokens, source=remap(tokens.source, held))
    )


def slot_of(slots: Int[Array, "B K"], num_tokens: int) -> Int[Array, "B T"]:
    """For each of T tokens the slot that takes it, -1 for none; see `arranged`."""
    rows = jnp.arange(len(slots))[:, None]
    order = jnp.arange(slots.shape[1], dtype=jnp.int32)
    none = jnp.full((len(slots), num_tokens), -1, jnp.int32)
    return none.at[rows, slots].set(order, mode="drop")


def at_slots(x: Shaped[Array, "B T *C"], slots: Int[Array, "B K"]) -> Shaped[Array, "B K *C"]:
    """x at `slots`; any value where they are beyond the last."""
    index = jnp.minimum(slots, x.shape[1] - 1)
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def weighted_means(
    tokens: VisualTokens, sums: Callable[[jax.Array], jax.Array]
) -> dict[str, Shaped[Array, "B K *C"] | None]:
    """The fields of linearly merged tokens: size-weighted means, summed sizes, mask.

    Args:
      tokens: T tokens per row.
      sums: maps float32 [B, T, C] to [B, K, C], the sums over the members of each new token.

    Returns:
      embed (in the dtype of the input), position, size, mask and bias of the K tokens. A token
      without real members is padding (zeros).
    """
    tokens = zero_padding(tokens)
    weight = tokens.size[..., None]
    total = sums(weight)
    real = total > 0
    divisor = jnp.where(real, total, 1.0)

    def mean(x):
        return jnp.where(real, sums(x.astype(jnp.float32) * weight) / divisor, 0.0)

    bias = tokens.bias
    return {
        "embed": mean(tokens.embed).astype(tokens.embed.dtype),
        "position": mean(tokens.position),
        "size": total[..., 0],
        "mask": real[..., 0],
        "bias": None if bias is None else mean(bias[..., None])[..., 0],
    }


def merge(tokens: VisualTokens, assignment: Int[Array, "B T"], num_out: int) -> VisualTokens:
    """Merges tokens by assignment: size-weighted means of embed and position, sizes summed.

    The sums are one float32 product with a one-hot matrix: differentiable, free of scatters, and
    exact for the sizes.

    Args:
      tokens: T tokens per row.
      assignment: int32 [B, T], the new token of each token, -1 to drop it.
      num_out: K, static. A new token without real members is padding at its own index.
    """
    assignment = jnp.where(tokens.mask, assignment, -1)
    member = jax.nn.one_hot(assignment, num_out, dtype=jnp.float32, axis=1)  # -1 is all zeros.

    def sums(x):
        return jnp.einsum("bkt,btc->bkc", member, x, precision=jax.lax.Precision.HIGHEST)

    return VisualTokens(
        **weighted_means(tokens, sums), source=remap(tokens.source, assignment.astype(jnp.int32))
    )
