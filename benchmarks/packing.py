"""How much of packed batches is padding: `python benchmarks/packing.py`.

For each family 2,000 samples are drawn: a fifth has text alone, most have one picture and some
several, and lengths of texts are log-normal. Their needs are those of the family's own picture
processor at its published size. Nothing is decoded or computed: what is measured is which shapes of
rows are chosen and how the samples lie in them, as in `data.chat`, the empty rows that fill up the
last batch of a shape included. Beside it stand one sample a row in as many shapes, and rows that
are all as large as the largest sample. Printed, and written to results/packing.json:

  decoder    share of token places that hold nothing (target for packed rows: at most 10 %)
  encoder    share of pixels that belong to no picture
  shapes     programs to compile for one compressor (at most 8)
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from efficient_vlm.data.packing import Packed, Size, choose_rooms, pack, padding
from efficient_vlm.processing.gather import Room
from efficient_vlm.processing.pictures.native import Qwen2VLPictures

SAMPLES, BATCH, TOKENS, LONGEST, SHAPES = 2_000, 4, 2_048, 4_096, 8
MOST_PADDING = 0.10
OUT = Path(__file__).parent / "results" / "packing.json"
_LLAVA_TOKENS, _SMOLVLM_TOKENS = 576, 64


class Mix(NamedTuple):
    """How the samples of a family are drawn.

    Attributes:
      picture: from a generator to images, pixels of each, visual tokens and text of one picture.
      each: visual tokens of an image where all have as many.
      uneven: whether images have unlike numbers of them.
      most: pictures of a sample.
    """

    picture: Callable[[np.random.Generator], tuple[int, tuple[int, int], int, int]]
    each: int
    uneven: bool
    most: int


def _smolvlm(rng: np.random.Generator) -> tuple[int, tuple[int, int], int, int]:
    """1 to 17 tiles of 512 pixels with 64 tokens: up to 4 x 4 and the whole; marks around each."""
    rows, columns = rng.integers(1, 5, 2)
    tiles = int(rows * columns + (rows * columns > 1))
    return tiles, (512, 512), tiles * _SMOLVLM_TOKENS, 2 * tiles + 4


def _llava(rng: np.random.Generator) -> tuple[int, tuple[int, int], int, int]:
    return 1, (336, 336), _LLAVA_TOKENS, 1


def _qwen(rng: np.random.Generator) -> tuple[int, tuple[int, int], int, int]:
    """Phone photos, squares and screenshots, from 200 to 1,400 pixels along the longer edge."""
    pictures, longer = Qwen2VLPictures(), int(rng.integers(200, 1400))
    shorter = round(longer * rng.choice([0.5625, 0.75, 1.0]))
    size = (longer, shorter) if rng.random() < 0.5 else (shorter, longer)
    images, height, width = pictures.views(*size)
    return images, (height, width), pictures.count(*size), 2


MIXES = {
    "smolvlm": Mix(_smolvlm, _SMOLVLM_TOKENS, False, 4),
    "llava": Mix(_llava, _LLAVA_TOKENS, False, 1),
    "qwen2_vl": Mix(_qwen, _LLAVA_TOKENS, True, 3),
}


def draw(name: str, count: int = SAMPLES, seed: int = 0) -> list[Size]:
    """Needs of `count` samples of a family, none above LONGEST tokens."""
    mix, rng, found = MIXES[name], np.random.default_rng(seed), []
    while len(found) < count:
        text = int(np.clip(rng.lognormal(np.log(80), 0.8), 12, 1500))
        kind, pictures = rng.random(), 0
        if kind >= 0.2:
            pictures = 1 if kind < 0.8 else int(rng.integers(1, mix.most + 1))
        parts = [mix.picture(rng) for _ in range(pictures)]
        size = Size(
            text=text + sum(part[3] for part in parts),
            images=sum(part[0] for part in parts),
            pixels=tuple(max((part[1][axis] for part in parts), default=0) for axis in (0, 1)),
            visual=sum(part[2] for part in parts),
        )
        if size.text + size.visual <= LONGEST:
            found.append(size)
    return found


def most_of(sizes: Sequence[Size]) -> Size:
    """What holds each of them."""
    pixels = tuple(max(size.pixels[axis] for size in sizes) for axis in (0, 1))
    return Size(*(max(size[i] for size in sizes) for i in (0, 1)), pixels, max(s[3] for s in sizes))


def filled_up(rows: Sequence[Packed], rooms: Sequence[Room], batch: int = BATCH) -> list[Packed]:
    """The rows with the empty ones that make the batches of each shape whole."""
    found = list(rows)
    for room in rooms:
        own = sum(row.room == room for row in rows)
        found += [Packed(room, ())] * (-own % batch)
    return found


def measured(name: str, alone: bool, tokens: int = TOKENS) -> dict[str, Any]:
    """Padding of the samples of a family, packed or one a row."""
    mix, sizes, began = MIXES[name], draw(name), time.perf_counter()
    given = dict(tokens=tokens, most=SHAPES, alone=alone)
    rooms = choose_rooms(sizes, mix.each, uneven=mix.uneven, **given)
    chosen = time.perf_counter()
    rows = pack(sizes, rooms, mix.each, alone=alone)
    packed = time.perf_counter()
    waste = padding(filled_up(rows, rooms), sizes, mix.each)
    return {
        "decoder": round(waste.decoder, 4),
        "encoder": round(waste.encoder, 4),
        "shapes": len(rooms),
        "rows": len(rows),
        "choose_seconds": round(chosen - began, 3),
        "pack_seconds": round(packed - chosen, 3),
        "rooms": [[room.text, room.images, *room.size, room.visual] for room in rooms],
    }


def largest(name: str) -> dict[str, Any]:
    """The same where each sample has a row as large as the largest sample of the data."""
    mix, sizes = MIXES[name], draw(name)
    most = most_of(sizes)
    room = Room(most.text, most.images, most.pixels, most.visual if mix.uneven else 0)
    waste = padding([Packed(room, (n,)) for n in range(len(sizes))], sizes, mix.each)
    return {"decoder": round(waste.decoder, 4), "encoder": round(waste.encoder, 4), "shapes": 1}


def main(words: Sequence[str] | None = None) -> int:
    """Prints and writes all figures; 1 if one misses its target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write")
    out, found, good = parser.parse_args(words).out, {}, True
    for name in MIXES:
        ways = {"packed": measured(name, False), "alone": measured(name, True)}
        found[name] = {**ways, "one_shape": largest(name)}
        for way, row in found[name].items():
            print(
                f"{name:<9} {way:<9} decoder {row['decoder']:6.1%}  encoder {row['encoder']:6.1%}"
                f"  {row['shapes']} shapes"
            )
        packed = found[name]["packed"]
        good &= packed["decoder"] <= MOST_PADDING and packed["shapes"] <= SHAPES
    settings = dict(samples=SAMPLES, batch=BATCH, pack_tokens=TOKENS, max_length=LONGEST)
    settings |= dict(python=platform.python_version(), numpy=np.__version__)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"settings": settings, "padding": found}, indent=1) + "\n")
    print(f"Target of at most {MOST_PADDING:.0%} padding: {'met' if good else 'MISSED'}; {out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
