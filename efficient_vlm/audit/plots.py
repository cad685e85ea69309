"""Charts of the report as inline SVG text: no plotting library, no fonts, both colour schemes.

Colours are CSS variables (`--s0` ... and `--ink`, `--faint`, `--grid`) that the page defines, so one
drawing is right in light and dark. Every series also has a marker of its own, and every point a
tooltip.
"""

import base64
import dataclasses
import html
import math
from collections.abc import Callable, Sequence

import numpy as np

from efficient_vlm.audit import maps

# Okabe-Ito without yellow (illegible on white): light value, and a lighter one for dark pages.
PALETTE = (
    ("#0072b2", "#4aa8e0"),  # blue
    ("#d55e00", "#f0803a"),  # vermilion
    ("#009e73", "#2fc49a"),  # bluish green
    ("#cc79a7", "#dd95be"),  # reddish purple
    ("#e69f00", "#e9ad2c"),  # orange
    ("#56b4e9", "#86cdf5"),  # sky blue
)
MARKERS = ("circle", "square", "up", "diamond", "down", "cross", "plus")


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
    names: Sequence[str] | None = None


def colour(style: int) -> str:
    """CSS colour of a series."""
    return "var(--ink)" if style < 0 else f"var(--s{style % len(PALETTE)})"


def palette_css(dark: bool) -> str:
    """Definitions of `--s0` ... for one colour scheme."""
    return "".join(f"--s{k}:{pair[dark]};" for k, pair in enumerate(PALETTE))


def marker(x: float, y: float, style: int, size: float = 4.0, tip: str = "") -> str:
    """One data point as SVG."""
    # 7 markers beside 6 colours: the pair repeats after 42 series, not after 6.
    kind = MARKERS[0] if style < 0 else MARKERS[style % len(MARKERS)]
    s, paint = size, f'fill="{colour(style)}"'
    if kind == "circle":
        shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{s:g}" {paint}'
    elif kind in ("cross", "plus"):
        d = s if kind == "plus" else s * 0.8
        arms = [(-d, 0, d, 0), (0, -d, 0, d)] if kind == "plus" else [(-d, -d, d, d), (-d, d, d, -d)]
        path = "".join(f"M{x + a:.1f} {y + b:.1f}L{x + c:.1f} {y + e:.1f}" for a, b, c, e in arms)
        shape = f'<path d="{path}" fill="none" stroke="{colour(style)}" stroke-width="2.4"'
    else:
        corners = {
            "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            "up": [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
            "down": [(0, 1.2), (1.1, -0.8), (-1.1, -0.8)],
            "diamond": [(0, -1.3), (1.2, 0), (0, 1.3), (-1.2, 0)],
        }[kind]
        points = " ".join(f"{x + a * s:.1f},{y + b * s:.1f}" for a, b in corners)
        shape = f'<polygon points="{points}" {paint}'
    return f"{shape}><title>{html.escape(tip)}</title></{shape.split()[0][1:]}>" if tip else shape + "/>"


def swatch(style: int) -> str:
    """Line and marker for a legend."""
    return (
        '<svg width="26" height="12" aria-hidden="true">'
        f'<line x1="1" y1="6" x2="25" y2="6" stroke="{colour(style)}" stroke-width="2"/>'
        f"{marker(13, 6, style)}</svg>"
    )


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

    text = html.escape(title)
    out = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{html.escape(f"{title}. {describe}", quote=True)}">',
        f'<text x="{left}" y="16" class="chart-title">{text}</text>',
    ]
    for tick in nice_ticks(y0, y1, 5):
        y = py(tick)
        out.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{html.escape(y_format(tick))}</text>')
    if x_ticks is None:
        x_ticks = [2**v if x_log else v for v in nice_ticks(x0 + pad, x1 - pad, 5)]
    for tick in x_ticks:
        x, base = px(tick), height - bottom
        out.append(f'<line class="axis" x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 4}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{base + 16}" text-anchor="middle">{html.escape(x_format(tick))}</text>')
    out.append(f'<path class="axis" d="M{left} {top}V{height - bottom}H{width - right}" fill="none"/>')
    if x_label:
        out.append(f'<text class="label" x="{left + plot_w / 2:.0f}" y="{height - 8}" text-anchor="middle">{html.escape(x_label)}</text>')
    if y_label:
        middle = top + plot_h / 2
        out.append(f'<text class="label" transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>')
    for value, label in references:
        y = py(value)
        out.append(f'<line class="reference" x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick reference-label" x="{width - right - 2}" y="{y - 4:.1f}" text-anchor="end">{html.escape(label)}</text>')
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
            bands.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{py(s.lo[k]):.1f}" y2="{py(s.hi[k]):.1f}" stroke="{paint}" stroke-width="1.5" opacity=".7"/>')
    if s.line and len(points) > 1:
        path = " ".join(f"{px(s.x[k]):.1f},{py(s.y[k]):.1f}" for k in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{paint}" stroke-width="2" stroke-linejoin="round"/>')
    if s.markers or len(points) == 1:
        for k in points:
            tip = f"{s.label}: {y_format(s.y[k])} at {x_format(s.x[k])}"
            if has_limits:
                tip += f" (95 %: {y_format(s.lo[k])} to {y_format(s.hi[k])})"
            marks.append(marker(px(s.x[k]), py(s.y[k]), s.style, tip=s.names[k] if s.names else tip))


def heat_map(
    values: np.ndarray,
    *,
    title: str,
    x_label: str,
    y_label: str,
    limits: tuple[float, float],
    x_ends: tuple[str, str] = ("", ""),
    size: tuple[int, int] = (340, 200),
) -> str:
    """A matrix [rows, columns] as colours, one PNG pixel per cell however many cells there are.

    Args:
      values: float [R, C]; NaN is left grey.
      title, x_label, y_label: texts.
      limits: values at the two ends of the colour scale, which is drawn below.
      x_ends: labels of the first and the last column.
      size: width and height in CSS pixels.
    """
    width, height = size
    left, right, top, bottom = 48, 12, 30, 62
    low, high = limits
    unit = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    image = _png_uri(maps.heat_colours(unit))
    bar = _png_uri(maps.heat_colours(np.linspace(0, 1, 64)[None]))
    plot_w, plot_h = width - left - right, height - top - bottom
    style = 'preserveAspectRatio="none" style="image-rendering:pixelated"'
    name = html.escape(
        f"{title}. Values from {np.nanmin(values):.3g} to {np.nanmax(values):.3g}.", quote=True
    )
    rows = values.shape[0]
    every = max(1, -(-rows // 12))
    ticks = "".join(
        f'<text class="tick" x="{left - 6}" y="{top + (r + 0.5) * plot_h / rows + 3.5:.1f}" '
        f'text-anchor="end">{r}</text>'
        for r in range(0, rows, every)
    )
    base = top + plot_h
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{name}"><text x="{left}" y="16" class="chart-title">{html.escape(title)}</text>'
        f'<image x="{left}" y="{top}" width="{plot_w}" height="{plot_h}" href="{image}" {style}/>{ticks}'
        f'<text class="tick" x="{left}" y="{base + 14}">{html.escape(x_ends[0])}</text>'
        f'<text class="tick" x="{width - right}" y="{base + 14}" text-anchor="end">{html.escape(x_ends[1])}</text>'
        f'<text class="label" x="{left + plot_w / 2:.0f}" y="{base + 14}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text class="label" transform="translate(12 {top + plot_h / 2:.0f}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
        f'<image x="{left}" y="{base + 24}" width="{plot_w}" height="8" href="{bar}" {style}/>'
        f'<text class="tick" x="{left}" y="{base + 46}">{low:.3g}</text>'
        f'<text class="tick" x="{width - right}" y="{base + 46}" text-anchor="end">{high:.3g}</text>'
        "</svg>"
    )


def _png_uri(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(maps.png(pixels)).decode("ascii")
