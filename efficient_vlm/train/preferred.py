"""What a step of a published model minimises on pairs of answers: preferences, with pictures."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float32

from efficient_vlm import checks
from efficient_vlm.adapt.build import without_adapters
from efficient_vlm.errors import UserError
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import Output, VisionLanguageModel
from efficient_vlm.shapes import Array
from efficient_vlm.train.losses import ratio
from efficient_vlm.train.preference import dpo, simpo, token_log_probs

__all__ = ["PreferenceConfig", "answers_of", "check_reference", "make_preferring"]

_BETAS = {"dpo": 0.1, "simpo": 2.0}


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Learning from pairs of answers, of which one is preferred (`data.pairs`).

    Attributes:
      name: "dpo", see `preference.dpo`: the reference is the model that the run starts from, and
        shares its weights; "simpo", see `preference.simpo`: none; None for no preferences.
      beta: scale of log-probabilities in the loss; None for 0.1 ("dpo") or 2.0 ("simpo").
      gamma: margin that "simpo" asks for.
      label_smoothing: how often the rejected answer is the better one ("dpo").
      labels: weight of the cross-entropy of the chosen answer beside it, in nats per token, as in
        arXiv 2404.19733, equation 1.
    """

    name: str | None = None
    beta: float | None = None
    gamma: float = 1.0
    label_smoothing: float = 0.0
    labels: float = 0.0

    def __post_init__(self):
        if self.name is not None:
            checks.one_of("preference.name", self.name, tuple(_BETAS))
        checks.number_fields(self, "preference", "beta", above=0)
        checks.number_fields(self, "preference", "gamma", "labels", low=0)
        checks.number_fields(self, "preference", "label_smoothing", low=0, below=0.5)

    @property
    def scale(self) -> float:
        """`beta`, or what it is by default."""
        return _BETAS[self.name] if self.beta is None else self.beta


def make_preferring(
    model: VisionLanguageModel,
    tuning: Any,
    config: PreferenceConfig,
    aux: Mapping[str, float],
    apart: bool,
) -> Callable:
    """As `objective.make_objective`, on batches of pairs (`ChatPipeline` with `pairs`).

    Args:
      model, tuning, aux: see there.
      config: of the preferences.
      apart: whether the conversations of a pair have two rows after another; else they follow each
        other in one.

    Returns:
      An objective whose metrics are "loss", "accuracy" and "margin" of `preference.dpo`, per pair,
      and "chosen_loss", the cross-entropy of a chosen answer per token, in nats.
    """

    def preferring(trained: Any, frozen: Any, inputs: ModelInputs, rng: jax.Array) -> tuple:
        params = tuning.whole(trained, frozen)
        out: Output = model.apply({"params": params}, inputs, rng=rng)
        sums, tokens = answers_of(out.logits, inputs, apart)
        live = (tokens > 0).all(axis=1)
        if config.name == "dpo":
            known = model.apply({"params": without_adapters(params)}, inputs, rng=rng).logits
            reference = jax.lax.stop_gradient(answers_of(known, inputs, apart)[0])
            given = (sums[:, 0], sums[:, 1], reference[:, 0], reference[:, 1])
            how = dict(beta=config.scale, label_smoothing=config.label_smoothing)
            metrics = dpo(*given, **how, live=live)
        else:
            (won, lost), (long, short) = sums.T, tokens.T
            how = dict(beta=config.scale, gamma=config.gamma)
            metrics = simpo((won, long), (lost, short), **how, live=live)
        total, pairs = metrics["loss"]
        written = jnp.where(live, -sums[:, 0] / jnp.maximum(tokens[:, 0], 1), 0).sum()
        total += config.labels * written
        for name, weight in aux.items():
            if name in out.stats:
                total += weight * pairs * ratio(out.stats[name]).mean()
        return total, {**metrics, "chosen_loss": (written, pairs), **out.stats}

    return preferring


def answers_of(
    logits: jax.Array, inputs: ModelInputs, apart: bool
) -> tuple[Float32[Array, "P 2"], Float32[Array, "P 2"]]:
    """Log-probability of both answers of each pair in nats, and how many tokens they have.

    Args:
      logits: [R, S, vocab].
      inputs: with labels, R rows.
      apart: see `make_preferring`.

    Returns:
      The chosen answer first; P is as many pairs as there may be, 0 tokens for those that are not
      there.
    """
    values = token_log_probs(logits, inputs.labels)
    live = (inputs.labels >= 0).astype(jnp.float32)
    if apart:
        return values.sum(-1).reshape(-1, 2), live.sum(-1).reshape(-1, 2)
    # A conversation has two tokens or more, so a pair has four.
    most = 2 * (values.shape[1] // 4)

    def of_row(values, segments):
        return jax.ops.segment_sum(values, jnp.maximum(segments - 1, 0), most)

    # Segments count from 1; padding has no labels, so it adds nothing.
    sums, tokens = (jax.vmap(of_row)(each, inputs.segments) for each in (values, live))
    return sums.reshape(-1, 2), tokens.reshape(-1, 2)


def check_reference(config: PreferenceConfig, adapt: Any, pairs: bool | None = None) -> None:
    """Raises UserError for preferences that these settings of a run cannot learn.

    Args:
      config: of the preferences.
      adapt: an `AdaptConfig`.
      pairs: `data.pairs`; None where rows are what the config asks for.
    """
    if config.name == "dpo" and not adapt.keeps_base:
        raise UserError(
            f"preference.name: dpo with adapt.name={adapt.name}, adapt.train={adapt.train!r}",
            allowed="adapters alone (their base is the reference), or preference.name=simpo",
            fix="adapt.name=lora, adapt.train=(); a full fine-tune would need a second copy",
        )
    if pairs is not None and pairs != (config.name is not None):
        raise UserError(
            f"preference.name: {config.name} with data.pairs={pairs}",
            allowed="pairs of answers for preferences, and for nothing else",
            fix=f"data.pairs={not pairs}",
        )
