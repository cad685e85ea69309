"""`efficient-vlm eval MODEL --benchmark=FILE` and `efficient-vlm metrics`."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from efficient_vlm.cli.evaluate_file import read_columns
from efficient_vlm.errors import UserError
from efficient_vlm.evaluation.metrics import METRICS

MODEL, FILE = "tests/samples/smolvlm", "tests/samples/llava/shapes.jsonl"
EVAL = ("eval", MODEL, f"--benchmark={FILE}")


@pytest.fixture(autouse=True)
def at_home(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def test_a_parquet_file_with_other_columns(command, tmp_path, request):
    """A budget alone means the default method and smaller pictures."""
    images = request.config.rootpath / "tests" / "samples" / "llava"
    rows = [
        {
            "wording": f"What is in picture {k}?",
            "gold": "3",
            "img": (images / f"0{k}.jpg").read_bytes(),
        }
        for k in range(3)
    ]
    path, out = tmp_path / "few.parquet", tmp_path / "out"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    code, text, err = command(
        *("eval", MODEL, f"--benchmark={path}", "--metric=relaxed_accuracy", "--budget=1"),
        *("--columns=question=wording,references=gold", "--limit=2", "--max-new-tokens=2"),
        *("--pictures.split=false", f"--out={out}", "--json"),
    )
    assert code == 0, err
    results = json.loads(text)
    assert [row["compressor"] for row in results["eval"]] == ["none", "divprune", "downsample"]
    assert results["eval"][0]["n"] == 2
    assert "2 questions; columns: question from wording, references from gold" in err
    assert (out / "report.html").is_file() and (out / "predictions" / "divprune-1.jsonl").is_file()
    assert json.loads((out / "results.json").read_text()) == results


def test_the_table(command):
    code, out, err = command(
        *(*EVAL, "--metric=anls", "--limit=2", "--max-new-tokens=1", "--pictures.split=false")
    )
    assert code == 0, err
    assert "anls in % with 95 % intervals" in out and "columns: id from question_id" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("eval",), ["--workdir", "--benchmark"]),
        (("eval", MODEL), ["MODEL: goes with --benchmark"]),
        (("eval", "--workdir=x", "--limit=3"), ["--limit: goes with --benchmark"]),
        (("eval", "--workdir=x", "--pictures.split=false"), ["goes with --benchmark"]),
        (("eval", f"--benchmark={FILE}", "--metric=anls"), ["no model"]),
        (EVAL, ["--metric: missing", "relaxed_accuracy"]),
        ((*EVAL, "--metric=anlss"), ["did you mean 'anls'"]),
        ((*EVAL, "--metric=anls", "--workdir=x"), ["--workdir: of runs"]),
        ((*EVAL, "--metric=anls", "--control=shuffled"), ["--control=shuffled"]),
        ((*EVAL, "--metric=anls", "--compressor=divprune"), ["--budget: missing"]),
        ((*EVAL, "--metric=anls", "--budget=1,x"), ["--budget: 'x'"]),
        ((*EVAL, "--metric=anls", "--compressor.head=2"), ["--compressor.head: goes with"]),
        ((*EVAL, "--metric=anls", "--columns=question"), ["--columns: 'question'", "FIELD=COLUMN"]),
        ((*EVAL, "--metric=anls", "--columns=question=q"), ["'q'", "question_id"]),
        ((*EVAL, "--metric=anls", "--limit=0"), ["limit: 0"]),
        ((*EVAL, "--metric=anls", "--batch-size=0"), ["--batch-size: 0"]),
        ((*EVAL, "--metric=points_lmms_eval"), ["no column of masks"]),
        ((*EVAL, "--metric=yes_no"), ["one of yes and no"]),
        (("eval", "no/such", f"--benchmark={FILE}", "--metric=anls"), ["no/such"]),
        (("eval", MODEL, "--benchmark=no.csv", "--metric=anls"), ["no file no.csv"]),
        (("metrics", "relaxd_accuracy"), ["did you mean 'relaxed_accuracy'"]),
    ],
)
def test_mistakes(command, words, said):
    code, _, err = command(*words)
    assert code == 2 and "Traceback" not in err
    told = err.partition("error: ")[2]
    assert len(told.strip().splitlines()) <= 3, err
    assert all(word in told for word in said), err


def test_a_run_is_no_published_model(command, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    code, _, err = command("eval", tmp_path, f"--benchmark={FILE}", "--metric=anls")
    assert code == 2 and "--workdir=" in err


def test_columns_of_several_names():
    assert read_columns(["image=a,b", "question=q,references=r"]) == {
        **{"image": "a,b", "question": "q", "references": "r"}
    }
    with pytest.raises(UserError):
        read_columns(["=q"])


def test_metrics_are_listed(command):
    code, out, _ = command("metrics", "--json")
    assert code == 0 and [row["name"] for row in json.loads(out)] == list(METRICS)
    code, out, _ = command("metrics")
    assert code == 0 and all(name in out for name in METRICS)
    for name in METRICS:
        code, out, _ = command("metrics", name)
        assert code == 0 and METRICS[name].sentence in out and "A file needs: " in out
