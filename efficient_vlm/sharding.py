"""Meshes of devices, and where each array lies on one: one table of rules for logical axes.

Every parameter names its axes ("embed", "heads", ...), the rules say over which axes of the mesh an
axis is cut, and `jax.jit` (the pjit of old) does the rest. What does not divide is not cut, and the
table of `efficient-vlm audit sharding` shows it.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from efficient_vlm.errors import UserError

__all__ = [
    "AXES",
    "BATCH",
    "RULES",
    "MeshConfig",
    "active",
    "auto_axes",
    "batch_sharding",
    "check_batch",
    "constrain",
    "global_batch",
    "is_box",
    "logical_axes",
    "make_mesh",
    "own_rows",
    "param_shardings",
    "path_of",
    "replicated",
    "row_parts",
    "spec_of",
    "trimmed",
]

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
# Axes of the mesh over which the rows of a batch are cut: all but those that cut a layer.
BATCH = ("data", "fsdp", "expert")
# Logical axis -> axes of the mesh, tried in order; what is not named is on every device.
RULES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "experts": ("expert",),
    "expert_mlp": ("tensor",),
    # Of activations.
    "batch": BATCH,
    "tokens": ("sequence",),
    "activation_mlp": ("tensor",),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices share what.

    Attributes:
      data: copies of the model, each with rows of its own; -1 for all devices that are left.
      fsdp: devices over which parameters and optimizer state are cut, and rows as well (ZeRO-3,
        arXiv 1910.02054).
      expert: devices over which experts are cut, and rows as well.
      sequence: devices over which the tokens of a row are cut, but for attention, which cuts heads
        in their place (arXiv 2309.14509); for long visual inputs.
      tensor: devices over which the width of each layer is cut (arXiv 1909.08053).
      zero: whether moments of the optimizer are cut over `data`, too (ZeRO-1).
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    zero: bool = False

    def sizes(self, devices: int) -> dict[str, int]:
        """Axis -> devices along it.

        Raises:
          UserError: sizes that are no numbers of devices, or do not give `devices`.
        """
        sizes = {name: getattr(self, name) for name in AXES}
        for name, size in sizes.items():
            if size < 1 and not (name == "data" and size == -1):
                raise UserError(f"train.mesh.{name}: {size}", allowed="1 or more; data also -1")
        rest = math.prod(size for size in sizes.values() if size > 0)
        if sizes["data"] == -1:
            sizes["data"] = max(devices // rest, 1)
        if (product := math.prod(sizes.values())) != devices:
            text = " x ".join(f"{name} {size}" for name, size in sizes.items())
            raise UserError(
                f"train.mesh: {text} = {product} devices, there are {devices}",
                fix="sizes whose product that is; train.mesh.data=-1 takes the rest",
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh; devices that are near each other along `tensor`, the last axis.

    Args:
      config: sizes of the axes.
      devices: all of this job's, unless given.

    Raises:
      UserError: see `MeshConfig.sizes`.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    # An axis may be part of one of the torus: 64 x 4 on 16 x 16 chips.
    placed = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def active(mesh: Mesh | None) -> Iterator[None]:
    """What is traced inside is for this mesh: constraints of activations, kernels of parts.

    None is one device, without either.
    """
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def spec_of(
    names: Sequence[str | None],
    shape: Sequence[int],
    sizes: Mapping[str, int],
    rules: Mapping[str, Sequence[str]] = RULES,
    *,
    what: str = "an array",
) -> PartitionSpec:
    """Where an array of logical axes lies.

    Args:
      names: of its axes; None is on every device.
      shape: of the array; an axis that its axes of the mesh do not divide is not cut.
      sizes: of the mesh.
      rules: see RULES.
      what: for messages.

    Raises:
      UserError: two of its axes would be cut over the same axis of the mesh.
    """
    taken: dict[str, str] = {}
    parts = []
    for name, size in zip(names, shape, strict=True):
        axes = tuple(axis for axis in rules.get(name or "", ()) if sizes.get(axis, 1) > 1)
        for axis in axes:
            if axis in taken:
                raise UserError(
                    f"sharding: axes {taken[axis]!r} and {name!r} of {what} are both cut over "
                    f"{axis!r}",
                    fix="other rules for one of the two",
                )
            taken[axis] = name or ""
        whole = axes and size % math.prod(sizes[axis] for axis in axes) == 0
        parts.append((axes[0] if len(axes) == 1 else axes) if whole else None)
    return trimmed(parts)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """x, lying where its logical axes say on the mesh that is set; without one as it is."""
    sizes = auto_axes()
    if not sizes:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(names, x.shape, sizes))


def replicated(tree: Any) -> Any:
    """Arrays whole on every device of the mesh that is set: each process can read its own."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def auto_axes() -> dict[str, int]:
    """Axes of the mesh that is set which the compiler may cut over, and how long they are."""
    mesh = jax.sharding.get_abstract_mesh()
    each = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in each if kind == AxisType.Auto and size > 1}


def is_box(leaf: Any) -> bool:
    """Whether a leaf still carries its logical axes."""
    return isinstance(leaf, nn.Partitioned)


def logical_axes(leaf: Any) -> tuple[str | None, ...]:
    """The names of a parameter's axes, None for those without."""
    return tuple(leaf.names) if is_box(leaf) else (None,) * leaf.ndim


def path_of(path: Any) -> str:
    """ "a/b/c" of a key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` like the parameters.

    Args:
      boxed: parameters, or their shapes, with their logical axes.
      mesh: see `make_mesh`.
    """

    def place(path, leaf):
        names, shape = logical_axes(leaf), nn.unbox(leaf).shape
        return NamedSharding(mesh, spec_of(names, shape, mesh.shape, what=path_of(path)))

    return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=is_box)


def trimmed(parts: list[Any]) -> PartitionSpec:
    """As JAX gives specifications back, without a tail of None: others are compiled for anew."""
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over BATCH."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def row_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch(rows: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError for a batch whose rows do not divide over the mesh."""
    parts = accumulate * row_parts(mesh)
    if rows % parts:
        raise UserError(
            f"batch (data.batch_size, --batch): {rows} rows over {parts} parts "
            "(data x fsdp x expert x accumulate)",
            allowed=f"multiples of {parts}",
        )


def own_rows(mesh: Mesh, rows: int, process: int | None = None) -> np.ndarray:
    """int [n], the rows of each batch that a process reads: those of its devices, in order.

    They may stand here and there: the chips of a host of a pod are neighbours on its torus, but not
    in the order of a mesh. Processes whose devices share rows, because a layer's width is cut over
    both, read the same.

    Args:
      mesh: see `make_mesh`.
      rows: of a batch; divided over the mesh, see `check_batch`.
      process: its number; None for this one.
    """
    blocks = _own_blocks(mesh, jax.process_index() if process is None else process)
    size = rows // row_parts(mesh)
    return np.concatenate([np.arange(block * size, (block + 1) * size) for block in blocks])


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch on the mesh, each device with rows of its own.

    Args:
      batch: arrays of the rows of this process, see `own_rows`; with one process, all. A tree.
      mesh: see `make_mesh`.
    """
    lies = batch_sharding(mesh)
    blocks = _own_blocks(mesh, jax.process_index())
    count = row_parts(mesh)

    def spread(x: np.ndarray) -> jax.Array:
        size = len(x) // len(blocks)
        places = {block * size: place * size for place, block in enumerate(blocks)}

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first = places[index[0].start or 0]
            return x[first : first + size]

        return jax.make_array_from_callback((size * count, *x.shape[1:]), lies, part)

    return jax.tree.map(lambda x: spread(np.asarray(x)), batch)


@functools.cache
def _own_blocks(mesh: Mesh, process: int) -> tuple[int, ...]:
    """Which of the equal parts of a batch the devices of a process have."""
    count = row_parts(mesh)
    where = batch_sharding(mesh).devices_indices_map((count,))
    mine = (index for device, (index,) in where.items() if device.process_index == process)
    return tuple(sorted({index.start or 0 for index in mine}))
