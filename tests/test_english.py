"""Docstrings are sentences: none begins with a noun clause, and no entry lacks its noun."""

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PATHS = {
    path.relative_to(REPO).as_posix(): path
    for package in ("jaxlib_unlearn", "models", "train")
    for path in sorted((REPO / package).rglob("*.py"))
}
CLAUSE = re.compile(r"\W*(What|Which|Those|Whose|Where|How)\b")
SECTION = re.compile(r"(\w+):$")
ENTRY = re.compile(
    r"[`*\w]+(, [`*\w]+)*: "
    r"(of|for|by|in|on|as|at|to|from|with|that|those|what|whose|which|where|how)\b"
)


def faults(source: str) -> list[str]:
    """The docstrings of a source that begin with a noun clause, and the entries without a noun."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (ast.get_docstring(node) or "").split("\n")
        found += lines[:1] if CLAUSE.match(lines[0]) else []
        section, indent = "", 0
        for line in lines[1:]:
            depth = len(line) - len(line.lstrip())
            if depth == 0 and line:
                section = match[1] if (match := SECTION.match(line)) else ""
                indent = 0
            elif section == "Args" and line:
                indent = indent or depth
                found += [line.strip()] if depth == indent and ENTRY.match(line.strip()) else []
    return found


@pytest.mark.parametrize("package", ["jaxlib_unlearn", "models", "train"])
def test_docstrings_are_sentences(package):
    found = {
        name: faults(path.read_text(encoding="utf-8"))
        for name, path in PATHS.items()
        if name.startswith(package)
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("docstring", "count"),
    [
        ("The rows of a run.", 0),
        ("What a run has.", 1),
        ("`Which` leaves are trained.", 1),
        ("One.\n\n    Args:\n        seed: the seed.\n            of: x\n    ", 0),
        ("One.\n\n    Args:\n        seed: of the draws.\n        a, b: those of c.\n    ", 2),
        ("One.\n\n    Returns:\n        x: of y\n    ", 0),
    ],
)
def test_the_check_sees(docstring, count):
    assert len(faults(f'def f():\n    """{docstring}"""\n')) == count
