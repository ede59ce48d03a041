"""The bounds of concepts on Fashion-MNIST: hours, in a folder that goes on where it was stopped.

    pytest -m slow tests/bench/test_concept_bounds.py

`JAXLIB_UNLEARN_FASHION` names the folder of the IDX files, where they are not Debian's;
`JAXLIB_UNLEARN_RUNS` one that keeps the runs.
"""

import os
from pathlib import Path

import pytest
import tables
from table_of_concepts import TABLES, bounds, collect

from jaxlib_unlearn.errors import UserError
from train.jobs.diffusing.config import ImagesConfig
from train.tasks import pictures


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What seeds 0 to 2 say of one concept and UCE."""
    named = os.environ.get("JAXLIB_UNLEARN_FASHION")
    try:
        pictures.load(ImagesConfig("fashion", Path(named) if named else None), 1)
    except UserError as error:
        pytest.skip(f"{error} (JAXLIB_UNLEARN_FASHION names the folder of its files)")
    options = [] if named is None else ["--data.path", str(Path(named).resolve())]
    folder = os.environ.get("JAXLIB_UNLEARN_RUNS") or tmp_path_factory.mktemp("concept")
    make = tables.maker(TABLES["concept"], tables.place(Path(folder), options), options)
    return collect(make, (0, 1, 2), ("sneaker",), ("uce",))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4), ids=["original", "uce", "subattack", "subdefense"])
def test_the_bounds_of_concepts(found, number):
    bound = list(bounds(found))[number]
    assert bound.holds, f"{bound.about}: {', '.join(bound.seeds)}; median {bound.median}"
