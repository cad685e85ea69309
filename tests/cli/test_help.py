"""Help of every verb by itself, with values that the core knows and examples that parse."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from efficient_vlm.cli import arguments, config_file, kernel_programs
from efficient_vlm.cli import main as cli
from efficient_vlm.cli.verbs import audit_aot, audit_kernels, subject_options
from efficient_vlm.compressors.methods import METHODS
from efficient_vlm.costs import match
from efficient_vlm.costs.compiled import programs
from efficient_vlm.errors import UserError
from efficient_vlm.families import presets
from efficient_vlm.nn import stack
from efficient_vlm.sharding import AXES

PARSERS = {each.prog: each for each in cli.make_parser().every() if each.prog != "efficient-vlm"}
# Of every verb, the options that its help must not have: they are another's.
OTHERS = {
    "efficient-vlm audit": ("--topology", "--mesh", "--quick", "--task", "--workdir"),
    "efficient-vlm audit aot": ("--quick", "--workdir", "--out"),
    "efficient-vlm audit kernels": ("--preset", "--compressor", "--task", "--mesh", "--config"),
    "efficient-vlm audit sharding": ("--topology", "--task", "--search", "--quick"),
    "efficient-vlm data build": ("--out", "--split", "--count"),
    "efficient-vlm data inspect": ("--workdir", "--compressor"),
    "efficient-vlm train": ("--compressor", "--preset", "--json"),
}


@pytest.mark.parametrize("name", PARSERS)
def test_every_verb_has_its_own_help(command, name):
    code, out, _ = command(*name.split()[1:], "--help")
    assert code == 0 and out.startswith(f"usage: {name} ")
    listed = set(re.findall(r"(?<!\S)--[\w.-]+", out.partition("examples:")[0]))
    assert {*PARSERS[name].own_options(), "--help"} <= listed | {"--config"}
    for option in OTHERS.get(name, ()):
        assert option not in listed, option


def examples():
    for name, parser in PARSERS.items():
        for line in (parser.epilog or "").splitlines()[1:]:
            yield pytest.param(name, line.strip(), id=line.strip()[:60])


@pytest.mark.parametrize(("name", "line"), list(examples()))
def test_examples_are_commands(name, line, request, monkeypatch):
    """They parse, and the files that they read are there. (The README's commands run in CI.)"""
    monkeypatch.chdir(request.config.rootpath)
    everything = cli.make_parser()
    words = shlex.split(line)
    assert " ".join(words[: len(name.split())]) == name
    args, rest = everything.parse_known_args(arguments.joined(words[1:]))
    arguments.read_given(rest, args.parser, everything)
    assert args.parser.prog == name and callable(args.run)
    for path in re.findall(r"(?:configs|tests)/[\w./]+", line):
        assert Path(path).exists(), path


def test_every_verb_has_examples():
    assert [name for name, each in PARSERS.items() if not each.epilog] == ["efficient-vlm data"]


def test_values_are_those_of_the_core():
    assert audit_aot.TASKS == programs.TASKS
    assert set(subject_options.MEASURES) == set(match.MEASURES)
    assert kernel_programs.ALL[0] == audit_kernels.TOPOLOGY
    for remat in audit_aot.REMAT:
        stack.rematerialised(len, remat)
    text = PARSERS["efficient-vlm audit aot"].format_help()
    assert all(name in text for name in (*match.MEASURES, *AXES, f"(default: {audit_aot.NEW})"))
    assert f"{presets.TEXT_TOKENS};" in subject_options.TEXT_DEFAULT
    assert "x".join(map(str, presets.PICTURE)) in PARSERS["efficient-vlm audit"].format_help()


def test_names_for_completion_need_no_jax():
    assert arguments.method_names() == sorted(METHODS)
    assert arguments.preset_names() == list(presets.names())
    assert arguments.complete_list("none,div", ["divprune"]) == ["none,divprune"]
    assert arguments.complete_list("di", ["divprune"]) == ["divprune"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("audit", "aot", "--quick"), ["--quick: `audit aot`", "only `audit kernels` takes it"]),
        (("audit", "--mesh=fsdp:2"), ["`audit sharding` and `audit aot` take it", "--preset"]),
        (("audit", "aot", "--task=trian"), ["'trian'", "did you mean 'train'"]),
        (("audit", "aot", "--remat=some"), ["'some'", "dots, full, none"]),
        (("audit", "shardng"), ["'shardng'", "did you mean 'sharding'"]),
        (("data", "build", "--config=configs/quickstart.py", "--cout=3"), ["unknown", "--c"]),
        (("train", "--compressor.layer=2"), ["required"]),
        (("report", "--workdir=x", "--config.train.steps=1"), ["report takes no config"]),
        (("eval", "--config.help"), ["takes no config", "efficient-vlm train --config.help"]),
        (("train", "--config.trian.help"), ["'trian'", "did you mean 'train'"]),
    ],
)
def test_mistakes(command, words, said):
    code, out, err = command(*words)
    assert code == 2 and not out and "Traceback" not in err
    assert len(err.strip().splitlines()) <= 3, err
    assert all(word in err for word in said), err


def test_an_audit_of_its_own_may_stand_behind_its_options(command):
    """As it could when all audits had one parser."""
    with pytest.raises(UserError, match="--topology: missing"):
        cli.run(["audit", "--preset=smolvlm-256m", "aot", "--task=train"])
    parsed = cli._nested_first(cli.make_parser(), ["audit", "--preset", "x", "aot"])
    assert parsed == ["audit", "aot", "--preset", "x"]
    assert cli._nested_first(cli.make_parser(), ["train", "aot"]) == ["train", "aot"]


# ---- --config.help -------------------------------------------------------------------------------


def test_every_field_of_a_config_is_listed_with_its_meaning(command):
    code, out, err = command("train", "--config.help")
    assert code == 0, err
    entries = dict(re.findall(r"^  (\w[\w.]*): .*\n((?: {6}.*\n)*)", out, re.MULTILINE))
    import ml_collections

    none = {"compressor": {"name": "none"}}
    config = ml_collections.ConfigDict({"model": none, "distil": none})
    for section in ("data", *config_file.SECTIONS):
        for field in dataclasses.fields(config_file.class_of(section, config)):
            if field.init and field.name not in ("parent", "name"):
                meaning = entries[f"{section}.{field.name}"]
                assert meaning.strip(), f"{section}.{field.name} has no sentence"
    assert "  train.optimizer.name: str = 'adamw'" in out  # Hidden in Linen modules only.
    assert "train.steps: int, required" in out and "train.ema: float | None = None" in out


@pytest.mark.parametrize(
    ("words", "listed", "absent"),
    [
        (
            ("train", "--config=configs/quickstart.py", "--config.train.help"),
            ("train.steps: int, required  (here ", "train.mesh.fsdp: int = 1"),
            ("model.dtype", "eval.images"),
        ),
        (
            ("audit", "--config.model.help", "--preset=llava-1.5-7b"),
            ("model.encoder.depth: int, required  (here 24)", "model.dtype"),
            ("train.steps",),
        ),
        (
            ("data", "inspect", "--config.data.help", "--config", "configs/quickstart.py"),
            ("data.image_size: int | tuple[int, int] = 64", "data.question_pool"),
            ("model.",),
        ),
    ],
)
def test_fields_of_a_section_and_the_values_of_a_config(
    command, monkeypatch, request, words, listed, absent
):
    monkeypatch.chdir(request.config.rootpath)
    code, out, err = command(*words)
    assert code == 0, err
    assert all(text in out for text in listed), out
    assert not any(text in out for text in absent)
