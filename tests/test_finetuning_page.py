"""docs/finetuning.md: every command and every line of Python on it runs, in order."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from efficient_vlm.cli.main import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "finetuning.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """What stands at the root of the repository, with a `runs` of its own."""
    for name in ("configs", "docs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs(root, monkeypatch, capsys):
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) >= 8 and all(c.startswith("efficient-vlm ") for c in commands)
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        try:
            code = main()
        except SystemExit as stopped:  # Help.
            code = stopped.code
        out, err = capsys.readouterr()
        assert not code, f"{command}\n{out[-2000:]}\n{err[-2000:]}"
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), {})  # Our own document.
    check_what_it_says(root / "runs")


def check_what_it_says(runs):
    """Held-out rows, fewer tokens, cards, both forms of export."""
    tuned = json.loads((runs / "ft" / "results.json").read_text())
    assert tuned["train"]["steps"] == 4 and tuned["eval"][0]["n"] >= 1
    quarter = json.loads((runs / "quarter" / "results.json").read_text())
    assert [row["compressor"] for row in quarter["cost"]] == ["none", "divprune"]
    shapes = json.loads((runs / "ft_shapes" / "results.json").read_text())
    assert shapes["metric"] == "anls" and shapes["eval"][0]["n"] == 4
    for name in ("ft_hf", "ft_adapter"):
        assert "my.json" in (runs / name / "README.md").read_text()
    for name in ("ft_adapter", "notebook_adapter"):
        assert json.loads((runs / name / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (runs / "ft_hf" / "config.json").is_file() and (runs / "ft_sheet.png").is_file()


def test_the_settings_on_the_page_exist():
    """`--config.a.b=...` in the text, and the recipes."""
    from efficient_vlm.cli import config_file as configs

    path = ROOT / "configs" / "finetune.py"
    given = re.findall(r"`--config\.([\w.]+=[^`\s]+)`", PAGE.read_text())
    assert len(given) >= 6
    for each in given:
        configs.load(str(path), [each])
    listed = set(re.findall(r"\(\.\./configs/(\w+\.py)\)", PAGE.read_text()))
    assert {name for name in listed if not (ROOT / "configs" / name).is_file()} == set()
    assert len(listed) >= 8
