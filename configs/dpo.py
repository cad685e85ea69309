"""Preferences with pictures: direct preference optimisation of a published model.

    efficient-vlm train --config=configs/dpo.py --config.model.pretrained=PATH_OR_HUB_NAME \
        --config.data.path=pairs.jsonl --workdir=runs/dpo

Rows are {"images": [...], "prompt": ..., "chosen": ..., "rejected": ...}, texts or turns. The
reference is the base of the adapters, so it takes no memory of its own. Without a reference, and
for full fine-tunes as well: `--config.preference.name=simpo --config.adapt.name=full`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The whole config; `model.pretrained` and `data.path` are the user's."""
    return ml_collections.ConfigDict(
        dict(
            model=dict(pretrained="", compressor=dict(name="none")),
            adapt=dict(name="lora", rank=16, alpha=32.0, targets="decoder"),
            preference=dict(name="dpo", beta=0.1, label_smoothing=0.0, labels=0.0),
            data=dict(
                source="auto",
                path="",
                pairs=True,
                test_fraction=0.05,
                batch_size=4,
                pack_tokens=2048,
                max_length=4096,
                max_images=16,
            ),
            train=dict(
                steps=1000,
                optimizer=dict(name="adamw", learning_rate=5e-5, warmup_steps=50),
                checkpoint_every=200,
            ),
            eval=dict(images=200, new_tokens=32),
        )
    )
