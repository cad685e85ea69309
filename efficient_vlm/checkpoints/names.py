"""Which tensors of a published checkpoint make which of our parameters, in both directions.

A family writes its map once: for each of our parameters, the tensor or tensors that it is made of,
and how. Reading and writing both follow from this map, because every step of it (a slice, a
reshape, a permutation, a stack) can be undone bit for bit.

Our parameters are named by their path in split form (`nn.stack.unstack`), "/" between:
"language/layers/3/attention/query/kernel".
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """A part of one tensor on disk, with its axes permuted.

    Attributes:
      name: of the tensor.
      shape: of the whole tensor.
      part: (axis, start, stop) of the part that is used; None for all of it.
      view: the part is reshaped to this first; None leaves its shape.
      turn: then its axes are permuted so; None leaves their order.
    """

    name: str
    shape: Shape
    part: tuple[int, int, int] | None = None
    view: Shape | None = None
    turn: tuple[int, ...] | None = None

    def part_shape(self) -> Shape:
        """Shape of the part that is used."""
        if self.part is None:
            return self.shape
        axis, start, stop = self.part
        return (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])

    def take(self, array: np.ndarray) -> np.ndarray:
        """The piece, taken from the whole tensor."""
        if self.part is not None:
            axis, start, stop = self.part
            array = array[(slice(None),) * axis + (slice(start, stop),)]
        array = array.reshape(self.view) if self.view is not None else array
        return array.transpose(self.turn) if self.turn is not None else array

    def put_back(self, value: np.ndarray, whole: np.ndarray) -> None:
        """Writes the result of `take`, in any shape, back into the whole tensor."""
        before = self.view if self.view is not None else self.part_shape()
        if self.turn is not None:
            value = value.reshape([before[axis] for axis in self.turn])
            value = value.transpose(np.argsort(self.turn))
        value = value.reshape(self.part_shape())
        if self.part is None:
            whole[...] = value
        else:
            axis, start, stop = self.part
            whole[(slice(None),) * axis + (slice(start, stop),)] = value


class Leaf(NamedTuple):
    """One of our parameters: one piece, or several stacked or joined on the first axis."""

    pieces: tuple[Piece, ...]
    stacked: bool = False

    def read(self, tensor: Callable[[str], np.ndarray], out: np.ndarray) -> None:
        """Writes the parameter into `out`; `tensor` reads tensors by name.

        `out` is contiguous, or columns [K, F] of a wider matrix.
        """
        if out.flags.c_contiguous:
            flat, start = out.reshape(-1), 0
            for piece in self.pieces:
                part = piece.take(tensor(piece.name))
                _copy(part, flat[start : start + part.size].reshape(part.shape))
                start += part.size
        elif len(self.pieces) == 1:
            part = self.pieces[0].take(tensor(self.pieces[0].name))
            _copy(part.reshape(out.shape), out)
        else:
            contiguous = np.empty(out.shape, out.dtype)
            self.read(tensor, contiguous)
            out[...] = contiguous

    def split(self, value: np.ndarray) -> list[np.ndarray]:
        """The parameter cut into the values of each piece."""
        if len(self.pieces) == 1 and not self.stacked:
            return [value]
        if self.stacked:
            return list(value.reshape(len(self.pieces), -1))
        sizes = [math.prod(piece.part_shape()) for piece in self.pieces]
        return np.split(value.reshape(-1), np.cumsum(sizes)[:-1])


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """target[...] = source, a transposed matrix a few columns at a time.

    NumPy writes row after row, for which a transposed matrix is read across: a line of the
    processor's cache for each value. 32 columns stay in the cache, which is two to four times as
    fast.
    """
    if source.ndim != 2 or not source.flags.f_contiguous:
        target[...] = source
        return
    for first in range(0, source.shape[1], 32):
        columns = slice(first, first + 32)
        target[:, columns] = source[:, columns]


class NameMap:
    """Built by a family: our parameters -> tensors.

    Args:
      shapes: path -> shape of each of our parameters, in split form.
    """

    def __init__(self, shapes: Mapping[str, Shape]):
        self.shapes = shapes
        self.leaves: dict[str, Leaf] = {}

    def __contains__(self, path: str) -> bool:
        return path in self.shapes

    def count(self, prefix: str) -> int:
        """Number of layers below `prefix`."""
        below = (path for path in self.shapes if path.startswith(f"{prefix}/"))
        return len({path[len(prefix) + 1 :].split("/")[0] for path in below})

    def add(self, path: str, *pieces: Piece, stacked: bool = False) -> None:
        """Maps one parameter to any pieces.

        Raises:
          ValueError: the model has no such parameter.
        """
        if path not in self.shapes:
            raise ValueError(f"the model has no parameter {path}")
        self.leaves[path] = Leaf(pieces, stacked)

    def plain(self, path: str, name: str, shape: Shape | None = None) -> None:
        """Maps one parameter to one tensor with the same values, of another shape if given."""
        self.add(path, Piece(name, tuple(shape or self.shapes[path])))

    def norm(self, path: str, name: str) -> None:
        """Scale and, for a LayerNorm, bias."""
        self.plain(f"{path}/scale", f"{name}.weight")
        if f"{path}/bias" in self:
            self.plain(f"{path}/bias", f"{name}.bias")

    def linear(
        self,
        path: str,
        name: str,
        *,
        inputs: int = 1,
        rows: tuple[int, int] | None = None,
        bare: bool = False,
    ) -> None:
        """A torch Linear, [out, in] on disk.

        Args:
          path: of ours, with "kernel" and maybe "bias" below.
          name: of theirs, with ".weight" and maybe ".bias" below.
          inputs: how many leading axes of our kernel are contracted.
          rows: for a fused tensor, (first of our rows, number of all rows); None: all are ours.
          bare: whether `name` is the name of the weight itself, without ".weight".
        """
        kernel = self.shapes[f"{path}/kernel"]
        fan_in, out = math.prod(kernel[:inputs]), math.prod(kernel[inputs:])
        first, total = rows or (0, out)
        part = None if rows is None else (0, first, first + out)
        weight = name if bare else f"{name}.weight"
        self.add(f"{path}/kernel", Piece(weight, (total, fan_in), part, None, (1, 0)))
        if f"{path}/bias" in self:
            bias = Piece(f"{name}.bias", (total,), part)
            self.add(f"{path}/bias", bias)

    def rows(self, path: str, name: str, shape: Shape, first: int) -> None:
        """Maps one parameter to rows of a table, starting at `first`."""
        count = math.prod(self.shapes[path]) // math.prod(shape[1:])
        self.add(path, Piece(name, tuple(shape), (0, first, first + count)))

    def patch_embedding(self, path: str, name: str, patch: int, frames: int | None = None) -> None:
        """A torch Conv2d or (with `frames`) Conv3d over patches: ours is a product over (frames,
        rows, columns, channels)."""
        width = self.shapes[f"{path}/kernel"][1]
        if frames is None:
            shape, turn = (width, 3, patch, patch), (2, 3, 1, 0)
        else:
            shape, turn = (width, 3, frames, patch, patch), (2, 3, 4, 1, 0)
        self.add(f"{path}/kernel", Piece(f"{name}.weight", shape, turn=turn))
        if f"{path}/bias" in self:
            self.plain(f"{path}/bias", f"{name}.bias")

    def tensors(self) -> dict[str, Shape]:
        """Name -> shape of every tensor of the map."""
        return {piece.name: piece.shape for leaf in self.leaves.values() for piece in leaf.pieces}

    def missing(self) -> list[str]:
        """Parameters without a tensor, sorted; a complete map has none."""
        return sorted(set(self.shapes) - set(self.leaves))

    def assemble(self, name: str, parameter: Callable[[str], np.ndarray]) -> np.ndarray:
        """A whole tensor from our parameters, the inverse of `Leaf.read`.

        Args:
          name: of the tensor.
          parameter: gives our parameter of a path.
        """
        whole = None
        for path, leaf in self._users(name):
            value = parameter(path)
            for piece, part in zip(leaf.pieces, leaf.split(value), strict=True):
                if piece.name == name:
                    whole = np.empty(piece.shape, value.dtype) if whole is None else whole
                    piece.put_back(part, whole)
        return whole

    def _users(self, name: str) -> Sequence[tuple[str, Leaf]]:
        if not hasattr(self, "_by_name"):
            self._by_name: dict[str, list[tuple[str, Leaf]]] = {}
            for path, leaf in self.leaves.items():
                for used in dict.fromkeys(piece.name for piece in leaf.pieces):
                    self._by_name.setdefault(used, []).append((path, leaf))
        return self._by_name[name]
