"""Every notebook runs from top to bottom, with shrunken steps, on the code of this clone."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "colab"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLIB_UNLEARN_SMOKE", "1")
    monkeypatch.setenv("JAXLIB_UNLEARN_RUNS", str(tmp_path))
    # The kernel must not inherit eight devices or pytest's compilation cache, and it draws inline.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER.parent)}},
    )
    client.execute()
    shown = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert not [o for o in shown if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in shown) >= 1
    assert os.listdir(tmp_path), "the run folder was written elsewhere"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_install_keeps_jax(path):
    """The install cell pins the JAX that is there, so an accelerator plugin keeps its jaxlib."""
    notebook = nbformat.read(path, as_version=4)
    install = next(c.source for c in notebook.cells if "def install" in c.source)
    assert '"-c", "keep.txt"' in install and 'startswith(("jax", "numpy"))' in install
    assert any("jax.devices()" in cell.source for cell in notebook.cells)
