"""Fused sparse attention over compressed tokens: one op, one contract, several implementations."""

from efficient_vlm.kernels.attention.api import (
    IMPLEMENTATIONS,
    AttentionResult,
    attention,
    attention_importance,
)
from efficient_vlm.kernels.attention.compact import Compacted, compact, keep_blocks
from efficient_vlm.kernels.attention.mask import (
    Mask,
    choose,
    key_mask,
    make_mask,
    mask_rows,
    visible,
)

__all__ = [
    "IMPLEMENTATIONS",
    "AttentionResult",
    "Compacted",
    "Mask",
    "attention",
    "attention_importance",
    "choose",
    "compact",
    "keep_blocks",
    "key_mask",
    "make_mask",
    "mask_rows",
    "visible",
]
