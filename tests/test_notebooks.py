"""Every notebook runs from its first to its last cell, in a kernel of this interpreter."""

import json
import os
import sys

import pytest

pytestmark = pytest.mark.slow


def pytest_generate_tests(metafunc):
    if "path" in metafunc.fixturenames:
        paths = sorted((metafunc.config.rootpath / "colab").glob("*.ipynb"))
        metafunc.parametrize("path", paths, ids=[path.stem for path in paths])


def test_there_is_a_notebook(request):
    assert list((request.config.rootpath / "colab").glob("*.ipynb"))


def test_a_notebook_runs(path, tmp_path, monkeypatch, request):
    import nbformat
    from nbclient import NotebookClient

    # A kernel of its own name would start whatever interpreter is registered under it.
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "this interpreter",
        "language": "python",
    }
    folder = tmp_path / "jupyter" / "kernels" / "this_interpreter"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    root = str(request.config.rootpath)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs for cell in cells), "commit notebooks without outputs"
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="this_interpreter",
        resources={"metadata": {"path": str(path.parent)}},  # Where it is opened.
    )
    client.execute()  # Raises CellExecutionError with the traceback of the cell.
    assert all(cell.execution_count for cell in cells)
    left = {p.name for p in path.parent.iterdir()} - {p.name for p in path.parent.glob("*.ipynb")}
    assert left == set(), "what a notebook writes belongs in a temporary folder"
    errors = [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert errors == []
