"""Rows that a notebook holds in memory."""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from efficient_vlm.data.llava_rows import read_row
from efficient_vlm.data.records import Conversation, Record
from efficient_vlm.errors import UserError, short
from efficient_vlm.processing.decode_image import BadRecord
from efficient_vlm.processing.picture_bytes import picture_bytes
from efficient_vlm.processing.pictures.base import load_picture

_TASK = "conversation"


class MemorySource:
    """Records of rows; a `sources.Source`.

    Args:
      rows: in the layouts of `llava_rows.read_row`; pictures may also be Pillow images, arrays or
        anything else that `load_picture` takes.
      max_bytes: largest picture file.

    Raises:
      UserError: no rows, or what is no list of mappings.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], max_bytes: int):
        if isinstance(rows, Mapping | str) or not isinstance(rows, Sequence) or not rows:
            raise UserError(
                f"rows: {short(rows)}",
                allowed='a list of {"images": [...], "messages": [{"role", "content"}, ...]}',
            )
        self._rows, self._max_bytes = list(rows), max_bytes
        self.tasks, self.placed = (_TASK,), True
        # Nothing of it is resumed, so its length is enough.
        content = hashlib.sha256(str(len(rows)).encode()).hexdigest()
        self.fingerprint = {"dataset": "memory", "content": content}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        if not isinstance(row, Mapping):
            raise BadRecord("malformed", f"row {index} is {short(row)}")
        pictures: list[bytes] = []
        plain = {**row}
        for key in ("image", "images"):
            value = row.get(key)
            if value is None:
                continue
            listed = value if isinstance(value, list | tuple) else [value]
            names = []
            for picture in listed:
                names.append(f"picture-{len(pictures)}")
                pictures.append(self._encoded(picture, index))
            plain[key] = names
        if "messages" in row:
            plain["messages"] = [self._message(m, pictures, index) for m in row["messages"]]
            held = [name for m in plain["messages"] for name in m.pop("named", ())]
            if held:
                plain["images"] = held
        found = read_row(plain)
        data = tuple(pictures[int(name.rsplit("-", 1)[1])] for name in found.pictures)
        conversation = Conversation(found.turns, _TASK, found.places)
        return Record(str(row.get("id", index)), data, (conversation,), {"row": index})

    def _message(self, message: Any, pictures: list[bytes], index: int) -> dict[str, Any]:
        """A message whose parts name pictures, which go to `pictures`."""
        if not isinstance(message, Mapping):
            raise BadRecord("malformed", f"row {index}: a message is {short(message)}")
        out = dict(message)
        content = message.get("content")
        if isinstance(content, list | tuple):
            parts = []
            for part in content:
                held = part.get("image") if isinstance(part, Mapping) else None
                if held is None:
                    parts.append(part)
                    continue
                out.setdefault("named", []).append(f"picture-{len(pictures)}")
                pictures.append(self._encoded(held, index))
                parts.append({"type": "image"})
            out["content"] = parts
        return out

    def _encoded(self, picture: Any, index: int) -> bytes:
        if isinstance(picture, str | bytes) or hasattr(picture, "read"):
            return picture_bytes(picture, max_bytes=self._max_bytes)
        if isinstance(picture, Mapping) and picture.get("bytes") is not None:
            return picture_bytes(picture["bytes"], max_bytes=self._max_bytes)
        if isinstance(picture, Mapping) and picture.get("path") is not None:
            return picture_bytes(picture["path"], max_bytes=self._max_bytes)
        if not isinstance(picture, Image.Image | np.ndarray) and hasattr(picture, "__fspath__"):
            return picture_bytes(picture, max_bytes=self._max_bytes)
        try:
            image = load_picture(picture)
        except UserError as error:
            raise BadRecord("format", f"row {index}: {error}") from error
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        return file.getvalue()

    def texts(self) -> Iterator[str]:
        """Questions and answers."""
        for index in range(len(self)):
            for conversation in self[index].conversations:
                for turn in conversation.turns:
                    yield from turn
