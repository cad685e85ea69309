"""Fused sparse attention over compressed tokens: one op, one contract, several implementations."""

from efficient_vlm.kernels.attention.mask import Mask, make_mask
from efficient_vlm.kernels.attention.op import IMPLEMENTATIONS, AttentionResult, attention

__all__ = ["IMPLEMENTATIONS", "AttentionResult", "Mask", "attention", "make_mask"]
