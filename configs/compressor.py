"""One model trained from scratch with one compressor at one budget, evaluated with the same.

    efficient-vlm train --config=configs/compressor.py:random,16 --workdir=runs/random_16

Any name of `efficient_vlm.compressors.names()`; the ablation that token-efficiency papers report.
"""

import ml_collections
import quickstart


def get_config(arg: str = "average_pool,16") -> ml_collections.ConfigDict:
    """Args: arg: NAME,BUDGET, then words of the quickstart."""
    name, budget, *words = [*(arg or "average_pool,16").split(","), ""]
    if not budget.isdigit():
        raise ValueError(f"compressor takes NAME,BUDGET such as average_pool,16, not {arg!r}")
    config = quickstart.get_config(",".join(words))
    config.model.compressor = dict(name=name, budget=int(budget))
    config.train.elastic = []
    config.eval.methods = [dict(name=name, budgets=[int(budget)])]
    return config
