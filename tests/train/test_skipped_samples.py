"""A run on one's own rows: pictures among the text, and what was skipped in results and report."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_models import make_tiny_config

from efficient_vlm.cli import run as commands
from efficient_vlm.data.records import REASONS


def row(number, question, *pictures):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
    return {"id": number, "images": list(pictures), "conversations": turns}


@pytest.fixture
def config(tmp_path):
    for name in "abcd":
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    good = [row(0, "is <image> like <image>?", "a.png", "b.png"), row(1, "<image> red?", "c.png")]
    bad = [row(2, "<image> and <image>", "d.png"), row(3, "none", "e.png")]
    (tmp_path / "rows.json").write_text(json.dumps([*good, *bad]))
    (tmp_path / "eval.json").write_text(json.dumps([row(4, "see <image>?", "d.png"), bad[0]]))
    config = make_tiny_config(str(tmp_path))
    config.data = dict(
        source="llava_json",
        path=str(tmp_path / "rows.json"),
        eval_path=str(tmp_path / "eval.json"),
        image_size=16,
        batch_size=4,
        max_length=32,
        max_images=2,
        vocab_size=270,
        max_skip_fraction=1.0,
    )
    config.model.encoder.image_size = 16
    config.model.decoder.moe = None
    config.model.compressor.budget = 4
    config.train.update(steps=2, elastic=[], checkpoint_every=2)
    config.eval.update(methods=[dict(name="random", budgets=[2])], seeds=1, batch_size=2)
    return config


def test_skipped_rows_are_in_results_and_report_of_every_call(config, tmp_path):
    said = []
    first = commands.fit(config, tmp_path / "run", say=said.append)
    assert any("Data: 2 of 4 training samples skipped (markers 1, missing 1)" in s for s in said)
    # Nothing is trained again, and nothing is forgotten.
    again = commands.fit(config, tmp_path / "run", say=said.append)
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    for results in (first, again, stored):
        assert results["train"]["samples"] == 4
        assert results["train"]["skipped_samples"] == {"markers": 1, "missing": 1}
        assert results["test_samples"] == {"samples": 2, "skipped": {"markers": 1}}
    assert first["train"]["params_sha256"] == again["train"]["params_sha256"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("markers</th>") == 2 and page.count("missing</th>") == 1
    assert REASONS["missing"] in page and "4 training and 2 test" in page
