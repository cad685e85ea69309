"""Parameters kept on disk while a checkpoint is being converted, so that a killed import goes on.

Each parameter is a file that is filled through a memory map; a journal names what is in them for
good. Converting holds one tensor at a time; writing the checkpoint then holds the parameters once.
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
_FORMAT = 1  # Of what is kept; another one starts over.


class Stage:
    """A folder of parameters under way; what another checkpoint left there is thrown away.

    Args:
      folder: created if needed.
      identity: what tells this checkpoint from others, see `identity`.
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
            # The journal first: what it says must be true at any moment.
            for leftover in sorted(folder.iterdir(), key=lambda path: path != journal):
                leftover.unlink()
        # The last line may have been half of one.
        write_atomic(journal, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self._journal = journal.open("a")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder.parent}: another import is writing it", fix="wait for it, or stop it"
            ) from None

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
        """The parameter of a name, as far as it was filled."""
        path = self.folder / name.replace("/", ".")
        size = math.prod(shape) * dtype.itemsize
        there = path.exists() and path.stat().st_size == size
        if not there:
            self._done = {part: of for part, of in self._done.items() if of != name}
        array = np.memmap(path, dtype, "r+" if there else "w+", shape=shape)
        if not there:
            fsync_directory(self.folder)
        return array

    def is_done(self, part: str) -> bool:
        """Whether a part is on the disk."""
        return part in self._done

    def done(self, part: str, name: str, array: np.memmap) -> None:
        """Says that a part of the parameter `name` is complete, once it is on the disk."""
        array.flush()
        self._journal.write(json.dumps({"part": part, "of": name}) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._done[part] = name

    def remove(self) -> None:
        """Deletes the folder; arrays that were given out stay readable while they are held."""
        self._journal.close()
        shutil.rmtree(self.folder)


def identity(files: Sequence[Path]) -> str:
    """A digest of where files are and when they were changed: another one if any of them was.

    Of the inode, too: times alone may have been made equal on purpose.
    """
    stats = []
    for path in files:
        found = path.stat()
        times = found.st_mtime_ns, found.st_ctime_ns
        stats.append((str(path.resolve()), found.st_ino, found.st_size, *times))
    return hashlib.sha256(json.dumps([_FORMAT, stats]).encode()).hexdigest()


def _lines(journal: Path) -> list[dict[str, str]]:
    """Lines of a journal up to the first that is damaged."""
    found = []
    for line in journal.read_text(errors="replace").splitlines() if journal.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or set(row) not in ({"identity"}, {"part", "of"}):
            break
        found.append(row)
    return found
