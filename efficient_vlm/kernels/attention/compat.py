"""Differences of Pallas between JAX 0.10 and 0.12."""

import inspect

from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["kernel_options", "load"]


def load(ref, layout):
    """A whole array of fast memory in a layout; old JAX requires an index, new JAX refuses it."""
    index = inspect.signature(plgpu.load).parameters.get("idx")
    if index is not None and index.default is inspect.Parameter.empty:
        return plgpu.load(ref, (), layout=layout)
    return plgpu.load(ref, layout=layout)


def kernel_options() -> dict:
    """Arguments of `plgpu.kernel`, with the lowering semantics, whose default has changed."""
    params = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
    return {"compiler_params": params}
