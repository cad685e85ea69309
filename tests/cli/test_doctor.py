"""`efficient-vlm doctor`, and what the package imports against what setup.cfg declares."""

import ast
import configparser
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import efficient_vlm
from efficient_vlm.cli import doctor
from efficient_vlm.cli import main as cli
from efficient_vlm.errors import UserError

PACKAGE = Path(efficient_vlm.__file__).parent
# Imported only where they are there, or by an option of an extra.
OPTIONAL = {"ipython", "lmms-eval", "pillow-heif", "sacrebleu", "tensorboardx"}
# What only `audit aot` and `audit kernels` look for is no import.
MODULES = {
    **{
        "train": "cli.run",
        "eval": "cli.verbs.eval",
        "audit": "cli.audit",
        "compress": "cli.compress",
    },
    **{"audit aot": "cli.audit_aot", "audit kernels": "cli.audit_kernels"},
    **{"audit sharding": "cli.audit_sharding", "report": "report.report"},
    **dict.fromkeys(("generate", "import", "export"), "cli.published"),
    **{"methods": "cli.list_methods", "metrics": "cli.list_metrics", "presets": "cli.presets"},
    **dict.fromkeys(("data build", "data inspect"), "cli.data"),
}


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports_of(path):
    """Names that a file imports anywhere, those for type checkers left out."""
    names = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


@pytest.fixture(scope="module")
def imports():
    """Module -> what it imports."""
    return {name_of(path): imports_of(path) for path in PACKAGE.rglob("*.py")}


def distributions(names):
    """Normalised names of the packages that modules outside the standard library come from."""
    known = importlib.metadata.packages_distributions()
    tops = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    found = set()
    for top in tops - {"efficient_vlm"}:
        found |= {canonicalize_name(each) for each in known.get(top, [top])}
    return found


def declared():
    """(install_requires, extras) of setup.cfg, {normalised name: requirement} each."""
    parsed = configparser.ConfigParser()
    parsed.read(PACKAGE.parent / "setup.cfg")

    def read(text):
        lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
        needs = [Requirement(line) for line in lines if line]
        return {canonicalize_name(need.name): need for need in needs}

    extras = {name: read(text) for name, text in parsed["options.extras_require"].items()}
    return read(parsed["options"]["install_requires"]), extras


def test_every_import_is_declared(imports):
    required, extras = declared()
    used = distributions(name for names in imports.values() for name in names)
    assert used - OPTIONAL <= set(required)
    assert {"scipy", "numpy", "jax", "pillow"} <= used  # The reader sees them.
    assert "tensorboardx" in extras["tensorboard"]
    assert "scikit-learn" not in required
    # Nothing is declared that nobody imports, but what tensorflow-datasets needs and does not say.
    assert set(required) - used == {"array-record", "importlib-resources"}


def test_the_needs_of_every_verb(imports):
    """NEEDS against what the modules of a verb import, directly or not."""
    leaves = {each.prog.partition(" ")[2] for each in cli.make_parser().every() if each.prog}
    assert set(doctor.NEEDS) == set(MODULES) == leaves - {"", "data", "doctor"}
    required, extras = declared()
    for verb, needs in doctor.NEEDS.items():
        todo, seen, outside = [f"efficient_vlm.{MODULES[verb]}"], set(), set()
        while todo:
            module = todo.pop()
            if module in imports and module not in seen:
                seen.add(module)
                outside |= imports[module]
                todo += [*imports[module], module.rpartition(".")[0]]
        assert distributions(outside) - OPTIONAL <= set(needs), verb
        assert set(needs) - {"jaxlib"} <= set(required), verb
    for extra in doctor.EXTRAS:
        assert extra.name in extras and set(extra.verbs) <= set(doctor.NEEDS)


@pytest.fixture
def hidden(monkeypatch):
    """Hides distributions, or gives them another version: hidden(scipy=None, optax="0.1")."""
    real = importlib.metadata.version

    def hide(**versions):
        def version(name):
            if name in versions and versions[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions.get(name) or real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    bounds = ["scipy>=1.13,<2", "optax>=0.2.8,<0.3", 'torch>=2; extra == "parity"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: bounds)
    return hide


def test_what_is_missing_is_named_for_each_verb(command, hidden):
    hidden(scipy=None, optax="0.1.5")
    code, out, _ = command("doctor")
    assert code == 1
    lines = {line[:15].strip(): line for line in out.splitlines()}
    scipy = 'scipy is not installed: pip install "scipy<2,>=1.13"'
    optax = 'optax 0.1.5 is not <0.3,>=0.2.8: pip install "optax<0.3,>=0.2.8"'
    assert scipy in lines["train"] and optax in lines["train"]
    assert scipy in lines["report"] and optax not in lines["report"]
    assert lines["audit kernels"].endswith("ready")
    assert f"problem: {scipy}" in out
    code, out, _ = command("doctor", "audit", "kernels")
    assert code == 0 and "scipy is" not in out and out.endswith("Ready.\n")
    code, out, _ = command("doctor", "report", "--json")
    assert code == 1 and json.loads(out)["problems"] == [scipy]


def test_all_is_well_here(command):
    code, out, err = command("doctor")
    assert code == 0 and "Devices: cpu" in out and out.endswith("Ready.\n"), out + err


def test_the_compilers_of_what_is_not_here(command, hidden):
    missing = dict.fromkeys(("libtpu", *doctor._GPU))
    hidden(**missing)
    fix = "libtpu not installed: pip install 'efficient_vlm[tpu]'"
    code, out, _ = command("doctor")
    assert code == 0 and fix in out and "efficient_vlm[aot-gpu]" in out
    code, out, _ = command("doctor", "audit", "kernels")
    assert code == 1 and f"problem: TPUs that are not here: {fix}" in out


def test_a_device_that_jax_does_not_use(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert doctor._devices(tmp_path)[1] == []
    (tmp_path / "nvidia0").touch()
    (problem,) = doctor._devices(tmp_path)[1]
    assert "NVIDIA GPU" in problem and "efficient_vlm[cuda]" in problem
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # As was asked for.
    assert doctor._devices(tmp_path)[1] == []


def test_an_unknown_verb(command):
    with pytest.raises(UserError, match="did you mean 'train'") as error:
        doctor.main("trian")
    assert len(str(error.value).splitlines()) <= 3


def test_without_jax_itself():
    """The command line, and all that doctor says of packages, stand without it."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(['jax', 'flax', 'numpy', 'rich'])\n"
        "from efficient_vlm.cli import main; sys.exit(main.run(['doctor', 'train']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    assert "problem: JAX finds no device: import of jax halted" in done.stdout


def test_packages_are_looked_at_without_jax():
    code = (
        "import sys, importlib.metadata as m\n"
        "from efficient_vlm.cli import doctor\n"
        "doctor._wrong(['jax', 'flax']), doctor._extras('audit aot')\n"
        "print({'jax', 'flax', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
