"""The HTML page: skeleton, style, small builders. Everything that is text goes through `esc`."""

import html
import math
from collections.abc import Sequence

from efficient_vlm.report import marks

# scheme: light values first; `_DARK` overrides them.
_LIGHT = (
    "--page:#fbfbf9;--card:#ffffff;--ink:#1d2329;--soft:#59626d;--faint:#8a929c;--line:#dfe2e6;"
    "--grid:#eceef0;--good:#00775a;--bad:#b34700;--accent:#0b62a4;--bar:#8fbfdd;--warn:#fdf3e1;"
    "--warn-line:#e0a63c;"
)
_DARK = (
    "--page:#14171a;--card:#1b1f23;--ink:#e8eaed;--soft:#a9b1ba;--faint:#7d8791;--line:#30363c;"
    "--grid:#262b30;--good:#3fc79f;--bad:#f08a4b;--accent:#6db7ee;--bar:#2f6b91;--warn:#2e2718;"
    "--warn-line:#a67c2a;"
)

_STYLE = """
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
 font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:0 20px 64px}
header{max-width:1120px;margin:0 auto;padding:36px 20px 8px}
h1{font-size:27px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:19px;margin:44px 0 4px;letter-spacing:-.005em;scroll-margin-top:56px}
h3{font-size:15px;margin:22px 0 6px}
p{margin:6px 0 12px;max-width:76ch}
.lead{font-size:16px;color:var(--soft)}
.note,.missing{color:var(--soft);font-size:13.5px}
.missing{border-left:3px solid var(--line);padding:4px 0 4px 12px}
.warning{background:var(--warn);border-left:3px solid var(--warn-line);padding:10px 14px;
 border-radius:4px;margin:10px 0}
a{color:var(--accent)}
nav{position:sticky;top:0;z-index:2;background:var(--page);border-bottom:1px solid var(--line)}
nav ul{max-width:1120px;margin:0 auto;padding:9px 20px;display:flex;gap:18px;list-style:none;
 overflow-x:auto;font-size:13.5px;white-space:nowrap}
nav a{text-decoration:none;color:var(--soft)}nav a:hover{color:var(--accent)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
 margin:18px 0;padding:0}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:11px 14px}
.cards dt{color:var(--soft);font-size:12.5px}
.cards dd{margin:2px 0 0;font-size:19px;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.cards dd.small{font-size:12.5px;font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.findings{padding-left:20px;max-width:82ch}.findings li{margin:5px 0}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(320px,100%),1fr));gap:14px;
 margin:12px 0}
.panels.wide{grid-template-columns:repeat(auto-fit,minmax(min(430px,100%),1fr))}
.panel{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 8px 4px;
 margin:0;min-width:0}
.chart{display:block;width:100%;height:auto;max-width:560px;margin:0 auto}
.chart text{fill:var(--soft);font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
.chart .chart-title{fill:var(--ink);font-size:13px;font-weight:600}
.chart .tick{font-size:10.5px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--grid)}.axis{stroke:var(--faint)}
.reference{stroke:var(--faint);stroke-dasharray:4 3}.band{opacity:.13}.whisker{opacity:.7}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.derived{fill:none;stroke-dasharray:3 3;opacity:.6}
.reference-label{fill:var(--soft);paint-order:stroke;stroke:var(--card);stroke-width:3px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;padding:0;margin:10px 0;
 font-size:13.5px}
.legend li{display:flex;align-items:center;gap:7px}
.scroll{overflow-x:auto;margin:12px 0;border:1px solid var(--line);border-radius:8px;
 background:var(--card)}
.scroll:focus-visible,a:focus-visible,th button:focus-visible{outline:2px solid var(--accent);
 outline-offset:1px}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);font-size:13px;padding:9px 12px;caption-side:top}
th,td{padding:6px 12px;text-align:right;border-top:1px solid var(--grid);white-space:nowrap}
thead th{color:var(--soft);font-weight:600;border-top:0;border-bottom:1px solid var(--line);
 vertical-align:bottom;white-space:normal}
tbody th{font-weight:600}th.text,td.text{text-align:left}
tbody tr:hover{background:var(--grid)}
tbody tr.group td,tbody tr.group th{border-top:1px solid var(--faint)}
td small{color:var(--soft);font-size:11.5px;margin-left:2px}
td.bar{background:linear-gradient(var(--bar),var(--bar)) left bottom/var(--w) 3px no-repeat}
th button{all:unset;cursor:pointer}th button::after{content:"\\2195";opacity:.4;margin-left:4px}
th[aria-sort=ascending] button::after{content:"\\2191";opacity:1}
th[aria-sort=descending] button::after{content:"\\2193";opacity:1}
.right{color:var(--good)}.wrong{color:var(--bad)}
.question{background:var(--card);border:1px solid var(--line);border-radius:8px;
 padding:12px 16px 14px;margin:14px 0}
.question h3{margin:0 0 10px}.question h3 small{font-weight:400;color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(114px,1fr));gap:14px}
.tiles figure{margin:0;min-width:0}
.tiles img{width:100%;height:auto;display:block;border-radius:4px;image-rendering:pixelated}
.tiles figcaption{font-size:12.5px;line-height:1.35;margin-top:5px;color:var(--soft);
 overflow-wrap:anywhere}
.tiles figcaption b{display:block;font-weight:600}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:11px 14px;
 overflow-x:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details summary{cursor:pointer;color:var(--accent);font-size:13.5px}
@media(max-width:560px){h1{font-size:22px}th,td{padding:5px 8px}.panels{gap:10px}}
@media print{nav{display:none}.panel,.question{break-inside:avoid}}
"""

# Sorting is an extra: without scripts the tables read the same.
_SCRIPT = """
document.querySelectorAll("table.sortable").forEach(t=>{
 const body=t.tBodies[0],value=(r,i)=>{const c=r.cells[i];return c.dataset.v??c.textContent};
 [...t.tHead.rows[0].cells].forEach((h,i)=>{
  if(!h.textContent)return;const b=document.createElement("button");
  b.textContent=h.textContent;h.replaceChildren(b);
  b.onclick=()=>{const up=h.getAttribute("aria-sort")==="descending";
   [...t.tHead.rows[0].cells].forEach(c=>c.removeAttribute("aria-sort"));
   h.setAttribute("aria-sort",up?"ascending":"descending");
   [...body.rows].sort((a,c)=>{const x=value(a,i),y=value(c,i),n=x-y;
    const d=Number.isNaN(n)?String(x).localeCompare(String(y)):n;return up?d:-d})
    .forEach(r=>{r.classList.remove("group");body.append(r)})}})});
"""


def esc(value: object) -> str:
    """Text safe in content and in quoted attributes."""
    return html.escape(str(value), quote=True)


def document(title: str, header: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole page.

    Args:
      title: of the window; escaped here.
      header: HTML above the navigation.
      sections: (anchor, heading, HTML) in order; headings are escaped here.
    """
    light, dark = _LIGHT + marks.palette_css(False), _DARK + marks.palette_css(True)
    links = "".join(f'<li><a href="#{esc(a)}">{esc(h)}</a></li>' for a, h, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{esc(a)}"><h2 id="{esc(a)}">{esc(h)}</h2>{content}</section>'
        for a, h, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # No network, whatever a prediction or a config may contain.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{esc(title)}</title><style>:root{{{light}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{_STYLE}</style></head>"
        f'<body><header>{header}</header><nav aria-label="Sections"><ul>{links}</ul></nav>'
        f"<main>{body}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def cell(
    text: str,
    *,
    sort: float | None = None,
    note: str = "",
    bar: float | None = None,
    kind: str = "",
) -> str:
    """A `<td>`.

    Args:
      text: shown; escaped here, like `note`, which follows in small print.
      sort: value that the sort button uses.
      bar: share of the cell's width, 0 to 1, to shade.
      kind: extra class.
    """
    classes, extra = [kind] if kind else [], ""
    if bar is not None and math.isfinite(bar):
        classes.append("bar")
        extra += f' style="--w:{100 * min(max(bar, 0), 1):.1f}%"'
    if sort is not None and math.isfinite(sort):
        extra += f' data-v="{sort:.8g}"'
    if classes:
        extra += f' class="{" ".join(classes)}"'
    small = f" <small>{esc(note)}</small>" if note else ""
    return f"<td{extra}>{esc(text)}{small}</td>"


def table(
    headers: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    *,
    caption: str,
    groups: Sequence[int] = (),
    sortable: bool = True,
) -> str:
    """A table whose first column is a row header.

    Args:
      headers: column names, the first above the row headers.
      rows: (row header, cells as HTML from `cell`).
      caption: what the numbers are.
      groups: indices of rows that begin a group and get a line above.
    """
    head = "".join(
        f'<th scope="col"{" class=text" if k == 0 else ""}>{esc(h)}</th>'
        for k, h in enumerate(headers)
    )
    body = "".join(
        f'<tr{" class=group" if k in groups else ""}><th scope="row" class="text">{esc(name)}</th>'
        f"{''.join(cells)}</tr>"
        for k, (name, cells) in enumerate(rows)
    )
    kind = ' class="sortable"' if sortable and len(rows) > 1 else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(caption)}"><table{kind}>'
        f"<caption>{esc(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def missing(text: str) -> str:
    """A paragraph saying that a part is not there, and how to get it."""
    return f'<p class="missing">{esc(text)}</p>'


def panels(charts: Sequence[str]) -> str:
    """Charts side by side as far as the screen allows."""
    # Four charts look better as two pairs than as three and one.
    kind = "panels wide" if len(charts) in (1, 2, 4) else "panels"
    return f'<div class="{kind}">{"".join(f"<div class=panel>{c}</div>" for c in charts)}</div>'


def count(value: float) -> str:
    """A step number or another count: in full up to 99,999, then with a prefix."""
    return f"{value:,.0f}" if abs(value) < 1e5 else si(value)


def cards(items: Sequence[tuple[str, str]]) -> str:
    """Headline figures; long values are set small."""
    inner = "".join(
        f"<div><dt>{esc(k)}</dt><dd{' class=small' if len(str(v)) > 22 else ''}>{esc(v)}</dd></div>"
        for k, v in items
    )
    return f'<dl class="cards">{inner}</dl>'


def si(value: float, unit: str = "") -> str:
    """3 significant digits with a decimal prefix: 12.3 M."""
    if not math.isfinite(value):
        return "–"
    for power, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power * 0.9995:
            return f"{significant(value / power)} {prefix}{unit}"
    return f"{significant(value)} {unit}".rstrip()


def kibi(value: float) -> str:
    """Bytes with a binary prefix."""
    if not math.isfinite(value):
        return "–"
    for power, prefix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= power:
            return f"{significant(value / power)} {prefix}"
    return f"{value:.0f} B"


def significant(value: float, digits: int = 3) -> str:
    """Fixed notation with `digits` significant digits, integers above that in full."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}") if abs(value) < 10**digits else value
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, min(places, 6))}f}"


def duration(seconds: float) -> str:
    """Seconds as 2 h 05 min, 2 min 23 s or 4.2 s."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{significant(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
