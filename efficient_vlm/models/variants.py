"""What a model with one compressor is called, and how many visual tokens its decoder gets."""

import math

from efficient_vlm.models.vlm import VisionLanguageModel

Setting = tuple[str, int]  # (label, visual tokens)


def setting_of(variant: VisionLanguageModel, num_visual: int | None = None) -> Setting:
    """What a model's compressor is called: its name and its number of visual tokens.

    The number is the given budget. A method without one (fastv by its `keep`, pyramiddrop, tome by
    its `r`, ...) has the mean number of visual tokens that the decoder's layers process, rounded.

    Args:
      variant: a model at one setting.
      num_visual: tokens that the method gets of the input; None for one image of the encoder's own
        size.

    Raises:
      UserError: cuts that do not fit this encoder or decoder.
    """
    name, budget = variant.compressor["name"], variant.compressor.get("budget")
    if budget is not None:
        return name, budget
    left, processed, layers = tokens_of_image(variant, num_visual), 0, 0
    for start, stop, reducer in variant.make_decoder().runs(left):
        if reducer is not None and reducer.budget is not None:
            left = reducer.budget
        layers += stop - start
        processed += (stop - start) * left
    return name, round(processed / layers)


def tokens_of_image(variant: VisionLanguageModel, num_visual: int | None = None) -> int:
    """Visual tokens of one image that enter the decoder; `num_visual` as in `setting_of`."""
    vit, method = variant.make_encoder(), variant.make_compressor()
    tokens = num_visual or math.prod(variant.slot_grid)
    if method.between:
        return tokens if method.budget is None else method.budget
    if method.in_encoder and not method.whole_grid:
        # Of a method that cuts units, as if each were one patch.
        units = dict(patches=(1, tokens)) if method.of_units else {}
        for stage in method.stages(vit.layers_run, tokens, class_token=vit.class_token, **units):
            tokens = stage.module.budget
    return tokens
