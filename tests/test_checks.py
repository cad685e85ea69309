"""Checks of field values: what passes, what is refused, and the three lines of the refusal."""

import dataclasses
import math

import numpy as np
import pytest

from efficient_vlm import checks, errors
from efficient_vlm.checkpoints.safetensors_index import locate
from efficient_vlm.compressors import build
from efficient_vlm.errors import UserError
from efficient_vlm.families.load import known_dtype


@pytest.mark.parametrize("value", [1, 7, np.int64(3), np.uint8(2)])
def test_whole_numbers_pass_as_python_integers(value):
    checked = checks.whole("a.b", value)
    assert type(checked) is int
    assert checked == value


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, True, "1", None, math.nan, [1], np.float32(1)])
def test_other_values_are_no_positive_whole_numbers(value):
    with pytest.raises(UserError) as caught:
        checks.whole("a.b", value)
    assert str(caught.value) == f"a.b: {value!r}\n  allowed: a whole number, 1 or more"


def test_limits_of_whole_numbers():
    assert checks.whole("a", -3, None) == -3
    assert checks.whole("a", 4, 0, 4) == 4
    assert checks.whole("a", None, none=True) is None
    with pytest.raises(UserError, match="allowed: a whole number, 0 to 4, or None\n  fix: a=2"):
        checks.whole("a", 5, 0, 4, none=True, fix="a=2")


@pytest.mark.parametrize(
    ("value", "limits", "good"),
    [
        (0, dict(low=0, below=1), True),
        (1, dict(low=0, below=1), False),
        (0.0, dict(above=0, high=1), False),
        (1.0, dict(above=0, high=1), True),
        (np.float32(0.5), dict(low=0, high=1), True),
        (math.nextafter(1, 2), dict(low=0, high=1), False),
        (-1e300, {}, True),
        (math.nan, {}, False),
        (math.inf, dict(low=0), False),
        (True, dict(low=0), False),
        ("0.5", dict(low=0), False),
        (None, dict(low=0), False),
        (None, dict(low=0, none=True), True),
    ],
)
def test_numbers(value, limits, good):
    if good:
        assert checks.number("a", value, **limits) is value
    else:
        with pytest.raises(UserError, match="^a: .*\n  allowed: a number"):
            checks.number("a", value, **limits)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (dict(low=0), "a number, 0 or more"),
        (dict(low=0, high=1), "a number, 0 to 1"),
        (dict(low=0, below=1), "a number, 0 or more, below 1"),
        (dict(above=0, high=0.9), "a number, above 0, up to 0.9"),
        ({}, "a number"),
    ],
)
def test_limits_are_named(limits, text):
    with pytest.raises(UserError) as caught:
        checks.number("a", "x", **limits)
    assert str(caught.value).splitlines()[1] == f"  allowed: {text}"


@dataclasses.dataclass
class _Settings:
    steps: int = 10
    every: int | None = None
    rate: float = 0.5
    decay: float | None = None


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        (dict(steps=2.0), "x.steps"),
        (dict(steps=None), "x.steps"),
        (dict(every=1.5), "x.every"),
        (dict(rate=None), "x.rate"),
        (dict(decay=-1), "x.decay"),
        (dict(), None),
        (dict(rate=1, every=3, decay=0), None),
    ],
)
def test_annotations_decide_whether_a_field_is_whole_and_may_be_none(changed, field):
    settings = _Settings(**changed)
    names = [each.name for each in dataclasses.fields(settings)]
    if field is None:
        checks.number_fields(settings, "x", *names, low=0)
    else:
        with pytest.raises(UserError, match=f"^{field}: "):
            checks.number_fields(settings, "x", *names, low=0)


def test_names():
    assert checks.one_of("a", "cosine", ("cosine", "linear")) == "cosine"
    with pytest.raises(UserError, match="(?s)^a: .*'cosin'.*did you mean 'cosine'"):
        checks.one_of("a", "cosin", ("cosine", "linear"))
    checks.known_fields("a", {"x": 1}, ("x", "y"))
    with pytest.raises(UserError, match="(?s)^a: .*'yy'.*did you mean 'y'"):
        checks.known_fields("a", {"x": 1, "yy": 2}, iter(("x", "y")))


@pytest.mark.parametrize("value", [1, 0, "True", None, np.bool_(True)])
def test_flags(value):
    assert checks.flag("a", False) is False
    with pytest.raises(UserError, match="allowed: True, False"):
        checks.flag("a", value)


@pytest.mark.parametrize(
    "ask",
    [
        lambda long: errors.unknown("compressor.name", long, ("divprune", "fastv")),
        lambda long: checks.whole("train.steps", long),
        lambda long: checks.number("temperature", [long] * 9, 0, 1),
        lambda long: checks.flag("train.resume", long),
        lambda long: locate(long),
        lambda long: build("divprune", budget=4, grid=long),
        lambda long: known_dtype("dtype", long),
    ],
)
def test_no_error_repeats_a_long_input(ask):
    """A picture that lands in the wrong field is not printed: at most 80 characters are."""
    with pytest.raises(UserError) as caught:
        raise ask("x" * 10_000)
    assert "x" * 81 not in str(caught.value) and len(str(caught.value).splitlines()) <= 3
