"""A contact sheet of the data: images with their questions and answers."""

import textwrap
from pathlib import Path

import numpy as np

from efficient_vlm.data import transforms
from efficient_vlm.data.records import Conversation
from efficient_vlm.data.sources import Source
from efficient_vlm.processing.decode_image import BadRecord

_COLUMNS = 3
_LINES = 9  # Lines of text beside one image.
_WIDTH = 34  # Characters in a line.
_INK, _PALE, _ANSWER = "#1f2933", "#7b8794", "#0b7285"


def contact_sheet(
    source: Source,
    spec: transforms.Spec,
    path: str | Path,
    *,
    title: str,
    images: int = 12,
    seed: int = 0,
) -> list[int]:
    """Writes a PNG of randomly drawn samples, as the model sees them.

    Args:
      source: records.
      spec: image size and limits.
      path: PNG to write.
      title: first line of the sheet.
      images: number of samples, fewer when the source is smaller.
      seed: of the draw.

    Returns:
      Numbers of the records shown. Unusable records are left out.
    """
    # The object interface, because pyplot would change the backend of a notebook.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = []
    for index in np.random.default_rng(seed).permutation(len(source)):
        if len(shown) == images:
            break
        try:
            record = source[int(index)]
            shown.append((int(index), record, transforms.image_arrays(record, spec)))
        except BadRecord:
            continue
    rows = max(1, -(-len(shown) // _COLUMNS))
    figure = Figure(figsize=(5.2 * _COLUMNS, 0.7 + 2.35 * rows), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    top = 1 - 0.6 / figure.get_figheight()
    figure.text(0.012, 1 - 0.3 / figure.get_figheight(), title, va="center", size=13, color=_INK)
    grid = figure.add_gridspec(
        rows, _COLUMNS * 2, left=0.012, right=0.995, top=top, bottom=0.01, wspace=0.06, hspace=0.1,
        width_ratios=[1, 1.22] * _COLUMNS,
    )  # fmt: skip
    for number, (index, record, arrays) in enumerate(shown):
        row, column = divmod(number, _COLUMNS)
        picture = figure.add_subplot(grid[row, 2 * column])
        text = figure.add_subplot(grid[row, 2 * column + 1])
        for axes in (picture, text):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        count = len(record.images)
        if count:
            picture.imshow(np.concatenate(arrays["images"][:count], 1), interpolation="nearest")
        else:
            picture.text(0.5, 0.5, "text only", ha="center", va="center", color=_PALE)
        _write(text, f"{record.id}  (number {index})", record.conversations)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return [index for index, _, _ in shown]


def _write(axes, name: str, conversations: tuple[Conversation, ...]) -> None:
    """Questions in dark ink, answers in colour, each pair once, as many as fit."""
    turns = list(dict.fromkeys(turn for c in conversations for turn in c.turns))
    lines, done = [[(name, _PALE)]], 0
    for turn in turns:
        block = _block(*turn)
        if len(lines) + len(block) > _LINES + 1:
            break
        lines += block
        done += 1
    if done < len(turns):
        lines[0].append((f"   {done} of {len(turns)} shown", _PALE))
    for number, parts in enumerate(lines):
        size = 9.0 if number else 8.0
        at = 0.95 - number * 0.95 / (_LINES + 1)
        anchor = {"xy": (0.02, at), "xycoords": "axes fraction"}
        for text, colour in parts:
            text = text.replace("$", r"\$")  # Not a formula.
            drawn = axes.annotate(text, color=colour, size=size, va="center", **anchor)
            anchor = {"xy": (1, 0.5), "xycoords": drawn}  # The next part follows this one.


def _block(prompt: str, answer: str) -> list[list[tuple[str, str]]]:
    """Lines of (text, colour) parts: short pairs share a line, long text is wrapped."""
    if len(prompt) + len(answer) + 3 <= _WIDTH:
        return [[(f"{prompt}  ", _INK), (f"→ {answer}", _ANSWER)]]
    question = [[(line, _INK)] for line in _wrap(prompt or "(no question)")]
    arrows = ["→ "] + ["   "] * 2
    reply = [[(arrow + line, _ANSWER)] for arrow, line in zip(arrows, _wrap(answer), strict=False)]
    return question + reply


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, max_lines=3, placeholder=" …") or [""]
