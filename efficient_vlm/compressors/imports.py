"""Files and modules that register methods of one's own: `--import=my_method.py`."""

import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from efficient_vlm.compressors.methods import METHODS
from efficient_vlm.errors import UserError, closest, first_line
from efficient_vlm.runtime import user_cache

__all__ = ["import_methods", "import_of_run"]

_loaded: dict[str, str] = {}  # Path of a file -> digest of what was run.


def import_methods(sources: str | Iterable[str]) -> list[str]:
    """Runs files and modules that register methods.

    Args:
      sources: one or several paths of Python files ("my_method.py"), or dotted names of modules
        ("my.methods"), looked for in the working directory, too.

    Returns:
      The sources as a run's config records them: files with their whole path.

    Raises:
      UserError: no such file or module, an error in it, or nothing registered.
    """
    recorded = []
    for source in [sources] if isinstance(sources, str) else sources:
        path = _path(source)
        if path is None:
            _import_module(source)
        else:
            _run_file(path)
        recorded.append(source if path is None else str(path))
        _trust(recorded[-1])
    return recorded


def import_of_run(config: Mapping[str, Any], workdir: str | os.PathLike) -> None:
    """Imports the methods that a run was trained with, where they are missing.

    A workdir may be a stranger's, and its config names files to run. Only what this user has passed
    to `import_methods` before is run: the same file, unchanged.

    Args:
      config: of the run, plain; `imports` holds what `import_methods` returned.
      workdir: of the run, for the message.

    Raises:
      UserError: a source that is not there, or is not what was imported before: what to pass.
    """
    if all(name in METHODS for name in _names(config)):
        return
    for source in map(str, _list(config.get("imports"))):
        path = Path(source)
        if source.endswith(".py") and not path.is_file():
            why, source = "which is not there", f"PATH/{path.name}"
        elif not _is_trusted(source):
            why = "which has changed, or was not imported by you before"
        else:
            import_methods([source])
            continue
        raise UserError(
            f"--workdir={workdir}: the run has a method of {path}, {why}",
            fix=f"look at it, then add --import={source}",
        )


def _names(config: Mapping[str, Any]) -> Iterator[str]:
    """The methods that a config names; what has another shape is for others to refuse."""
    model, train, evaluation = (_dict(config.get(name)) for name in ("model", "train", "eval"))
    places = [model.get("compressor"), *_list(train.get("elastic"))]
    places += _list(evaluation.get("methods"))
    for segment in _list(_dict(model.get("decoder")).get("segments")):
        places.append(_dict(segment).get("compressor"))
    names = (place.get("name") for place in map(_dict, places))
    yield from (name for name in names if isinstance(name, str))


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _path(source: str) -> Path | None:
    """The file that a source names, None for a module."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.resolve()
    if re.fullmatch(r"\w+(\.\w+)*", source) and path.suffix != ".py":
        return None
    folder = path.parent
    guess = closest(path.name, [p.name for p in folder.glob("*.py")] if folder.is_dir() else [])
    raise UserError(
        f"--import={source}: there is no such file (from {Path.cwd()})",
        allowed="a Python file, or the dotted name of a module",
        fix=f"--import={folder / guess}" if guess else None,
    )


def _run_file(path: Path) -> None:
    """Runs a file as a module, once unless it has changed."""
    code = path.read_bytes()
    digest = hashlib.sha256(code).hexdigest()
    if _loaded.get(str(path)) == digest:
        return
    if path.suffix != ".py":
        raise UserError(f"--import={path}: not a Python file", allowed="*.py")
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    loader = _Source(path, code)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module  # Dataclasses look up the module of a class there.
    try:
        with _checked(str(path), path.parent):
            loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _loaded[str(path)] = digest


class _Source(importlib.abc.SourceLoader):
    """Loads a file from the bytes that were read, never from bytecode, which may be stale."""

    def __init__(self, path: Path, code: bytes):
        self._path, self._code = path, code

    def get_filename(self, fullname: str) -> str:
        return str(self._path)

    def get_data(self, path: str) -> bytes:
        return self._code


def _import_module(name: str) -> None:
    if name not in sys.modules:
        with _checked(name, Path.cwd()):
            importlib.import_module(name)


@contextlib.contextmanager
def _checked(source: str, folder: Path) -> Iterator[None]:
    """Runs what a source holds with its neighbours importable; UserError for what is wrong."""
    before = dict(METHODS)
    sys.path.insert(0, str(folder))
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(
            f"--import={source}: {error.filename}, line {error.lineno}: {error.msg}",
            fix="correct that line",
        ) from None
    except Exception as error:
        unknown = isinstance(error, ModuleNotFoundError) and source.startswith(f"{error.name}")
        fix = f"a module that {folder} or the environment has" if unknown else _place(error, source)
        raise UserError(
            f"--import={source}: {type(error).__name__}: {first_line(error)}", fix=fix
        ) from error
    finally:
        sys.path.remove(str(folder))
    if before == METHODS:
        raise UserError(
            f"--import={source}: it registers no method",
            fix="write @efficient_vlm.compressors.register above the class",
        )


def _place(error: Exception, source: str) -> str:
    """Where an error is: the last line of the source that was running, else the last of all."""
    lines = [(each.filename, each.lineno) for each in traceback.extract_tb(error.__traceback__)]
    own = [line for line in lines if line[0] == source]
    return "correct {}, line {}".format(*(own or lines)[-1])


# ---- what was imported before --------------------------------------------------------------------


def _mark(source: str) -> Path:
    """An empty file that stands for a source: path and content of a file, or a module's name."""
    path = Path(source)
    content = path.read_bytes() if path.is_file() else b""
    digest = hashlib.sha256(source.encode() + b"\0" + content).hexdigest()
    return user_cache() / "imported" / digest


def _trust(source: str) -> None:
    try:
        mark = _mark(source)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except (OSError, RuntimeError):  # No home to write to: the next run is told what to pass.
        pass


def _is_trusted(source: str) -> bool:
    try:
        return _mark(source).is_file()
    except (OSError, RuntimeError):
        return False
