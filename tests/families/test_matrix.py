"""Training-free methods on published families: half of the tokens, all of them, or a clear refusal.

The plain `pytest` runs every method on LLaVA and a few on every family; `pytest -m matrix
tests/families/test_matrix.py` runs all on all. `method_matrix.py` has the tables.
"""

import functools

import jax
import numpy as np
import pytest
from method_matrix import (
    CACHED,
    FEW,
    OF_ONE_SIZE,
    ONE_SIZE,
    REFUSED,
    TRAINED,
    TRAINING_FREE,
    Subject,
    golden_models,
)
from method_table import DOCS, section

from efficient_vlm.compressors.methods import METHODS, reachable
from efficient_vlm.errors import UserError
from efficient_vlm.families.checks import check_compressor

MODELS = golden_models()
FOLLOW = np.array([5, 6], np.int32)  # The token behind the prompt of each row.
POLICIES = ("retain", "reindex")


@functools.lru_cache(maxsize=1)
def subject(name):
    jax.clear_caches()  # Programs of the family before; thousands at once are too many.
    return Subject(name)


@functools.lru_cache(maxsize=1)
def uncompressed(name):
    """The reading without a compressor: (logits, where the slots are)."""
    one = subject(name)
    return one.at(one.model).whole(FOLLOW)


def reading(name, method, full, policy):
    one = subject(name)
    options = one.options(method, full)
    return one.at(one.model.with_compressor(method, **options, position_policy=policy))


def held(source):
    """How many tokens hold the slots of each row."""
    return np.array([len(set(row[row >= 0])) for row in source])


def close(actual, expected, scale, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def check_refused(name, method):
    """The message says in three lines at most why it cannot be."""
    with pytest.raises(UserError) as caught:
        reading(name, method, False, "retain")
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert REFUSED[method][name] in message


def check_reduced(name, method, policies, cached):
    """About half of the tokens: fewer tokens, finite logits, the text where it was."""
    full, before = uncompressed(name)
    scale, one = np.abs(full).max(), subject(name)
    by_policy = []
    for policy in policies:
        found = reading(name, method, False, policy)
        logits, source = found.whole(FOLLOW)
        text, (rows, last) = found.text, found.rows
        count, lengths, placement = text.text.shape[1], text.lengths, text.placement
        live = np.arange(count + 1) <= lengths[:, None]
        assert np.isfinite(logits[live]).all()
        if method == "none":
            close(logits[live], full[live], scale, 1e-5)
            continue
        assert (held(source) <= held(before)).all()
        fewer = held(source).sum() < held(before).sum()
        assert fewer or METHODS[method].whole_grid
        assert np.abs(logits - full)[live].max() > 1e-4 * scale
        by_policy.append(logits[live])
        if one.family.blocks != "prefix":
            # Text in front of all images sees none of them, whatever is left of them.
            slots = [prompt.slots for prompt in one.inputs(one.model).prompts]
            first = [placement.visual_index[row, at].min() for row, at in enumerate(slots)]
            above = np.arange(count) < lengths[:, None]
            above &= placement.text_index < np.array(first)[:, None]
            above &= placement.text_block == 0  # Molmo2: the tokens around an image see all of it.
            assert above.any()
            close(logits[:, :-1][above], full[:, :-1][above], scale, 1e-5)
        if cached:
            steps, visual = found.cached(FOLLOW)
            assert visual < before.shape[1] or METHODS[method].whole_grid
            close(steps[:, 0], logits[rows, last], scale, 1e-5)
            close(steps[:, 1], logits[rows, last + 1], scale, 1e-5)
            for step, place in ((0, last), (1, last + 1)):  # Greedily the same tokens.
                chosen = logits[rows, place, steps[:, step].argmax(axis=-1)]
                close(chosen, logits[rows, place].max(axis=-1), scale, 1e-5)

    if len(by_policy) == 2 and method in ("stride", "pyramiddrop"):
        # Half of the tokens leave gaps, so text behind them moves up.
        assert np.abs(by_policy[0] - by_policy[1]).max() > 1e-4 * scale


def check_full(name, method, policies):
    """All tokens: nothing has changed, under the policy that would renumber gaps too."""
    if subject(name).options(method, True) is None:
        return
    full, _ = uncompressed(name)
    if METHODS[method].where != "between":
        # A decoder or encoder of its own to compile: one policy, not the same for all families.
        policies = policies[len(name) % len(policies) :][:1]
    for policy in policies:
        logits, _ = reading(name, method, True, policy).whole(FOLLOW)
        close(logits, full, np.abs(full).max(), 1e-5)


def check(name, method, policies, cached, full=True):
    if name in REFUSED.get(method, {}):
        check_refused(name, method)
        if name not in OF_ONE_SIZE.get(method, ()):
            return
        name += ONE_SIZE
    check_reduced(name, method, policies, cached)
    if full:
        check_full(name, method, policies)


# ---- part of the plain `pytest` ------------------------------------------------------------------


def test_a_method_is_trained_or_training_free():
    one = subject("llava")
    model = one.inputs(one.model).model
    assert set(METHODS) >= TRAINED
    for method in TRAINED - {"minicpm_merger"}:  # Inside the encoder, for an even grid.
        budget = reachable(method, one.grid)[-1]
        with pytest.raises(UserError, match="weights of its own"):
            check_compressor(model.with_compressor(method, budget))


@pytest.mark.parametrize("method", TRAINING_FREE)
def test_llava_with_every_method(method):
    policy = POLICIES[TRAINING_FREE.index(method) % 2]
    short = METHODS[method].where == "between" or method in CACHED  # To compile.
    check("llava", method, (policy,), cached=method in CACHED, full=short)


@pytest.mark.parametrize("name", [model for model in MODELS if model != "llava"])
def test_every_family_with_a_few_methods(name):
    for method, policy in FEW.items():
        check(name, method, (policy,), cached=False, full=METHODS[method].where == "between")


@pytest.mark.parametrize("name", MODELS)
def test_attention_of_a_class_token_needs_one(name):
    """Defaults are the papers', for CLIP; the message says what other encoders take."""
    one = subject(name)
    model = one.model.with_compressor("fastervlm", 1)
    if one.has_class_token:
        return
    with pytest.raises(UserError, match="column_mean"):
        one.at(model)


def test_the_table_in_the_documents_is_this_one():
    text = DOCS.read_text(encoding="utf-8")
    assert section() in text, "run: python tests/families/method_table.py"


def test_every_golden_model_is_in_the_tables():
    known = {name for refused in REFUSED.values() for name in refused}
    assert known <= set(MODELS)
    assert set(REFUSED) <= set(TRAINING_FREE)


# ---- the whole matrix ----------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "method"),
    [
        # A process keeps the programs of one family: with --dist=loadgroup it gets all of them.
        pytest.param(name, method, marks=pytest.mark.xdist_group(name))
        for name in MODELS
        for method in TRAINING_FREE
    ],
)
def test_every_family_with_every_method(name, method):
    check(name, method, POLICIES, cached=method in CACHED or name == "llava")
