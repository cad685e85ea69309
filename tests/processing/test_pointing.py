"""Points in answers: the published forms, damage, round trips, drawing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from efficient_vlm.errors import UserError
from efficient_vlm.processing.pointing import Point, draw, parse, write


def places(result):
    return [(p.image, p.id, round(p.x, 4), round(p.y, 4), p.label) for p in result.points]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('Here: <point x="12.3" y="45.6" alt="cup">cup</point>.', [(0, 1, 0.123, 0.456, "cup")]),
        ("<point x='50' y='.5' alt='a'>b</point>", [(0, 1, 0.5, 0.005, "a")]),
        (
            '<points x2="30.0" y2="40" x1="10" y1="100" alt="A &amp; &quot;B&quot;">x</points>',
            [(0, 1, 0.1, 1.0, 'A & "B"'), (0, 2, 0.3, 0.4, 'A & "B"')],
        ),
        (
            '<points coords="1 1 512 300 2 640 310">cups</points>',
            [(0, 1, 0.512, 0.3, "cups"), (0, 2, 0.64, 0.31, "cups")],
        ),
        (
            '<points coords="1 1 512 300\t3 2 005 1000">it&#x27;s</points>',
            [(0, 1, 0.512, 0.3, "it's"), (2, 2, 0.005, 1.0, "it's")],
        ),
        (
            '<points coords=\'1 1 512 300;2 2 000 310\'>c</points> <point x="1" y="2">d</point>',
            [(0, 1, 0.512, 0.3, "c"), (1, 2, 0.0, 0.31, "c"), (0, 1, 0.01, 0.02, "d")],
        ),
        ('<points coords="1 1 512 300"/>', [(0, 1, 0.512, 0.3, "")]),
        ('<POINT X="12.5" Y="25">cup</POINT>', [(0, 1, 0.125, 0.25, "cup")]),
        ("Click(12.3, 45.6)", [(0, 1, 0.123, 0.456, "")]),
        ("(1, 2) and (30.5,40)", [(0, 1, 0.01, 0.02, ""), (0, 2, 0.305, 0.4, "")]),
        ('x="12.3" y="45.6"', [(0, 1, 0.123, 0.456, "")]),
        ('<points x1="5" y1="6" x1="7" y1="8">twice</points>', []),
        ('<point x="1" y="2" alt="cut', []),
    ],
)
def test_published_forms(text, expected):
    result = parse(text)
    assert places(result) == expected
    assert bool(result.problems) == (not expected)


def test_tracks():
    result = parse('<tracks coords="0.0 1 100 200 2 300 400;0.5 1 110 210">dogs</tracks>')
    assert [(p.time, p.id, p.x) for p in result.points] == [
        (0, 1, 0.1),
        (0, 2, 0.3),
        (0.5, 1, 0.11),
    ]
    assert not result.problems and all(p.image == 0 for p in result.points)


def test_counting():
    tag = '<points x1="1" y1="2" x2="3" y2="4" alt="dogs">dogs</points>'
    right = parse(f"Counting the {tag} shows a total of 2.")
    assert (right.total, right.problems, len(right.points)) == (2, [], 2)
    wrong = parse(f"Counting the {tag} shows a total of 5.")
    assert wrong.total == 5 and "5 is stated, 2" in wrong.problems[0]
    assert parse("There are none.") == parse("There are none.") and parse("none").total is None
    assert (parse("There are none.").total, parse("There are none.").problems) == (0, [])
    track = '<tracks coords="0 1 100 200;1 1 110 210">dog</tracks>'
    assert parse(f"Counting the {track} shows a total of 1.").problems == []


@pytest.mark.parametrize(
    "text",
    [
        '<point x="100.1" y="5">a</point>',
        '<point x="512" y="300">a</point>',
        '<point x="-3" y="5">a</point>',
        '<point x="1.2.3" y="5">a</point>',
        '<point x="nan" y="5">a</point>',
        '<point x="inf" y="5">a</point>',
        '<point x="1e1" y="5">a</point>',
        '<point x="१" y="5">a</point>',
        '<point x="5">a</point>',
        '<point alt="a">a</point>',
        "<point x=5 y=5>a</point>",
        '<points coords="">a</points>',
        '<points coords="1 1 512">a</points>',
        '<points coords="1">a</points>',
        '<points coords="0 1 512 300">a</points>',
        '<points coords="1.5 1 512 300">a</points>',
        '<points coords="1 1 1001 300">a</points>',
        '<points coords="1 a 512 300">a</points>',
        '<points coords="²  1 512 300">a</points>',
        f'<points coords="1 {"9" * 5000} 512 300">a</points>',
        f'<points x{"9" * 5000}="1" y="2">a</points>',
    ],
)
def test_damage_is_reported_and_never_used(text):
    result = parse(text)
    assert result.points == []
    assert result.problems


def test_good_points_survive_bad_neighbours():
    result = parse('<points x1="1" y1="2" x2="300" y2="4" x3="5" y3="6">a</points>')
    assert [p.id for p in result.points] == [1, 3]
    assert result.problems == ["point 2: (300, 4) is outside 0 to 100"]


@given(st.text() | st.text("<points/ xy1=\"' coords0.5;\t>", max_size=200))
def test_no_text_raises(text):
    for result in (parse(text), parse("<point " + text), parse('<points coords="' + text + '">')):
        assert all(0 <= p.x <= 1 and 0 <= p.y <= 1 for p in result.points)


labels = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1), labels)
def test_round_trip_molmo(grid, label):
    result = parse(write([Point(x / 1000, y / 1000) for x, y in grid], label))
    assert [(round(1000 * p.x), round(1000 * p.y)) for p in result.points] == sorted(grid)
    assert {p.label for p in result.points} == {label}
    assert [p.id for p in result.points] == list(range(1, len(grid) + 1))
    assert not result.problems


point = st.tuples(
    st.integers(0, 4), st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 10**6)
)


@given(st.lists(point, min_size=1), labels, st.booleans())
def test_round_trip_molmo2(grid, label, timed):
    points = [
        Point(x / 1000, y / 1000, label, 0 if timed else at, number, at / 2 if timed else None)
        for at, x, y, number in grid
    ]
    result = parse(write(points, label, "molmo2"))
    assert not result.problems
    assert sorted(map(repr, result.points)) == sorted(map(repr, points))


def test_write_refuses():
    for points, form in (
        ([], "molmo"),
        ([Point(1.2, 0)], "molmo2"),
        ([Point(0, 0), Point(0, 0, image=1)], "molmo"),
        ([Point(0, 0), Point(0, 0, time=1.0)], "molmo2"),
        ([Point(0, 0)], "molmo3"),
    ):
        with pytest.raises(UserError):
            write(points, "a", form)


@pytest.mark.parametrize("shade", [0, 128, 255])
@pytest.mark.parametrize("size", [(320, 240), (2000, 1500)])
def test_drawn_discs_are_seen_on_any_ground_and_grow_with_the_picture(shade, size):
    picture = Image.new("L", size, shade)
    points = [Point(0.5, 0.5, "a"), Point(0.25, 0.25, "b", id=12), Point(0.1, 0.9, image=1)]
    drawn = np.asarray(draw(points, picture)).astype(int)
    assert drawn.shape == (size[1], size[0], 3)
    changed = (drawn != shade).any(-1)
    across = np.flatnonzero(changed[size[1] // 2])
    centre = (across[0] + across[-1]) / 2
    assert abs(centre - (size[0] - 1) / 2) <= 1
    assert 0.03 < len(across) / (size[0] * size[1]) ** 0.5 < 0.09
    # Whatever the ground, a ring differs from it by half the range.
    ring = drawn[size[1] // 2, max(0, across[0] - 2) : across[0] + len(across) // 4]
    assert np.abs(ring - shade).max() >= 127
    # Figures: white within the disc.
    assert (
        drawn[size[1] // 2 - 6 : size[1] // 2 + 7, size[0] // 2 - 6 : size[0] // 2 + 7] > 250
    ).any()
    assert not changed[int(0.85 * size[1]) :].any()  # The point of another picture.
    assert np.asarray(picture).max() == shade  # The original is untouched.
