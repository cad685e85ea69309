"""Samples in rows of few shapes: each is in one row, nothing overflows, little is padding."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_vlm.data.packing import Packed, Size, choose_rooms, holds, pack, padding
from efficient_vlm.processing.gather import Room

EACH = 9
SIDES = (28, 56, 84)


def benchmark():
    """benchmarks/packing.py as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "packing.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_packing", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@st.composite
def samples(draw):
    """(sizes, whether images have unlike numbers of visual tokens)."""
    uneven = draw(st.booleans())

    def one(text, images, height, width, tokens):
        visual = sum(tokens[:images]) if uneven else images * EACH
        return Size(text, images, (height, width) if images else (0, 0), visual)

    sides = st.sampled_from(SIDES if uneven else SIDES[:1])
    tokens = st.lists(st.integers(1, EACH), min_size=4, max_size=4)
    size = st.builds(one, st.integers(2, 150), st.integers(0, 4), sides, sides, tokens)
    return draw(st.lists(size, min_size=1, max_size=40)), uneven


def most_of(sizes):
    """What holds each of them, by the meaning of the fields."""
    heights, widths = zip(*(size.pixels for size in sizes), strict=True)
    text, images, visual = (max(getattr(s, n) for s in sizes) for n in ("text", "images", "visual"))
    return Size(text, images, (max(heights), max(widths)), visual)


def check_rows(rows, rooms, sizes):
    """Every sample is in one row, and every row holds what is in it."""
    assert Counter(n for row in rows for n in row.members) == Counter(range(len(sizes)))
    for room, members in rows:
        assert room in rooms and members
        own = [sizes[n] for n in members]
        assert sum(s.text for s in own) <= room.text
        assert sum(s.images for s in own) <= room.images
        if room.visual:
            assert sum(s.visual for s in own) <= room.visual
        for size in own:
            assert not size.images or size.pixels[0] <= room.size[0]
            assert not size.images or size.pixels[1] <= room.size[1]


@settings(max_examples=40, deadline=None)
@given(samples(), st.integers(1, 8), st.booleans(), st.booleans())
def test_every_sample_is_in_one_row_with_room_for_it(given_samples, most, alone, unseen):
    sizes, uneven = given_samples
    # Samples that were not seen when the shapes were chosen may be as large as this.
    limits = most_of([*sizes, Size(200, 5, (84, 84), 5 * EACH)]) if unseen else None
    options = dict(tokens=160, limits=limits, most=most, alone=alone, uneven=uneven)
    rooms = choose_rooms(sizes, EACH, **options)
    assert rooms == choose_rooms(sizes, EACH, **options)
    assert len(set(rooms)) == len(rooms) <= most
    assert limits is None or any(holds(room, limits) for room in rooms)
    assert all((room.visual > 0) == uneven or not room.images for room in rooms)
    everyone = [*sizes, limits] if unseen else sizes
    rows = pack(everyone, rooms, EACH, alone=alone)
    assert rows == pack(everyone, rooms, EACH, alone=alone)
    check_rows(rows, rooms, everyone)
    if alone:
        assert all(len(row.members) == 1 for row in rows)


def test_padding_is_what_nothing_fills():
    """One row of 40 + 3 x 9 places with 25 + 18 of them filled, and one that counts its tokens."""
    sizes = [Size(15, 2, (8, 8), 18), Size(10), Size(6, 1, (8, 4), 5)]
    even = Packed(Room(40, 3, (8, 8)), (0, 1))
    waste = padding([even], sizes, EACH)
    assert waste.decoder == pytest.approx(1 - 43 / 67) and waste.encoder == pytest.approx(1 / 3)
    counted = Packed(Room(10, 2, (8, 8), visual=20), (2,))
    waste = padding([even, counted], sizes, EACH)
    assert waste.decoder == pytest.approx(1 - (43 + 11) / (67 + 30))
    assert waste.encoder == pytest.approx(1 - (128 + 32) / (192 + 128))


def test_a_sample_that_no_shape_holds():
    with pytest.raises(ValueError, match="sample 1: .* none of 1 shapes"):
        pack([Size(4), Size(5, 1, (8, 8), 9)], [Room(32, 0)], EACH)


def test_text_fills_what_pictures_leave():
    """Four rows of two pictures have room for twenty texts."""
    sizes = [Size(10, 1, (8, 8), EACH)] * 8 + [Size(12)] * 20
    rows = pack(sizes, [Room(80, 2, (8, 8))], EACH)
    check_rows(rows, [Room(80, 2, (8, 8))], sizes)
    assert len(rows) == 4


def test_long_texts_do_not_take_the_places_of_pictures():
    """Ten pictures with texts of 4 to 94 tokens, 490 in all, in five rows of two: a long one goes
    with a short one."""
    sizes = [Size(4 + 10 * n, 1, (8, 8), EACH) for n in range(10)]
    assert len(pack(sizes, [Room(98, 2, (8, 8))], EACH)) == 5


@pytest.mark.parametrize("name", ["smolvlm", "llava", "qwen2_vl"])
def test_a_tenth_is_padding_at_most(name):
    """Of 2,000 mixed samples, in at most eight shapes of rows of the usual 2,048 tokens."""
    module = benchmark()
    sizes = module.draw(name)
    assert len(sizes) == 2_000 and 300 < sum(not size.images for size in sizes) < 500
    assert name != "smolvlm" or {1, 3, 4, 5, 7, 9, 10, 13, 17} <= {s.images for s in sizes}
    found = module.measured(name, False)
    assert found["decoder"] <= 0.1 and found["shapes"] <= 8
    assert found["decoder"] < 0.25 * module.largest(name)["decoder"]
