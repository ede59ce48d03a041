"""Matrix products of a compiled program, counted on one device and multiplied by trip counts.

`train.costs.flops` counts the products of a function; this counts the products that one device runs
for it, including work that the partitioner repeats on every device. Both agree if nothing is
repeated.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any, NamedTuple

from train.costs import hlo
from train.costs.collectives import KINDS, collectives


class Work(NamedTuple):
    """The work of one device in a call of the program.

    Args:
        flops: multiplications and additions of all products; a conditional counts as its most
            expensive branch.
        unknown_loops: products in loops whose trip count the text does not give; counted as one
            trip.
        opaque: calls whose work the text does not show, by target.
    """

    flops: int
    unknown_loops: int
    opaque: dict[str, int]


def device_flops(program: Any, scope: str = "") -> Work:
    r"""Floating-point operations of the matrix products that one device runs.

    .. math::
        2 \cdot \text{size of the result} \cdot \text{size of the contracted axes}

    Args:
        program: a parsed or compiled program, or its text.
        scope: the `jax.named_scope` whose products are counted; empty: all are.

    Returns:
        A :class:`Work`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> loop = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda i, y: y @ x, x))
        >>> text = loop.lower(jnp.ones((3, 3))).compile()
        >>> device_flops(text).flops
        540
    """
    parsed = program if isinstance(program, hlo.Program) else hlo.parse(program)
    totals: dict[tuple[tuple[str, int], ...], int] = defaultdict(int)
    unknown, opaque = 0, defaultdict(int)
    for visit in hlo.visits(parsed):
        if scope and scope not in visit.line.op_name.split("/"):
            continue
        count = _PRODUCTS.get(visit.line.opcode, _none)(visit)
        if count:
            totals[visit.branch] += visit.times * count
            unknown += not visit.known
        elif visit.line.opcode == "custom-call" and (name := _opaque(visit)):
            opaque[name] += visit.times
    return Work(_dearest(dict(totals)), unknown, dict(opaque))


def _dearest(totals: dict[tuple[tuple[str, int], ...], int]) -> int:
    """The sum over branches; of the branches of one conditional only the most expensive counts."""
    depth = max(map(len, totals), default=0)
    while depth:
        best: dict[tuple, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
        rest = {branch: n for branch, n in totals.items() if len(branch) < depth}
        for branch, n in totals.items():
            if len(branch) == depth:
                name, index = branch[-1]
                best[branch[:-1]][name][index] = n
        for outer, conditionals in best.items():
            rest[outer] = rest.get(outer, 0) + sum(max(b.values()) for b in conditionals.values())
        totals, depth = rest, depth - 1
    return totals.get((), 0)


def _none(visit: hlo.Visit) -> int:
    return 0


def _shapes(visit: hlo.Visit) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of the result and of both operands."""
    line, computation = visit.line, visit.computation
    left, right = (hlo.shape_of(computation.type_of(name)) for name in line.operands[:2])
    return hlo.shape_of(line.type), left, right


def _numbers(rest: str, key: str) -> list[int]:
    match = re.search(rf"\b{key}=\{{([\d,]*)\}}", rest)
    return [int(n) for n in re.findall(r"\d+", match[1])] if match else []


def _dot(visit: hlo.Visit) -> int:
    result, left, _ = _shapes(visit)
    contracted = math.prod(left[a] for a in _numbers(visit.line.rest, "lhs_contracting_dims"))
    return 2 * math.prod(result) * contracted


def _convolution(visit: hlo.Visit) -> int:
    """Products on TPUs are convolutions; their batch axes are windows that cover mostly padding."""
    rest = visit.line.rest
    result, left, right = _shapes(visit)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    if labels is None:
        return 0
    of_left, of_right, of_result = labels.groups()
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", rest) or "")[1]
                  if "window={" in rest else ""))  # fmt: skip
    spatial = sorted(c for c in of_left if c.isdigit())  # the window lists them in this order

    def per_axis(key: str, default: int) -> list[int]:
        given = window.get(key)
        return [default] * len(spatial) if given is None else [int(n) for n in given.split("x")]

    pads = [p.split("_") for p in window.get("pad", "x".join(["0_0"] * len(spatial))).split("x")]
    taps = 1
    for i, label in enumerate(spatial):
        taps *= _taps(
            left[of_left.index(label)],
            right[of_right.index(label)],
            result[of_result.index(label)],
            per_axis("stride", 1)[i],
            int(pads[i][0]),
            per_axis("lhs_dilate", 1)[i],
            per_axis("rhs_dilate", 1)[i],
        )
    fixed = result[of_result.index("b")] * result[of_result.index("f")]
    return 2 * fixed * right[of_right.index("i")] * taps


def _taps(size: int, kernel: int, out: int, stride: int, low: int, left: int, right: int) -> int:
    """Pairs of an output and a kernel position that meet an input element, along one axis."""
    if kernel == 1 and left == 1 and low == 0:
        return out
    reach = (size - 1) * left
    count = 0
    for k in range(kernel):
        first = k * right - low  # the position that output 0 reads
        # first + stride * o is in [0, reach] and a multiple of `left`
        for o in range(max(0, -(first // stride)), out):
            at = first + stride * o
            if at > reach:
                break
            count += at >= 0 and at % left == 0
    return count


def _opaque(visit: hlo.Visit) -> str:
    match = re.search(r'custom_call_target="([^"]+)"', visit.line.rest)
    return match[1] if match else ""


def _custom_call(visit: hlo.Visit) -> int:
    """The products that XLA's CPU and GPU backends hand to a library."""
    if "matmul" not in _opaque(visit) and "gemm" not in _opaque(visit):
        return 0
    result, left, right = _shapes(visit)
    if len(result) < 2 or len(left) < 2 or len(right) < 2:
        return 0
    # (.., m, k) x (.., k, n), each possibly transposed: m k * k n = k^2 * m n
    shared = math.prod(left) * math.prod(right) // (math.prod(result) * math.prod(result[:-2]))
    return 2 * math.prod(result) * math.isqrt(shared)


_PRODUCTS = {"dot": _dot, "convolution": _convolution, "custom-call": _custom_call}


_FREE = {
    "after-all", "bitcast", "call", "conditional", "constant", "copy-done", "copy-start", "domain",
    "get-tuple-element", "iota", "opt-barrier", "parameter", "partition-id", "replica-id", "tuple",
    "while",
}  # fmt: skip


def device_bytes(program: Any) -> int:
    """Bytes that one device reads from and writes to its main memory in a call, roughly.

    Every instruction reads its operands and writes its result, and a fusion counts as one
    instruction. Of an array that is only sliced, or updated in place, the slice counts. Arrays that
    the compiler keeps in a TPU's fast memory (`S(1)` in their layout) are left out. All branches
    count.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> device_bytes(jax.jit(lambda x: x + 1).lower(jnp.ones(256)).compile())
        2048
    """
    parsed = program if isinstance(program, hlo.Program) else hlo.parse(program)
    fused = {
        name
        for computation in parsed.computations.values()
        for line in computation.lines
        if line.opcode in ("fusion", "reduce", "sort", "scatter", "all-reduce", "reduce-scatter")
        for name in hlo.called(line.rest)
    }
    total = sum(2 * c.times * c.bytes for c in collectives(parsed))
    for visit in hlo.visits(parsed):
        opcode = visit.line.opcode
        if visit.computation.name in fused or opcode in _FREE:
            continue
        if opcode.removesuffix("-start").removesuffix("-done") not in KINDS:
            total += visit.times * _traffic(parsed, visit)
    return total


def _traffic(program: hlo.Program, visit: hlo.Visit) -> int:
    line, computation = visit.line, visit.computation
    given = [computation.type_of(name) for name in line.operands]
    if line.opcode in ("dynamic-slice", "slice", "gather") or line.opcode.endswith("-done"):
        return 2 * _slow(line.type)
    if line.opcode.endswith("-start") or line.name.startswith("async-collective"):
        return 0  # its bytes are counted where it ends, or as a collective
    if line.opcode == "dynamic-update-slice":
        return 2 * _slow(given[1])
    inner = next(
        (program.computations[c] for c in hlo.called(line.rest) if c in program.computations), None
    )
    if line.opcode != "fusion" or inner is None:
        return _slow(line.type) + sum(map(_slow, given))
    parameters = {int(x.rest.split(")")[0]): x.name for x in inner.lines if x.opcode == "parameter"}
    # Buffers that pass through unchanged, of a collective in flight.
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{", line.rest)
    passed, kept = {int(n) for _, n in pairs}, {int(n or 0) for n, _ in pairs}
    total, updated = 0, 0
    for i, kind in enumerate(given):
        if i in passed:
            continue
        users = [x for x in inner.lines if parameters.get(i) in x.operands]
        sliced = [x for x in users if x.opcode in ("dynamic-slice", "slice", "gather")]
        placed = [
            x for x in users
            if x.opcode == "dynamic-update-slice" and x.operands[0] == parameters.get(i)
        ]  # fmt: skip
        if users and len(sliced) + len(placed) == len(users):
            total += sum(min(_slow(kind), hlo.array_bytes(x.type)) for x in sliced)
            for x in placed:
                total += 2 * hlo.array_bytes(inner.type_of(x.operands[1]))
                updated += _slow(kind)
        else:
            total += _slow(kind)
    written = sum(_slow(x) for i, x in enumerate(_arrays(line.type)) if i not in kept)
    return total + max(0, written - updated)


def _arrays(kind: str) -> list[str]:
    """The arrays of a type, layouts included."""
    return re.findall(r"[a-z]+\d*\[[^\]]*\](?:\{[^}]*\})?", kind)


def _slow(kind: str) -> int:
    """Bytes of the arrays of a type that are in main memory."""
    return sum(hlo.array_bytes(array) for array in _arrays(kind) if "S(" not in array)
