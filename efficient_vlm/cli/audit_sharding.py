"""`efficient-vlm audit sharding`: where everything of a model lies on a mesh: parameters and their
moments, activations, the cache. Nothing is computed and no device needed."""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from rich import box
from rich.console import Console
from rich.table import Table

from efficient_vlm import sharding
from efficient_vlm.cli.methods import Chosen, one_method
from efficient_vlm.cli.subject import Subject
from efficient_vlm.costs.compiled.options import batches_of, parse_mesh
from efficient_vlm.costs.match import Target
from efficient_vlm.errors import UserError
from efficient_vlm.models.init import boxed_parameters

# Logical axes of what goes from layer to layer, and of what is inside a feed-forward layer.
STREAM, WIDE = ("batch", "tokens", None), ("batch", "tokens", "activation_mlp")


@dataclasses.dataclass
class Row:
    """One parameter, or an array that is held in place (`kind`).

    Attributes:
      kind: "parameter", "activation" or "cache".
      logical, mesh: for each axis its name, and the axes of the mesh that it is cut over, or None.
      bytes, bytes_per_device: in the dtype that it is stored in.
      moment_bytes_per_device: of a parameter's two moments (AdamW) in float32, which lie where it
        does.
      note: which axis the mesh does not divide, or None.
    """

    kind: str
    parameter: str
    shape: tuple[int, ...]
    logical: tuple[str | None, ...]
    mesh: tuple[tuple[str, ...] | None, ...]
    bytes: int
    bytes_per_device: int
    moment_bytes_per_device: int
    note: str | None


def audit_sharding(
    subject: Subject,
    chosen: Sequence[Chosen],
    target: Target | None,
    *,
    mesh: str,
    batch: str | None = None,
    as_json: bool = False,
) -> int:
    """`efficient-vlm audit sharding`.

    Args:
      subject: what is audited.
      chosen, target: the one method, and what it is matched to, see `methods.make_entry`.
      mesh: such as "fsdp:16,tensor:4".
      batch: pictures on all devices together; None for one for each part of the rows.
      as_json: print as JSON.
    """
    sizes = parse_mesh(mesh)
    rows_of_batch = math.prod(sizes[axis] for axis in sharding.BATCH)
    if batch:
        rows_of_batch, *more = batches_of(batch, 1)
        if more:
            raise UserError(f"--batch={batch}: several", fix="one number")
    model = subject.model(one_method(subject, chosen, target))
    pictures = dict(pictures=subject.images, pooled=subject.pooled)
    rows = table(model, sizes, **pictures) + held(subject, model, sizes, rows_of_batch)
    if as_json:
        result = {"mesh": sizes, "rows": [dataclasses.asdict(row) for row in rows]}
        print(json.dumps(result | {"totals": totals(rows)}, indent=1))
    else:
        _show(subject.name, sizes, rows)
    return 0


def held(subject: Subject, model: Any, sizes: Mapping[str, int], batch: int) -> list[Row]:
    """A row for each kind of activation that is held in place, and for the cache of a layer.

    Args:
      subject: see `cli.subject`.
      model: it with a method.
      sizes: of the mesh.
      batch: pictures, each with one question, on all devices together.
    """
    dtype, decoder = jnp.dtype(model.dtype), model.make_decoder()
    tokens = subject.ledger(model.compressor).entering + subject.text_tokens
    arrays = []
    if model.encoder is not None:
        vit = model.make_encoder()
        shape = (batch * subject.images, math.prod(vit.grid) + vit.class_token)
        arrays += [("activation", "encoder, between layers", STREAM, (*shape, vit.width))]
        arrays += [("activation", "encoder, inside a layer", WIDE, (*shape, vit.mlp_dim))]
    shape = (batch, tokens)
    arrays += [("activation", "decoder, between layers", STREAM, (*shape, decoder.width))]
    if decoder.moe is None:
        arrays += [("activation", "decoder, inside a layer", WIDE, (*shape, decoder.mlp_dim))]
    room = (batch, decoder.kv_heads, tokens + subject.new_tokens, decoder.dim)
    layers = f"keys or values of one of {decoder.num_layers} layers"
    arrays += [("cache", layers, sharding.CACHE_AXES, room)]
    return [
        _row(kind, name, names, jax.ShapeDtypeStruct(shape, dtype), sizes)
        for kind, name, names, shape in arrays
    ]


def table(model: Any, sizes: Mapping[str, int], **inputs: Any) -> list[Row]:
    """A row for each parameter.

    Args:
      model: a `VisionLanguageModel`.
      sizes: of the mesh.
      **inputs: numbers of pictures and more that the model may refuse, see `models.init`.
    """
    boxed = boxed_parameters(model, **inputs)
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=sharding.is_box)
    return [
        _row(
            *("parameter", sharding.path_of(path), sharding.logical_axes(leaf)),
            *(nn.unbox(leaf), sizes),
        )
        for path, leaf in leaves
    ]


def _row(kind: str, name: str, names: Sequence, value: Any, sizes: Mapping[str, int]) -> Row:
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
    moments = 8 * value.size // parts if kind == "parameter" else 0
    where = (tuple(names), tuple(cut))
    return Row(kind, name, value.shape, *where, whole, whole // parts, moments, note)


def totals(rows: Sequence[Row]) -> dict[str, int]:
    """Bytes of all parameters, of those on one device, and of their moments there."""
    rows = [row for row in rows if row.kind == "parameter"]
    names = ("bytes", "bytes_per_device", "moment_bytes_per_device")
    return {name: sum(getattr(row, name) for row in rows) for name in names}


def _show(name: str, sizes: Mapping[str, int], rows: Sequence[Row]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("parameter, activation or cache", "shape", "logical axes", "mesh axes"):
        shown.add_column(column)
    shown.add_column("per device", justify="right")
    shown.add_column("moments", justify="right")
    shown.add_column("")
    for row in rows:
        shown.add_row(
            row.parameter,
            " x ".join(map(str, row.shape)),
            ", ".join(axis or "-" for axis in row.logical),
            ", ".join("+".join(axes) if axes else "-" for axes in row.mesh),
            _spell(row.bytes_per_device),
            _spell(row.moment_bytes_per_device) if row.moment_bytes_per_device else "",
            row.note or "",
        )
    console.print(shown)
    mesh = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
    both = totals(rows)
    console.print(
        f"{name} on {mesh}: {_spell(both['bytes_per_device'])} of {_spell(both['bytes'])} of "
        f"parameters on each device, {_spell(both['moment_bytes_per_device'])} of moments (AdamW, "
        f"float32). Rows of a batch lie over {', '.join(sharding.BATCH)}."
    )


def _spell(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
