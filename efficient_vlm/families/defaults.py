"""Defaults that released config.json files omit, and limits that no model exceeds.

transformers writes only those values of a nested config that differ from the defaults of its class:
LLaVA-1.5's "text_config" has no sizes at all. These are those defaults, the same in transformers 4
and 5.
"""

from typing import Any

from efficient_vlm.errors import UserError
from efficient_vlm.families.base import Config


def _sizes(width: int, mlp: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


_GEMMA = dict(head_dim=256, rms_norm_eps=1e-6, tie_word_embeddings=True)
_GEMMA2 = dict(
    _GEMMA,
    num_key_value_heads=4,
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=256,
    sliding_window=4096,
)
_QWEN = dict(vocab_size=151_936, num_key_value_heads=32, max_position_embeddings=32_768)
_QWEN_VL = _sizes(
    8192,
    29_568,
    80,
    64,
    vocab_size=152_064,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    max_window_layers=80,
    rope_theta=1e6,
)
_MISTRAL = dict(vocab_size=32_000, num_key_value_heads=8, max_position_embeddings=131_072)

TEXTS: dict[str, Config] = {
    "llama": _sizes(4096, 11_008, 32, 32, vocab_size=32_000, max_position_embeddings=2048),
    "mistral": _sizes(4096, 14_336, 32, 32, **_MISTRAL, sliding_window=4096),
    "qwen2": _sizes(4096, 22_016, 32, 32, **_QWEN, max_window_layers=28),
    "qwen3": _sizes(4096, 22_016, 32, 32, **_QWEN, head_dim=128),
    "gemma": _sizes(3072, 24_576, 28, 16, **_GEMMA, vocab_size=256_000, num_key_value_heads=16),
    "gemma2": _sizes(
        2304,
        9216,
        26,
        8,
        **_GEMMA2,
        vocab_size=256_000,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3_text": _sizes(2304, 9216, 26, 8, **_GEMMA2, vocab_size=262_208),
    "gpt_neo": dict(
        hidden_size=2048,
        num_layers=24,
        num_heads=16,
        attention_types=((("global", "local"), 12),),
        vocab_size=50_257,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "phi": _sizes(2048, 8192, 24, 32, vocab_size=51_200, max_position_embeddings=2048),
    "phi3": _sizes(
        3072, 8192, 32, 32, vocab_size=32_064, rms_norm_eps=1e-5, max_position_embeddings=4096
    ),
    "mixtral": _sizes(
        4096,
        14_336,
        32,
        32,
        **_MISTRAL,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        num_experts_per_tok=2,
        num_experts=8,
    ),
    "olmo2": _sizes(4096, 11_008, 32, 32, vocab_size=50_304, rms_norm_eps=1e-5),
    "olmoe": _sizes(
        2048,
        2048,
        16,
        16,
        vocab_size=50_304,
        rms_norm_eps=1e-5,
        num_experts_per_tok=8,
        num_experts=64,
    ),
    "qwen3_moe": _sizes(
        2048,
        6144,
        24,
        32,
        **{**_QWEN, "num_key_value_heads": 4},
        moe_intermediate_size=768,
        num_experts_per_tok=8,
        num_experts=128,
    ),
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": _sizes(
        4096,
        22_016,
        32,
        32,
        **{**_QWEN, "max_position_embeddings": 128_000},
        head_dim=128,
        rope_theta=5e5,
    ),
}

_IDEFICS = _sizes(1152, 3072, 12, 16, image_size=224, patch_size=32)
VISIONS: dict[str, Config] = {
    "clip_vision_model": _sizes(768, 3072, 12, 12, image_size=224, patch_size=32),
    "siglip_vision_model": _sizes(768, 3072, 12, 12, image_size=224, patch_size=16),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": _sizes(1024, 4096, 24, 16, image_size=448, patch_size=14),
    "qwen2_vl": dict(depth=32, embed_dim=1280, num_heads=16),
    "qwen2_5_vl": dict(
        depth=32,
        hidden_size=3584,
        intermediate_size=3420,
        num_heads=16,
        window_size=112,
        fullatt_block_indexes=(7, 15, 23, 31),
    ),
    "qwen3_vl": dict(
        depth=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        patch_size=16,
        num_position_embeddings=2304,
        deepstack_visual_indexes=(8, 16, 24),
    ),
}

# Models with pictures: kind of decoder, kind of encoder (None: named by its config), and values.
MODELS: dict[str, tuple[str, str | None, Config]] = {
    "llava": ("llama", None, dict(image_token_index=32_000)),
    "paligemma": (
        "gemma",
        "siglip_vision_model",
        dict(image_token_index=256_000, tie_word_embeddings=True),
    ),
    "gemma3": (
        "gemma3_text",
        "siglip_vision_model",
        dict(image_token_index=262_144, tie_word_embeddings=True),
    ),
    "idefics3": ("llama", "idefics3", dict(image_token_id=128_257, scale_factor=2)),
    "smolvlm": ("llama", "smolvlm", dict(image_token_id=128_257, scale_factor=2)),
    "internvl": (
        "qwen2",
        "internvl",
        dict(image_token_id=151_667, tie_word_embeddings=True),
    ),
    "qwen2_vl": ("qwen2_vl", "qwen2_vl", dict(image_token_id=151_655)),
    "qwen2_5_vl": ("qwen2_5_vl", "qwen2_5_vl", dict(image_token_id=151_655)),
    "qwen3_vl": ("qwen3_vl", "qwen3_vl", dict(image_token_id=151_655)),
}

# Upper limits of sizes, at least ten times the largest of released models.
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "depth"), 2000),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "num_key_value_heads"), 2000),
    **dict.fromkeys(("num_experts", "num_local_experts", "head_dim"), 10_000),
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim"), 200_000),
    "intermediate_size": 1_000_000,
    "vocab_size": 10_000_000,
    "image_size": 20_000,
    "patch_size": 1000,
}
_NUMBERS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta")


def complete(config: Config) -> dict[str, Any]:
    """A config with the defaults of its class and its parts added; its own values win.

    Raises:
      UserError: a size that is not a positive number, or larger than that of any model.
    """
    kind = config.get("model_type")
    _check(config, "")
    if kind in TEXTS and kind not in MODELS:
        return _with_text_defaults(kind, config)
    if kind not in MODELS:
        return dict(config)
    text_kind, vision_kind, values = MODELS[kind]
    if "vision_config" not in config:
        raise UserError(
            "config.json: no 'vision_config'", fix="use the file that came with the weights"
        )
    vision = config["vision_config"]
    _check(vision, "vision_config.")
    vision_kind = vision_kind or vision.get("model_type", "clip_vision_model")
    named = {"image_token_id", "image_token_index"} & set(config)
    values = {name: value for name, value in values.items() if not (named and "token" in name)}
    full = {**values, **config, "vision_config": {**VISIONS.get(vision_kind, {}), **vision}}
    if "text_config" not in config and "hidden_size" in config:  # Qwen2-VL of transformers 4.
        return _with_text_defaults(text_kind, full)
    text = config.get("text_config") or {}
    _check(text, "text_config.")
    text_kind = text_kind if text_kind in MODELS else text.get("model_type", text_kind)
    named = {} if text_kind in MODELS else {"model_type": text_kind}
    return {**full, "text_config": {**named, **_with_text_defaults(text_kind, text)}}


def _with_text_defaults(kind: str, text: Config) -> dict[str, Any]:
    known = dict(TEXTS.get(kind, {}))
    if "num_local_experts" in text:  # Another name of the same number.
        known.pop("num_experts", None)
    return {**known, **text}


def _check(config: Any, prefix: str) -> None:
    if not isinstance(config, dict):
        raise UserError(f"config.json: {prefix.rstrip('.')} is {config!r:.60}", allowed="an object")
    if not isinstance(config.get("model_type"), str | None):
        kind = config["model_type"]
        raise UserError(f"config.json: {prefix}model_type={kind!r:.60}", allowed="a name")
    for name, value in config.items():
        sizes = value if isinstance(value, list | tuple) else [value]
        if (most := _MOST.get(name)) is not None:
            if value is None and name in ("intermediate_size", "num_key_value_heads", "head_dim"):
                continue  # Derived from other sizes.
            if not all(type(n) is int and 0 < n <= most for n in sizes):
                raise UserError(
                    f"config.json: {prefix}{name}={value!r:.60}",
                    allowed=f"whole numbers from 1 to {most:,}",
                    fix="use the config.json that came with the weights",
                )
        elif name in _NUMBERS and (type(value) not in (int, float) or not 0 < value < 1e12):
            raise UserError(
                f"config.json: {prefix}{name}={value!r:.60}", allowed="a positive number"
            )
        elif name in ("rope_scaling", "rope_parameters") and not isinstance(value, dict | None):
            raise UserError(f"config.json: {prefix}{name}={value!r:.60}", allowed="an object, null")
