"""What a compiled program costs one device: read from its text, loops counted as often as they run.

`Compiled.cost_analysis` counts the body of a loop once, whatever its length, and kernels not at
all: a training step of thirty layers seems to have the FLOPs of one. Here every instruction counts
as often as the loops around it turn, and kernels what they say of themselves.

Limits: a loop whose length is in the data turns as often as the code says that it usually does
(`kernels.hints`), or once (`unknown_loops` says how many of these there are); bytes are those of
whole operands and results outside of fast memory, so what a cache saves is not seen.
"""

import collections
import dataclasses
import json
import math
import re

from efficient_vlm.costs.compiled import hlo_products
from efficient_vlm.costs.compiled.hlo_text import (
    SHAPE,
    Instruction,
    Module,
    array_dims,
    size_of,
    through,
)
from efficient_vlm.kernels import hints

__all__ = ["Costs", "costs"]

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# Neither read nor write memory themselves, or only what the computation does that they call.
_FREE = {
    *("async-start", "async-update"),
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "iota", "domain", "opt-barrier"),
}
# Read of their first operand only what they give out.
_PART = {"dynamic-slice", "slice", "gather"}
# Write into their first operand, in place: the operand that says what.
_INTO = {"dynamic-update-slice": 1, "scatter": 2}
# How kernels of ours are called in programs for TPUs and for GPUs.
_KERNELS = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)"')


@dataclasses.dataclass
class Costs:
    """Of one run of a program on one device.

    Attributes:
      flops: of matrix products and convolutions, 2 per multiply-add, and of kernels.
      hbm_bytes: read and written outside of fast memory.
      collective_bytes: kind -> bytes that the device sends: of what is gathered all parts but its
        own, twice the size of what is reduced everywhere (a ring), once the size of the rest.
      kernels: name -> calls.
      unknown_loops: loops whose number of turns nothing says; they count once.
    """

    flops: float = 0
    hbm_bytes: float = 0
    collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0


def costs(text: str) -> Costs:
    """The costs of a compiled program.

    Args:
      text: from `jax.stages.Compiled.as_text()`.
    """
    return _Program(Module(text)).costs()


class _Program:
    def __init__(self, module: Module):
        self.computations, self.entry, self.module = module.computations, module.entry, module
        self.total, self.sent = Costs(), collections.Counter()

    def costs(self) -> Costs:
        self._add(self.entry, 1, outside=True)
        self.total.collective_bytes = dict(sorted(self.sent.items()))
        return self.total

    def _add(self, name: str, times: float, *, outside: bool) -> None:
        """Adds a computation that runs `times` times; only one `outside` of a fusion moves data."""
        scope = self.computations[name]
        goes_on = not outside and _goes_on(scope)
        for one in scope.values():
            self._products(scope, one, times)
            if (kind := _collective(one)) and not goes_on:
                kind, sent = self._sent(scope, one, kind, outside)
                self.sent[kind] += times * sent
                if not outside and _chained(one):
                    # A fusion that is nothing but the start of one moves what that moves.
                    self.total.hbm_bytes += times * self._moved(scope, one)
            if outside and one.opcode not in _FREE and not one.opcode.endswith("-done"):
                self.total.hbm_bytes += times * self._moved(scope, one)
            if one.opcode == "while":
                turns = self.module.turns(scope, one)
                turns = hints.turns_of(one.rest) if turns is None else turns
                self.total.unknown_loops += turns is None
                body = one.attribute("body")
                self._add(body, times * (1 if turns is None else turns), outside=outside)
            elif one.opcode == "conditional":
                self._add(self._dearest(one), times, outside=outside)
            elif called := one.attribute("calls"):
                # A fusion, or a part that runs beside the rest.
                self._add(called, times, outside=outside and one.opcode != "fusion")
            elif one.opcode == "call":
                self._add(one.attribute("to_apply"), times, outside=outside)

    # --- loops and branches ------------------------------------------------------------------

    def _dearest(self, one) -> str:
        names = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
        branches = (
            re.findall(r"[\w.\-]+", names[1])
            if names
            else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.rest)
        )

        def work(name: str) -> float:
            apart = _Program(self.module)
            apart._add(name, 1, outside=False)
            return apart.total.flops

        return max(branches, key=work)

    # --- products ----------------------------------------------------------------------------

    def _products(self, scope, one, times) -> None:
        if one.opcode == "dot":
            self.total.flops += times * hlo_products.dot(scope, one)
        elif one.opcode == "convolution":
            self.total.flops += times * hlo_products.convolution(scope, one)
        elif one.opcode == "reduce" and through(scope, one.operands[0]).opcode == "multiply":
            # A product with one row, which a TPU spells so.
            self.total.flops += times * 2 * math.prod(array_dims(scope[one.operands[0]].shape))
        elif _is_product_of_library(one):
            self.total.flops += times * hlo_products.of_library(scope, one)
        elif name := _kernel(one):
            self.total.kernels[name] = self.total.kernels.get(name, 0) + round(times)
            flops = _estimate(one, "flops") or hints.flops_of(one.rest)
            self.total.flops += times * flops / hints.room_of(one.rest)

    # --- memory ------------------------------------------------------------------------------

    def _moved(self, scope, one) -> float:
        if _kernel(one):
            room = hints.room_of(one.rest)
            said = _estimate(one, "bytes_accessed")
            return max(said, self._whole(scope, one)) if room == 1 else self._rows(scope, one, room)
        if one.opcode == "custom-call" and '"AllocateBuffer"' in one.rest:
            return 0.0
        if _is_product_of_library(one):
            # What it gives has room for the library to work in behind it.
            read = sum(size_of(scope[name].shape, fast=False) for name in one.operands)
            return read + size_of(SHAPE.search(one.shape)[0], fast=False)
        if _collective(one):
            given = sum(size_of(scope[n].shape, fast=False) for n in one.operands if n in scope)
            result = size_of(one.shape, fast=False)
            if _collective(one).startswith("ragged"):
                return 2 * self._sent(scope, one, _collective(one), True)[1]
            # That of a start repeats the operands.
            return max(given, result) if one.opcode.endswith("-start") else given + result
        if one.opcode in ("copy-start", "slice-start"):
            # (There, here, a counter), or what is sliced first: as much as the smaller one moves,
            # once for each side that is not fast.
            arrays = [found[0] for found in SHAPE.finditer(one.shape)][:2]
            sides = sum(size_of(array, fast=False) > 0 for array in arrays)
            return sides * min(size_of(array) for array in arrays)
        if one.opcode in _PART:
            return 2 * size_of(one.shape, fast=False)
        if one.opcode in _INTO:
            return 2 * size_of(scope[one.operands[_INTO[one.opcode]]].shape, fast=False)
        if one.opcode == "fusion":
            return self._fusion(scope, one)
        return self._whole(scope, one)

    def _whole(self, scope, one) -> float:
        read = sum(size_of(scope[name].shape, fast=False) for name in one.operands if name in scope)
        return read + size_of(one.shape, fast=False)

    def _rows(self, scope, one, room: int) -> float:
        """Of a grouped product: matrices as a whole, and of rows those that are there."""
        arrays = [scope[name].shape for name in one.operands if name in scope] + [one.shape]
        parts = ((size_of(x, fast=False), len(array_dims(x)) < 3) for x in arrays)
        return sum(size / room if rows else size for size, rows in parts)

    def _fusion(self, scope, one) -> float:
        """Operands of which a slice is read count as it, and results updated in place likewise.

        What is handed through for a collective that goes on meanwhile does not count.
        """
        name = one.attribute("calls")
        inner = self.computations[name]
        root = next(x for x in inner.values() if x.root)
        meanwhile = any(map(_chained, inner.values()))
        if meanwhile and root.opcode != "tuple":
            return 0.0
        total, in_place = 0.0, 0.0
        for place, operand in enumerate(one.operands):
            size, used = size_of(scope[operand].shape, fast=False), self._readers(name, place)
            if used and all(kind in _PART or kind in _INTO for kind, _ in used):
                if any(kind in _INTO for kind, _ in used):
                    in_place += max(0, size - sum(part for kind, part in used if kind in _INTO))
                size = min(size, sum(part for kind, part in used if kind in _PART))
            elif meanwhile and all(kind in ("tuple", *COLLECTIVES) for kind, _ in used):
                size = 0
            total += size
        results = [inner[x] for x in root.operands] if meanwhile else [one]
        made = (x for x in results if x.opcode != "parameter" and not _collective(x))
        return total + max(0.0, sum(size_of(x.shape, fast=False) for x in made) - in_place)

    def _readers(self, computation: str, place: int) -> list[tuple[str, int]]:
        """Who takes a parameter, through what only renames it: the opcode, and the bytes of what is
        read of it, or written into it."""
        inner = self.computations[computation]
        waiting = [
            one.name
            for one in inner.values()
            if one.opcode == "parameter" and int(one.inside) == place
        ]
        found = []
        while waiting:
            name = waiting.pop()
            for one in inner.values():
                for at in (i for i, operand in enumerate(one.operands) if operand == name):
                    if one.opcode in ("bitcast", "copy", "reshape"):
                        waiting.append(one.name)
                    elif one.opcode == "fusion":
                        found += self._readers(one.attribute("calls"), at)
                    elif one.opcode in _INTO:
                        kind = one.opcode if at == 0 else "other"
                        found.append((kind, size_of(inner[one.operands[_INTO[one.opcode]]].shape)))
                    elif at == 0 or one.opcode in ("tuple", *COLLECTIVES):
                        found.append((one.opcode, size_of(one.shape)))
                    else:
                        found.append(("other", size_of(one.shape)))
        return found

    # --- between devices ---------------------------------------------------------------------

    def _sent(self, scope, one, kind, outside) -> tuple[str, float]:
        if kind.startswith("ragged"):
            # What there is, and the place of the results: one has room for everything of everyone.
            return kind, min(size_of(scope[name].shape) for name in one.operands[:2])
        given = sum(size_of(scope[n].shape) for n in one.operands if n in scope)
        result = size_of(one.shape)
        if one.opcode.endswith("-start"):
            result = max(result - given, 0) if kind != "all-reduce" else result
        if not outside and kind == "all-reduce":
            # A TPU's reduce-scatter: a sum of which the fusion gives out this device's slice.
            root = next(x for x in scope.values() if x.root)
            if through(scope, root.name).opcode == "dynamic-slice":
                kind, result = "reduce-scatter", size_of(root.shape)
        sent = {
            "all-gather": max(result - given, 0),
            "all-reduce": 2 * given,
            "reduce-scatter": max(given - result, 0),
        }
        return kind, sent.get(kind, given) / hints.room_of(one.rest)


def _collective(one: Instruction) -> str | None:
    kind = one.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _chained(one: Instruction) -> bool:
    """Whether it is part of a collective that runs beside other work."""
    return _collective(one) is not None and "chain_id=" in one.rest


def _goes_on(scope) -> bool:
    """Whether a fusion's collective was begun by another fusion.

    One that runs beside others stands in the fusion that starts it, in each that works meanwhile,
    loops that turn more often included, and in the one that waits for its end.
    """
    found = any(map(_chained, scope.values()))
    return found and not any('"AsyncCollectiveStart"' in one.rest for one in scope.values())


def _is_product_of_library(one: Instruction) -> bool:
    return one.opcode == "custom-call" and 'custom_call_target="__cublas$' in one.rest


def _kernel(one: Instruction) -> str | None:
    """The name of the kernel that is called, or None."""
    if one.opcode != "custom-call" or not _KERNELS.search(one.rest):
        return None
    # On a GPU the instruction has a name of JAX's.
    scope = re.search(r'op_name="[^"]*/(\w+)/\w+"', one.rest) if "mosaic_gpu" in one.rest else None
    return scope[1] if scope else re.sub(r"\.\d+$", "", one.name)


def _estimate(one: Instruction, name: str) -> float:
    """What a kernel says of itself, `pl.CostEstimate`."""
    found = re.search(r'"cost_estimate":(\{[^}]*\})', one.rest)
    return float(json.loads(found[1]).get(name, 0)) if found else 0.0
