"""Cost sections of the report: tables, accuracy against cost, and the findings in words."""

import math
from collections.abc import Sequence

from efficient_vlm.costs.stages import STAGES
from efficient_vlm.report import page, plots, records
from efficient_vlm.report.records import Run
from efficient_vlm.report.sections.accuracy import legend, styles_of

MS_STAGES = ("encode", "compress", "prefill", "decode_per_token")
FIRST_TOKEN = ("encode", "compress", "prefill")


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator and denominator > 0 else math.nan


def _ms(value: float) -> str:
    """Milliseconds to the microsecond below 10, so that a column lines up."""
    return (f"{value:.3f}" if value < 10 else f"{value:.1f}") if math.isfinite(value) else "–"


def _times(value: float) -> str:
    return f"{page.significant(value)}×" if math.isfinite(value) else "–"


def cost_table(run: Run) -> str:
    """Tokens, FLOPs, KV bytes and milliseconds, and whether time follows FLOPs."""
    costs = {s: rows[0] for s, rows in records.rows_of(run.results, "cost").items()}
    if not costs:
        return page.missing("No costs measured: results.json has no cost rows.")
    base = records.baseline_of(costs)
    reference = costs[base]
    work, clock, groups, previous = [], [], [], None
    for k, ((name, budget), row) in enumerate(costs.items()):
        if previous not in (None, budget):
            groups.append(k)
        previous = budget
        total = records.stage(row, "flops", *STAGES)
        share = _ratio(total, records.stage(reference, "flops", *STAGES))
        tokens = records.number(row.get("visual_tokens"))
        cells = [page.cell(f"{tokens:,.4g}" if math.isfinite(tokens) else "–", sort=tokens)]
        for stage in STAGES:
            value = records.stage(row, "flops", stage)
            cells.append(page.cell(page.si(value), sort=value))
        cells.append(page.cell(page.si(total), sort=total))
        shown = f"{100 * share:.0f} %" if math.isfinite(share) else "–"
        cells.append(page.cell(shown, sort=share, bar=share))
        memory = records.number(row.get("kv_bytes"))
        cells.append(page.cell(page.kibi(memory), sort=memory))
        work.append((f"{name} {budget}", cells))

        times = [records.stage(row, "ms", stage) for stage in MS_STAGES]
        cells = [page.cell(_ms(t), sort=t) for t in times]
        first = records.stage(row, "ms", *FIRST_TOKEN)
        cells.append(page.cell(_ms(first), sort=first))
        faster = [
            _ratio(records.stage(reference, *part), records.stage(row, *part))
            for part in (
                ("ms", *FIRST_TOKEN),
                ("flops", "decoder", "head"),
                ("ms", "prefill"),
            )
        ]
        cells += [page.cell(_times(f), sort=f) for f in faster]
        clock.append((f"{name} {budget}", cells))
    whole = records.stage(reference, "ms", *FIRST_TOKEN)
    share = _ratio(records.stage(reference, "ms", "prefill"), whole)
    bound = ""
    if math.isfinite(share) and share < 1:
        bound = (
            f"<p class=note>Prefill is {100 * share:.0f} % of the time to the first token at "
            f"{page.esc(base[0])} {base[1]}. However few visual tokens, a compressor behind the "
            f"encoder cannot make that time more than {1 / (1 - share):.2f}× shorter "
            "(Amdahl’s bound).</p>"
        )
    return (
        page.table(
            ["method", "visual tokens", *STAGES, "FLOPs", f"of {base[0]} {base[1]}", "KV cache"],
            work,
            caption="FLOPs of one question up to its first answer token, 2 per multiply-add, all "
            "matrix products, attention as a full rectangle. Compressor includes the connector.",
            groups=groups,
        )
        + page.table(
            [
                "method",
                "encode",
                "compress",
                "prefill",
                "decode / token",
                "first token",
                "first-token speed-up",
                "prefill speed-up: FLOPs",
                "prefill speed-up: clock",
            ],
            clock,
            caption="Measured milliseconds per image (encode) and per question, in batches; "
            f"speed-ups against {base[0]} {base[1]} to the first token and for prefill alone.",
            groups=groups,
        )
        + bound
        + (
            "<p class=note>Where the clock shows less than the FLOPs, time goes into what FLOPs do "
            "not count (launching, memory traffic, small matrices). A value below 1× is slower "
            "than no compression.</p>"
        )
    )


def pareto(run: Run) -> str:
    """Mean accuracy against total FLOPs and against measured time, with the frontier."""
    evals, costs = records.rows_of(run.results, "eval"), records.rows_of(run.results, "cost")
    styles = styles_of(run)
    found = []
    for setting in evals:
        if setting in costs:
            accuracy = records.macro_mean(evals[setting])
            work = records.stage(costs[setting][0], "flops", *STAGES)
            time = records.stage(costs[setting][0], "ms", *FIRST_TOKEN)
            if math.isfinite(accuracy):
                found.append((setting, accuracy, work, time))
    if not found:
        return page.missing("No setting has both an accuracy and a cost.")
    charts = []
    for title, label, column, shown in (
        ("Accuracy against FLOPs", "FLOPs of one question", 2, page.si),
        ("Accuracy against time", "ms to the first token", 3, page.significant),
    ):
        points = [
            (p[column], p[1], p[0]) for p in found if math.isfinite(p[column]) and p[column] > 0
        ]
        if not points:
            continue
        series = [
            plots.Series("frontier", *_frontier(points), style=-1, markers=False, dashed=True)
        ]
        for name in styles:
            own = sorted((x, y, s[1]) for x, y, s in points if s[0] == name)
            if own:
                x, y, budgets = zip(*own, strict=True)
                names = [
                    f"{name} at {b}: {100 * v:.1f} %, {shown(u)}"
                    for u, v, b in zip(x, y, budgets, strict=True)
                ]
                series.append(plots.Series(name, x, y, style=styles[name], line=False, names=names))
        charts.append(
            plots.line_chart(
                series,
                title=title,
                x_label=label,
                y_label="exact match, mean over tasks",
                x_format=lambda v, shown=shown: shown(v),
                y_format=lambda v: f"{100 * v:.4g} %",
                size=(460, 290),
                describe="Each point is one method at one budget; the line is the frontier.",
            )
        )
    return (
        "<p>The dashed line joins the settings that no other beats in both accuracy and cost. "
        "Point at a marker for its name and budget.</p>"
        + legend(styles, {p[0][0] for p in found})
        + page.panels(charts)
    )


def _frontier(points: Sequence[tuple]) -> tuple[list[float], list[float]]:
    """Corners of the staircase of points (cost, accuracy, ...) that nothing dominates."""
    xs, ys, best = [], [], -math.inf
    for x, y, *_ in sorted(points, key=lambda p: (p[0], -p[1])):
        if y > best:
            if xs:
                xs.append(x)
                ys.append(best)
            xs.append(x)
            ys.append(y)
            best = y
    xs.append(max(p[0] for p in points))
    ys.append(best)
    return xs, ys


def findings(run: Run) -> list[str]:
    """Plain sentences: the best method at each smaller budget against no compression."""
    evals, costs = records.rows_of(run.results, "eval"), records.rows_of(run.results, "cost")
    base = records.baseline_of(evals)
    if base is None:
        return []
    full = records.macro_mean(evals[base])
    tasks = records.by_task(evals[base])
    listed = ", ".join(f"{t} {100 * s['mean']:.1f} %" for t, s in tasks.items())
    out = [f"With {base[1]} visual tokens ({base[0]}): {listed}."]
    smaller = sorted({b for _, b in evals if b < base[1]}, reverse=True)
    for budget in smaller[:4]:
        here = {s: records.macro_mean(rows) for s, rows in evals.items() if s[1] == budget}
        here = {s: v for s, v in here.items() if math.isfinite(v)}
        if not here or not full > 0:
            continue
        best = max(here, key=here.get)
        sentence = (
            f"With {budget} of {base[1]} tokens the best method, {best[0]}, keeps "
            f"{100 * here[best] / full:.0f} % of the mean accuracy ({100 * here[best]:.1f} of "
            f"{100 * full:.1f})"
        )
        if best in costs and base in costs:
            one, other = costs[best][0], costs[base][0]
            share = _ratio(*(records.stage(c, "flops", *STAGES) for c in (one, other)))
            faster = _ratio(*(records.stage(c, "ms", "prefill") for c in (other, one)))
            if math.isfinite(share):
                sentence += f" at {100 * share:.0f} % of the FLOPs"
            if math.isfinite(faster):
                sentence += f", prefill {page.significant(faster)}× as fast"
        random = here.get(("random", budget))
        if random is not None and best[0] != "random":
            sentence += f"; random selection keeps {100 * random / full:.0f} %"
        out.append(sentence + ".")
    return [line.replace(" %", "\u00a0%") for line in out]
