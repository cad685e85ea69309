"""What a teacher says of every target of a data set, kept by conversation, and put into batches.

Teacher and student write a conversation in their own ways: other templates, other numbers of places
for pictures. They share the turns of the assistant, so a target is found by its conversation, its
turn, and its place in the turn; it has a teacher as long as all targets of the turn up to it are
the same tokens. A target is 12 + 8 K bytes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.errors import UserError, short
from efficient_vlm.files import file_digest, fsync_tree, write_atomic
from efficient_vlm.models.inputs import NO_LABEL, ModelInputs
from efficient_vlm.models.taught import TopTokens

__all__ = ["Key", "Taught", "records_of", "turns_of"]

# A conversation: the number of its sample in the source, and its own number in the sample.
Key = tuple[int, int]
_ABOUT, _INDEX, _RECORDS = "teacher.json", "index.npy", "targets.bin"
# A distribution that leaves nothing for other tokens: its logarithm times 0 would be NaN.
_NOTHING = -1e4


class Taught:
    """Distributions of a teacher by conversation.

    Args:
      index: int64 [conversations, 4], a key, and the first and the end of its targets in `records`.
      records: [targets], see `record_type`.
    """

    def __init__(self, index: np.ndarray, records: np.ndarray):
        self._index = index[np.lexsort((index[:, 1], index[:, 0]))]
        self._samples = self._index[:, 0]
        self._records = records

    def __len__(self) -> int:
        """Targets."""
        return len(self._records)

    @property
    def conversations(self) -> int:
        """How many there are."""
        return len(self._index)

    def _of(self, key: Key) -> np.ndarray:
        """The records of a conversation; none where the teacher has not read it."""
        first, stop = (np.searchsorted(self._samples, key[0], side) for side in ("left", "right"))
        for _, number, start, end in self._index[first:stop]:
            if number == key[1]:
                return self._records[start:end]
        return self._records[:0]

    @classmethod
    def of(cls, found: Iterable[tuple[Key, np.ndarray]], k: int) -> "Taught":
        """In memory, from conversations and their `records_of`."""
        keys, parts = [], [np.zeros(0, record_type(k))]
        for key, records in found:
            keys.append((*key, len(records)))
            parts.append(records)
        return cls(_index(keys), np.concatenate(parts))

    @classmethod
    def write(
        cls,
        folder: Path,
        found: Iterable[tuple[Key, np.ndarray]],
        about: Mapping[str, Any],
    ) -> None:
        """As `of`, into files; without the last of them (`teacher.json`) they are not read.

        Args:
          folder: made if needed.
          found: conversations and their `records_of`.
          about: what they follow from, plain JSON.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _ABOUT).unlink(missing_ok=True)
        keys = []
        with (folder / _RECORDS).open("wb") as file:
            for key, records in found:
                keys.append((*key, len(records)))
                file.write(records.tobytes())
        np.save(folder / _INDEX, _index(keys))
        fsync_tree(folder)
        files = {name: file_digest(folder / name) for name in (_RECORDS, _INDEX)}
        stored = {"about": about, "files": files}
        write_atomic(folder / _ABOUT, (json.dumps(stored, indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path, about: Mapping[str, Any], k: int) -> "Taught | None":
        """What `write` has written, None where it has not; targets stay on disk until needed.

        Raises:
          UserError: it follows from something else, or a file is damaged.
        """
        path = folder / _ABOUT
        if not path.is_file():
            return None
        fix = f"restore what was, take another --workdir, or remove {folder} to ask again"
        try:
            stored = json.loads(path.read_text())
            before, files = dict(stored["about"]), dict(stored["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({short(error)})", fix=fix) from None
        now = json.loads(json.dumps(about))
        changed = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
        if changed:
            was, now = (short(each.get(changed[0]), 60) for each in (before, now))
            raise UserError(
                f"distil: this workdir holds what a teacher said with another {changed[0]}: "
                f"{was}, now {now}",
                fix=fix,
            )
        for name, known in files.items():
            if not (folder / name).is_file() or list(file_digest(folder / name)) != known:
                raise UserError(f"{folder / name}: damaged", fix=f"remove {folder} to ask again")
        index = np.load(folder / _INDEX, allow_pickle=False)
        if not len(index):
            return cls(index, np.zeros(0, record_type(k)))
        return cls(index, np.memmap(folder / _RECORDS, record_type(k), mode="r"))

    def attach(self, inputs: ModelInputs, rows: Sequence[Sequence[Key]]) -> ModelInputs:
        """Inputs with `taught`.

        Args:
          inputs: R rows, NumPy, with labels; the conversations of a row are its segments from 1 on.
          rows: for each row of text its conversations, in order.
        """
        shape, k = inputs.labels.shape, self._records.dtype["tokens"].shape[0]
        log_probs = np.zeros((*shape, k), np.float32)
        tokens, rest = np.full((*shape, k), NO_LABEL, np.int32), np.zeros(shape, np.float32)
        for row, key, turns in _conversations(inputs, rows):
            known = self._of(key)
            starts = np.flatnonzero(np.diff(known["turn"], prepend=-1))
            if len(starts) != len(turns):
                continue
            for places, theirs in zip(turns, np.split(known, starts[1:]), strict=True):
                count = _alike(inputs.labels[row, places], theirs["target"])
                places, theirs = places[:count], theirs[:count]
                log_probs[row, places] = theirs["log_probs"]
                tokens[row, places], rest[row, places] = theirs["tokens"], theirs["rest"]
        return inputs.replace(taught=TopTokens(log_probs, tokens, rest))


def record_type(k: int) -> np.dtype:
    """Of a target: its token (-1 for one that the student does not have), the number of its turn,
    and the fields of `TopTokens`."""
    fields = [("target", "<i4"), ("turn", "<i4"), ("rest", "<f4")]
    return np.dtype([*fields, ("tokens", "<i4", (k,)), ("log_probs", "<f4", (k,))])


def records_of(
    inputs: ModelInputs, rows: Sequence[Sequence[Key]], top: TopTokens, same: np.ndarray
) -> Iterator[tuple[Key, np.ndarray]]:
    """The records of each conversation of a batch of the teacher.

    Args:
      inputs, rows: of the teacher, see `Taught.attach`.
      top: what it says at each place of the text, [R, S, K], NumPy.
      same: bool [vocabulary], ids that mean the same to the student.
    """
    for row, key, turns in _conversations(inputs, rows):
        places = np.concatenate([np.zeros(0, np.int64), *turns])
        records = np.zeros(len(places), record_type(top.tokens.shape[-1]))
        target = inputs.labels[row, places]
        records["target"] = np.where(same[target], target, NO_LABEL)
        records["turn"] = np.repeat(np.arange(len(turns)), [len(turn) for turn in turns])
        for name in ("tokens", "log_probs", "rest"):
            records[name] = getattr(top, name)[row, places]
        records["rest"] = np.maximum(records["rest"], _NOTHING)
        yield key, records


def turns_of(labels: np.ndarray) -> list[np.ndarray]:
    """Places of each run of labels in a row of text: a turn of the assistant."""
    live = np.concatenate([[False], labels != NO_LABEL, [False]])
    starts, stops = np.flatnonzero(live[1:] != live[:-1]).reshape(-1, 2).T
    return [np.arange(a, b) for a, b in zip(starts, stops, strict=True)]


def _conversations(
    inputs: ModelInputs, rows: Sequence[Sequence[Key]]
) -> Iterator[tuple[int, Key, list[np.ndarray]]]:
    """(row, key, turns) of every conversation; no turn reaches into the next conversation, whose
    first token nothing predicts."""
    for row, keys in enumerate(rows):
        for number, key in enumerate(keys, 1):
            own = inputs.segments[row] == number
            yield row, key, turns_of(np.where(own, inputs.labels[row], NO_LABEL))


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    count = min(len(a), len(b))
    return int(np.cumprod(a[:count] == b[:count]).sum())


def _index(keys: Sequence[tuple[int, int, int]]) -> np.ndarray:
    given = np.array(keys, np.int64).reshape(-1, 3)
    stops = np.cumsum(given[:, 2])
    return np.stack([given[:, 0], given[:, 1], stops - given[:, 2], stops], axis=1)
