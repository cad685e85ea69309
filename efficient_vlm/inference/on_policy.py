"""Distillation on the student's own answers: a step draws them before it learns from them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.families.processor import Processor
from efficient_vlm.inference.generate import generate
from efficient_vlm.inference.sampling import Sampling
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.attention import PADDING_SEGMENT, SHARED_SEGMENT
from efficient_vlm.processing.gather import fitted
from efficient_vlm.train.objective import DistilConfig
from efficient_vlm.train.rewards import rollouts
from efficient_vlm.train.setup import Setup

__all__ = ["OnPolicy", "prompts_of", "with_draws"]


class OnPolicy:
    """A training step that now and then answers the questions of its batch itself.

    Generalised knowledge distillation (arXiv 2306.13649, algorithm 1): at a share of the steps the
    answers of the data are replaced by those that the student samples at temperature 1, and the
    teacher says at each of their tokens what it would have said. No gradient goes through the
    draws. Which steps, and what they draw, follows from the seed and the number of the step.

    Args:
      step: (state, inputs) -> (state, metrics).
      model: the student, of any picture size.
      whole: from the parameters in a state to those of the model.
      processor: of the model.
      config: with `on_policy` and `new_tokens`.
      seed: of the draws.
    """

    def __init__(
        self,
        step: Callable[[Any, ModelInputs], tuple],
        model: VisionLanguageModel,
        whole: Callable[[Any], Any],
        processor: Processor,
        config: DistilConfig,
        seed: int,
    ):
        self._step, self._model, self._whole = step, model, whole
        self._processor, self._config, self._seed = processor, config, seed

    def __call__(self, state: Any, inputs: ModelInputs) -> tuple:
        rng = np.random.default_rng((self._seed, int(state["step"])))
        own = rng.random() < self._config.on_policy
        if own:
            inputs = self._answered(state, inputs, rng)
        state, metrics = self._step(state, inputs)
        return state, {**metrics, "on_policy": np.float32(own)}

    def _answered(self, state: Any, inputs: ModelInputs, rng: np.random.Generator) -> ModelInputs:
        asked, rows = prompts_of(inputs), len(inputs.text)
        seeds = rng.integers(2**32, size=rows, dtype=np.uint32)
        out = generate(
            fitted(self._model, asked.pictures, self._processor.family.variable),
            self._whole(state["params"]),
            asked,
            new_tokens=self._config.new_tokens,
            eos_id=self._processor.tokenizer.eos_ids or (-1,),
            rng=jax.random.key(int(seeds[0])),
            sampling=Sampling(temperature=np.ones(rows, np.float32), seed=seeds),
        )
        answers = out.tokens.reshape(rows, -1), out.lengths.reshape(-1)
        return rollouts(asked, *answers, np.zeros((rows, 1))).inputs

    def _cache_size(self) -> int:
        return self._step._cache_size()


def with_draws(setup: Setup, config: DistilConfig) -> Setup:
    """A run whose steps learn from answers of the student's own, where its config says so."""
    if not config.on_policy:
        return setup
    given = (setup.whole, setup.processor, config, setup.settings.seed)
    pairs = zip(setup.programs, setup.arms, strict=True)
    return setup._replace(programs=[OnPolicy(step, arm.model, *given) for step, arm in pairs])


def prompts_of(inputs: ModelInputs) -> ModelInputs:
    """What stands in front of the first answer of each row; NumPy.

    Args:
      inputs: with labels, one conversation a row.

    Raises:
      UserError: several conversations in a row, or a picture behind the first answer.
    """
    segments, labels = np.asarray(inputs.segments), np.asarray(inputs.labels)
    if (segments > 1).any():
        raise UserError(
            f"distil.on_policy: {int(segments.max())} conversations in a row",
            allowed="one, as each is answered by itself",
            fix="data.pack=False, and one conversation for each row of the data",
        )
    # A label stands at the token in front of the one that is to be predicted.
    answered = (labels >= 0).any(axis=1)
    count = np.where(answered, (labels >= 0).argmax(axis=1) + 1, 0)
    live = np.arange(segments.shape[1]) < count[:, None]
    placement = inputs.placement
    if placement is not None:
        placement = _ended(placement, count)
    return inputs.replace(
        text=np.where(live, inputs.text, 0).astype(np.int32),
        segments=np.where(live, SHARED_SEGMENT, PADDING_SEGMENT).astype(np.int32),
        prompt=live,
        labels=None,
        placement=placement,
    )


def _ended(placement: Any, count: np.ndarray) -> Any:
    """The placement of prompts of `count` tokens of text."""
    rows, last = np.arange(len(count)), np.maximum(count - 1, 0)
    after = np.asarray(placement.text_index)[rows, last] + 1
    pictures = np.asarray(placement.visual_index)
    late = (pictures > after[:, None]).any(axis=1) & (count > 0)
    if late.any():
        raise UserError(
            "distil.on_policy: a picture behind the first answer of a conversation",
            allowed="conversations whose pictures stand in front of it",
            fix="one turn for each row of the data",
        )
    position = np.asarray(placement.text_position)[rows, last]
    position = position.reshape(len(count), -1).max(axis=1) + 1
    return placement.replace(next_index=after, next_position=position, visual_segment=None)
