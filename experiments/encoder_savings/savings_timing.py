"""FLOPs and time of everything in front of the decoder, of all methods in turns."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from savings_methods import Row

from efficient_vlm.costs.flops import model_cost
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.evalset import make_eval
from efficient_vlm.fields import section
from efficient_vlm.inference.stages import encode_stage, programs_of
from efficient_vlm.nn.stack import unstack
from efficient_vlm.processing.batch import question_inputs
from efficient_vlm.train.trained import Trained

TURNS = 15


def measure(base: Trained, config: Any, rows: Sequence[Row], turns: int = TURNS) -> dict[str, Any]:
    """The first batch of test pictures through the encoder and projector of every row.

    A row that is drawn has its first seed; a method whose room depends on the pictures gets what
    these need.

    Returns:
      {"pictures": count, "turns": turns, "rows": label -> tokens that enter the decoder, FLOPs of
      encoder and compressor for one picture, median milliseconds for one picture, and median and
      quartiles of the ratio to "none" (to the first row without one) in the same turn}.
    """
    size = config.eval.batch_size
    data = DataConfig.from_mapping({**section(config, "data"), "batch_size": size})
    test = make_eval(data, limit=size, tokenizer=base.pipeline.tokenizer)
    pictures = question_inputs(test.batches[0]).pictures
    params = {name: value for name, value in unstack(base.params).items() if name != "language"}
    programs, found = {}, {}
    for row in rows:
        model = base.model.with_compressor(**row.evaluated()[0])
        if "budget" not in row.options:
            model = model.with_room(pictures)
        static = programs_of(model, model.layout(pictures)).encode
        programs[row.label] = static
        cost = model_cost(model, text_tokens=1)
        flops = cost.flops["encoder"] + cost.flops["compressor"]
        found[row.label] = {"tokens": cost.visual_tokens, "flops": flops}
    times = {label: [] for label in programs}
    for turn in range(turns + 1):  # The first compiles.
        for label, static in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(encode_stage(*static, params, pictures))
            if turn:
                times[label].append(time.perf_counter() - start)
    first = np.array(times.get("none") or next(iter(times.values())))
    for label, seconds in times.items():
        low, middle, high = np.quantile(np.array(seconds) / first, (0.25, 0.5, 0.75))
        found[label]["ms"] = round(1e3 * statistics.median(seconds) / size, 4)
        found[label]["ratio"] = round(float(middle), 4)
        found[label]["quartiles"] = [round(float(low), 4), round(float(high), 4)]
    return {"pictures": size, "turns": turns, "rows": found}
