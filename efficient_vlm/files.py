"""Files that survive a crash, and manifests that prove they are the files that were written.

Orbax restores a flipped bit silently, so every checkpoint folder has a list of its files with their
sizes and SHA-256 digests. The list itself is *sealed*: it contains the digest of its own content
and is accepted only byte for byte, so that a single changed byte anywhere is detected. Nothing here
imports JAX.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
INDEX = "index.json"
_THREADED_BYTES = 1 << 23  # from this size on several threads are faster than one


class Damaged(Exception):
    """A file or folder that differs from what was written; the text names file and reason."""


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Makes renames and new names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durable(path: Path, data: bytes) -> None:
    """Writes and fsyncs one file (not atomic: for files inside a folder that is renamed later)."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces `path` atomically: readers see the old or the new bytes, also after a crash."""
    # The thread id keeps two threads of one process from sharing a temporary name.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        write_durable(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def seal(content: dict[str, Any]) -> bytes:
    """JSON bytes of `content` together with the SHA-256 of its canonical form."""
    canonical = json.dumps(content, sort_keys=True).encode()
    sealed = {"content": content, "sha256": hashlib.sha256(canonical).hexdigest()}
    return (json.dumps(sealed, sort_keys=True, indent=1) + "\n").encode()


def unseal(raw: bytes, name: str) -> dict[str, Any]:
    """The content of sealed bytes.

    Args:
      raw: what `seal` wrote.
      name: the file's name, for the error.

    Raises:
      Damaged: any byte differs from what `seal` writes for the content (white space included).
    """
    try:
        content = json.loads(raw)["content"]
        intact = seal(content) == raw
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Damaged(f"{name}: not readable") from None
    if not intact or not isinstance(content, dict):
        raise Damaged(f"{name}: its own SHA-256 does not match")
    return content


def file_digest(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()


def list_files(folder: Path) -> list[str]:
    """Relative POSIX names of all files below `folder`, sorted; links count as files."""
    names = []
    for root, directories, files in os.walk(folder, followlinks=False):
        links = [name for name in directories if os.path.islink(os.path.join(root, name))]
        for name in files + links:
            names.append(Path(root, name).relative_to(folder).as_posix())
    return sorted(names)


def _map_files(function: Callable[[Any], Any], names: Sequence[Any]) -> list[Any]:
    # hashlib and fsync release the interpreter lock, so threads run in parallel.
    with ThreadPoolExecutor(max_workers=4, thread_name_prefix="manifest") as pool:
        return list(pool.map(function, names))


def fsync_tree(folder: Path) -> None:
    """Makes all files and folders below `folder` durable."""

    def sync(name: str) -> None:
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    _map_files(sync, list_files(folder))
    for root, _, _ in os.walk(folder):
        fsync_directory(root)


def write_manifest(folder: Path, step: int) -> tuple[str, int]:
    """Lists every file of `folder` in a sealed manifest.json, written last and made durable.

    Returns:
      The SHA-256 of the manifest's bytes (for the index), and the size of all files in bytes.
    """
    names = list_files(folder)
    paths = [folder / name for name in names]
    threaded = sum(path.stat().st_size for path in paths) >= _THREADED_BYTES
    entries = list(_map_files(file_digest, paths) if threaded else map(file_digest, paths))
    files = {
        name: {"size": size, "sha256": digest}
        for name, (size, digest) in zip(names, entries, strict=True)
    }
    raw = seal({"format": 1, "step": step, "files": files})
    write_durable(folder / MANIFEST, raw)
    fsync_directory(folder)
    return hashlib.sha256(raw).hexdigest(), sum(size for size, _ in entries) + len(raw)


def verify(folder: Path, step: int, manifest_sha256: str | None = None) -> dict[str, Any]:
    """Checks every byte of a checkpoint folder against its manifest.

    Args:
      folder: the step folder.
      step: the step it must belong to.
      manifest_sha256: the digest of the manifest that the index holds, if known.

    Returns:
      The manifest's content.

    Raises:
      Damaged: names the first file that is missing, extra, or of another size or content.
    """
    if not folder.is_dir():
        raise Damaged("the folder is missing")
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise Damaged(f"{MANIFEST}: {error.strerror or error}") from None
    content = unseal(raw, MANIFEST)
    if manifest_sha256 is not None and hashlib.sha256(raw).hexdigest() != manifest_sha256:
        raise Damaged(f"{MANIFEST}: not the manifest that was committed")
    if content.get("step") != step:
        raise Damaged(f"{MANIFEST}: belongs to step {content.get('step')}")
    expected, present = content["files"], set(list_files(folder)) - {MANIFEST}
    for name in sorted(expected.keys() - present):
        raise Damaged(f"{name}: missing")
    for name in sorted(present - expected.keys()):
        raise Damaged(f"{name}: not part of the checkpoint")

    def check(name: str) -> str | None:
        path, entry = folder / name, expected[name]
        try:
            if path.is_symlink() or not path.is_file():
                return f"{name}: not a plain file"
            if path.stat().st_size != entry["size"]:
                return f"{name}: {path.stat().st_size} bytes instead of {entry['size']}"
            if file_digest(path)[1] != entry["sha256"]:
                return f"{name}: SHA-256 does not match"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        return None

    for problem in _map_files(check, sorted(expected)):
        if problem:
            raise Damaged(problem)
    return content


def read_index(directory: Path) -> dict[str, Any] | None:
    """The committed index of a checkpoint directory, None if there is none.

    Raises:
      Damaged: the index cannot be trusted.
    """
    try:
        raw = (directory / INDEX).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged(f"{INDEX}: {error.strerror or error}") from None
    return unseal(raw, INDEX)


def write_index(
    directory: Path, steps: dict[int, str | None], deleting: list[int], damaged: list[int]
) -> None:
    """Replaces the index atomically.

    Args:
      directory: the checkpoint directory.
      steps: committed step -> SHA-256 of its manifest (None after a rebuild).
      deleting: steps no longer wanted whose folders may still exist.
      damaged: steps lost since the last good save.
    """
    content = {
        "format": 1,
        "steps": {str(step): steps[step] for step in sorted(steps)},
        "deleting": sorted(deleting),
        "damaged": sorted(damaged),
    }
    write_atomic(directory / INDEX, seal(content))
