"""The command line: every mistake is at most three lines and exit code 2, and starting is cheap."""

import json
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from efficient_vlm.cli import main as cli
from efficient_vlm.train.metrics import read_metrics
from efficient_vlm.train.workdir_config import check_workdir_config

REPOSITORY_CONFIG = "configs/quickstart.py"


@pytest.fixture
def call(monkeypatch, capsys):
    """call(*words) -> (exit code, stdout, stderr), in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["efficient-vlm", *map(str, words)])
        capsys.readouterr()
        try:
            code = cli.main()
        except SystemExit as stopped:  # --help and --version
            code = stopped.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def refused(call):
    """refused(*command, words) -> stderr, after checking that it is a proper complaint."""

    def check(*command, words):
        code, out, err = call(*command)
        assert code == 2, out + err
        assert "Traceback" not in out + err
        message = err[err.rindex("error: ") :].strip()
        assert len(message.splitlines()) <= 3, message
        for word in words:
            assert word in message, message
        return message

    return check


@pytest.fixture
def config_file(tiny_config, tmp_path):
    """The tiny config as a file."""
    path = tmp_path / "tiny.py"
    path.write_text(f"def get_config():\n    return {tiny_config.to_dict()!r}\n")
    return path


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


# ---- mistakes on the command line ----------------------------------------------------------------

TRAIN = ("train", f"--config={REPOSITORY_CONFIG}", "--workdir=never")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("tarin",), ["'tarin'", "did you mean 'train'?", "doctor"]),
        (("--verison",), ["--verison", "--version?"]),
        (("train", "--workdir=never"), ["--config"]),
        (("train", f"--config={REPOSITORY_CONFIG}"), ["--workdir"]),
        (("train", "--config=configs/quickstat.py", "--workdir=never"), ["quickstart.py"]),
        (("train", "--config=configs/quickstart.py:smok", "--workdir=never"), ["'smok'", "smoke"]),
        (("train", "--config=configs/needle_hr.py:100", "--workdir=never"), ["'100'", "512"]),
        (("train", "--config=configs", "--workdir=never"), ["configs"]),
        ((*TRAIN, "--config.train.stepz=5"), ["stepz", "--config.train.steps?"]),
        ((*TRAIN, "--config.train.steps=five"), ["train.steps", "'five'", "int"]),
        ((*TRAIN, "--config.train.steps"), ["train.steps", "no value"]),
        ((*TRAIN, "--config.train.steps=0"), ["train.steps: 0", "1 or more"]),
        ((*TRAIN, "--config.train.steps", "-5"), ["train.steps: -5"]),
        ((*TRAIN, "--config.data.batch_size=-1"), ["data.batch_size"]),
        ((*TRAIN, "--config.data.source=web"), ["data.source", "token_bench"]),
        ((*TRAIN, "--config.eval.images=-1"), ["eval.images: -1"]),
        ((*TRAIN, "--config.model.compressor.name=text_topq"), ["text_topk"]),
        ((*TRAIN, '--config.eval.methods=[{"name": "randon"}]'), ["'randon'", "random"]),
        (
            (*TRAIN, '--config.eval.methods=[{"name": "average_pool", "budgets": [5]}]'),
            ["average_pool", "5"],
        ),
        (
            (*TRAIN, '--config.eval.methods=[{"name": "resampler", "budgets": [16]}]'),
            ["resampler", "train.elastic"],
        ),
        ((*TRAIN, "--confg.train.steps=5"), ["--confg.train.steps=5"]),
        ((*TRAIN, "steps=5"), ["'steps=5'"]),
        (("audit", "kernels", "--preset=llava-1.5-7b"), ["--preset", "--topology"]),
        (("audit", "kernels", "--compressor.layer=2"), ["--compressor", "--topology"]),
        (("audit", "--preset=llava-1.5-7b", "--quick"), ["--quick", "audit kernels"]),
        (("data",), ["build"]),
        (("data", "buidl"), ["'buidl'", "build"]),
        (("data", "inspect", f"--config={REPOSITORY_CONFIG}", "--count=x"), ["--count"]),
        (("data", "inspect", f"--config={REPOSITORY_CONFIG}", "--count=0"), ["count"]),
        (("eval", "--workdir=never"), ["never", "train first"]),
        (("eval", "--workdir=never", "--budget=5"), ["--compressor"]),
        (("eval", "--workdir=never", "--compressor=random"), ["--budget"]),
        (("eval", "--workdir=never", "--compressor=random", "--budget=abc"), ["'abc'"]),
        (("eval", "--workdir=never", "--compressor=random", "--budget=0"), ["'0'"]),
        (("eval", "--workdir=never", "--compressor=random", "--budget=²"), ["'²'"]),
        (("eval", "--workdir=never", "--control=dark"), ["'dark'", "blank", "shuffled"]),
        (("eval", "--workdir=never", "--config.train.steps=5"), ["train.steps", "takes no config"]),
        (("report", "--workdir=never"), ["never"]),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, tuple) else None,
)
def test_mistakes_are_told_in_three_lines(refused, command, words, request, monkeypatch):
    def train(*arguments, **options):
        raise AssertionError("this mistake was not seen before training")

    monkeypatch.setattr("efficient_vlm.train.loop.train", train)
    refused(*command, words=words)
    assert not (request.config.rootpath / "never").exists()  # Nothing was begun.


def test_an_empty_workdir_cannot_be_evaluated_or_reported(refused, tmp_path):
    refused("eval", f"--workdir={tmp_path}", words=[str(tmp_path), "train first"])
    refused("report", f"--workdir={tmp_path}", words=[str(tmp_path)])
    (tmp_path / "config.json").write_text("{half")
    refused("eval", f"--workdir={tmp_path}", words=["config.json"])


def test_a_workdir_that_is_a_file(refused, config_file, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused("train", f"--config={config_file}", f"--workdir={tmp_path / 'file'}", words=["file"])
    assert (tmp_path / "file").read_text() == "mine"


# ---- mistakes in the data ------------------------------------------------------------------------


def write_png(path, side=32):
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def bomb():
    """A PNG of 3.6 gigapixels in 69 bytes."""

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 16)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def own_data(tmp_path, tiny_config, rows):
    """Command words that train on a LLaVA-style file with these rows."""
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    tiny_config.data = dict(
        source="llava_json",
        path=str(tmp_path / "mine.json"),
        image_size=32,
        batch_size=2,
        max_length=24,
        vocab_size=300,
        test_fraction=0.0,
        eval_path=str(tmp_path / "mine.json"),
    )
    tiny_config.train.elastic = []
    (tmp_path / "own.py").write_text(f"def get_config():\n    return {tiny_config.to_dict()!r}\n")
    return "train", f"--config={tmp_path / 'own.py'}", f"--workdir={tmp_path / 'run'}"


def row(name):
    asked = {"from": "human", "value": "<image>\ncolour?"}
    return {"image": name, "conversations": [asked, {"from": "gpt", "value": "red"}]}


@pytest.mark.parametrize("fault", ["missing", "corrupt", "huge", "format"])
def test_a_bad_image_stops_the_run_and_is_named(refused, tiny_config, tmp_path, fault):
    for name in ("a.png", "b.png", "bad.png"):
        write_png(tmp_path / name)
    bad = tmp_path / "bad.png"
    if fault == "missing":
        bad.unlink()
    elif fault == "corrupt":
        bad.write_bytes(bad.read_bytes()[:200])
    elif fault == "huge":
        bad.write_bytes(bomb())
    else:
        bad.write_bytes(b"GIMP" * 100)
    command = own_data(tmp_path, tiny_config, [row("a.png"), row("b.png"), row("bad.png")])
    reason = {"huge": "too_large"}.get(fault, fault)
    words = [reason, "data.max_skip_fraction", *(["bad.png"] if fault == "missing" else [])]
    message = refused(*command, words=words)
    assert "1 of" in message and f"{reason} 1" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", ["mine.json", "no rows"]),
        ("", ["mine.json", "no rows"]),
        ("[{]", ["mine.json", "not valid JSON"]),
        (None, ["mine.json", "No such file"]),
        # Two threads meet the only row at once: the second finds it counted already, and says
        # that none is left where the first gives the reason.
        ('[{"conversations": []}]', ["be used"]),
    ],
)
def test_an_empty_or_broken_data_file(refused, tiny_config, tmp_path, text, words):
    command = own_data(tmp_path, tiny_config, [])
    path = tmp_path / "mine.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    refused(*command, words=words)
    # Nothing was trained, so the mended run is not refused as another one.
    assert check_workdir_config(tmp_path / "run", {"mended": True})


# ---- workdirs ------------------------------------------------------------------------------------


@pytest.fixture
def copied(finished_run, tmp_path):
    """(workdir, command that made it): a copy of the finished run."""
    workdir = tmp_path / "copy"
    shutil.copytree(finished_run[0], workdir)
    config = json.loads((workdir / "config.json").read_text())
    (tmp_path / "same.py").write_text(f"def get_config():\n    return {config!r}\n")
    return workdir, ("train", f"--config={tmp_path / 'same.py'}", f"--workdir={workdir}")


def test_a_workdir_of_another_config_names_the_fields(refused, copied):
    workdir, command = copied
    before = (workdir / "results.json").read_bytes()
    message = refused(
        *command,
        "--config.train.seed=1",
        "--config.data.batch_size=4",
        words=["train.seed: 0 in the workdir, 1 now", "data.batch_size: 16 in the workdir, 4 now"],
    )
    assert "--workdir" in message
    assert (workdir / "results.json").read_bytes() == before


def test_a_finished_run_is_said_to_be_finished(call, copied, finished_run):
    workdir, command = copied
    code, out, _ = call(*command)
    assert code == 0 and "already finished at step 150" in out
    results = json.loads((workdir / "results.json").read_text())
    assert results["train"]["params_sha256"] == finished_run[1]["train"]["params_sha256"]
    assert [r["accuracy"] for r in results["eval"]] == [
        r["accuracy"] for r in finished_run[1]["eval"]
    ]
    assert results["command"].startswith("efficient-vlm train --config=")


def damage(checkpoint):
    path = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_said_and_the_older_one_used(call, refused, copied):
    workdir, _ = copied
    damage(workdir / "checkpoints" / "150")
    code, out, err = call("eval", f"--workdir={workdir}", "--images=4")
    assert code == 0, err
    said = next(line for line in (out + err).splitlines() if "is damaged" in line)
    assert "150 is damaged" in said and "falling back to step 100" in said
    assert (workdir / "checkpoints" / "150").is_dir()  # A reader changes nothing.
    for step in (50, 100):
        damage(workdir / "checkpoints" / str(step))
    refused("eval", f"--workdir={workdir}", words=["no usable checkpoint"])


def test_evaluation_of_one_method(call, refused, copied):
    workdir, _ = copied
    run = f"--workdir={workdir}"
    refused("eval", run, "--compressor=averag_pool", "--budget=4", words=["'average_pool'"])
    refused("eval", run, "--compressor=average_pool", "--budget=5", words=["average_pool", "5"])
    refused("eval", run, "--compressor=average_pool", "--budget=64", words=["64"])
    refused("eval", run, "--compressor=resampler", "--budget=4", words=["no trained parameters"])
    refused("eval", run, "--images=-2", words=["-2"])
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    code, out, err = call(
        *("eval", run, "--compressor=stride", "--budget=4,1", "--images=16", "--json")
    )
    assert code == 0, err
    results = json.loads(out)
    assert [(r["compressor"], r["budget"]) for r in results["cost"]] == [
        ("stride", 4),
        ("stride", 1),
    ]
    assert sum(r["n"] for r in results["eval"]) == 2 * 16 * 2
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_the_report_can_be_written_again(call, copied):
    workdir, _ = copied
    (workdir / "report.html").unlink()
    code, out, _ = call("report", f"--workdir={workdir}")
    assert code == 0 and "report.html" in out
    assert (workdir / "report.html").stat().st_size > 10_000


def test_training_through_the_command_line(call, config_file, tmp_path):
    """A whole run; options with and without "=", words and JSON."""
    workdir = tmp_path / "run"
    code, out, err = call(
        *("train", "--config", config_file, "--workdir", workdir, "--config.train.steps", "2"),
        *("--config.eval.images=4", '--config.eval.methods=[{"name": "none", "budgets": [16]}]'),
        "--config.train.elastic=[]",
    )
    assert code == 0, err
    assert [r["step"] for r in read_metrics(workdir)] == [1, 2]
    assert "needle" in out and str(workdir / "report.html") in out
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 2


def test_data_verbs(call, config_file, tmp_path):
    code, out, err = call("data", "build", f"--config={config_file}")
    assert code == 0 and "licence" in out and "192" in out, err
    sheet = tmp_path / "sheet.png"
    code, out, err = call(
        *("data", "inspect", f"--config={config_file}", f"--out={sheet}", "--count=4")
    )
    assert code == 0 and "needle" in out, err
    with Image.open(sheet) as image:
        assert min(image.size) > 64


# ---- starting ------------------------------------------------------------------------------------


def python(*words, timeout=60):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=timeout, check=False
    )


HEAVY = ("jax", "flax", "numpy", "orbax", "grain", "matplotlib", "ml_collections", "rich")


def test_importing_and_helping_load_nothing_heavy():
    """What makes `--help` and `import efficient_vlm` fast, whatever the machine."""
    code = "import sys, efficient_vlm; print([m for m in {} if m in sys.modules])"
    assert python("-c", code.format(HEAVY)).stdout.strip() == "[]"
    # The program itself, then a look at what it has loaded.
    code = (
        "import sys\nfrom efficient_vlm.cli import main as cli\n"
        "sys.argv = ['efficient-vlm', *{!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print([m for m in {} if m in sys.modules])"
    )
    for words in (["--help"], ["--version"], ["audit", "aot", "--help"], ["methods", "--help"]):
        result = python("-c", code.format(words, HEAVY))
        assert result.stdout.strip().endswith("[]"), result.stdout + result.stderr
        assert "efficient-vlm" in result.stdout or "efficient_vlm" in result.stdout
    # The check can fail.
    assert "jax" in python("-c", "import sys, jax; print([m for m in sys.modules])").stdout


def test_a_real_process_has_the_exit_code_and_no_traceback(tmp_path):
    result = python("-m", "efficient_vlm.cli.main", "tarin")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 3
    result = python(
        *("-m", "efficient_vlm.cli.main", "train", f"--config={REPOSITORY_CONFIG}"),
        *(f"--workdir={tmp_path}", "--config.train.stepz=5"),
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 3 and "train.steps" in result.stderr


def test_no_arguments_and_help(call):
    for words in ((), ("--help",)):
        code, out, _ = call(*words)
        assert code == 0 and all(verb in out for verb in cli.VERBS)
    for verb in cli.VERBS:
        code, out, _ = call(verb, "--help")
        assert code == 0 and "usage: efficient-vlm " + verb in out
