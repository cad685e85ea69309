"""A quarter of the visual tokens, taught by the model itself with all of them.

    efficient-vlm train --config=configs/distil_quarter.py --config.data.path=my.jsonl \
        --workdir=runs/quarter

The teacher is the model that the run starts from, with all its tokens; the student is the same
weights with adapters and a compressor, and learns the teacher's distribution over the next token
(forward Kullback-Leibler divergence; arXiv 1503.02531) at the places of the answers. Teacher and
student share one copy of the base. `divprune` (arXiv 2503.02175) has no parameters of its own. Here
the labels themselves weigh nothing: `--config.distil.labels=1` adds their cross-entropy. With
`--config.distil.teacher=NAME` another model with the same tokenizer is the teacher, asked once
before training, and `--config.adapt.name=full` may train everything.

The evaluation has all tokens beside the quarter, both with the adapters. The argument is a
compressor and its tokens per image of the encoder, "divprune,16" for the 64 of SmolVLM.

Values of LoRA are those of `finetune.py`. None are a paper's: no publication has this recipe.
"""

import finetune
import ml_collections


def get_config(arg: str = "divprune,16") -> ml_collections.ConfigDict:
    """Args: arg: "NAME,TOKENS"."""
    name, _, budget = arg.partition(",")
    if not (name and budget.isdecimal() and int(budget)):
        raise ValueError(f"argument {arg!r}: a compressor and its tokens, such as divprune,16")
    config = finetune.get_config()
    config.model.pretrained = "HuggingFaceTB/SmolVLM-256M-Instruct"
    config.model.compressor = dict(name=name, budget=int(budget))
    config.distil = dict(kind="forward_kl", weight=1.0, labels=0.0, temperature=1.0)
    config.eval.methods = [dict(name="none"), dict(name=name, budgets=[int(budget)])]
    return config
