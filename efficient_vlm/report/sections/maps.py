"""Token maps of example questions, as an HTML section."""

import base64
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from efficient_vlm.report import maps, page
from efficient_vlm.report.maps import Tile
from efficient_vlm.report.records import Run

# Of base64 text, so that the page stays below 3 MB whatever the maps.
_MAP_BYTES = 2_000_000


class _Question(NamedTuple):
    question: str
    answer: str
    task: str
    tiles: Iterable[Tile]


def token_maps(run: Run) -> str:
    """Example questions: which patches each method kept, and what it answered."""
    questions = [_Question(e.question, e.answer, e.task, maps.tiles(e)) for e in run.maps]
    questions += [_drawn(entry) for entry in run.drawn_maps]
    if not questions:
        return page.missing("There are no token maps: evaluation writes them to maps/.")
    out, left, omitted = [], _MAP_BYTES, 0
    for asked in questions:
        figures = []
        for tile in asked.tiles:
            coded = base64.b64encode(tile.png).decode("ascii")
            if len(coded) > left:
                omitted += 1
                continue
            left -= len(coded)
            figures.append(_figure(tile, coded, asked.question))
        task = f"{asked.task}, " if asked.task else ""
        out.append(
            f'<article class="question"><h3>{page.esc(asked.question)} '
            f"<small>{page.esc(task)}answer: {page.esc(asked.answer)}</small></h3>"
            f'<div class="tiles">{"".join(figures)}</div></article>'
        )
    note = f"{omitted} more picture(s) are left out: this page stays below 3 MB." if omitted else ""
    return (
        "<p>Clear patches under a white outline were kept as tokens of their own. Patches with a "
        "common outline and tint were merged into one token (for learned queries: the token that "
        "looks at the patch most). Grey patches were dropped.</p>"
        + "".join(out)
        + (f"<p class=note>{note}</p>" if note else "")
    )


def _figure(tile: Tile, coded: str, question: str) -> str:
    verdict, sign = "", ""
    if tile.right is not None:
        verdict, sign = ("right", "✓") if tile.right else ("wrong", "✗")
    prediction = tile.prediction or "(nothing)"
    answer = f'<span class="{verdict}">{sign} {page.esc(prediction)}</span>' if verdict else ""
    alt = f"{tile.name}, {question}" + (f": {verdict}" if verdict else "")
    return (
        f'<figure><img alt="{page.esc(alt)}" src="data:image/png;base64,{coded}">'
        f"<figcaption><b>{page.esc(tile.name)}</b>{answer}</figcaption></figure>"
    )


def _drawn(entry: Mapping[str, Any]) -> _Question:
    """A question of a workdir of before: pictures that its evaluation drew."""
    tiles = [(entry.get("image"), "the image", "", None)]
    for cell in entry["maps"]:
        name = f"{cell.get('compressor')} at {cell.get('budget')}"
        prediction = str(cell.get("prediction") or "")
        tiles.append((cell["file"], name, prediction, bool(cell.get("correct"))))
        tiles.append((cell["scores"], f"{name}: {cell.get('meaning') or 'scores'}", "", None))
    read = [Tile(path.read_bytes(), *more) for path, *more in tiles if path]
    told = (str(entry.get(word) or "") for word in ("question", "answer", "task"))
    return _Question(*told, [tile for tile in read if tile.png.startswith(b"\x89PNG")])
