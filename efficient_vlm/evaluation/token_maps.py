"""Token maps of example questions, as arrays in a workdir: which patches each method kept.

`maps/maps.json` says what was asked and answered; `maps/00.npz`, `maps/01.npz`, ... hold the image
of each question and what every method made of its patches. The report draws them. NumPy alone
writes and reads these files.
"""

import dataclasses
import json
import math
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.errors import UserError, first_line
from efficient_vlm.evaluation.answers import is_right

_MAX_BYTES = 256 << 20  # Of the arrays of one question, as their file announces them.
_MAX_TOKENS = 1 << 20  # Of one question.


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one method made of one question.

    Attributes:
      compressor: name of the method.
      budget: its number of visual tokens.
      source: int [N], for every patch of the grid (row-major) the token holding it, -1 dropped.
      prediction: the generated answer.
      grid: (rows, columns) with rows * columns = N; None for a square grid.
      scores: float [N] or None, one number per patch, see `evaluation.heat`.
      meaning: what the scores are.
    """

    compressor: str
    budget: int
    source: np.ndarray
    prediction: str
    grid: tuple[int, int] | None = None
    scores: np.ndarray | None = None
    meaning: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """One question about one image [H, W, 3] uint8, and what each method made of it."""

    image: np.ndarray
    question: str
    answer: str
    cells: Sequence[Cell]
    task: str = ""
    record: int = -1


def write_maps(workdir: str | os.PathLike, examples: Sequence[Example]) -> Path:
    """Writes `maps/*.npz` and `maps/maps.json`, replacing those of an earlier evaluation.

    Args:
      workdir: of the run; made if missing.
      examples: a handful of questions; the report shows them all.

    Returns:
      The path of `maps.json`: a list of {"question", "answer", "task", "record", "arrays", "maps":
      [{"compressor", "budget", "prediction", "correct", "tokens", "grid", "meaning"}]}. "arrays" is
      an npz file beside it with "image" uint8 [H, W, 3] and, for map number k, "source_k" int32 [N]
      and, where the method has any, "scores_k" float [N]. See `Example` and `Cell`.
    """
    folder = Path(workdir) / "maps"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    listing = []
    for number, example in enumerate(examples):
        arrays = {"image": np.asarray(example.image)}
        for k, cell in enumerate(example.cells):
            arrays[f"source_{k}"] = np.asarray(cell.source, np.int32).reshape(-1)
            if cell.scores is not None:
                arrays[f"scores_{k}"] = np.asarray(cell.scores).reshape(-1)
        np.savez_compressed(folder / f"{number:02d}.npz", **arrays)
        listing.append(
            {
                "question": example.question,
                "answer": example.answer,
                "task": example.task,
                "record": int(example.record),
                "arrays": f"{number:02d}.npz",
                "maps": [_row(cell, example.answer) for cell in example.cells],
            }
        )
    path = folder / "maps.json"
    path.write_text(json.dumps(listing, indent=1), encoding="utf-8")
    return path


def _row(cell: Cell, answer: str) -> dict[str, Any]:
    """A map in `maps.json`."""
    source = np.asarray(cell.source)
    return {
        "compressor": cell.compressor,
        "budget": int(cell.budget),
        "prediction": cell.prediction,
        "correct": is_right(cell.prediction, answer),
        "tokens": int(np.unique(source[source >= 0]).size),
        "grid": None if cell.grid is None else list(map(int, cell.grid)),
        "meaning": cell.meaning,
    }


def read_maps(
    workdir: str | os.PathLike, *, damaged: Callable[[UserError], None] | None = None
) -> list[Example]:
    """The examples that `write_maps` left in a workdir; [] where there are none.

    Args:
      workdir: of the run.
      damaged: receives the error of a part that cannot be used, which is then left out; None
        raises it.

    Raises:
      UserError: what cannot be read, or maps of a version that stored pictures.
    """
    path, examples = Path(workdir) / "maps" / "maps.json", []
    if not path.exists():
        return []
    try:
        listing = _read_json(path)
    except UserError as error:
        if damaged is None:
            raise
        damaged(error)
        return []
    for entry in listing:
        try:
            examples.append(_read_example(path, entry))
        except UserError as error:
            if damaged is None:
                raise
            damaged(error)
    return examples


def _read_json(path: Path) -> list[Any]:
    try:
        listing = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read ({first_line(error)})") from None
    if not isinstance(listing, list):
        raise UserError(f"{path.name} does not hold a JSON list")
    return listing


def _read_example(path: Path, entry: Any) -> Example:
    """One entry of `maps.json`, with its arrays."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("maps"), list):
        raise UserError(f"{path.name}: an entry without maps")
    name = entry.get("arrays")
    if name is None and "image" in entry:
        raise UserError(
            f"{path.name}: its maps are pictures of an earlier version, without arrays",
            fix="train again with the same --workdir: a finished run is evaluated anew",
        )
    if not isinstance(name, str) or name != Path(name).name:
        raise UserError(f"{path.name}: arrays {name!r:.60}", allowed="a file beside it")
    arrays = _read_arrays(path.parent / name)
    try:
        image = arrays["image"]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"image: {image.dtype} {image.shape}")
        return Example(
            image=image,
            question=str(entry.get("question", "")),
            answer=str(entry.get("answer", "")),
            cells=[_read_cell(k, row, arrays) for k, row in enumerate(entry["maps"])],
            task=str(entry.get("task") or ""),
            record=int(entry.get("record", -1)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path.name}, {name}: {first_line(error)}") from None


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file, whose sizes are looked at before any of them is read."""
    try:
        with zipfile.ZipFile(path) as file:
            announced = sum(part.file_size for part in file.infolist())
        if announced > _MAX_BYTES:
            raise UserError(f"{path.name}: {announced:,} bytes", allowed=f"up to {_MAX_BYTES:,}")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path.name} cannot be read ({first_line(error)})") from None


def _read_cell(number: int, row: Any, arrays: Mapping[str, np.ndarray]) -> Cell:
    """One map; KeyError, TypeError, ValueError or AttributeError for what is none."""
    source, scores = arrays[f"source_{number}"], arrays.get(f"scores_{number}")
    whole = source.dtype.kind in "iu" and source.ndim == 1 and source.size
    if not whole or source.min() < -1 or source.max() >= _MAX_TOKENS:
        raise ValueError(f"source_{number} holds no numbers of tokens")
    if scores is not None and (scores.dtype.kind not in "fiu" or scores.shape != source.shape):
        raise ValueError(f"scores_{number} holds no number for each patch")
    rows, columns = row.get("grid") or (math.isqrt(source.size),) * 2
    if int(rows) * int(columns) != source.size:
        raise ValueError(f"grid: {rows} x {columns} for {source.size} patches")
    return Cell(
        compressor=str(row.get("compressor")),
        budget=int(row["budget"]),
        source=source,
        prediction=str(row.get("prediction") or ""),
        grid=(int(rows), int(columns)),
        scores=scores,
        meaning=str(row.get("meaning") or ""),
    )
