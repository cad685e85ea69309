"""LLaVA's second stage: connector and decoder learn from instructions, the encoder is frozen.

    efficient-vlm export runs/stage1 stage1_hf
    efficient-vlm train --config=configs/llava_stage2.py --config.model.pretrained=stage1_hf \
        --config.data.path=llava_v1_5_mix665k.json --workdir=runs/stage2

LLaVA, arXiv 2304.08485, section 4.2; values of LLaVA-1.5, arXiv 2310.03744, appendix (one epoch of
665,000 conversations in batches of 128). Without `--config.model.pretrained` it goes on from the
published model. Fewer visual tokens as in the first stage.
"""

import llava_stage1
import ml_collections


def get_config(arg: str = "7b") -> ml_collections.ConfigDict:
    """Args: arg: "7b" or "13b"."""
    config = llava_stage1.get_config(arg)
    config.adapt.train = "connector+decoder"
    config.data.batch_size = 128
    config.train.steps = 5195
    config.train.optimizer.learning_rate = 2e-5
    return config
