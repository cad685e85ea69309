"""What is evaluated: methods at their budgets, what each is called, whether it has been trained."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from efficient_vlm.compressors.methods import METHODS, OWN_HINT
from efficient_vlm.errors import UserError, short, unknown
from efficient_vlm.models.init import abstract_parameters
from efficient_vlm.models.variants import Setting, setting_of
from efficient_vlm.models.vlm import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is evaluated.

    Attributes:
      images: test images; 0 for all.
      batch_size: images per batch.
      new_tokens: the most tokens of an answer, end token included.
      methods: {"name", "budgets", options of the compressor}; methods with knobs of their own
        (fastv: keep, layer) do without budgets.
      seeds: draws of a random compressor, pooled.
      metric: of answers of a fine-tuned model, see `efficient-vlm metrics`; our own benchmark is
        scored by exact match.
      map_questions: example questions whose token maps go into the report.
    """

    images: int = 256
    batch_size: int = 32
    new_tokens: int = 8
    methods: Sequence[Mapping[str, Any]] = ()
    seeds: int = 3
    metric: str = "exact_match"
    map_questions: int = 4

    def __post_init__(self):
        for name in ("batch_size", "new_tokens", "seeds"):
            if getattr(self, name) < 1:
                raise UserError(f"eval.{name}: {getattr(self, name)}", allowed="1 or more")
        for name in ("images", "map_questions"):
            if getattr(self, name) < 0:
                raise UserError(f"eval.{name}: {getattr(self, name)}", allowed="0 or more")


def settings_of(config: EvalConfig, model: VisionLanguageModel) -> list[VisionLanguageModel]:
    """The model at every (compressor, budget) of `config.methods`; by default its own.

    Raises:
      UserError: an unknown method or option, or a budget that it cannot reach.
    """
    found = []
    for i, method in enumerate(config.methods or [{**model.compressor, "budgets": None}]):
        if not isinstance(method, Mapping):
            raise UserError(f"eval.methods[{i}]: {short(method)}", allowed="name, budgets, options")
        options = dict(method)
        name = options.pop("name", None)
        if name not in METHODS:
            raise unknown(f"eval.methods[{i}].name", str(name), METHODS, hint=OWN_HINT)
        budgets = options.pop("budgets", None) or [options.get("budget")]
        budgets = budgets if isinstance(budgets, list | tuple) else [budgets]
        options.pop("budget", None)
        for budget in budgets:
            found.append(model.with_compressor(name, budget, **options))
            found[-1].make_compressor()  # Wrong options and budgets are told before any work.
    return found


def labels_of(variants: Sequence[VisionLanguageModel]) -> list[Setting]:
    """`setting_of` each, made different where two would be the same by the options that differ.

    `visionzip` and `visionzip` with other options, both at 64 tokens, become for example
    `visionzip` and `visionzip contextual=0`: rows and files of one never overwrite the other's.

    Raises:
      UserError: the same method with the same options twice.
    """
    found = [setting_of(variant) for variant in variants]
    labels = []
    for i, (variant, setting) in enumerate(zip(variants, found, strict=True)):
        others = [v for k, v in enumerate(variants) if k != i and found[k] == setting]
        own = _options(variant)
        for other in map(_options, others):
            if other == own:
                raise UserError(
                    f"eval.methods: {setting[0]} at {setting[1]} twice, with equal options",
                    fix="leave one of the two out, or give them different options",
                )
        different = sorted(k for k in own if any(_options(o).get(k, own) != own[k] for o in others))
        parts = [f"{key}={_spelled(own[key])}" for key in different]
        labels.append((" ".join([setting[0], *parts]), setting[1]))
    return labels


def _options(variant: VisionLanguageModel) -> dict[str, Any]:
    return {key: value for key, value in variant.compressor.items() if key != "name"}


def _spelled(value: Any) -> str:
    """A value without characters that a file name cannot hold: (0.5, 0.25) is 0.5+0.25."""
    if isinstance(value, list | tuple):
        return "+".join(map(_spelled, value))
    return "".join(c if c.isalnum() or c in "._-+" else "_" for c in str(value))


def check_trained(
    variants: Sequence[VisionLanguageModel], given: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises UserError for the first method whose parameters are not all among `given`.

    Args:
      variants: from `settings_of`.
      given: paths and shapes of what is (or will be) trained, from `parameter_shapes`.
    """
    for variant in variants:
        needed = parameter_shapes(abstract_parameters(variant))
        name, budget = setting_of(variant)
        missing = [path for path in needed if path not in given]
        if missing:
            raise UserError(
                f"compressor {short(name)} at {budget}: no trained parameters ({missing[0]}, ...)",
                allowed="methods without parameters, or those of train.elastic",
                fix=f"add dict(name={short(name)}, budget={budget}) to train.elastic and train",
            )
        other = [path for path, shape in needed.items() if given[path] != shape]
        if other:
            raise UserError(
                f"compressor {short(name)} at {budget}: {other[0]} has shape {needed[other[0]]}, "
                f"trained was {given[other[0]]}",
                fix="give the options and budgets that it was trained with",
            )


def parameter_shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
