"""The table of what each source of a mixture gave."""

import pytest

from efficient_vlm.report.records import Run
from efficient_vlm.report.sections import training

SOURCE = {"source": "a<b", "samples": 1200, "drawn": 2400, "epochs": 2.0, "skipped": 3}


def test_every_source_with_its_numbers():
    html = training.pipeline(Run("r", results={"train": {"sources": [SOURCE]}}))
    assert "a&lt;b" in html and "a<b" not in html
    for number in ("1,200", "2,400", ">3<", ">2<"):
        assert number in html


@pytest.mark.parametrize("sources", [None, [], {}, ["a"], 3])
def test_no_table_without_sources(sources):
    html = training.pipeline(Run("r", results={"train": {"sources": sources}}))
    assert "each source" not in html
