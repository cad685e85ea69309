"""The report page: complete, self-contained, escaped, and whole when parts are missing."""

import dataclasses
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.evaluation.token_maps import write_maps
from efficient_vlm.report import drawing, page, plots, records
from efficient_vlm.report.report import write_report
from efficient_vlm.report.sections import accuracy, cost, maps, training
from efficient_vlm.train.goodput import BUCKETS

VOID = {"meta", "br", "img", "link", "hr", "input", "image", "line", "circle", "polyline"}
VOID |= {"polygon", "path", "rect"}


class Page(html.parser.HTMLParser):
    """Checks nesting, and collects text, tags, attributes and table rows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.problems, self.tags, self.words, self.rows = [], [], [], [], []
        self.feed(text)
        self.close()
        self.problems += [f"unclosed {t}" for t in self.open]
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID or tag in ("line", "circle", "polygon", "path", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)
        if self.rows and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data

    def ids(self):
        return {a["id"] for _, a in self.tags if "id" in a}


def read(path):
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture
def complete(write_workdir):
    folder, results = write_workdir()
    return *read(write_report(folder)), results


def test_complete_page_has_every_section_and_is_well_formed(complete):
    text, parsed, _ = complete
    assert parsed.problems == []
    sections = "accuracy comparison pareto cost maps training input goodput experts method"
    assert set(sections.split()) <= parsed.ids()
    assert 'class="missing"' not in text
    assert 'class="warning"' not in text
    assert len(text.encode()) < 3_000_000


def test_the_time_of_the_run_is_told(complete):
    text, parsed, _ = complete
    assert "Goodput: 80.0 % of 2 min 30 s." in text
    assert "train 7, data 3, dataset 0" in text  # Which seeds the run is of.
    assert "share their data" in text
    rows = {row[0]: row[1:3] for row in parsed.rows}
    assert rows["compile"] == ["20.0", "13.3 %"] and rows["lost"] == ["10.0", "6.7 %"]


def test_page_needs_nothing_from_outside(complete):
    text, parsed, _ = complete
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png", "#")), (tag, value)
    assert not {"link", "iframe", "object", "form"} & {tag for tag, _ in parsed.tags}


def test_page_is_accessible(complete):
    _, parsed, _ = complete
    for tag, attributes in parsed.tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("caption") == tags.count("table")
    assert ("html", {"lang": "en"}) in parsed.tags
    links = {a["href"][1:] for t, a in parsed.tags if t == "a"}
    assert links <= parsed.ids()


def test_numbers_on_the_page_are_those_of_the_results(complete):
    _, parsed, results = complete
    rows = {(r[0], r[1]): r for r in reversed(parsed.rows) if len(r) == 7}
    for entry in results["eval"]:
        row = rows[entry["compressor"], str(entry["budget"])]
        column = 2 + ["needle", "count", "point", "global"].index(entry["task"])
        low, high = entry["ci95"]
        shown = f"{100 * entry['accuracy']:.1f} {100 * low:.1f}–{100 * high:.1f}"
        assert row[column] == shown
    assert "2,000" in parsed.text
    assert "2 min 23 s" in parsed.text
    assert "214 k" in parsed.text
    assert results["train"]["params_sha256"] in parsed.text
    assert results["command"] in parsed.text
    assert "240 questions about 60 images" in parsed.text


def test_speed_ups_compare_with_no_compression(complete):
    _, parsed, results = complete
    by = {(c["compressor"], c["budget"]): c for c in results["cost"]}
    base, row = by["none", 64], by["text_topk", 16]
    clock = base["ms"]["prefill"] / row["ms"]["prefill"]
    work = [c["flops"]["decoder"] + c["flops"]["head"] for c in (base, row)]
    shown = next(r for r in parsed.rows if r[0] == "text_topk 16" and len(r) == 9 and "×" in r[-1])
    assert shown[-1] == f"{clock:.2f}×"
    assert shown[-2] == f"{work[0] / work[1]:.2f}×"
    share = base["ms"]["prefill"] / sum(base["ms"][k] for k in ("encode", "compress", "prefill"))
    assert f"{1 / (1 - share):.2f}× shorter" in parsed.text


def test_paired_comparison_finds_the_planted_difference(complete):
    _, parsed, _ = complete
    verdicts = {(r[0], r[1]): r[5] for r in parsed.rows if len(r) == 7 and "difference" in r[5]}
    verdicts |= {(r[0], r[1]): r[5] for r in parsed.rows if len(r) == 7 and r[5] == "better"}
    assert verdicts["text_topk", "16"] == "better"
    assert verdicts["stride", "1"] == "no clear difference"


def test_chance_is_the_best_constant_answer():
    answers = ["a", "a", "b", "c"]
    predictions = [
        {"task": "t", "index": i, "question": "?", "answer": a, "compressor": c}
        for i, a in enumerate(answers)
        for c in ("x", "y")
    ]
    run = records.Run("r", predictions=predictions)
    assert accuracy.chance_levels(run) == {"t": 0.5}
    run.results = {"eval": [{"task": "t", "budget": 1, "chance": 0.1}]}
    assert accuracy.chance_levels(run) == {"t": 0.1}


def test_everything_foreign_is_escaped(write_workdir):
    folder, results = write_workdir()
    attack = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    for part in ("eval", "cost"):
        for row in results[part]:
            row["compressor"] += attack
            if part == "eval":
                row["task"] += attack
    results["command"] = results["environment"] = attack
    results["environment"] = {attack: attack}
    results["controls"] = [{"control": attack, "task": attack, "budget": attack}]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps({"model": {attack: attack}, "name": attack}))
    listing = json.loads((folder / "maps" / "maps.json").read_text())
    for entry in listing:
        entry.update(question=attack, answer=attack, task=attack)
        for shown in entry["maps"]:
            shown.update(compressor=attack, prediction=attack, meaning=attack)
    (folder / "maps" / "maps.json").write_text(json.dumps(listing))
    text, parsed = read(write_report(folder))
    assert parsed.problems == []
    assert [t for t, _ in parsed.tags].count("script") == 1
    assert not any("onerror" in a for _, a in parsed.tags)
    assert "alert(1)" in text


def test_map_files_outside_the_folder_are_not_read(write_workdir, tmp_path):
    folder, _ = write_workdir()
    shutil.copy(folder / "maps" / "00.npz", tmp_path / "secret.npz")
    listing = json.loads((folder / "maps" / "maps.json").read_text())
    listing[0]["arrays"], listing[1]["arrays"] = "../../secret.npz", "not_there.npz"
    listing[2]["arrays"] = str(tmp_path / "secret.npz")
    (folder / "maps" / "maps.json").write_text(json.dumps(listing))
    run = records.read_run(folder)
    assert [example.question for example in run.maps] == [listing[3]["question"]]
    _, parsed = read(write_report(folder))
    assert parsed.problems == []
    assert "not_there.npz cannot be read" in parsed.text and "secret.npz" in parsed.text


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {"trained": False, "evaluated": False, "with_maps": False, "steps": 430},
            "unfinished: the last logged step is step 430 of 2,000",
        ),
        ({"evaluated": False}, "There are no evaluation results yet"),
        ({"with_maps": False}, "There are no token maps"),
        ({"steps": 0, "trained": False, "evaluated": False}, "has not trained yet"),
    ],
)
def test_missing_parts_are_named(write_workdir, parts, said):
    folder, _ = write_workdir(**parts)
    _, parsed = read(write_report(folder))
    assert parsed.problems == []
    assert said in parsed.text


def test_dense_untuned_run_without_optional_metrics(write_workdir):
    folder, _ = write_workdir()
    lines = [json.loads(s) for s in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: m[k] for k in ("step", "split", "loss")} for m in lines]
    kept[5]["loss"] = math.nan
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in kept))
    text, parsed = read(write_report(folder))
    assert parsed.problems == []
    assert "the decoder is dense" in parsed.text
    assert "No throughput metrics" in parsed.text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower().replace("isnan", "")


def test_damaged_files_are_reported_not_fatal(write_workdir):
    folder, _ = write_workdir()
    (folder / "results.json").write_text('{"train": ')
    (folder / "config.json").write_text("[1, 2]")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2001, "split": "tr')
    (folder / "maps" / "00.npz").write_bytes(b"no arrays")
    (folder / "predictions" / "x.jsonl").write_text("null\n7\n\n")
    _, parsed = read(write_report(folder))
    assert parsed.problems == []
    assert "results.json cannot be read" in parsed.text
    assert "config.json does not hold a JSON dict" in parsed.text
    assert "metrics.jsonl: 1 line(s)" in parsed.text
    assert "00.npz cannot be read" in parsed.text
    assert parsed.text.count("which digit is") == 3  # The other questions are shown.


@pytest.mark.parametrize(
    "rows",
    [
        [{"compressor": "x", "budget": 4}],
        [{"budget": 4, "task": None, "accuracy": "high", "ci95": [None]}],
        ["text", 3, None, {"budget": "4"}],
        [{"compressor": "x", "budget": 4, "task": "t", "accuracy": 0.5}],
        {"not": "a list"},
    ],
)
def test_malformed_rows_are_left_out(tmp_path, rows):
    (tmp_path / "results.json").write_text(json.dumps({"eval": rows, "cost": rows}))
    _, parsed = read(write_report(tmp_path))
    assert parsed.problems == []


def test_resumed_runs_count_each_step_once(tmp_path):
    lines = [{"step": s, "split": "train", "loss": v} for s, v in ((1, 5), (2, 5), (2, 3), (3, 3))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    run = records.read_run(tmp_path)
    assert [(m["step"], m["loss"]) for m in run.metrics] == [(1, 5), (2, 3), (3, 3)]


def test_random_counts_as_the_mean_of_its_seeds(tmp_path):
    """Seeds right on alternate questions: 50 %, so a method always right gains 50 points."""
    (tmp_path / "predictions").mkdir()
    lines = []
    for i in range(40):
        common = {"task": "t", "index": i, "slot": 0, "question": "?", "answer": "1", "budget": 4}
        lines.append({**common, "compressor": "m", "correct": True})
        for seed in range(2):
            right = (i + seed) % 2 == 0
            lines.append({**common, "compressor": "random", "correct": right, "seed": seed})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "predictions" / "all.jsonl").write_text(text)
    blank = [{**line, "correct": False} for line in lines]
    text = "".join(json.dumps(line) + "\n" for line in blank)
    (tmp_path / "predictions" / "m-4-blank.jsonl").write_text(text)
    parsed = Page(accuracy.comparison(records.read_run(tmp_path)))
    assert parsed.rows[1][2] == "+50.0"
    assert parsed.rows[1][6] == "40"


def test_controls_are_shown(write_workdir):
    folder, results = write_workdir()
    row = {"control": "blank image", "compressor": "none", "budget": 64, "task": "needle"}
    results["controls"] = [{**row, "n": 100, "accuracy": 0.11, "ci95": [0.06, 0.18]}]
    (folder / "results.json").write_text(json.dumps(results))
    _, parsed = read(write_report(folder))
    assert ["blank image", "none", "64", "needle", "11.0 6.0–18.0"] in [r[:5] for r in parsed.rows]


def test_large_runs_stay_small_and_quick(write_workdir):
    folder, _ = write_workdir(steps=60_000)
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    write_maps(folder, [dataclasses.replace(e, image=noise) for e in records.read_run(folder).maps])
    start = time.process_time()
    path = write_report(folder)
    assert time.process_time() - start < 6
    assert path.stat().st_size < 3_000_000
    assert "more picture(s) are left out" in path.read_text()


def test_rewriting_replaces_in_one_step_and_leaves_nothing_behind(write_workdir):
    folder, _ = write_workdir()
    first = write_report(folder)
    first.write_text("old")
    assert write_report(folder, command="efficient-vlm again").read_text() != "old"
    assert "efficient-vlm again" in first.read_text()
    assert not list(folder.glob(".report-*"))


def test_no_run_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)


def test_report_needs_neither_jax_nor_matplotlib(write_workdir):
    """Every module of it, and drawing a whole workdir."""
    folder, _ = write_workdir()
    code = (
        "import importlib, pkgutil, sys, efficient_vlm.report as room\n"
        "for each in pkgutil.walk_packages(room.__path__, room.__name__ + '.'):\n"
        "    importlib.import_module(each.name)\n"
        "from efficient_vlm.report.report import write_report\n"
        f"write_report({str(folder)!r})\n"
        "ours = {'.'.join(name.split('.')[:2]) for name in sys.modules}\n"
        "heavy = {'jax', 'matplotlib', 'flax', *(f'efficient_vlm.{m}' for m in "
        "('models', 'train', 'compressors', 'nn'))} & {*sys.modules, *ours}\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


# --- token maps ----------------------------------------------------------------------------------


def draw_as_before(folder):
    """Turns the arrays of a workdir into the pictures that evaluation used to leave there."""
    listing = []
    for q, example in enumerate(records.read_run(folder).maps):

        def save(name, pixels):
            (folder / "maps" / name).write_bytes(drawing.png(pixels))
            return name

        image, shown = example.image, []
        for c, cell in enumerate(example.cells):
            drawn = drawing.token_map(image, cell.source, grid=cell.grid)
            row = {"compressor": cell.compressor, "budget": cell.budget, "meaning": cell.meaning}
            row |= {"prediction": cell.prediction, "correct": cell.prediction == example.answer}
            row |= {"file": save(f"{q:02d}_{c:02d}.png", drawn), "scores": None}
            if cell.scores is not None:
                heat = drawing.score_map(image, cell.scores, grid=cell.grid)
                row["scores"] = save(f"{q:02d}_{c:02d}_scores.png", heat)
            shown.append(row)
        entry = {"question": example.question, "answer": example.answer, "task": example.task}
        original = save(f"{q:02d}_image.png", drawing.enlarged(image, drawing.MIN_SIDE))
        listing.append(entry | {"image": original, "maps": shown})
    for path in (folder / "maps").glob("*.npz"):
        path.unlink()
    (folder / "maps" / "maps.json").write_text(json.dumps(listing))


def test_maps_are_drawn_as_evaluation_drew_them(write_workdir):
    """The section of a workdir of before, with pictures, and that of its arrays are the same."""
    folder, _ = write_workdir()
    drawn_now = maps.token_maps(records.read_run(folder))
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', drawn_now)
    assert len(pictures) == 4 * (1 + 6 + 1)  # Of each question: it, six maps and one of scores.
    draw_as_before(folder)
    run = records.read_run(folder)
    assert not run.maps and len(run.drawn_maps) == 4 and not run.problems
    assert maps.token_maps(run) == drawn_now
    secret = folder.parent / "secret.png"
    secret.write_bytes(b"\x89PNG secret")
    listing = json.loads((folder / "maps" / "maps.json").read_text())
    listing[0]["image"], listing[0]["maps"][0]["file"] = "../../secret.png", str(secret)
    listing[0]["maps"][1]["file"] = "not_there.png"
    (folder / "maps" / "00_02.png").write_bytes(b"not a picture")
    (folder / "maps" / "maps.json").write_text(json.dumps(listing))
    section = maps.token_maps(records.read_run(folder))
    assert section.count("<img") == len(pictures) - 4 and section.count("<article") == 4


def test_arrays_that_do_not_fit_are_noted(write_workdir):
    folder, _ = write_workdir()
    first, *others = records.read_run(folder).maps
    cells = [dataclasses.replace(first.cells[0], grid=(4, 4)), *first.cells[1:]]
    write_maps(folder, [dataclasses.replace(first, cells=cells), *others])
    text, parsed = read(write_report(folder))
    assert "maps.json, 00.npz: grid: 4 x 4 for 64 patches." in parsed.text
    assert text.count("<article") == 3


def test_every_kind_of_time_is_explained():
    assert tuple(training.TIMES) == BUCKETS


def test_frontier_is_what_nothing_dominates():
    rng = np.random.default_rng(2)
    points = [(float(x), float(y)) for x, y in rng.random((40, 2))]
    xs, ys = cost._frontier(points)
    best = {p for p in points if not any(o[0] <= p[0] and o[1] >= p[1] and o != p for o in points)}
    corners = set(zip(xs, ys, strict=True))
    assert best <= corners
    assert all(b >= a for a, b in zip(ys, ys[1:], strict=False))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (1e-6, 4e-6), (120, 121), (0, 9e9)])
def test_ticks_are_round_inside_and_enough(low, high):
    ticks = plots.nice_ticks(low, high)
    assert 3 <= len(ticks) <= 7
    assert low - 1e-9 <= ticks[0]
    assert ticks[-1] <= high * (1 + 1e-9)
    np.testing.assert_allclose(np.diff(ticks), np.diff(ticks)[0])


def test_chart_of_nothing_says_so():
    empty = plots.Series("a", [1, 2], [math.nan, None])
    assert "nothing to draw" in plots.line_chart([empty], title="t")
    assert "<svg" in plots.line_chart([plots.Series("a", [5], [0.0])], title="t", x_log=True)


@pytest.mark.parametrize(
    ("function", "value", "shown"),
    [
        (page.si, 12_345_678, "12.3 M"),
        (page.si, 999_700, "1.00 M"),
        (page.si, 0, "0"),
        (page.si, math.nan, "–"),
        (page.kibi, 75_776, "74.0 KiB"),
        (page.kibi, 12, "12 B"),
        (page.significant, 0.001234, "0.00123"),
        (page.significant, 1234.5, "1,234"),
        (page.duration, 4.2, "4.2 s"),
        (page.duration, 143.2, "2 min 23 s"),
        (page.duration, 7500, "2 h 05 min"),
        (page.count, 2000, "2,000"),
        (page.count, 3e6, "3.00 M"),
    ],
)
def test_number_formats(function, value, shown):
    assert function(value) == shown
