"""`efficient-vlm compress`: what a method makes of one picture, drawn.

With a run, everything is the run's: encoder, decoder, tokenizer. Without one there are no weights,
and statistics of the pixels stand in for the encoder (`cli.pixel_signals`); the picture says so.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.cli.methods import import_named, method_fields
from efficient_vlm.cli.one_image import Marked, WithoutWeights, WithRun
from efficient_vlm.compressors import methods
from efficient_vlm.compressors.grids import Grid
from efficient_vlm.data.records import REASONS
from efficient_vlm.errors import UserError, short_path
from efficient_vlm.evaluation import heat
from efficient_vlm.processing import decode_image as images
from efficient_vlm.processing.decode_image import BadRecord
from efficient_vlm.report import drawing
from efficient_vlm.report.sheet import HeatPanel, Panel, draw_sheet
from efficient_vlm.runtime import enable_compilation_cache

ALL = "all"
_MOST = 64  # Patches in a row or column, without a run.
_ASPECT = 2.5  # Longer pictures are drawn squeezed.
_SIDE, _SMALL = 440, 240  # Pixels of the shorter side, of one method and of many.
_LEGEND = (
    "White outline: a patch kept as a token of its own. Tint and outline: patches merged into one "
    "token. Grey: dropped."
)
_INSIDE = " Inside the decoder: as in the last layers that hold any visual token."


def compress(
    image: str,
    names: Sequence[str],
    options: Sequence[str] = (),
    *,
    out: str = "map.png",
    workdir: str | None = None,
    question: str | None = None,
    grid: str | None = None,
    as_json: bool = False,
) -> int:
    """`efficient-vlm compress`.

    Args:
      image: file.
      names: of methods, each with commas, or "all".
      options: "option=value" of the methods.
      out: picture to write.
      workdir: run whose model sees the picture; None for statistics of its pixels.
      question: what the model is asked; None for one of its data.
      grid: "24" or "18x32" patches, without a run; None for 24.
      as_json: print as JSON.
    """
    enable_compilation_cache()
    if not names:
        raise UserError(
            "compress: --compressor is missing",
            allowed=f"{ALL}, {', '.join(methods.names())}",
            fix="for example --compressor=divprune --compressor.budget=64",
        )
    every = ALL in [word.strip() for value in names for word in value.split(",")]
    import_named(names, workdir)
    wanted = method_fields(list(methods.names()) if every else names, options)
    target = Path(out)
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"--out={out}: not a file in a folder that exists", fix="--out=map.png")
    subject = _subject(read_image(image), workdir, question, grid)
    say = (lambda line: None) if as_json else print
    marked, left_out = _mark(subject, wanted, every, say)
    draw = _draw_many if every or len(wanted) > 1 else _draw_one
    try:
        target.write_bytes(drawing.png(draw(subject, marked, Path(image).name, left_out)))
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror or error}", fix="--out=map.png") from None
    if as_json:
        facts = _to_json(subject, marked, left_out)
        print(json.dumps({"image": image, "out": out, **facts}, indent=1))
        return 0
    for reason in dict.fromkeys(each["reason"] for each in left_out):
        same = [each["compressor"] for each in left_out if each["reason"] == reason]
        say(f"Left out: {', '.join(same)} ({reason})")
    say(f"Seen by: {subject.note}")
    say(f"Map: {out}")
    return 0


def _mark(
    subject: WithoutWeights | WithRun,
    wanted: Sequence[Mapping[str, Any]],
    every: bool,
    say: Callable[[str], None],
) -> tuple[list[Marked], list[dict[str, str]]]:
    """What each method makes of the picture, and which of all (`every`) cannot run, and why."""
    marked, left_out = [], []
    given = [fields["budget"] for fields in wanted if fields.get("budget") is not None]
    budget = _budget(given[0] if given else None, subject.grid) if every else None
    for fields in wanted:
        try:
            if every:
                fields = subject.nearest(fields, budget)
            result = subject.mark(fields, ask=len(wanted) == 1)
        except UserError as error:
            if not every:
                raise
            left_out.append({"compressor": fields["name"], "reason": _reason(error)})
            continue
        marked.append(result)
        say(f"{result.name} at {result.budget}: {'; '.join(caption(result))}")
        if result.answer:
            say(f"{subject.question}: {result.answer}")
    if not marked:
        raise UserError("--compressor=all: none can run", fix=left_out[0]["reason"])
    return marked, left_out


def read_image(path: str) -> np.ndarray:
    """uint8 [H, W, 3] of any image file; UserError where it is missing, damaged or too large."""
    try:
        return images.decode(images.read(path))
    except BadRecord as error:
        raise UserError(
            f"image {short_path(path)}: {REASONS.get(error.reason, error.reason)}",
            allowed=f"{', '.join(images.FORMATS)} up to {images.MAX_PIXELS // 10**6} megapixels",
            fix="give the path of such a file",
        ) from None


def caption(marked: Marked) -> list[str]:
    """What became of the patches, in words."""
    counts = heat.counts(marked.source)
    parts = [f"{counts.kept} patches kept"] if counts.kept else []
    if counts.merged:
        into = "1 token" if counts.merged_into == 1 else f"{counts.merged_into} tokens"
        parts.append(f"{counts.merged} merged into {into}")
    if counts.dropped:
        parts.append(f"{counts.dropped} dropped")
    if marked.gone is not None:
        parts.append(f"none left after layer {marked.gone}")
    knobs = [
        f"{key}={_short(value)}"
        for key, value in sorted(marked.options.items())
        if key not in ("budget", "grid") and value is not None
    ]
    return [", ".join(parts)] + ([", ".join(knobs)] if knobs else [])


def _subject(
    image: np.ndarray, workdir: str | None, question: str | None, grid: str | None
) -> WithoutWeights | WithRun:
    if workdir is not None:
        if grid is not None:
            raise UserError("--grid: the run's encoder has its own", fix="leave out --grid")
        return WithRun(image, Path(workdir), question)
    if question is not None:
        raise UserError("--question: there is no model to ask", fix="add --workdir=RUN")
    return WithoutWeights(image, _grid(grid or "24"))


def _grid(text: str) -> Grid:
    """ "24" or "18x32", rows before columns."""
    parts = text.lower().split("x")
    sides = [int(p) if p.isascii() and p.isdecimal() and len(p) < 5 else 0 for p in parts]
    if len(sides) > 2 or not all(1 <= side <= _MOST for side in sides):
        raise UserError(
            f"--grid={text}: not a grid of patches",
            allowed=f"1 to {_MOST}, or ROWSxCOLUMNS",
            fix="--grid=24",
        )
    return sides[0], sides[-1]


def _budget(given: int | None, grid: Grid) -> int:
    """The budget for all methods: as given, or a ninth of the patches (64 of 576)."""
    patches = grid[0] * grid[1]
    if given is None:
        return max(1, patches // 9)
    if not 1 <= given <= patches:
        raise UserError(
            f"--compressor.budget={given}: of {patches} patches", allowed=f"1 to {patches}"
        )
    return given


def _reason(error: UserError) -> str:
    """The first line of an error without the name of the method and details in brackets."""
    line = str(error).splitlines()[0]
    return re.sub(r"^(--compressor=\w+|compressor '\w+' at \d+): ", "", line).split(" (")[0]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_short, value)) + ")"
    return str(value)


def _size(subject, shorter: int) -> tuple[int, int]:
    """(height, width) to draw at, whole pixels for each patch."""
    aspect = float(np.clip(subject.aspect, 1 / _ASPECT, _ASPECT))
    high, wide = (shorter, shorter * aspect) if aspect >= 1 else (shorter / aspect, shorter)
    rows, columns = subject.grid
    return max(1, round(high / rows)) * rows, max(1, round(wide / columns)) * columns


def _heat_panel(subject, image: np.ndarray, values: heat.Heat) -> HeatPanel:
    pixels = drawing.score_map(image, values.scores, grid=subject.grid, min_side=1)
    low, high = drawing.score_range(values.scores)
    above = high < np.nanmax(values.scores)
    scale = _number(low), _number(high) + (" and above" if above else "")
    return HeatPanel(pixels, values.meaning, scale)


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.2g}"


def _notes(subject, marked, left_out: Sequence[Mapping[str, str]]) -> list[str]:
    notes = [f"Seen by: {subject.note}. {subject.grid[0]} x {subject.grid[1]} patches."]
    if subject.question:
        notes[0] += f" Question: {subject.question}"
    inside = any(result.heat and result.heat.meaning == heat.LAYERS for result in marked)
    notes.append(_LEGEND + (_INSIDE if inside else ""))
    if left_out:
        notes.append(f"Left out: {', '.join(each['compressor'] for each in left_out)}.")
    return notes


def _draw_one(subject, marked: Sequence[Marked], title: str, left_out) -> np.ndarray:
    (result,) = marked
    image = subject.shown(_size(subject, _SIDE))
    drawn = drawing.token_map(image, result.source, grid=subject.grid, min_side=1)
    lines = caption(result) + ([f"answer: {result.answer}"] if result.answer else [])
    panels = [Panel(image, "image"), Panel(drawn, f"{result.name} at {result.budget}", lines)]
    if result.heat is not None:
        panel = _heat_panel(subject, image, result.heat)
        panels.append(Panel(panel.pixels, panel.meaning, scale=panel.scale))
    return draw_sheet(title, _notes(subject, marked, left_out), panels, columns=3)


def _draw_many(subject, marked: Sequence[Marked], title: str, left_out) -> np.ndarray:
    image = subject.shown(_size(subject, _SMALL))
    smaller = subject.shown(_size(subject, _SMALL // 2))
    panels = [Panel(image, "image")]
    for result in marked:
        drawn = drawing.token_map(image, result.source, grid=subject.grid, min_side=1)
        panel = None if result.heat is None else _heat_panel(subject, smaller, result.heat)
        name = f"{result.name} at {result.budget}"
        panels.append(Panel(drawn, name, caption(result), heat=panel))
    return draw_sheet(title, _notes(subject, marked, left_out), panels, columns=4)


def _to_json(subject, marked: Sequence[Marked], left_out) -> dict[str, Any]:
    maps = []
    for result in marked:
        row = {
            "compressor": result.name,
            "budget": result.budget,
            "options": {k: v for k, v in result.options.items() if k not in ("budget", "grid")},
            **heat.counts(result.source)._asdict(),
            "heat": result.heat.meaning if result.heat else None,
        }
        if len(marked) == 1:
            row |= {"answer": result.answer or None, "source": result.source.tolist()}
            row["scores"] = _plain(result.heat.scores) if result.heat else None
        maps.append(row)
    return {
        "seen_by": subject.note,
        "grid": list(subject.grid),
        "question": subject.question or None,
        "maps": maps,
        "left_out": left_out,
    }


def _plain(scores: np.ndarray) -> list[float | None]:
    """JSON has no NaN."""
    return [round(float(s), 6) if np.isfinite(s) else None for s in scores]
