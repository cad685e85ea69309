"""Gemma 1, 2 and 3: norms that multiply by 1 + scale, scaled embeddings, tied heads."""

from typing import Any

from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.errors import UserError
from efficient_vlm.families.base import Config
from efficient_vlm.families.text import (
    attention,
    embeddings,
    glu,
    layer_paths,
    layer_types,
    llama,
    rope,
)


def gemma(text: Config) -> dict[str, Any]:
    """Gemma (arXiv 2403.08295)."""
    # Early files say "gelu" but mean the tanh approximation, which all were trained with.
    named = text.get("hidden_activation") or text.get("hidden_act")
    act = "gelu_pytorch_tanh" if named in (None, "gelu") else named
    text = {**text, "hidden_act": act}
    return {
        **llama(text),
        "norm": "rms_plus1",
        "embed_multiplier": text["hidden_size"] ** 0.5,
    }


def gemma2(text: Config) -> dict[str, Any]:
    """Gemma 2 (arXiv 2408.00118): norms on both sides of a sublayer, soft caps, windows."""
    return _sandwiched(text, every=2)


def gemma3_text(text: Config) -> dict[str, Any]:
    """Gemma 3 (arXiv 2503.19786): queries and keys normalised, five local layers per global one.

    Local layers have their own rotary base, and no rotary scaling.

    Raises:
      UserError: `use_bidirectional_attention`, which only text encoders have.
    """
    if text.get("use_bidirectional_attention"):
        raise UserError(
            "config.json: use_bidirectional_attention=True, a model that embeds text",
            allowed="language models, where it is false",
        )
    parameters = text.get("rope_parameters") or {}
    local = parameters.get("sliding_attention") or {
        "rope_theta": text.get("rope_local_base_freq", 10_000.0)
    }
    local = rope({"rope_parameters": local})
    every = text.get("sliding_window_pattern") or 6
    return {
        **_sandwiched(text, every),
        **rope({"rope_theta": 1e6, **text}, "full_attention"),
        "local_rope": {name: local[f"rope_{name}"] for name in ("theta", "fraction", "scaling")},
        "qk_norm": "head",
    }


def _sandwiched(text: Config, every: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share; the last of every `every` layers is global."""
    kinds = text.get("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention"
        for i in range(text["num_hidden_layers"])
    ]
    return {
        **gemma(text),
        **layer_types({"layer_types": kinds}, text["sliding_window"]),
        "norm_layout": "sandwich",
        "attention_scale": text["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": text.get("attn_logit_softcapping"),
        "final_softcap": text.get("final_logit_softcapping"),
    }


def sandwich_tensors(m: NameMap, text: Config, prefix: str, head: str, spelling: str) -> None:
    """Names of Gemma 2 and 3 below `prefix`: four norms a layer."""
    embeddings(m, prefix, head)
    for i in range(text["num_hidden_layers"]):
        ours, theirs = layer_paths(i, prefix)
        attention(m, ours, theirs)
        m.norm(f"{ours}attention_norm", f"{theirs}input_layernorm")
        m.norm(f"{ours}attention_post_norm", f"{theirs}post_attention_layernorm")
        m.norm(f"{ours}mlp_norm", f"{theirs}pre_feedforward_layernorm")
        m.norm(f"{ours}mlp_post_norm", f"{theirs}post_feedforward_layernorm")
        glu(m, ours, theirs)
