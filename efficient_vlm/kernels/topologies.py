"""Names of slices of TPUs: Cloud TPU's accelerator types ("v5e-8") as shapes ("v5e:2x4")."""

import math
import re

from efficient_vlm.errors import UserError, closest, short

__all__ = ["TOPOLOGIES", "check_size", "topology_of"]

# Generation -> an accelerator type for libtpu, of any size.
TOPOLOGIES = {
    "v5e": "v5litepod-4",
    "v6e": "v6e-4",
    "v5p": "v5p-8",
    "v4": "v4-8",
    "tpu7x": "tpu7x-8",
}

# Chips of a whole pod, as published, and its longest side. For more libtpu ends the process, or
# compiles without end.
_PODS = {
    **{"v5e": (256, 16), "v6e": (256, 16), "v5p": (8960, 28), "v4": (4096, 64)},
    **{"tpu7x": (9216, 24)},
}

# cloud.google.com/tpu/docs, pages v4, v5p, v5e, v6e and tpu7x: the number of an accelerator type
# counts TensorCores, of which chips of v4, v5p and TPU7x have two; v5e and v6e have one.
_CORES = {"v5e": 1, "v6e": 1, "v5p": 2, "v4": 2, "tpu7x": 2}
_OTHER_NAMES = {"v5litepod": "v5e"}
# What people call a TPU7x, although neither Cloud TPU nor libtpu takes it.
_NICKNAMES = ("v7x", "v7", "tpu7", "ironwood")
# Chips -> shape, of flat generations and of less than a cube of the others.
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4)}
_FLAT |= {32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_PARTS = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
_CUBE = 4  # Chips along the edge of the cubes that larger slices are made of.

_SHAPE = re.compile(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}")
_TYPE = re.compile(r"((?:v|tpu)\d+[a-z]*|ironwood)-(\d{1,6})")


def topology_of(text: str) -> str:
    """The shape of an accelerator type: "v5p-128" -> "v5p:4x4x4", "v5litepod-8" -> "v5e:2x4".

    Any other text is returned unchanged.

    Raises:
      UserError: a generation that cannot be compiled for, or a number of chips that Cloud TPU does
        not offer, with the nearest ones.
    """
    match = _TYPE.fullmatch(text)
    if match is None:
        return text
    name, number = match[1], int(match[2])
    generation = _OTHER_NAMES.get(name, name)
    if generation not in _CORES:
        guess = "tpu7x" if name in _NICKNAMES else closest(name, [*_CORES, *_OTHER_NAMES])
        raise UserError(
            f"--topology={text}: {name} is not among the TPUs that can be compiled for",
            allowed=", ".join(f"{each}-8" for each in _CORES) + ", v5e:2x4, v5p:2x2x1, ...",
            fix=f"for example --topology={guess or 'v5e'}-8",
        )
    cores = _CORES[generation]
    shape = None if number % cores else _shape(generation, number // cores)
    if shape is None:
        near = _nearest(generation, number)
        counted = "chips" if cores == 1 else "TensorCores, two a chip"
        raise UserError(
            f"--topology={text}: no such slice; the number of {name} counts {counted}",
            allowed=f"the nearest: {', '.join(f'{name}-{each}' for each in near)}",
            fix=f"--topology={name}-{near[-1]}, or a shape such as {_example(generation)}",
        )
    return f"{generation}:{'x'.join(map(str, shape))}"


def check_size(topology: str) -> None:
    """Raises UserError for what is no shape, or one larger than a pod; see `_PODS`."""
    generation, _, shape = topology.partition(":")
    if not _SHAPE.fullmatch(shape):
        raise UserError(
            f"topology: {short(topology[:60])} has no shape",
            allowed="two or three sides, in chips: v5e:2x4, v5p:4x4x4",
            fix=f"for example {_example(generation)}",
        )
    sides = list(map(int, shape.split("x")))
    chips, longest = _PODS[generation]
    if math.prod(sides) > chips or max(sides) > longest:
        raise UserError(
            f"topology: {short(topology)} is larger than a pod",
            allowed=f"{chips} chips of {generation}, no side longer than {longest}",
        )


def _shape(generation: str, chips: int) -> tuple[int, ...] | None:
    """The default shape of a slice, None where there is none of so many chips."""
    if _CORES[generation] == 1:
        return _FLAT.get(chips)
    if chips in _PARTS:
        return _PARTS[chips]
    cubes, rest = divmod(chips, _CUBE**3)
    if rest or not cubes or chips > _PODS[generation][0]:
        return None
    # Cloud's table has the arrangement of cubes with the smallest surface.
    options = [
        (a, b, cubes // (a * b))
        for a in range(1, cubes + 1)
        if cubes % a == 0
        for b in range(a, cubes // a + 1)
        if cubes // a % b == 0 and cubes // (a * b) >= b
    ]
    a, b, c = min(options, key=lambda sides: sum(cubes // side for side in sides))
    return _CUBE * a, _CUBE * b, _CUBE * c


def _nearest(generation: str, number: int) -> list[int]:
    """The numbers of the slices just below and just above."""
    cores, (most, longest) = _CORES[generation], _PODS[generation]
    chips = _FLAT if cores == 1 else [*_PARTS, *range(_CUBE**3, most + 1, _CUBE**3)]
    known = [n * cores for n in chips if max(_shape(generation, n)) <= longest]
    below = [n for n in known if n < number][-1:]
    above = [n for n in known if n > number][:1]
    return below + above


def _example(generation: str) -> str:
    shape = _FLAT[8] if _CORES[generation] == 1 else _PARTS[8]
    return f"{generation}:{'x'.join(map(str, shape))}"
