"""Collectives of a compiled program: which, how often, and how many bytes.

Read from the text of the optimised HLO. A collective in a loop's body stands there once and runs
once a trip, so it is multiplied by the trip counts of the loops around it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

Groups = tuple[tuple[int, ...], ...]


class Collective(NamedTuple):
    """One collective instruction of a program.

    Args:
        kind: a word of `KINDS`.
        bytes: what one device puts in or gets out when it runs once, whichever is more; its own
            part is included.
        times: how often a call of the program runs it: the product of the trip counts around it.
        in_loop: whether it stands inside a loop's body (or condition).
        known: whether the trip counts of all loops around it are known; an unknown one counts once.
        groups: the devices that talk to each other; empty if the text does not list groups.
    """

    kind: str
    bytes: int
    times: int
    in_loop: bool
    known: bool
    groups: Groups


def collectives(program: Any) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text, branches all included.

    Args:
        program: the text of optimised HLO, or `jax.jit(f).lower(...).compile()`.

    Returns:
        One entry an instruction and call site.

    Raises:
        ValueError: the text has no entry computation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> collectives(jax.jit(jnp.sin).lower(1.0).compile())
        []
    """
    text = program if isinstance(program, str) else program.as_text()
    computations, entry = _parse(text)
    found: list[Collective] = []

    def walk(name: str, times: int, in_loop: bool, known: bool) -> None:
        computation = computations[name]
        for line in computation:
            kind = re.sub("-start$", "", line.opcode)
            if kind in KINDS:
                size = _bytes_moved(line, computation)
                found.append(Collective(kind, size, times, in_loop, known, _groups(line.rest)))
            called = [c for c in _called(line.rest) if c in computations]
            if line.opcode in ("async-update", "async-done"):
                continue  # they name what async-start has started
            if line.opcode == "while":
                trips = _trips(line.rest, computations)
                for inner in called:
                    walk(inner, times * (trips or 1), True, known and trips is not None)
            else:
                for inner in called:
                    walk(inner, times, in_loop, known)

    walk(entry, 1, False, True)
    return found


def summary(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """How often each kind runs in a call, and the bytes of all its runs on one device.

    Args:
        found: what :func:`collectives` returns.

    Returns:
        ``{kind: (count, bytes)}``, kinds in alphabetical order.

    Example:
        >>> one = Collective("all-reduce", 8, 3, True, True, ())
        >>> summary([one, one._replace(times=1)])
        {'all-reduce': (4, 32)}
    """
    total: dict[str, tuple[int, int]] = {}
    for c in found:
        count, size = total.get(c.kind, (0, 0))
        total[c.kind] = (count + c.times, size + c.times * c.bytes)
    return dict(sorted(total.items()))


# The text

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\d+m\d+\w*)?\[([\d,<=]*)\]")
_CALLS = re.compile(
    r"\b(?:body|condition|calls|to_apply|true_computation|false_computation"
    r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_EXPLICIT_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


class _Line(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


def _parse(text: str) -> tuple[dict[str, list[_Line]], str]:
    computations: dict[str, list[_Line]] = {}
    current: list[_Line] | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            if match := _COMPUTATION.match(line):
                current = computations.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(line):
            current.append(_Line(*match.groups()))
    if not entry:
        raise ValueError("this is no text of a compiled program: no ENTRY computation in it")
    return computations, entry


def _called(rest: str) -> list[str]:
    return [
        name for group in _CALLS.findall(rest) for name in re.findall(r"[\w.\-]+", group) if name
    ]


def _trips(rest: str, computations: dict[str, list[_Line]]) -> int | None:
    """The loop's trip count: as noted by XLA, or the one constant its condition compares with."""
    if match := _TRIPS.search(rest):
        return int(match[1])
    match = re.search(r"\bcondition=%?([\w.\-]+)", rest)
    condition = computations.get(match[1], []) if match else []
    limits = [line for line in condition if line.opcode == "constant"]
    # Scans count from 0 by 1 while smaller; programs for TPU carry no note.
    nested = [x for line in condition for c in _called(line.rest) for x in computations.get(c, [])]
    smaller = any("direction=LT" in line.rest for line in (*condition, *nested))
    if len(limits) == 1 and smaller and limits[0].type.startswith("s32[]"):
        return int(limits[0].rest.split(")")[0])
    return None


def _size(shapes: str) -> int:
    """Bytes of a type, the parts of a tuple added up."""
    total = 0
    for dtype, shape in _ARRAY.findall(shapes):
        digits = re.search(r"\d+", dtype)
        bits = int(digits[0]) if digits else 8 * (dtype == "pred")
        total += -(-bits * math.prod(int(n) for n in re.findall(r"\d+", shape)) // 8)
    return total


def _bytes_moved(line: _Line, computation: list[_Line]) -> int:
    operands = line.rest.split(")")[0]
    types = {other.name: other.type for other in computation}
    names = re.findall(r"%([\w.\-]+)", operands)
    given = sum(_size(types.get(name, "")) for name in names) or _size(operands)
    result = _size(line.type)
    if line.opcode in ("all-gather-start", "collective-permute-start"):
        result -= given  # their results are pairs (operand, result)
    return max(given, result)


def _groups(rest: str) -> Groups:
    """Lists `{{0,1},{2,3}}`, iotas `[groups,size]<=[dimensions]T(permutation)`, mesh axes."""
    if match := _EXPLICIT_GROUPS.search(rest):
        groups = re.findall(r"\{([\d,]+)\}", match[1])
        return tuple(tuple(int(n) for n in group.split(",")) for group in groups)
    if match := _IOTA_GROUPS.search(rest):
        shape, dims, order = ([int(n) for n in x.split(",")] if x else None for x in match.groups())
        devices = np.arange(math.prod(dims or ())).reshape(dims or ())
        groups = devices.transpose(order).reshape(shape or ())
        return tuple(tuple(int(n) for n in group) for group in groups)
    if match := _MESH_GROUPS.search(rest):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", match[1])}
        names = [n for n in re.findall(r"'([^']+)'", match[4]) if n in sizes]
        if not names:
            return ()
        devices = np.arange(math.prod(sizes.values()))
        if match[2]:
            order = [int(n) for n in match[3].split(",")] if match[3] else None
            devices = devices.reshape([int(n) for n in match[2].split(",")]).transpose(order)
        devices = devices.reshape(list(sizes.values()))
        axes = [list(sizes).index(n) for n in names]
        devices = np.moveaxis(devices, axes, range(-len(axes), 0))
        groups = devices.reshape(-1, math.prod(sizes[n] for n in names))
        return tuple(sorted(tuple(int(n) for n in group) for group in groups))
    return ()
