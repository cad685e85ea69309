"""The weights of a model in the forms they are used in, read by threads."""

import functools
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from efficient_vlm.families.load import FamilyCheckpoint, aligned, may_overflow
from efficient_vlm.nn.fuse import fuse, groups, unfuse
from efficient_vlm.nn.linear import Joined

DECODER = "language"  # Name of its parameters at the top of the tree.
# Reading is limited by memory, not by arithmetic.
_MOST_THREADS = 4


class FusedReader:
    """Reads a checkpoint on a CPU straight into the form of `nn.fuse`, by threads.

    There is never a second copy of a weight. The caller can trace programs meanwhile, and use what
    the encoder needs, which is read first, while the rest is still being read.

    Args:
      source: the checkpoint.
      dtype: of the parameters; None for those of the file.
      check: refuse NaN and infinity.

    Attributes:
      may_fail: whether a value can be refused while it is read.
    """

    def __init__(self, source: FamilyCheckpoint, dtype: Any = None, check: bool = False):
        kinds = {path: np.dtype(dtype or source.dtype(path)) for path in source.names.leaves}
        stored = {source.dtype(path) for path in kinds}
        narrower = dtype is not None and any(may_overflow(dtype, kind) for kind in stored)
        self.may_fail = check or narrower
        self._source, self._flat, targets = source, {}, {}
        together = _of_one_dtype(kinds)
        for path in kinds.keys() - {part for parts in together.values() for part in parts}:
            self._flat[path] = targets[path] = aligned(source.names.shapes[path], kinds[path])
        for whole, parts in together.items():
            self._flat[whole] = self._side_by_side(parts, kinds[whole], targets)

        def read(path: str) -> None:
            source.read(path, dtype, targets[path], finite=check)

        self._pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
        order = sorted(kinds, key=lambda path: path.startswith(f"{DECODER}/"))
        self._reads = {path: self._pool.submit(read, path) for path in order}

    def _side_by_side(self, parts: tuple[str, ...], kind: np.dtype, targets: dict[str, Any]) -> Any:
        """Room for a group of parameters; adds the room of each part to `targets`."""
        shapes = [self._source.names.shapes[part] for part in parts]
        kernel = parts[0].endswith("kernel")
        inputs, outputs = shapes[0][:kernel], tuple(shape[kernel:] for shape in shapes)
        widths = [math.prod(shape) for shape in outputs]
        matrix = aligned((*inputs, sum(widths)), kind)
        targets |= zip(parts, np.split(matrix, np.cumsum(widths)[:-1], axis=-1), strict=True)
        return Joined(matrix, outputs) if kernel else matrix

    @property
    def abstract(self) -> Any:
        """Shapes and dtypes of the parameters."""
        shape = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
        return unflatten_dict(shape(self._flat), sep="/")

    def part(self, name: str) -> Any:
        """The parameters under one name at the top, once these are read; errors as in `result`."""
        mine = {path for path in self._reads if path.split("/")[0] == name}
        for path in mine:
            self._reads[path].result()
        self._flat |= jax.device_put(
            {path: self._flat[path] for path in mine if path in self._flat}
        )
        return unflatten_dict(self._flat, sep="/")[name]

    def result(self) -> Any:
        """The parameters, once all are read.

        Raises:
          CheckpointError: see `FamilyCheckpoint.read`.
        """
        try:
            for path in self._source.paths():
                self._reads[path].result()
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._flat = jax.device_put(self._flat)
        return unflatten_dict(self._flat, sep="/")


def _of_one_dtype(kinds: dict[str, np.dtype]) -> dict[str, tuple[str, ...]]:
    """`groups` without those whose parts have several dtypes, which each part keeps."""
    mixed = {
        f"{part.rpartition('/')[0]}/kernel"
        for parts in groups(kinds).values()
        if len({kinds[part] for part in parts}) > 1
        for part in parts
    }
    return groups(kinds.keys() - mixed)


class Arriving(Mapping):
    """The parameters of a model by their names at the top; each is waited for when it is used."""

    def __init__(self, reader: FusedReader):
        self._reader, self._names = reader, tuple(reader.abstract)

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._reader.part(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Weights:
    """The parameters of a model in two forms, each made when it is first asked for.

    Args:
      split: one array for each parameter, in split or stacked form; or None.
      reader: who is reading them; then the first use waits for it.
    """

    def __init__(self, split: Any = None, reader: FusedReader | None = None):
        self.reader = reader
        if reader is None:
            self.split = split

    @functools.cached_property
    def split(self) -> Any:
        """One array for each parameter; of fused weights that are in use, a copy."""
        return unfuse(self.__dict__["fused"] if "fused" in self.__dict__ else self._read())

    @functools.cached_property
    def fused(self) -> Any:
        """As `generate` uses them: on a CPU products of one input are one (`nn.fuse`)."""
        if self.reader is not None:
            return self._read()
        leaf = jax.tree.leaves(self.split)[0]
        # A second copy of most weights, worth it where reading them is all that decoding does.
        on_cpu = all(device.platform == "cpu" for device in jnp.asarray(leaf).devices())
        return fuse(self.split) if on_cpu else self.split

    def finish(self) -> None:
        """Waits until all is read."""
        _ = self.fused

    def _read(self) -> Any:
        params = self.reader.result()
        self.reader = None
        return params
