"""The loss of several budgets at every step: that of each, in one program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import Output, VisionLanguageModel
from efficient_vlm.train.arms import Arm
from efficient_vlm.train.step import losses_of

__all__ = ["mean_of", "of_all", "outputs"]


def of_all(
    arms: Sequence[Arm],
    models: Sequence[VisionLanguageModel],
    aux: Mapping[str, float],
    whole: Callable[[Any, Any], Any] = lambda params, frozen: params,
) -> Callable:
    """What `step.make_train_step` differentiates: the mean of the losses by the arms' weights.

    Matryoshka Multimodal Models (arXiv 2405.17430, section 3) train so, with equal weights.

    Args:
      arms: (compressor, budget) pairs.
      models: of the arms, at one size of pictures, in the form for training.
      aux: weights of the other losses.
      whole: from what is trained and what is frozen to the parameters of the models.
    """

    def objective(params: Any, frozen: Any, inputs: ModelInputs, rng: jax.Array) -> tuple:
        out = outputs(models, whole(params, frozen), inputs, rng)
        return mean_of(arms, [losses_of(each, inputs, aux) for each in out])

    return objective


def outputs(
    models: Sequence[VisionLanguageModel], params: Any, inputs: ModelInputs, rng: jax.Array
) -> list[Output]:
    """The forward pass of each model; the encoder runs once where all look at pictures alike."""
    encoded = None
    if inputs.pictures is not None and _encode_alike(models):
        encoded = models[0].apply({"params": params}, inputs.pictures, method="encode")
    return [m.apply({"params": params}, inputs, rng=rng, encoded=encoded) for m in models]


def mean_of(
    arms: Sequence[Arm], parts: Sequence[tuple[jax.Array, dict[str, Any]]]
) -> tuple[jax.Array, dict[str, Any]]:
    """The mean of losses and of their metrics, by the arms' weights, and the loss of each arm."""
    total, metrics = 0.0, {}
    whole = sum(arm.weight for arm in arms)
    for arm, (loss, found) in zip(arms, parts, strict=True):
        share = arm.weight / whole
        total = total + share * loss
        for name, (value, count) in found.items():
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = before[0] + share * value, before[1] + share * count
    each = {f"loss_{arm.label}": found["loss"] for arm, (_, found) in zip(arms, parts, strict=True)}
    return total, {**metrics, **each}


def _encode_alike(models: Sequence[VisionLanguageModel]) -> bool:
    """Whether all compressors get the same tokens and signals."""
    methods = [model.make_compressor() for model in models]
    plain = all(not m.in_encoder and not m.intermediates() for m in methods)
    return plain and all(m.image_grid(models[0].slot_grid) == models[0].slot_grid for m in methods)
