"""Mistakes in a fine-tuning run: three lines that say what to do, and exit code 2."""

import json
import shutil

import pytest
from tuned_models import (
    SMOLVLM,
    TESTS,
    golden_with_words,
    mixed_rows,
    row,
    tuning_config,
    write_rows,
)

from efficient_vlm.cli import run as commands

ROOT = TESTS.parent


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return write_rows(folder / "rows.jsonl", mixed_rows(folder, 8))


@pytest.fixture
def refused(command, rows_file, tmp_path, monkeypatch):
    """refused(words of --config...) -> the message of a run that does not begin."""
    monkeypatch.chdir(ROOT)

    def run(*words, pretrained=SMOLVLM, data=rows_file, workdir=tmp_path / "run"):
        overrides = [f"--config.model.pretrained={pretrained}", f"--config.data.path={data}"]
        overrides += ["--config.train.steps=2", "--config.data.pack_tokens=96", *words]
        code, out, err = command(
            *("train", "--config=configs/finetune.py", f"--workdir={workdir}", *overrides)
        )
        assert code == 2, (out, err)
        lines = err.strip().splitlines()
        assert lines[0].startswith("error:") and 1 <= len(lines) <= 3, err
        assert "Traceback" not in err + out
        assert not (workdir / "checkpoints").exists() or workdir.name == "begun"
        return err

    return run


def test_pictures_and_marks_that_do_not_match(refused, tmp_path):
    rows = mixed_rows(tmp_path, 8)
    rows[3] = row(["0-0.png"], "<image> <image> what is this ?", "it is .")
    path = write_rows(tmp_path / "rows.jsonl", rows)
    said = refused(
        "--config.data.max_skip_fraction=0.0", "--config.data.test_fraction=0", data=path
    )
    assert "markers 1" in said and "write <image> once for each picture" in said


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        ("--config.adapt.targets=language/layers/attention/qeury", "attention/query/kernel"),
        ("--config.adapt.train=vit/lyaers", "vit/layers"),
        ("--config.adapt.targets=vision_tower", "vit/"),
    ],
)
def test_a_pattern_that_matches_nothing(refused, words, nearest):
    said = refused(words)
    assert "matches no parameter" in said and "nearest paths are" in said
    assert nearest in said.split("nearest paths are")[1]


@pytest.mark.parametrize(
    ("words", "field", "hint"),
    [
        ("--config.adapt.name=lorra", "adapt.name", "lora"),
        ("--config.adapt.rank=0", "adapt.rank", ""),
        ("--config.adapt.base=fp4", "adapt.base", "nf4"),
        ("--config.model.dtype=float8", "model.dtype", "bfloat16"),
        ("--config.model.compressor.name=fastvv", "fastvv", "fastv"),
        ("--config.model.compressor.name=divprune", "budget", ""),
    ],
)
def test_settings_that_there_are_not(refused, words, field, hint):
    said = refused(words)
    assert field in said and hint in said


def test_no_model(refused, tmp_path):
    assert "model.pretrained" in refused(pretrained="")
    assert "no such directory" in refused(pretrained=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(pretrained=tmp_path / "empty")
    said = refused(pretrained=TESTS / "samples" / "old_workdir")
    assert "is a run of efficient-vlm train" in said and "export" not in said


def test_a_preset_with_a_slip(refused):
    assert "did you mean decoder?" in refused("--config.adapt.targets=decodr")


def test_a_template_that_shows_no_answers(refused, tmp_path):
    """All rows are refused; the first reason is said."""
    folder = tmp_path / "mute"
    shutil.copytree(SMOLVLM, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["chat_template"] = (
        "{% for m in messages if m.role == 'user' %}{% for c in m.content %}{% if c.type == 'image'"
        " %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    path.write_text(json.dumps(settings))
    said = refused(pretrained=folder)
    assert "template" in said


@pytest.fixture(scope="module")
def begun(rows_file, tmp_path_factory):
    """The folder of a run of two steps."""
    workdir = tmp_path_factory.mktemp("runs") / "begun"
    config = tuning_config(SMOLVLM, rows_file, adapt=dict(name="lora", rank=2))
    config.train.update(steps=2, checkpoint_every=2)
    commands.fit(config, workdir, say=lambda line: None)
    return workdir, config


@pytest.fixture
def resumed(begun, command, tmp_path):
    """resumed(words) -> the message of the same run with other settings."""
    workdir, config = begun
    path = tmp_path / "config.py"
    path.write_text(
        "import json\nimport ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict(json.loads({config.to_json()!r}))\n"
    )

    def run(*words):
        code, out, err = command("train", f"--config={path}", f"--workdir={workdir}", *words)
        assert code == 2, (out, err)
        assert 1 <= len(err.strip().splitlines()) <= 3 and "Traceback" not in err + out
        return err

    return run


@pytest.mark.parametrize("words", ["adapt.rank=3", "adapt.name=dora", "data.seed=1"])
def test_a_run_goes_on_only_as_it_began(resumed, words):
    assert words.partition("=")[0] in resumed(f"--config.{words}")


def test_a_run_goes_on_with_its_own_data_only(resumed, rows_file):
    was = rows_file.read_text()
    rows_file.write_text(was.replace("number 2", "number 9"))
    try:
        said = resumed()
        assert "content" in said or "data" in said
        assert "allow_data_change" in said
    finally:
        rows_file.write_text(was)


def test_a_teacher_with_another_vocabulary(refused, tmp_path):
    """Or without files; before anything is trained or asked."""
    other = golden_with_words("qwen2_5_vl", tmp_path / "other")
    kind = "--config.distil.kind=forward_kl"
    said = refused(kind, f"--config.distil.teacher={other}")
    assert "distil.teacher: token 0 is '<unk>'" in said and "the student's tokenizer" in said
    assert not (tmp_path / "run" / "teacher").exists()
    said = refused(kind, f"--config.distil.teacher={tmp_path / 'nowhere'}")
    assert "distil.teacher: " in said
    said = refused(kind, f"--config.distil.teacher={SMOLVLM}", "--config.distil.top_k=9999")
    assert "distil.top_k: 9,999" in said


def test_a_run_is_no_base(begun, refused):
    """Of a run that was fine-tuned: what to do instead."""
    said = refused(pretrained=begun[0])
    assert "is a run of efficient-vlm train" in said and "efficient-vlm export" in said
