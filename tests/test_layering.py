"""Imports point down: train -> models -> jaxlib_unlearn -> jax, optax, chex, numpy, scipy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
# The packages of this repository that each may import. For others, see `CORE` and `NEVER`.
BELOW = {
    "jaxlib_unlearn": {"jaxlib_unlearn"},
    "models": {"jaxlib_unlearn", "models"},
    "train": {"jaxlib_unlearn", "models", "train"},
}
HOUSE = {"jaxlib_unlearn", "models", "train", "tests", "colab"}
CORE = {"jax", "optax", "chex", "numpy", "scipy"}
# Slow to import, and noisy without torch: tokenizers and a template engine do the work instead.
NEVER = {"models": {"transformers", "torch"}, "train": {"torch"}, "jaxlib_unlearn": set()}
# (file, module): allowed inside a function of that file alone.
LAZY = {("jaxlib_unlearn/metrics/text.py", "rouge_score")}

FILES = [(name, path) for name in BELOW for path in sorted((REPO / name).rglob("*.py"))]


def imports(tree: ast.AST, inside: bool = False):
    """Yields (top-level name, line, inside a function) for every import, dynamic ones included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno, inside
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0], node.lineno, inside
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.args[0].value.split(".")[0], node.lineno, inside
        function = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        yield from imports(node, inside or isinstance(node, function))


def violations(package: str, file: str, source: str) -> list[str]:
    """The imports of `source`, stored as `file` of `package`, that are not allowed."""
    found = []
    for name, line, inside in imports(ast.parse(source)):
        if name in HOUSE:
            allowed = name in BELOW[package]
        elif package == "jaxlib_unlearn":
            lazy = inside and (file, name) in LAZY
            allowed = name in sys.stdlib_module_names or name in CORE or lazy
        else:
            allowed = name not in NEVER[package]
        if not allowed:
            found.append(f"{file}:{line} imports {name}")
    return found


@pytest.mark.parametrize("package", BELOW)
def test_imports_point_down(package):
    found = []
    for owner, path in FILES:
        if owner == package:
            file = path.relative_to(REPO).as_posix()
            found += violations(package, file, path.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("package", "file", "source", "count"),
    [
        ("jaxlib_unlearn", "jaxlib_unlearn/a.py", "import jax.numpy as jnp, math, optax", 0),
        ("jaxlib_unlearn", "jaxlib_unlearn/a.py", "from . import b\nfrom ..c import d", 0),
        ("jaxlib_unlearn", "jaxlib_unlearn/a.py", "import flax", 1),
        ("jaxlib_unlearn", "jaxlib_unlearn/a.py", "def f():\n    from models.x import y", 1),
        ("jaxlib_unlearn", "jaxlib_unlearn/a.py", "importlib.import_module('flax.nnx')", 1),
        ("jaxlib_unlearn", "jaxlib_unlearn/a.py", "def f():\n    import rouge_score", 1),
        ("jaxlib_unlearn", "jaxlib_unlearn/metrics/text.py", "import rouge_score", 1),
        ("jaxlib_unlearn", "jaxlib_unlearn/metrics/text.py", "def f():\n    import rouge_score", 0),
        ("models", "models/a.py", "import flax, jaxlib_unlearn.losses", 0),
        ("models", "models/a.py", "if True:\n    from train import step", 1),
        ("models", "models/a.py", "def f():\n    import transformers", 1),
        ("train", "train/a.py", "import models, jaxlib_unlearn, rich", 0),
        ("train", "train/a.py", "from tests import conftest", 1),
    ],
)  # fmt: skip
def test_the_walk_sees(package, file, source, count):
    assert len(violations(package, file, source)) == count


# Every module of a package, in a fresh process: what did it import, and did it start a backend?
# (`jax_num_cpu_devices` can only be set before one starts; a library that starts it on import
# breaks jax.distributed and every user who wants to choose devices.)
PROBE = """
import importlib, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).rglob("*.py")):
    if path.name != "__main__.py":
        parts = path.with_suffix("").parts
        importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
print("loaded", *sorted({name.split(".")[0] for name in sys.modules}))
import jax
jax.config.update("jax_num_cpu_devices", 3)
assert len(jax.devices("cpu")) == 3
"""


@pytest.mark.parametrize(
    ("package", "heavy"),
    [
        (
            "jaxlib_unlearn",
            "flax orbax transformers datasets torch grain tokenizers rouge_score matplotlib",
        ),
        ("models", "transformers datasets torch matplotlib tensorflow"),
        ("train", "transformers torch tensorflow datasets wandb trackio tensorboardX"),
    ],
)
def test_importing_is_light(package, heavy):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, package], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = next(line for line in done.stdout.splitlines() if line.startswith("loaded"))
    assert not set(heavy.split()) & set(loaded.split())


MODULES = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for _, path in FILES
}
PROGRAMS = {"train.unlearn", "train.finetune", "train.evaluate", "train.export", "train.report"}
PROGRAMS |= {"train.plan", "train.pretrain", "train.classify", "train.replay", "train.condense"}
PROGRAMS |= {"train.diffuse", "train.erase", "train.attack", "train.defend"}


def imported(source: str) -> set[str]:
    """Modules of this repository that a source imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else module for name in names}
    return found & set(MODULES)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import one another, directly or indirectly."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    behind = {name: reached(name) for name in graph}
    groups = {frozenset(b for b in behind[a] if a in behind[b]) for a in graph if a in behind[a]}
    return sorted(sorted(group) for group in groups)


def test_no_circle_of_imports():
    graph = {name: imported(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


# The rooms of a package, from the top: a room imports from itself and from those after it.
ROOMS = {
    "train": (
        *("programs", "planning", "presets", "jobs", "reporting", "tasks", "engine"),
        *("evaluators", "costs", "data", "options", "runtime"),
    ),
    "models": ("files", "vision", "diffusion", "decoder", "text", "shared"),
}
FLAT = {"train": "programs", "models": "shared"}  # the room of files that lie in no folder


def room(module: str) -> str:
    """The room of a module, such as `engine` of `train.engine.step`."""
    package, *inside = module.split(".")
    folder = inside and (REPO / package / inside[0]).is_dir()
    return inside[0] if folder else FLAT[package]


def upward(graph: dict[str, set[str]]) -> list[str]:
    """The imports from a room of one that lies above it."""
    found = []
    for name, others in graph.items():
        package = name.partition(".")[0]
        for other in others if "." in name and package in ROOMS else ():
            if other.partition(".")[0] == package != other:
                place = ROOMS[package].index
                if place(room(other)) < place(room(name)):
                    found.append(f"{name} imports {other}, of a room above it")
    return sorted(found)


def test_rooms_have_an_order():
    graph = {name: imported(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    for package, rooms in ROOMS.items():
        folders = {path.name for path in (REPO / package).iterdir() if any(path.glob("*.py"))}
        assert folders == set(rooms) - {FLAT[package]}
    assert upward(graph) == []
    assert upward({"train.data.batches": {"train.engine.run"}, "train.plan": {"train.costs.hlo"}})
    flat = {name for name in MODULES if name.count(".") == 1 and MODULES[name].stem != "__init__"}
    assert {name for name in flat if name.startswith("train.")} == PROGRAMS and len(PROGRAMS) <= 16
    assert len([name for name in flat if name.startswith("models.")]) <= 8


def test_no_module_imports_a_program():
    """A program is an entry point: what two of them need belongs in a module of its own."""
    found = {
        f"{name} imports {program}"
        for name, path in MODULES.items()
        for program in imported(path.read_text(encoding="utf-8")) & PROGRAMS
    }
    assert PROGRAMS <= set(MODULES) and not found
