"""Fine-tuning of a published model on conversations about pictures.

    efficient-vlm train --config=configs/finetune.py --config.model.pretrained=PATH_OR_HUB_NAME \
        --config.data.path=my.jsonl --workdir=runs/ft

What is trained: `--config.adapt.name=lora` (the default), or any other of `adapt.AdaptConfig`; with
`full` all parameters, or those of `--config.adapt.train=connector`. How many visual tokens it sees:
`--config.model.compressor.name=visionzip --config.model.compressor.budget=64`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The whole config; `model.pretrained` and `data.path` are the user's."""
    return ml_collections.ConfigDict(
        dict(
            model=dict(pretrained="", compressor=dict(name="none")),
            adapt=dict(name="lora", rank=16, alpha=32.0, targets="decoder"),
            data=dict(
                source="auto",
                path="",
                test_fraction=0.05,
                batch_size=4,
                pack_tokens=2048,
                max_length=4096,
                max_images=16,
            ),
            train=dict(
                steps=1000,
                optimizer=dict(name="adamw", learning_rate=2e-4, warmup_steps=50),
                checkpoint_every=200,
            ),
            eval=dict(images=200, new_tokens=32),
        )
    )
