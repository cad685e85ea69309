"""docs/metrics.md says what the table of metrics says, and every metric says where it is from."""

import importlib.util
from pathlib import Path

import pytest

from efficient_vlm.evaluation import metrics

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("of_documents_metrics", DOCS / "metrics.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "metrics.md").read_text() == module.page(), "run: python docs/metrics.py"


@pytest.mark.parametrize("name", metrics.METRICS)
def test_every_metric_is_described(name):
    metric = metrics.METRICS[name]
    assert metric.sentence and not metric.sentence.endswith(".") and metric.source
    assert metric.measure.__doc__ and len(metric.sentence) <= 100
    assert metric.summarise is None or metric.summarise.__doc__
