"""WebDataset shards: tar files whose neighbours KEY.jpg, KEY.txt, KEY.json make one row.

A key is what stands in front of the first dot of a file's name, folders included. One pass over the
headers gives the offsets; rows are then read where they lie. Links, absolute names and names with
".." are refused: what they mean lies outside of the file.
"""

import bisect
import contextlib
import json
import struct
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from efficient_vlm.data.tables.base import digest_of
from efficient_vlm.errors import UserError, first_line, short, short_path
from efficient_vlm.processing.decode_image import MAX_BYTES, BadRecord

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic")
_TEXTS = ("txt", "text", "caption", "cls")
_MEDIA = ("mp4", "avi", "mov", "mkv", "webm", "m4v", "wav", "mp3", "flac", "ogg", "m4a", "ply")
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_NAMES = 256  # Rows in which the names of fields are looked for.


class _Member(NamedTuple):
    name: str  # Behind the key: "jpg", "0.png", "json".
    offset: int
    size: int
    bad: str  # Why it is refused, "" if it is not.


class WebDatasetTable:
    """Random access to the samples of tar files, in the order of the files' names.

    A row has the fields of its .json member, the text of .txt and .cls members under their ending,
    and its pictures under "images" (unless the .json has turns with pictures of their own).

    Args:
      paths: uncompressed tar files.
      max_bytes: largest member that is read.

    Raises:
      UserError: a file that cannot be read, or is no tar file; no samples.
    """

    kind = "webdataset 1"

    def __init__(self, paths: Sequence[Path], max_bytes: int = MAX_BYTES):
        self.paths = sorted(paths)
        self.folder = self.paths[0].parent
        self.digest = digest_of(self.paths)
        self._max_bytes = max_bytes
        self.labels: dict[str, Sequence[str]] = {}
        self._starts, self._offsets = [0], array("q")  # Of each sample's first header.
        self._files = []
        for path in self.paths:
            offsets = _index(path)
            self._offsets.extend(offsets)
            self._starts.append(len(self._offsets))
            self._files.append(path)
        if not len(self._offsets):
            raise UserError(
                f"data.path: {short_path(self.paths[0])} has no samples",
                fix="give tar files with members such as 0001.jpg and 0001.txt",
            )
        self.names = self._field_names()

    def _field_names(self) -> list[str]:
        names: dict[str, None] = {}
        for index in range(min(_NAMES, len(self))):
            try:
                names |= dict.fromkeys(self.row(index))
            except BadRecord:
                continue
        return list(names)

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        path = self._files[bisect.bisect_right(self._starts, index) - 1]
        try:
            with path.open("rb") as file:
                file.seek(self._offsets[index])
                key, members = _sample(file)
                return self._fields(file, key, members)
        except (OSError, tarfile.TarError, struct.error) as error:
            raise BadRecord("corrupt", f"{short_path(path)}: {first_line(error)}") from error

    def _fields(self, file: Any, key: str, members: Sequence[_Member]) -> dict[str, Any]:
        row: dict[str, Any] = {}
        pictures = []
        for member in members:
            name = f"{short(key)}.{short(member.name)}"
            if member.bad:
                raise BadRecord("outside", f"{name}: {member.bad}")
            ending = member.name.rsplit(".", 1)[-1].lower()
            if ending in _MEDIA:
                raise BadRecord("media", f"{name} is not read")
            if ending not in (*_PICTURES, *_TEXTS, "json"):
                continue
            if member.size > self._max_bytes:
                raise BadRecord("too_large", f"{name}: {member.size} bytes")
            data = _content(file, member, name)
            if ending in _PICTURES:
                pictures.append(data)
            elif ending == "json":
                row |= _object(data, name)
            elif row.setdefault(ending, text := _text(data, name)) != text:
                raise BadRecord("malformed", f"{name}: two texts of one kind")
        row["__key__"] = key
        return _with_pictures(row, pictures)

    def scan(self, pictures: bool, used: Sequence[str] = ()) -> Iterator[Any]:
        del used
        for index in range(len(self)):
            try:
                row = self.row(index)
            except BadRecord as error:
                yield error
                continue
            if not pictures:
                row.pop("images", None)
            yield row


def _with_pictures(row: dict[str, Any], pictures: list[bytes]) -> dict[str, Any]:
    """Members are the pictures; names of files in the .json only say where they came from."""
    if pictures:
        row = {key: value for key, value in row.items() if key not in ("image", "images")}
        row["images"] = pictures
    return row


def _index(path: Path) -> list[int]:
    """Offsets of the headers at which samples begin."""
    offsets, last = [], None
    try:
        with tarfile.open(path, "r:", errors="surrogateescape") as tar:
            for member in tar:
                if member.isdir():
                    last = None
                    continue
                key, _ = _parts(member.name)
                if key != last:
                    offsets.append(member.offset)
                last = key
                tar.members = []  # Its list of all members would be most of the memory.
    except (OSError, tarfile.TarError) as error:
        raise _unreadable(path, error) from error
    return offsets


def _unreadable(path: Path, error: Exception) -> UserError:
    packed = False
    with contextlib.suppress(OSError), path.open("rb") as file:
        packed = file.read(4).startswith(_PACKED)
    return UserError(
        f"data.path: {short_path(path)} is not readable as a tar file ({first_line(error)})",
        allowed="uncompressed tar files, whose members have offsets",
        fix="unpack it once, with gunzip or unzstd" if packed else "write or copy it again",
    )


def _sample(file: Any) -> tuple[str, list[_Member]]:
    """(key, members) of the sample whose first header lies where the file stands."""
    found, first = [], None
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
        for member in tar:
            key, name = _parts(member.name)
            if member.isdir() or (first is not None and key != first):
                break
            first = key
            bad = "" if member.isreg() else "a link or a special file"
            # What stands in front of the colon of a Windows path is a drive.
            steps = member.name.replace("\\", "/").split("/")
            if member.name.startswith(("/", "\\")) or ".." in steps or ":" in steps[0]:
                bad = "a name that leaves the archive"
            if member.issparse():
                bad = "a file with holes"
            found.append(_Member(name, member.offset_data, member.size, bad))
    return first or "", found


def _parts(name: str) -> tuple[str, str]:
    """(key, ending) of a member's name."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending


def _content(file: Any, member: _Member, name: str) -> bytes:
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) < member.size:
        raise BadRecord("corrupt", f"{name}: {len(data)} of {member.size} bytes")
    return data


def _object(data: bytes, name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise BadRecord("malformed", f"{name}: no JSON object")
    return parsed


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadRecord("malformed", f"{name}: not UTF-8") from error
