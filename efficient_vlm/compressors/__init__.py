"""Compressors: N patch tokens to T < N, with T a Python integer known at trace time."""

from efficient_vlm.compressors.base import POLICIES, Compressor, Stage
from efficient_vlm.compressors.methods import build, names, needs, options, reachable
from efficient_vlm.compressors.own import register
from efficient_vlm.compressors.signals import DecoderState, Signals
from efficient_vlm.compressors.tokens import VisualTokens

__all__ = [
    "POLICIES",
    "Compressor",
    "DecoderState",
    "Signals",
    "Stage",
    "VisualTokens",
    "build",
    "names",
    "needs",
    "options",
    "reachable",
    "register",
]
