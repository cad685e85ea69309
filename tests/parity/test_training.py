"""Training steps beside the reference library: losses, gradients of all parameters, AdamW.

Of the original Molmo there is no such class: `tests/families/test_training_golden.py` has it.
"""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import training_reference as reference
from training_steps import CASES, GOLDEN, by_layer, open_golden, train

pytestmark = pytest.mark.parity

NAMES = [name for name in CASES if name not in reference.WITHOUT_CLASS]
# Share of the largest of all gradients below which float32 holds nothing but rounding.
ROUNDING = 1e-6


def check_gradients(ours, theirs):
    """Each within 1e-4 of its largest entry."""
    assert ours.keys() == theirs.keys()
    top = max(np.abs(leaf).max() for leaf in theirs.values())
    for path, wanted in theirs.items():
        largest = np.abs(wanted).max()
        if 0 < largest < ROUNDING * top:
            # A bias of keys adds the same to all logits of a query: its true gradient is 0.
            assert path.endswith("attention/key/bias") or path == "project/key/bias"
            assert np.abs(ours[path]).max() < ROUNDING * top
            continue
        np.testing.assert_allclose(ours[path], wanted, atol=1e-4 * largest, err_msg=path)


def check_weights(ours, theirs, before):
    """Each within 1e-4 of its largest entry, and moved by far more than that."""
    assert ours.keys() == theirs.keys()
    for path, wanted in theirs.items():
        largest = np.abs(wanted).max()
        assert np.abs(wanted - before[path]).max() > 1e-3 * largest
        np.testing.assert_allclose(ours[path], wanted, atol=1e-4 * largest, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_the_reference_s(name, tmp_path):
    theirs, golden = reference.train(name, tmp_path), open_golden(name, reference.ANSWER)
    params = golden.read(GOLDEN / name)
    ours = train(golden.model, params, golden.inputs, reference.STEPS, reference.ADAMW)
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-5)
    check_gradients(by_layer(ours.gradient), by_layer(golden.read(theirs.gradients)))
    weights = by_layer(golden.read(theirs.weights))
    check_weights(by_layer(ours.params), weights, by_layer(params))
