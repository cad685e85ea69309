"""`efficient-vlm methods`: what it lists is what the classes have."""

import dataclasses
import json
import shlex

import pytest

from efficient_vlm.cli import main as cli
from efficient_vlm.cli import methods as chosen
from efficient_vlm.cli.docstrings import described, description, summary
from efficient_vlm.cli.list_methods import describe, row
from efficient_vlm.compressors.methods import METHODS, options

TRAINED = {
    *("pixel_shuffle", "resampler", "mlp", "deco", "c_abstractor", "ldp", "ldpv2", "tokenpacker"),
    *("perceiver", "qformer", "mqt", "molmo_pool", "minicpm_merger", "text_topk", "visionselector"),
}


def test_all_methods(command):
    code, out, err = command("methods", "--json")
    assert code == 0, err
    rows = {each["name"]: each for each in json.loads(out)}
    assert list(rows) == list(METHODS)
    assert {name for name, each in rows.items() if each["trained"]} == TRAINED
    assert {name: each["where"] for name, each in rows.items()} == {
        name: method.where for name, method in METHODS.items()
    }
    assert rows["fastv"]["source"] == ["2403.06764"]
    code, out, _ = command("methods")
    assert code == 0 and max(map(len, out.splitlines())) <= 110
    for name, each in rows.items():
        assert f" {name} " in out and each["summary"].split()[0] in out


@pytest.mark.parametrize("name", METHODS)
def test_one_method(name, monkeypatch, capsys):
    """Its options are the fields of its class, each with a sentence; its example runs."""
    found = describe(name)
    listed = {each["name"]: each for each in found["options"]}
    assert set(listed) == {"budget", *options(name)}
    fields = {field.name: field for field in dataclasses.fields(METHODS[name])}
    for option, each in listed.items():
        assert each["meaning"], option
        if option != "budget":
            assert each["default"] == fields[option].default
    assert listed["budget"]["required"] is not METHODS[name].optional_budget
    assert found["summary"]
    # That the model runs with each method is for other tests, and takes longer.
    monkeypatch.setattr(chosen, "dry_run", lambda *args: None)
    program, *words = shlex.split(found["example"])
    assert program == "efficient-vlm" and cli.run(words) == 0
    assert name in capsys.readouterr().out


def test_the_page_of_a_method(command):
    code, out, err = command("methods", "visionzip")
    assert code == 0, err
    for text in (
        "visionzip: T - C dominant patches",
        "Acts between encoder and decoder",
        "https://arxiv.org/abs/2412.04467",
        "  budget: int, required",
        "  contextual: ",
        "Example: efficient-vlm audit",
    ):
        assert text in out, out
    code, out, err = command("methods", "vizionzip")
    assert code == 2 and "did you mean 'visionzip'" in err and len(err.splitlines()) <= 3


class Base:
    """A base.

    Attributes:
      first, second: two at
        once.
      third: of the base.
    """


@dataclasses.dataclass
class Derived(Base):
    """`derived` (of a base): what it is. What else
    it is.

    More, e.g.: of it.

    Args:
      hidden: no attribute.

    Attributes:
      third: its own,
        longer: with a colon.

      fourth: behind an empty line.

    Class attributes:
      fifth: not a field.
    """

    first: int
    second: str = "a"
    third: tuple = dataclasses.field(default_factory=tuple)
    fourth: None = None
    fifth: int = 0
    hidden: int = 0


def test_docstrings_are_read():
    sentences = {field.name: field.sentence for field in described(Derived, frozenset(["hidden"]))}
    assert sentences == {
        "first": "two at once.",
        "second": "two at once.",
        "third": "its own, longer: with a colon.",
        "fourth": "behind an empty line.",
        "fifth": "",
    }
    defaults = {field.name: field.default for field in described(Derived)}
    assert defaults["first"] is dataclasses.MISSING and defaults["third"] == ()
    assert summary(Derived) == "what it is"
    assert description(Derived) == "More, e.g.: of it."


def test_a_method_of_ones_own_that_does_not_run_is_listed(new_process):
    from efficient_vlm import compressors

    class Broken(compressors.Compressor):
        label = "broken"

        def __call__(self, tokens, signals=None, *, rng=None):
            raise RuntimeError("not written yet")

    compressors.register(Broken)
    assert row("broken") == dict(
        name="broken", where="between", trained=None, summary="", source=[]
    )
