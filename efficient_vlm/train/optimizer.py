"""Optimizers from a config: schedules, parameter groups by path, freezing, decay masks."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from efficient_vlm.checks import number_fields, one_of
from efficient_vlm.errors import UserError, short, unknown
from efficient_vlm.fields import construct
from efficient_vlm.sharding import is_box, logical_axes, path_of
from efficient_vlm.train.adam8bit import scale_by_adam8bit

OPTIMIZERS = ("adamw", "muon")
MOMENTS = ("float32", "int8")

# Axes along which a parameter is a stack of independent matrices.
_STACKED = ("layers", "experts")
# Axes of tables, which are looked up row by row: they are not matrices to orthogonalise.
_TABLES = ("vocab", "rows", "columns", "queries", "position")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
      name: "muon" (matrices by Muon, all else by Adam; Nesterov momentum in both) or "adamw".
      learning_rate: peak, of the matrices with Muon.
      adam_learning_rate: peak for parameters that Adam updates beside Muon; None: `learning_rate`.
      schedule: "cosine" (to 0), "linear" (to 0), "wsd" (constant, then linear to 0; arXiv
        2404.06395) or "constant", after a linear warm-up.
      decay_steps: steps that "cosine" and "linear" take to reach 0; None for the whole run. With
        more steps than the run has, its last rate is above 0.
      decay_fraction: share of the run that the decay of "wsd" takes.
      warmup_steps: length of the warm-up.
      warmup_fraction: the same as a share of the run, in place of `warmup_steps`.
      weight_decay: decoupled, times the learning rate; only for matrices (and stacks of them).
      clip_norm: largest global norm of the gradient; None for no clipping.
      b1, b2: moments of AdamW.
      moments: how AdamW stores them: "float32", or "int8" (`adam8bit`: 2 bytes a parameter, not 8).
      groups: parameter groups, first match wins: {"pattern": regular expression found in the path,
        "scale": factor on the learning rate, "freeze": True for no update and no optimizer state}.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    adam_learning_rate: float | None = None
    schedule: str = "cosine"
    decay_steps: int | None = None
    decay_fraction: float = 0.4
    warmup_steps: int = 100
    warmup_fraction: float | None = None
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.99
    moments: str = "float32"
    groups: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self):
        where, rates = "train.optimizer", ("learning_rate", "adam_learning_rate")
        number_fields(self, where, *rates, "warmup_steps", "weight_decay", low=0)
        number_fields(self, where, "decay_steps", low=1)
        number_fields(self, where, "warmup_fraction", low=0, below=1)
        number_fields(self, where, "decay_fraction", above=0, high=1)
        number_fields(self, where, "clip_norm", above=0)
        number_fields(self, where, "b1", "b2", low=0, below=1)
        one_of(f"{where}.moments", self.moments, MOMENTS)
        if self.moments != "float32" and self.name != "adamw":
            raise UserError(
                f"{where}.moments: {self.moments} with name={short(self.name)}",
                allowed="float32, or any with name=adamw",
                fix=f"{where}.name=adamw",
            )


@dataclasses.dataclass(frozen=True)
class Group:
    """One entry of `OptimizerConfig.groups`."""

    pattern: str
    scale: float = 1.0
    freeze: bool = False

    def __post_init__(self):
        number_fields(self, "train.optimizer.groups", "scale", low=0)


def schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """The learning rate at each step of a run of `steps`."""
    share = config.warmup_fraction
    warmup = config.warmup_steps if share is None else round(share * steps)
    warmup = min(warmup, max(steps - 1, 0))
    rest = max(steps - warmup, 1)
    span = max((config.decay_steps or steps) - warmup, 1)
    decay = min(rest, max(1, round(steps * config.decay_fraction)))
    shapes = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, span),
        "linear": lambda: optax.linear_schedule(peak, 0.0, span),
        "wsd": lambda: optax.linear_schedule(peak, 0.0, decay, transition_begin=rest - decay),
        "constant": lambda: optax.constant_schedule(peak),
    }
    if config.schedule not in shapes:
        raise unknown("train.optimizer.schedule", config.schedule, shapes)
    warm = optax.linear_schedule(0.0, peak, max(warmup, 1))
    return optax.join_schedules([warm, shapes[config.schedule]()], [warmup])


def make_optimizer(
    config: OptimizerConfig, steps: int, boxed_params: Any
) -> optax.GradientTransformation:
    """Builds the optimizer for parameters that still carry their logical axes.

    Args:
      config: the settings.
      steps: optimizer steps of the whole run, for the schedule.
      boxed_params: parameters (or their shapes) as `model.init` gives them, with logical axes.

    Raises:
      UserError: unknown names, or a group that matches no parameter.
    """
    paths = jax.tree_util.tree_flatten_with_path(boxed_params, is_leaf=is_box)[0]
    axes = {path_of(path): logical_axes(leaf) for path, leaf in paths}
    groups = [
        construct(Group, group, f"train.optimizer.groups[{i}]")
        for i, group in enumerate(config.groups)
    ]
    labels = _labels(groups, axes)

    transforms = {"freeze": optax.set_to_zero()}
    for label, scale in {"default": 1.0, **{str(i): g.scale for i, g in enumerate(groups)}}.items():
        transforms[label] = _update(config, steps, scale, axes)
    tx = optax.partition(transforms, lambda params: _by_path(params, labels))
    before = []
    if any(group.freeze for group in groups):
        # Before clipping: gradients of frozen parameters must not count in the norm.
        zero = {"freeze": optax.set_to_zero(), "train": optax.identity()}
        kinds = {path: "freeze" if name == "freeze" else "train" for path, name in labels.items()}
        before.append(optax.partition(zero, lambda params: _by_path(params, kinds)))
    if config.clip_norm is not None:
        before.append(optax.clip_by_global_norm(config.clip_norm))
    return optax.chain(*before, tx) if before else tx


def _update(config, steps, scale, axes) -> optax.GradientTransformation:
    rate = schedule(config, steps, config.learning_rate * scale)

    def decay_mask(params):
        return _by_path(params, {path: _matrix(names) is not None for path, names in axes.items()})

    if config.name == "adamw":
        moments = optax.scale_by_adam if config.moments == "float32" else scale_by_adam8bit
        return optax.chain(
            moments(b1=config.b1, b2=config.b2),
            optax.add_decayed_weights(config.weight_decay, decay_mask),
            optax.scale_by_learning_rate(rate),
        )
    if config.name != "muon":
        raise unknown("train.optimizer.name", config.name, OPTIMIZERS)
    peak = config.learning_rate if config.adam_learning_rate is None else config.adam_learning_rate
    return optax.contrib.muon(
        rate,
        weight_decay=config.weight_decay,
        adam_learning_rate=schedule(config, steps, peak * scale),
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=lambda params: _by_path(
            params, {path: _matrix(names) for path, names in axes.items()}
        ),
    )


def _matrix(names: tuple[str | None, ...]) -> Any:
    """The input and output axes of a parameter that is a matrix; None for other parameters."""
    inner = [i for i, name in enumerate(names) if name not in _STACKED]
    if len(inner) < 2 or any(name in _TABLES for name in names):
        return None
    # (heads, head_dim, out) has two input axes; a plain matrix may call its one input "heads".
    contracted = 2 if len(inner) > 2 and names[inner[0]] in ("heads", "kv_heads") else 1
    return optax.contrib.MuonDimensionNumbers(tuple(inner[:contracted]), tuple(inner[contracted:]))


def _labels(groups: Sequence[Group], axes: Mapping[str, Any]) -> dict[str, str]:
    labels, used = {}, set()
    for path in axes:
        labels[path] = "default"
        for i, group in enumerate(groups):
            if _pattern(group.pattern, i).search(path):
                labels[path] = "freeze" if group.freeze else str(i)
                used.add(i)
                break
    for i, group in enumerate(groups):
        if i not in used:
            raise UserError(
                f"train.optimizer.groups[{i}].pattern: {short(group.pattern)} matches no parameter",
                allowed=f"parts of paths such as {', '.join(sorted(axes)[:3])}",
            )
    return labels


def _pattern(text: str, number: int) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(
            f"train.optimizer.groups[{number}].pattern: {short(text)}: {error}",
            allowed="a regular expression",
            fix="write special characters as \\(, \\* and so on",
        ) from None


def _by_path(params: Any, values: Mapping[str, Any]) -> Any:
    """A tree like `params` with, at each leaf, the value of its path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values[path_of(path)], params)
