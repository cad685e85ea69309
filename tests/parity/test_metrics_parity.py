"""Metrics beside the programs that they are named after, where those are installed.

    pip install --no-deps lmms-eval==0.7.3 anls==0.0.2 pycocoevalcap==1.2 evalscope==1.14.1

The functions that score are taken out of their files: whole packages import much else.
"""

import ast
import importlib.util
import json
import math
import random
import re
import statistics
import string
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficient_vlm.evaluation import metrics
from efficient_vlm.evaluation.metrics import choice, vqa
from efficient_vlm.evaluation.metrics.place import iou

pytestmark = pytest.mark.parity

PIECES = (
    *("yes", "no", "No", "not", "Yes", "YES", "dont", "don't", "the", "a", "an", "two", "none"),
    *(
        "3",
        "3.",
        "1,000",
        "1.5",
        "$5",
        "50%",
        "U.S.A.",
        "red-ish",
        "a/b",
        "?",
        ",",
        ".",
        "\n",
        "\t",
    ),
    *(
        " ",
        "  ",
        "'s",
        "dog's",
        "(B)",
        "B",
        "B.",
        "A ",
        "(A)",
        "cat",
        "is",
        "answer",
        "so ",
        "=",
        "x",
    ),
    *("ｆｕｌｌ", "：", "_", "-5", "1e3", ".5", "nan", "inf", "0", "0.0", "answer is B", ";", "'"),
)


@pytest.fixture
def rng():
    return random.Random(0)


def words(rng, most):
    return "".join(rng.choice(PIECES) + rng.choice(["", " "]) for _ in range(rng.randint(0, most)))


def taken(package, path, *names, **given):
    """Functions and constants of a file of an installed package, without what it imports."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    file = Path(spec.submodule_search_locations[0]) / path
    space = dict(re=re, string=string, random=random, statistics=statistics, np=np, math=math,
                 json=json, defaultdict=defaultdict, Any=Any, List=list, Dict=dict)  # fmt: skip
    space |= given
    found = []
    for node in ast.parse(file.read_text()).body:
        targets = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        if {getattr(node, "name", None), *targets} & set(names):
            if hasattr(node, "decorator_list"):
                node.decorator_list = []
            found.append(node)
    exec(compile(ast.Module(found, []), str(file), "exec"), space)
    return types.SimpleNamespace(**{name: space[name] for name in names})


def people(rng):
    pool = [words(rng, 3) for _ in range(3)]
    answers = [rng.choice(pool) for _ in range(10)]
    return rng.choice(pool) if rng.random() < 0.7 else words(rng, 3), answers


@pytest.mark.parametrize("task", ["vqav2", "textvqa"])
def test_vqa_accuracy(rng, task):
    kind = taken("lmms_eval", "tasks/_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor")
    theirs = {k: v for k, v in kind.EvalAIAnswerProcessor.CONTRACTIONS.items() if k != v}
    assert {k: v for k, v in theirs.items() if k == k.lower()} == vqa.CONTRACTIONS
    process = getattr(
        taken("lmms_eval", f"tasks/{task}/utils.py", f"{task}_process_results", **vars(kind)),
        f"{task}_process_results",
    )
    name = "vqa_accuracy" if task == "vqav2" else "vqa_accuracy_textvqa_lmms_eval"
    for _ in range(800):
        answer, given = people(rng)
        answers = list(given)
        if task == "vqav2":
            answers = [{"answer": a, "answer_id": k} for k, a in enumerate(given)]
        expected = process({"question_id": 0, "answers": answers}, [answer])["exact_match"]
        assert metrics.score(name, answer, given) == pytest.approx(expected, abs=1e-12)


def test_vqa_accuracy_evalscope(rng):
    names = ("_normalize_vqa_answer", "_vqa_soft_accuracy", "_ARTICLES", "_NUMBER_MAP")
    theirs = taken("evalscope", "benchmarks/vqav2/vqav2_adapter.py", *names)
    for _ in range(800):
        answer, given = people(rng)
        expected = theirs._vqa_soft_accuracy(answer.strip().strip("\"'"), given)
        found = metrics.score("vqa_accuracy_evalscope", answer, given)
        assert found == pytest.approx(expected, abs=1e-12)


def test_anls(rng):
    theirs = taken("lmms_eval", "api/metrics.py", "levenshtein_distance", "anls")
    package = pytest.importorskip("anls")
    for _ in range(800):
        right = [words(rng, 3) for _ in range(rng.randint(1, 3))]
        answer = rng.choice([words(rng, 4), right[0] + rng.choice(["", "s", "\n\n", " x"])])
        expected = theirs.anls(right, [answer])["anls"]
        assert metrics.score("anls_lmms_eval", answer, right) == pytest.approx(expected, abs=1e-12)
        expected = package.anls_score(answer, right)
        assert metrics.score("anls", answer, right) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("package", "path", "name"),
    [
        ("lmms_eval", "tasks/chartqa/utils.py", "relaxed_accuracy"),
        ("evalscope", "benchmarks/chartqa/utils.py", "relaxed_accuracy_evalscope"),
    ],
)
def test_relaxed_accuracy(rng, package, path, name):
    theirs = taken(package, path, "relaxed_correctness")
    for _ in range(4000):
        number = rng.choice([0, 5, 100, 2010]) * rng.choice([1, 1.04, 1.05, 1.06])
        answer = rng.choice([words(rng, 2), str(number)])
        right = rng.choice([words(rng, 1), "0", "5", "100", "2010", "5%"])
        expected = float(theirs.relaxed_correctness(answer, right))
        assert metrics.score(name, answer, [right]) == expected, (answer, right)


def test_pope(rng):
    parts = ("process_results", "aggregate_accuracy", "aggregate_precision", "aggregate_recall",
             "aggregate_f1_score", "aggregate_yes_ratio")  # fmt: skip
    theirs = taken("lmms_eval", "tasks/pope/utils.py", *(f"pope_{part}" for part in parts))
    rows, stored = [], []
    for _ in range(400):
        answer, right = rng.choice([words(rng, 2), "yes", "no", "Yes"]), rng.choice(["yes", "no"])
        measured = metrics.measure("yes_no_lmms_eval", answer, [right])
        rows.append({**measured._asdict(), "references": [right]})
        each = theirs.pope_process_results({"question_id": 0, "answer": right}, [answer])
        stored.append(each["pope_accuracy"])
        assert measured.score == stored[-1]["score"]
    found = metrics.summary("yes_no_lmms_eval", rows)
    assert found["accuracy"] == pytest.approx(theirs.pope_aggregate_accuracy(stored))
    assert found["precision"] == pytest.approx(theirs.pope_aggregate_precision(stored))
    assert found["recall"] == pytest.approx(theirs.pope_aggregate_recall(stored))
    assert found["f1"] == pytest.approx(theirs.pope_aggregate_f1_score(stored))
    assert found["yes_share"] == pytest.approx(theirs.pope_aggregate_yes_ratio(stored))


def test_mme(rng):
    quiet = types.SimpleNamespace(info=lambda line: None)
    names = ("parse_pred_ans", "mme_aggregate_results")
    theirs = taken("lmms_eval", "tasks/mme/utils.py", *names, eval_logger=quiet)
    for _ in range(4000):
        answer, right = words(rng, 3), rng.choice(["yes", "no"])
        expected = float(theirs.parse_pred_ans(answer) == right)
        assert metrics.score("mme", answer, [right], category="count") == expected, answer
    rows = [
        {"score": float(rng.random() < 0.6), "category": c, "group": k, "question_id": k}
        for c in ("count", "color")
        for k in range(20)
        for _ in "ab"
    ]
    expected = theirs.mme_aggregate_results(rows)
    assert metrics.summary("mme", rows)["perception"] == pytest.approx(expected)


def test_ocrbench(rng):
    names = ("_fold_fullwidth_ascii", "ocrbench_process_results")
    theirs = taken("lmms_eval", "tasks/ocrbench/utils.py", *names)
    for _ in range(4000):
        right = [words(rng, 2) for _ in range(rng.randint(1, 2))]
        answer = words(rng, 3) + rng.choice(["", rng.choice(right)])
        kind = rng.choice(["HME100k", "other"])
        row = {"answer": right, "dataset": kind, "question_type": "x"}
        expected = theirs.ocrbench_process_results(row, [answer])["ocrbench_accuracy"]["score"]
        assert metrics.score("ocrbench_lmms_eval", answer, right, category=kind) == expected


class _Drawn(Exception):
    """lmms-eval would draw a letter."""


def test_mmmu(rng):
    def draw(letters):
        raise _Drawn

    names = ("get_multi_choice_info", "parse_mmmu_multi_choice_response")
    path = "tasks/_task_utils/mmmu_mcq_utils.py"
    theirs = taken("lmms_eval", path, *names)
    theirs.parse_mmmu_multi_choice_response.__globals__["random"] = types.SimpleNamespace(
        choice=draw
    )
    options = ["red apple", "cat", "yes", "hello world"]
    words_of, letters = theirs.get_multi_choice_info(options)
    for _ in range(4000):
        answer = words(rng, 9) + rng.choice(["", " the red apple is x cat"])
        try:
            expected = theirs.parse_mmmu_multi_choice_response(answer, letters, words_of)
        except _Drawn:
            expected = None
        assert choice._mmmu_letter(answer, "ABCD", options) == expected, answer

    names = ("extract_numbers", "check_is_number", "normalize_str", "parse_open_response",
             "eval_open")  # fmt: skip
    theirs = taken("lmms_eval", "tasks/mmmu/utils.py", *names)
    for _ in range(4000):
        answer, right = words(rng, 8), rng.choice(["5", "1,000", "x", "cat", "-5", "yes", "1.5"])
        expected = float(theirs.eval_open([right], theirs.parse_open_response(answer)))
        assert metrics.score("mmmu", answer, [right]) == expected, (answer, right)


def test_counts_points_and_boxes(rng):
    theirs = taken("lmms_eval", "tasks/pixmo_count/utils.py", "pixmo_count_process_results")
    for _ in range(2000):
        answer, right = words(rng, 3), rng.choice(["3", "10", "03"])
        expected = theirs.pixmo_count_process_results({"answer": right}, [answer])["acc"]
        assert metrics.score("count_lmms_eval", answer, [right]) == expected

    theirs = taken("lmms_eval", "tasks/pointbench/utils.py", "_text_to_points")
    mask = np.random.default_rng(0).random((64, 96)) < 0.5
    for _ in range(1000):
        pairs = [
            (
                rng.choice(["0", "1", ".5", "0.25", "500", "1200", "-1"]),
                rng.choice(["0", "1", "10"]),
            )
            for _ in range(rng.randint(1, 3))
        ]
        answer = " ".join(f"({x}, {y})" for x, y in pairs)
        inside = [
            0 <= x < 96 and 0 <= y < 64 and mask[y, x]
            for x, y in theirs._text_to_points(answer, 96, 64)
        ]
        found = metrics.score("points_lmms_eval", answer, masks=[mask])
        assert found == pytest.approx(np.mean(inside))

    theirs = taken("lmms_eval", "tasks/refcoco/utils_rec.py", "compute_iou")
    for _ in range(1000):
        corners = [(rng.random(), rng.random(), rng.random() + 0.01, rng.random()) for _ in "ab"]
        first, second = ([x, y, x + w, y + h] for x, y, w, h in corners)
        assert iou(first, second) == pytest.approx(theirs.compute_iou(first, second))


def test_cider(rng):
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    vocabulary = ["a", "cat", "dog", "runs", "on", "the", "mat", "red", "two"]

    def caption():
        return " ".join(rng.choice(vocabulary) for _ in range(rng.randint(1, 9)))

    answers = [caption() for _ in range(60)]
    right = [[caption() for _ in range(rng.randint(1, 5))] for _ in answers]
    given = dict(enumerate(right)), {k: [answer] for k, answer in enumerate(answers)}
    _, expected = cider.Cider().compute_score(*given)
    found = metrics.scores("cider", answers, right)
    np.testing.assert_allclose(10 * np.array(found), expected, atol=1e-12)
