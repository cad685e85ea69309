"""What is no checkpoint of ours is called what it is, never taken for a typing mistake."""

import json
import re

import pytest

from efficient_vlm.checkpoints import foreign
from efficient_vlm.checkpoints.safetensors_format import CheckpointError
from efficient_vlm.checkpoints.safetensors_index import locate
from efficient_vlm.checkpoints.safetensors_read import Checkpoint


def said(call, *arguments):
    """The message of the error, which is short and offers no nearest name."""
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3 and "did you mean" not in message
    return message


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("more", [(), ("config.json", "tokenizer.json", "training_args.bin")])
def test_an_adapter_s_directory(suffix, more, tmp_path):
    for name in (f"adapter_model.{suffix}", *more):
        (tmp_path / name).touch()
    # Without, with, and with a damaged adapter_config.json; the directory and the file by its name.
    settings = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"})
    for content, base in ((None, "another model"), (settings, "'some/base'"), ("{", "another m")):
        if content is not None:
            (tmp_path / "adapter_config.json").write_text(content)
        for call in (locate, Checkpoint.open):
            for path in (tmp_path, tmp_path / f"adapter_model.{suffix}"):
                message = said(call, path)
                assert f"a LoRA adapter of {base}" in message
                assert "merge it into its base" in message and "pickle" not in message
    long = {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "x" * 3000}
    (tmp_path / "adapter_config.json").write_text(json.dumps(long))
    message = said(locate, tmp_path)
    assert "a PROMPT_TUNING adapter" in message and "cannot be merged" in message
    assert len(message) < 400
    # The weights of a whole model beside it are a model.
    (tmp_path / "model.safetensors").touch()
    assert locate(tmp_path) == (tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-Q4_K_M.gguf", "mmproj-f16.gguf", "config.json"], "GGUF.*llama.cpp"),
        (["weights.NPZ", "config.json"], "NumPy arrays"),
        (["decoder.onnx"], "ONNX"),
        (["flax_model.msgpack", "config.json"], "Flax"),
        (["config.yaml", "model.pt"], "as Molmo's training code writes them"),
        (["params.json", "tekken.json", "consolidated.safetensors"], "layout of the original code"),
    ],
)
def test_other_formats(names, message, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    found = said(locate, tmp_path)
    assert re.search(message, found)
    assert "safetensors release" in found
    # A model beside them is read.
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).touch()
    assert locate(tmp_path)[0] == tmp_path


@pytest.mark.parametrize(
    ("tensor", "config", "message"),
    [
        ("base_model.model.lm_head.weight", {}, "PEFT.*merge"),
        ("base_model.model.layers.0.q_proj.lora_A.weight", {}, "unmerged adapter.*merge"),
        ("model.layers.0.q_proj.base_layer.weight", {}, "unmerged adapter"),
        ("model.layers.0.q_proj.qweight", {}, "GPTQ or AWQ.*dequantise"),
        ("a.qweight", {"quantization_config": {"quant_method": "awq"}}, "quantised with awq"),
        ("a.weight_scale_inv", {"quantization_config": {"quant_method": "fp8"}}, "with fp8"),
        ("a.weight_packed", {}, "quantised weights with scales"),
        ("a.weight.absmax", {}, "bitsandbytes"),
        ("language_model.model.layers.0.q_proj.scales", {"quantization": {"bits": 4}}, "MLX"),
        ("model.mm_projector.0.weight", {}, "original LLaVA code.*convert"),
        ("model.vision_tower.vision_tower.vision_model.post_layernorm.bias", {}, "original LLaVA"),
        ("mlp1.0.weight", {}, "original layout of InternVL.*-hf"),
        ("module.model.norm.weight", {}, "training wrapper"),
    ],
)
def test_names_of_known_layouts(tensor, config, message, tmp_path):
    found = said(foreign.refuse_tensors, tmp_path, ["odd", tensor], config)
    assert re.search(message, found.replace("\n", " "))


def test_names_of_no_layout(tmp_path):
    foreign.refuse_tensors(tmp_path, ["odd.weight", "model.layers.9.norm.weight"], {})
