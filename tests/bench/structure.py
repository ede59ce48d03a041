"""Numbers about the structure of a checkout: rooms, circles of imports, lines, jobs.

    python tests/bench/structure.py [FOLDER ...]

Each folder is a checkout of this project, of any version; without one it is this checkout. A room
is a folder of a package; imports inside functions count. One row of the table a number, one column
a checkout.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("jaxlib_unlearn", "models", "train")
# The checks of an optimizer, an objective or a stage, wherever they are called.
CHECKS = re.compile(
    r"(optimizers|objectives|checks|trainable)\.(check\w*|over_rows|refuse_both)\(|"
    r"(?<![\w.])(check_(pair|mesh|steps|stage|lora|selection|blocks|accumulation)|over_rows)\("
)


def modules(root: Path, package: str) -> dict[str, Path]:
    """The modules of a package by their dotted names."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The known modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            yield from [name] if name else []


def in_circles(root: Path, package: str) -> tuple[int, int]:
    """The number of rooms of a package that import one another in a circle, and of all rooms."""
    known = modules(root, package)

    def room(name: str) -> str:
        parts = name.split(".")
        return ".".join(parts[:2]) if len(parts) > 1 else package

    graph: dict[str, set[str]] = {room(name): set() for name in known}
    for name, path in known.items():
        graph[room(name)] |= {room(other) for other in imports(path, known)} - {room(name)}

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    return sum(name in reached(name) for name in graph), len(graph)


def lines(paths: list[Path]) -> int:
    """The number of lines of files."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def measured(root: Path) -> dict[str, object]:
    """The numbers of a checkout by their names."""
    files = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    trains = [path for path in files if path.is_relative_to(root / "train")]
    flat = {
        package: len([p for p in (root / package).glob("*.py") if p.stem != "__init__"])
        for package in ("train", "models")
    }
    circle, rooms = in_circles(root, "train")
    old = [p for p in trains if p.name == "pipeline.py"]
    jobs = old or [
        p for p in (root / "train/jobs").rglob("*.py") if re.search(r"^JOB\b", p.read_text(), re.M)
    ]
    calls = [(p, len(CHECKS.findall(p.read_text(encoding="utf-8")))) for p in trains]
    return {
        "flat modules in train/": flat["train"],
        "flat modules in models/": flat["models"],
        "rooms of train/ in a circle of imports": f"{circle} of {rooms}",
        "files of jobs": ", ".join(f"{p.stem} {lines([p])}" for p in sorted(jobs)),
        "lines of jobs": lines(jobs),
        "calls of checks": sum(n for _, n in calls),
        "files with such a call": sum(n > 0 for _, n in calls),
        "lines of the packages": lines(files),
        "lines of the tests": lines(list((root / "tests").rglob("*.py"))),
    }


def main(folders: list[str]) -> None:
    """Print the table."""
    roots = [Path(folder) for folder in folders] or [Path(__file__).resolve().parents[2]]
    found = [measured(root) for root in roots]
    print("| number | " + " | ".join(root.resolve().name for root in roots) + " |")
    print("|---|" + "---|" * len(roots))
    for name in found[0]:
        print(f"| {name} | " + " | ".join(str(one[name]) for one in found) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
