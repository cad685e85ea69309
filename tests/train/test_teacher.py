"""Another model as the teacher: what it says reaches the right targets, and is kept."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuned_models import (
    SMOLVLM,
    Stop,
    golden_with_words,
    mixed_rows,
    tuning_config,
    wide_checkpoint,
    write_rows,
)

import efficient_vlm as evlm
from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.data.chat import ChatPipeline
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.record_messages import record_messages
from efficient_vlm.data.sources import open_source
from efficient_vlm.errors import UserError
from efficient_vlm.fields import to_dict
from efficient_vlm.processing.gather import fitted
from efficient_vlm.processing.labels import labelled
from efficient_vlm.processing.request import Example
from efficient_vlm.train import guards, loop, teacher
from efficient_vlm.train.distil import divergence
from efficient_vlm.train.metrics import read_metrics
from efficient_vlm.train.objective import (
    DistilConfig,
    PreferenceConfig,
    check_aims,
    make_objective,
)

# Another template: other headers, and another token that ends a turn.
OTHER = (
    "{% for m in messages %}<|im_start|>{{ m.role }} and\n{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %}{{ ' <|vision_end|>' if m.role == 'assistant' else '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant and\n{% endif %}"
)
BARE = SimpleNamespace(whole=lambda trained, frozen: trained)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints by name: a student, and teachers with its words."""
    root = tmp_path_factory.mktemp("models")
    golden_with_words("qwen2_5_vl", root / "student")
    golden_with_words("molmo_olmoe", root / "molmo")
    wide = wide_checkpoint(root / "wide")
    settings = json.loads((wide / "tokenizer_config.json").read_text())
    (wide / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": OTHER}))
    return {name: root / name for name in ("student", "molmo", "wide")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    path = write_rows(folder / "rows.jsonl", mixed_rows(folder, 6))
    fields = dict(max_images=4, num_threads=0, batch_size=4, pack_tokens=96, max_length=512)
    return DataConfig.from_mapping(dict(source="auto", path=str(path), test_fraction=0.0, **fields))


def moved(params, seed=0):
    """Other weights of the same size."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype), params)


def batches(vlm, config, data, **fields):
    """(model, inputs, objective) of each batch of a student that a teacher teaches."""
    source, model = open_source(data, "train"), vlm.processor.seeing(vlm.model)
    taught = teacher.taught_by(config, model, vlm.processor, "float32", data, source)
    packed = DataConfig.from_mapping({**vars(data), **fields})
    pipeline = ChatPipeline(packed, source, vlm.processor, [model], taught=taught)
    for batch in pipeline.epoch():
        model = fitted(pipeline.model, batch.inputs.pictures, vlm.family.variable)
        yield (
            model,
            jax.tree.map(jnp.asarray, batch.inputs),
            make_objective(model, BARE, config, {}),
        )


def test_the_same_model_in_memory_and_asked_before(data):
    """With all tokens kept it is the divergence from live logits, however rows are packed."""
    vlm = evlm.from_pretrained(SMOLVLM)
    size = vlm.model.decoder.get("head_size") or vlm.model.vocab_size
    params, how = moved(vlm.params), dict(kind="reverse_kl", temperature=2.0)
    config = DistilConfig(teacher=vlm, top_k=size, **how)
    one_each = DataConfig.from_mapping({**vars(data), "pack": False})
    found = 0
    for model, inputs, objective in batches(vlm, config, one_each, pack=True):
        total, metrics = jax.jit(objective)(params, None, inputs, jax.random.key(0))
        plain, logits = inputs.replace(taught=None), jax.jit(model.apply)
        ours, theirs = (logits({"params": p}, plain).logits for p in (params, vlm.params))
        wanted = divergence(ours, theirs, inputs.labels, **how)
        np.testing.assert_allclose(metrics["distillation"], wanted, rtol=1e-5)
        assert metrics["taught"][0] == metrics["taught"][1] == (inputs.labels >= 0).sum()
        np.testing.assert_allclose(total, wanted[0], rtol=1e-5)
        found += int(wanted[1])
    assert found > 20


def alone(vlm, record):
    """[(token, float64 log-probabilities of the next token)] of each turn, by itself."""
    pictured = [vlm.pictures(picture) for picture in record.images]
    messages = record_messages(record.conversations[0], record.images)
    how = (vlm.processor.style, vlm.template, vlm.tokenizer)
    ids, targets = labelled(*how, messages, pictured, end=True)
    request = vlm.batch([Example([ids], pictured, [targets])])
    logits = np.asarray(vlm.logits(request), np.float64)[0]
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    turns, before = [], False
    for place, label in enumerate(request.inputs.labels[0]):
        if label >= 0:
            if not before:
                turns.append([])
            turns[-1].append((int(label), logits[place]))
        before = label >= 0
    return turns


def by_hand(student, other, record, k):
    """(sum of forward divergences, targets with a teacher) of one row."""
    words = [vlm.tokenizer.vocabulary for vlm in (student, other)]
    try:
        pairs = zip(alone(student, record), alone(other, record), strict=True)
    except UserError:  # Molmo reads one turn.
        return 0.0, 0
    total = count = 0
    for ours, theirs in pairs:
        for (a, q), (b, p) in zip(ours, theirs, strict=False):
            if a != b or words[0][a] != words[1][b]:
                break
            shared = [i for i in range(min(len(p), len(q))) if words[0].get(i) == words[1].get(i)]
            most = sorted(shared, key=lambda i: -p[i])[:k]
            left = [np.log(1 - np.exp(x[most]).sum()) for x in (p, q)]
            p, q = np.append(p[most], left[0]), np.append(q[most], left[1])
            total, count = total + (np.exp(p) * (p - q)).sum(), count + 1
    return total, count


@pytest.mark.parametrize("name", [pytest.param("wide", marks=pytest.mark.slow), "molmo"])
def test_another_family_is_asked_row_by_row(folders, data, name):
    """Against a loop over rows that are not packed, up to where turns differ."""
    student, other = (evlm.from_pretrained(folders[each]) for each in ("student", name))
    config = DistilConfig(kind="forward_kl", top_k=5, teacher=str(folders[name]))
    pairs = []
    for _, inputs, objective in batches(student, config, data):
        given = (student.params, None, inputs, jax.random.key(0))
        pairs.append(jax.jit(objective)(*given)[1])
    source = open_source(data, "train")
    wanted = np.array([by_hand(student, other, source[i], 5) for i in range(len(source))])
    assert (wanted[:, 1] > 0).sum() == (6 if name == "wide" else 4)
    total, count = np.sum([m["distillation"] for m in pairs], axis=0)
    np.testing.assert_allclose((total, count), wanted.sum(axis=0), rtol=1e-4)
    targets = sum(m["taught"][1] for m in pairs)
    assert 0 < count < targets  # Turns end in their own ways.


def train(config, workdir, after=None, say=lambda line: None):
    workdir.mkdir(exist_ok=True)
    guards.check_workdir_config(workdir, to_dict(config), ignore=())
    return loop.train(config, workdir, stop=Stop(after), say=say)


@pytest.mark.slow
def test_a_run_goes_on_without_its_teacher(folders, data, tmp_path, monkeypatch):
    """All parameters are trained, the divergence falls; what was said is read from the files."""
    other = tmp_path / "other"
    shutil.copytree(folders["wide"], other)
    config = tuning_config(folders["student"], data.path, adapt=dict(name="full"))
    config.distil = dict(kind="forward_kl", top_k=8, teacher=str(other))
    config.train.optimizer.learning_rate = 3e-2
    whole = train(config, tmp_path / "whole")
    losses = [row["distillation"] for row in read_metrics(tmp_path / "whole")]
    assert losses[-1] < 0.7 * losses[0] and all(0 < row < 10 for row in losses)
    with pytest.raises(loop.Stopped):
        train(config, tmp_path / "run", after=3)
    monkeypatch.setattr(teacher, "_found", None)
    said = []
    again = train(config, tmp_path / "run", say=said.append)
    assert any("8 most likely tokens of" in line for line in said)
    for name in ("params_sha256", "state_sha256"):
        assert again.summary[name] == whole.summary[name]
    targets = tmp_path / "run" / "teacher" / "targets.bin"
    content = targets.read_bytes()
    targets.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"targets.bin: damaged"):
        train(config, tmp_path / "run")
    targets.write_bytes(content)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match="with another teacher") as error:
        train(config, tmp_path / "run")
    assert len(str(error.value).splitlines()) <= 3


def test_in_a_notebook(folders, data):
    """A loaded model as the teacher, adapters, a compressor: the divergence falls."""
    student, other = (evlm.from_pretrained(folders[each]) for each in ("student", "molmo"))
    picture = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    turns = ("what is this ?", "it is number 3 .")
    messages = [
        dict(role=role, content=text)
        for role, text in zip(("user", "assistant"), turns, strict=True)
    ]
    messages[0]["content"] = f"<image>{turns[0]}"
    steps = []
    student.finetune(
        [dict(images=[picture], messages=messages)],
        steps=6,
        learning_rate=3e-2,
        adapt=dict(name="lora", rank=4),
        distil=dict(kind="forward_kl", teacher=other),
        compressor=dict(name="divprune", budget=2),
        data=dict(pack_tokens=32),
        log=lambda number, values: steps.append(values),
    )
    assert steps[-1]["distillation"] < 0.8 * steps[0]["distillation"]
    assert all(0.5 < step["taught"] < 1 for step in steps)


def test_teachers_that_cannot_be_asked(folders, data):
    student = evlm.from_pretrained(folders["student"])
    config = DistilConfig(kind="forward_kl", top_k=9999, teacher=str(folders["wide"]))
    with pytest.raises(UserError, match=r"top_k: 9,999\n.*share\n"):
        next(batches(student, config, data))
    with pytest.raises(UserError, match=r"distil.teacher: .* with distil.kind=None"):
        DistilConfig(teacher="x")
    trained = dict(name="visionselector", budget=2)
    config = DistilConfig(kind="forward_kl", teacher=str(SMOLVLM), compressor=trained)
    with pytest.raises(UserError, match=r"distil.teacher: visionselector has weights of its own"):
        teacher.open_teacher(config, "float32")
    with pytest.raises(UserError, match=r"distil.teacher: 3\n"):
        teacher.open_teacher(DistilConfig(kind="forward_kl", teacher=3), "float32")


def test_what_may_be_trained():
    """Everything, unless the model itself is the teacher."""
    adapting = AdaptConfig(name="full")
    check_aims(DistilConfig(kind="forward_kl", teacher="x"), PreferenceConfig(), adapting)
    with pytest.raises(UserError, match="or another distil.teacher"):
        check_aims(DistilConfig(kind="forward_kl"), PreferenceConfig(), adapting)
