"""Charts of the report as inline SVG text: no plotting library, no fonts, both colour schemes."""

import base64
import dataclasses
import html
import math
from collections.abc import Callable, Sequence

import numpy as np

from efficient_vlm.report import drawing
from efficient_vlm.report.marks import colour, frame, label, line, marker


@dataclasses.dataclass(frozen=True)
class Series:
    """A named line with optional limits.

    Attributes:
      label: shown in tooltips and legends.
      x, y: points in drawing order; y may hold NaN (left out).
      lo, hi: limits of y, both or neither.
      style: index of colour and marker; -1 is the ink colour, for the reference.
      line: whether the points are joined.
      markers: whether the points are marked.
      dashed: a thin dashed line, for what is derived and not measured.
      names: one tooltip per point in place of "label: y at x".
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    lo: Sequence[float] | None = None
    hi: Sequence[float] | None = None
    style: int = 0
    line: bool = True
    markers: bool = True
    dashed: bool = False
    names: Sequence[str] | None = None


def size_for(charts: int) -> tuple[int, int]:
    """CSS pixels of each of so many charts, matching how `page.panels` lays them out."""
    return (460, 270) if charts in (1, 2, 4) else (340, 240)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values spanning [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _plain(value: float) -> str:
    return f"{value:g}"


def _finite(values) -> list[float]:
    return [float(v) for v in values if v is not None and math.isfinite(v)]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "",
    y_label: str = "",
    x_log: bool = False,
    x_ticks: Sequence[float] | None = None,
    y_range: tuple[float, float] | None = None,
    references: Sequence[tuple[float, str]] = (),
    x_format: Callable[[float], str] = _plain,
    y_format: Callable[[float], str] = _plain,
    size: tuple[int, int] = (340, 240),
    describe: str = "",
) -> str:
    """A chart as one `<svg>` element.

    Args:
      series: what to draw; empty or all-NaN series are left out.
      title: heading inside the drawing and its accessible name.
      x_log: base-2 logarithmic x axis; values must be positive.
      x_ticks: places of the ticks; None picks round ones.
      y_range: limits of y; None fits the data.
      references: horizontal dashed lines (value, label).
      size: width and height in CSS pixels; the drawing scales down on narrow screens.
      describe: sentence read out by screen readers after the title.
    """
    width, height = size
    left, right, top, bottom = 48, 12, 30, 42
    warp = (lambda v: math.log2(v)) if x_log else float
    xs = [warp(v) for s in series for v in _finite(s.x)]
    ys = [v for s in series for part in (s.y, s.lo or (), s.hi or ()) for v in _finite(part)]
    ys += [value for value, _ in references]
    if not xs or not ys:
        return f'<p class="missing">{html.escape(title)}: nothing to draw.</p>'
    x0, x1 = min(xs), max(xs)
    x0, x1 = (x0 - 0.5, x1 + 0.5) if x0 == x1 else (x0, x1)
    pad = (x1 - x0) * 0.04
    x0, x1 = x0 - pad, x1 + pad
    if y_range is None:
        low, high = min(ys), max(ys)
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        y_range = (0.0 if 0 <= low <= (high - low) * 0.3 else low - room, high + room)
    y0, y1 = y_range
    plot_w, plot_h = width - left - right, height - top - bottom

    def px(v: float) -> float:
        return left + (warp(v) - x0) / (x1 - x0) * plot_w

    def py(v: float) -> float:
        return top + (1 - (min(max(v, y0), y1) - y0) / (y1 - y0)) * plot_h

    base, edge = height - bottom, width - right
    out = [frame(width, height, title, describe)]
    for tick in nice_ticks(y0, y1, 5):
        y = py(tick)
        out.append(line("grid", left, y, edge, y))
        out.append(label("tick", left - 6, y + 3.5, "end", y_format(tick)))
    if x_ticks is None:
        x_ticks = [2**v if x_log else v for v in nice_ticks(x0 + pad, x1 - pad, 5)]
    for tick in x_ticks:
        x = px(tick)
        out.append(line("axis", x, base, x, base + 4))
        out.append(label("tick", x, base + 16, "middle", x_format(tick)))
    out.append(f'<path class="axis" d="M{left} {top}V{base}H{edge}" fill="none"/>')
    out.append(label("label", left + plot_w / 2, height - 8, "middle", x_label))
    out.append(label("label", 12, top + plot_h / 2, "middle", y_label, upright=True))
    for value, name in references:
        y = py(value)
        out.append(line("reference", left, y, edge, y))
        out.append(label("tick reference-label", edge - 2, y - 4, "end", name))
    layers: tuple[list, list, list] = ([], [], [])  # Bands below lines below markers.
    for s in series:
        _draw(s, px, py, x_format, y_format, layers)
    return "".join(out + layers[0] + layers[1] + layers[2]) + "</svg>"


def _draw(s: Series, px, py, x_format, y_format, layers) -> None:
    bands, lines, marks = layers
    has_limits = s.lo is not None and s.hi is not None
    points = [k for k, v in enumerate(s.y) if v is not None and math.isfinite(v)]
    if not points:
        return
    paint = colour(s.style)
    if has_limits and s.line and len(points) > 1:
        upper = [f"{px(s.x[k]):.1f},{py(s.hi[k]):.1f}" for k in points]
        lower = [f"{px(s.x[k]):.1f},{py(s.lo[k]):.1f}" for k in reversed(points)]
        bands.append(f'<polygon class="band" fill="{paint}" points="{" ".join(upper + lower)}"/>')
    elif has_limits:
        for k in points:
            x = px(s.x[k])
            pen = f'stroke="{paint}" stroke-width="1.5"'
            bands.append(line("whisker", x, py(s.lo[k]), x, py(s.hi[k]), pen))
    if s.line and len(points) > 1:
        path = " ".join(f"{px(s.x[k]):.1f},{py(s.y[k]):.1f}" for k in points)
        kind = "derived" if s.dashed else "line"
        lines.append(f'<polyline class="{kind}" points="{path}" stroke="{paint}"/>')
    if s.markers or len(points) == 1:
        for k in points:
            tip = f"{s.label}: {y_format(s.y[k])} at {x_format(s.x[k])}"
            if has_limits:
                tip += f" (95 %: {y_format(s.lo[k])} to {y_format(s.hi[k])})"
            marks.append(
                marker(px(s.x[k]), py(s.y[k]), s.style, tip=s.names[k] if s.names else tip)
            )


def heat_map(
    ratios: np.ndarray,
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_ends: tuple[str, str] = ("", ""),
    size: tuple[int, int] = (340, 240),
) -> str:
    """Ratios [rows, columns] to an even share as colours: 1 is neutral, 1/4 and 4 the two ends.

    One PNG pixel per cell, so that the size hardly depends on their number.

    Args:
      ratios: float [R, C], 0 or more.
      title, x_label, y_label: texts.
      x_ends: labels of the first and the last column.
      size: width and height in CSS pixels.
    """
    width, height = size
    left, right, top, bottom = 48, 12, 30, 58
    unit = np.clip(np.log2(np.maximum(ratios, 1e-9)) / 4 + 0.5, 0, 1)
    image = _png_uri(drawing.heat_colours(unit, diverging=True))
    bar = _png_uri(drawing.heat_colours(np.linspace(0, 1, 64)[None], diverging=True))
    plot_w, plot_h = width - left - right, height - top - bottom
    style = 'preserveAspectRatio="none" style="image-rendering:pixelated"'
    spread = f"Values from {np.min(ratios):.2f} to {np.max(ratios):.2f}."
    rows, base = ratios.shape[0], top + plot_h
    step = max(1, -(-rows // 12))

    middle, edge = left + plot_w / 2, width - right
    out = [
        frame(width, height, title, spread),
        f'<image x="{left}" y="{top}" width="{plot_w}" height="{plot_h}" href="{image}" {style}/>',
        *(
            label("tick", left - 6, top + (r + 0.5) * plot_h / rows + 3.5, "end", str(r))
            for r in range(0, rows, step)
        ),
        label("tick", left, base + 14, "start", x_ends[0]),
        label("label", middle, base + 14, "middle", x_label),
        label("tick", edge, base + 14, "end", x_ends[1]),
        label("label", 12, top + plot_h / 2, "middle", y_label, upright=True),
        f'<image x="{left}" y="{base + 24}" width="{plot_w}" height="7" href="{bar}" {style}/>',
        label("tick", left, base + 44, "start", "¼× or less"),
        label("tick", middle, base + 44, "middle", "even share"),
        label("tick", edge, base + 44, "end", "4× or more"),
    ]
    return "".join(out) + "</svg>"


def _png_uri(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(drawing.png(pixels)).decode("ascii")
