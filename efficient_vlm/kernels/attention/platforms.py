"""Kernels of one platform in a program for another: interpreted on request, else refused.

They are refused when the program is lowered, because only then its platform is known: a program for
a TPU may be traced on a host without one.
"""

import contextlib
import contextvars
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from efficient_vlm.errors import UserError, short

__all__ = ["interpretation", "interpreted", "only_on"]

_INTERPRET: contextvars.ContextVar[Any] = contextvars.ContextVar("interpret", default=False)

# Implementation -> JAX's name of its platform.
_PLATFORMS = {"tpu": "tpu", "gpu": "cuda", "cudnn": "cuda"}


@contextlib.contextmanager
def interpreted(how: Any = True):
    """Kernels traced inside run in an interpreter: True, or a `pltpu.InterpretParams`."""
    token = _INTERPRET.set(how)
    try:
        yield
    finally:
        _INTERPRET.reset(token)


def interpretation() -> Any:
    """The current value of `interpreted`, for `pallas_call`."""
    return _INTERPRET.get()


def only_on(implementation: str, x: jax.Array) -> jax.Array:
    """`x` unchanged, in a program for the platform of the implementation or an interpreted one.

    Raises:
      UserError: when a program for another platform is lowered.
    """
    marker = _MARKERS.get(implementation)
    return x if marker is None or interpretation() else marker.bind(x)


def _marker(implementation: str, platform: str) -> Primitive:
    marker = Primitive(f"attention_{implementation}_only_on_{platform}")

    def refuse(*_):
        raise UserError(
            f"attention: implementation {short(implementation)} in a program that is not for "
            f"{platform.upper()}",
            allowed="reference, xla",
            fix="implementation=None for the best one where the program runs",
        )

    compiled = jax.jit(lambda x: marker.bind(x))

    def run(x):
        with jax.disable_jit(False):  # As in kernels themselves; else this would never end.
            return compiled(x)

    marker.def_impl(run)
    marker.def_abstract_eval(lambda x: x)
    batching.defvectorized(marker)
    ad.deflinear2(marker, lambda cotangent, _: [cotangent])
    mlir.register_lowering(marker, refuse)
    mlir.register_lowering(marker, lambda _, x: [x], platform=platform)
    return marker


_MARKERS = {name: _marker(name, platform) for name, platform in _PLATFORMS.items()}
