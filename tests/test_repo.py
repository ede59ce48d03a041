"""The contents of a clone: nothing at the top without a reason, and no leftovers."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
TOP = {
    ".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md",
    "RESULTS.md",
    "colab", "jaxlib_unlearn", "models", "pyproject.toml", "tests", "train",
}  # fmt: skip
LOCKS = {
    "uv.lock", "poetry.lock", "pdm.lock", "Pipfile.lock", "package-lock.json", "pixi.lock",
    "pylock.toml", "conda-lock.yml",
}  # fmt: skip
TEXT = {".py", ".md", ".toml", ".txt", ".ipynb", ".yml", ".yaml", ".cfg", ".html", ".j2", ".sh", ""}
# A clone must build with any index and on any machine: options that choose an index, index
# addresses and folders of one machine do not belong in it.
PLACES = re.compile(
    r"--(?:extra-)?index-url|--find-(?:links)|\[\[?tool\.uv\.(?:index|sources)"
    r"|https?://[\w.-]*(?:py" r"pi|python" r"hosted|npm" r"js|ana" r"conda)[\w.-]*"
    r"|(?<![\w.}/-])/(?:root|home|Users)/\w+"
)  # fmt: skip


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Files that git tracks or would track, without ignored ones."""
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


@pytest.fixture(scope="module")
def home():
    """The script that writes the project's address."""
    spec = importlib.util.spec_from_file_location("home", REPO / ".ci" / "home.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_name_the_address_of_the_setting(home):
    for path, text in home.pages(REPO).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python .ci/home.py"


def test_nothing_leads_to_where_the_project_is_not(home, files):
    """Without an address no badge, clone line or package of ours; with one, all of them."""
    address = home.setting(REPO)
    for path in files:
        if path.suffix in TEXT and path.parts[0] != "tests":
            text = (REPO / path).read_text(encoding="utf-8")
            ours = re.findall(r"https?://[^\s)\"'`]*jaxlib-unlearn[^\s)\"'`]*", text)
            assert [url for url in ours if not address or address.split("//")[1] not in url] == []
            # Not registered on any index: from a clone it is `pip install -e '.[extra]'`.
            assert not re.search(r"pip install [^\n]*jaxlib-unlearn", text), path


def test_a_published_project_is_linked_everywhere(home, tmp_path):
    (tmp_path / "colab").mkdir()
    for path in (REPO / "colab").glob("*.ipynb"):
        shutil.copy(path, tmp_path / "colab")
    (tmp_path / "README.md").write_text("# x\n<!-- home -->\n<!-- /home -->\nrest\n")
    for url, badges in (("https://github.com/o/n/", 1), ("https://example.org/n.git", 0), ("", 0)):
        text = (REPO / "pyproject.toml").read_text()
        (tmp_path / "pyproject.toml").write_text(re.sub('home = ".*"', f'home = "{url}"', text))
        for _ in range(2):  # written again, it is the same
            for path, page in home.pages(tmp_path).items():
                path.write_text(page)
        url = url.rstrip("/")
        line = f"git clone {url} jaxlib-unlearn && cd jaxlib-unlearn"
        readme = (tmp_path / "README.md").read_text()
        assert (line in readme) == bool(url) and readme.endswith("<!-- /home -->\nrest\n")
        for path in (tmp_path / "colab").glob("*.ipynb"):
            text = path.read_text()
            assert text.count("colab-badge.svg") == badges, path
            assert text.count(f"colab/{path.name})") == badges
            assert f'REPOSITORY = \\"{url}\\"' in text
    for path in (REPO / "colab").glob("*.ipynb"):
        if not home.setting(REPO):
            assert (tmp_path / "colab" / path.name).read_text() == path.read_text()


def test_make_unlearn_is_the_program_in_the_environment():
    if not shutil.which("make"):
        pytest.skip("make is not installed")

    def lines(*argv):
        command = ["make", "-n", "--no-print-directory", "VENV=some-venv", "UV=", *argv]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    environment, run = lines("unlearn", "ARGS=quickstart --seed 1")
    assert "sh .ci/environment train" in environment
    assert run == "some-venv/bin/python -m train.unlearn quickstart --seed 1"
    # And the first command ends by saying how to go on.
    assert "source some-venv/bin/activate" in lines("quickstart")[-1]


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
