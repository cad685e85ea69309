"""What differs in Pallas between JAX 0.10 and 0.12, and nothing else."""

import inspect

from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["kernel_options", "load", "transposed"]


def load(ref, layout):
    """A whole array in fast memory, in a layout: the index is required first and refused later."""
    index = inspect.signature(plgpu.load).parameters.get("idx")
    if index is not None and index.default is inspect.Parameter.empty:
        return plgpu.load(ref, (), layout=layout)
    return plgpu.load(ref, layout=layout)


def transposed(ref):
    """A view with two axes exchanged."""
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))


def kernel_options(**options) -> dict:
    """Arguments of `plgpu.kernel`; the semantics of lowering, whose default changed, are said."""
    options["compiler_params"] = plgpu.CompilerParams(
        approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    )
    return options
