"""LLaVA-style files: rows {"id", "image", "conversations": [{"from": "human", "value": ...}, ...]}.

A file is a JSON list or JSON lines; what a row may hold: `llava_rows`. The fingerprint covers the
file only: pictures are read when they are needed, so a picture that is replaced under its old name
is not noticed.
"""

import codecs
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from efficient_vlm.data.llava_rows import absent, pictures_of, read_row
from efficient_vlm.data.records import Conversation, Record
from efficient_vlm.errors import UserError, first_line, short
from efficient_vlm.processing import decode_image as images
from efficient_vlm.processing.decode_image import BadRecord
from efficient_vlm.processing.picture_bytes import is_address, picture_bytes

DEFAULT_TASK = "conversation"
_MAX_TRAINING_TEXTS = 50_000  # Rows that the tokenizer learns from.


class LlavaSource:
    """Random access to the rows of one file, kept as compact JSON in memory.

    Without an `eval_path`, rows are split by image: those whose images have the smallest hashes
    (at least one image, if there are two) are for testing, so the splits share no image.

    Args:
      path: the JSON or JSONL file.
      split: "train" or "test"; only matters with a `test_fraction`.
      test_fraction: share of the images held out; 0 takes all rows for either split.
      pictures: folder of the pictures, which no path may leave; None for that of the file.
      max_bytes: largest image file.

    Attributes:
      placed: whether any row of the file has a picture behind some of its text.

    Raises:
      UserError: no such file or folder, not JSON, or no rows.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "train",
        test_fraction: float = 0.0,
        pictures: str | Path | None = None,
        max_bytes: int = images.MAX_BYTES,
    ):
        self.path = Path(path).expanduser()
        self._folder = Path(pictures).expanduser() if pictures else self.path.parent
        if not self._folder.is_dir():
            raise UserError(
                f"data.images: no folder {self._folder}", fix="--config.data.images=DIR"
            )
        self._max_bytes = max_bytes
        rows, digest = _read(self.path)
        self.placed = any(map(_placed, rows))
        self.tasks = tuple(sorted({_task(_parse(row)) for row in rows}))
        self._numbers = list(range(len(rows)))
        if test_fraction:
            keys = _groups(rows)
            held_out = _held_out(keys, test_fraction)
            self._numbers = [i for i in self._numbers if (keys[i] in held_out) == (split == "test")]
        self._rows = [rows[i] for i in self._numbers]
        self.fingerprint = {
            "dataset": "llava_json 2",
            "content": digest,
            "split": f"{split} {test_fraction:g}" if test_fraction else "all",
        }

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = _parse(self._rows[index])
        found = read_row(row)
        name = row.get("id")
        name = str(self._numbers[index] if absent(name) else name)
        conversation = Conversation(found.turns, _task(row), found.places)
        data = [self._picture(picture) for picture in found.pictures]
        return Record(name, tuple(data), (conversation,), {"row": self._numbers[index]})

    def _picture(self, given: str) -> bytes:
        """Bytes of a picture that a row names."""
        if is_address(given) and not given.lower().startswith("file:"):
            return picture_bytes(given, max_bytes=self._max_bytes)
        if "\0" in given:
            raise images.BadImage("missing", short(given))
        # By the letters of the path: what links in the folder point at is up to its owner.
        folder = os.path.abspath(self._folder)
        path = Path(os.path.normpath(os.path.join(folder, given)))
        if not path.is_relative_to(folder):
            raise images.BadImage("outside", short(given))
        return images.read(path, max_bytes=self._max_bytes)

    def texts(self) -> Iterator[str]:
        """Questions and answers, for training a tokenizer."""
        for row in self._rows[:_MAX_TRAINING_TEXTS]:
            try:
                for user, assistant in read_row(_parse(row)).turns:
                    yield user
                    yield assistant
            except BadRecord:
                continue


def _placed(row: bytes) -> bool:
    try:
        return bool(read_row(_parse(row)).places)
    except BadRecord:
        return False


def _read(path: Path) -> tuple[list[bytes], str]:
    """(rows, SHA-256 of the file). Rows that are not JSON objects are skipped and counted later."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"data.path: cannot read {path} ({error.strerror or error})",
            fix="give a JSON or JSONL file: --config.data.path=my.json",
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # PowerShell's ">".
        data = data.decode("utf-16", "replace").encode("utf-8", "replace")
    text = data.removeprefix(codecs.BOM_UTF8).strip()
    if text.startswith(b"["):
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"data.path: {path} is not valid JSON ({first_line(error)})",
                allowed="a JSON list of rows, or one JSON object a line",
                fix="correct the file there",
            ) from error
        rows = [json.dumps(item).encode() for item in items]
    else:
        rows = [line for line in text.splitlines() if line.strip()]
    if not rows:
        raise UserError(f"data.path: {path} has no rows", fix="give a file with at least one row")
    if all(_parse(row) is None for row in rows):
        raise UserError(
            f"data.path: no line of {path} is a JSON object",
            allowed="a JSON list of rows, or one JSON object a line",
            fix='rows look like {"id": "1", "image": "a.png", "conversations": [...]}',
        )
    return rows, digest


def _parse(row: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(row)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _task(row: dict[str, Any] | None) -> str:
    task = row.get("task") if row else None
    return task if isinstance(task, str) and task else DEFAULT_TASK


def _groups(rows: Iterable[bytes]) -> list[bytes]:
    """A hash per row, equal for rows that are connected by shared images.

    A row without images is its own group.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    names = []
    for raw in rows:
        row = _parse(raw)
        try:
            paths = pictures_of(row)[0] if row else []
        except BadRecord:
            paths = []
        # One picture in two spellings ("a.png", "./a.png") is one.
        paths = [path if is_address(path) else os.path.normpath(path) for path in paths]
        for path in paths[1:]:
            first, other = sorted((root(paths[0]), root(path)))
            parent[other] = first
        names.append(paths[0] if paths else None)
    keys = (raw if name is None else root(name) for raw, name in zip(rows, names, strict=True))
    texts = (k if isinstance(k, bytes) else b"\0" + k.encode("utf-8", "replace") for k in keys)
    return [hashlib.sha256(text).digest() for text in texts]


def _held_out(keys: Iterable[bytes], fraction: float) -> set[bytes]:
    groups = sorted(set(keys))  # They are hashes, so sorting shuffles.
    number = max(1, math.floor(len(groups) * fraction)) if len(groups) > 1 else 0
    return set(groups[:number])
