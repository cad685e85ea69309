"""Llama and its relatives, and what all decoders share: rotary positions, layer types, names."""

import math
from collections.abc import Sequence
from typing import Any

from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.families.base import Config
from efficient_vlm.families.vision import activation

PATH = "language/"


def rope(config: Config, key: str | None = None) -> dict[str, Any]:
    """Fields rope_theta, rope_fraction and rope_scaling, from either spelling of transformers.

    Args:
      config: with "rope_parameters", or with "rope_theta" and perhaps "rope_scaling".
      key: layer type, where "rope_parameters" has one entry per type.
    """
    parameters = dict(config.get("rope_parameters") or {})
    if key is not None and key in parameters:
        parameters = dict(parameters[key])
    scaling = dict(config.get("rope_scaling") or {})
    settings = {**scaling, **parameters}
    theta = settings.get("rope_theta", config.get("rope_theta", 10_000.0))
    fraction = settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    kind = settings.get("rope_type", settings.get("type", "default"))
    result = dict(rope_theta=float(theta), rope_fraction=float(fraction), rope_scaling=None)
    # "mrope" of older Qwen2-VL files: plain frequencies on several axes.
    if kind in ("default", "mrope", None):
        return result
    longest = config.get("max_position_embeddings")
    original = settings.get("original_max_position_embeddings")
    original = original or config.get("original_max_position_embeddings")
    spec: dict[str, Any] = {"type": kind, "factor": settings.get("factor", 1.0)}
    if kind == "linear":
        pass
    elif kind in ("dynamic", "llama3", "yarn"):
        spec["original_length"] = original or longest
        names = {
            "dynamic": (),
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": (
                "beta_fast",
                "beta_slow",
                "truncate",
                "attention_factor",
                "mscale",
                "mscale_all_dim",
            ),
        }[kind]
        spec.update({name: settings[name] for name in names if settings.get(name) is not None})
        if kind == "dynamic":
            spec["original_length"] = longest
    elif kind in ("longrope", "su"):
        spec["type"] = "longrope"
        spec["original_length"] = original or longest
        spec.update(
            {f"{name}_factor": tuple(settings[f"{name}_factor"]) for name in ("short", "long")}
        )
        spec["attention_factor"] = settings.get("attention_factor") or _longrope_attention(
            settings.get("factor") or longest / spec["original_length"], spec["original_length"]
        )
    else:
        kinds = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
        raise unknown("config.json: rope_type", str(kind), kinds)
    return {**result, "rope_scaling": spec}


def _longrope_attention(factor: float, original: int) -> float:
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def layer_types(text: Config, window: Any) -> dict[str, Any]:
    """Fields layer_types and window from a list of attention types."""
    kinds = text.get("layer_types")
    if not kinds or window is None or "sliding_attention" not in kinds:
        return {}
    names = {"full_attention": "global", "sliding_attention": "local"}
    return dict(layer_types=tuple(names[kind] for kind in kinds), window=int(window))


def llama(text: Config) -> dict[str, Any]:
    """Llama (arXiv 2302.13971), and models that differ from it only in sizes and flags."""
    heads = text["num_attention_heads"]
    bias = bool(text.get("attention_bias", False))
    rotary = rope(text)
    if rotary["rope_fraction"] != 1.0 and text.get("model_type") != "phi3":
        raise UserError(
            f"config.json: partial_rotary_factor={rotary['rope_fraction']} of a "
            f"{text.get('model_type')}",
            allowed="1, as in all released models except Phi's",
        )
    return dict(
        width=text["hidden_size"],
        segments=[{"layers": text["num_hidden_layers"]}],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        mlp_dim=text["intermediate_size"],
        norm_epsilon=text.get("rms_norm_eps", 1e-6),
        activation=activation(text.get("hidden_act", text.get("hidden_activation", "silu"))),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(text.get("mlp_bias", False)),
        tie_embeddings=bool(text.get("tie_word_embeddings", False)),
        bidirectional_visual=False,
        **rotary,
    )


def mistral(text: Config) -> dict[str, Any]:
    """Mistral (arXiv 2310.06825): Llama with a window in every layer, or none."""
    return {**llama(text), **all_local(text, text.get("sliding_window"))}


def all_local(text: Config, window: Any) -> dict[str, Any]:
    """Fields layer_types and window of a decoder all of whose layers are local."""
    if window is None:
        return {}
    return dict(layer_types=("local",) * text["num_hidden_layers"], window=int(window))


def qwen2(text: Config) -> dict[str, Any]:
    """Qwen2 (arXiv 2407.10671): biases for queries, keys and values only."""
    return {**llama(text), "qkv_bias": True, "out_bias": False, **_upper_local(text)}


def qwen3(text: Config) -> dict[str, Any]:
    """Qwen3 (arXiv 2505.09388): queries and keys normalised per head, no biases."""
    return {**llama(text), "qk_norm": "head", **_upper_local(text)}


def _upper_local(text: Config) -> dict[str, Any]:
    """Fields layer_types and window of Qwen: with a window, layers from some index on are local."""
    window = text.get("sliding_window") if text.get("use_sliding_window") else None
    if window is None or text.get("layer_types"):
        return layer_types(text, window)
    first = text.get("max_window_layers", 28)
    types = ("local" if i >= first else "global" for i in range(text["num_hidden_layers"]))
    return dict(layer_types=tuple(types), window=int(window))


def olmo2(text: Config) -> dict[str, Any]:
    """OLMo2 (arXiv 2501.00656): norms after sublayers, queries and keys normed over all heads."""
    return {**llama(text), "norm_layout": "post", "qk_norm": "full"}


def llama_tensors(m: NameMap, text: Config, prefix: str, head: str, spelling: str = "hub") -> None:
    """Names of Llama and its relatives below `prefix` ("model."); `head` is "lm_head"."""
    embeddings(m, prefix, head)
    for i in range(text["num_hidden_layers"]):
        ours, theirs = layer_paths(i, prefix)
        attention(m, ours, theirs)
        if f"{ours}attention_norm/scale" in m:
            m.norm(f"{ours}attention_norm", f"{theirs}input_layernorm")
            m.norm(f"{ours}mlp_norm", f"{theirs}post_attention_layernorm")
        else:
            m.norm(f"{ours}attention_post_norm", f"{theirs}post_attention_layernorm")
            m.norm(f"{ours}mlp_post_norm", f"{theirs}post_feedforward_layernorm")
        glu(m, ours, theirs)


def embeddings(m: NameMap, prefix: str, head: str) -> None:
    """Names of the embedding table, the last norm, and the head if it is not tied."""
    m.plain(f"{PATH}embedding", f"{prefix}embed_tokens.weight")
    m.norm(f"{PATH}norm", f"{prefix}norm")
    if f"{PATH}head/kernel" in m:
        m.linear(f"{PATH}head", head)


def layer_paths(index: int, prefix: str) -> tuple[str, str]:
    """Our path and the hub's prefix of a layer."""
    return f"{PATH}layers/{index}/", f"{prefix}layers.{index}."


def attention(m: NameMap, ours: str, theirs: str) -> None:
    """Names of the four projections, and of the norms of queries and keys if there are any."""
    for name in ("query", "key", "value"):
        m.linear(f"{ours}attention/{name}", f"{theirs}self_attn.{name[0]}_proj")
    m.linear(f"{ours}attention/out", f"{theirs}self_attn.o_proj", inputs=2)
    for name in ("query", "key"):
        if f"{ours}attention/{name}_norm/scale" in m:
            m.norm(f"{ours}attention/{name}_norm", f"{theirs}self_attn.{name[0]}_norm")


def glu(m: NameMap, ours: str, theirs: str) -> None:
    """Names of a gated feed-forward layer."""
    for name in ("gate", "up", "down"):
        m.linear(f"{ours}mlp/{name}", f"{theirs}mlp.{name}_proj")


def fused_rows(m: NameMap, path: str, parts: Sequence[str], name: str) -> None:
    """Maps several of our products below `path` to consecutive rows of one torch Linear."""
    sizes = [math.prod(m.shapes[f"{path}{part}/kernel"][1:]) for part in parts]
    for i, part in enumerate(parts):
        m.linear(f"{path}{part}", name, rows=(sum(sizes[:i]), sum(sizes)))
