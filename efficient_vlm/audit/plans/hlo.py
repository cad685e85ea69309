"""What a compiled program costs one device: read from its text, loops counted as often as they run.

`Compiled.cost_analysis` counts the body of a loop once, whatever its length, and kernels not at
all: a training step of thirty layers seems to have the FLOPs of one. Here every instruction counts
as often as the loops around it turn, and kernels what they say of themselves.

Limits: an instruction whose loop has no length in the program counts once (`unknown_loops` says how
many such loops there are); bytes are those of whole operands and results outside of fast memory, so
what a cache saves is not seen.
"""

import collections
import dataclasses
import functools
import json
import math
import re

import numpy as np

__all__ = ["Costs", "costs"]

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ATTRIBUTE = {
    name: re.compile(rf"[ ,]{name}=%?([\w.\-]+)")
    for name in ("calls", "to_apply", "body", "condition", "direction", "index", "channel_id")
}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# Neither read nor write memory themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "iota", "domain", "opt-barrier"),
}
# Read of their first operand only what they give out.
_PART = {"dynamic-slice", "slice", "gather"}
KERNEL = "tpu_custom_call"


@dataclasses.dataclass
class Costs:
    """Of one run of a program on one device.

    Attributes:
      flops: of matrix products and convolutions, 2 per multiply-add, and of kernels.
      hbm_bytes: read and written outside of fast memory.
      collective_bytes: kind -> bytes that the device sends: of what is gathered all parts but its
        own, twice the size of what is reduced everywhere (a ring), once the size of the rest.
      kernels: name -> calls.
      unknown_loops: loops whose number of turns is not in the program.
    """

    flops: float = 0
    hbm_bytes: float = 0
    collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0


@dataclasses.dataclass
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: list[str]
    inside: str
    rest: str
    root: bool

    def attribute(self, name: str) -> str | None:
        found = _ATTRIBUTE[name].search(self.rest)
        return found and found[1]


def costs(text: str) -> Costs:
    """The costs of a compiled program.

    Args:
      text: from `jax.stages.Compiled.as_text()`.
    """
    return _Program(text).costs()


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = None
        current: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self.computations.setdefault(found[2], {})
                self.entry = found[2] if found[1] else self.entry
            elif (one := _parse(line)) is not None:
                current[one.name] = one
        if self.entry is None:
            raise ValueError("the text of a program has no entry")
        self.total = Costs()
        self.channels: dict[tuple[str, str], float] = {}

    def costs(self) -> Costs:
        self._add(self.entry, 1, outside=True)
        sent = collections.Counter()
        for (kind, _), size in self.channels.items():
            sent[kind] += size
        self.total.collective_bytes = dict(sorted(sent.items()))
        return self.total

    def _add(self, name: str, times: float, *, outside: bool) -> None:
        """Adds a computation that runs `times` times; only one `outside` of a fusion moves data."""
        scope = self.computations[name]
        for one in scope.values():
            self._products(scope, one, times)
            if kind := _collective(one):
                self._collective(scope, one, kind, times)
            if outside and one.opcode not in _FREE and not one.opcode.endswith("-done"):
                self.total.hbm_bytes += times * self._moved(scope, one)
            if one.opcode == "while":
                turns = self._turns(scope, one)
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

    def _turns(self, scope, loop) -> int | None:
        """How often a loop turns: its counter's limit, step and first value are constants."""
        if found := re.search(r'known_trip_count"?:\{"n":"?(\d+)', loop.rest):
            return int(found[1])
        condition = self.computations[loop.attribute("condition")]
        test = next(one for one in condition.values() if one.root)
        if test.opcode == "fusion":
            # compare(counter, limit) alone, behind the fusion's own parameters.
            inner = self.computations[test.attribute("calls")]
            compare = next(one for one in inner.values() if one.root)
            given = [_through(inner, name) for name in compare.operands]
            sides = [
                _through(condition, test.operands[int(one.inside)])
                if one.opcode == "parameter"
                else one
                for one in given
            ]
        else:
            compare = test
            sides = [_through(condition, name) for name in test.operands]
        if compare.opcode != "compare" or compare.attribute("direction") not in ("LT", "LE"):
            return None
        counter, limit = sides
        limit = _integer(limit)
        if counter.opcode != "get-tuple-element" or limit is None:
            return None
        place = int(counter.attribute("index"))
        first = _integer(_element(scope, loop.operands[0], place))
        step = self._step(loop.attribute("body"), place)
        if first is None or not step:
            return None
        span = limit - first + (compare.attribute("direction") == "LE")
        return max(0, -(-span // step))

    def _step(self, body: str, place: int) -> int | None:
        scope = self.computations[body]
        root = next(one for one in scope.values() if one.root)
        return self._growth(scope, _element(scope, root.name, place), place)

    def _growth(self, scope, one, place) -> int | None:
        """What an expression adds to an element of the loop's state, if that is all it does."""
        if one is None:
            return None
        if one.opcode == "get-tuple-element" and int(one.attribute("index")) == place:
            return 0
        if one.opcode == "fusion":
            inner = self.computations[one.attribute("calls")]
            root = next(x for x in inner.values() if x.root)
            parts = [_through(inner, name) for name in root.operands]
            parts = [
                _through(scope, one.operands[int(p.inside)]) if p.opcode == "parameter" else p
                for p in parts
            ]
        else:
            root, parts = one, [_through(scope, name) for name in one.operands]
        if root.opcode != "add":
            return None
        numbers = [n for n in map(_integer, parts) if n is not None]
        others = [self._growth(scope, p, place) for p in parts if _integer(p) is None]
        return (
            numbers[0] + others[0]
            if len(numbers) == len(others) == 1 and others[0] is not None
            else None
        )

    def _dearest(self, one) -> str:
        names = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
        branches = (
            re.findall(r"[\w.\-]+", names[1])
            if names
            else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.rest)
        )

        def work(name: str) -> float:
            apart = _Program.__new__(_Program)
            apart.computations, apart.total, apart.channels = self.computations, Costs(), {}
            apart._add(name, 1, outside=False)
            return apart.total.flops

        return max(branches, key=work)

    # --- products ----------------------------------------------------------------------------

    def _products(self, scope, one, times) -> None:
        if one.opcode == "dot":
            self.total.flops += times * _dot(scope, one)
        elif one.opcode == "convolution":
            self.total.flops += times * _convolution(scope, one)
        elif one.opcode == "reduce" and _through(scope, one.operands[0]).opcode == "multiply":
            # A product with one row, which a TPU spells so.
            self.total.flops += times * 2 * math.prod(_array(scope[one.operands[0]].shape))
        elif one.opcode == "custom-call" and f'"{KERNEL}"' in one.rest:
            name = re.sub(r"\.\d+$", "", one.name)
            self.total.kernels[name] = self.total.kernels.get(name, 0) + round(times)
            self.total.flops += times * _estimate(one, "flops")

    # --- memory ------------------------------------------------------------------------------

    def _moved(self, scope, one) -> float:
        if one.opcode == "custom-call" and f'"{KERNEL}"' in one.rest:
            return max(_estimate(one, "bytes_accessed"), self._whole(scope, one))
        if one.opcode in ("copy-start", "slice-start") or _collective(one):
            # From one memory to another; the result repeats the operand.
            return 2 * _size(_first(one.shape), fast=False) / 2
        if one.opcode in _PART:
            return 2 * _size(one.shape, fast=False)
        if one.opcode in ("dynamic-update-slice", "scatter"):
            update = 1 if one.opcode == "dynamic-update-slice" else 2
            return 2 * _size(scope[one.operands[update]].shape, fast=False)
        if one.opcode == "fusion":
            return self._fusion(scope, one)
        return self._whole(scope, one)

    def _whole(self, scope, one) -> float:
        read = sum(_size(scope[name].shape, fast=False) for name in one.operands if name in scope)
        return read + _size(one.shape, fast=False)

    def _fusion(self, scope, one) -> float:
        """Operands of which a slice is read count as it, and results updated in place likewise."""
        name = one.attribute("calls")
        total, in_place = 0.0, 0.0
        for place, operand in enumerate(one.operands):
            size, used = _size(scope[operand].shape, fast=False), self._readers(name, place)
            if used and all(kind in _PART for kind, _ in used):
                size = min(size, sum(part for _, part in used))
            elif used and all(kind == "dynamic-update-slice" for kind, _ in used):
                in_place += max(0, size - sum(part for _, part in used))
                size = 0
            total += size
        return total + max(0.0, _size(one.shape, fast=False) - in_place)

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
                    elif one.opcode == "dynamic-update-slice":
                        kind = one.opcode if at == 0 else "other"
                        found.append((kind, _size(inner[one.operands[1]].shape)))
                    else:
                        found.append((one.opcode if at == 0 else "other", _size(one.shape)))
        return found

    # --- between devices ---------------------------------------------------------------------

    def _collective(self, scope, one, kind, times) -> None:
        # The second operand of a ragged one is the place of its results.
        operands = one.operands[:1] if kind.startswith("ragged") else one.operands
        given = sum(_size(scope[n].shape) for n in operands if n in scope)
        result = _size(one.shape)
        if one.opcode.endswith("-start"):
            result = max(result - given, 0) if kind != "all-reduce" else result
        sent = {
            "all-gather": max(result - given, 0),
            "all-reduce": 2 * given,
            "reduce-scatter": max(given - result, 0),
        }.get(kind, given)
        # One that is spread over several fusions stands in each of them.
        key = kind, one.attribute("channel_id") or one.name
        self.channels[key] = max(self.channels.get(key, 0), times * sent)


def _parse(line: str) -> _Instruction | None:
    text = line.strip()
    root = text.startswith("ROOT ")
    name, equals, rest = text.removeprefix("ROOT ").partition(" = ")
    if not equals or not (name.startswith("%") or re.fullmatch(r"[\w.\-]+", name)):
        return None
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ") - 1
    shape, rest = rest[: end + 1], rest[end + 2 :]
    opcode, _, _ = rest.partition("(")
    if not re.fullmatch(r"[a-z][a-z0-9\-]*", opcode):
        return None
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    operands = re.findall(r"%([\w.\-]+)", inside)
    return _Instruction(
        name.removeprefix("%"), shape, opcode, operands, inside, rest[close + 1 :], root
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _collective(one: _Instruction) -> str | None:
    kind = one.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


@functools.lru_cache(maxsize=65536)
def _size(shape: str, fast: bool = True) -> int:
    """Bytes; without what lies in fast memory unless `fast`."""
    total = 0
    for kind, dims, layout in _SHAPE.findall(shape):
        if not fast and re.search(r"S\([1-9]", layout):
            continue
        total += math.prod(_dims(dims)) * _item(kind)
    return total


def _item(kind: str) -> float:
    if kind in _BYTES:
        return _BYTES[kind]
    bits = re.search(r"\d+", kind)
    return int(bits[0]) / 8 if bits else 0


def _dims(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _array(shape: str) -> list[int]:
    return _dims(_SHAPE.search(shape)[2])


def _first(shape: str) -> str:
    """The first array of a tuple's shape."""
    found = _SHAPE.search(shape)
    return found[0] if found else shape


def _through(scope, name: str) -> _Instruction:
    """The instruction behind copies and conversions."""
    one = scope[name]
    while one.opcode in ("copy", "bitcast", "convert", "reshape") and one.operands[0] in scope:
        one = scope[one.operands[0]]
    return one


def _element(scope, name: str, place: int) -> _Instruction | None:
    """What stands at a place of a tuple."""
    one = _through(scope, name)
    if one.opcode != "tuple":
        return None
    return _through(scope, one.operands[place])


def _integer(one: _Instruction | None) -> int | None:
    if one is None or one.opcode != "constant":
        return None
    return int(one.inside) if re.fullmatch(r"-?\d+", one.inside) else None


def _dot(scope, one) -> int:
    contracted = _dims(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)[1])
    lhs = _array(scope[one.operands[0]].shape)
    return 2 * math.prod(_array(one.shape)) * math.prod(lhs[i] for i in contracted)


def _convolution(scope, one) -> int:
    """Of each output the products that meet the input; a TPU spells batches as windows."""
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest).groups()
    lhs, rhs = (_array(scope[name].shape) for name in one.operands)
    result = _array(one.shape)
    total = 2 * rhs[right.index("i")] * result[out.index("b")] * result[out.index("f")]
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    for axis, label in enumerate(sorted(set(right) - {"i", "o"})):

        def of(name: str, default: str, axis=axis) -> str:
            return fields[name].split("x")[axis] if name in fields else default

        low = int(of("pad", "0_0").split("_")[0])
        stride, holes = int(of("stride", "1")), int(of("lhs_dilate", "1"))
        spread = int(of("rhs_dilate", "1"))
        total *= _meeting(
            *(lhs[left.index(label)], rhs[right.index(label)], result[out.index(label)]),
            *(low, stride, holes, spread),
        )
    return total


@functools.lru_cache(maxsize=4096)
def _meeting(size, window, outputs, low, stride, holes, spread) -> int:
    """Pairs of an output and a place of the window that meet an input along one axis."""
    at = np.arange(outputs)[:, None] * stride + np.arange(window) * spread - low
    return int(((at >= 0) & (at <= (size - 1) * holes) & (at % holes == 0)).sum())


def _estimate(one: _Instruction, name: str) -> float:
    """What a kernel says of itself, `pl.CostEstimate`."""
    found = re.search(r'"cost_estimate":(\{[^}]*\})', one.rest)
    return float(json.loads(found[1]).get(name, 0)) if found else 0.0
