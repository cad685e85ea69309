"""Matrix-product FLOPs of any function, read from its traced program; nothing is computed.

Used for modules without a closed form (compressors), and in tests as the count that the closed
forms of `flops.py` must equal.
"""

import math
from collections.abc import Callable

import jax
from jax.extend import core


def traced_flops(function: Callable, *arguments, **keywords) -> int:
    """FLOPs of all matrix products and convolutions in `function`, 2 per multiply-add.

    Args:
      function: anything that `jax.make_jaxpr` can trace.
      *arguments, **keywords: pytrees of arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The count. A scan counts its body times its length; a conditional its dearest branch, one on
      the platform its default. The
      body of an open-ended while loop counts once, since its number of turns is not in the program.
      A ragged product counts each row of the left side once.
    """
    return _count(jax.make_jaxpr(lambda a, k: function(*a, **k))(arguments, keywords).jaxpr)


def _count(jaxpr) -> int:
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)
    if name in ("ragged_dot", "ragged_dot_general"):
        lhs, rhs = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
        return 2 * math.prod(lhs) * rhs[-1]
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        outputs = params["dimension_numbers"].rhs_spec[0]
        per_output = math.prod(kernel) // kernel[outputs]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * per_output
    inner = [_count(j) for j in _jaxprs(params)]
    if not inner:
        return 0
    if name == "scan":
        return sum(inner) * params["length"]
    if params.get("branches_platforms"):
        # `platform_dependent`: the default branch (platform None) is the one without block padding.
        return inner[-1]
    return max(inner) if name == "cond" else sum(inner)


def _jaxprs(params: dict) -> list:
    """Programs inside an equation: the bodies of jit, scan, cond, remat, custom derivatives."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
