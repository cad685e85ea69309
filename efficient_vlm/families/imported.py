"""Imported models: a published checkpoint as one of ours, complete enough to be exported again.

A folder with config.json and the other settings as published, the parameters under checkpoints/
(step 0, layers stacked), dtypes.json (parameters keep their dtypes), and
carried/: tensors that our model does not use, kept for the export. source.json: the name on a hub
and the commit, where it came from one.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from efficient_vlm.checkpoints import safetensors_write
from efficient_vlm.checkpoints.run import Checkpoints, SaveFailed
from efficient_vlm.checkpoints.safetensors_index import locate
from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.checkpoints.safetensors_write import writing
from efficient_vlm.checkpoints.staging import StagingArea, identity
from efficient_vlm.errors import UserError
from efficient_vlm.families import hub
from efficient_vlm.families.architecture import build_model, read_config
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.card import BASE_README
from efficient_vlm.families.load import FamilyCheckpoint, check_overflow, load_parameters, stacked
from efficient_vlm.families.save import copy_settings
from efficient_vlm.families.table import family_of
from efficient_vlm.families.weights import FusedReader, Weights
from efficient_vlm.models.init import abstract_parameters
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.stack import unstack
from efficient_vlm.processing.hub_tokenizer import read_json

CHECKPOINTS = "checkpoints"
CARRIED = "carried"
DTYPES = "dtypes.json"
STAGE = "under_way"


def open_weights(
    files: Path,
    family: Family,
    config: Config,
    model: VisionLanguageModel,
    *,
    dtype: Any,
    sharding: Callable | None = None,
    check: bool = True,
    sha256: Mapping[str, str] | None = None,
) -> tuple[Weights, dict[str, np.ndarray]]:
    """Parameters, and the tensors that are only carried along (by hub name).

    A published checkpoint goes to a CPU as it is used there (`weights.FusedReader`): all of it is
    read here where a value can still be refused; else threads read it, and the first use waits.

    Args:
      files: a published or an imported directory, or the weights of one by name.
      family, config, model: of that directory; the compressor of the model does not matter.
      dtype: of the parameters; None for those stored.
      sharding, check, sha256: see `inference.load.from_pretrained`.
    """
    model = model.clone(compressor={"name": "none"})
    if not (files / CHECKPOINTS).is_dir():
        source = FamilyCheckpoint(Checkpoint.open(files, sha256=sha256), family, config, model)
        carried = {name: source.tensor(name) for name in source.carried}
        if sharding is None and jax.default_backend() == "cpu":
            reader = FusedReader(source, dtype, check)
            weights = Weights(reader=reader)
            if reader.may_fail:
                weights.fused  # noqa: B018
            return weights, carried
        if check:
            source.check_finite()
        return Weights(load_parameters(source, dtype=dtype, sharding=sharding)), carried
    stacks, params = flatten_dict(restore_stacked(files, model), sep="/"), {}
    for path in list(stacks):
        # One stack at a time is converted and freed: there are never two copies of the model.
        for name, value in flatten_dict(
            unstack(unflatten_dict({path: stacks.pop(path)}, sep="/")), sep="/"
        ).items():
            before = value.dtype
            value = value if dtype is None else value.astype(dtype)
            check_overflow(name, value, before)
            target = None if sharding is None else sharding(name, value.shape)
            params[name] = value if target is None else jax.device_put(value, target)
    return Weights(unflatten_dict(params, sep="/")), read_carried(files)


def is_tuned(path: Any) -> bool:
    """Whether a path is the workdir of a run that started from a published model."""
    try:
        config = json.loads((Path(path) / "config.json").read_text())
        return "pretrained" in config["model"] and "train" in config
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def restore_stacked(directory: Path, model: VisionLanguageModel) -> Any:
    """Parameters of an imported directory, layers stacked."""
    kinds = read_json(directory / DTYPES)
    try:
        abstract = {
            path: jax.ShapeDtypeStruct(leaf.shape, np.dtype(kinds.get(path, leaf.dtype)))
            for path, leaf in flatten_dict(abstract_parameters(model), sep="/").items()
        }
    except TypeError as error:
        again = "run efficient-vlm import again"
        raise UserError(f"{directory / DTYPES}: {error}", fix=again) from None
    with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
        wanted = {"params": unflatten_dict(abstract, sep="/")}
        restored = checkpoints.restore_latest(wanted, subset=True)
    if restored is None:
        raise UserError(f"{directory}: no checkpoint", fix="run efficient-vlm import again")
    return restored[1]["params"]


def read_carried(directory: Path) -> dict[str, np.ndarray]:
    """Tensors that the model does not use, by hub name."""
    if not (directory / CARRIED).is_dir():
        return {}
    checkpoint = Checkpoint.open(directory / CARRIED)
    return {name: checkpoint.read(name) for name in checkpoint.names}


def import_model(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    revision: str | None = None,
    sha256: Mapping[str, str] | None = None,
) -> tuple[VisionLanguageModel, Any]:
    """Writes a published checkpoint as one of ours; parameters keep their dtype.

    Called again after a kill, it resumes with the tensors that were not converted yet; nothing
    counts as imported until the checkpoint is committed. It needs disk space for three times the
    parameters: the converted ones, the checkpoint, and the spare room that every save requires.

    Args:
      source: directory with config.json and safetensors, or its weights by name; or "org/name" of a
        model on a hub, see `hub.find`.
      target: folder to write.
      revision, sha256: see `hub.find` and `Checkpoint.open`.

    Returns:
      The model and its parameters, stacked, memory-mapped.

    Raises:
      UserError: see `from_pretrained`; or the target holds something else.
    """
    origin, target = hub.find(source, revision), Path(target)
    source, weights = locate(origin.directory)
    config = read_config(weights)
    if (target / DTYPES).is_file() and _committed(target):
        # An import that was killed after its very last step.
        shutil.rmtree(target / STAGE, ignore_errors=True)
    if target.exists() and not (target.is_dir() and _is_free(target)):
        raise UserError(
            f"{target}: not empty, or an imported model",
            fix="name a folder that does not exist yet",
        )
    if source.resolve() in target.resolve().parents:
        raise UserError(f"{target}: inside {source}", fix="name a folder outside of it")
    family, model = family_of(config), build_model(config)
    checkpoint = Checkpoint.open(weights, sha256=sha256)
    reader = FamilyCheckpoint(checkpoint, family, config, model)
    reader.check_finite()
    try:
        with writing(target):
            params = _write(source, target, reader, origin)
    except SaveFailed as error:
        raise UserError(f"{target}: {error}", fix="solve that and import again") from None
    return model, params


def _write(source: Path, target: Path, reader: FamilyCheckpoint, origin: hub.Source) -> Any:
    files = reader.checkpoint.files
    stage = StagingArea(target / STAGE, identity((source / "config.json", *files)))
    for leftover in target.iterdir():  # Of an import that was killed, perhaps of another model.
        if leftover.is_dir() and not leftover.is_symlink() and leftover.name != STAGE:
            shutil.rmtree(leftover)
        elif leftover.name != STAGE:
            leftover.unlink()
    params = stacked(reader, stage=stage)
    copy_settings(source, target)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    for name in (hub.README, BASE_README):  # As they are: an export makes a card of them.
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())
    origin.record(target)
    kinds = {path: str(value.dtype) for path, value in flatten_dict(params, sep="/").items()}
    (target / DTYPES).write_text(json.dumps(kinds, indent=0, sort_keys=True) + "\n")
    if reader.carried:
        carried = [(n, reader.tensor(n)) for n in reader.carried]
        tensors = [(n, t.shape, t.dtype, lambda t=t: t) for n, t in carried]
        safetensors_write.write(target / CARRIED, tensors)
    with Checkpoints(target / CHECKPOINTS) as checkpoints:
        checkpoints.save(0, {"params": params}, wait=True)
    stage.remove()
    return params


def _is_free(target: Path) -> bool:
    """Whether a folder is empty, or holds only the leftovers of an unfinished import."""
    names = {path.name for path in target.iterdir()}
    return not names or (STAGE in names and not _committed(target))


def _committed(target: Path) -> bool:
    if not (target / CHECKPOINTS).is_dir():
        return False
    with Checkpoints(target / CHECKPOINTS, read_only=True) as checkpoints:
        return bool(checkpoints.committed())
