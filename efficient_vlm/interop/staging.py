"""Parameters kept on disk while a checkpoint is being converted, so that a killed import goes on.

Each parameter is a file that is filled through a memory map; a journal names what is in them for
good. The host then holds one tensor at a time, however large the model.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from efficient_vlm.train.manifest import fsync_directory

_JOURNAL = "journal.jsonl"


class Stage:
    """A folder of parameters under way; what another checkpoint left there is thrown away.

    Args:
      folder: created if needed.
      identity: what tells this checkpoint from others, see `identity`.
    """

    def __init__(self, folder: Path, identity: str):
        self.folder, self._done = folder, set()
        head = json.dumps({"identity": identity}) + "\n"
        journal = folder / _JOURNAL
        # The last line may be half of one.
        lines = journal.read_text().splitlines(keepends=True) if journal.is_file() else []
        lines = [line for line in lines if line.endswith("\n")]
        if lines[:1] == [head]:
            self._done = {json.loads(line)["part"] for line in lines[1:]}
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            lines = [head]
        journal.write_text("".join(lines))
        self._journal = journal.open("a")
        fsync_directory(folder)

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
        """The parameter of a name, as far as it was filled."""
        path = self.folder / name.replace("/", ".")
        return np.memmap(path, dtype, "r+" if path.exists() else "w+", shape=shape)

    def is_done(self, part: str) -> bool:
        """Whether a part is on the disk."""
        return part in self._done

    def done(self, part: str, array: np.memmap) -> None:
        """Says that a part of `array` is complete, once it is on the disk."""
        array.flush()
        self._journal.write(json.dumps({"part": part}) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._done.add(part)

    def remove(self) -> None:
        """Deletes the folder; arrays that were given out stay readable while they are held."""
        self._journal.close()
        shutil.rmtree(self.folder)


def identity(files: Sequence[Path]) -> str:
    """A digest of names, sizes and times of files: another one if any of them was changed."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()
