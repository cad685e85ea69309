"""Hostile files and text: typed errors or counted skips, quickly, and never more than was asked."""

import ast
import json
import math
import time
import tracemalloc
import warnings
from pathlib import Path

import hostile_files
import ml_collections
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from efficient_vlm.cli import config_file as configs
from efficient_vlm.cli import main as cli
from efficient_vlm.data import DataConfig, llava_json, make_train
from efficient_vlm.data.records import Record
from efficient_vlm.errors import UserError
from efficient_vlm.processing import decode_image as images
from efficient_vlm.processing.decode_image import BadRecord
from efficient_vlm.train.workdir_config import read_run_config

ROOT = Path(__file__).parents[1]
IMAGES, RECORDS = hostile_files.images(), hostile_files.records()
LANDED = Path("/tmp/hostile_was_here")


@pytest.fixture(autouse=True)
def quick_and_contained():
    """Two seconds, and nothing outside of the test's folder."""
    assert not LANDED.exists()
    start = time.monotonic()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # Pillow's, of bombs.
        # So that what is too large here is small anywhere else.
        patch.setattr(Image, "MAX_IMAGE_PIXELS", hostile_files.MOST_PIXELS)
        yield
    assert time.monotonic() - start < 60  # The whole corpus; one file is timed in the test.
    assert not LANDED.exists()


def check(error):
    """What a person is told is short and has a reason."""
    assert len(str(error).splitlines()) <= 3
    assert isinstance(error, UserError) or error.reason


def config(path, **changes):
    fields = {"batch_size": 2, "image_size": 16, "max_length": 64, "vocab_size": 300}
    fields |= {"test_fraction": 0.0, "num_threads": 0, "max_images": 2, "max_skip_fraction": 1.0}
    return DataConfig(source="llava_json", path=str(path), **(fields | changes))


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    data, reason = IMAGES[name]
    start = time.monotonic()
    tracemalloc.start()
    try:
        if reason is None:
            assert images.decode(data).shape == (8, 8, 3)
        else:
            with pytest.raises(BadRecord) as caught:
                images.decode(data)
            assert caught.value.reason == reason
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("name", [n for n, (_, reason) in IMAGES.items() if reason])
def test_images_on_the_command_line(name, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(IMAGES[name][0])
    with pytest.raises(UserError) as error:
        cli.run(["compress", str(path), "--compressor=stride", f"--out={tmp_path / 'map.png'}"])
    assert len(str(error.value).splitlines()) <= 3
    assert not (tmp_path / "map.png").exists()


def test_all_of_them_in_one_data_set(tmp_path):
    """Every bad one is counted by its reason, every good one is used, and training goes on."""
    good = [name for name, (_, reason) in RECORDS.items() if reason is None]
    rows, expected = [], {}
    for name, (data, reason) in IMAGES.items():
        (tmp_path / name).write_bytes(data)
        rows.append({**hostile_files._turns("what?"), "image": name})
        if reason is not None:
            expected[reason] = expected.get(reason, 0) + 1
    for row, reason in RECORDS.values():
        rows.append(row)
        if reason is not None:
            expected[reason] = expected.get(reason, 0) + 1
    (tmp_path / "good.png").write_bytes(IMAGES["picture_and_zip.png"][0])
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    pipeline = make_train(config(path, max_length=200))
    iterator, used = iter(pipeline), set()
    for _ in range(math.ceil(len(rows) / 2)):
        used |= set(next(iterator)["index"].tolist())
    assert pipeline.skipped == expected
    assert len(used) == len(good) + sum(reason is None for _, reason in IMAGES.values())


def test_text_makes_no_token_that_is_not_text(tmp_path):
    """Markers, templates and names of special tokens in what a user wrote stay letters."""
    path = tmp_path / "rows.json"
    names = ("only markers", "template", "special tokens")
    path.write_text(json.dumps([RECORDS[name][0] for name in names]))
    pipeline = make_train(config(path, batch_size=3, max_length=200))
    batch, tokenizer = next(iter(pipeline)), pipeline.tokenizer
    special = {tokenizer.pad_id, tokenizer.eos_id}
    for tokens, prompt in zip(batch["tokens"][:, 0], batch["prompt_lengths"][:, 0], strict=True):
        inside = set(tokens[1 : prompt - 1].tolist())
        assert not inside & special
    texts = [tokenizer.decode(tokens[:190]) for tokens in batch["tokens"][:, 0]]
    assert any("{{ ''.__class__.__mro__ }}" in text for text in texts)
    assert any("<image><image>" in text for text in texts)  # In an answer it is text.


@pytest.mark.parametrize("name", hostile_files.data_files())
def test_data_files(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(hostile_files.data_files()[name])
    start = time.monotonic()
    for wrong in (
        lambda: make_train(config(path)),
        lambda: make_train(config(ROOT / "none.json", tokenizer=str(path))),
        lambda: cli.run(["train", f"--config={path}", f"--workdir={tmp_path / 'run'}"]),
        lambda: cli.run(["import", str(path), str(tmp_path / "out")]),
        lambda: cli.run(["generate", str(path), "what?"]),
    ):
        with pytest.raises(UserError) as error:
            wrong()
        assert len(str(error.value).splitlines()) <= 3
    assert time.monotonic() - start < 5
    run = tmp_path / "workdir"
    run.mkdir()
    (run / "config.json").write_bytes(path.read_bytes())
    with pytest.raises(UserError):
        read_run_config(run)


# --- made up -------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["id", "image", "conversations", "from", "value"])
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
TURN = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "robot"]) | SCALARS, "value": SCALARS}
)
ROW = JSON | st.fixed_dictionaries({"conversations": st.lists(TURN, max_size=5), "image": JSON})
MANY = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(max_examples=300, **MANY)
@given(rows=st.lists(ROW, min_size=1, max_size=4))
def test_any_json_is_a_record_or_a_reason(rows, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    try:
        source = llava_json.LlavaSource(path)
    except UserError as error:
        check(error)
        return
    for index in range(len(source)):
        try:
            assert isinstance(source[index], Record)
        except BadRecord as error:
            check(error)


@settings(max_examples=300, **MANY)
@given(data=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_data_or_an_error(data, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    try:
        llava_json.LlavaSource(path)
    except UserError as error:
        check(error)


FIELDS = st.sampled_from(
    [
        *("train.steps", "train.mesh.fsdp", "train.optimizer.name", "model.encoder.width"),
        *("model.compressor.name", "model.decoder.moe.top_k", "data.batch_size", "data.tasks"),
        *("eval.methods", "train.elastic", "model", "train.", ".steps", "a.b.c", ""),
    ]
) | st.text(max_size=12)
VALUES = st.text(max_size=20) | JSON.map(lambda value: json.dumps(value))


@settings(max_examples=400, **MANY)
@given(changes=st.lists(st.tuples(FIELDS, VALUES), max_size=3))
def test_any_override_is_taken_or_named(changes):
    """Whatever is typed, the answer is a config or an error of three lines that names the field."""
    from efficient_vlm.train.config import read_config

    config = configs.load(str(ROOT / "configs" / "quickstart.py") + ":smoke", [])
    try:
        for field, value in changes:
            configs.apply_override(config, f"{field}={value}")
        with config.unlocked():
            config.model.vocab_size = 30
        read_config(config)
    except UserError as error:
        check(error)


@settings(max_examples=200, **MANY)
@given(value=JSON)
def test_any_config_file_is_a_config_or_an_error(value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(value))
    try:
        found = read_run_config(tmp_path)
    except UserError as error:
        check(error)
    else:
        assert isinstance(found, ml_collections.ConfigDict)


# --- what is never called ------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def test_no_code_runs_what_it_reads():
    """No pickle, eval, exec, trust_remote_code or shell=True, and arrays never unpickled."""
    found = []
    folders = ("efficient_vlm", "configs", "experiments", "benchmarks", "docs", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [(node.module or "").split(".")[0]]
            found += [f"{where} imports {n}" for n in names if n in FORBIDDEN_MODULES]
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else None
            if name in FORBIDDEN_CALLS:
                found.append(f"{where} calls {name}")
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("system", "popen"):
                found.append(f"{where} calls {node.func.attr}")
            for keyword in node.keywords:
                told = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and not told:
                    found.append(f"{where} passes {keyword.arg}")
    assert found == []
