"""Points in the answers of Molmo and Molmo2: reading, writing, drawing.

Molmo writes percent of width and height, `<point x="12.3" y="45.6" alt="cup">cup</point>` or
`<points x1="12.3" y1="45.6" x2=... alt="cups">cups</points>`, and counts in "Counting the
<points ...> shows a total of 2." or "There are none." Molmo2 writes thousandths,
`<points coords="1 1 512 300 2 640 310">cups</points>`: the number of the picture, then number, x
and y of each point; pictures are separated by a tab or ";". In `<tracks coords=...>` seconds take
the place of the picture's number.

Without a tag, "(12.3, 45.6)", "Click(12.3, 45.6)" and x="12.3" y="45.6" are percent too.

Source: Deitke et al. 2024, "Molmo and PixMo", section 2; Molmo2's published output format.
"""

import dataclasses
import html
import re
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from efficient_vlm.errors import UserError, unknown

FORMS = ("molmo", "molmo2")
_START = re.compile(r"<(points?|tracks)\b", re.IGNORECASE)
# Answers without a tag that the published evaluation reads as well, in percent.
_BARE = re.compile(r"\(\s*([0-9]+(?:\.[0-9]+)?)\s*,\s*([0-9]+(?:\.[0-9]+)?)\s*\)")
_BARE_ATTRIBUTES = re.compile(r"""\bx="([^"<]*)"\s+y="([^"<]*)\"""")
_INSIDE = re.compile(r"""((?:\s+[\w-]+\s*=\s*(?:"[^"<]*"|'[^'<]*'))*)\s*/?>""")
_ATTRIBUTE = re.compile(r"""([\w-]+)\s*=\s*(?:"([^"]*)"|'([^']*)')""")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")
_TOTAL = re.compile(r"shows a total of ([0-9]{1,9})\b")
_NONE = re.compile(r"\bThere are none\b")
# Okabe and Ito's colours that carry white figures, one per label.
_COLOURS = ("#d55e00", "#0072b2", "#007a59", "#b0437f", "#7a5200", "#444444")


@dataclasses.dataclass(frozen=True)
class Point:
    """A place in a picture.

    Attributes:
      x, y: fractions of width and height from the top left, 0 to 1.
      label: what is there, HTML entities resolved; "" where the answer names nothing.
      image: which picture of the prompt, from 0; 0 for a video.
      id: the point's number in the answer; the same in several frames of a track.
      time: seconds, in tracks only.
    """

    x: float
    y: float
    label: str = ""
    image: int = 0
    id: int = 1
    time: float | None = None

    def pixels(self, width: int, height: int) -> tuple[float, float]:
        """x and y in a picture of this size."""
        return self.x * width, self.y * height


@dataclasses.dataclass(frozen=True)
class Pointed:
    """What an answer points at.

    Attributes:
      points: those that are well formed, in the answer's order.
      total: the number that the answer states, or None.
      problems: one line for each part that was not used, and for a total that is not the number
        of points.
    """

    points: list[Point]
    total: int | None
    problems: list[str]


def parse(text: str) -> Pointed:
    """Points in an answer; never raises, whatever the model wrote.

    Args:
      text: the answer; a tag that generation cut off is reported.
    """
    points: list[Point] = []
    problems: list[str] = []
    for start in _START.finditer(text):
        tag = _INSIDE.match(text, start.end())
        shown = text[start.start() : start.start() + 60]
        if tag is None:
            problems.append(f"damaged tag: {shown!r}")
            continue
        found = _ATTRIBUTE.findall(tag.group(1))
        attributes = {name.lower(): double or single for name, double, single in found}
        if len(attributes) < len(found):
            problems.append(f"an attribute twice: {shown!r}")
            continue
        label = _label(text, tag.end(), start.group(1), attributes)
        before = len(points), len(problems)
        if "coords" in attributes:
            timed = start.group(1).lower() == "tracks"
            _thousandths(attributes["coords"], label, timed, points, problems)
        else:
            _percent(attributes, label, points, problems)
        if (len(points), len(problems)) == before:
            problems.append(f"no points: {shown!r}")
    if not points and not problems:
        pairs = _BARE.findall(text) or _BARE_ATTRIBUTES.findall(text)
        for number, pair in enumerate(pairs, 1):
            _add(pair, 100, problems, points, label="", id=number)
    total = _TOTAL.search(text)
    number = int(total.group(1)) if total else 0 if _NONE.search(text) else None
    # A track has a point in every frame; what is counted is what has a number of its own.
    counted = len({(None if p.time is not None else p.image, p.label, p.id) for p in points})
    if number is not None and number != counted:
        problems.append(f"a total of {number} is stated, {counted} pointed at")
    return Pointed(points, number, problems)


def _label(text: str, end: int, tag: str, attributes: dict[str, str]) -> str:
    close = text.find(f"</{tag}>", end)
    inner = text[end:close] if close >= 0 else ""
    return html.unescape(attributes.get("alt", inner))


def _percent(
    attributes: dict[str, str], label: str, points: list[Point], problems: list[str]
) -> None:
    """Molmo: x and y, or x1, y1, x2, y2, ..."""
    matches = (re.fullmatch(r"([xy])([0-9]{0,6})", name) for name in attributes)
    numbers = dict.fromkeys(match.group(2) for match in matches if match)
    for number in sorted(numbers, key=lambda n: int(n or 1)):
        values = [attributes.get(axis + number) for axis in "xy"]
        _add(values, 100, problems, points, label=label, id=int(number or 1))


def _thousandths(
    coords: str, label: str, timed: bool, points: list[Point], problems: list[str]
) -> None:
    """Molmo2: "image id x y id x y ...", images separated by tab, ";", ":" or ","."""
    for group in filter(str.strip, re.split(r"[\t;:,]", coords)):
        head, *rest = group.split()
        place = _number(head)
        whole = head.isascii() and head.isdigit() and len(head) < 10 and int(head) >= 1
        if place is None or not (timed or whole) or not rest or len(rest) % 3:
            problems.append(f"damaged coords: {group[:60]!r}")
            continue
        where = {"time": place} if timed else {"image": int(head) - 1}
        for number, x, y in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
            if not (number.isascii() and number.isdigit() and len(number) < 10):
                problems.append(f"damaged number of a point: {number[:20]!r}")
                continue
            _add([x, y], 1000, problems, points, label=label, id=int(number), **where)


def _add(
    values: Sequence[str | None], scale: int, problems: list[str], points: list[Point], **fields
) -> None:
    """Appends a point, or what is wrong with it."""
    x, y = (None if value is None else _number(value) for value in values)
    if x is None or y is None:
        problems.append(f"point {fields['id']}: not two numbers: x {values[0]!r}, y {values[1]!r}")
    elif x > scale or y > scale:
        problems.append(f"point {fields['id']}: ({x:g}, {y:g}) is outside 0 to {scale}")
    else:
        points.append(Point(x / scale, y / scale, **fields))


def _number(text: str) -> float | None:
    text = text.strip()
    return float(text) if len(text) < 20 and _NUMBER.fullmatch(text) else None


def write(points: Sequence[Point], label: str = "", form: str = "molmo") -> str:
    """One tag with points as the models write them, sorted by x, then y.

    Molmo keeps a tenth of a percent, Molmo2 a thousandth; times keep a tenth of a second.

    Args:
      points: at least one; their own labels are not used. Molmo numbers them anew and knows one
        picture; Molmo2 keeps their ids.
      label: what they show.
      form: "molmo" or "molmo2"; the latter writes tracks for points with times.

    Raises:
      UserError: unknown form, no points, a place outside the picture, or, for Molmo, several
        pictures or times.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    if not points:
        raise UserError("points: none", fix='write "There are none."')
    outside = [p for p in points if not (0 <= p.x <= 1 and 0 <= p.y <= 1)]
    if outside:
        raise UserError(f"points: {outside[0].x}, {outside[0].y}", allowed="0 to 1")
    escaped = html.escape(label)
    if form == "molmo":
        if len({point.image for point in points}) > 1 or any(p.time is not None for p in points):
            raise UserError("points: several pictures or times", fix='form="molmo2"')
        places = sorted((round(100 * point.x, 1), round(100 * point.y, 1)) for point in points)
        if len(places) == 1:
            ((x, y),) = places
            return f'<point x="{x}" y="{y}" alt="{escaped}">{escaped}</point>'
        pairs = " ".join(f'x{n}="{x}" y{n}="{y}"' for n, (x, y) in enumerate(places, 1))
        return f'<points {pairs} alt="{escaped}">{escaped}</points>'
    timed = {point.time is not None for point in points}
    if len(timed) > 1:
        raise UserError("points: some with, some without a time", allowed="all or none")
    groups: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda p: (p.time or 0, p.image, p.x, p.y, p.id)):
        head = f"{point.image + 1}" if point.time is None else f"{point.time:.1f}"
        groups.setdefault(head, []).append(point)
    coords = ";".join(
        f"{head} "
        + " ".join(f"{p.id} {round(1000 * p.x):03d} {round(1000 * p.y):03d}" for p in group)
        for head, group in groups.items()
    )
    tag = "tracks" if timed.pop() else "points"
    return f'<{tag} coords="{coords}">{escaped}</{tag}>'


def draw(points: Sequence[Point], picture: Image.Image, image: int = 0) -> Image.Image:
    """A copy of a picture with numbered discs, one colour per label.

    A white and a black ring set a disc off from dark and light places alike; its size follows the
    picture's.

    Args:
      points: those of other pictures are left out; the number is `Point.id`.
      picture: any mode; the copy is RGB.
      image: which picture of the prompt this is, from 0.
    """
    copy = picture.convert("RGB")
    canvas = ImageDraw.Draw(copy)
    radius = max(8.0, 0.022 * (copy.width * copy.height) ** 0.5)
    ring = max(1.0, radius / 7)
    labels = list(dict.fromkeys(point.label for point in points))
    for point in points:
        if point.image != image:
            continue
        x, y = point.pixels(copy.width - 1, copy.height - 1)
        colour = _COLOURS[labels.index(point.label) % len(_COLOURS)]
        for reach, fill in ((2 * ring, "black"), (ring, "white"), (0, colour)):
            r = radius + reach
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        figures = str(point.id)
        font = ImageFont.load_default(radius * (1.35 if len(figures) == 1 else 2.1 / len(figures)))
        canvas.text((x, y), figures, fill="white", font=font, anchor="mm")
    return copy
