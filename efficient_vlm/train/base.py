"""A published model that a run starts from: its files, its model and its parameters."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from efficient_vlm.checkpoints.safetensors_index import locate
from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.errors import UserError, short_path
from efficient_vlm.families import hub
from efficient_vlm.families.architecture import build_model, read_config
from efficient_vlm.families.imported import (
    CHECKPOINTS,
    DTYPES,
    is_tuned,
    read_carried,
    restore_stacked,
)
from efficient_vlm.families.load import FamilyCheckpoint, known_dtype, stacked
from efficient_vlm.families.processor import Processor
from efficient_vlm.families.table import family_of
from efficient_vlm.files import write_atomic
from efficient_vlm.models.init import abstract_parameters
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.train.in_place import in_place, taken_over
from efficient_vlm.train.pretrained_fields import PretrainedFields

__all__ = ["Base", "check_base", "open_base"]

RECORD = "base.json"


@dataclasses.dataclass(frozen=True)
class Base:
    """A published model without its weights.

    Attributes:
      model: with the compressor of the run.
      published: as its files have it.
      processor: tokenizer, template and pictures.
      files: where its weights are.
      dtype: of its parameters in the run.
    """

    model: VisionLanguageModel
    published: VisionLanguageModel
    processor: Processor
    files: Path
    dtype: np.dtype

    @property
    def _plain(self) -> VisionLanguageModel:
        """As its files have it."""
        return self.published.clone(compressor={"name": "none"})

    def held(self) -> set[str]:
        """Paths of the parameters that its files give the model, layers stacked."""
        return set(self._used(flatten_dict(abstract_parameters(self._plain), sep="/")))

    def _used(self, flat: dict[str, Any]) -> dict[str, Any]:
        return taken_over(flat, self.published, self.model) if self.model.in_place else flat

    def parameters(self) -> dict[str, Any]:
        """Its parameters, layers stacked, on the host: path -> array."""
        if (self.files / CHECKPOINTS).is_dir():
            flat = flatten_dict(restore_stacked(self.files, self._plain), sep="/")
            flat = {path: np.asarray(value).astype(self.dtype) for path, value in flat.items()}
            return self._used(flat)
        source = self._source()
        source.check_finite()
        return self._used(flatten_dict(stacked(source, dtype=self.dtype), sep="/"))

    def carried(self) -> dict[str, np.ndarray]:
        """Tensors of its files that the model does not use, by hub name."""
        if (self.files / CHECKPOINTS).is_dir():
            return read_carried(self.files)
        source = self._source()
        return {name: source.tensor(name) for name in source.carried}

    def _source(self) -> FamilyCheckpoint:
        family, config = self.processor.family, self.processor.config
        return FamilyCheckpoint(Checkpoint.open(self.files), family, config, self._plain)

    def digests(self) -> dict[str, str]:
        """SHA-256 of each weight file."""
        if (self.files / CHECKPOINTS).is_dir():
            paths = sorted(p for p in (self.files / CHECKPOINTS).rglob("*") if p.is_file())
        else:
            paths = list(Checkpoint.open(self.files).files)
        found = {}
        for path in paths:
            with path.open("rb") as file:
                name = path.name if path.parent == self.files else str(path.relative_to(self.files))
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found


def open_base(fields: PretrainedFields) -> Base:
    """Reads what a published model is; its weights are not read yet.

    Raises:
      UserError: no such model, or a compressor that it cannot have.
    """
    _refuse_run(Path(fields.pretrained))
    source = hub.find(fields.pretrained, fields.revision)
    directory, files = locate(source.directory)
    source = dataclasses.replace(source, directory=directory)
    config = read_config(files)
    family = family_of(config)
    published = build_model(config, dtype=known_dtype("model.dtype", fields.dtype))
    model = published.clone(compressor=dict(fields.compressor))
    if fields.in_place:
        model = in_place(model)
    else:
        model = model.clone(pooled_start=fields.pooled_start)
    if fields.remat != "none":
        parts = {"decoder": {**model.decoder, "remat": fields.remat}}
        if model.encoder is not None:
            parts["encoder"] = {**model.encoder, "remat": fields.remat}
        model = model.clone(**parts)
    family.check_pictures("model.pictures", fields.pictures)
    processor = Processor(family, config, directory, dict(fields.pictures), source)
    if fields.pictures:  # Refused before anything is read.
        _ = processor.pictures
    dtype = known_dtype("model.param_dtype", fields.param_dtype or "float32")
    return Base(model, published, processor, files, dtype)


def _refuse_run(folder: Path) -> None:
    """Raises UserError for the folder of a run, whose config.json is not that of a model."""
    if not (folder / CHECKPOINTS).is_dir() or (folder / DTYPES).is_file():
        return
    raise UserError(
        f"model.pretrained: {short_path(folder)} is a run of efficient-vlm train",
        allowed="the directory of a published model, or its name on a hub",
        fix="efficient-vlm export RUN OUT, and name OUT here" if is_tuned(folder) else None,
    )


def check_base(workdir: Path, base: Base) -> dict[str, str]:
    """Records the weights that a run starts from, or compares them with the record.

    Raises:
      UserError: they are not those of the record.
    """
    path, digests = workdir / RECORD, base.digests()
    if not path.is_file():
        write_atomic(path, (json.dumps(digests, indent=1, sort_keys=True) + "\n").encode())
        return digests
    stored = json.loads(path.read_text())
    changed = sorted(n for n in {*stored, *digests} if stored.get(n) != digests.get(n))
    if changed:
        raise UserError(
            f"model.pretrained: {changed[0]} is not the file that this run started from",
            allowed=f"SHA-256 {stored.get(changed[0], 'of none')}",
            fix="restore it, or start again with another --workdir",
        )
    return digests


def with_values(shapes: Any, values: Mapping[str, Any], fresh: Any) -> Any:
    """A tree like `shapes` of the values, and of `fresh()` where there are none (trained
    compressors, which no published model has)."""
    flat = flatten_dict(shapes, sep="/")
    lacking = flat.keys() - values.keys()
    made = flatten_dict(fresh(), sep="/") if lacking else {}
    return unflatten_dict(
        {
            path: made[path].astype(leaf.dtype) if path in lacking else values[path]
            for path, leaf in flat.items()
        },
        sep="/",
    )


def placed(leaf: Any, sharding: Any) -> jax.Array:
    """A copy of an array where it belongs; each device gets its part.

    A copy because a step donates what it trains, and on a CPU an array of JAX may share the memory
    of the one that it was made of.
    """
    if sharding is None:
        return jnp.array(leaf, copy=True)
    return jax.make_array_from_callback(
        leaf.shape, sharding, lambda index: np.array(leaf[index], copy=True)
    )
