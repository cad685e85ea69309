"""Your own images, from a JSON, Parquet, CSV, tar or TensorFlow Datasets file.

    efficient-vlm train --config=configs/llava.py --config.data.path=my.json --workdir=runs/mine

Rows of JSON are {"id", "image": a path or a list of paths, "conversations": [{"from", "value"}]} or
{"images", "messages"}; paths are relative to the file. See docs/data.md for all layouts, and for
what is read, skipped and counted.
"""

import ml_collections
import quickstart


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: as for the quickstart."""
    config = quickstart.get_config(arg)
    config.data = dict(
        source="auto",
        path="",
        image_size=128,
        resize="letterbox",
        batch_size=16,
        questions_per_image=1,
        max_length=128,
        vocab_size=4096,
    )
    config.model.encoder.update(image_size=128, patch_size=16)
    config.eval.update(new_tokens=32, batch_size=16)
    return config
