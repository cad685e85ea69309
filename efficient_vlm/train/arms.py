"""The (compressor, budget) pairs that training steps are drawn from: elastic training."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efficient_vlm.compressors.methods import find
from efficient_vlm.errors import UserError
from efficient_vlm.fields import construct, section
from efficient_vlm.models.variants import setting_of
from efficient_vlm.models.vlm import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class Arm:
    """One (compressor, budget) that steps are drawn from, or several that share every step.

    Attributes:
      model: at that budget; of several, at the first.
      weight: of the draw; of the loss, where they share a step.
      start: see `TrainConfig.elastic`.
      together: those that share every step; () for one alone.
    """

    model: VisionLanguageModel
    weight: float = 1.0
    start: float = 0.0
    together: tuple["Arm", ...] = ()

    @property
    def trained(self) -> VisionLanguageModel:
        """The model as a step runs it."""
        return self.model.in_training()

    @property
    def label(self) -> str:
        """name@budget; of several, joined by +."""
        if self.together:
            return "+".join(arm.label for arm in self.together)
        return f"{self.model.compressor['name']}@{self.budget}"

    @property
    def budget(self) -> int:
        """Visual tokens; for a method without a budget the mean over the decoder's layers."""
        return setting_of(self.model)[1]


def make_model(config: Mapping[str, Any], vocab_size: int) -> VisionLanguageModel:
    """The model of a config's "model" section."""
    fields = section(config, "model")
    return construct(VisionLanguageModel, fields, "model", vocab_size=vocab_size)


def make_arms(model: VisionLanguageModel, elastic: Sequence[Mapping[str, Any]]) -> list[Arm]:
    """The (compressor, budget) pairs to train at; see `TrainConfig.elastic`."""
    if not elastic:
        return [Arm(model)]
    arms = []
    for i, entry in enumerate(elastic):
        options = dict(entry)
        for name in ("name", "budget"):
            optional = name == "budget" and find(options["name"]).optional_budget
            if name not in options and not optional:
                raise UserError(f"train.elastic[{i}].{name}: missing", fix="set it in the config")
        weight = options.pop("weight", 1.0)
        if isinstance(weight, str) or not weight > 0:
            raise UserError(f"train.elastic[{i}].weight: {weight}", allowed="above 0")
        start = options.pop("start", 0.0)
        if isinstance(start, str) or not 0 <= start < 1:
            raise UserError(f"train.elastic[{i}].start: {start}", allowed="0 up to below 1")
        arms.append(Arm(model.with_compressor(**options), float(weight), float(start)))
    if all(arm.start > 0 for arm in arms):
        raise UserError(
            "train.elastic: no entry starts at 0", fix="leave out start for one of them"
        )
    return arms


def joined(arms: Sequence[Arm], settings: Any) -> list[Arm]:
    """The arms as steps are drawn from them: one of all, where all share every step.

    Args:
      arms: of `make_arms`.
      settings: a `TrainConfig`.

    Raises:
      UserError: an entry that is to start later.
    """
    if not settings.elastic_all or len(arms) == 1:
        return list(arms)
    if any(arm.start > 0 for arm in arms):
        raise UserError(
            "train.elastic: an entry has a start, but with train.elastic_all every step has all",
            fix="leave out start, or set train.elastic_all=False",
        )
    return [Arm(arms[0].model, together=tuple(arms))]


def draw_arm(arms: Sequence[Arm], seed: int, step: int, steps: int) -> int:
    """The index of the arm of a step: a function of its arguments, so a resumed run draws alike."""
    weights = np.array([arm.weight if step > arm.start * steps else 0.0 for arm in arms])
    return int(np.random.default_rng((seed, step)).choice(len(arms), p=weights / weights.sum()))
