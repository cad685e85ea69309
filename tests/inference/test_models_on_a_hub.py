"""Published models by their names on a hub, in Python and on the command line."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from small_hub import SmallHub, use

import efficient_vlm as evlm
from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.cli import main as cli
from efficient_vlm.errors import UserError
from efficient_vlm.families.card import Base, Card

TESTS = Path(__file__).parents[1]
SAMPLE, LLAVA = TESTS / "samples" / "smolvlm", TESTS / "golden" / "llava"


def main(words):
    """The command line; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["efficient-vlm", *words])
        return cli.main()


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = SmallHub()
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, tmp_path / "home", server.url)
    yield server
    server.close()


def test_a_model_answers_by_its_name(server, tmp_path, capsys):
    commit = server.add("org/smolvlm", SAMPLE, "v1")
    here = evlm.from_pretrained(SAMPLE)
    vlm = evlm.from_pretrained("org/smolvlm", revision="v1")
    assert (vlm.source.name, vlm.source.revision, vlm.source.commit) == (
        "org/smolvlm",
        "v1",
        commit,
    )
    assert vlm.source.directory == vlm.directory == vlm.with_params(vlm.params).directory
    assert vlm.with_compressor("divprune", 2).source == vlm.source
    assert here.source.name is here.source.commit is None
    expected = here.generate("Hm", max_new_tokens=3)
    assert vlm.generate("Hm", max_new_tokens=3) == expected
    words = ["generate", "org/smolvlm", "Hm", "--max-new-tokens=3", "--revision=v1"]
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == expected.strip()
    for wrong in (words[:-1], [*words[:-1], "--revision=v2"]):
        assert main(wrong) == 2  # There is no main.
        said = capsys.readouterr().err
        assert "no revision" in said and said.count("\n") <= 3
    with pytest.raises(UserError, match="came from there"):
        vlm.save(vlm.directory)


def test_saved_models_carry_a_card(tmp_path):
    """What was trained with is known to the caller alone."""
    vlm = evlm.from_pretrained(SAMPLE, compressor=dict(name="divprune", budget=2))
    vlm.save(tmp_path / "same")
    same = ModelCard.load(tmp_path / "same" / "README.md")
    count = sum(Checkpoint.open(SAMPLE).read(n).size for n in Checkpoint.open(SAMPLE).names)
    assert f"parameters: {count:,}" in same.text and "nothing was trained" in same.text
    assert "name: divprune" in same.text and same.data.tags == ["efficient_vlm", "divprune"]
    other = vlm.with_params(vlm.params).with_compressor("none")
    other.save(tmp_path / "other", command="python train.py")
    text = ModelCard.load(tmp_path / "other" / "README.md").text
    assert "## Training\n\nnot recorded" in text and "    python train.py" in text
    card = Card(base=Base("org/base"), trained={"steps": 3}, relation="finetune")
    other.save(tmp_path / "other", card=card)
    data = ModelCard.load(tmp_path / "other" / "README.md").data
    assert (data.base_model, data.base_model_relation) == ("org/base", "finetune")
    text_model = evlm.from_pretrained(TESTS / "golden" / "gpt_neo")
    text_model.save(tmp_path / "text", dtype="bfloat16")
    card = ModelCard.load(tmp_path / "text" / "README.md")
    assert card.data.pipeline_tag == "text-generation" and "dtype: bfloat16" in card.text


def test_an_import_remembers_the_commit(server, tmp_path, capsys):
    files = {path.name: path.read_bytes() for path in LLAVA.iterdir() if path.suffix != ".npz"}
    commit = server.add("org/llava", {**files, "README.md": b"---\nlicense: mit\n---\n"})
    words = ["import", "org/llava", "imported", f"--verify={LLAVA / 'io.npz'}"]
    assert main([*words, "--revision=main"]) == 0
    assert json.loads(capsys.readouterr().out)["greedy_match"] is True
    record = json.loads((tmp_path / "imported" / "source.json").read_text())
    assert record == {"name": "org/llava", "revision": "main", "commit": commit}
    shutil.rmtree(tmp_path / "home")  # The import stands alone.
    assert evlm.from_pretrained("imported").source.commit == commit
    assert main(["export", "imported", "out"]) == 0
    assert not (tmp_path / "out" / "source.json").exists()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.base_model_revision) == ("org/llava", commit)
    assert card.data.license == "mit" and "base_model_relation" not in card.data
    assert "    efficient-vlm export imported out" in card.text
    assert "---\nlicense: mit\n" in (tmp_path / "out" / "README_base.md").read_text()
    before, after = Checkpoint.open(LLAVA), Checkpoint.open(tmp_path / "out")
    assert all(np.array_equal(before.read(n), after.read(n)) for n in before.names)
    assert main(["export", "org/llava", "half", "--dtype=bfloat16", f"--revision={commit}"]) == 0
    assert str(Checkpoint.open(tmp_path / "half").dtype(before.names[0])) == "bfloat16"
