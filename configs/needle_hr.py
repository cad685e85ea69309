"""Needle at high resolution: glyphs keep their 8 pixels while the canvas grows.

    efficient-vlm train --config=configs/needle_hr.py:128 --workdir=runs/needle_hr_128

The argument is the side of the canvas in pixels, 64 to 512; visual tokens grow with its square,
budgets stay. Words may follow it as for the quickstart: `:128,smoke`.
"""

import ml_collections
import quickstart


def get_config(arg: str = "128") -> ml_collections.ConfigDict:
    """Args: arg: canvas side in pixels, then words of the quickstart."""
    side, *words = (arg or "128").split(",")
    if not side.isdigit() or int(side) % 64 or not 64 <= int(side) <= 512:
        raise ValueError(f"needle_hr takes a canvas of 64, 128, ... 512 pixels, not {side!r}")
    side = int(side)
    patches = (side // 8) ** 2
    config = quickstart.get_config(",".join(words))
    config.data.tasks = ("needle_hr", "global")
    config.data.image_size = side
    config.data.grid = side // 8
    config.data.train_images = min(config.data.train_images, 16_000 * 64 // patches)
    config.model.encoder.image_size = side
    config.train.elastic = [
        {**dict(arm), "budget": min(arm["budget"], patches)}
        for arm in config.train.elastic
        if arm["name"] != "none"
    ]
    config.train.elastic.append(dict(name="none", budget=patches, weight=0.5))
    methods = [dict(m) for m in config.eval.methods if m["name"] != "none"]
    config.eval.methods = [dict(name="none", budgets=[patches]), *methods]
    return config
