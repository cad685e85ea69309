"""A split by picture: rows that share pictures, directly or through others, stay together."""

import hashlib
import math
import os
from collections.abc import Iterable, Sequence

from efficient_vlm.processing.picture_bytes import is_address, is_base64_picture


def picture_key(picture: str | bytes) -> str:
    """A name that is equal for equal pictures: the path, however it is spelt, or a hash."""
    if isinstance(picture, bytes):
        return "sha256:" + hashlib.sha256(picture).hexdigest()
    if is_address(picture) or is_base64_picture(picture):
        return picture
    return os.path.normpath(picture)


def groups_of(keys: Iterable[Sequence[str] | bytes]) -> list[bytes]:
    """A hash per row, equal for rows that are connected by shared pictures.

    Args:
      keys: for each row the keys of its pictures; bytes for a row without any, which is a group
        with those that have the same.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    names = []
    for key in keys:
        if isinstance(key, bytes):
            names.append(key)
            continue
        for path in key[1:]:
            first, other = sorted((root(key[0]), root(path)))
            parent[other] = first
        names.append(key[0])
    roots = (name if isinstance(name, bytes) else root(name) for name in names)
    texts = (r if isinstance(r, bytes) else b"\0" + r.encode("utf-8", "replace") for r in roots)
    return [hashlib.sha256(text).digest() for text in texts]


def held_out(groups: Iterable[bytes], fraction: float) -> set[bytes]:
    """The groups that are for testing: this share of them, but at least one if there are two."""
    ordered = sorted(set(groups))  # They are hashes, so sorting shuffles.
    number = max(1, math.floor(len(ordered) * fraction)) if len(ordered) > 1 else 0
    return set(ordered[:number])
