"""FLOPs of the matrix products of one layer, 2 per multiply-add; and as papers count them."""

from collections.abc import Mapping
from typing import Any

from efficient_vlm.nn.experts import capacity_of


def dense(tokens: int, inputs: int, outputs: int) -> int:
    """FLOPs of [tokens, inputs] @ [inputs, outputs]."""
    return 2 * tokens * inputs * outputs


def attention(
    queries: int, keys: int, width: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> int:
    """FLOPs of an attention layer: projections of the queries' tokens, QK^T and PV over keys."""
    heads = num_heads * head_dim
    projections = dense(queries, width, heads + 2 * num_kv_heads * head_dim)
    return projections + 2 * dense(queries, heads, keys) + dense(queries, heads, width)


def mixture(tokens: int, width: int, moe: Mapping[str, Any]) -> int:
    """FLOPs of a mixture-of-experts layer of SwiGLU experts; `moe` holds the fields of `MoE`.

    With a capacity that may drop, every place of every expert is computed, taken or not.
    """
    routed = places = tokens * moe["top_k"]
    if moe.get("capacity") is not None:
        room = capacity_of(moe["capacity"], tokens, moe["top_k"], moe["num_experts"])
        places = moe["num_experts"] * room if room < tokens else routed
    router = dense(tokens, width, moe["num_experts"])
    experts = 3 * dense(places, width, moe["expert_dim"])
    shared = 3 * dense(tokens, width, moe.get("shared_dim") or 0)
    return router + experts + 2 * routed * width + shared


def published_layer_flops(tokens: int, width: int, mlp_dim: int, matrices: int) -> int:
    """One layer as papers count it: 4 n d^2 + 2 n^2 d + k n d m, a multiply-add once.

    Args:
      tokens: n; papers differ in whether text is in it.
      width, mlp_dim: d, m.
      matrices: k, 2 (FastV, DivPrune: the SwiGLU gate forgotten) or 3 (PyramidDrop, SparseVLM).
    """
    return 4 * tokens * width**2 + 2 * tokens**2 * width + matrices * tokens * width * mlp_dim
