"""FLOPs of one matrix product or convolution of a compiled program, 2 per multiply-add."""

import functools
import math
import re

import numpy as np

from efficient_vlm.costs.compiled.hlo_text import Instruction, array_dims, dims_of

__all__ = ["convolution", "dot", "meeting", "of_library"]


def dot(scope: dict[str, Instruction], one: Instruction) -> int:
    """Of a `dot`."""
    contracted = dims_of(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)[1])
    lhs = array_dims(scope[one.operands[0]].shape)
    return 2 * math.prod(array_dims(one.shape)) * math.prod(lhs[i] for i in contracted)


def of_library(scope: dict[str, Instruction], one: Instruction) -> int:
    """The same of a call of cuBLAS, whose axes stand in its settings."""
    lhs, rhs = (array_dims(scope[name].shape) for name in one.operands[:2])

    def sizes(name: str) -> list[int]:
        axes = re.search(rf'"rhs_{name}_dimensions":\[([^\]]*)\]', one.rest)[1]
        return [rhs[int(axis)] for axis in re.findall(r"\d+", axes)]

    shared = math.prod(sizes("contracting")) * math.prod(sizes("batch"))
    return 2 * math.prod(lhs) * math.prod(rhs) // shared


def convolution(scope: dict[str, Instruction], one: Instruction) -> int:
    """Of each output the products that meet the input; a TPU spells batches as windows."""
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest).groups()
    lhs, rhs = (array_dims(scope[name].shape) for name in one.operands)
    result = array_dims(one.shape)
    total = 2 * rhs[right.index("i")] * result[out.index("b")] * result[out.index("f")]
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    for axis, label in enumerate(sorted(set(right) - {"i", "o"})):

        def of(name: str, default: str, axis=axis) -> str:
            return fields[name].split("x")[axis] if name in fields else default

        low = int(of("pad", "0_0").split("_")[0])
        stride, holes = int(of("stride", "1")), int(of("lhs_dilate", "1"))
        spread = int(of("rhs_dilate", "1"))
        total *= meeting(
            *(lhs[left.index(label)], rhs[right.index(label)], result[out.index(label)]),
            *(low, stride, holes, spread),
        )
    return total


@functools.lru_cache(maxsize=4096)
def meeting(
    size: int, window: int, outputs: int, low: int, stride: int, holes: int, spread: int
) -> int:
    """Pairs of an output and a place of the window that meet an input along one axis."""
    at = np.arange(outputs)[:, None] * stride + np.arange(window) * spread - low
    return int(((at >= 0) & (at <= (size - 1) * holes) & (at % holes == 0)).sum())
