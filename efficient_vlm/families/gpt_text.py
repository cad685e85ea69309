"""Decoders with plain feed-forward layers or fused products: GPT-Neo, Phi and Phi-3."""

from typing import Any

from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.errors import UserError
from efficient_vlm.families.base import Config
from efficient_vlm.families.text import (
    PATH,
    all_local,
    embeddings,
    fused_rows,
    layer_paths,
    llama,
    rope,
)
from efficient_vlm.families.vision import activation


def gpt_neo(text: Config) -> dict[str, Any]:
    """GPT-Neo (doi 10.5281/zenodo.5297715): learned positions, unscaled attention logits."""
    kinds = text.get("attention_layers")
    if kinds is None:
        kinds = [kind for block, times in text["attention_types"] for kind in list(block) * times]
    return dict(
        width=text["hidden_size"],
        segments=[{"layers": text["num_layers"]}],
        num_heads=text["num_heads"],
        mlp_dim=text.get("intermediate_size") or 4 * text["hidden_size"],
        position="learned",
        max_positions=text["max_position_embeddings"],
        layer_types=tuple(kinds),
        window=text.get("window_size", 256),
        attention_scale=1.0,
        norm="layernorm",
        norm_epsilon=text.get("layer_norm_epsilon", 1e-5),
        mlp_gated=False,
        activation=activation(text.get("activation_function", "gelu_new")),
        mlp_bias=True,
        out_bias=True,
        tie_embeddings=bool(text.get("tie_word_embeddings", True)),
        bidirectional_visual=False,
    )


def phi(text: Config) -> dict[str, Any]:
    """Phi-1, 1.5 and 2 (arXiv 2309.05463): attention and feed-forward side by side, biases."""
    if text.get("tie_word_embeddings", False):
        raise UserError(
            "config.json: tie_word_embeddings=True with model_type phi, whose head has a bias",
            allowed="False, as in all released files",
        )
    heads, width = text["num_attention_heads"], text["hidden_size"]
    return dict(
        width=width,
        segments=[{"layers": text["num_hidden_layers"]}],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or width // heads,
        mlp_dim=text["intermediate_size"],
        norm="layernorm",
        norm_epsilon=text.get("layer_norm_eps", 1e-5),
        norm_layout="parallel",
        qk_norm="head" if text.get("qk_layernorm") else False,
        mlp_gated=False,
        activation=activation(text.get("hidden_act", "gelu_new")),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        bidirectional_visual=False,
        **rope({"partial_rotary_factor": 0.5, **text}),
    )


def phi3(text: Config) -> dict[str, Any]:
    """Phi-3 (arXiv 2404.14219): Llama with fused products; a window, if any, in all layers."""
    return {**llama(text), **all_local(text, text.get("sliding_window"))}


def gpt_neo_tensors(m: NameMap, text: Config, prefix: str, head: str, spelling: str) -> None:
    """Names of GPT-Neo: "transformer." where others have "model."."""
    prefix = f"{prefix.removesuffix('model.')}transformer."
    m.plain(f"{PATH}embedding", f"{prefix}wte.weight")
    m.plain(f"{PATH}position", f"{prefix}wpe.weight")
    m.norm(f"{PATH}norm", f"{prefix}ln_f")
    if f"{PATH}head/kernel" in m:
        m.linear(f"{PATH}head", head)
    for i in range(text["num_layers"]):
        ours, theirs = f"{PATH}layers/{i}/", f"{prefix}h.{i}."
        for name in ("query", "key", "value"):
            m.linear(f"{ours}attention/{name}", f"{theirs}attn.attention.{name[0]}_proj")
        m.linear(f"{ours}attention/out", f"{theirs}attn.attention.out_proj", inputs=2)
        m.norm(f"{ours}attention_norm", f"{theirs}ln_1")
        m.norm(f"{ours}mlp_norm", f"{theirs}ln_2")
        m.linear(f"{ours}mlp/up", f"{theirs}mlp.c_fc")
        m.linear(f"{ours}mlp/down", f"{theirs}mlp.c_proj")


def phi_tensors(m: NameMap, text: Config, prefix: str, head: str, spelling: str) -> None:
    """Names of Phi below `prefix`."""
    m.plain(f"{PATH}embedding", f"{prefix}embed_tokens.weight")
    m.norm(f"{PATH}norm", f"{prefix}final_layernorm")
    if f"{PATH}head/kernel" in m:
        m.linear(f"{PATH}head", head)
    for i in range(text["num_hidden_layers"]):
        ours, theirs = layer_paths(i, prefix)
        for name in ("query", "key", "value"):
            m.linear(f"{ours}attention/{name}", f"{theirs}self_attn.{name[0]}_proj")
        m.linear(f"{ours}attention/out", f"{theirs}self_attn.dense", inputs=2)
        for name in ("query", "key"):
            if f"{ours}attention/{name}_norm/scale" in m:
                m.norm(f"{ours}attention/{name}_norm", f"{theirs}self_attn.{name[0]}_layernorm")
        m.norm(f"{ours}attention_norm", f"{theirs}input_layernorm")
        m.linear(f"{ours}mlp/up", f"{theirs}mlp.fc1")
        m.linear(f"{ours}mlp/down", f"{theirs}mlp.fc2")


def phi3_tensors(m: NameMap, text: Config, prefix: str, head: str, spelling: str) -> None:
    """Names of Phi-3 below `prefix`: rows [query; key; value] and [gate; up] of one tensor."""
    embeddings(m, prefix, head)
    for i in range(text["num_hidden_layers"]):
        ours, theirs = layer_paths(i, prefix)
        fused_rows(m, f"{ours}attention/", ("query", "key", "value"), f"{theirs}self_attn.qkv_proj")
        fused_rows(m, f"{ours}mlp/", ("gate", "up"), f"{theirs}mlp.gate_up_proj")
        m.linear(f"{ours}attention/out", f"{theirs}self_attn.o_proj", inputs=2)
        m.linear(f"{ours}mlp/down", f"{theirs}mlp.down_proj")
        m.norm(f"{ours}attention_norm", f"{theirs}input_layernorm")
        m.norm(f"{ours}mlp_norm", f"{theirs}post_attention_layernorm")
