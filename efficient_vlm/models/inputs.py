"""`ModelInputs`: everything that a forward pass reads, in training, parity and generation alike."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from efficient_vlm.errors import UserError
from efficient_vlm.models.image_inputs import NO_PICTURES, Layout, Pictures, check_shape
from efficient_vlm.models.prompt_layout import Placement
from efficient_vlm.models.taught import TopTokens
from efficient_vlm.nn.attention import PADDING_SEGMENT, SHARED_SEGMENT
from efficient_vlm.shapes import Array

__all__ = ["NO_LABEL", "NO_PICTURES", "Layout", "ModelInputs", "Pictures"]

NO_LABEL = -1


@struct.dataclass
class ModelInputs:
    """A batch of R rows of text, and the pictures that they are about.

    A row is one conversation, or several about the same pictures packed behind one copy of their
    tokens: each then sees the pictures, what all share, and itself. Pictures have B rows; where R
    is a multiple of B, text rows r*R/B to (r+1)*R/B - 1 are about picture row r. Or a row holds
    several conversations about pictures of their own (`Placement.visual_segment`, with `questions`
    1): each sees its pictures and itself.

    NumPy arrays in it must not be written before the result of a jitted call has been read: on a
    CPU, JAX may read them after the call has returned.

    Attributes:
      text: int32 [R, S], text tokens; visual tokens have no place among them.
      segments: int32 [R, S], -1 for padding, 0 for text that everything sees, 1 and above for that
        of one of several conversations.
      pictures: see `Pictures`; None for text alone.
      placement: where tokens stand, see `Placement`; None for pictures in front of all text.
      prompt: bool [R, S], text in front of the first answer, which alone may choose visual tokens;
        None for all of it.
      labels: int32 [R, S], the token that each place is to predict, -1 for none; None outside of
        training.
      taught: [R, S, K] and [R, S], what another teacher says of what each place is to predict, see
        `TopTokens`; None without one.
      penalty_scale: float32 [], what the weight of `VisualTokens.penalty` in the loss is multiplied
        by at this step of a run (`train.penalty_ramp`); None for 1.
      questions: static, the most conversations of a row, Q.
      longest: static, the most tokens that one conversation sees of its row; None for S.
      uneven: static, whether rows have different numbers of visual tokens, so that methods inside
        the decoder leave room for what the shorter ones keep; without it such a row may keep less
        than alone where a schedule gives it more than a full row (`in_decoder.base.InDecoder`).
      visual_room: static, the most visual tokens of a row that are real once they are compressed:
        those of padding are left out in front of the decoder. None where there is little padding.
    """

    text: Int[Array, "R S"]
    segments: Int[Array, "R S"]
    pictures: Pictures | None = None
    placement: Placement | None = None
    prompt: Bool[Array, "R S"] | None = None
    labels: Int[Array, "R S"] | None = None
    taught: TopTokens | None = None
    penalty_scale: Float[Array, ""] | None = None
    questions: int = struct.field(pytree_node=False, default=1)
    longest: int | None = struct.field(pytree_node=False, default=None)
    uneven: bool = struct.field(pytree_node=False, default=False)
    visual_room: int | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def of_rows(cls, text: Any, lengths: Any, **fields: Any) -> "ModelInputs":
        """One conversation a row, padded on the right.

        Args:
          text: int32 [R, S], NumPy.
          lengths: int32 [R], tokens that are not padding; 0 for an empty row.
          **fields: others of this class.
        """
        live = np.arange(np.shape(text)[1]) < np.asarray(lengths)[:, None]
        segments = np.where(live, SHARED_SEGMENT, PADDING_SEGMENT).astype(np.int32)
        return cls(text=np.asarray(text, np.int32), segments=segments, **fields)

    @property
    def live(self) -> Bool[Array, "R S"]:
        """bool [R, S], places that hold a token."""
        return self.segments != PADDING_SEGMENT

    @property
    def lengths(self) -> Int[Array, " R"]:
        """int [R], tokens of each row."""
        return self.live.sum(axis=1)

    @property
    def picture_rows(self) -> int:
        """B; R without pictures."""
        rows = self.text if self.pictures is None else self.pictures.mask
        return np.shape(rows)[0]

    def row(self, number: int) -> "ModelInputs":
        """One row of text alone, with the pictures that it is about."""
        about = number // (len(self.text) // self.picture_rows)
        pictures = jax.tree.map(lambda x: x[about : about + 1], self.pictures)
        own = jax.tree.map(lambda x: x[number : number + 1], self.replace(pictures=None))
        return own.replace(pictures=pictures)

    def check(self, layout: Layout | None = None) -> None:
        """Raises UserError for arrays that do not belong together.

        Args:
          layout: of the pictures in the model, see `VisionLanguageModel.layout`: with it, their
            tokens are counted as well.
        """
        shape = np.shape(self.text)
        if len(shape) != 2:
            raise UserError(
                f"inputs.text: shape {shape}",
                allowed="[rows, tokens]",
                fix="tokens[None] for one row",
            )
        for name in ("segments", "prompt", "labels"):
            check_shape(name, getattr(self, name), shape)
        if self.questions > 1 and self.longest is None:
            raise UserError(
                f"inputs.longest: None, with questions={self.questions} in a row",
                allowed=f"the tokens of the longest conversation, up to {shape[1]}",
                fix="pack rows by processing.batch",
            )
        if self.pictures is not None:
            self.pictures.check()
            if shape[0] % self.picture_rows:
                raise UserError(
                    f"inputs: {shape[0]} rows of text about {self.picture_rows} of pictures",
                    allowed="a multiple of the rows of pictures",
                    fix="give each row of pictures the same number of rows of text",
                )
        if self.placement is not None:
            self._check_placement(shape, layout)

    def _check_placement(self, shape: tuple[int, int], layout: Layout | None) -> None:
        place = self.placement
        slots = np.shape(place.visual_index)[1]
        if layout is not None and slots != layout.images * layout.rows * layout.columns:
            raise UserError(
                f"inputs.placement.visual_index: {slots} slots, the model makes "
                f"{layout.images} x {layout.rows} x {layout.columns} tokens of these pictures",
                allowed="a slot for each token that pictures have before compression",
                fix="place prompts with the model at the size of the pictures (`Request.model`)",
            )
        axes = np.shape(place.text_position)[2:]
        for part, size in (("text", shape[1]), ("visual", slots)):
            for name, more in (("index", ()), ("position", axes), ("block", ())):
                name = f"{part}_{name}"
                check_shape(f"placement.{name}", getattr(place, name), (shape[0], size, *more))
        for name in ("next_index", "next_position"):
            check_shape(f"placement.{name}", getattr(place, name), shape[:1])

    # --- what a forward pass asks for ------------------------------------------------------------

    def kept(self) -> Bool[Array, "R Q S"]:
        """bool [R, Q, S], what each conversation has of its row."""
        if self.questions == 1:
            return self.live[:, None]
        number = 1 + jnp.arange(self.questions)[:, None]
        segments = self.segments[:, None]
        return (segments == number) | (segments == SHARED_SEGMENT)

    def prompts(self) -> Bool[Array, "R Q S"]:
        """bool [R, Q, S], the prompt of each conversation."""
        return self.kept() if self.prompt is None else self.kept() & self.prompt[:, None]

    def asked(self) -> Bool[Array, "R Q"]:
        """bool [R, Q], conversations that have a prompt of their own."""
        prompts = self.prompts()
        if self.questions > 1:
            prompts = prompts & (self.segments != SHARED_SEGMENT)[:, None]
        return prompts.any(axis=2)

    def places(self) -> Int[Array, "R S"]:
        """int [R, S], the place of each token in its conversation, from 0."""
        if self.questions == 1:
            return jnp.broadcast_to(jnp.arange(self.text.shape[1]), self.text.shape)
        kept = self.kept()
        before = jnp.cumsum(kept, axis=2) - kept
        return jnp.take_along_axis(before, self._question()[:, None], axis=1)[:, 0]

    def _question(self) -> Int[Array, "R S"]:
        """int [R, S], the conversation of each token from 0; 0 also for padding and shared text."""
        return jnp.maximum(self.segments - 1, 0)

    def judges(self) -> Bool[Array, "R S"]:
        """bool [R, S], text that methods inside the decoder may ask about visual tokens."""
        prompt = self.live if self.prompt is None else self.live & self.prompt
        if self.placement is None or not self.placement.visual_index.shape[1]:
            return prompt
        # Text in front of a picture has not seen it: only what is behind all of them may judge.
        last = self.placement.visual_index.max(axis=1, keepdims=True)
        behind = prompt & (self.placement.text_index > last)
        return jnp.where(behind.any(axis=1, keepdims=True), behind, prompt)

    def unpacked(self) -> "ModelInputs":
        """One conversation a row, R*Q rows of `longest` tokens."""
        if self.questions == 1:
            return self
        rows, size = self.text.shape[0] * self.questions, self.longest
        kept = self.kept().reshape(rows, -1)
        order = jnp.argsort(~kept, axis=1, stable=True)[:, :size]
        live = jnp.take_along_axis(kept, order, axis=1)

        def spread(x):
            return jnp.repeat(x, self.questions, axis=0)

        def text(x, padding=0):
            x = spread(x)
            index = order.reshape(*order.shape, *(1,) * (x.ndim - 2))
            x = jnp.take_along_axis(x, index, axis=1)
            return jnp.where(live.reshape(*live.shape, *(1,) * (x.ndim - 2)), x, padding)

        placement = self.placement
        if placement is not None:
            placement = jax.tree.map(spread, placement).replace(
                **{
                    name: text(getattr(placement, name))
                    for name in ("text_index", "text_position", "text_block")
                }
            )
        return self.replace(
            text=text(self.text),
            segments=text(self.segments, PADDING_SEGMENT),
            placement=placement,
            prompt=None if self.prompt is None else text(self.prompt, False),
            labels=None if self.labels is None else text(self.labels, NO_LABEL),
            questions=1,
            longest=None,
        )

    def packed_again(self, x: Float[Array, "RQ L D"]) -> Float[Array, "R S D"]:
        """[R*Q, longest, D] of the rows of `unpacked` -> [R, S, D], in the places of this.

        Text that several conversations share is taken from the first.
        """
        if self.questions == 1:
            return x
        rows, size = self.text.shape
        x = x.reshape(rows, -1, x.shape[-1])
        index = self._question() * self.longest + self.places()
        return jnp.take_along_axis(x, index[..., None], axis=1)
