"""What a clone must look like: nothing at the top without a reason, and no leftovers."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
TOP = {
    ".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md",
    "colab", "jaxlib_unlearn", "models", "pyproject.toml", "tests", "train",
}  # fmt: skip
LOCKS = {
    "uv.lock", "poetry.lock", "pdm.lock", "Pipfile.lock", "package-lock.json", "pixi.lock",
    "pylock.toml", "conda-lock.yml",
}  # fmt: skip
TEXT = {".py", ".md", ".toml", ".txt", ".ipynb", ".yml", ".yaml", ".cfg", ".html", ".j2", ".sh", ""}
# A clone builds with any index, and on any machine: options that choose an index, addresses of
# one, and folders of somebody's machine do not belong in it.
PLACES = re.compile(
    r"--(?:extra-)?index-url|--find-(?:links)|\[\[?tool\.uv\.(?:index|sources)"
    r"|https?://[\w.-]*(?:py" r"pi|python" r"hosted|npm" r"js|ana" r"conda)[\w.-]*"
    r"|(?<![\w.}/-])/(?:root|home|Users)/\w+"
)  # fmt: skip


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Files that git tracks, or would: those it ignores are nobody's business."""
    if not shutil.which("git") or not (REPO / ".git").exists():
        pytest.skip("not a git clone")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=REPO, capture_output=True, text=True, check=True)
    paths = [Path(name) for name in done.stdout.split("\0") if name]
    return [path for path in paths if (REPO / path).is_file()]


def test_top_level(files):
    assert {path.parts[0] for path in files} <= TOP
    assert {name for name in TOP if not (REPO / name).exists()} == set()


def test_no_lock_file(files):
    assert [path for path in files if path.name in LOCKS or path.suffix == ".lock"] == []


def test_no_index_and_no_machine_is_named(files):
    found = []
    for path in files:
        if path.suffix in TEXT:
            text = (REPO / path).read_text(encoding="utf-8")
            found += [f"{path}: {match.group()}" for match in PLACES.finditer(text)]
    assert found == []


def test_constraints_are_bare_pins():
    for path in sorted((REPO / ".ci").glob("constraints-*.txt")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == [], path
        # torch's builds differ by machine: pip chooses within pyproject.toml's range.
        assert [line for line in lines if line.startswith("torch")] == [], path


def test_no_packages_below_tests():
    # tests/models/__init__.py would make `import models` find the tests.
    assert sorted((REPO / "tests").rglob("__init__.py")) == []


def test_names_of_test_files_are_unique():
    names = [path.name for path in (REPO / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_notebooks_are_stored_without_outputs():
    for path in sorted((REPO / "colab").glob("*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [], f"{path.name}, cell {number}"
                assert cell["execution_count"] is None, f"{path.name}, cell {number}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_make_targets_exist(page):
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9]+):", makefile, flags=re.MULTILINE))
    text = (REPO / page).read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^```.*?^```", text, flags=re.MULTILINE | re.DOTALL))
    named = set(re.findall(r"^make ([a-z0-9]+)", blocks, flags=re.MULTILINE))
    named |= set(re.findall(r"`make ([a-z0-9]+)", text))
    named |= set(re.findall(r"^step ([a-z0-9]+)", text, flags=re.MULTILINE))
    assert named and named <= targets
    assert {"quickstart", "test", "parity", "lint", "smollm2"} <= targets


def test_license_is_apache():
    text = (REPO / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0" in text
    assert 'license = "Apache-2.0"' in (REPO / "pyproject.toml").read_text(encoding="utf-8")
