"""The bounds of concepts on Fashion-MNIST: hours, in a folder that goes on where it was stopped.

    pytest -m slow tests/bench/test_concept_bounds.py

`JAXLIB_UNLEARN_FASHION` names the folder of the IDX files, where they are not Debian's;
`JAXLIB_UNLEARN_RUNS` one that keeps the runs.
"""

import importlib.util
import os
from pathlib import Path

import pytest

from jaxlib_unlearn.errors import UserError
from train.jobs.diffusing.config import ImagesConfig
from train.tasks import pictures


@pytest.fixture(scope="module")
def bench(repo):
    """The table whose bounds these are."""
    path = repo / "tests" / "bench" / "concept_table.py"
    spec = importlib.util.spec_from_file_location("bench_concept_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(bench, tmp_path_factory):
    """What seeds 0 to 2 say of one concept and UCE."""
    named = os.environ.get("JAXLIB_UNLEARN_FASHION")
    try:
        pictures.load(ImagesConfig("fashion", Path(named) if named else None), 1)
    except UserError as error:
        pytest.skip(f"{error} (JAXLIB_UNLEARN_FASHION names the folder of its files)")
    options = [] if named is None else ["--data.path", str(Path(named).resolve())]
    folder = os.environ.get("JAXLIB_UNLEARN_RUNS") or tmp_path_factory.mktemp("concept")
    folder = bench.place(Path(folder), options)

    def make(program, name, argv):
        return bench.run(program, name, argv, folder, options)

    return bench.collect((0, 1, 2), ("sneaker",), ("uce",), make)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4), ids=["original", "uce", "subattack", "subdefense"])
def test_the_bounds_of_concepts(bench, found, number):
    bound = list(bench.bounds(found))[number]
    assert bound.holds, f"{bound.about}: {', '.join(bound.seeds)}; median {bound.median}"
