"""A Python that cannot run the programs gets one line that says what to do."""

import ast
import os
import shutil
import subprocess
import sys

import pytest

from train.runtime.environment import NEEDED, complaint


@pytest.fixture
def clone(repo, tmp_path):
    """The package as in a clone without an environment."""
    shutil.copytree(repo / "train", tmp_path / "a clone" / "train")
    return tmp_path / "a clone"


def bare(where, *argv):
    """`python -m ARGV` with the standard library alone."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-S", "-m", *argv],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("program", ["train.unlearn", "train.report", "train.plan"])
def test_outside_the_environment_it_is_one_line(clone, program):
    done = bare(clone, program, "quickstart")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: this Python (")
    assert "has no jax, flax and" in done.stderr and "make quickstart" in done.stderr
    assert done.stderr.endswith("source .venv/bin/activate\n")


def test_the_environment_that_is_there_is_named(clone, tmp_path):
    activate = clone / ".venv" / "bin" / "activate"
    other = clone / ".venv-3.12" / "bin" / "activate"
    for path in (other, activate):
        path.parent.mkdir(parents=True)
        path.touch()
        done = bare(clone, "train.unlearn")
        wanted = path.relative_to(clone)
        assert f"; run: source {wanted}   (or: make unlearn ARGS=...)" in done.stderr
    # From another folder, as a path that a shell can read.
    line = complaint((3, 11, 7), ["jax"], str(clone), str(tmp_path / "elsewhere"))
    assert f"source '{activate}'" in line


def test_python_versions(tmp_path):
    root = str(tmp_path)
    for version in ((3, 6, 15), (3, 10, 13)):
        line = complaint(version, [], root, root)
        assert "3.11 or later" in line and "source .venv/bin/activate" in line
    assert "3.13.0" in complaint((3, 13, 0), [], root, root)
    for version in ((3, 11, 0), (3, 13, 1), (3, 14, 0)):
        assert complaint(version, [], root, root) is None


def test_an_old_python_can_read_what_complains(repo):
    for name in ("__init__.py", "runtime/__init__.py", "runtime/environment.py"):
        text = (repo / "train" / name).read_text(encoding="ascii")
        ast.parse(text, feature_version=(3, 6))
        assert "from __future__" not in text  # 3.6 does not know annotations


def test_what_is_needed_is_installed_by_the_extra(repo):
    import tomllib

    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    wanted = " ".join([*project["dependencies"], *project["optional-dependencies"]["train"]])
    assert [name for name in NEEDED if name not in wanted.replace("_", "-")] == []
