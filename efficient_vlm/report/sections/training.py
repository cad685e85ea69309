"""How the run went: training curves, input pipeline and expert load, as HTML sections."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efficient_vlm.data.records import REASONS
from efficient_vlm.report import marks, page, plots, records
from efficient_vlm.report.records import Run

# Where time goes, by the names in results.json (`train.goodput.BUCKETS`), and what that is.
TIMES = {
    "productive": "steps that are part of the result",
    "lost": "steps done again, because a process ended before they were saved",
    "start": "from the start of a process to its first step, without compiling",
    "compile": "compiling",
    "data": "waiting for batches",
    "checkpoint": "saving, as far as the loop waits for it",
    "eval": "evaluation",
}
_POINTS = 120  # Per curve; more would be finer than a pixel.
_TIME_BINS = 60


def binned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of at most `_POINTS` consecutive groups of finite points."""
    pairs = np.array([(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)])
    if not len(pairs):
        return [], []
    groups = np.array_split(pairs, min(_POINTS, len(pairs)))
    means = [g.mean(axis=0) for g in groups]
    return [float(m[0]) for m in means], [float(m[1]) for m in means]


def _series(records_: Sequence[Mapping[str, Any]], key: str, label: str, style: int):
    x, y = binned(
        [records.number(m["step"]) for m in records_],
        [records.number(m.get(key)) for m in records_],
    )
    return plots.Series(label, x, y, style=style, markers=False)


def curves(run: Run) -> str:
    """Loss, token accuracy, learning rate and gradient norm over steps, by budget if elastic."""
    train = run.split("train")
    if not train:
        return page.missing("No training metrics: metrics.jsonl is missing or empty.")
    budgets = sorted({m["budget"] for m in train if isinstance(m.get("budget"), int | float)})
    elastic = 1 < len(budgets) <= 12

    def split(key: str) -> list[plots.Series]:
        if not elastic:
            return [_series(train, key, key, 0)]
        return [
            _series([m for m in train if m.get("budget") == b], key, f"{b:g} tokens", k)
            for k, b in enumerate(reversed(budgets))
        ]

    charts, size = [], plots.size_for(4)
    for key, title in (("loss", "Training loss"), ("accuracy", "Token accuracy (training)")):
        drawn = split(key)
        held_out = [m for m in run.metrics if m.get("split") != "train" and key in m]
        if held_out:
            drawn.append(_series(held_out, key, "held out", -1))
        charts.append(
            plots.line_chart(drawn, title=title, x_label="step", x_format=page.count, size=size)
        )
    for key, title in (("lr", "Learning rate"), ("grad_norm", "Gradient norm")):
        if any(key in m for m in train):
            drawn = [_series(train, key, key, 0)]
            charts.append(
                plots.line_chart(drawn, title=title, x_label="step", x_format=page.count, size=size)
            )
    items = ""
    if elastic:
        items = "".join(
            f"<li>{marks.swatch(k, markers=False)}{b:g} tokens</li>"
            for k, b in enumerate(reversed(budgets))
        )
        items = f'<ul class="legend" aria-label="Budgets">{items}</ul>'
    skipped = max((records.number(m.get("skipped")) for m in train), default=math.nan)
    note = f"<p class=note>Curves are means over groups of logged steps ({len(train):,} logged)."
    if skipped > 0:
        note += (
            f" <strong>{skipped:.0f} step(s) with a non-finite loss or gradient were skipped."
            "</strong>"
        )
    elif skipped == 0:
        note += " No step was skipped for a non-finite loss or gradient."
    return items + page.panels(charts) + note + "</p>"


def pipeline(run: Run) -> str:
    """Skipped samples, sources, images per second, and the share of time spent waiting for data."""
    return _skipped(run) + _sources(run) + _throughput(run)


def _sources(run: Run) -> str:
    """What each source of a mixture gave; "" where there was one source."""
    train = run.results.get("train")
    listed = train.get("sources") if isinstance(train, Mapping) else None
    rows = []
    for source in listed if isinstance(listed, list) else ():
        if not isinstance(source, Mapping):
            continue
        numbers = [records.number(source.get(key)) for key in ("samples", "drawn", "skipped")]
        cells = [page.cell(f"{number:,.0f}", sort=number) for number in numbers]
        epochs = records.number(source.get("epochs"))
        cells.append(page.cell(f"{epochs:.3g}", sort=epochs))
        rows.append((str(source.get("source")), cells))
    if not rows:
        return ""
    return page.table(
        ["source", "samples", "drawn", "skipped", "epochs"],
        rows,
        caption="What each source of the mixture gave to the training.",
    )


def _skipped(run: Run) -> str:
    """Samples that were left out of training and evaluation, by reason; "" where nothing says."""
    train, test = (run.results.get(name) for name in ("train", "test_samples"))
    given = {
        "training": (train, "skipped_samples"),
        "test": (test, "skipped"),
    }
    rows, sizes = [], []
    for split, (part, name) in given.items():
        counts = part.get(name) if isinstance(part, Mapping) else None
        if not isinstance(counts, Mapping):
            continue
        size = records.number(part.get("samples"))
        sizes.append(f"{size:,.0f} {split}" if size > 0 else split)
        rows += [
            (
                str(reason),
                [
                    page.cell(split),
                    page.cell(f"{number:,.0f}", sort=number),
                    page.cell(REASONS.get(reason, "")),
                ],
            )
            for reason, number in ((r, records.number(n)) for r, n in counts.items())
        ]
    if not sizes:
        return ""
    among = " and ".join(sizes)
    if not rows:
        return f"<p>No sample was skipped ({page.esc(among)}).</p>"
    return page.table(
        ["skipped", "split", "samples", "why"],
        rows,
        caption=f"Samples that could not be used, counted once each ({among}); nothing of them was "
        "trained on or asked.",
    )


def _throughput(run: Run) -> str:
    train = run.split("train")
    speed = [records.number(m.get("images_per_second")) for m in train]
    wait = [records.number(m.get("data_wait_fraction")) for m in train]
    if not np.isfinite(speed).any() and not np.isfinite(wait).any():
        return page.missing("No throughput metrics were logged.")
    charts, sentences, size = [], [], plots.size_for(2)
    if np.isfinite(speed).any():
        series = [_series(train, "images_per_second", "images/s", 2)]
        charts.append(
            plots.line_chart(
                series, title="Images per second", x_label="step", x_format=page.count, size=size
            )
        )
        sentences.append(f"Median {page.si(float(np.nanmedian(speed)))} images per second.")
    if np.isfinite(wait).any():
        mean = float(np.nanmean(wait))
        series = [_series(train, "data_wait_fraction", "data wait", 1)]
        charts.append(
            plots.line_chart(
                series,
                title="Share of step time waiting for data",
                x_label="step",
                x_format=page.count,
                size=size,
                y_format=lambda v: f"{100 * v:.3g} %",
                y_range=(0.0, max(0.1, float(np.nanmax(series[0].y)) * 1.1)),
                references=[(0.05, "target 5 %")],
            )
        )
        verdict = "within" if mean <= 0.05 else "above"
        sentences.append(f"Data wait {100 * mean:.2f} % of step time on average, {verdict} 5 %.")
    return f"<p>{' '.join(sentences)}</p>" + page.panels(charts)


def goodput(run: Run) -> str:
    """Where the time of the run went, over all the processes that it took."""
    found = run.results.get("goodput")
    found = found if isinstance(found, Mapping) else {}
    seconds = {name: records.number(found.get(name)) for name in TIMES}
    total = sum(value for value in seconds.values() if math.isfinite(value))
    if not total > 0:
        return page.missing("No record of time: the run is unfinished, or older than the record.")
    rows = [
        (
            name,
            [
                page.cell(f"{value:,.1f}", sort=value),
                page.cell(f"{100 * value / total:.1f} %", sort=value, bar=value / total),
                page.cell(TIMES[name]),
            ],
        )
        for name, value in seconds.items()
        if math.isfinite(value)
    ]
    share = records.number(found.get("productive")) / total
    return f"<p>Goodput: {100 * share:.1f} % of {page.duration(total)}.</p>" + page.table(
        ["time", "seconds", "share", "what it is"],
        rows,
        caption="Seconds of all processes one after the other; time between them is not counted.",
    )


def experts(run: Run) -> str:
    """Share of tokens by layer and expert, over time and at the end, and the router losses."""
    train = run.split("train")
    logged = [(m["step"], load) for m in train if (load := _load(m)) is not None]
    if logged:
        shape = logged[-1][1].shape
        logged = [(step, load) for step, load in logged if load.shape == shape]
    charts, size = [], plots.size_for(3)
    if logged:
        layers, count = logged[-1][1].shape
        recent = np.mean([load for _, load in logged[-max(1, len(logged) // 10) :]], axis=0)
        charts.append(
            plots.heat_map(
                recent,
                title="Load by layer, last tenth of the run",
                x_label="expert",
                y_label="layer",
                x_ends=("0", str(count - 1)),
            )
        )
        if len(logged) > 1:
            groups = np.array_split(np.arange(len(logged)), min(_TIME_BINS, len(logged)))
            loads = np.stack([load for _, load in logged])
            over_time = np.stack([loads[g].mean(axis=0) for g in groups])  # [time, layer, expert]
            ends = (page.count(logged[0][0]), page.count(logged[-1][0]))
            for layer in sorted({0, layers // 2, layers - 1}):
                charts.append(
                    plots.heat_map(
                        over_time[:, layer].T,
                        title=f"Layer {layer} over time",
                        x_label="step",
                        y_label="expert",
                        x_ends=ends,
                    )
                )
    for key, title in (
        ("load_balance", "Load-balance loss (1 = even)"),
        ("router_z", "Router z-loss"),
    ):
        if any(math.isfinite(records.number(m.get(key))) for m in train):
            drawn = [_series(train, key, key, 4)]
            charts.append(
                plots.line_chart(drawn, title=title, x_label="step", x_format=page.count, size=size)
            )
    if not charts:
        return page.missing(
            "No expert load was logged: the decoder is dense, or nothing was trained."
        )
    text = ""
    if logged:
        busiest, idlest = float(recent.max()), float(recent.min())
        text = (
            f"<p>{layers} mixture-of-experts layer{'s' * (layers > 1)} with {count} experts. At "
            f"the end the busiest expert takes {busiest:.2f}× and the idlest {idlest:.2f}× an even "
            "share.</p>"
        )
    return text + page.panels(charts)


def _load(record: Mapping[str, Any]) -> np.ndarray | None:
    """[layers, experts] share of each expert times the number of experts, or None."""
    try:
        load = np.asarray(record.get("expert_load"), np.float64)
    except (TypeError, ValueError):
        return None
    load = load[None] if load.ndim == 1 else load
    if load.ndim != 2 or not load.size or not np.isfinite(load).all():
        return None
    total = load.sum(axis=1, keepdims=True)
    return load / np.where(total > 0, total, 1) * load.shape[1]
