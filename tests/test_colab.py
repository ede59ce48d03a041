"""Every notebook runs from top to bottom, with shrunken steps, on the code of this clone."""

import os
import re
import shutil
import sys
import types
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "colab"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


# The lines that a notebook prints to compare results, by how they begin: how many there are, each
# with its own numbers.
LINES = {
    "02": {"(?:sum|BLUR|SIFT)": 4, "(?:SGD|Adam|sign|Muon|NorMuon|TEON)": 6},
    "04": {"remat": 2},
    "05": {"(?:adamw|muon|teon)": 3},
    "09": {r"token \d:": 2},
}


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch, small, quick_environment):
    monkeypatch.setenv("JAXLIB_UNLEARN_SMOKE", "1")
    monkeypatch.setenv("JAXLIB_UNLEARN_RUNS", str(tmp_path))
    monkeypatch.setenv("JAXLIB_UNLEARN_OPTIONS", " ".join([*small, "--finetune.steps 12"]))
    # The kernel must not inherit eight devices, and it plots inline.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name, value in quick_environment.items():
        # The plans are of eight devices, whose programs are never kept.
        if path.stem[:2] != "04" or name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):
            monkeypatch.setenv(name, value)
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
    printed = "".join(o.text for o in shown if o.output_type == "stream")
    for start, count in LINES.get(path.stem[:2], {}).items():
        lines = re.findall(rf"^{start}.* \d.*$", printed, re.MULTILINE)
        numbers = {tuple(re.findall(r"\d+\.\d+", line)) for line in lines}
        assert len(lines) == len(numbers) == count, lines


def cells_of(path):
    return nbformat.read(path, as_version=4).cells


def install_cell(path):
    return next(cell.source for cell in cells_of(path) if "def install" in cell.source)


def test_one_install_cell_for_all_and_then_a_look_at_the_devices():
    assert len({install_cell(path) for path in NOTEBOOKS}) == 1
    for path in NOTEBOOKS:
        sources = [cell.source for cell in cells_of(path)]
        here = sources.index(install_cell(path))
        assert any("jax.devices()" in source for source in sources[here:])
        assert not any("import jax" in source for source in sources[:here])


@pytest.fixture
def runtime(tmp_path, monkeypatch, repo):
    """The functions of the install cell in a simulated runtime that records commands."""
    (tmp_path / "jaxlib-unlearn" / "jaxlib_unlearn").mkdir(parents=True)
    (tmp_path / "jaxlib-unlearn" / "pyproject.toml").write_text(
        (repo / "pyproject.toml").read_text()
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(packages, driver="", tpu=False):
        names: dict = {}
        exec(install_cell(NOTEBOOKS[0]), names)
        ran = []

        def run(command, **options):
            ran.append(" ".join(command).replace(sys.executable, "python"))
            return types.SimpleNamespace(stdout=driver + "\n")

        names["subprocess"] = types.SimpleNamespace(run=run)
        names["versions"] = lambda: packages
        names["shutil"] = types.SimpleNamespace(which=lambda name: driver and name or None)
        names["glob"] = types.SimpleNamespace(glob=lambda where: [where] if tpu else [])
        return names, ran

    return make


WANTED = re.search(r'"jax>=([\d.]+)"', (FOLDER.parent / "pyproject.toml").read_text())[1]
CUDA = {"jax": "0.7.2", "jaxlib": "0.7.2", "jax-cuda12-plugin": "0.7.2", "numpy": "2.0.2"}


@pytest.mark.parametrize("version", [WANTED, "0.11.0", "1.0", WANTED + ".dev2"])
def test_a_jax_that_is_new_enough_is_kept_with_its_plugin(runtime, version):
    there = {"jax": version, "jaxlib": version, "jax-cuda12-plugin": version, "numpy": "2.0.2"}
    names, ran = runtime(there | {"jaxlib-unlearn": "0.1.0", "torch": "2.9"}, driver="550.1")
    names["install"]()
    assert ran == ["python -m pip install -q -c keep.txt .[train]"]
    assert Path("keep.txt").read_text().split() == [f"{n}=={v}" for n, v in there.items()]
    names["install"]()  # run again in the same session: the clone is there already
    assert len(ran) == 2 and Path.cwd().name == "jaxlib-unlearn"


@pytest.mark.parametrize(
    ("packages", "machine", "wanted", "stale"),
    [
        (CUDA, {"driver": "580.82.07"}, "jax[cuda13]", "jax-cuda12-plugin"),
        (CUDA, {"driver": "550.54.15"}, "jax[cuda12]", "jax-cuda12-plugin"),
        ({"jax": "0.7.2", "libtpu": "0.0.2"}, {"tpu": True}, "jax[tpu]", None),
        ({"jax": "0.10.1"}, {}, "jax", None),
        ({}, {}, "jax", None),
    ],
)
def test_an_older_jax_is_upgraded_with_its_plugin(runtime, packages, machine, wanted, stale):
    names, ran = runtime(packages, **machine)
    with pytest.raises(SystemExit, match="Restart once .*then run all cells"):
        names["install"]()
    ran = [command for command in ran if "nvidia-smi" not in command]
    removed = [f"python -m pip uninstall -q -y {stale}"] if stale else []
    assert ran == [*removed, f"python -m pip install -q -U {wanted}>={WANTED}"]
    assert not Path("keep.txt").exists()


def test_without_an_address_it_says_so(runtime, tmp_path):
    names, ran = runtime({"jax": WANTED})
    shutil.rmtree(tmp_path / "jaxlib-unlearn")
    names["REPOSITORY"] = ""
    with pytest.raises(SystemExit, match="no public address yet: set REPOSITORY"):
        names["install"]()
    assert ran == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_says_what_runs_on_a_free_colab_and_for_how_long(path):
    first = cells_of(path)[0].source
    assert "free Colab" in first and "minute" in first and " GB of memory" in first
