"""The blocks that TEON groups: K consecutive ones by absolute number, from 0 on.

``optim.blocks`` reads the number of a block; ``optim.teon`` orthogonalises the groups.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxlib_unlearn.optim.blocks import layers_of
from jaxlib_unlearn.optim.matrices import MatrixAxes, note
from jaxlib_unlearn.optim.memo import once
from jaxlib_unlearn.optim.spectral.plan import Part

ATTENTION = (
    r"(^|[/.])(q|k|v|query|key|value|qkv|c_attn|wq|wk|wv|[Ww]qkv|to_[qkv]|[qkv]_lin|"
    r"([qkv]|qkv|query|key|value)_proj|query_key_value)([/.]|$)"
)
"""The leaves that the paper groups: query, key and value projections."""

Groups = str | Callable[[str], bool] | None
"""The leaves to group: a pattern (``re.search``) or predicate on the path; None for all."""

Rows = dict[Any, list[tuple[int, int, int | None]]]
"""The number of a block, its part, and its index in a part that is a stack, by projection."""


class Member(NamedTuple):
    """A part, or a range of the blocks on its first axis (None, None: all of it)."""

    part: int
    start: int | None = None
    stop: int | None = None


class Run(NamedTuple):
    """Blocks that go to a bucket in one array.

    Args:
        members: A single range of a part; or one block of each of several parts, which are stacked.
        together: The number of neighbouring matrices in a group; 1 if none are grouped.
        axes: The axes of the array as a stack in which the matrices of a group are neighbours.
        tall: True if a matrix has more inputs than outputs.
    """

    members: tuple[Member, ...]
    together: int
    axes: MatrixAxes
    tall: bool


def picker(groups: Groups) -> Callable[[str], bool]:
    """A predicate on paths: True if a leaf is to be grouped."""
    if groups is None:
        return lambda path: True
    if callable(groups):
        return groups
    return lambda path: re.search(groups, path) is not None


def rows_of(parts: Sequence[Part], picked: Callable[[str], bool]) -> tuple[Rows, list[int]]:
    """The blocks of every projection, and the parts that belong to none.

    Args:
        parts: The parts of all matrices.
        picked: A predicate on the path of a leaf: True if it is to be grouped.

    Returns:
        The rows and the positions of the other parts.
    """
    rows: Rows = defaultdict(list)
    others: list[int] = []
    lengths: dict[Any, int] = defaultdict(int)  # blocks of a row seen in earlier stacks
    likes = [
        (part.piece, part.side) if part.stacked else (part.piece, part.shape, part.axes)
        for part in parts
    ]
    wheres = layers_of([(p.path, p.stacked, like) for p, like in zip(parts, likes, strict=True)])
    for i, (part, like, where) in enumerate(zip(parts, likes, wheres, strict=True)):
        if where is None or not picked(part.path):
            others.append(i)
            continue
        kind, index = where
        row = (kind, like)
        if index is None:  # stacked blocks
            count = part.shape[part.axes.stack[0]]
            rows[row] += [(lengths[row] + k, i, k) for k in range(count)]
            lengths[row] += count
        else:
            rows[row].append((index, i, None))
    return rows, others


def runs_of(parts: Sequence[Part], size: int, groups: Groups) -> tuple[Run, ...]:
    """The runs of blocks that go to a bucket together, planned once for the same parts.

    Args:
        parts: The parts of all matrices.
        size: The number of blocks in a group.
        groups: The leaves to group: a pattern, a predicate, or None for all.

    Returns:
        Runs that cover every block once.

    Example:
        >>> parts = (Part("layers/q", 0, True, (5, 2, 3), MatrixAxes((0,), (1,), (2,))),)
        >>> [(run.members[0].start, run.members[0].stop, run.together)
        ...  for run in runs_of(parts, 2, None)]
        [(0, 4, 2), (4, 5, 1)]
    """
    asked = tuple(groups(part.path) for part in parts) if callable(groups) else groups
    return _planned(tuple(parts), size, asked)


@once
def _planned(parts: tuple[Part, ...], size: int, groups: str | tuple | None) -> tuple[Run, ...]:
    if isinstance(groups, tuple):
        said = {part.path: picked for part, picked in zip(parts, groups, strict=True)}
        picked = said.__getitem__
    else:
        picked = picker(groups)
    rows, others = rows_of(parts, picked) if size > 1 else ({}, range(len(parts)))
    runs: list[tuple[list[Member], int]] = [([Member(i)], 1) for i in others]
    for members in rows.values():
        found = {block: (i, k) for block, i, k in members}
        pending: list[tuple[Member, int]] = []  # ranges of stacks, and their group size
        for block in sorted(found):
            i, k = found[block]
            first = block // size * size
            group = [found[b] for b in range(first, first + size) if b in found]
            whole = len(group) == size
            if k is None or (whole and len({part for part, _ in group}) > 1):
                # A leaf of one block, or a group that lies across two stacks.
                if not whole:
                    runs.append(([_block(i, k)], 1))
                elif block == first:
                    runs.append(([_block(*at) for at in group], size))
                continue
            kind = size if whole else 1
            last = pending[-1] if pending else None
            if last and last == (Member(i, last[0].start, k), kind):
                pending[-1] = Member(i, last[0].start, k + 1), kind
            else:
                pending.append((Member(i, k, k + 1), kind))
        runs += [([member], kind) for member, kind in pending]
    return tuple(_run(parts, members, kind) for members, kind in runs)


def _block(part: int, k: int | None) -> Member:
    return Member(part) if k is None else Member(part, k, k + 1)


def _run(parts: Sequence[Part], members: Sequence[Member], together: int) -> Run:
    part, first = parts[members[0].part], members[0]
    axes = part.axes
    if len(members) == 1:
        # Blocks last in the stack, so that those of a group follow each other.
        axes = axes._replace(stack=(*axes.stack[1:], *axes.stack[:1]))
    else:
        if first.start is not None:  # one block of a stack, whose axis is gone
            lead = axes.stack[0]
            axes = MatrixAxes(*(tuple(a - (a > lead) for a in g if a != lead) for g in axes))
        moved = MatrixAxes(*(tuple(a + 1 for a in group) for group in axes))
        axes = moved._replace(stack=(*moved.stack, 0))
    fan_in, fan_out = part.side
    return Run(tuple(members), together, axes, fan_in > fan_out)


def check_groups(parts: Sequence[Part], size: int, groups: Groups) -> None:
    """Raise if nothing is grouped; otherwise note the groups for ``matrices.describe``.

    Args:
        parts: The parts of all matrices that TEON is given.
        size: The number of blocks in a group; with 1, or no parts, nothing is checked.
        groups: The leaves to group: a pattern, a predicate, or None for all.

    Raises:
        ValueError: there are matrices, but no group of them.

    Example:
        >>> part = Part("Dense_0/kernel", 0, False, (2, 3), MatrixAxes((), (0,), (1,)))
        >>> check_groups([part], 2, None)
        Traceback (most recent call last):
        ...
        ValueError: TEON with group_size=2 finds no group, so it would be Muon: ...
    """
    if size == 1 or not parts:
        return
    said: dict[str, list[str]] = {}
    grouped = False
    for members in rows_of(parts, picker(groups))[0].values():
        here = {block for block, _, _ in members}
        by_part: dict[int, list[int]] = defaultdict(list)
        for block, i, _ in sorted(members):
            by_part[i].append(block)
        for i, blocks in by_part.items():
            text, whole = _words_for(blocks, here, size)
            grouped |= whole
            texts = said.setdefault(parts[i].path, [])
            if text not in texts:  # q, k and v of one leaf have the same blocks
                texts.append(text)
    if grouped:
        for path, texts in said.items():
            note(path, "; ".join(texts))
        return
    picked = [part for part in parts if picker(groups)(part.path)]
    examples = ", ".join(f"{p.path!r} {p.shape}" for p in (picked or parts)[:3])
    if not picked:
        what = "the default, q, k and v projections," if groups == ATTENTION else f"{groups!r}"
        why = f"groups={what} picks none of the matrices, e.g. {examples}"
    elif not said:
        why = f"no number of a block is in the paths of {examples}"
    else:
        first = next(iter(said))
        why = f"no {size} blocks that belong together are here: {first!r} is {said[first][0]}"
    raise ValueError(
        f"TEON with group_size={size} finds no group, so it would be Muon: {why}. Blocks are the "
        "first axis of a stack, or numbered as layers/0, Block_0 or h_0 (optim.blocks has the "
        "rules); rename, pick others with groups=, or say group_size=1"
    )


def _words_for(blocks: list[int], here: set[int], size: int) -> tuple[str, bool]:
    """A description of the blocks of a leaf, and True if any of them is grouped."""
    groups = {
        block // size: range(block // size * size, (block // size + 1) * size) for block in blocks
    }
    whole = {g for g, members in groups.items() if here.issuperset(members)}
    together = [block for block in blocks if block // size in whole]
    alone = [block for block in blocks if block // size not in whole]
    said = []
    if len(whole) == 1 and size <= 4:
        said.append("blocks " + "+".join(map(str, groups[min(whole)])))
    elif together:
        said.append(f"blocks {together[0]}-{together[-1]} by {size}")
    if alone:
        missing = sorted(set(groups[alone[0] // size]) - here)
        said.append(f"block {_span(alone)} alone, without {_span(missing)}")
    return ", ".join(said), bool(whole)


def _span(numbers: list[int]) -> str:
    """Blocks in short notation: one, or the first and the last."""
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
