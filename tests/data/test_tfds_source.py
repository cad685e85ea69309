"""Labelled picture sets of TensorFlow Datasets, made into questions, without TensorFlow."""

import sys

import layout_samples as samples
import numpy as np
import pytest
from data_samples import image_bytes
from layout_samples import config

from efficient_vlm.data import layouts, make_eval, make_train
from efficient_vlm.data.sources import open_source
from efficient_vlm.errors import UserError

ASK = "What is shown?"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    samples.tiles(folder)
    return folder


def test_classes_become_names(root):
    source = open_source(config(root / "tiles" / "1.0.0", template=ASK), "train")
    assert "tensorflow" not in sys.modules
    names = ("forest", "river", "field")
    assert len(source) == 12
    found = {source[i].images[0]: source[i].conversations[0].turns for i in range(12)}
    assert found == {image_bytes(i): ((ASK, names[i % 3]),) for i in range(12)}
    assert len(open_source(config(root / "tiles" / "1.0.0", template=ASK), "test")) == 6


def test_by_name_with_a_map_of_fields(root, monkeypatch):
    """Other fields as question and answer, and another split for testing."""
    fields = {"image": "image", "answer": "captions/text"}
    made = config("tiles", dir=str(root), columns=fields, template="Caption of a {label}:")
    assert layouts.find("tiles").layout == "tfds"
    record = open_source(made, "train")[0]
    number = int(record.meta["answers"][0].split()[1])
    names = ("forest", "river", "field")
    assert record.conversations[0].turns == (
        (f"Caption of a {names[number % 3]}:", f"tile {number}"),
    )  # fmt: skip
    assert record.images == (image_bytes(number),)
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    again = config("tiles:1.0.0", template=ASK, train_split="train[:50%]", eval_split="train")
    assert [len(open_source(again, split)) for split in ("train", "test")] == [6, 12]
    assert open_source(again, "train").fingerprint["dataset"] == "tfds 1 tiles 1.0.0 train[:50%]"


def test_held_out_classes(root):
    """Training never sees a class; evaluation reports it as a task of its own."""
    made = config(root / "tiles/1.0.0", template=ASK, held_out="river", batch_size=8)
    pipeline, data = make_train(made), make_eval(made)
    answers = [pipeline.source[i].conversations[0].answer for i in range(len(pipeline.source))]
    assert sorted(answers) == ["field"] * 4 + ["forest"] * 4
    assert pipeline.tasks == data.tasks == ("held_out", "seen")
    tasks = np.concatenate([batch["task"][:, 0] for batch in data.batches])[:6]
    said = [answers[0] for answers in data.answers[:6]]
    assert [data.tasks[t] for t in tasks] == [
        "held_out" if answer == "river" else "seen" for answer in said
    ]  # fmt: skip
    assert said.count("river") == 2
    with pytest.raises(UserError, match="did you mean 'river'"):
        open_source(config(root / "tiles/1.0.0", template=ASK, held_out="rivers"), "train")


@pytest.mark.parametrize(
    ("path", "changes", "words"),
    [
        ("tilez", {"template": ASK}, "no prepared data set"),
        ("tiles", {}, "no question"),
        ("tiles", {"template": ASK, "train_split": "trian"}, "train"),
        ("tiles", {"template": ASK, "train_split": "train[:x]"}, "split"),
        ("tiles", {"columns": {"answer": "labels"}, "template": ASK}, "'label'"),
    ],
)
def test_what_is_not_there(path, changes, words, root):
    with pytest.raises(UserError, match=words) as caught:
        open_source(config(path, dir=str(root), **changes), "train")
    assert len(str(caught.value).splitlines()) <= 3


def test_a_format_without_random_access(root, tmp_path):
    import shutil

    shutil.copytree(root / "tiles" / "1.0.0", tmp_path / "1.0.0")
    info = tmp_path / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="array_record") as caught:
        open_source(config(tmp_path / "1.0.0", template=ASK), "train")
    assert len(str(caught.value).splitlines()) <= 3
