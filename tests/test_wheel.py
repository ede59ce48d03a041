"""The wheel as a new user gets it: built, installed beside its requirements alone, and used."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

NAME = "jaxlib_unlearn"


def run(*command, cwd):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(repo, tmp_path_factory) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed (pip install hatchling)")
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=repo)
    (built,) = folder.glob("*.whl")
    return built


def requirements(names: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that the requirements name, and their own requirements."""
    found: dict[str, importlib.metadata.Distribution] = {}
    while names:
        requirement = Requirement(names.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[name] = importlib.metadata.distribution(name)
        names += found[name].requires or []
    return found


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder with the installed wheel and links to what its metadata requires, nothing else."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--no-index", "--no-deps", "--quiet", "--disable-pip-version-check", "--no-compile"]
    run("-m", "pip", "install", *options, "--target", folder, wheel, cwd=folder)
    (metadata,) = folder.glob(f"{NAME}-*.dist-info/METADATA")
    needs = re.findall("^Requires-Dist: (.*)$", metadata.read_text(), re.M)
    for distribution in requirements(needs).values():
        for top in {file.parts[0] for file in distribution.files or []}:
            source, link = Path(str(distribution.locate_file(top))), folder / top
            if top not in ("..", "__pycache__", "bin") and not link.exists():
                link.symlink_to(source)
    return folder


def run_bare(site, code):
    """Run without the usual packages, the clone, or anything from environment variables."""
    start = f"import sys; sys.path.append({str(site)!r})\n"
    return run("-I", "-S", "-c", start + code, cwd=site)


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {NAME}
    assert f"{NAME}/optim/spectral/muon.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_module_imports(site):
    told = run_bare(
        site,
        f"""
import importlib, pkgutil, {NAME}
modules = [m.name for m in pkgutil.walk_packages({NAME}.__path__, "{NAME}.")]
for name in modules:
    importlib.import_module(name)
print({NAME}.__file__)
print(len(modules))
for name in ("flax", "transformers", "orbax", "models", "train", "pytest"):
    assert importlib.util.find_spec(name) is None, name
""",
    ).split()
    assert Path(told[0]).is_relative_to(site)
    assert int(told[1]) > 20


def test_readme_chains(site, repo):
    text = (repo / "README.md").read_text(encoding="utf-8")
    heading = re.search(r"^#+ .*As Optax chains.*$", text, re.M | re.I)
    if heading is None:
        pytest.skip("README has no section 'As Optax chains'")
    blocks = re.findall(r"```python\n(.*?)```", text[heading.end() :], re.S)
    example = next(block for block in blocks if "optax.chain(" in block)
    run_bare(
        site,
        example + "\nimport sys\n"
        "heavy = {'flax', 'transformers', 'orbax', 'models', 'train'} & {*sys.modules}\n"
        "assert not heavy, heavy\n",
    )
