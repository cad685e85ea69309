"""Metrics: invariants, summaries by hand, CIDEr-D against its equations, and mistakes."""

import itertools
import math
import random
import subprocess
import sys

import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.evaluation import metrics
from efficient_vlm.evaluation.metrics import captions, place
from efficient_vlm.evaluation.metrics import text as texts

CORPUS = {name for name, metric in metrics.METRICS.items() if metric.corpus}


def test_needs_no_jax():
    code = "import sys; import efficient_vlm.evaluation.metrics; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- texts ---------------------------------------------------------------------------------------


def test_levenshtein_is_a_metric_and_agrees_with_all_short_edits():
    words = ["".join(w) for n in range(4) for w in itertools.product("ab", repeat=n)]

    def one_edit(word):
        for i in range(len(word) + 1):
            yield from (word[:i] + c + word[i:] for c in "ab")
            if i < len(word):
                yield word[:i] + word[i + 1 :]
                yield from (word[:i] + c + word[i + 1 :] for c in "ab")

    start, seen, steps = "aba", {"aba": 0}, ["aba"]
    while steps:  # Breadth first: the fewest edits, without the recurrence.
        word = steps.pop(0)
        for other in one_edit(word):
            if other not in seen and len(other) <= 5:
                seen[other] = seen[word] + 1
                steps.append(other)
    assert all(texts.levenshtein(start, w) == texts.levenshtein(w, start) == seen[w] for w in words)


@pytest.mark.parametrize("name", ["anls", "anls_vlmevalkit", "anls_lmms_eval", "exact_match"])
def test_one_right_reference_is_enough(name):
    assert metrics.score(name, "Cat", ["dog", "cat", ""]) == 1.0
    assert metrics.score(name, "Cat", "cat") == 1.0  # A reference alone.


def test_order_of_people_does_not_matter():
    people = ["red"] * 2 + ["dark red"] * 5 + ["brown"] * 3
    for name in metrics.METRICS:
        if name.startswith("vqa_accuracy"):
            scores = set()
            for seed in range(3):
                random.Random(seed).shuffle(people)
                scores.add(metrics.score(name, "the red", people))
            assert len(scores) == 1, name
    # 2 of 10: 8 subsets with two matches, 2 with one.
    assert metrics.score("vqa_accuracy", "red", people) == pytest.approx((8 * 2 + 2) / 30)


# ---- yes and no, MME, MMMU -----------------------------------------------------------------------


def rows_of(name, pairs, **options):
    rows = []
    for prediction, right in pairs:
        measured = metrics.measure(name, prediction, [right], **options)
        rows.append({**measured._asdict(), "references": [right], "prediction": prediction})
    return rows


PAIRS = [("Yes", "yes"), ("Yes", "no"), ("No", "no"), ("no", "yes"), ("maybe", "yes")]


def test_pope_by_hand():
    found = metrics.summary("yes_no", rows_of("yes_no", PAIRS))
    # "maybe" denies nothing: yes. TP 2, FP 1, FN 1, TN 1.
    assert found["accuracy"] == found["score"] == 3 / 5
    assert found["precision"] == 2 / 3 and found["recall"] == 2 / 3
    assert found["f1"] == pytest.approx(2 / 3) and found["yes_share"] == 3 / 5

    found = metrics.summary("yes_no_lmms_eval", rows_of("yes_no_lmms_eval", PAIRS))
    # "maybe" is neither: no miss. TP 1, FP 1, FN 1; references are yes in 3 of 5.
    assert (found["precision"], found["recall"], found["yes_share"]) == (0.5, 0.5, 0.6)

    found = metrics.summary("yes_no_vlmevalkit", rows_of("yes_no_vlmevalkit", PAIRS))
    # "maybe" is a miss: TP 1, FP 1, FN 2; two of five answers are yes.
    assert (found["precision"], found["recall"], found["yes_share"]) == (0.5, 1 / 3, 0.4)


def test_mme_by_hand():
    def row(category, group, score):
        return {"category": category, "group": group, "score": score}

    rows = [row("count", "a", 1.0), row("count", "a", 1.0), row("count", "b", 1.0)]
    rows += [row("count", "b", 0.0), row("code_reasoning", "a", 1.0)]
    rows += [row("code_reasoning", "a", 1.0)]
    found = metrics.summary("mme", rows)
    assert found["subtasks"]["count"] == {"accuracy": 75, "accuracy_plus": 50, "total": 125}
    assert (found["perception"], found["cognition"], found["total"]) == (125, 200, 325)
    with pytest.raises(UserError, match="1 questions of 'count' about image 'b'"):
        metrics.summary("mme", rows[:3])


def test_mmmu_by_subject_and_by_seed():
    rows = [{"score": s, "category": c} for s, c in ((1.0, "art"), (0.0, "art"), (1.0, "law"))]
    found = metrics.summary("mmmu", rows)
    assert found["score"] == pytest.approx(2 / 3) and found["mean_of_subjects"] == 0.75
    assert found["by_category"]["art"] == {"n": 2, "score": 0.5}

    options = ["w", "x", "y", "z"]
    draws = [
        metrics.score("mmmu_lmms_eval", "?", ["A"], options=options, id=str(k)) for k in range(400)
    ]
    again = [
        metrics.score("mmmu_lmms_eval", "?", ["A"], options=options, id=str(k)) for k in range(400)
    ]
    assert draws == again and 0.15 < np.mean(draws) < 0.35
    assert metrics.score("mmmu", "?", ["A"], options=options) == 0.0


# ---- places --------------------------------------------------------------------------------------


def test_points_match_as_many_objects_as_possible():
    """The nearest first would pair 0 with 4 and leave one alone."""
    answer = '<points x1="0" y1="0" x2="7" y2="0" alt="a">a</points>'
    assert metrics.score("points", answer, [[4, 0], [-4, 0]]) == 1.0
    found = metrics.measure("points", answer, [[4, 0], [-4, 0]], distance=3.5)
    assert found.more == {"precision": 0.5, "recall": 0.5}


def test_points_in_masks():
    left, right = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    left[:, :3], right[:, 3:] = True, True
    one = '<point x="10" y="99" alt="a">a</point>'
    two = '<points x1="10" y1="10" x2="20" y2="90" alt="a">a</points>'
    assert metrics.score("points", one, masks=[left]) == 1.0
    assert metrics.measure("points", one, masks=[left, right]).more["recall"] == 0.5
    # Two points in one object: one of them is too many.
    assert metrics.measure("points", two, masks=[left, right]).more["precision"] == 0.5
    assert metrics.score("points_lmms_eval", "[(0.1, 0.5), (900, 500), (5, 3)]", masks=[left]) == (
        pytest.approx(2 / 3)
    )
    qwen = '[{"point_2d": [100, 500], "label": "a"}]'
    assert metrics.score("points", qwen, masks=[left]) == 1.0


def test_boxes():
    same = [10.0, 20.0, 30.0, 60.0]
    assert metrics.score("boxes", "<box>[10, 20, 30, 60]", [same]) == 1.0
    assert metrics.score("boxes", "(10,20,30,60)", [[0, 0, 1, 1], same]) == 1.0
    assert metrics.score("boxes", "[100, 200, 300, 600]", [[0.1, 0.2, 0.3, 0.6]], scale=1000) == 1.0
    words = "<loc0256><loc0512><loc0768><loc1023> cat"
    expected = place.iou([0.5, 0.25, 1023 / 1024, 0.75], [0.5, 0.25, 1, 0.75])
    assert metrics.score("boxes", words, [[0.5, 0.25, 1, 0.75]]) == pytest.approx(expected)
    # Against areas counted in cells of a raster.
    rng = np.random.default_rng(0)
    for _ in range(20):
        corners = rng.integers(0, 20, (2, 2, 2))
        (a, b), (c, d) = np.sort(corners, axis=1)
        first, second = (*a, *b), (*c, *d)
        grid = [np.zeros((20, 20), bool) for _ in "xx"]
        for cells, box in zip(grid, (first, second), strict=True):
            cells[box[0] : box[2], box[1] : box[3]] = True
        union = (grid[0] | grid[1]).sum()
        expected = (grid[0] & grid[1]).sum() / union if union else 0.0
        assert place.iou(first, second) == pytest.approx(expected)


# ---- captions ------------------------------------------------------------------------------------

CAPTIONS = ["a cat on the mat", "two dogs run", "the red bus stops at the red light", "a"]
REFERENCES = [
    ["a cat sits on the mat", "the cat is on a mat"],
    ["two dogs are running", "dogs run in the park", "two dogs run"],
    ["a red bus stops at a light", "the bus waits at the red light"],
    ["a plate of food"],
]


def grams(text, n):
    words = text.split()
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def cider_by_the_equations(prediction, own, references, n):
    """arXiv 1411.5726, equations 1 to 3 and section 4, for one n and one of the captions.

    Dense float64 vectors of all n-grams.
    """
    every = sorted({g for all in references for r in all for g in grams(r, n)})
    every += sorted(set(grams(prediction, n)) - set(every))
    holders = [sum(any(g in grams(r, n) for r in all) for all in references) for g in every]
    idf = np.log(len(references) / np.maximum(holders, 1))
    values = []
    for reference in own:
        g, r = (
            np.array([grams(t, n).count(e) for e in every]) * idf for t in (prediction, reference)
        )
        norm = np.linalg.norm(g) * np.linalg.norm(r)
        cosine = (np.minimum(g, r) * r).sum() / norm if norm > 0 else 0.0
        apart = len(prediction.split()) - len(reference.split())
        values.append(cosine * math.exp(-(apart**2) / 72))
    return np.mean(values)


def test_cider_is_its_equations():
    found = metrics.scores("cider", CAPTIONS, REFERENCES)
    expected = [
        np.mean([cider_by_the_equations(p, own, REFERENCES, n) for n in (1, 2, 3, 4)])
        for p, own in zip(CAPTIONS, REFERENCES, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    assert 0 < found[1] < 1 and found[3] < 0.2
    rows = [{"score": score} for score in found]
    assert metrics.summary("cider", rows)["cider"] == pytest.approx(10 * np.mean(found))


def test_cider_of_the_reference_itself_is_all():
    words = [["one two three four five"], ["six seven eight nine ten"]]
    assert metrics.scores("cider", [each[0] for each in words], words) == pytest.approx([1.0, 1.0])
    assert captions.tokens("A dog, 2 cats: don't!") == ["a", "dog", "2", "cats", "don't"]


def test_bleu_is_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    rows = [
        {**metrics.measure("bleu", p, r)._asdict(), "prediction": p, "references": r}
        for p, r in zip(CAPTIONS, REFERENCES, strict=True)
    ]
    found = metrics.summary("bleu", rows)
    padded = [[(r + [None, None])[k] for r in REFERENCES] for k in range(3)]
    assert found["corpus_bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(CAPTIONS, padded).score / 100
    )
    assert "tok:13a" in found["signature"] and 0 < rows[0]["score"] < 1


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.score("relaxed_acuracy", "1", ["1"]), ["did you mean 'relaxed_accuracy'"]),
        (lambda: metrics.score("anls", "a", ["a"], treshold=1), ["'treshold'"]),
        (lambda: metrics.score("points", "a", [[1, 2]], distanc=1), ["did you mean 'distance'"]),
        (lambda: metrics.score("anls", "a", []), ["anls: no references"]),
        (lambda: metrics.score("anls", None, ["a"]), ["anls: answer None"]),
        (lambda: metrics.score("anls", "a", [["b"]]), ["reference ['b']"]),
        (lambda: metrics.score("vqa_accuracy", "a", ["a"]), ["one reference", "exact_match"]),
        (lambda: metrics.score("yes_no", "yes", ["cat"]), ["['cat']", "one of yes and no"]),
        (lambda: metrics.score("mme", "yes", ["yes"], category="x"), ["subtask 'x'", "existence"]),
        (lambda: metrics.score("cider", "a", ["a"]), ["metrics.scores"]),
        (lambda: metrics.score("count", "3", ["many"]), ["'many' is no number"]),
        (lambda: metrics.score("boxes", "3", ["many"]), ["'many' is no box"]),
        (lambda: metrics.score("points", "3", [[1, 2, 3]]), ["[1, 2, 3] is no point"]),
        (
            lambda: metrics.score("multiple_choice", "A", ["cow"], options=["cat", "dog"]),
            ["'cow' is no option", "A to B"],
        ),
        (lambda: metrics.score("multiple_choice", "A", ["x" * 500]), ["..."]),
        (lambda: metrics.scores("anls", ["a"], []), ["1 answers, 0 lists"]),
        (lambda: metrics.summary("anls", []), ["no answers"]),
        (lambda: metrics.summary("yes_no", [1.0]), ["'parsed'"]),
    ],
)
def test_mistakes(call, words):
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert all(word in text for word in words), text
    assert len(text.splitlines()) <= 3 and "x" * 81 not in text


@pytest.mark.parametrize("name", sorted(set(metrics.METRICS) - CORPUS - {"bleu"}))
def test_scores_lie_between_0_and_1_whatever_the_answer(name):
    references = {"yes_no": ["yes"], "mme": ["no"], "boxes": [[0, 0, 1, 1]], "points": [[5, 5]]}
    given = next((r for key, r in references.items() if name.startswith(key)), ["3", "3"])
    if "choice" in name:
        given = ["B"]
    options = {"category": "count"} if name == "mme" else {}
    if name == "points_lmms_eval":
        options = {"masks": [np.eye(5, dtype=bool)]}
    odd = [
        "",
        " ",
        "\n\n",
        "3",
        "(",
        "[1,2",
        "<point",
        "𝟛",
        "\0",
        "a" * 3000,
        "%",
        "-",
        "1e999",
        "nan",
    ]
    for answer in odd:
        assert 0.0 <= metrics.score(name, answer, given, **options) <= 1.0
