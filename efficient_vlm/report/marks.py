"""The smallest parts of a chart: colours, markers, labels, as SVG text.

Colours are CSS variables (`--s0` ... and `--ink`, `--faint`, `--grid`) that the page defines, so
that one drawing is right in light and dark. Every series also has a marker of its own.
"""

import html

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
        arms = (
            [(-d, 0, d, 0), (0, -d, 0, d)] if kind == "plus" else [(-d, -d, d, d), (-d, d, d, -d)]
        )
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
    return (
        f"{shape}><title>{html.escape(tip)}</title></{shape.split()[0][1:]}>"
        if tip
        else shape + "/>"
    )


def swatch(style: int, markers: bool = True) -> str:
    """Line and marker for a legend."""
    mark = marker(13, 6, style) if markers else ""
    return (
        '<svg width="26" height="12" aria-hidden="true">'
        f'<line x1="1" y1="6" x2="25" y2="6" stroke="{colour(style)}" stroke-width="2"/>'
        f"{mark}</svg>"
    )


def label(kind: str, x: float, y: float, anchor: str, text: str, *, upright: bool = False) -> str:
    """A `<text>`; escaped here.

    Args:
      kind: its class.
      x, y: place of the anchor.
      anchor: "start", "middle" or "end".
      text: the content.
      upright: turned to read from below, for y axes.
    """
    place = f'x="{x:.1f}" y="{y:.1f}"'
    if upright:
        place = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)"'
    return f'<text class="{kind}" {place} text-anchor="{anchor}">{html.escape(text)}</text>'


def line(kind: str, x1: float, y1: float, x2: float, y2: float, extra: str = "") -> str:
    """A `<line>` of a class, with further attributes."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{kind}" {ends} {extra}/>'


def frame(width: int, height: int, title: str, describe: str) -> str:
    """The opening `<svg>` with its accessible name, and the title drawn at the top."""
    name = html.escape(f"{title}. {describe}", quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{name}">' + label("chart-title", 48, 16, "start", title)
    )
