"""Documents say what the code does: the guide runs, the catalogue is fresh, links lead on."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from efficient_vlm.compressors.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def load(path, monkeypatch):
    """A Python file as a module of its own, gone again after the test."""
    name = f"of_documents_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def blocks(path):
    """(language, code) of every fenced block of a Markdown file."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


# ---- docs/compressors.md -------------------------------------------------------------------------


@pytest.fixture
def catalogue(monkeypatch):
    return load(DOCS / "catalogue.py", monkeypatch)


def test_the_catalogue_is_up_to_date(catalogue):
    assert (DOCS / "compressors.md").read_text() == catalogue.page(), (
        "run: python docs/catalogue.py"
    )


def test_the_catalogue_has_every_method_once(catalogue):
    listed = re.findall(r"^\| `(\w+)`", catalogue.page(), re.MULTILINE)
    assert sorted(listed) == sorted(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_docstring_says_where_the_method_comes_from(name, catalogue):
    assert METHODS[name].__doc__, "no docstring"
    assert METHODS[name].__doc__ != METHODS[name].__base__.__doc__
    if name not in (*catalogue.BASELINES, *catalogue.OWN):
        assert catalogue.sources(name), "neither an arXiv number nor a published model"


def test_own_methods_and_baselines_exist(catalogue):
    assert set(catalogue.BASELINES) | set(catalogue.OWN) <= set(METHODS)


# ---- docs/adding_a_compressor.md -----------------------------------------------------------------


@pytest.fixture
def registered():
    """METHODS, and as before at the end."""
    known = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(known)


def test_the_file_of_the_guide_is_its_first_block():
    first = next(text for kind, text in blocks(DOCS / "adding_a_compressor.md") if kind == "python")
    assert (DOCS / "my_method.py").read_text() == first


def test_the_guide_works_as_it_stands(monkeypatch, registered):
    contract = load(ROOT / "tests" / "compressors" / "test_contract.py", monkeypatch)
    code = blocks(DOCS / "adding_a_compressor.md")
    (row,) = [text for language, text in code if language == "diff"]
    assert re.search(r"^\+ +Contrast,$", row, re.MULTILINE)
    space = {"Case": contract.Case, "fixed": contract.fixed, "__name__": "guide"}
    ran = []
    for language, text in code:
        if language != "python":
            continue
        exec(compile(text, f"guide block {len(ran)}", "exec"), space)  # Our own document.
        ran.append(text)
    assert len(ran) >= 6 and {"contrast", "loudest"} <= set(registered)
    for name, test in list(space.items()):
        if name.startswith("test_"):
            test()

    for case in (space["CASE"], contract.Case("loudest")):
        check = contract.TestContract()
        check.test_holds_for_any_batch(case, contract.SQUARE, 5)
        check.test_padding_has_no_influence(case, contract.SQUARE, 5)
        check.test_rows_do_not_see_each_other(case, contract.SQUARE, 5)
        check.test_full_budget_is_the_identity(case, contract.SQUARE, 16)
        contract.test_bfloat16(case, contract.WIDE, 3)
        contract.test_one_patch(case)


def test_the_guide_names_what_exists():
    """Functions, classes and files in `code` of the guide."""
    from efficient_vlm.compressors import Signals, fold, score, select, tokens

    text = (DOCS / "adding_a_compressor.md").read_text()
    modules = {"score": score, "select": select, "fold": fold, "tokens": tokens}
    for module, name in re.findall(r"`(score|select|fold|tokens)\.(\w+)", text):
        field = module == "tokens" and name in tokens.VisualTokens.__dataclass_fields__
        assert field or hasattr(modules[module], name), f"{module}.{name}"
    listed = re.search(r"\| signal .*?\n\n", text, re.DOTALL).group()
    signals = {name for line in listed.splitlines()[2:] for name in re.findall(r"`(\w+)`", line)}
    assert set(Signals.__dataclass_fields__) <= signals
    for path in re.findall(r"`([\w/]+\.py)`", text):
        inside = [ROOT / path, ROOT / "efficient_vlm" / path]
        found = [p for p in inside if p.is_file()] or list(ROOT.glob(f"efficient_vlm/**/{path}"))
        assert found, path


# ---- links ---------------------------------------------------------------------------------------


def documents():
    found = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    return found + sorted((ROOT / "experiments").glob("**/*.md"))


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.split("#")[0]).exists(), target
