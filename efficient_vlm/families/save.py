"""Parameters of ours to published checkpoints."""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from efficient_vlm.checkpoints import safetensors_write
from efficient_vlm.checkpoints.foreign import ADAPTER_CONFIG
from efficient_vlm.errors import UserError
from efficient_vlm.families.architecture import name_map
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.heads import with_flags
from efficient_vlm.families.hub import RECORD
from efficient_vlm.families.load import check_overflow, in_stack, known_dtype
from efficient_vlm.files import write_atomic
from efficient_vlm.models.vlm import VisionLanguageModel


def export(
    directory: str | os.PathLike,
    family: Family,
    config: Config,
    model: VisionLanguageModel,
    params: Any,
    *,
    dtype: Any = None,
    carried: Mapping[str, np.ndarray] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> tuple[Path, ...]:
    """Writes parameters as a Hugging Face checkpoint: hub names, config.json, safetensors.

    Args:
      directory: to write to.
      family, config, model: what the parameters are of.
      params: stacked or split.
      dtype: to write; None for those of the parameters. `config.json` names the most frequent one.
      carried: tensors by hub name that the model does not use, written unchanged.
      max_shard_bytes: see `safetensors_write.write`.

    Returns:
      The weight files.

    Raises:
      UserError: an unknown dtype, or values beyond its range; NaN or infinity; a directory that
        holds another checkpoint.
    """
    dtype = None if dtype is None else known_dtype("dtype", dtype)
    names = name_map(family, config, model)
    flat = flatten_dict(params, sep="/")

    for path, leaf in flat.items():  # Before the first file: it may replace an earlier export.
        if not np.isfinite(np.asarray(leaf)).all():
            raise UserError(
                f"{path}: has values that are NaN or infinite", fix="export an earlier step"
            )

    def parameter(path: str) -> np.ndarray:
        if path in flat:
            return np.asarray(flat[path])
        prefix, layer, rest = in_stack(path)
        return np.asarray(flat[f"{prefix}/{rest}"][layer])

    def written(name: str) -> np.ndarray:
        value = names.assemble(name, parameter)
        if dtype is None:
            return value
        with np.errstate(over="ignore"):
            stored = value.astype(dtype, copy=False)
        check_overflow(name, stored, value.dtype, fix=f"dtype={value.dtype}")
        return stored

    kinds = {
        piece.name: np.dtype(dtype or parameter(path).dtype)
        for path, leaf in names.leaves.items()
        for piece in leaf.pieces
    }
    tensors = [
        (name, shape, kinds[name], functools.partial(written, name))
        for name, shape in names.tensors().items()
    ]
    table = names.leaves.get("language/embedding")
    tied = table is not None and bool(model.decoder.get("tie_embeddings"))
    for name, value in (carried or {}).items():
        if tied and name.endswith("lm_head.weight"):
            # It equalled the embedding table when it was read; write the table of now.
            piece = table.pieces[0]
            again = functools.partial(written, piece.name)
            tensors.append((name, piece.shape, kinds[piece.name], again))
            continue
        tensors.append((name, value.shape, value.dtype, functools.partial(np.asarray, value)))
    kind = max(set(kinds.values()), key=list(kinds.values()).count)
    # Flags that the weights overruled when they were read would mislead other readers.
    config = with_flags(config, tied)
    config = {key: value for key, value in config.items() if key != "torch_dtype"}
    text = json.dumps({**config, "dtype": str(kind)}, indent=2, sort_keys=True) + "\n"
    path = Path(directory) / "config.json"
    with safetensors_write.writing(Path(directory)):
        _refuse_others(path, text.encode())
    files = safetensors_write.write(directory, tensors, max_shard_bytes=max_shard_bytes)
    with safetensors_write.writing(Path(directory)):
        write_atomic(path, text.encode())
    return files


def _refuse_others(config: Path, text: bytes) -> None:
    """Raises UserError if the directory holds weights that no export of this model wrote.

    Weight files of all models have the same names, so config.json, written last, tells them apart.
    """
    weights = sorted(path.name for path in config.parent.glob("*.safetensors"))
    if weights and config.is_file() and config.read_bytes() != text:
        raise UserError(
            f"{config.parent}: holds another checkpoint ({weights[0]} and a config.json that "
            "differs)",
            allowed="an empty directory, or an earlier export of this model in this dtype",
            fix="choose another directory",
        )


def copy_settings(source: Path, target: Path) -> None:
    """Copies tokenizer, chat template and processor settings; config.json and weights stay."""
    for path in sorted(source.iterdir()):
        # Code is copied, never run: config.json of models outside transformers refers to it.
        is_text = path.suffix in (".json", ".jinja", ".txt", ".model", ".py")
        # An adapter's settings would make an adapter's directory of the other one.
        ours = path.name in ("config.json", "dtypes.json", RECORD, ADAPTER_CONFIG)
        ours |= path.name.endswith(".index.json")
        if path.is_file() and is_text and not ours:
            (target / path.name).write_bytes(path.read_bytes())
