"""Whether the model would run: its forward pass on shapes alone."""

import jax
import jax.numpy as jnp

from efficient_vlm.models.image_inputs import ImageExtras
from efficient_vlm.models.vlm import VisionLanguageModel


def dry_run(model: VisionLanguageModel, images: int = 1, pooled: int | None = None) -> None:
    """Traces a forward pass with abstract parameters and inputs; nothing is computed or allocated.

    Half a second for a model of 7B or 13B, some four for a method that cuts at every layer.

    Args:
      model: any configuration.
      images: of the row, as methods inside the decoder see them all.
      pooled: tokens of the row that read patches of any image, see
        `image_inputs.ImageExtras`; None where each image has its own.

    Raises:
      UserError: what the model itself refuses.
    """
    encoder = model.make_encoder()
    rows, columns = (side * encoder.patch_size for side in encoder.grid)
    inputs = {
        "images": jax.ShapeDtypeStruct((1, images, rows, columns, 3), jnp.uint8),
        "image_mask": jax.ShapeDtypeStruct((1, images), bool),
    }
    options = {}
    if pooled is None:
        inputs["tokens"] = jax.ShapeDtypeStruct((1, 1, 2), jnp.int32)
        inputs["lengths"] = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        inputs["prompt_lengths"] = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    else:
        inputs["tokens"] = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        inputs["lengths"] = jax.ShapeDtypeStruct((1,), jnp.int32)
        each = model.make_projector().side ** 2
        index = jax.ShapeDtypeStruct((1, pooled, each), jnp.int32)
        inputs["extras"] = ImageExtras(pool_index=index)
        options["method"] = "text_logits"
    key = jax.random.key(0)
    jax.eval_shape(lambda key, inputs: model.init(key, **inputs, rng=key, **options), key, inputs)
