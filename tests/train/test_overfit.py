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
    "prompt": (dict(name="prompt", tokens=16), 3e-2, 300),
    "prefix": (dict(name="prefix", tokens=16), 1e-1, 300),
    "bias": (dict(name="bias"), 3e-2, 400),
}
# These steer what a decoder already does, so they start from one that can do it when it is told to.
STEERING = ("prompt", "prefix", "bias")
ANSWERS = np.random.default_rng(0).permutation(16)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return evlm.from_pretrained(wide_checkpoint(tmp_path_factory.mktemp("wide") / "qwen"))


def questions(answers, told=""):
    """Questions that name a number, half of them beside a picture; the answer is another number."""
    rows = []
    for n, answer in enumerate(answers):
        images = [png(n, 16, 16)] if n % 2 else []
        question = f"{told}{'<image> ' * len(images)}what is {n} ?"
        rows.append(row(images, question, f"number {answer} ."))
    return rows


def learn(vlm, rows, adapt, rate, steps):
    prompt = adapt["tokens"] if adapt["name"] == "prompt" else 0
    return vlm.finetune(
        rows,
        adapt=adapt,
        learning_rate=rate,
        steps=steps,
        batch_size=1,
        data=dict(pack_tokens=len(rows) * (20 + prompt)),
        optimizer=dict(weight_decay=0.0),
        log=lambda *_: None,
    )


@pytest.fixture(scope="module")
def steerable(vlm):
    """It gives these answers when the question begins with a certain word, else other ones."""
    rows = questions(ANSWERS, "two ") + questions(np.roll(ANSWERS, 1))
    return learn(vlm, rows, dict(name="full"), 3e-3, 200)


@pytest.mark.parametrize("method", METHODS)
def test_sixteen_rows_by_heart(method, request):
    start = request.getfixturevalue("steerable" if method in STEERING else "vlm")
    rows = questions(ANSWERS)
    assert start.loss(rows) > 1
    assert learn(start, rows, *METHODS[method]).loss(rows) < 0.05
    jax.clear_caches()
