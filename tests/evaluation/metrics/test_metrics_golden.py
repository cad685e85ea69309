"""The golden table: answers on which published programs disagree, each with the score of each.

`golden.json` says for every row where its score comes from. `tests/parity/test_metrics_parity.py`
runs the programs themselves where they are installed.
"""

import json
from pathlib import Path

import pytest

from efficient_vlm.evaluation import metrics

ROWS = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row['metric']}: {row['prediction'][:24]!r}"
)
def test_score_is_that_of_its_source(row):
    found = metrics.score(
        row["metric"], row["prediction"], row["references"], **row.get("options", {})
    )
    assert found == pytest.approx(row["score"], abs=1e-12), row["source"]


def test_the_table_is_what_it_says():
    assert len(ROWS) >= 60 and all(row["source"] for row in ROWS)
    # Wherever there are variants, a row tells each from its base.
    apart = {}
    for row in ROWS:
        key = row["prediction"], str(row["references"]), str(row.get("options"))
        apart.setdefault(key, {})[row["metric"]] = row["score"]
    bases = {"vqa_accuracy", "anls", "relaxed_accuracy", "yes_no", "ocrbench", "count"}
    told = {
        base
        for scores in apart.values()
        for base in bases
        if len({s for name, s in scores.items() if name.startswith(base)}) > 1
    }
    assert told == bases
