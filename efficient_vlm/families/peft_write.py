"""Adapters of ours as PEFT writes them: adapter_config.json and adapter_model.safetensors."""

import collections
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from efficient_vlm.adapt.forms import Adapter, DoRA, plain
from efficient_vlm.adapt.prompts import Extended
from efficient_vlm.checkpoints import safetensors_write
from efficient_vlm.checkpoints.foreign import ADAPTER_CONFIG
from efficient_vlm.errors import UserError
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.load import in_stack
from efficient_vlm.families.peft_names import PREFIX, Modules, Part
from efficient_vlm.files import write_atomic
from efficient_vlm.nn.attention import PREFIX as LEARNED_KEYS
from efficient_vlm.nn.linear import WeightForm

__all__ = ["WEIGHTS", "save_adapter"]

WEIGHTS = "adapter_model.safetensors"


class Factors(NamedTuple):
    """The adapter of one torch Linear.

    Attributes:
      a: float32 [r, in].
      b: float32 [out, r].
      magnitude: float32 [out] of DoRA, or None.
      scale: factor of b @ a.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    scale: float


def save_adapter(
    directory: str | os.PathLike,
    family: Family,
    config: Config,
    model: Any,
    params: Any,
    *,
    base_name: str | None = None,
    trainable: Any = None,
) -> tuple[Path, Path]:
    """Writes what was trained of an adapted model, for PEFT and its relatives.

    The scale of rsLoRA is written as the alpha of LoRA that equals it. Products of ours that are
    one Linear there (the fused queries, keys and values of Qwen's encoders) become one adapter of
    the sum of their ranks.

    Args:
      directory: to write to.
      family, config, model: what the parameters are of.
      params: adapted (`adapt.build.prepare`), stacked or split.
      base_name: of the base model, its name on the hub or its folder.
      trainable: see `adapt.build.Adapted`; what it names besides adapters is written whole, as
        PEFT's `modules_to_save`. None for adapters alone.

    Returns:
      The settings and the weights.

    Raises:
      UserError: nothing is adapted, or what is adapted has no name in PEFT's files: experts,
        convolutions, learned tokens, or biases of adapted products.
    """
    flat = flatten_dict(nn.unbox(params), sep="/")
    modules = Modules(family, config, model)
    _refuse_learned_tokens(flat)
    adapters = _adapters(modules, flat)
    if not adapters:
        raise UserError(
            "params: no product has an adapter",
            fix="adapt the model by lora, rslora, dora or qlora, or export all of it",
        )
    saved = _saved_modules(modules, flat, trainable, set(adapters))
    tensors = _tensors(modules, adapters)
    for tensor in sum(saved.values(), []):
        value = modules.names.assemble(tensor, lambda path: _plain(flat, path))
        tensors[f"{PREFIX}{modules.in_memory(tensor)}"] = np.ascontiguousarray(value)
    settings = _settings(modules, adapters, saved, base_name)
    folder = Path(directory)
    safetensors_write.write_file(folder / WEIGHTS, tensors)
    with safetensors_write.writing(folder):
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        write_atomic(folder / ADAPTER_CONFIG, text.encode())
    return folder / ADAPTER_CONFIG, folder / WEIGHTS


def _refuse_learned_tokens(flat: Mapping[str, Any]) -> None:
    for path, leaf in flat.items():
        if isinstance(leaf, Extended) or path.rpartition("/")[2] in LEARNED_KEYS:
            raise UserError(
                f"{path}: learned tokens, which PEFT stores in another form",
                allowed="lora, rslora, dora, qlora",
                fix="keep the run itself, which holds them",
            )


def _leaf(flat: Mapping[str, Any], path: str) -> tuple[Any, int | None]:
    """The parameter that holds a path in split form, and which of its layers."""
    if path in flat:
        return flat[path], None
    prefix, layer, rest = in_stack(path)
    return flat[f"{prefix}/{rest}"], layer


def _plain(flat: Mapping[str, Any], path: str) -> np.ndarray:
    leaf, layer = _leaf(flat, path)
    return np.asarray(leaf if layer is None else leaf[layer])


def _adapters(modules: Modules, flat: Mapping[str, Any]) -> dict[str, Factors]:
    """Name of a tensor -> its adapter."""
    adapters, kinds = {}, set()
    for tensor, parts in modules.parts.items():
        forms = [_leaf(flat, part.path) for part in parts]
        if not any(isinstance(form, Adapter) for form, _ in forms):
            continue
        for part in parts:
            if not part.linear or not tensor.endswith(".weight"):
                raise UserError(
                    f"{part.path}: has an adapter, but is no Linear of transformers ({tensor})",
                    allowed="products of attention, MLP, connector and head",
                    fix="export the merged model instead",
                )
        kinds |= {type(form) for form, _ in forms if isinstance(form, Adapter)}
        adapters[tensor] = _joined(parts, forms)
    if len(kinds) > 1:
        raise UserError(
            "params: both LoRA and DoRA, of which a file of PEFT holds one",
            fix="export the merged model instead",
        )
    return adapters


def _joined(parts: list[Part], forms: list[tuple[Any, int | None]]) -> Factors:
    """One adapter of a tensor from those of its rows."""
    from scipy.linalg import block_diag  # 5 MB, for who writes adapters.

    factors = [_factors(form, layer) for form, layer in forms if isinstance(form, Adapter)]
    if len(parts) == 1:
        return factors[0]
    scale, magnitude, columns, at = factors[0].scale, [], [], 0
    for part, (form, layer) in zip(parts, forms, strict=True):
        rows = part.rows.stop - part.rows.start
        if isinstance(form, Adapter):
            own, at = factors[at], at + 1
            columns.append(own.b * (own.scale / scale))
            magnitude.append(own.magnitude)
        else:
            weight = plain(_of_layer(form, layer))
            columns.append(np.zeros((rows, 0), np.float32))
            magnitude.append(np.linalg.norm(np.asarray(weight).reshape(-1, rows), axis=0))
    is_dora = factors[0].magnitude is not None
    return Factors(
        a=np.concatenate([own.a for own in factors]),
        b=block_diag(*columns).astype(np.float32),
        magnitude=np.concatenate(magnitude) if is_dora else None,
        scale=scale,
    )


def _of_layer(form: Any, layer: int | None) -> Any:
    return form if layer is None else jax.tree.map(lambda x: x[layer], form)


def _factors(form: Adapter, layer: int | None) -> Factors:
    arrays = [form.a, form.b, *([form.magnitude] if isinstance(form, DoRA) else [])]
    arrays = [np.asarray(x if layer is None else x[layer], np.float32) for x in arrays]
    a, b = arrays[0].reshape(-1, arrays[0].shape[-1]), arrays[1].reshape(len(arrays[1]), -1)
    magnitude = arrays[2].reshape(-1) if len(arrays) > 2 else None
    return Factors(a.T, b.T, magnitude, form.scale)


def _saved_modules(
    modules: Modules, flat: Mapping[str, Any], trainable: Any, adapted: set[str]
) -> dict[str, list[str]]:
    """Module of the hub -> its tensors, for modules that were trained themselves."""
    if trainable is None:
        return {}
    flags = flatten_dict(trainable, sep="/")
    trained = {
        tensor
        for tensor, parts in modules.parts.items()
        for part in parts
        if _flag(flags, part.path)
    }
    owners = {tensor.rpartition(".")[0] for tensor in trained}
    outer = {
        owner for owner in owners if not any(owner.startswith(f"{other}.") for other in owners)
    }
    saved = {
        owner: [tensor for tensor in modules.parts if tensor.startswith(f"{owner}.")]
        for owner in sorted(outer)
    }
    for owner, tensors in saved.items():
        if both := sorted(adapted & set(tensors)):
            raise UserError(
                f"params: {owner} is trained itself, and so is an adapter in it ({both[0]})",
                allowed="modules of one kind or the other",
                fix="export the merged model instead",
            )
    return saved


def _flag(flags: Mapping[str, Any], path: str) -> bool:
    prefix, layer, rest = in_stack(path)
    flag = flags[path] if path in flags or layer is None else flags[f"{prefix}/{rest}"]
    return not isinstance(flag, WeightForm) and bool(flag)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _tensors(modules: Modules, adapters: Mapping[str, Factors]) -> dict[str, np.ndarray]:
    tensors = {}
    for name, factors in adapters.items():
        module = f"{PREFIX}{modules.in_memory(_module(name))}"
        tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(factors.a)
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(factors.b)
        if factors.magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = factors.magnitude
    return tensors


def _settings(
    modules: Modules,
    adapters: Mapping[str, Factors],
    saved: Mapping[str, Any],
    base_name: str | None,
) -> dict[str, Any]:
    """Content of adapter_config.json; fields that it lacks have PEFT's defaults."""
    sizes = {
        modules.in_memory(_module(name)): (len(own.a), own.scale * len(own.a))
        for name, own in adapters.items()
    }
    (rank, alpha), _ = collections.Counter(sizes.values()).most_common(1)[0]
    ranks = {name: r for name, (r, _) in sizes.items() if r != rank}
    alphas = {name: _number(a) for name, (_, a) in sizes.items() if a != alpha}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": sorted(map(modules.in_memory, saved)) or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": sorted(sizes),
        "task_type": None,
        "use_dora": any(own.magnitude is not None for own in adapters.values()),
        "use_rslora": False,
    }


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
