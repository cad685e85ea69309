"""No result depends on the rows beside it: prompts alone and in one batch, by every method.

The rows have two pictures of unlike sizes, one small picture, and text alone. Compared are the
patches that are left and how they are merged, the log-probabilities behind the prompt, and the
answer. The plain `pytest` looks at a few methods; `pytest -m matrix` runs every family with all.
"""

import functools

import jax
import numpy as np
import pytest
from method_matrix import REFUSED, TRAINING_FREE, Subject, golden_models, looks_at_class_token
from test_packing import examples, opened

from efficient_vlm.compressors.methods import METHODS, reachable
from efficient_vlm.families.weights import Weights
from efficient_vlm.inference.generate import generate
from efficient_vlm.inference.pretrained import Pretrained
from efficient_vlm.processing.gather import gather
from efficient_vlm.processing.request import Example

MODELS = golden_models()
BETWEEN = [dict(budget=4), dict(budget=6)]
# Shares of the row, and schedules that look at how many tokens it has.
SETTINGS = {
    "fastv": [dict(layer=1, keep=0.5), dict(layer=1, keep=0.3, row="mean")],
    "dart": [dict(layer=1, keep=0.4)],
    # Of 9 tokens the cuts leave 4 and 4, of 20 they leave 10 and 9.
    "pyramiddrop": [dict(layers=(1, 2), keep=(0.5, 0.45))],
    "feather": [dict(layers=(1, 2), keep=keep, stride=2) for keep in (0.3, 5)],
    "v2drop": [dict(layers=(1, 2), keep=(0.6, 0.5))],
    "sparsevlm": [
        dict(layers=(1, 2), keep=(0.6, 0.3)),
        dict(layers=(1, 2), keep=(8, 4), version="2.0"),
    ],
    "fitprune": [
        dict(rate=0.6),
        dict(rate=0.4, schedule="geometric"),
        dict(counts=(0.7, 0.3)),
    ],
    "vtw": [dict(layer=2)],
    "average_pool": [dict(budget=4), dict(budget=1)],
    "m3": [dict(budget=1)],
    "tome": [dict(budget=12)],
    "none": [{}],
}
# A draw depends on the place in the batch: each question gets one of its own.
DRAWN = "random"
PLAIN = {"pool": 1, "hiprune": 0, "fastv": 0, "sparsevlm": 0}  # Method -> one of its settings.


@functools.lru_cache(maxsize=1)
def family(name):
    """A model of at least three decoder layers, and its rows."""
    jax.clear_caches()
    vlm, one = opened(name), Subject(name)
    deep = Pretrained(one.model, Weights(one.params), vlm.processor, vlm._carried)
    rows = [Example(example.ids[:1], example.pictured) for example in examples(vlm)]
    return deep, [*rows, Example([[2, 3, 4, 5, 7]])]


def settings_of(name, method):
    options = {}
    if looks_at_class_token(method) and not Subject(name).has_class_token:
        options["attention"] = "column_mean"
    if method == "hiprune":
        options |= dict(middle_layer=0.5, alpha=1.0)
    return [{**options, **setting} for setting in SETTINGS.get(method, BETWEEN)]


def read(vlm, rows, new_tokens):
    """For each row: its patches by the token that holds them, log-probabilities, the answer."""
    request = vlm.batch(rows)
    given = dict(new_tokens=new_tokens, eos_id=-1, logprobs=4)
    out = generate(request.model, vlm.params, request.inputs, **given)
    pictured = tuple(tuple(row.pictured) for row in rows)
    slots = gather(request.model, pictured, vlm.family.variable)[2]
    for row, own in enumerate(slots):
        holders = np.asarray(out.sources[-1])[row, own] if len(own) else own
        numbers = {-1: -1}
        groups = [numbers.setdefault(int(holder), len(numbers) - 1) for holder in holders]
        tokens = np.asarray(out.tokens).reshape(len(rows), -1)[row]
        values = np.asarray(out.logprobs.values).reshape(len(rows), new_tokens, -1)[row]
        yield groups, values, tokens


def check(name, method, setting, alone=None, new_tokens=3):
    vlm, rows = family(name)
    vlm = vlm.with_compressor(method, **setting)
    together = list(read(vlm, rows, new_tokens))
    for row in range(len(rows)) if alone is None else alone:
        ((groups, values, tokens),) = read(vlm, [rows[row]], new_tokens)
        assert together[row][0] == groups
        np.testing.assert_allclose(together[row][1], values, atol=1e-4)
        assert together[row][2].tolist() == tokens.tolist()


@pytest.mark.parametrize("method", PLAIN)
def test_a_row_beside_others(method):
    """Of a family whose pictures have sizes of their own, so that batches are padded."""
    setting = settings_of("qwen2_vl", method)[PLAIN[method]]
    check("qwen2_vl", method, setting, alone=(1,), new_tokens=1)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=pytest.mark.xdist_group(name))
        for name in MODELS
        for method in TRAINING_FREE
        if method != DRAWN and name not in REFUSED.get(method, {})
    ],
)
def test_every_family_with_every_method(name, method):
    vlm, _ = family(name)
    for setting in settings_of(name, method):
        # Grids of tiny tiles are too small for some counts.
        grid = vlm.model.slot_grid
        between = METHODS[method].between and method != "none"
        if vlm.family.variable or not between or setting["budget"] in reachable(method, grid):
            check(name, method, setting)
