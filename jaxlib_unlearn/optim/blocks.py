"""The block of a model to which a leaf belongs, for optimizers that group blocks (TEON).

A leaf that is a stack holds many blocks. Any other belongs to the block whose number is in its
path: the number of a component named ``layer``, ``block``, ``stack`` (as an ending, singular or
plural) or ``h``, in the forms ``layers/3``, ``layers.3``, ``Block_3``, ``h3`` and ``h3_attn``;
otherwise the number of any other list or numbered container (``name_3``, ``name3``). If a path has
several such numbers, the outermost one counts that also has another value in the path of a leaf
with the same shape and an otherwise equal path.

Experts are not blocks, and a number in the name of the owner (``Dense_0``, ``w1``, ``conv1``) does
not count blocks: it counts siblings inside one block, q, k, v and o for instance. So the layers of
a plain linen MLP are not blocks, but they are if they are named ``layers_0``, ``layers_1``, as in
``nn.Sequential``.
"""

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

from jaxlib_unlearn.optim.rules import (
    EXPERTS,
    MatrixAxes,
    owner_at,
    path_str,
    split_path,
    stacks_of,
)

_LAYER = re.compile(r"^h$|(layer|block|stack)s?$", re.IGNORECASE)
_NUMBERED = re.compile(r"^(?P<stem>.*[^\W\d_])_?(?P<number>\d+)$")  # Block_0, h3
_NUMBER_FIRST = re.compile(  # h0_attn
    r"^(?P<stem>h|\w*?(layer|block|stack)s?)_?(?P<number>\d+)_.+$", re.IGNORECASE
)


def counts_blocks(path: Any, axes: MatrixAxes, rank: int) -> bool:
    """True if the first axis of a leaf counts blocks: the leaf is a stack, but not of experts.

    Args:
        path: The path of the leaf.
        axes: The axes of the leaf as a stack of matrices.
        rank: The number of axes of the leaf.

    Returns:
        True or False.

    Example:
        >>> axes = MatrixAxes((0,), (1,), (2,))
        >>> counts_blocks("layers/q/kernel", axes, 3), counts_blocks("experts/up/kernel", axes, 3)
        (True, False)
    """
    stacks = stacks_of(split_path(path_str(path)), rank)
    return bool(axes.stack) and not (stacks and EXPERTS.search(stacks[0]))


def layer_of(path: Any, stacked: bool) -> tuple[str, int | None] | None:
    """The name of a leaf's projection, which all blocks share, and the number of its block.

    This follows the module's rules for one leaf alone; :func:`layers_of` does so for a tree.

    Args:
        path: The path of the leaf.
        stacked: True if the first axis of the leaf counts blocks.

    Returns:
        ``(kind, block)``; block is None for a leaf that holds a stack of blocks (consecutive
        stacks, ``layers/0`` and ``layers/1``, are of one kind). None for a leaf outside all blocks.

    Example:
        >>> layer_of("layers/3/attn/q/kernel", False)
        ('layers/*/attn/q/kernel', 3)
        >>> layer_of("params/Block_3/Dense_1/kernel", False)
        ('params/Block_*/Dense_1/kernel', 3)
        >>> layer_of("layers/attn/q/kernel", True)
        ('layers/attn/q/kernel', None)
        >>> layer_of("mlp/kernel", False), layer_of("Dense_1/kernel", False)
        (None, None)
    """
    options = _layers(split_path(path_str(path)), stacked)
    return options[0] if options else None


def layers_of(
    leaves: Sequence[tuple[str, bool, Hashable]],
) -> list[tuple[str, int | None] | None]:
    """:func:`layer_of` for the matrices of a tree.

    Args:
        leaves: The path of every leaf, whether its first axis counts blocks, and a value (its
            shape) that is equal for two leaves of the same projection.

    Returns:
        One entry per leaf. If names are numbered from the second one on, as in haiku (``block``,
        ``block_1``, ..), the first has number 0.

    Example:
        >>> paths = ["Encoder_0/Unit_0/q/w", "Encoder_0/Unit_1/q/w"]
        >>> layers_of([(path, False, (4, 4)) for path in paths])
        [('Encoder_0/Unit_*/q/w', 0), ('Encoder_0/Unit_*/q/w', 1)]
        >>> layers_of([(path, False, (4, 4)) for path in ("block/q/w", "block_1/q/w")])
        [('block_*/q/w', 0), ('block_*/q/w', 1)]
    """
    options = [_layers(split_path(text), stacked) for text, stacked, _ in leaves]
    numbers: dict[tuple[str, Hashable], set[int | None]] = defaultdict(set)
    for (_, _, like), kinds in zip(leaves, options, strict=True):
        for kind, number in kinds:
            numbers[kind, like].add(number)
    # One leaf that recurs is enough: the others of its container may be frozen elsewhere.
    again = {_container(kind) for (kind, _), seen in numbers.items() if len(seen) > 1}
    found: list[tuple[str, int | None] | None] = []
    for (text, _, like), kinds in zip(leaves, options, strict=True):
        parts = split_path(text)
        firsts = [_with(parts, i, part + "_*") for i, part in enumerate(parts)]
        likely = [option for option in kinds if _container(option[0]) in again]
        likely += [(kind, 0) for kind in firsts if 0 not in numbers.get((kind, like), {0})]
        outermost = min(likely, key=lambda option: _container(option[0]).count("/"), default=None)
        found.append(outermost or (kinds[0] if kinds else None))
    return found


def _layers(parts: list[str], stacked: bool) -> list[tuple[str, int | None]]:
    """Kinds and numbers that a leaf may have as one of several layers, the likeliest first."""
    named: list[tuple[str, int | None]] = []
    others: list[tuple[str, int | None]] = []
    if stacked:
        # A tuple of stacks is numbered by a component of its own.
        for i, part in enumerate(parts):
            if part.isdigit():
                to = named if i and _LAYER.search(parts[i - 1]) else others
                to.append((_with(parts, i, "*"), None))
        return (named or others or [("/".join(parts), None)])[:1]
    owner = owner_at(parts)
    for i, part in enumerate(parts):
        if part.isdigit():
            stem, number, kind = parts[i - 1].rstrip("0123456789_") if i else "", part, "*"
        else:
            match = _NUMBER_FIRST.match(part) or _NUMBERED.match(part)
            if match is None:
                continue
            stem, number = match["stem"], match["number"]
            kind = part[: match.start("number")] + "*" + part[match.end("number") :]
        if EXPERTS.search(stem):
            continue
        if _LAYER.search(stem):
            named.append((_with(parts, i, kind), int(number)))
        elif part.isdigit() or i < owner:
            others.append((_with(parts, i, kind), int(number)))
    return named or others


def _container(kind: str) -> str:
    return kind.partition("*")[0]


def _with(parts: list[str], at: int, part: str) -> str:
    return "/".join([*parts[:at], part, *parts[at + 1 :]])
