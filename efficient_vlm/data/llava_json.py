"""LLaVA-style files: rows {"id", "image", "conversations": [{"from": "human", "value": ...}, ...]}.

A file is a JSON list or JSON lines. "image" is a path, a list of paths, or absent; paths are
relative to the folder of the file. "<image>" markers are removed from the text: images always come
before the text. The fingerprint covers the file only: pictures are read when they are needed, so a
picture that is replaced under its old name is not noticed.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from efficient_vlm.data.records import Conversation, Record
from efficient_vlm.errors import UserError
from efficient_vlm.processing import decode_image as images
from efficient_vlm.processing.decode_image import BadRecord

MARKER = "<image>"
DEFAULT_TASK = "conversation"
_USER = ("human", "user")
_ASSISTANT = ("gpt", "assistant")
_MAX_TRAINING_TEXTS = 50_000  # Rows that the tokenizer learns from.


class LlavaSource:
    """Random access to the rows of one file, kept as compact JSON in memory.

    Without an `eval_path`, rows are split by image: those whose images have the smallest hashes
    (at least one image, if there are two) are for testing, so the splits share no image.

    Args:
      path: the JSON or JSONL file.
      split: "train" or "test"; only matters with a `test_fraction`.
      test_fraction: share of the images held out; 0 takes all rows for either split.
      max_bytes: largest image file.

    Raises:
      UserError: no such file, not JSON, or no rows.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "train",
        test_fraction: float = 0.0,
        max_bytes: int = images.MAX_BYTES,
    ):
        self.path = Path(path).expanduser()
        self._max_bytes = max_bytes
        rows, digest = _read(self.path)
        self.tasks = tuple(sorted({_task(_parse(row)) for row in rows}))
        self._numbers = list(range(len(rows)))
        if test_fraction:
            keys = _groups(rows)
            held_out = _held_out(keys, test_fraction)
            self._numbers = [i for i in self._numbers if (keys[i] in held_out) == (split == "test")]
        self._rows = [rows[i] for i in self._numbers]
        self.fingerprint = {
            "dataset": "llava_json 1",
            "content": digest,
            "split": f"{split} {test_fraction:g}" if test_fraction else "all",
        }

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = _parse(self._rows[index])
        name = str(row.get("id", self._numbers[index])) if isinstance(row, dict) else ""
        conversation = Conversation(_turns(row), _task(row))
        folder = self.path.parent
        data = [images.read(folder / p, max_bytes=self._max_bytes) for p in _paths(row)]
        meta = {"row": self._numbers[index]}
        return Record(name, tuple(data), (conversation,), meta)

    def texts(self) -> Iterator[str]:
        """Questions and answers, for training a tokenizer."""
        for row in self._rows[:_MAX_TRAINING_TEXTS]:
            try:
                for user, assistant in _turns(_parse(row)):
                    yield user
                    yield assistant
            except BadRecord:
                continue


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
    text = data.removeprefix(b"\xef\xbb\xbf").strip()
    if text.startswith(b"["):
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"data.path: {path} is not valid JSON ({error})",
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


def _paths(row: dict[str, Any]) -> list[str]:
    """Image paths of a row: "image" (or "images") is a string, a list of strings, or absent."""
    value = row.get("image", row.get("images"))
    if value is None or value == "":
        return []
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(p, str) and p for p in paths):
        raise BadRecord("malformed", f"image is {value!r:.80}")
    return paths


def _turns(row: dict[str, Any] | None) -> tuple[tuple[str, str], ...]:
    """Pairs of (user, assistant) text; system text goes before the first question.

    Raises:
      BadRecord: "malformed" for another structure, "no_label" without any answer.
    """
    turns = row.get("conversations") if row else None
    if not isinstance(turns, list) or not turns:
        raise BadRecord("malformed", "no list of conversations")
    pairs, asked = [], []
    for turn in turns:
        who = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        said = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(who, str) or not isinstance(said, str):
            raise BadRecord("malformed", f"turn is {turn!r:.80}")
        if who in _ASSISTANT:
            pairs.append(("\n".join(asked), without_markers(said)))
            asked = []
        elif who in _USER or who == "system":
            asked.append(without_markers(said))
        else:
            raise BadRecord("malformed", f"turn from {who!r:.80}")
    if not any(answer for _, answer in pairs):
        raise BadRecord("no_label")
    return tuple(pairs)


def without_markers(text: str) -> str:
    """Text without "<image>" (even if removing one forms another) and surrounding white space."""
    while MARKER in text:
        text = text.replace(MARKER, "")
    return text.strip()


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
            paths = _paths(row) if row else []
        except BadRecord:
            paths = []
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
