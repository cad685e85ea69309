"""Loads a published model, or the model of a fine-tuned run."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from efficient_vlm.checkpoints.safetensors_index import locate
from efficient_vlm.errors import UserError, short
from efficient_vlm.families import hub
from efficient_vlm.families.architecture import build_model, read_config
from efficient_vlm.families.checks import check_compressor
from efficient_vlm.families.imported import is_tuned, open_weights
from efficient_vlm.families.load import known_dtype
from efficient_vlm.families.processor import Processor
from efficient_vlm.families.table import family_of
from efficient_vlm.inference.pretrained import Pretrained
from efficient_vlm.runtime import paused_collection


@paused_collection()
def from_pretrained(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    compressor: Mapping[str, Any] | None = None,
    dtype: Any = "float32",
    param_dtype: Any = None,
    sharding: Callable | None = None,
    check: bool = True,
    sha256: Mapping[str, str] | None = None,
    adapter: str | os.PathLike | None = None,
    **picture_options: Any,
) -> Pretrained:
    """Loads a published model.

    Args:
      path: a directory with config.json and safetensors (one file, or shards with an index), the
        file or the index itself where there are several, or what `efficient-vlm import` wrote; or
        "org/name" of a model on a hub, unless there is a folder of that name, see `hub.find`; or
        the workdir of a fine-tuned run, whose model has its compressor and its adapters.
      revision: of a model on a hub: a branch, a tag or a commit; None for the default branch.
      compressor: name, budget and options, such as dict(name="visionzip", budget=64); None for all
        visual tokens.
      dtype: of activations, "float32" or "bfloat16".
      param_dtype: of parameters; None for that of activations, "stored" for those of the files.
      sharding: see `load.load_parameters`.
      check: refuse NaN and infinity. Without it, on a CPU, threads read the weights while the
        programs of the first request are prepared.
      sha256: file name -> digest of every safetensors file; they are read and compared first.
      adapter: folder with an adapter of PEFT's, which stays apart from the weights until `merge`.
      **picture_options: of the family's picture processor: max_visual_tokens (all), min_pixels and
        max_pixels (Qwen-VL), split (SmolVLM), max_tiles (InternVL), max_crops (Molmo), pan_and_scan
        (Gemma 3), skip_blank (SmolVLM, InternVL).

    Raises:
      UserError: no such model, a damaged file, or a compressor that this model cannot have.
    """
    if is_tuned(path):
        from efficient_vlm.inference.tuned import load_run

        parts = load_run(Path(path), compressor=compressor, dtype=dtype, **picture_options)
        tuned = Pretrained(*parts, changed=True)
        return tuned if adapter is None else tuned.merge().with_adapter(adapter)
    source = hub.find(path, revision)
    directory, files = locate(source.directory)
    dtype = known_dtype("dtype", dtype)
    kind = None
    if param_dtype != "stored":
        kind = dtype if param_dtype is None else known_dtype("param_dtype", param_dtype)
    if compressor is not None and not isinstance(compressor, Mapping):
        raise UserError(
            f"compressor: {short(compressor)} is not a mapping",
            fix='dict(name="visionzip", budget=64)',
        )
    config = read_config(files)
    family = family_of(config)
    family.check_pictures("option of from_pretrained or its pictures", picture_options)
    source = dataclasses.replace(source, directory=directory)
    processor = Processor(family, config, directory, picture_options, source)
    if picture_options:  # Refused before the weights are read.
        _ = processor.pictures
    model = build_model(config, dtype=dtype, compressor=compressor)
    check_compressor(model, family.variable)
    weights, carried = open_weights(
        files, family, config, model, dtype=kind, sharding=sharding, check=check, sha256=sha256
    )
    vlm = Pretrained(model, weights, processor, carried)
    return vlm if adapter is None else vlm.with_adapter(adapter)
