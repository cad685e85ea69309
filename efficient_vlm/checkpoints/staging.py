"""Parameters kept on disk while a checkpoint is being converted, so that a killed import resumes.

Each parameter is a file that is filled through a memory map; a journal lists the parts that are
complete on the disk. Converting holds one tensor in memory at a time.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.files import fsync_directory, write_atomic

_JOURNAL = "journal.jsonl"
_FORMAT = 1  # Of the files; another number starts the import over.


class StagingArea:
    """A folder of partly converted parameters; those of another checkpoint are deleted.

    Args:
      folder: created if needed.
      identity: of the published checkpoint, see `identity`.
    """

    def __init__(self, folder: Path, identity: str):
        self.folder, self._done = folder, {}
        folder.mkdir(parents=True, exist_ok=True)
        journal = folder / _JOURNAL
        head = {"identity": identity}
        lines = _lines(journal)
        if lines[:1] == [head]:
            self._done = {line["part"]: line["of"] for line in lines[1:]}
        else:
            lines = [head]
            # The journal is deleted first: it must be true at any moment.
            for leftover in sorted(folder.iterdir(), key=lambda path: path != journal):
                leftover.unlink()
        # Rewritten because the last line may be incomplete.
        write_atomic(journal, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self._journal = journal.open("a")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder.parent}: another import is writing here", fix="wait for it, or stop it"
            ) from None

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
        """The parameter `name`, memory-mapped, filled as far as the last import got."""
        path = self.folder / name.replace("/", ".")
        size = math.prod(shape) * dtype.itemsize
        exists = path.exists() and path.stat().st_size == size
        if not exists:
            self._done = {part: of for part, of in self._done.items() if of != name}
        array = np.memmap(path, dtype, "r+" if exists else "w+", shape=shape)
        if not exists:
            fsync_directory(self.folder)
        return array

    def is_done(self, part: str) -> bool:
        """Whether a part is complete on the disk."""
        return part in self._done

    def done(self, part: str, name: str, array: np.memmap) -> None:
        """Flushes a part of the parameter `name` to the disk, then lists it as complete."""
        array.flush()
        self._journal.write(json.dumps({"part": part, "of": name}) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._done[part] = name

    def remove(self) -> None:
        """Deletes the folder; arrays in use stay readable."""
        self._journal.close()
        shutil.rmtree(self.folder)


def identity(files: Sequence[Path]) -> str:
    """A digest of the files' paths, sizes and times, which changes when any of them changes.

    The inode is included because times can be set by hand.
    """
    stats = []
    for path in files:
        status = path.stat()
        times = status.st_mtime_ns, status.st_ctime_ns
        stats.append((str(path.resolve()), status.st_ino, status.st_size, *times))
    return hashlib.sha256(json.dumps([_FORMAT, stats]).encode()).hexdigest()


def _lines(journal: Path) -> list[dict[str, str]]:
    """Lines of a journal up to the first damaged one."""
    rows = []
    for line in journal.read_text(errors="replace").splitlines() if journal.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or set(row) not in ({"identity"}, {"part", "of"}):
            break
        rows.append(row)
    return rows
