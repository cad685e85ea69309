"""Meshes of devices, and how arrays are sharded over them: one table of rules for logical axes.

Every parameter names its axes ("embed", "heads", ...), the rules map each of them to axes of the
mesh, and `jax.jit` does the rest. An axis whose size the mesh does not divide is not sharded; the
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

from efficient_vlm import checks
from efficient_vlm.errors import UserError, short

__all__ = [
    "AXES",
    "BATCH",
    "CACHE_AXES",
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
# Axes of the mesh over which the rows of a batch are sharded: all but those that shard a layer.
BATCH = ("data", "fsdp", "expert")
# Logical axes of the keys and values of one layer in the cache: rows, heads, slots, head dim.
CACHE_AXES = ("batch", "kv_heads", None, None)
# Logical axis -> axes of the mesh it is sharded over; axes without a rule are replicated.
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
    """Number of devices along each axis of the mesh.

    Attributes:
      data: copies of the model, each with its own rows; -1 for all devices that are left.
      fsdp: devices that share parameters, optimizer state and rows (ZeRO-3, arXiv 1910.02054).
      expert: devices that share experts and rows.
      sequence: devices that share the tokens of a row; attention shares its heads instead (arXiv
        2309.14509). For long visual inputs.
      tensor: devices that share the width of each layer (arXiv 1909.08053).
      zero: whether the optimizer's moments are sharded over `data` as well (ZeRO-1).
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
          UserError: a size below 1, or sizes whose product is not `devices`.
        """
        sizes = {name: getattr(self, name) for name in AXES}
        for name, size in sizes.items():
            if name == "data" and size == -1:
                continue
            fix = "-1 takes the devices that are left" if name == "data" else None
            checks.whole(f"train.mesh.{name}", size, fix=fix)
        rest = math.prod(size for size in sizes.values() if size > 0)
        if sizes["data"] == -1:
            sizes["data"] = max(devices // rest, 1)
        if (product := math.prod(sizes.values())) != devices:
            text = " x ".join(f"{name} {size}" for name, size in sizes.items())
            raise UserError(
                f"train.mesh: {text} = {product} devices, there are {devices}",
                fix=f"choose sizes with product {devices}; train.mesh.data=-1 takes the rest",
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh; devices along `tensor`, the last axis, are nearest to each other.

    Args:
      config: sizes of the axes.
      devices: of the mesh; None for all devices of this job.

    Raises:
      UserError: see `MeshConfig.sizes`.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    # A mesh axis may split a physical axis of the torus: 64 x 4 on 16 x 16 chips.
    placed = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def active(mesh: Mesh | None) -> Iterator[None]:
    """Code traced inside is for this mesh: activations are constrained, kernels run on parts.

    None means one device, without either.
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
    """The sharding of an array with logical axes.

    Args:
      names: of its axes; None for a replicated axis.
      shape: of the array; an axis that the mesh does not divide is not sharded.
      sizes: of the axes of the mesh.
      rules: see RULES.
      what: for messages.

    Raises:
      UserError: two of its axes would be sharded over the same axis of the mesh.
    """
    taken: dict[str, str] = {}
    parts = []
    for name, size in zip(names, shape, strict=True):
        axes = tuple(axis for axis in rules.get(name or "", ()) if sizes.get(axis, 1) > 1)
        for axis in axes:
            if axis in taken:
                raise UserError(
                    f"sharding: axes {short(taken[axis])} and {short(name)} of {what} are both "
                    f"sharded over {short(axis)}",
                    fix="change the rule of one of the two",
                )
            taken[axis] = name or ""
        whole = axes and size % math.prod(sizes[axis] for axis in axes) == 0
        parts.append((axes[0] if len(axes) == 1 else axes) if whole else None)
    return trimmed(parts)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """x, sharded by its logical axes on the current mesh; unchanged without a mesh."""
    sizes = auto_axes()
    if not sizes:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(names, x.shape, sizes))


def replicated(tree: Any) -> Any:
    """Arrays replicated on the current mesh, so that each process can read all of them."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def auto_axes() -> dict[str, int]:
    """Name -> size of the current mesh's automatic axes with more than one device."""
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
    """A specification without trailing None, as JAX returns them: others would compile again."""
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over BATCH."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def row_parts(mesh: Mesh) -> int:
    """Number of parts that the rows of a batch are split into."""
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

    They need not be contiguous: the chips of one host are neighbours on the torus of a pod, but not
    in the order of a mesh. Processes whose devices share rows, because a layer's width is sharded
    over both, read the same rows.

    Args:
      mesh: see `make_mesh`.
      rows: of a batch; divided over the mesh, see `check_batch`.
      process: its number; None for this one.
    """
    blocks = _own_blocks(mesh, jax.process_index() if process is None else process)
    size = rows // row_parts(mesh)
    return np.concatenate([np.arange(block * size, (block + 1) * size) for block in blocks])


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch on the mesh, each device with its own rows.

    Args:
      batch: arrays of the rows of this process, see `own_rows`; with one process, all. A tree.
      mesh: see `make_mesh`.
    """
    target = batch_sharding(mesh)
    blocks = _own_blocks(mesh, jax.process_index())
    count = row_parts(mesh)

    def spread(x: np.ndarray) -> jax.Array:
        size = len(x) // len(blocks)
        # First row of a block in the whole batch -> its first row in the rows of this process.
        local = {block * size: number * size for number, block in enumerate(blocks)}

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first = local[index[0].start or 0]
            return x[first : first + size]

        return jax.make_array_from_callback((size * count, *x.shape[1:]), target, part)

    return jax.tree.map(lambda x: spread(np.asarray(x)), batch)


@functools.cache
def _own_blocks(mesh: Mesh, process: int) -> tuple[int, ...]:
    """Numbers of the equal parts of a batch that the devices of a process have."""
    count = row_parts(mesh)
    indices = batch_sharding(mesh).devices_indices_map((count,))
    mine = (index for device, (index,) in indices.items() if device.process_index == process)
    return tuple(sorted({index.start or 0 for index in mine}))
