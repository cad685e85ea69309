"""Each way to adapt a model learns 16 rows by heart, with pictures in half of them."""

import jax
import numpy as np
import pytest
from tuned_models import png, row, wide_checkpoint

import efficient_vlm as evlm

pytestmark = pytest.mark.slow

# Method -> fields of its adaptation, learning rate, steps.
LINEAR = dict(rank=8, alpha=16.0, targets="all-linear")
METHODS = {
    "full": (dict(name="full"), 3e-3, 60),
    "lora": (dict(name="lora", **LINEAR), 1e-2, 300),
    # The same scale as above, where alpha is divided by the root of the rank.
    "rslora": (dict(name="rslora", **LINEAR | dict(alpha=16 / 8**0.5)), 1e-2, 300),
    "dora": (dict(name="dora", **LINEAR), 1e-2, 300),
    "qlora": (dict(name="qlora", **LINEAR), 1e-2, 300),
    "lora on int8": (dict(name="lora", base="int8", **LINEAR), 1e-2, 300),
    "prompt": (dict(name="prompt", tokens=16), 1e-1, 600),
    "prefix": (dict(name="prefix", tokens=16), 1e-1, 600),
    "bias": (dict(name="bias"), 1e-1, 600),
}


# What steers a decoder of random weights from outside, or by its biases, learns part of the rows:
# the share of the first loss that may be left.
LIMITS = {"prompt": 0.85, "prefix": 0.15, "bias": 0.3}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return evlm.from_pretrained(wide_checkpoint(tmp_path_factory.mktemp("wide") / "qwen"))


@pytest.fixture(scope="module")
def rows():
    """Questions that name a number, half of them beside a picture; the answer is another number."""
    answers = np.random.default_rng(0).permutation(16)
    found = []
    for n, answer in enumerate(answers):
        images = [png(n, 16, 16)] if n % 2 else []
        found.append(row(images, f"{'<image> ' * len(images)}what is {n} ?", f"number {answer} ."))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_sixteen_rows_by_heart(vlm, rows, method):
    adapt, rate, steps = METHODS[method]
    data = dict(pack_tokens=320)
    seen = []
    tuned = vlm.finetune(
        rows,
        adapt=adapt,
        learning_rate=rate,
        steps=steps,
        batch_size=1,
        data=data,
        optimizer=dict(weight_decay=0.0),
        log=lambda step, metrics: seen.append(metrics["loss"]),
    )
    assert seen[0] > 1
    loss = tuned.loss(rows, **data)
    assert loss < LIMITS.get(method, 0.05) * (seen[0] if method in LIMITS else 1), [
        round(float(value), 3) for value in seen[:: max(1, steps // 10)]
    ]
    jax.clear_caches()
