"""What a student with few visual tokens learns from what its teacher has inside."""

from collections.abc import Collection, Mapping

import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from efficient_vlm.compressors import VisualTokens
from efficient_vlm.errors import UserError
from efficient_vlm.models.watched import Watched
from efficient_vlm.shapes import Array
from efficient_vlm.train.distil import Pair
from efficient_vlm.train.distil_features import attention, for_student, hidden_states, relations

__all__ = ["feature_losses", "layers_of"]


def layers_of(layers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Layers from 0, where -1 is the last of `count`.

    Raises:
      UserError: a layer that is not there.
    """
    for layer in layers:
        if not -count <= layer < count:
            raise UserError(
                f"distil.layers: {layer} of a decoder of {count} layers",
                allowed=f"-{count} to {count - 1}",
                fix="distil.layers=(-1,) for the last",
            )
    return tuple(sorted({layer % count for layer in layers}))


def feature_losses(
    student: Mapping[int, Watched],
    teacher: Mapping[int, Watched],
    labels: Int[Array, "R S"],
    wanted: Collection[str],
    *,
    hidden: str = "mse",
    attends: str = "kl",
) -> dict[str, Pair]:
    """Losses of what both have inside, means over the watched layers.

    Args:
      student, teacher: of the same rows and layers; their visual tokens may be others.
      labels: the token that each place is to predict, -1 for none: where text is compared.
      wanted: of the losses below, those to compute.
      hidden, attends: kinds of `distil_features.hidden_states` and `attention`.

    Returns:
      "hidden" (text), "attention" (of text to the visual tokens that both still see) and
      "relations" (between the student's visual tokens), each (sum, denominator).

    Raises:
      UserError: visual tokens over two grids, for "attention" and "relations".
    """
    found: dict[str, Pair] = {}
    for layer, ours in student.items():
        theirs = teacher[layer]
        each = {}
        if "hidden" in wanted:
            each["hidden"] = hidden_states(ours.text, theirs.text, labels, kind=hidden)
        if "attention" in wanted or "relations" in wanted:
            each |= _of_visual(ours, theirs, labels, attends)
        for name, (total, number) in each.items():
            before = found.get(name, (0.0, 0.0))
            found[name] = before[0] + total, before[1] + number
    return {name: found[name] for name in wanted}


def _of_visual(ours: Watched, theirs: Watched, labels: Array, attends: str) -> dict[str, Pair]:
    """The losses "attention" and "relations" of one layer."""
    held, count = _held(ours.visual, theirs.visual), ours.visual.mask.shape[1]
    looks = jnp.moveaxis(_of_slots(theirs.visual, theirs.attention, shared=True), 2, 1)
    looks = jnp.moveaxis(for_student(looks, held, count, mean=False), 1, 2)
    tokens = for_student(_of_slots(theirs.visual, theirs.visual.embed), held, count)
    both = ours.visual.mask & (held[:, None] == jnp.arange(count)[:, None]).any(-1)
    # Of tokens that stand for nothing the teacher says nothing.
    own = jnp.where(both[:, None], ours.attention, 0)
    sees = (labels >= 0) & (looks.sum(-1) > 0) & (own.sum(-1) > 0)
    return {
        "attention": attention(own[:, None], looks[:, None], sees, kind=attends),
        "relations": relations(ours.visual.embed, tokens, both),
    }


def _held(student: VisualTokens, teacher: VisualTokens) -> Int[Array, "R N"]:
    """Which of the student's tokens holds each slot of the grid; -1 where either has none."""
    if student.source.shape != teacher.source.shape:
        raise UserError(
            f"distil: visual tokens over {student.source.shape[1]} slots of the student, "
            f"{teacher.source.shape[1]} of the teacher",
            fix="set distil.attention=0 and distil.relations=0, or cut behind the encoder",
        )
    return jnp.where(teacher.source >= 0, student.source, -1)


def _of_slots(
    teacher: VisualTokens, values: Float[Array, "R _ _"], shared: bool = False
) -> Float32[Array, "R _ _"]:
    """Values of tokens as values of the slots that they hold.

    Args:
      values: [R, T, D]; with `shared` [R, S, T], and the slots of a token share its value.

    Returns:
      [R, N, D], or [R, S, N].
    """
    index = jnp.maximum(teacher.source, 0)
    if not shared:
        return jnp.take_along_axis(values.astype(jnp.float32), index[..., None], axis=1)
    sizes = (teacher.source[:, None] == jnp.arange(teacher.mask.shape[1])[:, None]).sum(-1)
    values = values / jnp.maximum(sizes, 1)[:, None]
    return jnp.take_along_axis(values, index[:, None], axis=2)
