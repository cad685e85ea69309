"""The table of methods, and `build`: a name, a budget and options to a module."""

import dataclasses
from typing import Any

from efficient_vlm.checks import known_fields
from efficient_vlm.compressors.base import Compressor
from efficient_vlm.compressors.between import pooling, selectors
from efficient_vlm.compressors.between.cdpruner import CDPruner
from efficient_vlm.compressors.between.cls_attention import FasterVLM
from efficient_vlm.compressors.between.divprune import DivPrune
from efficient_vlm.compressors.between.hiprune import HiPrune
from efficient_vlm.compressors.between.prumerge import PruMerge, PruMergePlus
from efficient_vlm.compressors.between.scope import Scope
from efficient_vlm.compressors.between.visionselector import VisionSelector
from efficient_vlm.compressors.between.visionzip import VisionZip
from efficient_vlm.compressors.between.vispruner import VisPruner
from efficient_vlm.compressors.grids import Grid, as_grid
from efficient_vlm.compressors.in_decoder.dart import Dart
from efficient_vlm.compressors.in_decoder.fastv import FastV
from efficient_vlm.compressors.in_decoder.feather import Feather
from efficient_vlm.compressors.in_decoder.fitprune import FitPrune
from efficient_vlm.compressors.in_decoder.pyramiddrop import PyramidDrop
from efficient_vlm.compressors.in_decoder.sparsevlm import SparseVLM
from efficient_vlm.compressors.in_decoder.v2drop import V2Drop
from efficient_vlm.compressors.in_decoder.vtw import VisualTokensWithdrawal
from efficient_vlm.compressors.in_encoder.cut import EncoderCut
from efficient_vlm.compressors.in_encoder.early_exit import EncoderExit
from efficient_vlm.compressors.in_encoder.ipcv import IPCV
from efficient_vlm.compressors.in_encoder.minicpm import MiniCPMMerger
from efficient_vlm.compressors.in_encoder.pixelprune import PixelPrune
from efficient_vlm.compressors.in_encoder.tofu import ToFu
from efficient_vlm.compressors.in_encoder.tome import ToMe
from efficient_vlm.compressors.projectors.cell import TokenPacker
from efficient_vlm.compressors.projectors.conv import LDP, CAbstractor, LDPv2
from efficient_vlm.compressors.projectors.elastic import M3, MQT
from efficient_vlm.compressors.projectors.gather_pool import MolmoPool, PositionPool
from efficient_vlm.compressors.projectors.mlp import Deco, Mlp
from efficient_vlm.compressors.projectors.query import Perceiver, QFormer
from efficient_vlm.compressors.projectors.resampler import Resampler
from efficient_vlm.errors import unknown

METHODS: dict[str, type[Compressor]] = {
    method.label: method
    for method in (
        selectors.Identity,
        pooling.AveragePool,
        pooling.PixelShuffle,
        Resampler,
        Mlp,
        Deco,
        CAbstractor,
        LDP,
        LDPv2,
        TokenPacker,
        Perceiver,
        QFormer,
        pooling.Downsample,
        pooling.Pool,
        M3,
        MQT,
        MolmoPool,
        PositionPool,
        MiniCPMMerger,
        selectors.Random,
        selectors.Stride,
        selectors.TextTopK,
        VisionSelector,
        PruMerge,
        PruMergePlus,
        VisionZip,
        FasterVLM,
        VisPruner,
        HiPrune,
        DivPrune,
        CDPruner,
        Scope,
        ToMe,
        ToFu,
        EncoderCut,
        PixelPrune,
        IPCV,
        EncoderExit,
        FastV,
        PyramidDrop,
        Feather,
        V2Drop,
        VisualTokensWithdrawal,
        SparseVLM,
        Dart,
        FitPrune,
    )
}


OWN_HINT = "a method of your own: --import=FILE.py"


def names() -> tuple[str, ...]:
    """The names that `build` accepts."""
    return tuple(METHODS)


def find(name: str) -> type[Compressor]:
    """The module class of a method; UserError with the closest name if it is unknown."""
    if not isinstance(name, str) or name not in METHODS:
        raise unknown("compressor.name", str(name), METHODS, hint=OWN_HINT)
    return METHODS[name]


def options(name: str) -> tuple[str, ...]:
    """The options of a method beside `budget`: the fields of its module that are not `internal`."""
    method = find(name)
    hidden = {"budget", "parent", "name", *method.internal}
    return tuple(f.name for f in dataclasses.fields(method) if f.name not in hidden)


def needs(name: str) -> frozenset[str]:
    """The Signals that a method reads."""
    return find(name).needs


def build(name: str, *, budget: int | None = None, **settings: Any) -> Compressor:
    """A compressor from its name.

    Args:
      name: one of `names()`.
      budget: T, the number of tokens to return. None for methods with `optional_budget`, whose
        count other options set (`keep`, `rate`, `r`, ...), or nothing does.
      **settings: any of `options(name)`; every method has `grid=(rows, columns)`. `parent` goes to
        Linen (None for an unbound module inside another module's method).

    Raises:
      UserError: an unknown name or option, or a value that is wrong for every image.
    """
    known_fields(
        f"compressor {name}", {k: v for k, v in settings.items() if k != "parent"}, options(name)
    )
    return find(name)(budget=budget, **settings)


def reachable(name: str, grid: Grid, **settings: Any) -> tuple[int, ...]:
    """The budgets that a method supports on a grid of patches, largest first.

    Args:
      name: one of `names()`.
      grid: (rows, columns) of the image's patches.
      **settings: options that change them (`num_queries` of resampler); a `budget` is ignored.
    """
    settings = {k: v for k, v in settings.items() if k not in ("budget", "budgets")}
    module = build(name, budget=1, **{"parent": None, **settings})
    return module.reachable(as_grid("grid", grid))
