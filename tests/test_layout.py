"""The layout of the package: rooms import downwards, nothing goes round in a circle.

Read from the source with `ast`, so that imports hidden in functions count as well.
"""

import ast
import dataclasses
import graphlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import efficient_vlm

# Lowest first: a room imports itself and those before it. The modules of the ground are one room.
GROUND = (
    *("errors", "checks", "fields", "files", "exact_json", "terminal", "byte_bar", "runtime"),
    *("shapes", "sharding"),
)
ROOMS = (
    *("checkpoints", "kernels", "nn", "compressors", "models", "adapt", "processing", "families"),
    *("data", "train", "inference", "costs", "serving", "evaluation", "report", "cli"),
)
# Modules, or folders with all below them, that may import one of ours inside a function, and why;
# "" is the package itself, alone.
HIDDEN = {
    "": "`import efficient_vlm` is free: names load their modules when they are first used",
    "cli.arguments": "a shell completes words in 0.1 s: names are looked up when it asks for them",
    "cli.main": "--config.help lists the fields of classes that load JAX (2 s)",
    "cli.verbs": "--help starts in 0.1 s: a verb loads JAX (2 s) when it runs",
    "compressors.imports": "--import names the module, which is the user's own",
    "data": "names load their modules when they are first used: `DataConfig` needs no NumPy",
    "data.token_bench.store": "TFDS (0.4 s) is loaded for generated data, not for one's own",
    "inference.load": "a fine-tuned run brings training (optax, orbax: 1 s), a published model not",
    "inference.pretrained": "training (optax, orbax: 1 s) is loaded for who trains",
    "kernels.attention.dispatch": "Pallas (0.3 s) is loaded for the platform that needs it",
    "kernels.paged_attention": "Pallas (0.3 s) is loaded where a program for TPUs is traced",
    "processing.chat_template": "jinja2 (0.1 s) is loaded for checkpoints that have a template",
}


@dataclasses.dataclass(frozen=True)
class Import:
    """One import of the package's own.

    Attributes:
      importer, imported: modules, without the package's name; "" is the package itself and None a
        module that is known only when the program runs (`importlib.import_module`).
      line: of the importer's file.
      hidden: whether it stands in a function.
    """

    importer: str
    imported: str | None
    line: int
    hidden: bool

    def __str__(self) -> str:
        return f"{self.importer or '__init__'}:{self.line} imports {self.imported}"


def modules_of(root: Path) -> dict[str, Path]:
    """Module -> file of a package; a folder's `__init__.py` is the folder's own module."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(root: Path) -> list[Import]:
    """Every import of a package's own modules, in all of its modules."""
    modules = modules_of(root)
    return [
        Import(name, imported, node.lineno, hidden)
        for name, path in modules.items()
        for node, hidden in _statements(ast.parse(path.read_text()))
        for imported in _targets(node, name, path, root.name, modules)
    ]


def _statements(node: ast.AST, hidden: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Import statements and uses of `import_module`, and whether they stand in a function."""
    for child in ast.iter_child_nodes(node):
        word = getattr(child, "attr", getattr(child, "id", getattr(child, "name", None)))
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, hidden
        elif word in ("import_module", "__import__"):
            yield child, True
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _statements(child, hidden or function)


def _targets(
    node: ast.AST, importer: str, path: Path, package: str, modules: Mapping[str, Path]
) -> Iterator[str | None]:
    """The modules that one statement of `importer` names."""
    if not isinstance(node, ast.Import | ast.ImportFrom):
        yield None
        return
    if isinstance(node, ast.Import):
        for alias in node.names:
            top, _, rest = alias.name.partition(".")
            if top == package:
                yield rest
        return
    base = (node.module or "").split(".")
    if node.level:  # from . import x
        own = [package, *importer.split(".")] if importer else [package]
        up = node.level - (path.name == "__init__.py")
        base = [*own[: len(own) - up], *filter(None, base)]
    if base[0] == package:
        for alias in node.names:
            whole = ".".join([*base[1:], alias.name])
            yield whole if whole in modules else ".".join(base[1:])


def layout_problems(
    root: Path, rooms: Sequence[str] = ROOMS, hidden: Mapping[str, str] = HIDDEN
) -> list[str]:
    """What is wrong with the imports of the package in `root`, one sentence each; [] if nothing.

    Args:
      root: folder of the package.
      rooms: its folders, lowest first.
      hidden: modules that may import inside a function, and why.
    """
    modules, imports = modules_of(root), imports_of(root)
    rank = {"": len(rooms) + 1, **dict.fromkeys(GROUND, 0)}
    rank |= {room: 1 + i for i, room in enumerate(rooms)}
    strangers = {room for name in modules if (room := name.partition(".")[0]) not in rank}
    problems = [f"{room}: no room of the layout" for room in sorted(strangers)]
    if strangers:
        return problems
    for each in imports:
        room, other = each.importer.partition(".")[0], (each.imported or "").partition(".")[0]
        # The package itself imports nothing at its top: whoever asks it for its version is free.
        if other and rank[other] > rank[room]:
            problems.append(f"{each}: {other} is above {room}")
    inside = [each for each in imports if each.hidden]
    covered = {each: _covering(each.importer, hidden) for each in inside}
    problems += [f"{each} inside a function" for each in inside if not covered[each]]
    unused = set(hidden) - {name for names in covered.values() for name in names}
    problems += [f"HIDDEN: {name or '__init__'} hides no import" for name in sorted(unused)]
    return problems + _circle(modules, imports)


def _covering(importer: str, hidden: Mapping[str, str]) -> set[str]:
    """The entries that a module stands under: its own, and those of the folders around it."""
    parts = importer.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))} & set(hidden)


def _circle(modules: Mapping[str, Path], imports: Sequence[Import]) -> list[str]:
    """One circle, if there is any.

    Importing a module runs the folders around it too; those around the importer run already.
    """
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for each in imports:
        parts = (each.imported or "").split(".") if each.imported else []
        around = {".".join(parts[: i + 1]) for i in range(len(parts))} & set(modules)
        own = each.importer.split(".")
        graph[each.importer] |= around - {".".join(own[:i]) for i in range(1, len(own) + 1)}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["a circle: " + " <- ".join(error.args[1])]
    return []


def test_the_package_keeps_its_layout():
    assert layout_problems(Path(efficient_vlm.__file__).parent) == []


def test_every_kind_of_import_is_seen():
    """The reader against the package as it is: what a reader of the code knows."""
    imports = imports_of(Path(efficient_vlm.__file__).parent)
    found = {(each.importer, each.imported, each.hidden) for each in imports}
    assert ("nn.attention", "kernels.attention", False) in found  # From a folder's `__init__`.
    assert ("train.loop", "train.guards", False) in found  # `from package import module`.
    assert ("cli.verbs.lists", "cli.doctor", True) in found
    assert ("", None, True) in found  # importlib.import_module
    assert ("runtime", "", False) in found  # `from efficient_vlm import __version__`


GOOD = {
    "__init__": "__version__ = '1'\n",
    "errors": "import os\n",
    "low/__init__": "",
    "low/a": "from house.errors import os\nfrom house import __version__\n",
    "low/b": "from . import a\n",
    "high/__init__": "from house.high.c import x\n",
    "high/c": "import house.low.b\nx = 1\n",
    "high/late/__init__": "",
    "high/late/verb": "def f():\n    from house.low import a\n    return a\n",
}
LATE = {"high.late": "slow to load"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"low/a": "from house.high import c\n"}, "low.a:1 imports high.c: high is above low"),
        ({"low/a": "import house.high.c\n"}, "low.a:1 imports high.c: high is above low"),
        ({"errors": "from .low import a\n"}, "errors:1 imports low.a: low is above errors"),
        ({"low/a": "if 1:\n  from ..high import c\n"}, "low.a:2 imports high.c: high is above low"),
        ({"low/a": "from house.low import b\n"}, "a circle"),
        ({"low/a": "def f():\n  from house.low import b\n"}, "a circle"),
        ({"high/c": "from house.high.late.verb import f\nfrom house.high import x\n"}, None),
        ({"high/c": "import house.high.d\n", "high/d": "import house.high.c\n"}, "a circle"),
        ({"low/b": "def f():\n  from house.low import a\n"}, "low.b:2 imports low.a inside"),
        (
            {"low/b": "class A:\n  def f():\n    import house.errors\n"},
            "low.b:3 imports errors inside",
        ),
        ({"low/b": "from importlib import import_module as get\n"}, "low.b:1 imports None"),
        ({"low/b": "import importlib\nimportlib.import_module('os')\n"}, "low.b:2 imports None"),
        ({"high/later": "def f():\n  import house.errors\n"}, "high.later:2 imports errors inside"),
        ({"high/late/verb": "from house.low import a\n"}, "HIDDEN: high.late hides no import"),
        ({"attic/__init__": ""}, "attic: no room of the layout"),
        ({"utils": ""}, "utils: no room of the layout"),
    ],
)
def test_each_violation_is_found(tmp_path, changed, words):
    root = tmp_path / "house"
    for name, text in {**GOOD, **changed}.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    problems = layout_problems(root, rooms=("low", "high"), hidden=LATE)
    assert any(words in each for each in problems) if words else problems == []


# Functions of JAX that order floats by themselves, and where they may stand: "module" or
# "module: what", with the reason that NaN, -0.0 and ties are settled there.
RAW_ORDER = {
    "top_k",
    "approx_max_k",
    "argmax",
    "argmin",
    "argsort",
    "sort",
    "sort_key_val",
    "unique",
}
WHOLE = "orders whole numbers or truth values"
MAY_ORDER = {
    "kernels.ordering": "the one door",
    "compressors.between.divprune": WHOLE,
    "compressors.between.prumerge": "quartiles: values of `comparable` scores, no indices",
    "compressors.in_decoder.clusters": WHOLE,
    "compressors.in_encoder.cut": WHOLE,
    "compressors.in_encoder.unit_cut": WHOLE,
    "compressors.in_encoder.bipartite": "truth values, and `comparable` cosines",
    "compressors.projectors.gather_pool": WHOLE,
    "compressors.select": WHOLE,
    "compressors.tokens": WHOLE,
    "inference.sampling": "tokens of `cleaned` logits, whose rules are those of published samplers",
    "inference.stages": "the likeliest token; logits of NaN mean nothing",
    "kernels.attention.blocks": WHOLE,
    "kernels.attention.compact": WHOLE,
    "kernels.grouped_matmul": WHOLE,
    "models.inputs": WHOLE,
    "models.prompt_layout": "positions: values, no indices",
    "nn.experts": WHOLE,
    "nn.moe": "a softmax: no -0.0, and all of a row is NaN or nothing",
    "train.losses": "a metric",
}


def raw_orders(root: Path) -> dict[str, list[int]]:
    """Module -> lines that call `jax.lax` or `jax.numpy` to order something."""
    found = {}
    for name, path in modules_of(root).items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in RAW_ORDER:
                source = ast.unparse(node.value)
                if source in ("jnp", "jax.numpy", "lax", "jax.lax"):
                    found.setdefault(name, []).append(node.lineno)
    return found


def test_selections_go_through_one_door(tmp_path):
    """`kernels.ordering` (or `select.top_k`) says what NaN, zeros and ties are."""
    found = raw_orders(Path(efficient_vlm.__file__).parent)
    new = {name: lines for name, lines in found.items() if name not in MAY_ORDER}
    assert not new, f"use kernels.ordering, or add the reason to MAY_ORDER: {new}"
    assert set(MAY_ORDER) == set(found), "MAY_ORDER names modules that order nothing"
    (tmp_path / "x.py").write_text("import jax\n\ndef f(s):\n    return jax.lax.top_k(s, 2)\n")
    assert raw_orders(tmp_path) == {"x": [4]}
