"""Methods of one's own: `register`, files and modules that call it, and what a run may import."""

import importlib
import sys

import jax.numpy as jnp
import pytest
from flax import linen as nn

from efficient_vlm import compressors
from efficient_vlm.compressors import imports
from efficient_vlm.compressors.methods import METHODS
from efficient_vlm.errors import UserError

FILE = """
from efficient_vlm import compressors
from efficient_vlm.compressors import fold, select


@compressors.register
class Firsts(compressors.Compressor):
    '''`firsts`: the first tokens of a row.'''

    every: int = 1
    label = "firsts"

    def __call__(self, tokens, signals=None, *, rng=None):
        if self.budget == tokens.mask.shape[1]:
            return tokens
        scores = -tokens.position.sum(axis=-1)
        return fold.drop(tokens, select.top_k(scores, tokens.mask, self.budget))
"""


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch, tmp_path):
    """METHODS as before, nothing imported, and a cache of this test's own."""
    known = dict(METHODS)
    monkeypatch.setattr(imports, "_loaded", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    METHODS.clear()
    METHODS.update(known)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_method.py"
    path.write_text(FILE)
    return path


def make(label="firsts", **attributes):
    """A new class, as a cell of a notebook makes it each time."""
    fields = {"label": label, "__module__": "__main__", "__qualname__": "Firsts"}
    fields["__call__"] = lambda self, tokens, signals=None, *, rng=None: tokens
    return type("Firsts", (compressors.Compressor,), {**fields, **attributes})


# ---- register ------------------------------------------------------------------------------------


def test_a_registered_method_is_one_of_all():
    cls = make(every=2, __annotations__={"every": int})
    assert compressors.register(cls) is cls  # As a decorator, too.
    assert "firsts" in compressors.names()
    assert compressors.options("firsts") == ("grid", "position_policy", "every")
    module = compressors.build("firsts", budget=4, every=3)
    assert type(module) is cls and module.every == 3
    with pytest.raises(UserError, match="did you mean 'firsts'"):
        compressors.build("fists", budget=4)


def test_a_class_that_is_made_anew_takes_the_place_of_the_one_before():
    compressors.register(make())
    again = compressors.register(make())
    assert METHODS["firsts"] is again
    other = make(__qualname__="Others")
    with pytest.raises(UserError, match=r"'firsts' is the name of __main__.Firsts already"):
        compressors.register(other)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, "not a subclass"),
        (dict, "not a subclass"),
        (compressors.Compressor, "not a subclass"),
        (nn.Dense, "not a subclass"),
        (dict(label=""), "label is ''"),
        (dict(label="My Method"), "label is 'My Method'"),
        (dict(label="a,b"), "label is 'a,b'"),
        (dict(label="all"), "other than all"),
        (dict(label=None), "label is None"),
        (dict(label="divprune"), "'divprune' is the name of efficient_vlm.*DivPrune"),
        (dict(where="before"), "unknown name 'before'"),
        (dict(needs=frozenset(["keyz"])), "did you mean 'keys'"),
        (dict(where="decoder"), "has no stages"),
        (dict(__call__=compressors.Compressor.__call__), "has no __call__"),
    ],
)
def test_what_cannot_be_registered(given, words):
    before = dict(METHODS)
    with pytest.raises(UserError, match=words) as caught:
        compressors.register(make(**given) if isinstance(given, dict) else given)
    assert len(str(caught.value).splitlines()) <= 3
    assert before == METHODS


# ---- files and modules ---------------------------------------------------------------------------


def test_a_file(file):
    assert imports.import_methods([str(file)]) == [str(file)]
    tokens = compressors.VisualTokens.from_grid(jnp.arange(32.0).reshape(1, 16, 2), (4, 4))
    out = compressors.build("firsts", budget=2).apply({}, tokens)
    assert out.embed.tolist() == [[[0, 1], [2, 3]]]
    first = METHODS["firsts"]
    imports.import_methods(str(file))
    assert METHODS["firsts"] is first  # Not run again,
    file.write_text(FILE.replace("every: int = 1", "every: int = 2"))
    imports.import_methods(str(file))
    assert METHODS["firsts"] is not first  # but where it has changed.
    assert METHODS["firsts"].every == 2


def test_a_module_and_its_neighbour(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "methods.py").write_text("from my_package.inner import *\n")
    (tmp_path / "my_package" / "inner.py").write_text(FILE)
    try:
        assert imports.import_methods(["my_package.methods"]) == ["my_package.methods"]
        assert METHODS["firsts"].__module__ == "my_package.inner"
        importlib.reload(sys.modules["my_package.inner"])
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "my_package"]:
            del sys.modules[name]
    assert str(tmp_path) not in sys.path
    # The same class from the same file, under another name of its module.
    path = tmp_path / "my_package" / "inner.py"
    imports.import_methods([str(path)])
    assert METHODS["firsts"].__module__.startswith("inner_")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("my_methods.py", None, ["no such file", "my_method.py"]),
        ("./a-b", None, ["no such file", "dotted name"]),
        ("my_module", None, ["my_module", "No module named"]),
        ("broken.py", "class X(:\n", ["broken.py, line 1", "correct that line"]),
        ("broken.py", "x = 1\ny = z\n", ["NameError", "broken.py, line 2"]),
        ("broken.py", "import numpyy\n", ["No module named 'numpyy'", "broken.py, line 1"]),
        ("empty.py", "x = 1\n", ["registers no method", "@efficient_vlm.compressors.register"]),
        ("data.txt", "x = 1\n", ["not a Python file"]),
        ("clash.py", FILE.replace('"firsts"', '"fastv"'), ["'fastv' is the name of", "FastV"]),
    ],
)
def test_mistakes_are_told_in_three_lines(file, tmp_path, monkeypatch, name, text, words):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        imports.import_methods([name])
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert all(word in message for word in words), message


# ---- what a run may import -----------------------------------------------------------------------


def config_of(file, where="compressor"):
    model = {"compressor": {"name": "none"}, "decoder": {"segments": [{"layers": 2}]}}
    config = {"model": model, "train": {}, "eval": {}, "imports": [str(file)]}
    own = {"name": "firsts", "budget": 4}
    if where == "compressor":
        model["compressor"] = own
    elif where == "segment":
        model["decoder"]["segments"][0]["compressor"] = own
    elif where == "elastic":
        config["train"]["elastic"] = [{"name": "none"}, own]
    else:
        config["eval"]["methods"] = [own]
    return config


@pytest.mark.parametrize("where", ["compressor", "segment", "elastic", "eval"])
def test_a_run_finds_what_was_imported_before(file, where):
    imports.import_methods([str(file)])
    del METHODS["firsts"]
    imports._loaded.clear()
    imports.import_of_run(config_of(file, where), "runs/mine")
    assert "firsts" in METHODS


def test_a_run_runs_nothing_else(file, tmp_path):
    """A workdir of a stranger must not name code that this user has never asked for."""
    marker = tmp_path / "ran"
    file.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n{FILE}")
    with pytest.raises(UserError, match="not imported by you before") as caught:
        imports.import_of_run(config_of(file), "runs/mine")
    assert str(caught.value).endswith(f"add --import={file}")
    assert not marker.exists() and len(str(caught.value).splitlines()) <= 3
    imports.import_methods([str(file)])
    marker.unlink()
    del METHODS["firsts"]
    file.write_text(file.read_text() + "\n# changed\n")
    with pytest.raises(UserError, match="has changed"):
        imports.import_of_run(config_of(file), "runs/mine")
    assert not marker.exists()
    file.unlink()
    with pytest.raises(UserError, match="is not there") as caught:
        imports.import_of_run(config_of(file), "runs/mine")
    assert str(caught.value).endswith("add --import=PATH/my_method.py")


def test_a_module_of_a_run(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "this_module_is_there", sys)
    with pytest.raises(UserError, match="--import=this_module_is_there"):
        imports.import_of_run(config_of("this_module_is_there"), "runs/mine")


def test_a_run_whose_methods_are_known_imports_nothing(tmp_path):
    compressors.register(make())
    imports.import_of_run(config_of(tmp_path / "gone.py"), "runs/mine")


@pytest.mark.parametrize("imported", [5, "x.py", {"a": 1}, [None], None, [["x"]]])
@pytest.mark.parametrize("model", [5, None, {"compressor": 3}, {"decoder": {"segments": 7}}])
def test_configs_of_another_shape_are_for_others_to_refuse(imported, model):
    config = {"model": model, "imports": imported, "train": [], "eval": {"methods": [{"name": 5}]}}
    imports.import_of_run(config, "runs/mine")
