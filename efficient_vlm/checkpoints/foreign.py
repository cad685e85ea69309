"""What is no checkpoint of a whole model in safetensors: recognised, with what to do instead.

Adapters, pickles, quantised weights, and the files of other runtimes and of original training code.
Such things are chosen by name, not mistyped: "did you mean" would mislead.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from efficient_vlm.checkpoints.safetensors_format import CheckpointError, pickle_refused, show

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model."
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin.index.json")
# Ending of a file -> what it is.
_FORMATS = {
    ".gguf": "GGUF, the format of llama.cpp",
    ".ggml": "GGML, an old format of llama.cpp",
    ".onnx": "ONNX",
    ".h5": "HDF5, the format of Keras",
    ".msgpack": "the format of Flax",
    ".npz": "NumPy arrays (MLX, big_vision)",
    ".tflite": "LiteRT (TensorFlow Lite)",
    ".mlpackage": "Core ML",
}
_SAFETENSORS = "download the model's safetensors release instead (config.json beside them)"
_WHOLE = "use the checkpoint it was quantised from, or dequantise this one"
_MERGE = (
    "merge it into its base first: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
    ".save_pretrained(OUT) with peft, then give OUT"
)
# Part of a tensor's name -> what holds such tensors, and what to do. The first that matches counts.
_TENSORS = (
    (r"\.(lora_\w+|base_layer|modules_to_save|hada_\w+|lokr_\w+)\b", "an unmerged adapter", _MERGE),
    (r"^base_model\.model\.", "names with the prefix of a PEFT wrapper", _MERGE),
    (r"\.(qweight|qzeros|g_idx)$", "weights quantised with GPTQ or AWQ", _WHOLE),
    (r"\.(absmax|quant_map|quant_state\b.*|SCB)$", "weights quantised by bitsandbytes", _WHOLE),
    (r"\.weight_(packed|scale|scale_inv|zero_point)$", "quantised weights with scales", _WHOLE),
    (r"\.(scales|biases)$", "weights quantised by MLX", _WHOLE),
    (
        r"^model\.(mm_projector|vision_tower\.vision_tower|vision_resampler|image_newline)\b",
        "the layout of the original LLaVA code",
        "use the release in transformers' layout (llava-hf/...), or convert it with transformers' "
        "convert_llava_weights_to_hf.py",
    ),
    (
        r"^(vision_model\.encoder\.layers\.\d+\.(ls1|attn\.qkv)|mlp1\.\d+)\b",
        "the original layout of InternVL",
        "use the release in transformers' layout (its name ends in -hf)",
    ),
    (
        r"^(module|_orig_mod|_forward_module|_fsdp_wrapped_module)\.",
        "names with the prefix of a training wrapper",
        "save the wrapped module itself (unwrap_model), or rename the tensors",
    ),
)


def refuse_directory(path: Path) -> None:
    """Raises CheckpointError for a directory that holds something else than a model's safetensors.

    For directories without `model.safetensors` and its index; others pass.
    """
    try:
        names = sorted(os.listdir(path))
    except OSError:
        return
    if any(name == ADAPTER_CONFIG or name.startswith(ADAPTER) for name in names):
        raise _adapter(path, path)
    if any(name.endswith(".safetensors") and not _is_mistral(name) for name in names):
        return
    for name in names:
        _refuse_format(path / name)
    if "config.json" not in names:
        if "params.json" in names or any(map(_is_mistral, names)):
            raise _original(path, "consolidated weights and params.json")
        if "config.yaml" in names and any(name.endswith(_PICKLES) for name in names):
            raise _original(path, "config.yaml and a pickle, as Molmo's training code writes them")
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise pickle_refused(path / pickles[0])


def _is_mistral(name: str) -> bool:
    return name.startswith("consolidated.")


def _original(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}, the layout of the original code", fix=_SAFETENSORS)


def refuse_file(path: Path) -> None:
    """Raises CheckpointError for the name of an adapter, a pickle or a file of another format."""
    if path.name == ADAPTER_CONFIG or path.name.startswith(ADAPTER):
        raise _adapter(path, path.parent)
    _refuse_format(path)
    if path.name.endswith(_PICKLES):
        raise pickle_refused(path)


def _refuse_format(path: Path) -> None:
    ending = path.suffix.lower()
    if ending in _FORMATS:
        raise CheckpointError(f"{path}: {_FORMATS[ending]}", fix=_SAFETENSORS)


def _adapter(path: Path, folder: Path) -> CheckpointError:
    """The error for the adapter of a folder, with the name of its base model."""
    kind, base = adapter_of(folder)
    if re.search("PROMPT|PREFIX|P_TUNING", kind):  # Virtual tokens: no weights to merge into.
        fix = "such adapters cannot be merged: give the base model's own directory"
    else:
        fix = _MERGE
    return CheckpointError(f"{path}: a {kind} adapter of {base}, not a model", fix=fix)


def adapter_of(folder: Path) -> tuple[str, str]:
    """Kind of the adapter in a folder ("LoRA") and name of its base model, as far as it says so."""
    settings: Any = {}
    # Without settings the file's name alone says what it is.
    with contextlib.suppress(OSError, ValueError, RecursionError):
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    settings = settings if isinstance(settings, dict) else {}
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    kind = "LoRA" if not isinstance(kind, str) or kind == "LORA" else show(kind[:40]).strip("'")
    return kind, show(base) if isinstance(base, str) and base else "another model"


def quantisation(config: Mapping[str, Any]) -> str | None:
    """The method that a config.json says its weights are quantised with, or None."""
    for name in ("quantization_config", "compression_config"):
        if isinstance(config.get(name), Mapping):
            return show(str(config[name].get("quant_method", "an unnamed method"))[:40]).strip("'")
    return "MLX" if isinstance(config.get("quantization"), Mapping) else None


def refuse_tensors(folder: Path, names: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for tensors of a known layout that is not ours.

    Args:
      folder: of the checkpoint, for the message.
      names: tensors that the model does not know.
      config: content of config.json.
    """
    names = list(names)
    for pattern, what, fix in _TENSORS:
        name = next((name for name in names if re.search(pattern, name)), None)
        if name is not None:
            method = quantisation(config)
            what = f"weights quantised with {method}" if fix is _WHOLE and method else what
            raise CheckpointError(f"{folder}: {what} ({show(name)})", fix=fix)
