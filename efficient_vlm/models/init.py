"""Parameters of a model, or only their shapes, from its configuration alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm.models.inputs import ModelInputs, Pictures
from efficient_vlm.models.vlm import VisionLanguageModel


def example_shapes(
    model: VisionLanguageModel,
    *,
    rows: int = 1,
    pictures: int = 1,
    text: int = 2,
    pooled: int | None = None,
) -> ModelInputs:
    """Inputs that a model can read, as `jax.ShapeDtypeStruct`s: for shapes of parameters and costs.

    Args:
      model: any configuration.
      rows, pictures, text: R, M and S.
      pooled: P, tokens of a row that read patches of any picture; None where each has its own.
    """
    shape = jax.ShapeDtypeStruct
    tokens = shape((rows, text), jnp.int32)
    inputs = ModelInputs(text=tokens, segments=tokens, prompt=shape((rows, text), bool))
    if model.encoder is None:
        return inputs
    encoder = model.make_encoder()
    sides = [side * encoder.patch_size for side in encoder.grid]
    index = None
    if pooled is not None:
        index = shape((rows, pooled, model.make_projector().side ** 2), jnp.int32)
    seen = Pictures(
        pixels=shape((rows, pictures, *sides, 3), jnp.uint8),
        mask=shape((rows, pictures), bool),
        pool_index=index,
    )
    return inputs.replace(pictures=seen)


def init_params(model: VisionLanguageModel, key: jax.Array, **sizes: Any) -> Any:
    """Fresh parameters with their logical axes; under `jax.eval_shape`, nothing is computed.

    Args:
      model: any configuration.
      key: for the values.
      **sizes: of the inputs, see `example_shapes`; parameters do not depend on them, but
        what the model refuses may.

    Raises:
      UserError: what the model itself refuses.
    """
    shapes = example_shapes(model, **sizes)
    inputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return model.init(key, inputs, rng=key)["params"]


def boxed_parameters(model: VisionLanguageModel, **sizes: Any) -> Any:
    """Shapes and dtypes of the parameters, with their logical axes; `sizes` as in `init_params`."""
    plain = model.clone(dtype=jnp.float32)  # Of activations; one trace.
    return _boxed_parameters(plain, **sizes)


def abstract_parameters(model: VisionLanguageModel) -> Any:
    """The same without their logical axes."""
    return nn.unbox(boxed_parameters(model))


@functools.lru_cache(maxsize=8)
def _boxed_parameters(model: VisionLanguageModel, **sizes: Any) -> Any:
    return jax.eval_shape(functools.partial(init_params, model, **sizes), jax.random.key(0))
