"""What a step of a published model minimises: the loss of labels, and what a teacher knows."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from efficient_vlm import checks
from efficient_vlm.adapt.build import without_adapters
from efficient_vlm.errors import UserError, short
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.train.distil import KINDS, divergence, divergence_of_top, top_tokens
from efficient_vlm.train.preferred import PreferenceConfig, check_reference, make_preferring
from efficient_vlm.train.step import losses_of

__all__ = ["DistilConfig", "PreferenceConfig", "check_aims", "make_objective"]


@dataclasses.dataclass(frozen=True)
class DistilConfig:
    """Distillation into fewer visual tokens: the teacher is the model that the run starts from,
    with all of them, and shares its weights; or another one with the same tokenizer.

    Attributes:
      kind: "forward_kl", "reverse_kl" or "jensen_shannon", see `distil.divergence`; None for no
        teacher.
      weight: of the divergence, per target token.
      labels: weight of the cross-entropy of the labels beside it.
      temperature: of both distributions.
      beta: of the teacher in the mixture of "jensen_shannon".
      top_k: only the teacher's most likely tokens, and the rest as one; None for all, or with
        `teacher` for 64.
      compressor: of the teacher: name, budget and options.
      teacher: another model, of any family with the same tokenizer: its directory, its name on a
        hub, or in a notebook a loaded model. It reads every row once before training, and what it
        says of the targets is stored, see `teacher.taught_by`. Targets of which it says nothing
        have no divergence: metric "taught" is the share of those that have one. None for the model
        that the run starts from.
    """

    kind: str | None = None
    weight: float = 1.0
    labels: float = 0.0
    temperature: float = 1.0
    beta: float = 0.5
    top_k: int | None = None
    compressor: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "none"})
    teacher: Any = None

    def __post_init__(self):
        if self.kind is not None:
            checks.one_of("distil.kind", self.kind, KINDS)
        checks.number_fields(self, "distil", "weight", "labels", low=0)
        checks.number_fields(self, "distil", "temperature", above=0)
        checks.number_fields(self, "distil", "beta", above=0, below=1)
        checks.whole("distil.top_k", self.top_k, none=True)
        if self.teacher is not None and self.kind is None:
            raise UserError(
                f"distil.teacher: {short(self.teacher)} with distil.kind=None",
                allowed=f"a divergence: {', '.join(KINDS)}",
                fix="distil.kind=forward_kl",
            )


def make_objective(
    model: VisionLanguageModel,
    tuning: Any,
    config: DistilConfig,
    aux: Mapping[str, float],
    preference: PreferenceConfig | None = None,
    apart: bool = False,
) -> Callable:
    """What `step.make_train_step` differentiates: (trained, frozen, inputs, rng) -> (sum, metrics).

    Args:
      model: at one budget and at the size of some pictures.
      tuning: a `published.Tuning`.
      config: of the teacher.
      aux: weights of router losses.
      preference: in place of labels, see `preferred`.
      apart: how pairs lie in batches, see there.
    """
    if preference is not None and preference.name is not None:
        return make_preferring(model, tuning, preference, aux, apart)

    def labelled(trained: Any, frozen: Any, inputs: ModelInputs, rng: jax.Array) -> tuple:
        out = model.apply({"params": tuning.whole(trained, frozen)}, inputs, rng=rng)
        return losses_of(out, inputs, aux)

    if config.kind is None:
        return labelled
    teacher = model.clone(compressor=dict(config.compressor))
    how = dict(kind=config.kind, temperature=config.temperature, beta=config.beta)

    def distilled(trained: Any, frozen: Any, inputs: ModelInputs, rng: jax.Array) -> tuple:
        params = tuning.whole(trained, frozen)
        out = model.apply({"params": params}, inputs, rng=rng)
        total, metrics = losses_of(out, inputs, aux)
        loss, targets = metrics["loss"]
        # What is left of the total are the losses of routers.
        total = total - loss + config.labels * loss
        if config.teacher is not None:
            live = inputs.taught.live & (inputs.labels >= 0)
            pair = divergence_of_top(out.logits, inputs.taught, live, **how)
            told = {"distillation": pair, "taught": (pair[1], targets)}
            return total + config.weight * pair[0], {**metrics, **told}
        # The teacher sees all tokens, so there is no padding to leave out.
        seen = inputs.replace(visual_room=None, uneven=False)
        known = teacher.apply({"params": without_adapters(params)}, seen, rng=rng).logits
        if config.top_k is None:
            pair = divergence(out.logits, known, inputs.labels, **how)
        else:
            most = top_tokens(known, config.top_k, temperature=config.temperature)
            pair = divergence_of_top(out.logits, most, inputs.labels, **how)
        return total + config.weight * pair[0], {**metrics, "distillation": (pair[0], targets)}

    return distilled


def check_aims(
    config: DistilConfig, preference: PreferenceConfig, adapt: Any, pairs: bool | None = None
) -> None:
    """Raises UserError for aims that exclude each other or that these settings cannot reach.

    Args:
      config, preference: what is learnt beside labels, or in their place.
      adapt: an `AdaptConfig`.
      pairs: `data.pairs`; None where rows are what `preference` asks for.
    """
    if config.kind is not None and preference.name is not None:
        raise UserError(
            f"distil.kind: {config.kind} with preference.name={preference.name}",
            allowed="one of both",
            fix="distil.kind=None, or preference.name=None",
        )
    _check_teacher(config, adapt)
    check_reference(preference, adapt, pairs)


def _check_teacher(config: DistilConfig, adapt: Any) -> None:
    """Raises UserError where the model's own weights are no longer there to be the teacher's."""
    if config.kind is not None and config.teacher is None and not adapt.keeps_base:
        raise UserError(
            f"distil.kind: {config.kind} with adapt.name={adapt.name}, adapt.train={adapt.train!r}",
            allowed="adapters alone (their base is the teacher), or another distil.teacher",
            fix="adapt.name=lora, adapt.train=()",
        )
