"""Accuracy sections of the report: charts, table, controls, comparison with random."""

import collections
import math
from collections.abc import Mapping, Sequence

from efficient_vlm.evaluation import stats
from efficient_vlm.report import marks, page, plots, records
from efficient_vlm.report.records import Run, Setting


def styles_of(run: Run) -> dict[str, int]:
    """Method -> plot style, the same in every chart; "none" is drawn in ink."""
    names = [s[0] for part in ("eval", "cost") for s in records.rows_of(run.results, part)]
    others = [n for n in dict.fromkeys(names) if n != "none"]
    # `rows_of` sorts by budget; alphabetical order does not change when a budget is added.
    return {"none": -1, **{name: k for k, name in enumerate(sorted(others))}}


def legend(styles: Mapping[str, int], names: Sequence[str]) -> str:
    """The key to colours and markers."""
    items = "".join(
        f"<li>{marks.swatch(styles[name])}{page.esc(name)}</li>" for name in styles if name in names
    )
    return f'<ul class="legend" aria-label="Methods">{items}</ul>'


def chance_levels(run: Run) -> dict[str, float]:
    """Accuracy of the best constant answer per task: the floor that says nothing of the image.

    From the stored predictions; a "chance" in the rows of results.json takes precedence.
    """
    answers: dict[str, dict] = collections.defaultdict(dict)
    for p in run.predictions:
        if p.get("task") is not None and "answer" in p:
            # Every setting answers the same questions: count each once.
            key = (p.get("index"), p.get("slot"), str(p.get("question")))
            answers[str(p["task"])][key] = str(p["answer"])
    levels = {
        task: max(collections.Counter(found.values()).values()) / len(found)
        for task, found in answers.items()
    }
    for row in run.results.get("eval") or []:
        if isinstance(row, dict) and math.isfinite(chance := records.number(row.get("chance"))):
            levels[str(row.get("task"))] = chance
    return levels


def accuracy_charts(run: Run) -> str:
    """Accuracy against visual tokens, one panel per task."""
    evals = records.rows_of(run.results, "eval")
    if not evals:
        return page.missing(
            "Not evaluated yet: efficient-vlm eval --workdir=WORKDIR fills this in."
        )
    styles, chance = styles_of(run), chance_levels(run)
    budgets = sorted({budget for _, budget in evals})
    ticks = budgets if len(budgets) <= 8 else None
    charts, tasks = [], records.tasks_of(run.results)
    for task in tasks:
        points = collections.defaultdict(list)
        for (name, budget), rows in evals.items():
            score = records.by_task(rows).get(task)
            if score and math.isfinite(score["mean"]):
                points[name].append((budget, score["mean"], score["lo"], score["hi"]))
        series, references = [], []
        for name in styles:
            if not points[name]:
                continue
            x, y, lo, hi = zip(*sorted(points[name]), strict=True)
            limits = all(map(math.isfinite, lo + hi))
            style = styles[name]
            series.append(
                plots.Series(name, x, y, lo if limits else None, hi if limits else None, style)
            )
        full = records.baseline_of(evals)
        score = records.by_task(evals[full]).get(task) if full else None
        if score and math.isfinite(score["mean"]):
            references.append((score["mean"], ""))
        if task in chance:
            references.append((chance[task], f"constant answer {100 * chance[task]:.0f} %"))
        charts.append(
            plots.line_chart(
                series,
                title=task,
                x_label="visual tokens",
                y_label="exact match",
                x_log=min(budgets) > 0,
                x_ticks=ticks,
                y_range=(0.0, 1.02),
                references=references,
                y_format=lambda v: f"{100 * v:.4g} %",
                size=plots.size_for(len(tasks)),
                describe="The numbers are in the table below.",
            )
        )
    used = {name for name, _ in evals}
    return (
        "<p>Share of unseen questions answered exactly. Bands are 95 % intervals that treat the "
        "questions of one image as dependent. Dashed: no compression, and the best constant "
        "answer. A method that is missing at a budget was not run there.</p>"
        + legend(styles, used)
        + page.panels(charts)
        + accuracy_table(run)
        + controls(run)
    )


def accuracy_table(run: Run) -> str:
    """Tasks x (compressor, budget) with intervals."""
    evals, tasks = records.rows_of(run.results, "eval"), records.tasks_of(run.results)
    rows, groups, previous = [], [], None
    for k, ((name, budget), found) in enumerate(evals.items()):
        if previous not in (None, budget):
            groups.append(k)
        previous = budget
        scores = records.by_task(found)
        cells = [page.cell(str(budget), sort=budget)]
        for task in tasks:
            score = scores.get(task)
            if score is None or not math.isfinite(score["mean"]):
                cells.append(page.cell("–"))
                continue
            note = ""
            if math.isfinite(score["lo"]) and math.isfinite(score["hi"]):
                note = f"{100 * score['lo']:.1f}–{100 * score['hi']:.1f}"
            mean = score["mean"]
            cells.append(page.cell(f"{100 * mean:.1f}", sort=mean, note=note, bar=mean))
        mean = records.macro_mean(found)
        shown = f"{100 * mean:.1f}" if math.isfinite(mean) else "–"
        cells.append(page.cell(shown, sort=mean))
        rows.append((name, cells))
    return page.table(
        ["compressor", "tokens", *tasks, "mean"],
        rows,
        caption="Exact match in % with 95 % interval; mean: unweighted over tasks.",
        groups=groups,
    )


def controls(run: Run) -> str:
    """Runs that must fail (blank images, shuffled labels): rows of results["controls"]."""
    found = run.results.get("controls")
    rows = []
    for row in found if isinstance(found, list) else ():
        if not isinstance(row, dict):
            continue
        score = records.by_task([row])[str(row.get("task"))]
        limits = f"{100 * score['lo']:.1f}–{100 * score['hi']:.1f}"
        cells = [page.cell(str(row.get(k, "–")), kind="text") for k in ("compressor", "task")]
        cells.insert(1, page.cell(str(row.get("budget", "–"))))
        cells.append(page.cell(f"{100 * score['mean']:.1f}", sort=score["mean"], note=limits))
        chance = chance_levels(run).get(str(row.get("task")), math.nan)
        cells.append(page.cell(f"{100 * chance:.1f}" if math.isfinite(chance) else "–"))
        rows.append((str(row.get("control")), cells))
    if not rows:
        return ""
    return page.table(
        ["control", "compressor", "tokens", "task", "accuracy", "best constant answer"],
        rows,
        caption="Controls: without the evidence, accuracy in % must fall to a constant answer's.",
    )


def comparison(run: Run) -> str:
    """Each method against random selection at the same budget, paired by question."""
    answers: dict[Setting, list] = collections.defaultdict(list)
    for p in run.predictions:
        if isinstance(p.get("budget"), int) and "correct" in p and p.get("index") is not None:
            answers[str(p.get("compressor")), p["budget"]].append(p)
    # A random method answers each question once per seed: its score is the share it got right.
    scores = {setting: stats.mean_scores(rows) for setting, rows in answers.items()}
    pairs = []
    for (name, budget), own in scores.items():
        other = scores.get(("random", budget))
        if name in ("random", "none") or not other:
            continue
        if own.keys() & other.keys():
            found, count = stats.paired_predictions(own, other)
            pairs.append((name, budget, count, found))
    if not pairs:
        return page.missing(
            "No paired comparison: it needs predictions of random at another method’s budget."
        )
    pairs.sort(key=lambda p: (-p[1], -p[3].mean))
    adjusted = stats.holm([p[3].p for p in pairs])
    rows, groups = [], []
    for k, ((name, budget, count, found), p) in enumerate(zip(pairs, adjusted, strict=True)):
        if k and pairs[k - 1][1] != budget:
            groups.append(k)
        sure = p < 0.05 and (found.lo > 0 or found.hi < 0)
        verdict = ("better" if found.mean > 0 else "worse") if sure else "no clear difference"
        kind = {"better": "right", "worse": "wrong"}.get(verdict, "")
        rows.append(
            (
                name,
                [
                    page.cell(str(budget), sort=budget),
                    page.cell(_signed(found.mean), sort=found.mean),
                    page.cell(f"{_signed(found.lo)} to {_signed(found.hi)}", sort=found.lo),
                    page.cell("< 0.001" if p < 0.001 else f"{p:.3f}", sort=p),
                    page.cell(verdict, kind=f"text {kind}".strip()),
                    page.cell(f"{count:,}", sort=count),
                ],
            )
        )
    return page.table(
        ["compressor", "tokens", "points vs random", "95 % interval", "p (Holm)", "", "questions"],
        rows,
        caption="Difference to random selection of as many tokens, in percentage points over all "
        "tasks; same questions (of several draws, the mean), whole images resampled 10,000 times.",
        groups=groups,
    )


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")
