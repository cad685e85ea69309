"""Compressors: N patch tokens to T < N, with T a Python integer known at trace time."""

from efficient_vlm.compressors.base import Compressor
from efficient_vlm.compressors.methods import build, names, needs, options, reachable
from efficient_vlm.compressors.tokens import Signals, VisualTokens

__all__ = [
    "Compressor",
    "Signals",
    "VisualTokens",
    "build",
    "names",
    "needs",
    "options",
    "reachable",
]
