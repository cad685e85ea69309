"""Samples of unlike sizes in a few static shapes: which shapes, and which samples share a row.

A row of a batch holds several samples (`processing.request.pack_request`), and several things must
fit: text tokens, images and visual tokens. That is vector bin packing. Rows are filled one after
the other: first the largest sample that is left, then, as long as one fits, that whose needs are in
proportions most like those of what is left of the row, so that all of it is used up together. (The
dot product of Panigrahy et al., Heuristics for Vector Bin Packing, 2011, takes the longest texts
first and so leaves places of images empty.)
"""

import collections
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from efficient_vlm.processing.gather import Room

# Text and visual tokens of a row are multiples of this.
_MULTIPLE = 32
# Kinds of image sizes that may have a shape of their own.
_MOST_SIZES = 3
# Text for each image that a row has room for, in units of the average, in trials.
_SLACKS = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.4, 1.8)
# What an empty patch in the encoder weighs in that choice, beside a place in the decoder.
_ENCODER_WEIGHT = 0.25
# Shares of the samples that usual shapes hold, in trials; longer texts have a shape of their own.
_SHARES = (1.0, 0.995, 0.98)
# Samples of a trial.
_TRIED = 400
# And what the size of a sample weighs beside its proportions, where rows are filled.
_SIZE_WEIGHT = 0.5


class Size(NamedTuple):
    """What a sample needs.

    Attributes:
      text: text tokens.
      images: images of all its pictures.
      pixels: height and width of an image.
      visual: visual tokens in the decoder.
    """

    text: int
    images: int = 0
    pixels: tuple[int, int] = (0, 0)
    visual: int = 0


class Packed(NamedTuple):
    """A row: its room, and the numbers of the samples in it."""

    room: Room
    members: tuple[int, ...]


def pack(
    sizes: Sequence[Size], rooms: Sequence[Room], each: int, *, alone: bool = False
) -> list[Packed]:
    """Puts every sample into a row with room for it.

    Args:
      sizes: of the samples.
      rooms: shapes of rows; a sample with images gets the first that holds it, text the one whose
        rows need it most.
      each: visual tokens of an image where a room does not count them.
      alone: one sample a row.

    Raises:
      ValueError: a sample that no room holds.
    """
    of_room: list[list[int]] = [[] for _ in rooms]
    texts = []
    for number, size in enumerate(sizes):
        fitting = [i for i, room in enumerate(rooms) if holds(room, size)]
        if not fitting:
            raise ValueError(f"sample {number}: {size} fits into none of {len(rooms)} shapes")
        if size.images or alone:
            of_room[fitting[0]].append(number)
        else:
            texts.append((number, fitting))
    lacking = [_lacking(room, [sizes[n] for n in own]) for room, own in zip(rooms, of_room)]
    for number, fitting in sorted(texts, key=lambda t: -sizes[t[0]].text):
        best = max(fitting, key=lambda i: (lacking[i], -rooms[i].text))
        of_room[best].append(number)
        lacking[best] -= sizes[number].text
    packed = []
    for room, members in zip(rooms, of_room, strict=True):
        rows = [[n] for n in members] if alone or not members else _fill(members, sizes, room)
        packed += [Packed(room, tuple(sorted(row))) for row in rows]
    return packed


def holds(room: Room, size: Size) -> bool:
    """Whether an empty row has room for a sample."""
    fits = size.text <= room.text and size.images <= room.images
    fits = fits and (not room.visual or size.visual <= room.visual)
    sides = zip(size.pixels, room.size, strict=True)
    return fits and (not size.images or all(a <= b for a, b in sides))


def _lacking(room: Room, members: Sequence[Size]) -> float:
    """Text that rows for these images would have room for beside their own."""
    images = sum(s.images for s in members)
    rows = images / room.images if room.images else 0.0
    if room.visual:
        rows = max(rows, sum(s.visual for s in members) / room.visual)
    return rows * room.text - sum(s.text for s in members)


def _fill(members: Sequence[int], sizes: Sequence[Size], room: Room) -> list[list[int]]:
    limits = np.array([room.text, room.images or np.inf, room.visual or np.inf], float)
    needs = np.array([(sizes[n].text, sizes[n].images, sizes[n].visual) for n in members], float)
    needs = needs / limits
    lengths = np.maximum(np.linalg.norm(needs, axis=1), 1e-9)
    directions = needs / lengths[:, None]
    open_, rows = np.ones(len(members), bool), []
    while open_.any():
        left, row = np.isfinite(limits).astype(float), []
        score = np.where(open_, needs.max(axis=1), -1)
        while score.max() >= 0:
            best = int(score.argmax())
            row.append(members[best])
            open_[best] = False
            left = left - needs[best]
            fits = open_ & (needs <= left + 1e-9).all(axis=1)
            alike = directions @ (left / max(np.linalg.norm(left), 1e-9))
            score = np.where(fits, alike + _SIZE_WEIGHT * lengths, -1)
        rows.append(row)
    return rows


class Padding(NamedTuple):
    """Shares that hold nothing: of token places in the decoder, of pixels in the encoder."""

    decoder: float
    encoder: float


def padding(packed: Sequence[Packed], sizes: Sequence[Size], each: int) -> Padding:
    """What of these rows is padding.

    Args:
      packed, sizes, each: see `pack`.
    """
    members = [sizes[n] for row in packed for n in row.members]
    places = sum(r.room.text + (r.room.visual or r.room.images * each) for r in packed)
    pixels = sum(r.room.images * r.room.size[0] * r.room.size[1] for r in packed)
    real = sum(s.images * s.pixels[0] * s.pixels[1] for s in members)
    filled = sum(s.text + s.visual for s in members)
    return Padding(1 - filled / places if places else 0.0, 1 - real / pixels if pixels else 0.0)


def choose_rooms(
    sizes: Sequence[Size],
    each: int,
    *,
    tokens: int,
    limits: Size | None = None,
    most: int = 8,
    alone: bool = False,
    uneven: bool = False,
    pooled: bool = False,
) -> list[Room]:
    """At most `most` shapes of rows in which such samples leave little padding.

    Args:
      sizes: of some samples of the data.
      each: visual tokens of an image in the decoder; the most, for `uneven` images.
      tokens: token places of a row, about; more where one sample needs more.
      limits: the largest sample there may be, which the last shape holds; None if these are all.
      most: shapes; each is a program to compile.
      alone: one sample a row: the shapes then follow the lengths of the samples.
      uneven: whether images have unlike numbers of visual tokens.
      pooled: see `Room`.

    Returns:
      The shapes, smaller ones first where a sample fits into several.
    """
    given = dict(each=each, tokens=tokens, uneven=uneven or pooled, pooled=pooled)
    every = [*sizes, limits] if limits else sizes
    if most == 1:
        return [_largest(every, **given)]
    options = []
    for share in (1.0,) if alone else _SHARES:
        rooms = _shapes(sizes, share, most, alone, given)
        larger = [s for s in every if not any(holds(room, s) for room in rooms)]
        if larger:
            rooms.append(_largest(larger, **given))
        cost = _cost(pack(sizes, rooms, each, alone=alone), sizes, each)
        options.append((cost, len(options), rooms))
    return min(options)[-1]


def _shapes(
    sizes: Sequence[Size], share: float, most: int, alone: bool, given: Mapping[str, Any]
) -> list[Room]:
    """Fewer than `most` shapes for this share of the samples, those of the shortest texts."""
    longest = sorted(s.text for s in sizes)[max(0, math.ceil(share * len(sizes)) - 1)]
    usual = [s for s in sizes if s.text <= longest]
    pictured, texts = ([s for s in usual if bool(s.images) is kind] for kind in (True, False))
    groups = _pixel_groups(pictured, max(1, min(_MOST_SIZES, most // 2)))
    rooms = []
    for pixels in groups or [(0, 0)]:
        own = [s for s in pictured if _group_of(s.pixels, groups) == pixels]
        part = sum(s.visual for s in own) / max(sum(s.visual for s in pictured), 1)
        # Text without pictures fills up the rows of every group.
        every = own + texts[: round(len(texts) * part)] if own else texts
        if alone:
            rooms += _ladder(every, pixels, (most - 1) // max(len(groups), 1), **given)
        else:
            rooms.append(_room(every, pixels, **given))
    return rooms


def _cost(rows: Sequence[Packed], sizes: Sequence[Size], each: int) -> float:
    waste = padding(rows, sizes, each)
    return waste.decoder + _ENCODER_WEIGHT * waste.encoder


def _largest(sizes: Sequence[Size], *, uneven: bool, pooled: bool, **_) -> Room:
    return Room(
        text=_rounded(max(s.text for s in sizes)),
        images=max(s.images for s in sizes),
        size=tuple(max(s.pixels[axis] for s in sizes) for axis in (0, 1)),
        visual=_rounded(max(s.visual for s in sizes)) if uneven else 0,
        pooled=pooled,
    )


def _room(sizes: Sequence[Size], pixels, *, each, tokens, uneven, pooled) -> Room:
    """The shape of rows for such samples that wastes least of several."""
    images = sum(s.images for s in sizes)
    longest = max(s.text for s in sizes)
    if not images:
        return Room(_rounded(max(tokens, longest)), 0)
    tried = sizes[:: -(-len(sizes) // _TRIED)]
    most, largest = max(s.images for s in sizes), max(s.visual for s in sizes)
    visual, text = (sum(s[i] for s in sizes) / images for i in (3, 0))  # Of an image.
    count = max(most, round(tokens / (visual + text)))
    options = []
    for number, slack in itertools.product(range(max(most, count - 2), count + 3), _SLACKS):
        for spare in (0, 1, number // 8 + 2) if uneven else (0,):
            room = Room(
                text=_rounded(max(number * text * slack, longest)),
                images=number + spare,
                size=pixels,
                visual=_rounded(max(number * visual, largest)) if uneven else 0,
                pooled=pooled,
            )
            cost = _cost(pack(tried, [room], each), tried, each)
            options.append((cost, number, room.text, spare, room))
    return min(options)[-1]


def _ladder(sizes: Sequence[Size], pixels, steps, **given) -> list[Room]:
    """Shapes of one sample each, at quantiles of the text lengths."""
    whole = _largest(sizes, **given)
    lengths = sorted(s.text for s in sizes)
    at = [lengths[min(len(lengths) - 1, len(lengths) * (k + 1) // steps)] for k in range(steps)]
    return [
        Room(text, whole.images, pixels, whole.visual, whole.pooled)
        for text in sorted({_rounded(t) for t in at})
    ]


def _pixel_groups(sizes: Sequence[Size], most: int) -> list[tuple[int, int]]:
    """At most `most` image sizes that hold all: the two whose union wastes least become one."""
    groups = collections.Counter()
    for size in sizes:
        groups[size.pixels] += size.images
    while len(groups) > 64:  # Of very many sizes, those of a coarser grid, which hold them.
        coarse = collections.Counter()
        unit = np.gcd.reduce([side for pixels in groups for side in pixels])
        for pixels, count in groups.items():
            key = tuple(int(-(-side // (unit * 2)) * unit * 2) for side in pixels)
            coarse[key] += count
        groups = coarse
    while len(groups) > most:
        a, b = min(itertools.combinations(sorted(groups), 2), key=lambda two: _waste(groups, *two))
        count = groups.pop(a) + groups.pop(b)
        groups[tuple(map(max, a, b))] += count
    return sorted(groups, key=lambda pixels: pixels[0] * pixels[1])


def _waste(groups, a: tuple[int, int], b: tuple[int, int]) -> int:
    """Pixels that become padding where images of two sizes share one."""
    area = max(a[0], b[0]) * max(a[1], b[1])
    return groups[a] * (area - a[0] * a[1]) + groups[b] * (area - b[0] * b[1])


def _group_of(pixels: tuple[int, int], groups: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return next(g for g in groups if pixels[0] <= g[0] and pixels[1] <= g[1])


def _rounded(count: float) -> int:
    return max(_MULTIPLE, -int(-count // _MULTIPLE) * _MULTIPLE)
