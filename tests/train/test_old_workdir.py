"""A workdir of an earlier version (commit 04a1b6a, before the package had its rooms) is still good.

`tests/samples/old_workdir` is a run of six steps of the tests' tiny configuration.
"""

import base64
import json
import shutil
from pathlib import Path

import ml_collections
import numpy as np
import pytest

import efficient_vlm as evlm
from efficient_vlm.report.report import write_report

OLD = Path(__file__).parents[1] / "samples" / "old_workdir"


@pytest.fixture
def old_workdir(tmp_path, data_dir):
    """A copy whose data are those of this session."""
    workdir = tmp_path / "run"
    shutil.copytree(OLD, workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["dir"] = data_dir
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_is_evaluated_as_it_was(old_workdir):
    """Answers of the newest checkpoint, but for ties that another processor may break."""
    before = json.loads((old_workdir / "results.json").read_text())
    found = evlm.evaluate_run(old_workdir, images=8, say=lambda line: None)
    assert [row["n"] for row in found["eval"]] == [row["n"] for row in before["eval"]]
    for row, old in zip(found["cost"], before["cost"], strict=True):
        assert (row["flops"], row["kv_bytes"]) == (old["flops"], old["kv_bytes"])
    gaps = [
        a["accuracy"] - b["accuracy"] for a, b in zip(found["eval"], before["eval"], strict=True)
    ]
    np.testing.assert_allclose(gaps, 0, atol=0.15)


def test_it_is_resumed_where_it_was(old_workdir):
    """From step 3 on: the same batches, draws and losses as the earlier version went on with."""
    shutil.rmtree(old_workdir / "checkpoints" / "6")
    index = old_workdir / "checkpoints" / "index.json"
    (old_workdir / "results.json").unlink()
    before = {line["step"]: line for line in lines(old_workdir / "metrics.jsonl")}
    (old_workdir / "metrics.jsonl").unlink()
    config = ml_collections.ConfigDict(json.loads((old_workdir / "config.json").read_text()))
    evlm.fit(config, old_workdir, say=lambda line: None)
    after = {line["step"]: line for line in lines(old_workdir / "metrics.jsonl")}
    assert sorted(after) == [4, 5, 6] and index.exists()
    for step, line in after.items():
        assert (line["budget"], line["compressor"]) == (
            before[step]["budget"],
            before[step]["compressor"],
        )
        np.testing.assert_allclose(line["loss"], before[step]["loss"], rtol=1e-4)
        np.testing.assert_allclose(line["grad_norm"], before[step]["grad_norm"], rtol=1e-3)


def test_its_report_is_written(old_workdir):
    """With the token maps that its evaluation drew; now it keeps arrays and the report draws."""
    page = write_report(old_workdir).read_text()
    assert "random" in page and "needle" in page
    for picture in (old_workdir / "maps").glob("*.png"):
        assert base64.b64encode(picture.read_bytes()).decode() in page, picture.name
