"""Whether the model would run: its forward pass on shapes alone."""

import functools

import jax

from efficient_vlm.models.init import init_params
from efficient_vlm.models.vlm import VisionLanguageModel


def dry_run(model: VisionLanguageModel, images: int = 1, pooled: int | None = None) -> None:
    """Traces a forward pass with abstract parameters and inputs; nothing is computed or allocated.

    Half a second for a model of 7B or 13B, some four for a method that cuts at every layer.

    Args:
      model: any configuration.
      images: of the row, as methods inside the decoder see them all.
      pooled: tokens of the row that read patches of any image, see `inputs.Pictures`; None where
        each image has its own.

    Raises:
      UserError: what the model itself refuses.
    """
    fresh = functools.partial(init_params, model, pictures=images, pooled=pooled)
    jax.eval_shape(fresh, jax.random.key(0))
