"""Heads: in the file or not, with every spelling of `tie_word_embeddings`, in nine families."""

import itertools
import json
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import efficient_vlm as evlm
from efficient_vlm.checkpoints import safetensors_write
from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.errors import UserError
from efficient_vlm.families import heads
from efficient_vlm.families.imported import import_model
from efficient_vlm.models.inputs import ModelInputs

GOLDEN = Path(__file__).parents[1] / "golden"
FLAG = "tie_word_embeddings"
# Defaults of transformers 5.24's classes, at the top and in text_config (None: there is none).
DEFAULTS = {
    "gemma3": (True, True),
    "internvl": (True, False),
    "llava": (False, False),
    "mobilevlm": (False, False),
    "paligemma": (True, True),
    "qwen2_vl": (False, False),
    "qwen2_5_vl": (False, False),
    "qwen3_vl": (False, False),
    "smolvlm": (False, False),
}


def write(folder, arrays):
    tensors = [(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()]
    safetensors_write.write(folder, tensors)
    return folder


def flagged(name, top, text):
    """The golden config.json with these flags; None for absent."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    for place, value in ((config, top), (config["text_config"], text)):
        place.pop(FLAG, None)
        place.update({} if value is None else {FLAG: value})
    return config


def names_of(name):
    """Names of the table and of the head in the golden file."""
    names = Checkpoint.open(GOLDEN / name).names
    table = next(n for n in names if n.endswith("embed_tokens.weight"))
    own = "language_model.lm_head.weight" if table.startswith("language_model.") else ""
    return table, own or "lm_head.weight"


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_lies_in_the_file_decides(name, tmp_path):
    """All flags, with no head, a head that repeats the table and another one."""
    (table, head), value = names_of(name), np.arange(8, dtype=np.float32).reshape(4, 2)
    files = {
        "none": write(tmp_path / "none", {table: value}),
        "same": write(tmp_path / "same", {table: value, head: value}),
        "other": write(tmp_path / "other", {table: value, head: value + 1}),
    }
    for top, text in itertools.product((True, False, None), repeat=2):
        flags = [flag for flag in (top, text) if flag is not None]
        values = [d if flag is None else flag for flag, d in zip((top, text), DEFAULTS[name])]
        for kind, folder in files.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                config = heads.with_head(flagged(name, top, text), folder)
            found, inner = config.get(FLAG), config["text_config"].get(FLAG)
            case = (name, top, text, kind)
            if kind == "none" and not any(values):
                # Nothing ties it: the config stays, and `load` says that the head is missing.
                assert (found, inner) == (top, text), case
                assert not caught, case
                continue
            expected = any(values) and kind != "other"
            assert found is inner is expected, case
            assert len(caught) == any(flag is not expected for flag in flags), case


def model_of(name, tmp_path, top, text, change):
    """The golden model with these flags and other tensors."""
    folder = tmp_path / f"{name}_{top}_{text}"
    source = Checkpoint.open(GOLDEN / name)
    arrays = {each: np.array(source.read(each)) for each in source.names}
    change(arrays)
    write(folder, arrays)
    (folder / "config.json").write_text(json.dumps(flagged(name, top, text)))
    return folder


def logits(vlm):
    inputs = ModelInputs.of_rows(np.array([[1, 5, 9, 3, 7]], np.int32), np.array([5], np.int32))
    return np.asarray(vlm.model.apply({"params": vlm.params}, inputs).logits)


def same_model(one, other):
    assert one.model == other.model
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_heads_of_both_writers(name, tmp_path):
    """A tied model in four files, and one of its own head, which doubles the logits."""
    table, head = names_of(name)

    def plain(arrays):
        arrays.pop(head, None)

    def only_head(arrays):
        arrays[head] = arrays.pop(table)

    def own(arrays):
        arrays[head] = 2 * arrays[table]

    def both(arrays):
        arrays[head] = arrays[table]

    tied = evlm.from_pretrained(model_of(name, tmp_path, True, True, plain))
    with pytest.warns(
        UserWarning, match="text_config.tie_word_embeddings true, the file has no head"
    ):
        again = evlm.from_pretrained(model_of(name, tmp_path, False, True, plain))
    same_model(again, tied)
    for text, change in ((True, only_head), (None, both)):
        folder = model_of(name, tmp_path / change.__name__, True, text, change)
        same_model(evlm.from_pretrained(folder), tied)
    with pytest.warns(UserWarning, match="has a head of its own: that one is used"):
        doubled = evlm.from_pretrained(model_of(name, tmp_path, True, False, own))
    np.testing.assert_allclose(logits(doubled), 2 * logits(tied), rtol=1e-5, atol=1e-6)
    # Written with flags that say so, and read again: the same head.
    doubled.save(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_model(evlm.from_pretrained(tmp_path / "out"), doubled)


def test_an_imported_head(tmp_path):
    """The flags of its config.json are those of the published file, which was overruled."""
    folder = model_of("llava", tmp_path, True, True, lambda arrays: None)
    with pytest.warns(UserWarning, match="has a head of its own"):
        import_model(folder, tmp_path / "imported")
    with pytest.warns(UserWarning, match="has a head of its own"):
        imported = evlm.from_pretrained(tmp_path / "imported")
    same_model(imported, evlm.from_pretrained(GOLDEN / "llava"))


def test_a_head_that_nothing_ties(tmp_path):
    """The advice names the flag, and following it loads the model."""
    _, head = names_of("llava")
    folder = model_of("llava", tmp_path, False, False, lambda arrays: arrays.pop(head))
    with pytest.raises(UserError, match="no language_model.lm_head.weight") as caught:
        evlm.from_pretrained(folder)
    assert "set tie_word_embeddings to true" in str(caught.value)
    (folder / "config.json").write_text(json.dumps(flagged("llava", True, True)))
    assert evlm.from_pretrained(folder).model.decoder["tie_embeddings"] is True


@pytest.mark.parametrize("name", ["gemma", "gpt_neo", "llama", "phi"])
def test_language_models(name, tmp_path):
    """A head of its own beside a flag or default that ties it is used; Phi's has a bias."""
    source = Checkpoint.open(GOLDEN / name)
    arrays = {each: np.array(source.read(each)) for each in source.names}
    table = next(n for n in arrays if n.endswith(("embed_tokens.weight", "wte.weight")))
    arrays["lm_head.weight"] = arrays[table] + 1
    config = json.loads((GOLDEN / name / "config.json").read_text())
    write(tmp_path, arrays)
    for flag in (True, None):
        config.pop(FLAG, None)
        config |= {} if flag is None else {FLAG: flag}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vlm = evlm.from_pretrained(tmp_path)
        assert len(caught) == (flag is True)
        assert not vlm.config.get(FLAG) and not vlm.model.decoder.get("tie_embeddings")


LAYOUTS = [
    ("llava_llama", {}, "original LLaVA code.*convert_llava_weights_to_hf"),
    ("llava_mistral", {}, "original LLaVA code"),
    ("llava_qwen", {}, "original LLaVA code"),
    ("llava", {"mm_vision_tower": "openai/clip", "vision_config": None}, "original LLaVA code"),
    ("tinyllava", {}, "TinyLLaVA.*-hf"),
    ("internvl_chat", {}, "original InternVL code.*-hf"),
    ("llava_next", {}, "not known here"),
    ("mllama", {}, "not known here"),
    ("x" * 3000, {}, "not known here"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), LAYOUTS)
def test_other_layouts_and_architectures(kind, changes, message, tmp_path):
    """What a program wrote is no typing mistake: nothing is guessed from the spelling."""
    config = {**flagged("llava", None, None), "model_type": kind, **changes}
    config = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "llava" / "model.safetensors", tmp_path)
    with pytest.raises(UserError, match=f"(?s){message}") as caught:
        evlm.from_pretrained(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 3 and "did you mean" not in str(caught.value)
    assert len(lines[0]) < 160


def test_a_model_beside_an_adapter(tmp_path):
    """The model is read with a note; what is written of it is no adapter's directory."""
    folder = tmp_path / "both"
    shutil.copytree(GOLDEN / "llama", folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.warns(UserWarning, match="holds a LoRA adapter, which is not applied"):
        vlm = evlm.from_pretrained(folder)
    vlm.save(tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="a LoRA adapter of another model"):
        evlm.from_pretrained(folder)


def test_weights_by_their_name(tmp_path):
    """One file of several, whatever it is called; config.json itself is no model."""
    for name in ("model.safetensors", "config.json"):
        shutil.copy(GOLDEN / "llama" / name, tmp_path / name.replace("model", "best"))
    with pytest.raises(UserError, match="name the file you mean") as caught:
        evlm.from_pretrained(tmp_path)
    file = str(caught.value).rpartition("mean: ")[2]
    vlm = evlm.from_pretrained(file)
    assert vlm.directory == tmp_path
    import_model(file, tmp_path.parent / "imported_by_name")
    imported = evlm.from_pretrained(tmp_path.parent / "imported_by_name").params
    jax.tree.map(np.testing.assert_array_equal, vlm.params, imported)
    with pytest.raises(UserError, match="not a checkpoint") as caught:
        evlm.from_pretrained(tmp_path / "config.json")
    assert f"give its directory, {tmp_path}" in str(caught.value)
