"""The config of a workdir: written once, and compared by every later run."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from efficient_vlm.compressors.imports import import_of_run
from efficient_vlm.errors import UserError, first_line
from efficient_vlm.files import Damaged, read_index, write_atomic


def _plain(value: Any) -> Any:
    """The value as it comes back from JSON: tuples are lists, keys are strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _dotted(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and (value or not prefix):
        return {
            k: v for key, each in value.items() for k, v in _dotted(each, f"{prefix}.{key}").items()
        }
    return {prefix[1:]: value}


def compare_config(
    stored: Mapping[str, Any], current: Mapping[str, Any], *, ignore: Iterable[str] = ()
) -> list[str]:
    """The fields in which two configs differ.

    Args:
      stored: the config of the workdir.
      current: the requested config.
      ignore: dotted fields, or dotted prefixes, that may differ.

    Returns:
      Lines like "model.width: 64 in the workdir, 128 now", sorted by field; [] if none differ.
    """
    old, new = _dotted(_plain(stored)), _dotted(_plain(current))
    ignore = tuple(ignore)
    lines = []
    for field in sorted(old.keys() | new.keys()):
        if any(field == name or field.startswith(f"{name}.") for name in ignore):
            continue
        # json: NaN equals NaN, and True does not equal 1.
        before, after = (
            json.dumps(side[field], sort_keys=True) if field in side else "absent"
            for side in (old, new)
        )
        if before != after:
            lines.append(f"{field}: {_short(before)} in the workdir, {_short(after)} now")
    return lines


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def refuse_published(folder: Path, field: str) -> None:
    """Raises UserError for the folder of a published model, imported or not: a run trains a model
    that its own config describes, on tokens of its own.

    Args:
      folder: that a run is to be in, or to start from.
      field: what named it.
    """
    try:
        published = "model_type" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return
    if published:
        raise UserError(
            f"{field}={folder}: a published model, which training does not start from",
            allowed="the --workdir of a run of efficient-vlm train",
            fix="fine-tune it in Python: evlm.from_pretrained(...), see docs/published_models.md",
        )


def check_workdir_config(
    workdir: str | os.PathLike[str], config: Mapping[str, Any], *, ignore: Iterable[str] = ()
) -> bool:
    """Writes `<workdir>/config.json` on first use; later, refuses a config that differs from it.

    As long as nothing was saved, a corrected config replaces the stored one; the tokenizer and the
    record of the base, which may be another's, are made again.

    Args:
      workdir: created if needed.
      config: nested mapping (a ConfigDict's `to_dict()`).
      ignore: dotted fields that may change between runs.

    Returns:
      True on first use.

    Raises:
      UserError: names the differing fields, or config.json cannot be read or written.
    """
    path = Path(workdir) / "config.json"
    refuse_published(path.parent, "--workdir")
    try:
        stored = json.loads(path.read_text())
        if not isinstance(stored, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        _write(path, config)
        return True
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable config ({error})",
            fix="restore it, or use another --workdir",
        ) from None
    lines = compare_config(stored, config, ignore=ignore)
    if lines and not has_steps(path.parent):
        for name in ("tokenizer.json", "base.json"):
            (path.parent / name).unlink(missing_ok=True)
        _write(path, config)
        return True
    if lines:
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise UserError(
            f"--workdir={workdir} belongs to another config: {'; '.join(lines[:3])}{more}",
            fix="use another --workdir, or the values of its config.json",
        )
    return False


def has_steps(workdir: Path) -> bool:
    """Whether a run has saved anything, even if its steps were moved away since."""
    folder = workdir / "checkpoints"
    if (workdir / "results.json").exists() or any(folder.glob("[0-9]*")):
        return True
    try:
        index = read_index(folder)
    except Damaged:
        return True
    return index is not None and bool(index["steps"] or index["damaged"])


def _write(path: Path, config: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(config), indent=2, sort_keys=True)
        write_atomic(path, (text + "\n").encode())
    except OSError as error:
        raise UserError(
            f"--workdir={path.parent}: cannot be written ({error.strerror or error})",
            fix="choose another --workdir",
        ) from None


def read_run_config(workdir: Path) -> ml_collections.ConfigDict:
    """The config that a run was made with; its own methods are imported (`import_of_run`)."""
    path = workdir / "config.json"
    refuse_published(workdir, "--workdir")
    if not path.is_file():
        raise UserError(
            f"--workdir={workdir}: no run there", fix="train first: efficient-vlm train"
        )
    try:
        stored = json.loads(path.read_text())
        if not isinstance(stored, dict):
            raise ValueError("no sections")
        config = ml_collections.ConfigDict(stored)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        problem = f"{path}: not a readable config ({first_line(error)})"
        raise UserError(problem, fix="restore it") from None
    import_of_run(stored, workdir)
    return config
