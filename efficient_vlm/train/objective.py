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
from efficient_vlm.train.distil_features import ATTENTION, HIDDEN
from efficient_vlm.train.features import feature_losses, layers_of
from efficient_vlm.train.losses import ratio
from efficient_vlm.train.preferred import PreferenceConfig, check_reference, make_preferring
from efficient_vlm.train.step import losses_of

__all__ = [
    "DistilConfig",
    "PreferenceConfig",
    "check_aims",
    "check_own_answers",
    "make_objective",
]

# Losses of what is inside, and their fields.
FEATURES = ("hidden", "attention", "relations")


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
      on_policy: share of the steps that learn from answers of the student's own, see
        `inference.on_policy`; 0 for those of the data alone.
      new_tokens: the longest of them.
      hidden, attention, relations: weights, per target token, of losses of what is inside the
        decoder, see `features.feature_losses`; 0 for none.
      hidden_kind: "mse" or "cosine".
      attention_kind: "kl" or "mse".
      layers: whose inside is compared, from 0; -1 is the last.
    """

    kind: str | None = None
    weight: float = 1.0
    labels: float = 0.0
    temperature: float = 1.0
    beta: float = 0.5
    top_k: int | None = None
    compressor: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "none"})
    teacher: Any = None
    on_policy: float = 0.0
    new_tokens: int = 32
    hidden: float = 0.0
    attention: float = 0.0
    relations: float = 0.0
    hidden_kind: str = "mse"
    attention_kind: str = "kl"
    layers: tuple[int, ...] = (-1,)

    def __post_init__(self):
        if self.kind is not None:
            checks.one_of("distil.kind", self.kind, KINDS)
        checks.one_of("distil.hidden_kind", self.hidden_kind, HIDDEN)
        checks.one_of("distil.attention_kind", self.attention_kind, ATTENTION)
        checks.number_fields(self, "distil", "weight", "labels", *FEATURES, low=0)
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.features and not (self.layers and all(type(n) is int for n in self.layers)):
            raise UserError(
                f"distil.layers: {short(self.layers)}",
                allowed="layers of the decoder, such as (-1,) or (3, 7)",
            )
        checks.number_fields(self, "distil", "temperature", above=0)
        checks.number_fields(self, "distil", "on_policy", low=0, high=1)
        checks.number_fields(self, "distil", "new_tokens", low=1)
        checks.number_fields(self, "distil", "beta", above=0, below=1)
        checks.whole("distil.top_k", self.top_k, none=True)
        if self.teacher is not None and self.kind is None:
            raise UserError(
                f"distil.teacher: {short(self.teacher)} with distil.kind=None",
                allowed=f"a divergence: {', '.join(KINDS)}",
                fix="distil.kind=forward_kl",
            )
        if self.on_policy and (self.teacher is not None or not self.teaches):
            raise UserError(
                f"distil.on_policy: {self.on_policy} with distil.kind={self.kind}, "
                f"distil.teacher={short(self.teacher)}",
                allowed="the model itself as teacher: another one has not seen these answers",
                fix="distil.kind=reverse_kl, distil.teacher=None",
            )
        if self.teacher is not None and self.features:
            name, weight = next(iter(self.features.items()))
            raise UserError(
                f"distil.{name}: {weight} with distil.teacher={short(self.teacher)}",
                allowed="0: of another teacher the tokens that it says are stored, not its inside",
                fix=f"distil.{name}=0, or distil.teacher=None for the model itself",
            )

    @property
    def features(self) -> dict[str, float]:
        """Losses of what is inside -> their weights, without those of weight 0."""
        return {name: value for name in FEATURES if (value := getattr(self, name))}

    @property
    def teaches(self) -> bool:
        """Whether there is a teacher."""
        return self.kind is not None or bool(self.features)


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

    if not config.teaches:
        return labelled
    teacher = model.clone(compressor=dict(config.compressor))
    watch = layers_of(config.layers, model.make_decoder().num_layers) if config.features else ()

    def distilled(trained: Any, frozen: Any, inputs: ModelInputs, rng: jax.Array) -> tuple:
        params = tuning.whole(trained, frozen)
        out = model.apply({"params": params}, inputs, rng=rng, watch=watch)
        total, metrics = losses_of(out, inputs, aux)
        loss, targets = metrics["loss"]
        # What is left of the total are the losses of routers.
        total = total - loss + config.labels * loss
        if config.teacher is not None:
            live = inputs.taught.live & (inputs.labels >= 0)
            pair = divergence_of_top(out.logits, inputs.taught, live, **_how(config))
            told = {"distillation": pair, "taught": (pair[1], targets)}
            return total + config.weight * pair[0], {**metrics, **told}
        # The teacher sees all tokens, so there is no padding to leave out.
        seen = inputs.replace(visual_room=None, uneven=False)
        known = teacher.apply({"params": without_adapters(params)}, seen, rng=rng, watch=watch)
        known = jax.lax.stop_gradient(known)
        if config.kind is not None:
            pair = _of_logits(out.logits, known.logits, inputs.labels, config)
            total = total + config.weight * pair[0]
            metrics = {**metrics, "distillation": (pair[0], targets)}
        if config.features:
            kinds = dict(hidden=config.hidden_kind, attends=config.attention_kind)
            given = (out.watched, known.watched, inputs.labels, config.features)
            inside = feature_losses(*given, **kinds)
            for name, weight in config.features.items():
                total = total + weight * targets * ratio(inside[name])
                metrics = {**metrics, f"distillation_{name}": inside[name]}
        return total, metrics

    return distilled


def _of_logits(student: jax.Array, teacher: jax.Array, labels: jax.Array, config: DistilConfig):
    """The divergence of the next tokens, see `distil.divergence`."""
    if config.top_k is None:
        return divergence(student, teacher, labels, **_how(config))
    most = top_tokens(teacher, config.top_k, temperature=config.temperature)
    return divergence_of_top(student, most, labels, **_how(config))


def _how(config: DistilConfig) -> dict[str, Any]:
    return dict(kind=config.kind, temperature=config.temperature, beta=config.beta)


def check_aims(
    config: DistilConfig, preference: PreferenceConfig, adapt: Any, pairs: bool | None = None
) -> None:
    """Raises UserError for aims that exclude each other or that these settings cannot reach.

    Args:
      config, preference: what is learnt beside labels, or in their place.
      adapt: an `AdaptConfig`.
      pairs: `data.pairs`; None where rows are what `preference` asks for.
    """
    if config.teaches and preference.name is not None:
        raise UserError(
            f"distil: a teacher with preference.name={preference.name}",
            allowed="one of both",
            fix="distil.kind=None and no weights of features, or preference.name=None",
        )
    _check_teacher(config, adapt)
    check_reference(preference, adapt, pairs)


def _check_teacher(config: DistilConfig, adapt: Any) -> None:
    """Raises UserError where the model's own weights are no longer there to be the teacher's."""
    if config.teaches and config.teacher is None and not adapt.keeps_base:
        raise UserError(
            f"distil: a teacher with adapt.name={adapt.name}, adapt.train={adapt.train!r}",
            allowed="adapters alone (their base is the teacher), or another distil.teacher",
            fix="adapt.name=lora, adapt.train=()",
        )


def check_own_answers(config: DistilConfig, *, pack: bool, alone: bool) -> None:
    """Raises UserError for `on_policy` with rows or steps that it does not serve.

    Args:
      config: what is learnt.
      pack: `data.pack`.
      alone: whether a step runs on one device and at one budget.
    """
    share = f"distil.on_policy: {config.on_policy}"
    if config.on_policy and pack:
        raise UserError(
            f"{share} with data.pack=True",
            allowed="one sample a row, as each is answered by itself",
            fix="data.pack=False",
        )
    if config.on_policy and not alone:
        raise UserError(
            f"{share} on several devices, or with train.elastic_all",
            allowed="one device, and one budget a step",
            fix="JAX_PLATFORMS and CUDA_VISIBLE_DEVICES choose a device; train.elastic_all=False",
        )
