"""What the tests of the command line share."""

import sys

import pytest

from efficient_vlm.cli import main as cli
from efficient_vlm.compressors import imports
from efficient_vlm.compressors.methods import METHODS


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*words) -> (exit code, stdout, stderr) of `efficient-vlm words`, in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["efficient-vlm", *map(str, words)])
        capsys.readouterr()
        try:
            code = cli.main()
        except SystemExit as stopped:  # --help and --version
            code = stopped.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def new_process(monkeypatch, tmp_path):
    """new_process() forgets all methods of one's own, as a new process would; so does the end."""
    known = dict(METHODS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def forget():
        METHODS.clear()
        METHODS.update(known)
        imports._loaded.clear()

    yield forget
    forget()
