"""Learning from rewards of sampled answers (GRPO): questions -> answers -> rewards -> a step.

A step of a run on a policy's own samples:

    asked = repeated(questions, k)                      # K rows for each question
    out = generate(model, params, asked, sampling=...)  # whatever samples
    rewards = exact_match(out.tokens, out.lengths, wanted) - price * tokens
    state, metrics = step(state, rollouts(asked, out.tokens, out.lengths, rewards))
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Float, Float32, Int

from efficient_vlm.errors import UserError
from efficient_vlm.models.inputs import NO_LABEL, ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.attention import PADDING_SEGMENT, SHARED_SEGMENT
from efficient_vlm.shapes import Array
from efficient_vlm.train.preference import group_advantages, grpo, token_log_probs
from efficient_vlm.train.step import make_train_step

__all__ = ["Rollouts", "exact_match", "make_grpo_step", "repeated", "rollouts"]


@struct.dataclass
class Rollouts:
    """Sampled answers and what they were worth.

    Attributes:
      inputs: a prompt and its answer in each row, with labels; R rows.
      advantages: float32 [R].
      sampled: float32 [R, S], log-probability of each label under the policy that drew it; None
        where that is the policy which is trained, as in the first step on a batch.
    """

    inputs: ModelInputs
    advantages: Float32[Array, " R"]
    sampled: Float32[Array, "R S"] | None = None


def repeated(questions: ModelInputs, times: int) -> ModelInputs:
    """Prompts, one a row, each `times` after another, about the same pictures; NumPy.

    Raises:
      UserError: several conversations in a row.
    """
    if questions.questions > 1:
        raise UserError(
            f"inputs: {questions.questions} questions packed in a row, but each is answered alone",
            fix="inputs.unpacked()",
        )
    text = questions.replace(pictures=None)
    text = jax.tree.map(lambda x: np.repeat(np.asarray(x), times, axis=0), text)
    return text.replace(pictures=questions.pictures)


def exact_match(
    tokens: Int[np.ndarray, "*rows N"],
    lengths: Int[np.ndarray, "*rows"],
    wanted: Int[np.ndarray, "*rows M"],
    wanted_lengths: Int[np.ndarray, "*rows"],
) -> Float32[np.ndarray, "*rows"]:
    """1 for answers that have the ids that are wanted and then end, else 0.

    Args:
      tokens: of answers, see `inference.generate.Generated`.
      lengths: of each answer without its end token; one of N tokens has not ended.
      wanted: ids of the right answers.
      wanted_lengths: of each.
    """
    most = min(tokens.shape[-1], wanted.shape[-1])
    behind = np.arange(most) >= wanted_lengths[..., None]
    same = ((tokens[..., :most] == wanted[..., :most]) | behind).all(-1)
    same &= (lengths == wanted_lengths) & (lengths < tokens.shape[-1])
    return same.astype(np.float32)


def rollouts(
    asked: ModelInputs,
    tokens: Int[np.ndarray, "R N"],
    lengths: Int[np.ndarray, " R"],
    rewards: Float[np.ndarray, "G K"],
    log_probs: Float[np.ndarray, "R N"] | None = None,
) -> Rollouts:
    """A batch of answers behind their prompts; NumPy.

    Args:
      asked: the prompts (`repeated`): R = G*K rows, the K of a group after another.
      tokens: of the answers, their end token included.
      lengths: of each answer without its end token.
      rewards: of each answer.
      log_probs: of `tokens`, under the policy that drew them.

    Raises:
      UserError: another number of answers or rewards than prompts.
    """
    rows, size = np.shape(asked.text)
    if np.shape(tokens)[0] != rows or np.size(rewards) != rows:
        raise UserError(
            f"rollouts: {np.shape(tokens)[0]} answers and {np.size(rewards)} rewards of {rows} "
            "prompts",
            fix="give one of each for every row",
        )
    start, count = np.asarray(asked.lengths), np.minimum(np.add(lengths, 1), np.shape(tokens)[1])
    count = np.where(start > 0, count, 0)  # Empty rows are not answered.
    width = size + np.shape(tokens)[1] - 1  # The last token is only ever predicted.
    text, segments, prompt = (np.zeros((rows, width), kind) for kind in (np.int32, np.int32, bool))
    text[:, :size], prompt[:, :size] = asked.text, np.arange(size) < start[:, None]
    place = np.arange(width)
    segments[:] = np.where(place < (start + count - 1)[:, None], SHARED_SEGMENT, PADDING_SEGMENT)
    labels = np.full((rows, width), NO_LABEL, np.int32)
    sampled = None if log_probs is None else np.zeros((rows, width), np.float32)
    for number in range(np.shape(tokens)[1]):
        row = np.flatnonzero(number < count)
        labels[row, start[row] + number - 1] = tokens[row, number]
        if sampled is not None:
            sampled[row, start[row] + number - 1] = log_probs[row, number]
        row = np.flatnonzero(number < count - 1)
        text[row, start[row] + number] = tokens[row, number]
    placement = asked.placement
    if placement is not None:
        placement = _longer(placement, start, width)
    inputs = asked.replace(
        text=text, segments=segments, prompt=prompt, labels=labels, placement=placement
    )
    advantages = np.asarray(group_advantages(rewards)).reshape(-1)
    return Rollouts(inputs, advantages, sampled)


def _longer(placement: Any, start: np.ndarray, width: int) -> Any:
    """Places of prompts with the text of answers behind it."""
    behind = np.arange(width) - start[:, None]

    def longer(values: Any, following: Any) -> np.ndarray:
        values = np.asarray(values)
        padded = np.zeros((len(values), width, *values.shape[2:]), values.dtype)
        padded[:, : values.shape[1]] = values
        shape = (*behind.shape, *(1,) * (values.ndim - 2))
        more = np.reshape(behind + np.asarray(following)[:, None], shape)
        return np.where(behind.reshape(shape) < 0, padded, more).astype(values.dtype)

    return placement.replace(
        text_index=longer(placement.text_index, placement.next_index),
        text_position=longer(placement.text_position, placement.next_position),
        text_block=longer(placement.text_block, np.asarray(placement.next_index) * 0)
        * (behind < 0),
    )


def make_grpo_step(
    model: VisionLanguageModel,
    tx: optax.GradientTransformation,
    *,
    reference: Any = None,
    clip: float = 0.2,
    beta: float = 0.04,
    **options: Any,
) -> Callable[[Any, Rollouts], tuple[Any, dict[str, jax.Array]]]:
    """A jitted step(state, `Rollouts`) -> (state, metrics); see `step.make_train_step`.

    Args:
      model: at the budget that the answers were drawn at.
      tx: the optimizer.
      reference: parameters that the policy is to stay near, of the same structure; None for no KL.
      clip, beta: of `preference.grpo`.
      **options: of `make_train_step`.

    Returns:
      The step; metrics are those of `preference.grpo` and of the optimizer.
    """

    def objective(params: Any, reference: Any, drawn: Rollouts, rng: jax.Array) -> tuple:
        def log_probs(params):
            out = model.apply({"params": params}, drawn.inputs, rng=rng)
            return token_log_probs(out.logits, drawn.inputs.labels), out.stats

        now, stats = log_probs(params)
        sampled = jax.lax.stop_gradient(now) if drawn.sampled is None else drawn.sampled
        known = None if reference is None else log_probs(reference)[0]
        labels = jnp.asarray(drawn.inputs.labels)
        given = dict(reference=known, clip=clip, beta=beta)
        metrics = grpo(now, sampled, drawn.advantages, labels, **given)
        return metrics["loss"][0], {**metrics, **stats}

    return make_train_step(model, tx, objective=objective, frozen=reference, **options)
