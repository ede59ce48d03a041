"""The leaves that are matrices, and their stack, input and output axes.

They are decided once, by path and rank, for every optimizer of matrices. Leaves that are not
matrices (embeddings, heads, norms, biases, scales, routers, short convolutions, vectors) go to
AdamW. A leaf of rank >= 2 that the rules cannot place is an error that names its path:
orthogonalising a stack of biases, or a matrix along the wrong axes, would otherwise go unnoticed.
``optim.rules`` has the table; ``optim.blocks`` finds the block that a leaf belongs to.
"""

import contextvars
import math
from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers

from jaxlib_unlearn.optim.blocks import layer_of
from jaxlib_unlearn.optim.memo import once, outline
from jaxlib_unlearn.optim.rules import (
    MatrixAxes,
    path_str,
    place,
    place_all,
    refused_bare,
    sharding_role,
)

__all__ = [
    "MatrixAxes",
    "Specs",
    "describe",
    "every_matrix",
    "labels",
    "layer_of",
    "matrix_axes",
    "path_str",
    "paths_of",
    "resolve",
    "sharding_role",
    "trailing_axes",
]

Specs = Any
"""A choice of matrices: None for the rules of ``optim.rules``; or a word or
``optax.contrib.MuonDimensionNumbers`` (or None, for adamw) per leaf or subtree; or a function of
the parameters that returns such a tree. The words are "rules" and "all_2d", by which two axes
(after those of stacks) also make a matrix if the name of a leaf says nothing."""

_WORDS = ("rules", "all_2d")
# Notes that optimizers make about leaves while `describe` reads the shapes of their state.
_notes: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar(
    "notes", default=None
)


def matrix_axes(path: Any, leaf: Any, *, layout: str = "in_out") -> MatrixAxes | None:
    """The axes of the matrices in a leaf, or None if the leaf is for AdamW.

    Args:
        path: The path of the leaf, text or a key path.
        leaf: An array or anything with a ``shape``.
        layout: The order of a kernel's axes: "in_out" for ``(..., in, out)``; "out_in" for
            ``(..., out, in)`` (equinox, torch). DenseGeneral kernels are recognised in the first
            layout only.

    Returns:
        The axes, or None.

    Raises:
        ValueError: the leaf has rank >= 2 and no rule places it, or the layout is unknown.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> matrix_axes("layers/attn/q/kernel", jnp.zeros((30, 8, 4)))
        MatrixAxes(stack=(0,), fan_in=(1,), fan_out=(2,))
        >>> matrix_axes("embed/embedding", jnp.zeros((100, 8)))

    References:
        Jordan et al., "Muon" (2024): hidden matrices only.
    """
    return place(path_str(path), tuple(leaf.shape), layout)[0]


def trailing_axes(path: Any, leaf: Any) -> MatrixAxes | None:
    """The bare rule of ``scale_by_*``: the last two axes are (in, out), all others are the stack.

    Args:
        path: The path of the leaf.
        leaf: Anything with a ``shape``.

    Returns:
        The axes, or None for rank 0 and 1.

    Raises:
        ValueError: a leaf of rank >= 2 whose name says norm, bias, scale or embed.

    Example:
        >>> import jax.numpy as jnp
        >>> trailing_axes("w", jnp.zeros((2, 3, 4, 5)))
        MatrixAxes(stack=(0, 1), fan_in=(2,), fan_out=(3,))
    """
    rank, text = len(leaf.shape), path_str(path)
    if rank < 2:
        return None
    if refused_bare(text):
        raise ValueError(
            f"the name of {text!r} {tuple(leaf.shape)} is not a matrix's; keep it out with "
            "optax.partition(..., labels), or use the optimizer that splits by itself"
        )
    return MatrixAxes(tuple(range(rank - 2)), (rank - 2,), (rank - 1,))


def every_matrix(tree: Any) -> list[MatrixAxes | None]:
    """:func:`trailing_axes` of every leaf of a tree.

    Args:
        tree: Parameters, gradients or shapes.

    Returns:
        One entry per leaf: the axes, or None.

    Raises:
        ValueError: a leaf of rank >= 2 whose name says norm, bias, scale or embed.

    Example:
        >>> import jax.numpy as jnp
        >>> every_matrix({"v": jnp.ones(2), "w": jnp.ones((2, 3))})
        [None, MatrixAxes(stack=(), fan_in=(0,), fan_out=(1,))]
    """
    return list(_trailing(*outline(tree)))


@once
def _trailing(structure: Any, shapes: Any) -> tuple[MatrixAxes | None, ...]:
    bare = (jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)
    return tuple(map(trailing_axes, paths_of(structure), bare))


def resolve(tree: Any, matrices: Specs = None, layout: str = "in_out") -> list[MatrixAxes | None]:
    """The axes of every leaf of a tree, in the order of ``jax.tree.leaves``.

    Args:
        tree: Parameters, gradients or shapes.
        matrices: The choice of matrices: None for the rules of :func:`matrix_axes`; "all_2d" for
            the rules, with two axes as a matrix if the name of a leaf says nothing (``wq``,
            ``theta``); or a tree (or a prefix of one) of ``optax.contrib.MuonDimensionNumbers``, of
            None for AdamW, and of the words "rules" and "all_2d" for leaves that these decide; or a
            function of the tree that returns one: ``{"encoder": "rules", "classifier": None}``.
        layout: The order of a kernel's axes, as in :func:`matrix_axes`; ``MuonDimensionNumbers`` do
            not depend on it.

    Returns:
        One entry per leaf: the axes, or None.

    Raises:
        ValueError: an ambiguous leaf, an unknown word, or dimension numbers that do not fit one.

    Example:
        >>> import jax.numpy as jnp
        >>> resolve({"theta": jnp.zeros((2, 3))}, "all_2d")
        [MatrixAxes(stack=(), fan_in=(0,), fan_out=(1,))]
    """
    found = []
    for decided in _decide(tree, matrices, layout):
        if isinstance(decided, str):
            raise ValueError(decided)
        found.append(decided[0])
    return found


Decision = tuple[MatrixAxes | None, str] | str
"""The axes of a leaf and the rule, or the message of the error that it raises."""


def _decide(tree: Any, matrices: Specs, layout: str) -> tuple[Decision, ...]:
    """The decision for every leaf, made once for trees of one structure and the same shapes."""
    structure, shapes = outline(tree)
    specs = "rules" if matrices is None else matrices(tree) if callable(matrices) else matrices
    if isinstance(specs, str):
        pairs = [(specs, len(shapes))]
    else:
        counted = jax.tree.map(
            lambda spec, sub: (spec, len(jax.tree.leaves(sub))), specs, tree, is_leaf=_is_spec
        )
        pairs = jax.tree.leaves(counted, is_leaf=lambda x: type(x) is tuple and len(x) == 2)
    for spec, _ in pairs:
        if isinstance(spec, str) and spec not in _WORDS:
            raise ValueError(f"the words that matrices takes are {_WORDS}, got {spec!r}")
    return _placed(structure, shapes, tuple(spec for spec, n in pairs for _ in range(n)), layout)


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, MuonDimensionNumbers)


@once
def _placed(structure: Any, shapes: Any, specs: tuple, layout: str) -> tuple[Decision, ...]:
    leaves = list(zip(paths_of(structure), shapes, strict=True))
    by_rules = place_all(leaves, layout, [spec == "all_2d" for spec in specs])
    return tuple(
        (_from_numbers(text, shape, spec), "as given")
        if not isinstance(spec, str)
        else str(rule)
        if isinstance(rule, ValueError)
        else rule
        for (text, shape), spec, rule in zip(leaves, specs, by_rules, strict=True)
    )


@once
def paths_of(structure: Any) -> tuple[str, ...]:
    """The path of every leaf of a tree, as text.

    Args:
        structure: The structure of the tree, from ``jax.tree.structure``.

    Returns:
        One path a leaf.

    Example:
        >>> paths_of(jax.tree.structure({"layers": [{"q": 0}]}))
        ('layers/0/q',)
    """
    numbered = jax.tree.unflatten(structure, range(structure.num_leaves))
    return tuple(path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(numbered))


def labels(params: Any, *, matrices: Specs = None, layout: str = "in_out") -> Any:
    """The word "muon" or "adamw" for every leaf, ready for ``optax.partition``.

    Args:
        params: The parameters (arrays or shapes).
        matrices: The choice of matrices, as in :func:`resolve`.
        layout: The order of a kernel's axes, as in :func:`matrix_axes`.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: an ambiguous leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> labels({"up": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(4)}})
        {'up': {'bias': 'adamw', 'kernel': 'muon'}}
    """
    found = resolve(params, matrices, layout)
    structure = jax.tree.structure(params)
    return jax.tree.unflatten(structure, ["adamw" if a is None else "muon" for a in found])


def describe(
    params: Any,
    tx: Any = None,
    *,
    matrices: Specs = None,
    layout: str = "in_out",
) -> str:
    """A table of leaf, shape, optimizer and rule, for a person to check before a run.

    Args:
        params: The parameters (arrays or shapes).
        tx: An Optax transformation. The table then shows the state that it stores for each leaf,
            read from shapes (nothing is computed), and the bytes of that state; for ``optim.teon``
            also the blocks that each leaf is grouped with, among the leaves that it is given: a
            frozen or masked leaf leaves the rest of its group ungrouped.
        matrices: The choice of matrices, as in :func:`resolve`.
        layout: The order of a kernel's axes, as in :func:`matrix_axes`.

    Returns:
        One line per leaf. The line of a leaf that no rule places says so; nothing is raised.

    Raises:
        ValueError: ``tx`` itself refuses the parameters.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = {"up": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(4)}}
        >>> print(describe(params))
        leaf       shape  optimizer  rule
        up/bias    (4,)   adamw      a vector
        up/kernel  (2, 4) muon       1 x (2 in, 4 out)
        >>> print(describe(params, optax.adam(1e-3)))
        leaf       shape  optimizer  rule               state
        up/bias    (4,)   adamw      a vector           ScaleByAdamState.mu .nu, 32 bytes
        up/kernel  (2, 4) muon       1 x (2 in, 4 out)  ScaleByAdamState.mu .nu, 64 bytes
    """
    flat = [(path_str(p), tuple(x.shape)) for p, x in jax.tree_util.tree_leaves_with_path(params)]
    rows = [["leaf", "shape", "optimizer", "rule"]]
    for (text, shape), decided in zip(flat, _decide(params, matrices, layout), strict=True):
        if isinstance(decided, str):
            rows.append([text, str(shape), "ambiguous", decided])
            continue
        axes, why = decided
        if axes is not None:
            count, inputs, outputs = axes.sizes(shape)
            why = f"{count} x ({inputs} in, {outputs} out)"
        rows.append([text, str(shape), "adamw" if axes is None else "muon", why])
    if tx is not None:
        kept, groups = _state_of(params, tx)
        for name, cells in (("group", groups), ("state", kept)):
            if name == "group" and not cells:
                continue
            rows[0].append(name)
            for row, (text, _) in zip(rows[1:], flat, strict=True):
                row.append(cells.get(text, "nothing" if name == "state" else "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    gaps = ["  ", " ", *["  "] * len(rows[0])]
    return "\n".join(
        "".join(
            f"{cell:<{width}}{gap}"
            for cell, width, gap in zip(row, [*widths, 0], gaps, strict=False)
        ).rstrip()
        for row in rows
    )


def note(path: str, text: str) -> None:
    """Show a few words about a leaf in the group column of :func:`describe`.

    The ``init`` of a transformation calls this; it does nothing outside ``describe``.

    Args:
        path: The path of the leaf.
        text: A few words.

    Example:
        >>> note("layers/0/q/kernel", "blocks 0+1")
    """
    notes = _notes.get()
    if notes is not None:
        notes[path] = text


def _state_of(params: Any, tx: Any) -> tuple[dict[str, str], dict[str, str]]:
    """For every leaf: the fields of the optimizer's state with arrays at its path, and the
    optimizer's notes."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    notes: dict[str, str] = {}
    token = _notes.set(notes)
    try:
        # A new function every time: JAX does not trace the same one twice for the same shapes.
        state = jax.eval_shape(lambda shapes: tx.init(shapes), shapes)
    finally:
        _notes.reset(token)
    names = [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    fields: dict[str, dict[str, list[str]]] = {}
    sizes: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        text = path_str(path)
        ends = [n for n in names if text == n or text.endswith("/" + n)]
        if not ends:
            continue
        name = max(ends, key=len)
        owner, field = _owner(state, path)
        found = fields.setdefault(name, {}).setdefault(owner, [])
        if field not in found:
            found.append(field)
        sizes[name] = sizes.get(name, 0) + math.prod(leaf.shape) * leaf.dtype.itemsize
    kept_in = {
        name: " ".join(
            f"{owner}{' '.join('.' + field for field in found)}" for owner, found in kept.items()
        )
        + f", {sizes[name]:,} bytes"
        for name, kept in fields.items()
    }
    return kept_in, notes


def _owner(state: Any, path: Any) -> tuple[str, str]:
    """The innermost state NamedTuple on a path, and the field through which the path leaves it."""
    found, node = ("", ""), state
    for key in path:
        if hasattr(key, "name"):
            if found[0] and not hasattr(node, "_fields"):
                break  # inside the parameters' own tree: a module, a variable of nnx
            if type(node).__name__.endswith("State"):
                found = (type(node).__name__, key.name)
            node = getattr(node, key.name)
        else:
            node = node[getattr(key, "key", getattr(key, "idx", None))]
    return found


def _from_numbers(text: str, shape: Any, spec: MuonDimensionNumbers | None) -> MatrixAxes | None:
    if spec is None:
        return None
    rank = len(shape)

    def axes(given) -> tuple[int, ...]:
        given = (given,) if isinstance(given, int) else tuple(given)
        if any(not -rank <= a < rank for a in given):
            raise ValueError(f"{text!r} {shape} has no axes {given} ({spec})")
        return tuple(a % rank for a in given)

    fan_in, fan_out = axes(spec.reduction_axis), axes(spec.output_axis)
    if rank < 2 or not fan_in or not fan_out or len({*fan_in, *fan_out}) < len(fan_in + fan_out):
        raise ValueError(f"{text!r} {shape} is no matrix under {spec}")
    stack = tuple(a for a in range(rank) if a not in fan_in + fan_out)
    return MatrixAxes(stack, fan_in, fan_out)
