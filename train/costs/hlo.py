"""The text of a compiled program: its computations, and the runs of each instruction.

An instruction in a loop body appears once in the text and runs once per trip, so a sum over a
program multiplies it by the trip counts of the loops around it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\d+m\d+\w*)?\[([\d,<=]*)\]")
_CALLS = re.compile(
    r"\b(?:body|condition|calls|to_apply|true_computation|false_computation"
    r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INDEX = re.compile(r"\bindex=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Line(NamedTuple):
    """An instruction: `%name = type opcode(rest`, operands and attributes in `rest`."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands; empty if the text does not have them."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    @property
    def op_name(self) -> str:
        """The place in the traced function that it comes from, as scopes joined by `/`."""
        match = _OP_NAME.search(self.rest)
        return match[1] if match else ""


class Computation(NamedTuple):
    """A named list of instructions."""

    name: str
    lines: list[Line]

    def type_of(self, name: str) -> str:
        """The type of an instruction; empty if there is none of that name."""
        return next((line.type for line in self.lines if line.name == name), "")


class Program(NamedTuple):
    """The computations of a program by name, and the name of the first one."""

    computations: dict[str, Computation]
    entry: str


class Visit(NamedTuple):
    """An instruction at one call site.

    Args:
        line: the instruction.
        computation: the computation it belongs to.
        times: the runs per call of the program: the product of the trip counts around it.
        in_loop: whether it is inside a loop's body (or condition).
        known: whether the trip counts of all loops around it are known; an unknown one counts once.
        branch: the branches of conditionals around it, as (conditional, index of the branch).
    """

    line: Line
    computation: Computation
    times: int
    in_loop: bool
    known: bool
    branch: tuple[tuple[str, int], ...]


def parse(program: Any) -> Program:
    """The computations of a compiled program.

    Args:
        program: the text of optimised HLO, or `jax.jit(f).lower(...).compile()`.

    Returns:
        A :class:`Program`.

    Raises:
        ValueError: the text has no entry computation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> program = parse(jax.jit(jnp.sin).lower(1.0).compile())
        >>> [line.opcode for line in program.computations[program.entry].lines][0]
        'parameter'
    """
    text = program if isinstance(program, str) else program.as_text()
    computations: dict[str, Computation] = {}
    current: list[Line] | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            if match := _COMPUTATION.match(line):
                current = computations.setdefault(match[2], Computation(match[2], [])).lines
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(line):
            current.append(Line(*match.groups()))
    if not entry:
        raise ValueError("this is no text of a compiled program: no ENTRY computation in it")
    return Program(computations, entry)


def visits(program: Program) -> Iterator[Visit]:
    """Every instruction at every call site, in the order of the text, all branches included.

    Example:
        >>> import jax
        >>> loop = jax.jit(lambda x: jax.lax.fori_loop(0, 6, lambda i, y: y @ x, x))
        >>> program = parse(loop.lower(jax.numpy.ones((3, 3))).compile())
        >>> [v.times for v in visits(program) if v.line.opcode in ("dot", "custom-call")]
        [6]
    """

    def walk(
        name: str, times: int, in_loop: bool, known: bool, branch: tuple[tuple[str, int], ...]
    ) -> Iterator[Visit]:
        computation = program.computations[name]
        for line in computation.lines:
            yield Visit(line, computation, times, in_loop, known, branch)
            inner = [c for c in called(line.rest) if c in program.computations]
            if line.opcode in ("async-update", "async-done"):
                continue  # they name the computation that async-start has called
            if line.opcode == "while":
                trips = _trips(line.rest, program)
                for c in inner:
                    yield from walk(
                        c, times * (trips or 1), True, known and trips is not None, branch
                    )
            elif line.opcode == "conditional":
                for i, c in enumerate(inner):
                    yield from walk(c, times, in_loop, known, (*branch, (f"{name}/{line.name}", i)))
            else:
                for c in inner:
                    yield from walk(c, times, in_loop, known, branch)

    yield from walk(program.entry, 1, False, True, ())


def called(rest: str) -> list[str]:
    """Names of the computations that an instruction with these attributes calls."""
    return [
        name for group in _CALLS.findall(rest) for name in re.findall(r"[\w.\-]+", group) if name
    ]


def _trips(rest: str, program: Program) -> int | None:
    """The loop's trip count: as noted by XLA, or from the one constant its condition compares with.

    Programs for TPUs carry no note. Loops count from 0, scans by 1; the loops that the partitioner
    makes for a collective matmul may advance by two per trip.
    """
    if match := _TRIPS.search(rest):
        return int(match[1])

    def lines(name: str) -> list[Line]:
        found = program.computations.get(name)
        return [] if found is None else found.lines

    def named(attribute: str) -> list[Line]:
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", rest)
        return lines(match[1]) if match else []

    condition = named("condition")
    limits = [line for line in condition if line.opcode == "constant"]
    nested = [x for line in condition for c in called(line.rest) for x in lines(c)]
    smaller = any("direction=LT" in line.rest for line in (*condition, *nested))
    if len(limits) != 1 or not smaller or not limits[0].type.startswith(("s32[]", "u32[]")):
        return None
    step = _step(condition, named("body"))
    if step is None and limits[0].type.startswith("u32[]"):
        return None  # not a scan
    return -(-_constant(limits[0]) // (step or 1))


def _constant(line: Line) -> int:
    """The value of an integer constant."""
    return int(line.rest.split(")")[0])


def _entry(line: Line) -> int | None:
    """The index at which an instruction reads a tuple; None for other instructions."""
    match = _INDEX.search(line.rest) if line.opcode == "get-tuple-element" else None
    return int(match[1]) if match else None


def _step(condition: list[Line], body: list[Line]) -> int | None:
    """The step that a loop's body adds to the counter of its condition; None if not found."""
    counters = {entry for line in condition if (entry := _entry(line)) is not None}
    if len(counters) != 1 or not body or body[-1].opcode != "tuple":
        return None
    (counter,) = counters
    made = {line.name: line for line in body}

    def origin(name: str) -> Line | None:
        line = made.get(name)
        while line is not None and line.opcode in ("copy", "bitcast"):
            line = made.get(line.operands[0])
        return line

    operands = body[-1].operands
    added = origin(operands[counter]) if counter < len(operands) else None
    if added is None or added.opcode != "add":
        return None
    parts = [line for name in added.operands if (line := origin(name)) is not None]
    steps = [_constant(line) for line in parts if line.opcode == "constant"]
    before = [line for line in parts if _entry(line) == counter]
    return steps[0] if len(steps) == len(before) == 1 and steps[0] > 0 else None


def shape_of(kind: str) -> tuple[int, ...]:
    """The shape of the first array of a type.

    Example:
        >>> shape_of("bf16[32,128]{1,0:T(8,128)}")
        (32, 128)
    """
    match = _ARRAY.search(kind)
    return () if match is None else tuple(int(n) for n in re.findall(r"\d+", match[2]))


def array_bytes(kind: str) -> int:
    """Bytes of a type, the parts of a tuple added up.

    Example:
        >>> array_bytes("(f32[2,3]{1,0}, pred[8]{0})")
        32
    """
    total = 0
    for dtype, shape in _ARRAY.findall(kind):
        digits = re.search(r"\d+", dtype)
        bits = int(digits[0]) if digits else 8 * (dtype == "pred")
        total += -(-bits * math.prod(int(n) for n in re.findall(r"\d+", shape)) // 8)
    return total
