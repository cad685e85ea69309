"""config.json as released, with what transformers leaves out; and as nobody should release it."""

import json
import math

import pytest

from efficient_vlm.cli import main as cli
from efficient_vlm.errors import UserError
from efficient_vlm.families import architecture, defaults

CLIP = dict(
    hidden_size=1024,
    image_size=336,
    intermediate_size=4096,
    model_type="clip_vision_model",
    num_attention_heads=16,
    num_hidden_layers=24,
    patch_size=14,
    projection_dim=768,
    vocab_size=32000,
)
SMOLLM = dict(
    head_dim=64,
    hidden_size=576,
    intermediate_size=1536,
    model_type="llama",
    num_attention_heads=9,
    num_hidden_layers=30,
    num_key_value_heads=3,
    rms_norm_eps=1e-5,
    rope_theta=100000,
    vocab_size=49280,
)
GEMMA = dict(
    hidden_size=2048,
    intermediate_size=16384,
    model_type="gemma",
    num_attention_heads=8,
    num_hidden_layers=18,
    num_key_value_heads=1,
    vocab_size=257216,
)
SO400M = dict(
    hidden_size=1152,
    intermediate_size=4304,
    model_type="siglip_vision_model",
    num_attention_heads=16,
    num_hidden_layers=27,
    patch_size=14,
)
# As the files of the hub have it: sizes that are the default of a class are not written.
SHORT = {
    "llava-1.5-7b": (
        dict(
            model_type="llava",
            image_token_index=32000,
            text_config=dict(model_type="llama", rms_norm_eps=1e-5, vocab_size=32064),
            vision_config=CLIP,
        ),
        7_063_427_072,
    ),
    "smolvlm-256m": (
        dict(
            model_type="idefics3",
            scale_factor=4,
            image_token_id=49190,
            tie_word_embeddings=False,
            text_config=SMOLLM,
            vision_config=dict(
                hidden_size=768,
                image_size=512,
                model_type="idefics3",
                num_attention_heads=12,
                patch_size=16,
            ),
        ),
        256_484_928,
    ),
    "paligemma-3b-224": (
        dict(model_type="paligemma", text_config=GEMMA, vision_config=SO400M),
        2_923_466_480,
    ),
}


def parameters(config):
    shapes = architecture.parameter_shapes(architecture.build_model(config))
    return sum(math.prod(leaf.shape) for leaf in shapes.values())


@pytest.mark.parametrize("name", SHORT)
def test_short_files_are_the_published_models(name):
    """LLaVA's last encoder layer is loaded and not used; what a file holds is counted whole."""
    config, count = SHORT[name]
    unused = 2048 if name.startswith("llava") else 0  # CLIP's last norm, which no pass reads.
    assert parameters(config) == count - unused


def test_what_a_file_says_stays():
    config = SHORT["smolvlm-256m"][0]
    full = defaults.complete(config)
    assert full["text_config"] == {**full["text_config"], **config["text_config"]}
    assert full["vision_config"]["num_hidden_layers"] == 12
    assert defaults.complete(full) == full


LLAMA = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
        (dict(num_hidden_layers=0), "num_hidden_layers=0"),
        (dict(hidden_size="a"), "hidden_size='a'"),
        (dict(hidden_size=None), "hidden_size=None"),
        (dict(hidden_size=True), "hidden_size=True"),
        (dict(vocab_size=10**15), "vocab_size"),
        (dict(rms_norm_eps="1e-5"), "rms_norm_eps"),
        (dict(rope_scaling="linear"), "rope_scaling"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor: missing"),
        (dict(rope_scaling={"rope_type": "none"}), "rope_type"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(model_type=["llama"]), "model_type"),
        (dict(model_type="lama"), "llama"),
        (dict(num_attention_heads=4, num_key_value_heads=3), "num_kv_heads"),
        (dict(head_dim=10**9), "head_dim"),
        (dict(model_type="llava", vision_config={"model_type": []}), "vision_config.model_type"),
        (dict(model_type="llava"), "vision_config"),
        (dict(text_config=[1], vision_config={}, model_type="llava"), "text_config"),
        (dict(vision_config="x", model_type="llava"), "vision_config"),
    ],
)
def test_hostile_and_odd_configs(changes, message, tmp_path, capsys, monkeypatch):
    """Typed, in three lines, in an instant: also on the command line."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["efficient-vlm", "import", str(tmp_path), str(tmp_path) + "o"])
    assert cli.main() == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("\n") <= 3
    with pytest.raises(UserError, match=message):
        architecture.build_model(architecture.read_config(tmp_path))
