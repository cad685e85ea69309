"""The names in PEFT's files of adapters, and the products of ours that they are about.

PEFT names a tensor by the module in memory that it belongs to, so by the version of transformers
that wrote it: `model.layers.0...` of Qwen2-VL in older ones is `model.language_model.layers.0...`
in newer ones. All spellings of a family are read, that of transformers 5 is written.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from efficient_vlm.checkpoints.names import NameMap, Piece
from efficient_vlm.families.architecture import name_map
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.load import renamed

__all__ = ["PREFIX", "Modules", "Part"]

PREFIX = "base_model.model."
# transformers 4.52 to 4.57 nested these one level down, and kept the level `vision_model`.
_NESTED = r"^model\.(?=(vision_tower|multi_modal_projector|visual|language_model)\.)"


class Part(NamedTuple):
    """What a parameter of ours has of a tensor.

    Attributes:
      path: of ours, in split form.
      piece: of the tensor.
      whole: whether the parameter has no other piece.
    """

    path: str
    piece: Piece
    whole: bool

    @property
    def linear(self) -> bool:
        """Whether it is (rows of) a torch Linear, [out, in] there and [in, out] here."""
        piece = self.piece
        is_matrix = len(piece.shape) == 2 and piece.view is None and piece.turn == (1, 0)
        return self.whole and is_matrix and (piece.part is None or piece.part[0] == 0)

    @property
    def rows(self) -> slice:
        """Which outputs of the Linear are its own."""
        if self.piece.part is None:
            return slice(0, self.piece.shape[0])
        return slice(*self.piece.part[1:])


class Modules:
    """The tensors of a model, and who uses them.

    Attributes:
      names: the name map, in the spelling of the hub.
      parts: name of a tensor -> parameters that it makes, in the order of its rows.
    """

    def __init__(self, family: Family, config: Config, model: Any):
        self.family = family
        self.names: NameMap = name_map(family, config, model)
        self.parts: dict[str, list[Part]] = {}
        for path, leaf in self.names.leaves.items():
            for piece in leaf.pieces:
                part = Part(path, piece, len(leaf.pieces) == 1)
                self.parts.setdefault(piece.name, []).append(part)
        for parts in self.parts.values():
            parts.sort(key=lambda part: part.rows.start if part.linear else 0)

    def in_memory(self, name: str) -> str:
        """The name of a tensor or module of the hub in transformers 5."""
        return renamed(name, self.family.memory)

    def find(self, name: str) -> str | None:
        """The hub's name of a tensor, from any spelling without PEFT's prefix; None if unknown."""
        return next((found for found in self._spelled(name) if found in self.parts), None)

    def _spelled(self, name: str) -> Iterator[str]:
        for each in (name, re.sub(_NESTED, "", name)):
            yield each
            for renames in self.family.spellings.values():
                yield renamed(each, renames)
