"""`efficient-vlm audit sharding`: where each parameter of a model lies on a mesh, and what is left
on one device; nothing is computed and no device needed."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from rich import box
from rich.console import Console
from rich.table import Table

from efficient_vlm import sharding
from efficient_vlm.audit.subject import read_subject
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.interop.load import boxed_parameters

_DEFAULT = "fsdp:8"


@dataclasses.dataclass
class Row:
    """One parameter.

    Attributes:
      logical, mesh: for each axis its name, and the axes of the mesh that it is cut over, or None.
      bytes, bytes_per_device: in the dtype that it is stored in.
      note: which axis the mesh does not divide, or None.
    """

    parameter: str
    shape: tuple[int, ...]
    logical: tuple[str | None, ...]
    mesh: tuple[tuple[str, ...] | None, ...]
    bytes: int
    bytes_per_device: int
    note: str | None


def audit_sharding(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """`efficient-vlm audit sharding`.

    Args:
      args: preset or config; mesh, json.
      overrides: "section.field=value" of the config.
    """
    sizes = parse_mesh(args.mesh or _DEFAULT)
    subject = read_subject(args, overrides)
    rows = table(subject.model(), sizes)
    if args.json:
        found = {"mesh": sizes, "rows": [dataclasses.asdict(row) for row in rows]}
        print(json.dumps(found | {"totals": totals(rows)}, indent=1))
    else:
        _show(subject.name, sizes, rows)
    return 0


def parse_mesh(text: str) -> dict[str, int]:
    """ "fsdp:64,tensor:4" -> sizes of all axes; raises UserError."""
    sizes = dict.fromkeys(sharding.AXES, 1)
    for part in text.split(","):
        name, colon, size = part.partition(":")
        if name not in sizes:
            raise unknown("--mesh", name, sharding.AXES)
        if not colon or not size.isdigit() or int(size) < 1:
            raise UserError(
                f"--mesh: {part!r}", allowed="AXIS:DEVICES", fix="--mesh=fsdp:64,tensor:4"
            )
        sizes[name] = int(size)
    return sizes


def table(model: Any, sizes: Mapping[str, int]) -> list[Row]:
    """A row for each parameter.

    Args:
      model: a `VisionLanguageModel`.
      sizes: of the mesh.
    """
    boxed = boxed_parameters(model)
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=sharding.is_box)
    return [_row(sharding.path_of(path), leaf, sizes) for path, leaf in leaves]


def _row(name: str, leaf: Any, sizes: Mapping[str, int]) -> Row:
    value = nn.unbox(leaf)
    names = sharding.logical_axes(leaf)
    spec = sharding.spec_of(names, value.shape, sizes, what=name)
    cut = [((part,) if isinstance(part, str) else part) for part in spec]
    cut += [None] * (value.ndim - len(cut))
    whole = value.size * value.dtype.itemsize
    parts = math.prod(sizes[axis] for axes in cut if axes for axis in axes)
    missed = [
        f"{axis} {size} by {'x'.join(rule)}"
        for axis, size, axes in zip(names, value.shape, cut, strict=True)
        if axes is None
        and (rule := [a for a in sharding.RULES.get(axis or "", ()) if sizes[a] > 1])
    ]
    note = f"not divided: {', '.join(missed)}" if missed else None
    return Row(name, value.shape, names, tuple(cut), whole, whole // parts, note)


def totals(rows: Sequence[Row]) -> dict[str, int]:
    """Bytes of all parameters, and of those on one device."""
    return {
        "bytes": sum(row.bytes for row in rows),
        "bytes_per_device": sum(row.bytes_per_device for row in rows),
    }


def _show(name: str, sizes: Mapping[str, int], rows: Sequence[Row]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("parameter", "shape", "logical axes", "mesh axes"):
        shown.add_column(column)
    shown.add_column("per device", justify="right")
    shown.add_column("")
    for row in rows:
        shown.add_row(
            row.parameter,
            " x ".join(map(str, row.shape)),
            ", ".join(axis or "-" for axis in row.logical),
            ", ".join("+".join(axes) if axes else "-" for axes in row.mesh),
            _spell(row.bytes_per_device),
            row.note or "",
        )
    console.print(shown)
    mesh = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
    both = totals(rows)
    console.print(
        f"{name} on {mesh}: {_spell(both['bytes_per_device'])} of {_spell(both['bytes'])} of "
        "parameters on each device. Moments of the optimizer lie where their parameters do, rows "
        f"of a batch over {', '.join(sharding.BATCH)}."
    )


def _spell(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
