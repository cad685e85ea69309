"""Mixtral, OLMoE and Qwen3-MoE: decoders whose feed-forward layers are mixtures of experts."""

from collections.abc import Callable, Mapping
from typing import Any

from efficient_vlm.checkpoints.names import NameMap, Piece
from efficient_vlm.errors import UserError
from efficient_vlm.families.base import Config
from efficient_vlm.families.text import PATH, all_local, attention, embeddings, glu, llama, qwen3
from efficient_vlm.families.vision import activation

# Our name -> the hub's, for the products of one expert.
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
OTHERS = {name: f"{name}_proj" for name in ("gate", "up", "down")}


def mixture(text: Config, width: int, normalize: bool) -> dict[str, Any]:
    """Field `moe` of a decoder; released models normalise even when one expert is chosen."""
    return dict(
        # transformers accepts either name.
        num_experts=text.get("num_local_experts") or text["num_experts"],
        top_k=text["num_experts_per_tok"],
        expert_dim=width,
        normalize="always" if normalize else False,
        activation=activation(text.get("hidden_act", "silu")),
    )


def mixtral(text: Config) -> dict[str, Any]:
    """Mixtral (arXiv 2401.04088): Llama with experts, whose weights sum to one."""
    return {
        **llama(text),
        **all_local(text, text.get("sliding_window")),
        "moe": mixture(text, text["intermediate_size"], True),
    }


def olmoe(text: Config) -> dict[str, Any]:
    """OLMoE (arXiv 2409.02060): queries and keys normalised over all heads, raw router weights."""
    if text.get("clip_qkv") is not None:
        raise UserError(
            f"config.json: clip_qkv={text['clip_qkv']}",
            allowed="null, as in the released OLMoE-1B-7B",
        )
    normalize = bool(text.get("norm_topk_prob", False))
    return {
        **llama(text),
        "qk_norm": "full",
        "moe": mixture(text, text["intermediate_size"], normalize),
    }


def qwen3_moe(text: Config) -> dict[str, Any]:
    """Qwen3-MoE (arXiv 2505.09388): some layers may be dense."""
    window = text.get("sliding_window") if text.get("use_sliding_window") else None
    step, dense = text.get("decoder_sparse_step", 1), text.get("mlp_only_layers") or ()
    normalize = bool(text.get("norm_topk_prob", False))
    return {
        **qwen3(text),
        **all_local(text, window),
        "moe": mixture(text, text["moe_intermediate_size"], normalize),
        "dense_layers": tuple(
            i for i in range(text["num_hidden_layers"]) if i in dense or (i + 1) % step
        ),
    }


def moe_tensors(
    block: str, names: Mapping[str, str]
) -> Callable[[NameMap, Config, str, str, str], None]:
    """Names of a decoder whose mixtures are called `block` in files of the hub."""

    def tensors(m: NameMap, text: Config, prefix: str, head: str, spelling: str) -> None:
        embeddings(m, prefix, head)
        stacks = {"dense_layers": 0, "layers": 0}
        dense = _dense_layers(text)
        for i in range(text["num_hidden_layers"]):
            stack = "dense_layers" if i in dense else "layers"
            ours, theirs = f"{PATH}{stack}/{stacks[stack]}/", f"{prefix}layers.{i}."
            stacks[stack] += 1
            attention(m, ours, theirs)
            m.norm(f"{ours}attention_norm", f"{theirs}input_layernorm")
            m.norm(f"{ours}mlp_norm", f"{theirs}post_attention_layernorm")
            if i in dense:
                glu(m, ours, theirs)
            elif spelling == "memory":
                m.linear(f"{ours}moe/router", f"{theirs}mlp.gate")
                fused_experts(m, f"{ours}moe/", f"{theirs}mlp.experts.")
            else:
                m.linear(f"{ours}moe/router", f"{theirs}{block}.gate")
                experts(m, f"{ours}moe/", f"{theirs}{block}.experts.", names)

    return tensors


def _dense_layers(text: Config) -> tuple[int, ...]:
    return qwen3_moe(text)["dense_layers"] if text["model_type"] == "qwen3_moe" else ()


def experts(m: NameMap, ours: str, theirs: str, names: Mapping[str, str]) -> None:
    """One torch Linear for each product of each expert: "{theirs}{number}.{name}.weight"."""
    for part, name in names.items():
        count, fan_in, out = m.shapes[f"{ours}{part}"]
        pieces = (
            Piece(f"{theirs}{number}.{name}.weight", (out, fan_in), turn=(1, 0))
            for number in range(count)
        )
        m.add(f"{ours}{part}", *pieces, stacked=True)


def fused_experts(m: NameMap, ours: str, theirs: str) -> None:
    """All experts in two tensors: gate and up joined, and down (transformers 5)."""
    count, width, hidden = m.shapes[f"{ours}gate"]
    turn, joined = (0, 2, 1), (count, 2 * hidden, width)
    name = f"{theirs}gate_up_proj"
    m.add(f"{ours}gate", Piece(name, joined, (1, 0, hidden), turn=turn))
    m.add(f"{ours}up", Piece(name, joined, (1, hidden, 2 * hidden), turn=turn))
    m.add(f"{ours}down", Piece(f"{theirs}down_proj", (count, width, hidden), turn=turn))
