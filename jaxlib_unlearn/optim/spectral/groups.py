"""Which blocks TEON groups: K consecutive ones by absolute number, from 0 on.

``optim.blocks`` reads the number of a block; ``optim.teon`` orthogonalises what is grouped here.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from jaxlib_unlearn.optim.blocks import layers_of
from jaxlib_unlearn.optim.matrices import note
from jaxlib_unlearn.optim.spectral.direction import Part

ATTENTION = (
    r"(^|[/.])(q|k|v|query|key|value|qkv|c_attn|wq|wk|wv|[Ww]qkv|to_[qkv]|[qkv]_lin|"
    r"([qkv]|qkv|query|key|value)_proj|query_key_value)([/.]|$)"
)
"""The leaves that the paper groups: query, key and value projections."""

Groups = str | Callable[[str], bool] | None
"""Which leaves are grouped: a pattern (``re.search``) or predicate on the path; None for all."""

Rows = dict[Any, list[tuple[int, int, int | None]]]
"""By projection: number of a block, part, and index in the part's first axis if that is a stack."""


def picker(groups: Groups) -> Callable[[str], bool]:
    """Whether a leaf is to be grouped, by its path."""
    if groups is None:
        return lambda path: True
    if callable(groups):
        return groups
    return lambda path: re.search(groups, path) is not None


def rows_of(parts: Sequence[Part], picked: Callable[[str], bool]) -> tuple[Rows, list[int]]:
    """The blocks of every projection, and the parts that belong to none.

    Args:
        parts: arrays or shapes.
        picked: whether a leaf is to be grouped, by its path.

    Returns:
        The rows and the positions of the other parts.
    """
    rows: Rows = defaultdict(list)
    others: list[int] = []
    lengths: dict[Any, int] = defaultdict(int)  # blocks of a row seen in earlier stacks
    likes = [
        (part.piece, part.axes.sizes(part.array.shape)[1:])
        if part.stacked
        else (part.piece, tuple(part.array.shape), part.axes)
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
            count = part.array.shape[part.axes.stack[0]]
            rows[row] += [(lengths[row] + k, i, k) for k in range(count)]
            lengths[row] += count
        else:
            rows[row].append((index, i, None))
    return rows, others


def check_groups(parts: Sequence[Part], size: int, groups: Groups) -> None:
    """Raises where nothing is grouped; notes for ``matrices.describe`` what is.

    Args:
        parts: all that TEON is given, as shapes.
        size: blocks of a group; with 1, or no parts, nothing is checked.
        groups: which leaves are grouped.

    Raises:
        ValueError: there are matrices, and no group of them.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxlib_unlearn.optim.matrices import MatrixAxes
        >>> part = Part("Dense_0/kernel", 0, False, jnp.ones((2, 3)), MatrixAxes((), (0,), (1,)))
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
    examples = ", ".join(f"{p.path!r} {tuple(p.array.shape)}" for p in (picked or parts)[:3])
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
    """A description of the blocks of a leaf, and whether any is grouped."""
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
