"""The text of a compiled program, as instructions: their shapes, and how often loops turn."""

import dataclasses
import functools
import math
import re

__all__ = ["SHAPE", "Instruction", "Module", "array_dims", "dims_of", "size_of", "through"]

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ATTRIBUTE = {
    name: re.compile(rf"[ ,]{name}=%?([\w.\-]+)")
    for name in ("calls", "to_apply", "body", "condition", "direction", "index", "channel_id")
}


@dataclasses.dataclass
class Instruction:
    """One line.

    Attributes:
      shape: of its result, as text: "bf16[8,128]{1,0}", or a tuple of such.
      operands: names.
      inside: the text between the parentheses, such as a constant's value.
      rest: the text behind them: attributes.
      root: whether it is what its computation gives.
    """

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


class Module:
    """All computations of a program: name -> (name -> instruction).

    Args:
      text: from `jax.stages.Compiled.as_text()`.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = None
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self.computations.setdefault(found[2], {})
                self.entry = found[2] if found[1] else self.entry
            elif (one := _parse(line)) is not None:
                current[one.name] = one
        if self.entry is None:
            raise ValueError("the text of a program has no entry")

    def turns(self, scope, loop) -> int | None:
        """How often a loop turns: its counter's limit, step and first value are constants."""
        if found := re.search(r'known_trip_count"?:\{"n":"?(\d+)', loop.rest):
            return int(found[1])
        condition = self.computations[loop.attribute("condition")]
        test = next(one for one in condition.values() if one.root)
        if test.opcode == "fusion":
            # compare(counter, limit) alone, behind the fusion's own parameters.
            inner = self.computations[test.attribute("calls")]
            compare = next(one for one in inner.values() if one.root)
            given = [through(inner, name) for name in compare.operands]
            sides = [
                through(condition, test.operands[int(one.inside)])
                if one.opcode == "parameter"
                else one
                for one in given
            ]
        else:
            compare = test
            sides = [through(condition, name) for name in test.operands]
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
            parts = [through(inner, name) for name in root.operands]
            parts = [
                through(scope, one.operands[int(p.inside)]) if p.opcode == "parameter" else p
                for p in parts
            ]
        else:
            root, parts = one, [through(scope, name) for name in one.operands]
        if root.opcode != "add":
            return None
        numbers = [n for n in map(_integer, parts) if n is not None]
        others = [self._growth(scope, p, place) for p in parts if _integer(p) is None]
        if len(numbers) != 1 or others in ([], [None]):
            return None
        return numbers[0] + others[0]


def _parse(line: str) -> Instruction | None:
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
    return Instruction(
        name.removeprefix("%"), shape, opcode, operands, inside, rest[close + 1 :], root
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


@functools.lru_cache(maxsize=65536)
def size_of(shape: str, fast: bool = True) -> int:
    """Bytes; without what lies in fast memory unless `fast`."""
    total = 0
    for kind, dims, layout in SHAPE.findall(shape):
        if not fast and re.search(r"S\([1-9]", layout):
            continue
        total += math.prod(dims_of(dims)) * _item(kind)
    return total


def _item(kind: str) -> float:
    if kind in _BYTES:
        return _BYTES[kind]
    bits = re.search(r"\d+", kind)
    return int(bits[0]) / 8 if bits else 0


def dims_of(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def array_dims(shape: str) -> list[int]:
    return dims_of(SHAPE.search(shape)[2])


def through(scope, name: str) -> Instruction:
    """The instruction behind copies and conversions."""
    one = scope[name]
    while one.opcode in ("copy", "bitcast", "convert", "reshape") and one.operands[0] in scope:
        one = scope[one.operands[0]]
    return one


def _element(scope, name: str, place: int) -> Instruction | None:
    """What stands at a place of a tuple."""
    one = through(scope, name)
    if one.opcode != "tuple":
        return None
    return through(scope, one.operands[place])


def _integer(one: Instruction | None) -> int | None:
    if one is None or one.opcode != "constant":
        return None
    return int(one.inside) if re.fullmatch(r"-?\d+", one.inside) else None
