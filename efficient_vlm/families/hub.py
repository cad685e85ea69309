"""Names on a hub: "org/name" becomes a folder with the files of that model.

The library `huggingface_hub` does the downloading, with its cache (`HF_HOME`), its tokens, its
endpoint (`HF_ENDPOINT`) and its `HF_HUB_OFFLINE`. Settings come first and then only the weights
that are read: no pickles, no code, nothing in subfolders, no second copy in another format.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from efficient_vlm import __version__
from efficient_vlm.checkpoints import foreign
from efficient_vlm.checkpoints.safetensors_index import INDEX, SINGLE, read_index
from efficient_vlm.errors import UserError, closest, short, short_path
from efficient_vlm.families.hub_errors import explained

# What a model needs beside its weights: settings, tokenizer, chat templates, and the licence.
SETTINGS = (
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"),
    *("README.md", "LICENSE*", "NOTICE*"),
)
# Patterns of the library cross folders.
NEVER = ("*/*", "*.py", "*.bin", "*.pt", "*.pth")
# The record of an imported model (`imported.import_model`).
RECORD = "source.json"
README = "README.md"
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHED = re.compile(r"models--(.+?)--(.+)")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model came from.

    Attributes:
      directory: with its files; those of a hub lie in the library's cache.
      name: "org/name" on a hub, None where only the folder is known.
      revision: that was asked for (a branch, a tag, a commit), None for the default.
      commit: hash of the files' commit, 40 hex digits.
    """

    directory: Path
    name: str | None = None
    revision: str | None = None
    commit: str | None = None

    def record(self, folder: Path) -> None:
        """Writes what a hub knows of it into a folder, for `of_folder`; nothing for a folder."""
        if self.name is not None:
            fields = {"name": self.name, "revision": self.revision, "commit": self.commit}
            (folder / RECORD).write_text(json.dumps(fields, indent=1) + "\n")


def resolve(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The path of a model, which is downloaded if a name on a hub is given; see `find`."""
    return find(name_or_path, revision).directory


def find(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Where a model is; one on a hub is downloaded, or found in the cache of earlier downloads.

    Args:
      name_or_path: what exists on the disk, looks like a path (begins with ".", "/" or "~") or is
        no text is a path; other "org/name" are names on a hub. A folder comes before a name.
      revision: branch, tag or commit on the hub; None for the default branch.

    Raises:
      UserError: a name that leads nowhere or to no safetensors, a model that may not be read, no
        network, or a revision of a folder.
    """
    if revision is not None and not isinstance(revision, str):
        raise UserError(f"revision: {short(revision)}", allowed="a branch, a tag or a commit")
    if is_name(name_or_path):
        return _download(str(name_or_path), revision or None)
    path = Path(os.path.expanduser(name_or_path))
    if revision is not None:
        exists = os.path.lexists(path)
        raise UserError(
            f"revision: {short(revision)}, but {short_path(path)} is "
            + ("on the disk, which comes before a hub" if exists else "a path, not a name"),
            allowed='a revision of a model on a hub, "org/name"',
            fix="leave the revision out, or start in another folder" if exists else None,
        )
    folder = path if os.path.isdir(path) else path.parent
    return dataclasses.replace(of_folder(folder), directory=path)


def is_name(name_or_path: object) -> bool:
    """Whether this names a model on a hub: "org/name", and nothing of that name is on the disk."""
    if not isinstance(name_or_path, str) or len(name_or_path) > 96:
        return False
    if name_or_path.endswith((".safetensors", ".json")) or os.path.lexists(name_or_path):
        return False
    return _NAME.fullmatch(name_or_path) is not None


def of_folder(folder: Path) -> Source:
    """What a folder says of where it came from: the cache of a hub by its layout, an import by its
    record.
    """
    folder = Path(os.path.abspath(folder))
    commit, parent = folder.name, folder.parent.parent
    cached = _CACHED.fullmatch(parent.name)
    if cached and folder.parent.name == "snapshots" and _COMMIT.fullmatch(commit):
        return Source(folder, f"{cached[1]}/{cached[2]}", None, commit)
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        fields = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        texts = [fields.get(key) for key in ("name", "revision", "commit")]
        if isinstance(texts[0], str) and all(isinstance(text, str | None) for text in texts):
            return Source(folder, *texts)
    return Source(folder)


def _download(name: str, revision: str | None) -> Source:
    """Settings first: they say which weights there are."""
    from huggingface_hub import errors, snapshot_download

    given = dict(library_name="efficient_vlm", library_version=__version__)
    with _quiet_when_piped(), explained(name, revision, lambda: _nearby(name)):
        try:
            folder = snapshot_download(
                name, revision=revision, allow_patterns=SETTINGS, ignore_patterns=NEVER, **given
            )
        except errors.IncompleteSnapshotError as error:
            # Offline, and others fetched less than these settings; the weights are checked below.
            folder = error.snapshot_path
        source = Source(Path(folder), name, revision, Path(folder).name)
        weights = _weights(source)
        if not _has(source, weights):  # Else a broken network would be asked again and again.
            snapshot_download(name, revision=source.commit, allow_patterns=weights, **given)
    if not _has(source, needed := ["config.json", *weights]):
        missing = next(file for file in needed if not _has(source, [file]))
        raise UserError(
            f"{name}: {missing} is neither on the hub nor in {source.directory}",
            fix="load it once with a network and without HF_HUB_OFFLINE; or give another revision",
        )
    return source


def _has(source: Source, files: list[str]) -> bool:
    return all((source.directory / file).is_file() for file in files)


def _weights(source: Source) -> list[str]:
    """The files with the weights, as `safetensors_index.find_index` will choose among them."""
    from huggingface_hub import errors, get_cached_repo_tree

    folder, names = source.directory, None
    with contextlib.suppress(errors.CachedRepoTreeNotFoundError):
        tree = get_cached_repo_tree(source.name, revision=source.commit)
        names = {file.path for file in tree}
    shards = []
    if (folder / INDEX).is_file():
        shards = sorted(set(read_index(folder / INDEX).values()))
    if shards and (names is None or names >= set(shards)):
        return shards
    if names is None or SINGLE in names:  # An index may be left over; see `find_index`.
        return [SINGLE]
    foreign.refuse_directory(folder)
    raise _no_safetensors(source, sorted(names), shards)


def _no_safetensors(source: Source, names: list[str], shards: list[str]) -> UserError:
    """The error for a model whose files hold no weights that can be read."""
    if shards:
        missing = next(shard for shard in shards if shard not in names)
        problem = f"{source.name}: {INDEX} names {missing}, which is not there"
        return UserError(problem, fix="give another revision, or tell the model's authors")
    endings = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt")
    others = [name for name in names if name.endswith(endings)]
    held = f"only {short(others[0])}" if others else "no weights"
    return UserError(
        f"{source.name}: no safetensors of a model, {held}",
        allowed=f"{SINGLE}, or {INDEX} and its shards",
        fix="give a revision that has them (many have a pull request: refs/pr/1), or another model",
    )


def _nearby(name: str) -> str | None:
    """A folder here that was perhaps meant by a name."""
    first, _, second = name.partition("/")
    with contextlib.suppress(OSError):
        here = [entry.name for entry in os.scandir(".") if entry.is_dir()]
        for parent in filter(None, (first if first in here else closest(first, here),)):
            inside = [entry.name for entry in os.scandir(parent)]
            if guess := closest(second, inside):
                return f"{parent}/{guess}"
    return None


@contextlib.contextmanager
def _quiet_when_piped() -> Iterator[None]:
    """The library's progress bars are for terminals, unless its own setting asks for them."""
    from huggingface_hub import utils

    own = "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ
    if own or sys.stderr.isatty() or utils.are_progress_bars_disabled():
        yield
    else:
        with utils.disable_progress_bars():
            yield
