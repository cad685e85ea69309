"""Records of the rows of a table: which rows belong to a split, and what is in them."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.data.columns import Columns
from efficient_vlm.data.hold_out import groups_of, held_out, picture_key
from efficient_vlm.data.llava_rows import Row, absent, all_pictures, read_row, read_turns
from efficient_vlm.data.records import Conversation, Record
from efficient_vlm.data.tables.base import Table
from efficient_vlm.errors import UserError, closest, short
from efficient_vlm.processing import decode_image as images
from efficient_vlm.processing.decode_image import BadRecord
from efficient_vlm.processing.picture_bytes import is_address, is_base64_picture, picture_bytes

DEFAULT_TASK = "conversation"
SEEN, HELD_OUT = "seen", "held_out"  # Tasks where classes are held out.
MAX_TRAINING_TEXTS = 50_000  # Rows that the tokenizer learns from.
_MAX_PATH = 4096


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the rows of a table are read and split.

    Attributes:
      split: "train" or "test".
      test_fraction: share of the pictures held out; 0 takes all rows for either split.
      pictures: folder of the pictures, which no path may leave; "" for that of the table.
      max_bytes: largest picture file.
      held_out: answers (names of classes) that training never sees; test rows are then grouped
        into the tasks "seen" and "held_out".
      separate_turns: each question with its answer becomes a conversation of its own, where all
        pictures stand in front.
    """

    split: str = "train"
    test_fraction: float = 0.0
    pictures: str | Path = ""
    max_bytes: int = images.MAX_BYTES
    held_out: tuple[str, ...] = ()
    separate_turns: bool = False


class RowSource:
    """Random access to the records of one split of a table; a `sources.Source`.

    With a `test_fraction`, rows are split by picture: those whose pictures have the smallest hashes
    (at least one picture, if there are two) are for testing, so the splits share no picture.

    Args:
      table: raw rows.
      reading: which of them, and how.
      columns: what the columns mean; None where each row says it, as those of JSON files do.
      read: what reads a canonical row of which only the text is needed.

    Raises:
      UserError: no such folder of pictures, or a class to hold out that no row has.
    """

    def __init__(
        self,
        table: Table,
        reading: Reading,
        columns: Columns | None = None,
        read: Callable[[Any], Row] = read_turns,
    ):
        self.table, self._reading, self._columns, self._read = table, reading, columns, read
        self._folder = Path(reading.pictures or table.folder).expanduser()
        if not self._folder.is_dir():
            raise UserError(
                f"data.images: no folder {self._folder}", fix="--config.data.images=DIR"
            )
        self.placed = False
        self.tasks: tuple[str, ...] = ()
        self._numbers = self._scan()
        fraction, split = reading.test_fraction, reading.split
        self.fingerprint = {
            "dataset": table.kind,
            "content": table.digest,
            "split": f"{split} {fraction:g}" if fraction else "all",
        }
        if reading.held_out:
            self.fingerprint["held_out"] = f"{split} {sorted(reading.held_out)}"
        if reading.separate_turns:
            self.fingerprint["turns"] = "separate"
        if columns is not None:
            self.fingerprint["columns"] = columns.meaning

    def _scan(self) -> np.ndarray:
        """Numbers of this split's rows, int64; sets `placed` and `tasks` on the way."""
        fraction, classes = self._reading.test_fraction, set(self._reading.held_out)
        tasks, seen, keep, keys = set(), set(), [], []
        used = self._columns.used if self._columns else ()
        for index, raw in enumerate(self.table.scan(bool(fraction), used)):
            row = self._canonical(raw)
            tasks.add(_task(row))
            answer = None
            try:
                found = self._read(row)
                self.placed |= bool(found.places)
                answer = found.turns[0][1].strip()
            except BadRecord:
                pass
            if classes:
                seen.add(answer)
                keep.append(self._reading.split == "test" or answer not in classes)
            if fraction:
                keys.append(self._keys(index, row))
        self.tasks = (HELD_OUT, SEEN) if classes else tuple(sorted(tasks))
        for name in sorted(classes - seen):
            self._check_class(name, seen)
        numbers = np.arange(len(self.table))
        if fraction:
            groups = groups_of(keys)
            chosen = held_out(groups, fraction)
            test = np.array([group in chosen for group in groups], bool)
            numbers = numbers[test == (self._reading.split == "test")]
        return numbers[np.array(keep, bool)[numbers]] if classes else numbers

    def _check_class(self, name: str, seen: set[str | None]) -> None:
        """A class without a row in this file is fine where the table knows its name."""
        answer = self._columns.answer if self._columns else ""
        known = {*self.table.labels.get(answer, ()), *(each for each in seen if each)}
        if name not in known:
            guess = closest(name, known)
            raise UserError(
                f"data.held_out: no row has the answer {short(name)}",
                allowed=short(sorted(known)),
                fix=f"did you mean {short(guess)}?" if guess else None,
            )

    def _keys(self, index: int, row: Any) -> list[str] | bytes:
        """Names of the pictures of a row; what stands for a row without any."""
        try:
            pictures = all_pictures(row)[0] if isinstance(row, Mapping) else []
        except BadRecord:
            pictures = []
        return [picture_key(picture) for picture in pictures] or self._own_key(index, row)

    def _own_key(self, index: int, row: Any) -> bytes:
        return repr(sorted(row.items())).encode() if isinstance(row, dict) else b"%d" % index

    def _canonical(self, raw: Any) -> Any:
        """The row that `read_row` reads; None for one that cannot be read."""
        try:
            return self._strictly(raw)
        except BadRecord:
            return None

    def _strictly(self, raw: Any) -> Any:
        if isinstance(raw, BadRecord):
            raise raw
        if self._columns is None or not isinstance(raw, Mapping):
            return raw
        return self._columns.row(raw)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        number = int(self._numbers[index])
        row = self._strictly(self.table.row(number))
        found = read_row(row)
        name = row.get("id")
        name = str(number if absent(name) else name)
        data = tuple(self._picture(picture) for picture in found.pictures)
        meta: dict[str, Any] = {"row": number}
        if found.answers:
            meta["answers"] = found.answers
        return Record(name, data, self._conversations(row, found), meta)

    def _conversations(self, row: Any, found: Row) -> tuple[Conversation, ...]:
        task = _task(row)
        if self._reading.held_out:
            task = HELD_OUT if found.turns[0][1].strip() in self._reading.held_out else SEEN
        if self._reading.separate_turns and not found.places:
            return tuple(Conversation((turn,), task, system=found.system) for turn in found.turns)
        return (Conversation(found.turns, task, found.places, found.system),)

    def _picture(self, given: str | bytes) -> bytes:
        """Bytes of a picture that a row names or holds."""
        limit = self._reading.max_bytes
        if isinstance(given, bytes):
            return picture_bytes(given, max_bytes=limit)
        if is_address(given) and not given.lower().startswith("file:"):
            return picture_bytes(given, max_bytes=limit)
        if "\0" in given:
            raise images.BadImage("missing", short(given))
        # By the letters of the path: what links in the folder point at is up to its owner.
        folder = os.path.abspath(self._folder)
        path = Path(os.path.normpath(os.path.join(folder, given[:_MAX_PATH])))
        # `os.path`, as `Path` raises for what is too long for a name.
        if is_base64_picture(given) and (len(given) > _MAX_PATH or not os.path.isfile(path)):
            return picture_bytes(given.encode(), max_bytes=limit)
        if len(given) > _MAX_PATH:
            raise images.BadImage("missing", short(given))
        if not path.is_relative_to(folder):
            raise images.BadImage("outside", short(given))
        return images.read(path, max_bytes=limit)

    def texts(self) -> Iterator[str]:
        """Questions and answers, for training a tokenizer."""
        used = self._columns.used if self._columns else ()
        wanted = np.zeros(len(self.table), bool)
        wanted[self._numbers[:MAX_TRAINING_TEXTS]] = True
        last = int(self._numbers[:MAX_TRAINING_TEXTS][-1]) if len(self) else -1
        for index, raw in enumerate(self.table.scan(False, used)):
            if index > last:
                return
            if not wanted[index]:
                continue
            try:
                found = self._read(self._canonical(raw))
            except BadRecord:
                continue
            flat = Conversation(found.turns, system=found.system).flat()
            yield from (text for turn in flat.turns for text in turn)


def _task(row: Any) -> str:
    task = row.get("task") if isinstance(row, Mapping) else None
    return task if isinstance(task, str) and task else DEFAULT_TASK
