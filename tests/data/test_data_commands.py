"""`data build` and `data inspect`."""

import dataclasses
import json

import numpy as np
import pytest
from data_samples import row
from PIL import Image

from efficient_vlm.cli import data as commands
from efficient_vlm.data import DataConfig
from efficient_vlm.errors import UserError


def test_build_prints_counts_and_manifest(small, capsys):
    manifest = commands.build(small)
    printed = capsys.readouterr().out
    assert str(manifest) in printed.replace("\n", "") and "needle" in printed
    assert json.loads(manifest.read_text())["splits"]["train"]["images"] == 40


@pytest.mark.parametrize("split", ["train", "test"])
def test_inspect_writes_a_sheet(small, tmp_path, capsys, split):
    sheet = commands.inspect(small, split=split, output=tmp_path / "new" / "sheet.png", images=4)
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    assert pixels.shape[0] > 300 and pixels.shape[1] > 1000
    # Not blank: the pictures are dark, the page is white.
    assert 0.02 < (pixels.max(-1) < 100).mean() < 0.6
    printed = capsys.readouterr().out
    assert "relation" in printed and str(sheet) in printed.replace("\n", "")


def test_inspect_own_data(write_rows, tmp_path, capsys):
    rows = [
        row(0, "good0.png", question="How much? " * 20, answer="$5 or $6 [bold]"),
        row(1, ["good1.png", "good2.png"]),
        row(2),
        row(3, "nowhere.png"),
    ]
    config = DataConfig(source="llava_json", path=str(write_rows(rows)), max_images=2)
    config = dataclasses.replace(config, test_fraction=0.0)
    commands.build(config)
    assert commands.inspect(config, output=tmp_path / "sheet.png").is_file()
    assert "unusable: 1 missing" in capsys.readouterr().out


def test_inspect_with_nothing_to_show(write_rows, tmp_path):
    path = write_rows([row(0, "nowhere.png")])
    config = DataConfig(source="llava_json", path=str(path), test_fraction=0.0)
    with pytest.raises(UserError, match="no train sample"):
        commands.inspect(config, output=tmp_path / "sheet.png")
