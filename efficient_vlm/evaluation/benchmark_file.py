"""Benchmarks from files: JSON lines, JSON, CSV, TSV or Parquet, in the layouts that people have.

A row is a question (`question`, `query`, ...) with its references (`answers`, `answer`, `label`,
...), pictures (`image`, `images`, `image_1`, ...: bytes, {"bytes", "path"}, a path, base64 or a
data: URL), options of a multiple choice (`options`, `choices`, or columns A, B, C, ...), a number
and a category; or a conversation (`messages`, `conversations`) whose last answer is the reference;
or `texts`, questions with answers about the same pictures. Columns are found by their names and
told; `columns` names others. All rows are held in memory with their pictures.
"""

import collections
import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from efficient_vlm.errors import UserError, short, short_path, unknown
from efficient_vlm.evaluation.benchmark_rows import BenchmarkRow, read_row
from efficient_vlm.evaluation.benchmark_tables import read_table
from efficient_vlm.evaluation.metrics import COLUMNS, find, measure
from efficient_vlm.evaluation.metrics.choice import LETTERS
from efficient_vlm.processing.decode_image import BadRecord

__all__ = ["FIELDS", "Benchmark", "BenchmarkRow", "check_metric", "options_of", "read_benchmark"]

# Field -> names under which files have it, first come first.
FIELDS: dict[str, tuple[str, ...]] = {
    "id": ("question_id", "questionId", "qid", "id", "index", "idx"),
    "question": ("question", "query", "prompt", "instruction", "problem"),
    "references": (
        *("answers", "answer", "references", "reference", "target", "ground_truth", "captions"),
        *("caption", "points", "bbox", "label", "labels"),
    ),
    "image": ("image", "images", "img", "picture", "pictures", "image_path"),
    "options": ("options", "choices"),
    "category": ("category", "subject", "subfield", "question_type", "dataset"),
    "group": (),
    "masks": ("masks", "mask"),
    "messages": ("messages", "conversations"),
    "texts": ("texts",),
}
_NUMBERED = re.compile(r"(?:image|img|picture)_?\d{1,2}")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A file that was read.

    Attributes:
      rows: its questions.
      columns: field -> column that it was read from; several with commas.
      skipped: rows that could not be used, by reason (`data.records.REASONS`).
      total: rows that were looked at.
      path, sha256: of the file.
    """

    rows: tuple[BenchmarkRow, ...]
    columns: Mapping[str, str]
    skipped: Mapping[str, int]
    total: int
    path: Path
    sha256: str


def read_benchmark(
    path: str | os.PathLike,
    *,
    columns: Mapping[str, str] | None = None,
    image_folder: str | os.PathLike | None = None,
    question: str | None = None,
    limit: int | None = None,
) -> Benchmark:
    """Reads a benchmark; rows that cannot be used are left out and counted by reason.

    Args:
      path: .jsonl, .json, .csv, .tsv or .parquet.
      columns: field of FIELDS -> column, where it is not found by its name. A "group" is what
        questions share that count as one for intervals; by default their pictures.
      image_folder: of the pictures that are named by paths, which none may leave; None for that of
        the file.
      question: that of every row, for files of captions and the like.
      limit: read no more questions.

    Raises:
      UserError: no such file, a damaged one, columns that are missing, or no row that can be used.
    """
    path = Path(path).expanduser()
    folder = path.parent if image_folder is None else Path(image_folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"image_folder: no folder {short_path(folder)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit}", allowed="1, 2, 3, ...")
    names, table = read_table(path)
    found = find_columns(names, columns or {})
    if not {"question", "messages", "texts"} & set(found) and question is None:
        raise UserError(
            f"benchmark: no column of questions among {_listed(names)}",
            allowed=", ".join((*FIELDS["question"], *FIELDS["messages"], *FIELDS["texts"])),
            fix="name it: --columns=question=NAME; or give one for all rows: --question=TEXT",
        )
    rows: list[BenchmarkRow] = []
    skipped: collections.Counter[str] = collections.Counter()
    total, last = 0, None
    for number, row in enumerate(table):
        total += 1
        try:
            rows += read_row(row, number, found, folder, question)
        except BadRecord as error:
            skipped[error.reason] += 1
            last = error
        if limit is not None and len(rows) >= limit:
            break
    if not rows:
        raise UserError(
            f"benchmark: none of {total} rows of {short_path(path)} can be used",
            allowed=f"columns read: {told(found)}",
            fix=f"the last: {last}" if last else "give a file with rows",
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Benchmark(tuple(rows[:limit]), found, dict(sorted(skipped.items())), total, path, digest)


def find_columns(names: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """Field -> column of a table.

    Args:
      names: of its columns.
      given: field -> column, in place of what is found.

    Raises:
      UserError: an unknown field, or a column that the table has not.
    """
    found: dict[str, str] = {}
    for field, column in given.items():
        if field not in FIELDS:
            raise unknown("columns", field, FIELDS)
        for each in column.split(","):
            if each not in names:
                raise UserError(
                    f"columns: {field} is to be {short(each)}, which the file has not",
                    allowed=_listed(names),
                    fix=f"--columns={field}=NAME",
                )
        found[field] = column
    for field, known in FIELDS.items():
        column = next((name for name in known if name in names), None)
        if field not in found and column is not None:
            found[field] = column
    if "image" not in found and (
        numbered := sorted(filter(_NUMBERED.fullmatch, names), key=_number)
    ):
        found["image"] = ",".join(numbered)
    lettered = [letter for letter in LETTERS if letter in names]
    if "options" not in found and lettered[:2] == ["A", "B"]:
        found["options"] = ",".join(lettered)
    if "texts" in found or "messages" in found:
        found = _of_conversations(found, given)
    return found


def _of_conversations(found: dict[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """The one of a question's columns and a conversation's that counts, where a table has both."""
    if "question" in found and "references" in found and not {"texts", "messages"} & set(given):
        return {k: v for k, v in found.items() if k not in ("texts", "messages")}
    return {k: v for k, v in found.items() if k not in ("question", "references") or k in given}


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name))


def _listed(names: list[str]) -> str:
    shown = ", ".join(short(name, 40).strip("'") for name in names[:20])
    return f"{shown}, ..." if len(names) > 20 else shown or "none"


def told(columns: Mapping[str, str]) -> str:
    """Columns in words: "question from query, image from image"."""
    return ", ".join(f"{field} from {column}" for field, column in columns.items()) or "none"


# ---- metrics -------------------------------------------------------------------------------------


def options_of(name: str, row: BenchmarkRow) -> dict[str, object]:
    """What a metric reads of a row beside its references."""
    taken = set(find(name).options) & set(COLUMNS)
    return {field: getattr(row, field) for field in taken}


def check_metric(name: str, benchmark: Benchmark) -> None:
    """Raises UserError where a metric cannot score the rows of a file, before anything runs."""
    metric = find(name)
    for needed in metric.needs:
        fields = needed.split(" or ")
        if not any(any(getattr(row, field) for field in fields) for row in benchmark.rows):
            raise UserError(
                f"{name}: no column of {needed} in {short_path(benchmark.path)}",
                allowed=f"{told(benchmark.columns)}; {fields[0]} is found as "
                f"{', '.join(FIELDS[fields[0]])}",
                fix=f"name it: --columns={fields[0]}=NAME; or choose another metric",
            )
    if metric.corpus is not None:
        return
    for row in benchmark.rows:
        try:
            measure(name, "", row.references, **options_of(name, row))
        except UserError as error:
            problem, *more = str(error).splitlines()
            parts = dict(line.strip().split(": ", 1) for line in more)
            problem = f"{name}: row {short(row.id, 40)}: {problem.removeprefix(f'{name}: ')}"
            raise UserError(problem, **parts) from None
