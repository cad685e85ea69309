"""The committed index of a checkpoint directory: recovery, quarantine, retention."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from efficient_vlm import files as manifest
from efficient_vlm.files import Damaged

TEMPORARY = ".tmp-"


class Commits:
    """Which steps of a directory may be used. For `checkpoints.run.Checkpoints` only.

    Args:
      directory: the checkpoint directory; need not exist when `read_only`.
      keep: how many of the newest steps survive a commit.
      keep_every: multiples of this survive as well; None for no such steps.
      warn: receives one line per event.
      read_only: never touch the disk.

    Attributes:
      steps: committed step -> SHA-256 of its manifest (None after the index was rebuilt).
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        keep_every: int | None,
        warn: Callable[[str], None],
        *,
        read_only: bool,
    ):
        self.directory, self.steps = directory, {}
        self._keep, self._keep_every = keep, keep_every
        self._warn, self._read_only = warn, read_only
        self._deleting: list[int] = []
        self._damaged: list[int] = []

    def load(self) -> None:
        """Reads the index again."""
        try:
            index = manifest.read_index(self.directory)
        except Damaged as error:
            if not self._read_only:
                raise
            self._warn(f"{self.directory / str(error)}; reading the step folders instead")
            index = None
        if index is None:
            self.steps, self._deleting, self._damaged = dict.fromkeys(self._folders()), [], []
            return
        self.steps = {int(step): digest for step, digest in index["steps"].items()}
        self._deleting, self._damaged = list(index["deleting"]), list(index["damaged"])

    def recover(self) -> None:
        """Brings the directory into a consistent state, however the last process ended."""
        try:
            index = manifest.read_index(self.directory)
            lost = "missing" if index is None and self._folders() else None
        except Damaged as error:
            index, lost = None, str(error)
            self._set_aside(manifest.INDEX, "damaged")
        if lost:
            # Better than a restart from nothing; each folder is still verified before use.
            self._warn(
                f"{self.directory}: the index is not usable ({lost}), rebuilt from the step folders"
            )
        if index is None:
            self.steps = dict.fromkeys(self._folders())
            self._write()
        self.load()
        for entry in list(self.directory.iterdir()):
            if entry.name.startswith(TEMPORARY):
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name.startswith(f".{manifest.INDEX}."):
                entry.unlink(missing_ok=True)
        # Steps that the index has given up are deleted after the next commit, or once a newer step
        # has been verified. Not now: the step that replaced them may be damaged, and they are then
        # all that is left.
        for step in sorted(set(self._folders()) - self.steps.keys() - set(self._deleting)):
            # Killed between rename and index. Such a step is not used, but not deleted either: it
            # could be a folder that someone moved here by hand.
            name = self._set_aside(str(step), "uncommitted")
            self._warn(f"checkpoint of step {step} was never committed: renamed to {name}")

    def commit(self, step: int, temporary: Path, digest: str) -> None:
        """Renames a finished folder and enters it in the index; undoes both if either fails."""
        final = self.directory / str(step)
        if final.exists():
            self._set_aside(str(step), "uncommitted")
        before = self.steps, self._deleting, self._damaged
        steps = {**self.steps, step: digest}
        newest = sorted(steps)[-self._keep :]
        kept = [s for s in steps if s in newest or (self._keep_every and s % self._keep_every == 0)]
        os.rename(temporary, final)
        try:
            manifest.fsync_directory(self.directory)
            # One write commits the new step and gives up the old ones, whose folders are deleted
            # only afterwards: a kill at any moment leaves a usable step.
            self.steps = {s: steps[s] for s in kept}
            # A step that is reached a second time may have been given up the first time.
            self._deleting = sorted({*self._deleting, *steps} - set(kept))
            self._damaged = []
            self._write()
        except BaseException:
            self.steps, self._deleting, self._damaged = before
            os.rename(final, temporary)
            # The new index may have been written before the failure.
            with contextlib.suppress(OSError):
                self._write()
            raise

    def delete_old(self) -> None:
        """Deletes the folders of steps that the index has given up."""
        for step in self._deleting:
            shutil.rmtree(self.directory / str(step), ignore_errors=True)
        # Folders that could not be deleted stay listed and are tried again.
        self._deleting = self._given_up()

    def newest_verified(self) -> tuple[int | None, bool]:
        """The newest step whose every byte is as written; damaged ones are set aside on the way.

        Returns:
          (step or None, whether any step has been lost to damage).
        """
        lost = bool(self._damaged)
        for step in sorted({*self.steps, *self._given_up()}, reverse=True):
            try:
                manifest.verify(self.directory / str(step), step, self.steps.get(step))
            except Damaged as error:
                if step in self.steps:  # All others are being deleted anyway.
                    lost = True
                    self._quarantine(step, str(error))
                continue
            if not self._read_only:
                if step not in self.steps:
                    self.steps[step] = None
                    self._deleting.remove(step)
                    self._write()
                self.delete_old()
            return step, lost
        if not lost and self.directory.is_dir():
            lost = any(self.directory.glob("[0-9]*.damaged-*"))
        return None, lost

    def _quarantine(self, step: int, reason: str) -> None:
        folder = self.directory / str(step)
        older = max((s for s in {*self.steps, *self._given_up()} if s < step), default=None)
        then = "no older step is left" if older is None else f"falling back to step {older}"
        if self._read_only:
            self._warn(f"checkpoint {folder} is damaged ({reason}); {then}")
            return
        name = self._set_aside(str(step), "damaged") if folder.exists() else "nothing"
        del self.steps[step]
        self._damaged.append(step)
        self._write()
        self._warn(f"checkpoint {folder} is damaged ({reason}), renamed to {name}; {then}")

    def _given_up(self) -> list[int]:
        """Steps that the index has given up and whose folders still exist."""
        return [step for step in self._deleting if (self.directory / str(step)).exists()]

    def _folders(self) -> list[int]:
        """Steps that have a folder, committed or not."""
        if not self.directory.is_dir():
            return []
        names = [entry.name for entry in self.directory.iterdir()]
        return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)

    def _write(self) -> None:
        manifest.write_index(self.directory, self.steps, self._deleting, self._damaged)

    def _set_aside(self, name: str, word: str) -> str:
        number = 1
        while (self.directory / f"{name}.{word}-{number}").exists():
            number += 1
        target = f"{name}.{word}-{number}"
        (self.directory / name).rename(self.directory / target)
        manifest.fsync_directory(self.directory)
        return target
