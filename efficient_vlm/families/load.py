"""Weights of published checkpoints to parameters of ours."""

import math
import mmap
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from efficient_vlm.byte_bar import progress
from efficient_vlm.checkpoints.foreign import refuse_tensors
from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.checkpoints.safetensors_format import CheckpointError, show
from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.checkpoints.staging import StagingArea
from efficient_vlm.errors import UserError, short
from efficient_vlm.families.architecture import name_map
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.heads import equal
from efficient_vlm.nn.stack import STACKS

DTYPES = ("float32", "bfloat16", "float16")
# From here on NumPy asks for huge pages. In a virtual machine the system took 4.6 s of a processor
# to hand out 1 GB of them, 0.6 s in small pages, and decoding was not faster afterwards.
_HUGE = 1 << 22


class FamilyCheckpoint:
    """A published checkpoint whose tensors are read by the hub names of its family.

    Attributes:
      names: the name map for the spelling that the file uses.
      stored: hub name -> name in the file.
      carried: hub names of tensors that the model does not use.

    Raises:
      CheckpointError: tensors are missing, unknown, stored twice, quantised or of another shape.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family, config: Config, model: Any):
        self.checkpoint, self.family = checkpoint, family
        folder, tries = checkpoint.files[0].parent, []
        for spelling, renames in family.spellings.items():
            names = name_map(family, config, model, spelling)
            stored: dict[str, str] = {}
            twice = []
            for name in checkpoint.names:
                same = stored.setdefault(renamed(name, renames), name)
                twice += [] if same == name else [(same, name)]
            wanted = names.tensors()
            ignored = tuple(re.compile(pattern) for pattern in family.ignored)
            carried = {
                name
                for name in set(stored) - set(wanted)
                if any(pattern.fullmatch(name) for pattern in ignored)
            }
            carried |= self._tied_heads(names, stored, model)
            lost = sorted(set(wanted) - set(stored))
            unknown = sorted(set(stored) - set(wanted) - carried)
            shapes = ((checkpoint.shape(stored[n]), wanted[n]) for n in set(wanted) & set(stored))
            other = sum(tuple(actual) != tuple(shape) for actual, shape in shapes)
            score = (len(lost) + len(unknown), other)
            tries.append((score, lost, unknown, names, stored, carried, twice))
        _, lost, unknown, self.names, self.stored, carried, twice = min(tries, key=lambda t: t[0])
        self.carried = tuple(sorted(carried))
        if twice:
            raise CheckpointError(
                f"{folder}: {show(twice[0][0])} and {show(twice[0][1])} are one tensor, twice",
                fix="leave out one of them",
            )
        if lost or unknown:
            refuse_tensors(folder, unknown, config)
            if all(name.endswith("lm_head.weight") for name in (*lost, *unknown)):
                raise CheckpointError(
                    f"{folder}: the file has {'no' if lost else 'a'} {(lost or unknown)[0]}, "
                    f"config.json a {'' if lost else 'tied'} head",
                    fix=f"set tie_word_embeddings to {'true' if lost else 'false'} in config.json, "
                    "or download the weights again",
                )
            raise CheckpointError(
                f"{folder}: {len(lost)} tensors are missing"
                f"{_listed(lost)} and {len(unknown)} are unknown{_listed(unknown)}",
                allowed=f"the {len(self.names.tensors())} tensors of this {family.name} config",
                fix="use the config.json that came with these weights",
            )
        for name, shape in self.names.tensors().items():
            actual = checkpoint.shape(self.stored[name])
            kind = checkpoint.dtype(self.stored[name])
            if not jnp.issubdtype(kind, jnp.floating):
                raise CheckpointError(
                    f"{folder}: tensor {show(name)} holds {kind}, a quantised model",
                    allowed="floating-point weights",
                    fix="use the checkpoint it was quantised from, or dequantise this one",
                )
            if tuple(actual) != tuple(shape):
                raise CheckpointError(
                    f"{folder}: tensor {show(name)} has the shape {list(actual)}",
                    allowed=f"{list(shape)}, from config.json",
                    fix="use the config.json that came with these weights",
                )

    def _tied_heads(self, names: NameMap, stored: dict[str, str], model: Any) -> set[str]:
        """Heads in the file of a tied model that equal the table; one alone becomes the table."""
        table = names.leaves.get("language/embedding")
        if table is None or not model.decoder.get("tie_embeddings"):
            return set()
        heads, name = [n for n in stored if n.endswith("lm_head.weight")], table.pieces[0].name
        if heads and name not in stored:
            stored[name] = stored.pop(heads.pop())
        tied = stored.get(name)
        return {head for head in heads if tied and equal(self.checkpoint, stored[head], tied)}

    def tensor(self, name: str) -> np.ndarray:
        """A tensor by its hub name, memory-mapped."""
        return self.checkpoint.read(self.stored[name])

    def check_finite(self) -> None:
        """Raises CheckpointError if a tensor that the model uses holds NaN or infinity."""
        for name in self.names.tensors():
            self.checkpoint.read(self.stored[name], finite=True)
            self.checkpoint.release(self.stored[name])

    def paths(self) -> Iterator[str]:
        """Path of each parameter in split form, in the order of the file, with a progress bar."""

        def size(path: str) -> int:
            return math.prod(self.names.shapes[path]) * self.dtype(path).itemsize

        total = sum(map(size, self.names.leaves))
        yield from progress(self.names.leaves, size, total, "loading")

    def dtype(self, path: str) -> np.dtype:
        """The dtype of a parameter in the file."""
        return self.checkpoint.dtype(self.stored[self.names.leaves[path].pieces[0].name])

    def read(
        self,
        path: str,
        dtype: Any = None,
        out: np.ndarray | None = None,
        finite: bool = False,
    ) -> np.ndarray:
        """A parameter in split form, written into one array without copies in between.

        Args:
          path: of the parameter.
          dtype: to convert to; None for that of the file.
          out: to write into, see `names.Leaf.read`; None for a new array.
          finite: refuse NaN and infinity.

        Raises:
          CheckpointError: a value that is finite in the file is not finite in `dtype`, or is not
            finite at all.
        """

        def tensor(name: str) -> np.ndarray:
            return self.checkpoint.read(self.stored[name], finite=finite)

        kind, leaf = self.dtype(path), self.names.leaves[path]
        out = aligned(self.names.shapes[path], np.dtype(dtype or kind)) if out is None else out
        with np.errstate(over="ignore"):
            leaf.read(tensor, out)
        check_overflow(path, out, kind)
        for piece in leaf.pieces:
            self.checkpoint.release(self.stored[piece.name])
        return out


def known_dtype(name: str, value: Any) -> np.dtype:
    """The dtype of DTYPES that `value` names; UserError naming the argument for any other value."""
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if str(dtype) not in DTYPES:
        raise UserError(f"{name}: {short(value)}", allowed=", ".join(DTYPES))
    return dtype


def check_overflow(path: str, value: Any, before: Any, fix: str | None = None) -> None:
    """Raises CheckpointError if values overflowed when they were converted from dtype `before`."""
    finite = np.isfinite if isinstance(value, np.ndarray) else jnp.isfinite
    if may_overflow(value.dtype, before) and not finite(value).all():
        raise CheckpointError(
            f"{path}: has values beyond the range of {value.dtype}",
            fix=fix or f"load the model as {before}",
        )


def may_overflow(dtype: Any, before: Any) -> bool:
    """Whether a finite value of dtype `before` may be infinite in `dtype`."""
    return bool(jnp.finfo(dtype).max < jnp.finfo(before).max)


def renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    """The name after the first replacement whose pattern matches."""
    for pattern, replacement in renames:
        changed, count = re.subn(pattern, replacement, name)
        if count:
            return changed
    return name


def _listed(names: list[str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > 4 else ""
    return f" ({', '.join(map(show, names[:4]))}{more})"


def load_parameters(
    source: FamilyCheckpoint,
    *,
    dtype: Any = jnp.float32,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> dict[str, Any]:
    """Parameters in split form (`nn.stack.unstack`), each placed on its device at once.

    Parameters are converted one at a time from the mapped file into one array. On a CPU that array
    is the parameter; for other devices the host holds one array at a time.

    Args:
      source: the checkpoint.
      dtype: of the parameters; None for that of the file.
      sharding: (path, shape) -> sharding; None for the default device.
    """
    placed = {}
    for path in source.paths():
        value = source.read(path, dtype)
        if sharding is None:
            placed[path] = jax.device_put(value)
        else:
            placed[path] = jax.make_array_from_callback(
                value.shape, sharding(path, value.shape), lambda index, v=value: v[index]
            )
    return unflatten_dict(placed, sep="/")


def stacked(
    source: FamilyCheckpoint, dtype: Any = None, stage: StagingArea | None = None
) -> dict[str, Any]:
    """Parameters on the host with the layers of each stack on a leading axis, for training.

    Each stack is allocated once and filled layer by layer.

    Args:
      source: the checkpoint.
      dtype: to convert to; None for that of the file.
      stage: keeps them on the disk, so that a killed import resumes; None for memory.
    """
    groups: dict[str, Any] = {}
    for path in source.paths():
        prefix, layer, rest = in_stack(path)
        whole = path if layer is None else f"{prefix}/{rest}"
        kind = np.dtype(dtype or source.dtype(path))
        if whole not in groups:
            layers = () if layer is None else (source.names.count(prefix),)
            shape = (*layers, *source.names.shapes[path])
            groups[whole] = stage.array(whole, shape, kind) if stage else np.empty(shape, kind)
        if groups[whole].dtype != kind:
            raise CheckpointError(
                f"{path}: stored as {kind}, but other layers as {groups[whole].dtype}",
                fix="convert the checkpoint to one dtype first",
            )
        if stage and stage.is_done(path):
            continue
        target = groups[whole] if layer is None else groups[whole][layer : layer + 1]
        source.read(path, out=target.reshape(source.names.shapes[path]))
        if stage:
            stage.done(path, whole, groups[whole])
    return unflatten_dict(groups, sep="/")


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array whose start is aligned: JAX takes it on a CPU without a copy."""
    count = math.prod(shape) * dtype.itemsize
    if count >= _HUGE:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return np.frombuffer(mmap.mmap(-1, count, flags=private), dtype).reshape(shape)
    room = np.empty(count + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + count].view(dtype).reshape(shape)


def in_stack(path: str) -> tuple[str, int | None, str]:
    """Prefix of the stack, layer and rest of a path in split form; layer None outside of stacks."""
    parts = path.split("/")
    for i, name in enumerate(parts):
        if name in STACKS:
            return "/".join(parts[: i + 1]), int(parts[i + 1]), "/".join(parts[i + 2 :])
    return path, None, ""
