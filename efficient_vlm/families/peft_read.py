"""Adapters of PEFT as forms of our weights."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from efficient_vlm.adapt.build import is_adapted
from efficient_vlm.adapt.forms import DoRA, LoRA
from efficient_vlm.adapt.places import Place, places
from efficient_vlm.checkpoints.foreign import ADAPTER_CONFIG
from efficient_vlm.checkpoints.safetensors_format import CheckpointError, show
from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.errors import UserError, short, short_path
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.load import in_stack
from efficient_vlm.families.peft_names import PREFIX, Modules
from efficient_vlm.families.peft_settings import pattern_value, read_settings
from efficient_vlm.families.peft_write import WEIGHTS

__all__ = ["load_adapter"]

_FACTOR = re.compile(r"(.*)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")


class Update(NamedTuple):
    """The adapter of one of our weights, in split form.

    Attributes:
      a: float32 [*inputs, r].
      b: float32 [r, *outputs].
      magnitude: float32 [*outputs] of DoRA, or None.
      scale: factor of their product.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    scale: float


def load_adapter(
    directory: str | os.PathLike, family: Family, config: Config, model: Any, params: Any
) -> Any:
    """The parameters of a base model with an adapter that PEFT has written.

    LoRA, rsLoRA and DoRA of any rank and scale for each module, on any layers, and modules that
    were trained themselves. The tensors say which products are adapted, whatever `target_modules`
    is. In stacked parameters all layers have the largest rank, filled with zeros; layers without an
    adapter have one of zeros.

    Args:
      directory: with adapter_config.json and adapter_model.safetensors.
      family, config, model: of the base.
      params: of the base, stacked or split, without logical axes.

    Returns:
      Parameters of the same structure, forms in place of adapted weights.

    Raises:
      UserError: no such files, another method than LoRA, or an adapter for another base.
    """
    if is_adapted(params):
        raise UserError("params: adapted already", fix="merge them first: adapt.build.merge")
    folder = Path(directory)
    settings = read_settings(folder)
    checkpoint = Checkpoint.of_file(folder / WEIGHTS)
    modules = Modules(family, config, model)
    flat, known = flatten_dict(params, sep="/"), places(params, model)
    updates, values = _Reader(folder, settings, checkpoint, modules, known).read()
    for path, value in values.items():
        _put(flat, path, value)
    for whole, layers in _by_parameter(flat, updates).items():
        flat[whole] = _form(flat[whole], known[whole], layers)
    return unflatten_dict(flat, sep="/")


class _Reader:
    """One adapter: its settings, its tensors, and the model that they should fit."""

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        checkpoint: Checkpoint,
        modules: Modules,
        known: Mapping[str, Place],
    ):
        self.folder, self.settings, self.checkpoint = folder, settings, checkpoint
        self.modules = modules
        self.inputs = _inputs(modules, known)

    def read(self) -> tuple[dict[str, Update], dict[str, np.ndarray]]:
        """Path in split form -> adapter, and path -> value trained itself."""
        factors: dict[str, dict[str, np.ndarray]] = {}
        wholes: dict[str, str] = {}
        spelled: dict[str, str] = {}
        for name in self.checkpoint.names:
            match = _FACTOR.fullmatch(name)
            module = name if match is None else f"{match[1]}.weight"
            bare = _WRAPPERS.sub("", module.removeprefix(PREFIX))
            if ".lora_embedding_" in name:
                raise self._unread(f"adapts a table of embeddings ({show(name)})")
            tensor = self.modules.find(bare)
            if tensor is None or ".lora_" in bare:
                raise self._other_base(f"{show(name)} is no part of this model")
            if match is None:
                wholes[tensor] = name
            else:
                factors.setdefault(tensor, {})[match[2]] = self._array(name)
                spelled[tensor] = bare.removesuffix(".weight")
        updates: dict[str, Update] = {}
        for tensor, found in factors.items():
            updates |= self._updates(tensor, found, spelled[tensor])
        return updates, self._values(wholes)

    def _array(self, name: str) -> np.ndarray:
        return self.checkpoint.read(name, finite=True).astype(np.float32)

    def _other_base(self, what: str) -> CheckpointError:
        base = self.settings.get("base_model_name_or_path")
        return CheckpointError(
            f"{short_path(self.folder)}: an adapter for another base: {what}",
            allowed=f"adapters of this {self.modules.family.name} model",
            fix=f"load it on its base, {short(base) if base else 'which it does not name'}",
        )

    def _unread(self, what: str) -> UserError:
        return UserError(
            f"{short_path(self.folder)}: {what}",
            allowed="adapters of products of attention, MLP, connector and head",
            fix="merge it by PEFT (merge_and_unload) and load the whole model",
        )

    def _updates(
        self, tensor: str, found: Mapping[str, np.ndarray], module: str
    ) -> dict[str, Update]:
        """The adapters of ours that one of PEFT's is: one for each part of a fused Linear."""
        parts = self.modules.parts[tensor]
        if not all(part.linear for part in parts):
            raise self._unread(f"adapts {tensor}, which is no Linear")
        fan_out, fan_in = parts[0].piece.shape
        a, b = found.get("lora_A"), found.get("lora_B")
        if a is None or b is None:
            raise self._other_base(f"{module} has one factor of two")
        magnitude = found.get("lora_magnitude_vector")
        rank = a.shape[0]
        shapes = a.shape == (rank, fan_in) and b.shape == (fan_out, rank)
        if not shapes or (magnitude is not None and magnitude.size != fan_out):
            raise self._other_base(
                f"{module} has factors {list(a.shape)} and {list(b.shape)} for a weight "
                f"[{fan_out}, {fan_in}]"
            )
        return {part.path: self._update(part, a, b, magnitude, module) for part in parts}

    def _update(self, part: Any, a: Any, b: Any, magnitude: Any, module: str) -> Update:
        shape, inputs = self.modules.names.shapes[part.path], self.inputs[part.path]
        rank = len(a)
        return Update(
            a=a.T.reshape(*shape[:inputs], rank),
            b=b[part.rows].T.reshape(rank, *shape[inputs:]),
            magnitude=None
            if magnitude is None
            else magnitude.reshape(-1)[part.rows].reshape(shape[inputs:]),
            scale=self._scale(module, rank),
        )

    def _scale(self, module: str, rank: int) -> float:
        wanted = self._of_module("rank_pattern", module, self.settings.get("r", 8))
        if wanted != rank:
            raise CheckpointError(
                f"{short_path(self.folder)}: {module} has the rank {rank}",
                allowed=f"{short(wanted)}, from {ADAPTER_CONFIG}",
                fix="use the adapter_config.json that came with these weights",
            )
        alpha = self._of_module("alpha_pattern", module, self.settings.get("lora_alpha", 8))
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def _of_module(self, field: str, module: str, default: Any) -> Any:
        where = f"{self.folder / ADAPTER_CONFIG}: {field}"
        return pattern_value(self.settings.get(field) or {}, module, default, where)

    def _values(self, wholes: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Parameters whose tensors are in the file themselves."""
        values: dict[str, np.ndarray] = {}
        for tensor, name in wholes.items():
            expected = self.modules.parts[tensor][0].piece.shape
            if self.checkpoint.shape(name) != tuple(expected):
                shape = list(self.checkpoint.shape(name))
                raise self._other_base(f"{tensor} has the shape {shape}, not {list(expected)}")
            for part in self.modules.parts[tensor]:
                leaf = self.modules.names.leaves[part.path]
                if missing := [p.name for p in leaf.pieces if p.name not in wholes]:
                    raise self._other_base(f"{tensor} comes without {missing[0]}")
                out = np.empty(self.modules.names.shapes[part.path], np.float32)
                leaf.read(lambda each: self._array(wholes[each]), out)
                values[part.path] = out
        return values


def _inputs(modules: Modules, known: Mapping[str, Place]) -> dict[str, int]:
    """Path in split form -> number of axes of inputs."""
    found = {}
    for path in modules.names.leaves:
        prefix, _, rest = in_stack(path)
        place = known.get(path) or known[f"{prefix}/{rest}"]
        found[path] = place.inputs
    return found


def _put(flat: dict[str, Any], path: str, value: np.ndarray) -> None:
    """Replaces one parameter, or that of one layer, in the dtype that it had."""
    if path in flat:
        flat[path] = jnp.asarray(value, flat[path].dtype)
        return
    prefix, layer, rest = in_stack(path)
    whole = f"{prefix}/{rest}"
    flat[whole] = jnp.asarray(flat[whole]).at[layer].set(value)


def _by_parameter(
    flat: Mapping[str, Any], updates: Mapping[str, Update]
) -> dict[str, dict[int, Update]]:
    """Path of a parameter -> layer -> adapter; layer 0 where it is of one layer."""
    found: dict[str, dict[int, Update]] = {}
    for path, update in updates.items():
        prefix, layer, rest = in_stack(path)
        if path in flat:
            found.setdefault(path, {})[0] = update
        else:
            found.setdefault(f"{prefix}/{rest}", {})[layer] = update
    return found


def _form(base: Any, place: Place, layers: Mapping[int, Update]) -> LoRA | DoRA:
    """The form of one parameter: of one layer, or of a stack of them."""
    first = next(iter(layers.values()))
    shape, is_stack = tuple(nn.unbox(base).shape), place.leading > 0
    count = shape[0] if is_stack else 1
    inner, inputs = shape[is_stack:], place.inputs
    rank = max(update.a.shape[-1] for update in layers.values())
    scale = max(update.scale for update in layers.values()) or 1.0
    a = np.zeros((count, *inner[:inputs], rank), np.float32)
    b = np.zeros((count, rank, *inner[inputs:]), np.float32)
    for layer, update in layers.items():
        own = update.a.shape[-1]
        a[layer, ..., :own] = update.a
        # A form has one scale: those of other layers go into their factors.
        b[layer, :own] = update.b * (update.scale / scale)
    a, b = (jnp.asarray(x if is_stack else x[0]) for x in (a, b))
    if first.magnitude is None:
        return LoRA(base, a, b, scale)
    form = DoRA.of(base, a, b, scale)
    magnitude = np.array(form.magnitude)
    for layer, update in layers.items():
        magnitude[layer if is_stack else ...] = update.magnitude
    return form.replace(magnitude=jnp.asarray(magnitude))
