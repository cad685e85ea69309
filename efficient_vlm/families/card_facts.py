"""Where the facts of a model card come from: a model, or what a run left in its workdir."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_vlm.errors import UserError
from efficient_vlm.families.base import Family
from efficient_vlm.families.card import TAG, Base, Card, Data, read_base
from efficient_vlm.families.hub import Source
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.runtime import environment

# Fields of a config's "train" that say how the weights came about.
_TRAINING = ("steps", "seed", "optimizer", "elastic", "trainable", "distil")


def of_model(
    source: Source,
    family: Family,
    model: VisionLanguageModel,
    *,
    changed: bool,
    **facts: Any,
) -> Card:
    """The card of a model of which nothing else is recorded.

    Args:
      source: where its weights came from.
      family, model: what it is, with the compressor in use.
      changed: whether its weights are others than those of the source.
      **facts: further fields of `Card`, such as params, dtype and command.
    """
    compressor = dict(model.compressor)
    return Card(
        **dict(
            base=read_base(source),
            trained={} if changed else None,
            relation="finetune" if changed else None,
            compressor=compressor,
            versions=environment(),
            **header_of(family, compressor),
        )
        | facts
    )


def header_of(family: Family, compressor: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a card's header that a family and a compressor decide."""
    sees = family.processor is not None
    method = compressor.get("name", "none")
    return {
        "pipeline": "image-text-to-text" if sees else "text-generation",
        "tags": () if method == "none" else (method,),
    }


def of_workdir(
    workdir: Path,
    base: Base | None = None,
    *,
    data: Sequence[Data] | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Card:
    """The card of a run of `efficient-vlm train`, from its config.json and results.json.

    Args:
      workdir: of the run; results may be missing, and are then not recorded.
      base: the published model that it started from, see `read_base`; None for a run with a model
        of its own.
      data: its sources; None for those in "data" of results.json (rows with the fields of `Data`),
        or else the one that config.json names.
      fingerprint: of the data, as the checkpoints have it, for the digest of that one.
      **facts: further fields of `Card`, in place of those of the files.

    Raises:
      UserError: config.json is missing or damaged, or results.json is damaged.
    """
    config = _read(Path(workdir) / "config.json")
    if config is None:
        raise UserError(f"{workdir}: no config.json", fix="give the workdir of a run")
    results = _read(Path(workdir) / "results.json") or {}
    train = _mapping(results.get("train"))
    settings, adapt = _mapping(config.get("train")), _mapping(config.get("adapt"))
    compressor = _mapping(_mapping(config.get("model")).get("compressor"))
    rows = [row for row in results.get("eval") or () if isinstance(row, Mapping)]
    trained = {name: settings[name] for name in _TRAINING if settings.get(name) is not None}
    if adapt:
        trained["adapter"] = adapt
    if preference := _mapping(config.get("preference")):
        trained["preference"] = preference
    trained |= {name: train[name] for name in ("seconds", "skipped_steps") if name in train}
    budgets = {row["budget"] for row in rows if isinstance(row.get("budget"), int)}
    found = dict(
        base=base or Base(),
        trained=trained,
        relation="finetune",
        library="transformers" if base else TAG,
        data=_sources(config, results, fingerprint or {}) if data is None else data,
        params=train.get("params"),
        trained_params=train.get("trained_params"),
        compressor=compressor or None,
        budgets=sorted(budgets, reverse=True),
        results=rows,
        controls=results.get("controls") or (),
        cost=results.get("cost") or (),
        protocol=results.get("protocol"),
        energy=_mapping(results.get("energy")) or None,
        command=results.get("command"),
        versions=_mapping(results.get("environment")),
    )
    return Card(**(found | facts))


def _sources(
    config: Mapping[str, Any], results: Mapping[str, Any], fingerprint: Mapping[str, Any]
) -> list[Data]:
    """The data of a run, as far as its files tell."""
    names = {field.name for field in dataclasses.fields(Data)}
    rows = results.get("data")
    if isinstance(rows, list) and rows:
        return [Data(**{k: v for k, v in row.items() if k in names}) for row in rows]
    settings, train = _mapping(config.get("data")), _mapping(results.get("train"))
    path = settings.get("path")
    name = Path(path).name if isinstance(path, str) and path else settings.get("source")
    if not name:
        return []
    content = fingerprint.get("content")
    return [
        Data(
            name,
            sha256=content if isinstance(content, str) and len(content) == 64 else None,
            license=settings.get("license"),
            # How many of them the run came to read is not among its results.
            rows=train.get("samples"),
            skipped=_mapping(train.get("skipped_samples")),
        )
    ]


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is no file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})", fix="restore it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}", allowed="an object")
    return content


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
