"""Collectives of a compiled program: their kinds, their runs and their bytes.

They are read from the text of the optimised HLO. A collective in a loop body appears there once and
runs once per trip, so it is multiplied by the trip counts of the loops around it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from train.costs import hlo

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
        kind: one of `KINDS`.
        bytes: the bytes of one device's operands or results in one run, whichever is more; the
            device's own part is included.
        times: the runs per call of the program: the product of the trip counts around it.
        in_loop: whether it is inside a loop's body (or condition).
        known: whether the trip counts of all loops around it are known; an unknown one counts once.
        groups: the devices that communicate with each other; empty if the text lists no groups.
        scope: the scope of the traced function that it comes from; empty if the text has none.
    """

    kind: str
    bytes: int
    times: int
    in_loop: bool
    known: bool
    groups: Groups
    scope: str = ""


def collectives(program: Any) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text, all branches included.

    Args:
        program: the text of optimised HLO, `jax.jit(f).lower(...).compile()`, or a parsed program.

    Returns:
        One entry per instruction and call site.

    Raises:
        ValueError: the text has no entry computation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> collectives(jax.jit(jnp.sin).lower(1.0).compile())
        []
    """
    found: list[Collective] = []
    chains: set[str] = set()
    for visit in hlo.visits(program if isinstance(program, hlo.Program) else hlo.parse(program)):
        line = visit.line
        kind = re.sub("-start$", "", line.opcode)
        if kind not in KINDS:
            continue
        if chain := _CHAIN.search(line.rest):
            # On TPUs a collective that overlaps with products appears in each of their fusions.
            if chain[1] in chains:
                continue
            chains.add(chain[1])
        if "all-reduce-scatter" in visit.computation.name:
            kind = "reduce-scatter"  # an all-reduce and a slice, fused into one collective
        size, groups = _bytes_moved(line, visit.computation), _groups(line.rest)
        found.append(Collective(kind, size, visit.times, visit.in_loop, visit.known, groups,
                                line.op_name))  # fmt: skip
    return found


def summary(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """The number of runs of each kind in a call, and the bytes of all of them on one device.

    Args:
        found: the list that :func:`collectives` returns.

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

_CHAIN = re.compile(r"channel_id=(\d+).*\bchain_id=")
_EXPLICIT_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def _bytes_moved(line: hlo.Line, computation: hlo.Computation) -> int:
    given = sum(hlo.array_bytes(computation.type_of(name)) for name in line.operands)
    given = given or hlo.array_bytes(line.rest.split(")")[0])
    result = hlo.array_bytes(line.type)
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
