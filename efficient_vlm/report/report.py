"""One self-contained HTML page about a run: no network, no scripts needed, every part optional."""

import importlib.metadata
import math
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from efficient_vlm.report import page, records
from efficient_vlm.report.records import Run
from efficient_vlm.report.sections import accuracy, cost, maps, training

_PACKAGES = (
    "efficient_vlm",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
)


def write_report(workdir: str | os.PathLike, *, command: str | None = None) -> Path:
    """Writes `report.html` into a workdir from what the run left there.

    Reads config.json, results.json, metrics.jsonl, predictions/*.jsonl and maps/ (see
    `evaluation.token_maps`). Missing or damaged parts are named on the page.

    Args:
      workdir: of the run, finished or not.
      command: that reproduces the run; None takes "command" of results.json or config.json.

    Returns:
      The path of the page; an earlier one is replaced in one step.

    Raises:
      UserError: no such folder, or one that holds no run.
    """
    run = records.read_run(workdir)
    target = Path(workdir) / "report.html"
    text = render(run, command=command)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".report-", suffix=".html")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def render(run: Run, *, command: str | None = None) -> str:
    """The page as text."""
    parts = [("accuracy", "Accuracy", accuracy.accuracy_charts(run))]
    if run.results.get("eval"):
        parts.append(("comparison", "Against random", accuracy.comparison(run)))
        parts.append(("pareto", "Accuracy and cost", cost.pareto(run)))
    parts += [
        ("cost", "Cost", cost.cost_table(run)),
        ("maps", "Token maps", maps.token_maps(run)),
        ("training", "Training", training.curves(run)),
        ("input", "Input pipeline", training.pipeline(run)),
        ("goodput", "Goodput", training.goodput(run)),
        ("experts", "Experts", training.experts(run)),
        ("method", "Method", method(run, command)),
    ]
    return page.document(f"{run.name} · efficient_vlm", header(run), parts)


def header(run: Run) -> str:
    """Title, findings, headline figures, and warnings about what is missing."""
    train = run.results.get("train")
    train = train if isinstance(train, dict) else {}
    seconds = records.number(train.get("seconds"))
    parameters = records.number(train.get("params"))
    steps = records.number(train.get("steps"))
    logged = run.split("train")
    if not math.isfinite(steps) and logged:
        steps = float(logged[-1]["step"])
    figures = [
        ("training steps", f"{steps:,.0f}" if math.isfinite(steps) else "–"),
        ("training time", page.duration(seconds)),
        ("parameters", page.si(parameters)),
    ]
    if isinstance(seeds := train.get("seeds"), dict):
        shown = (f"{name} {seed}" for name, seed in seeds.items())
        figures.append(("seeds", ", ".join(shown)))
    images, questions = _evaluated(run)
    if questions:
        figures.append(("test questions", f"{questions:,}"))
    if images:
        figures.append(("test images", f"{images:,}"))
    if train.get("params_sha256"):
        figures.append(("parameters’ SHA-256", str(train["params_sha256"])[:10] + "…"))
    lead = model_sentence(run.config)
    found = "".join(f"<li>{page.esc(line)}</li>" for line in cost.findings(run))
    return (
        f"<h1>{page.esc(run.name)}</h1>"
        + (f'<p class="lead">{page.esc(lead)}</p>' if lead else "")
        + "".join(f'<div class="warning">{page.esc(w)}</div>' for w in warnings(run))
        + page.cards(figures)
        + (f'<ul class="findings">{found}</ul>' if found else "")
    )


def warnings(run: Run) -> list[str]:
    """What keeps this page from being the whole story."""
    out = list(run.problems)
    train = run.results.get("train")
    planned = _find(run.config, "steps", "num_steps", "total_steps")
    logged = run.split("train")
    done = records.number(train.get("steps")) if isinstance(train, dict) else math.nan
    if not logged and not math.isfinite(done):
        out.append("This run has not trained yet.")
    elif not math.isfinite(done):
        reached = f"step {logged[-1]['step']:,}"
        if isinstance(planned, int):
            reached += f" of {planned:,}"
        out.append(
            f"The run is unfinished: the last logged step is {reached}. The command that started "
            "it resumes it."
        )
    if not run.results.get("eval"):
        out.append("There are no evaluation results yet.")
    return out


def _find(config: Any, *names: str) -> Any:
    """The first of `names` in the training section or at the top of a config."""
    for part in (config.get("train"), config.get("training"), config):
        for name in names:
            if isinstance(part, dict) and name in part:
                return part[name]
    return None


def model_sentence(config: dict[str, Any]) -> str:
    """The architecture in a sentence, from the fields that are there."""
    model = config.get("model")
    model = model if isinstance(model, dict) else {}
    encoder, decoder = model.get("encoder"), model.get("decoder")
    pieces = []
    if isinstance(encoder, dict):
        pieces.append(
            f"vision transformer (depth {encoder.get('depth', '?')}, width "
            f"{encoder.get('width', '?')}, {encoder.get('image_size', '?')} px in patches of "
            f"{encoder.get('patch_size', '?')})"
        )
    if isinstance(decoder, dict):
        segments = [s for s in decoder.get("segments") or [] if isinstance(s, dict)]
        layers = sum(s.get("layers", 0) for s in segments)
        moe = decoder.get("moe")
        kind = "dense"
        if isinstance(moe, dict):
            kind = f"mixture of {moe.get('num_experts', '?')} experts, top {moe.get('top_k', '?')}"
        pieces.append(f"decoder (depth {layers}, width {decoder.get('width', '?')}, {kind})")
    sentence = " and ".join(pieces)
    return sentence[:1].upper() + sentence[1:] + "." if sentence else ""


def _evaluated(run: Run) -> tuple[int, int]:
    """Numbers of distinct test images and questions."""
    images = {p["index"] for p in run.predictions if isinstance(p.get("index"), int)}
    evals = records.rows_of(run.results, "eval")
    base = records.baseline_of(evals)
    if base is None:
        return len(images), 0
    counts = [t["n"] for t in records.by_task(evals[base]).values() if math.isfinite(t["n"])]
    return len(images), int(sum(counts))


def method(run: Run, command: str | None) -> str:
    """Protocol, definitions, versions, and how to run it again."""
    images, questions = _evaluated(run)
    size = ""
    if questions:
        size = f" Here: {questions:,} questions" + (f" about {images:,} images." if images else ".")
    protocol = run.results.get("protocol")
    if not isinstance(protocol, str):
        protocol = (
            "Answers are generated greedily, token by token, until the end token or the length "
            "limit; an answer counts if it equals the expected text."
        )
    items = [
        protocol + size,
        "Intervals: Wilson’s, at the number of questions divided by the design effect that "
        "questions sharing an image have (cluster-robust variance), with Student’s t. At or near "
        "100 % the design effect cannot be seen and leans to one independent question per image.",
        "Differences: same questions under both methods, bootstrap over whole images with 10,000 "
        "resamples; p by sign flips per image, Holm-adjusted over all rows.",
        "The best constant answer of a task needs no image: nothing below it is skill.",
        "FLOPs are counted from the configuration: 2 per multiply-add, all matrix products, the "
        "full rectangle of attention. Milliseconds: encode (image to patch features), compress "
        "(to visual tokens, with the connector), prefill (visual tokens and prompt to the first "
        "logits), decode (each further token); each stage compiled on its own, without the time "
        "of compiling.",
        "KV cache: keys and values of all layers at each segment’s static length.",
    ]
    if isinstance(run.results.get("train"), dict) and "seeds" in run.results["train"]:
        items.append(
            "Seeds: “train” is that of initial values and of the draw of budgets, “data” that of "
            "the order of the pictures and of the questions asked, “dataset” that of the pictures. "
            "Runs that differ in the first alone share their data, and vary less than runs on "
            "other draws do."
        )
    environment = run.results.get("environment")
    if isinstance(environment, dict):
        versions, when = environment, "of the run"
    else:
        versions, when = _versions(), "when this page was written"
    listed = ", ".join(f"{k} {v}" for k, v in versions.items() if not isinstance(v, dict | list))
    command = command or run.results.get("command") or run.config.get("command")
    reproduce = (
        f"<pre>{page.esc(command)}</pre>"
        if isinstance(command, str)
        else page.missing("The run did not store its command.")
    )
    return (
        f"<ul>{''.join(f'<li>{page.esc(i)}</li>' for i in items)}</ul>"
        f"<h3>Run it again</h3>{reproduce}"
        f"<p class=note>Versions {when}: {page.esc(listed)}.{_digest(run)}</p>" + _config(run)
    )


def _digest(run: Run) -> str:
    train = run.results.get("train")
    digest = train.get("params_sha256") if isinstance(train, dict) else None
    return f" SHA-256 of the parameters: <code>{page.esc(digest)}</code>." if digest else ""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _config(run: Run) -> str:
    if not run.config:
        return page.missing("config.json is missing.")
    lines = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            lines.append(f"{prefix} = {value!r}")

    walk("", run.config)
    text = "\n".join(lines[:2000])
    return f"<details><summary>Configuration</summary><pre>{page.esc(text)}</pre></details>"
