"""Parameters of a model, or only their shapes, from its configuration alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm.models.inputs import example_shapes
from efficient_vlm.models.vlm import VisionLanguageModel


def init_params(model: VisionLanguageModel, key: jax.Array, **sizes: Any) -> Any:
    """Fresh parameters with their logical axes; under `jax.eval_shape`, nothing is computed.

    Args:
      model: any configuration.
      key: for the values.
      **sizes: of the inputs, see `inputs.example_shapes`; parameters do not depend on them, but
        what the model refuses may.

    Raises:
      UserError: what the model itself refuses.
    """
    shapes = example_shapes(model, **sizes)
    inputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return model.init(key, inputs, rng=key)["params"]


def boxed_parameters(model: VisionLanguageModel) -> Any:
    """Shapes and dtypes of the parameters, with their logical axes."""
    return _boxed_parameters(model.clone(dtype=jnp.float32))  # Of activations; one trace.


def abstract_parameters(model: VisionLanguageModel) -> Any:
    """The same without their logical axes."""
    return nn.unbox(boxed_parameters(model))


@functools.lru_cache(maxsize=8)
def _boxed_parameters(model: VisionLanguageModel) -> Any:
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
