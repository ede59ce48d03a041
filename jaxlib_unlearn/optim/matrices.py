"""Which leaves are matrices, and which of their axes are stack, in and out.

Decided once, by path and rank; every optimizer for matrices asks here. Leaves that are not matrices
(embeddings, heads, norms, biases, scales, routers, short convolutions, vectors) go to AdamW. A leaf
of rank >= 2 that the rules cannot place is an error which names its path: orthogonalising a stack
of biases, or a matrix along the wrong axes, is silent otherwise.

First match wins:

======================================================  ========================================
rank 0 or 1                                             adamw
a component says embed, head, norm, router, conv1d, ..  adamw
the last component says bias, scale, ..                 adamw
``query|key|value/kernel`` with one axis too many       in, (heads, head size) (DenseGeneral)
``attn/out/kernel`` with one axis too many              (heads, head size), out (DenseGeneral)
below ``layers``, ``blocks``, ``experts``, ..           leading stack axes, then in, out
rank 2 and named kernel, weight, w, .. or a bare array  in, out
anything else                                           ValueError
======================================================  ========================================
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from optax.contrib import MuonDimensionNumbers

Specs = Any
"""None, MuonDimensionNumbers (or None, for adamw) per leaf or subtree, or a function of params."""


class MatrixAxes(NamedTuple):
    """A leaf as a stack of matrices: ``x.transpose(stack + fan_in + fan_out)``, then reshape.

    Args:
        stack: axes that count matrices.
        fan_in: axes that together are the input (reduction) dimension.
        fan_out: axes that together are the output dimension.
    """

    stack: tuple[int, ...]
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]

    def sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Number of matrices, inputs and outputs of a leaf of this shape."""
        count, inputs, outputs = (math.prod(shape[a] for a in axes) for axes in self)
        return count, inputs, outputs


# Parameters that are looked up, added, gated or predicted with. Matched against one component of
# the path at a time.
_ADAMW_COMPONENT = re.compile(
    r"embed|norm|router|conv_?1d|rotary|codebook"
    r"|^(wte|wpe|lm_?head|head|unembed|logits|classifier|score|gating|ln(_.*|\d*)|bn\d*|cls"
    r"|gamma|beta)$",
    re.IGNORECASE,
)
_ADAMW_NAME = re.compile(r"(^|_)(bias(es)?|scales?|gains?|temperature|b)$", re.IGNORECASE)
_MATRIX_NAME = re.compile(
    r"(^|_)(kernel|weights?|w|w\d+|matrix|dense|linear|proj|projection|fc\d*)$", re.IGNORECASE
)
_STACK = re.compile(r"^(layers|blocks|stack|scan|experts)$|^scan", re.IGNORECASE)
_DENSE_GENERAL_IN = re.compile(r"^(query|key|value|qkv|q_proj|k_proj|v_proj)$")
_DENSE_GENERAL_OUT = re.compile(r"^(out|out_proj|attn_out)$")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_ROW_PARALLEL = re.compile(r"^(o|out|wo|down|w2|fc2|c_proj|[a-z_]*(o|out|down)_proj)$")
_REFUSED_BARE = re.compile(r"norm|embed", re.IGNORECASE)
_REFUSED_BARE_NAME = re.compile(r"(bias(es)?|scales?)$", re.IGNORECASE)

_LAYOUTS = ("in_out", "out_in")


def path_str(path: Any) -> str:
    """A path as text, e.g. ``layers/attn/q/kernel``; ``nnx.State``'s ending ``/value`` is dropped.

    Args:
        path: a key path of ``jax.tree_util``, or text already.

    Returns:
        The components joined by "/".

    Example:
        >>> path_str("layers/0/kernel/value")
        'layers/0/kernel'
    """
    text = path if isinstance(path, str) else jax.tree_util.keystr(path, simple=True, separator="/")
    return re.sub(r"/(raw_)?value$", "", text)


def matrix_axes(path: Any, leaf: Any, *, layout: str = "in_out") -> MatrixAxes | None:
    """Axes of the matrices in a leaf, or None if AdamW should have it.

    Args:
        path: where the leaf is (text or a key path).
        leaf: an array or anything with a ``shape``.
        layout: "in_out" for kernels ``(..., in, out)``; "out_in" for ``(..., out, in)`` (equinox,
            torch). DenseGeneral kernels are recognised in the first layout only.

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
    return _rule(path_str(path), tuple(leaf.shape), layout)[0]


def trailing_axes(path: Any, leaf: Any) -> MatrixAxes | None:
    """The bare rule of ``scale_by_*``: the last two axes are (in, out), all others are the stack.

    Args:
        path: where the leaf is.
        leaf: anything with a ``shape``.

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
    name = _name(text.split("/"))
    if _REFUSED_BARE.search(text) or _REFUSED_BARE_NAME.search(name):
        raise ValueError(
            f"{text!r} {tuple(leaf.shape)} is no matrix by its name; keep it out with "
            "optax.partition(..., labels), or use the optimizer that splits by itself"
        )
    return MatrixAxes(tuple(range(rank - 2)), (rank - 2,), (rank - 1,))


def resolve(tree: Any, matrices: Specs = None, layout: str = "in_out") -> list[MatrixAxes | None]:
    """Axes of every leaf of a tree, in the order of ``jax.tree.leaves``.

    Args:
        tree: parameters, gradients or shapes.
        matrices: None for the rules of :func:`matrix_axes`; else a tree (or a prefix of one) of
            ``optax.contrib.MuonDimensionNumbers`` with None where AdamW goes, or a function of the
            tree that returns one.
        layout: as in :func:`matrix_axes`; ``MuonDimensionNumbers`` say it themselves.

    Returns:
        One entry a leaf: the axes, or None.

    Raises:
        ValueError: an ambiguous leaf, or dimension numbers that do not fit one.
    """
    flat = jax.tree_util.tree_leaves_with_path(tree)
    if matrices is None:
        return [matrix_axes(path, leaf, layout=layout) for path, leaf in flat]
    specs = matrices(tree) if callable(matrices) else matrices

    def is_spec(x):
        return x is None or isinstance(x, MuonDimensionNumbers)

    counted = jax.tree.map(
        lambda spec, sub: (spec, len(jax.tree.leaves(sub))), specs, tree, is_leaf=is_spec
    )
    spread = []
    for spec, size in jax.tree.leaves(counted, is_leaf=lambda x: type(x) is tuple and len(x) == 2):
        spread += [spec] * size
    return [_from_numbers(path_str(p), x, s) for (p, x), s in zip(flat, spread, strict=True)]


def labels(params: Any, *, matrices: Specs = None, layout: str = "in_out") -> Any:
    """The word "muon" or "adamw" for every leaf, ready for ``optax.partition``.

    Args:
        params: parameters (arrays or shapes).
        matrices: as in :func:`resolve`.
        layout: as in :func:`matrix_axes`.

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


def describe(params: Any, *, matrices: Specs = None, layout: str = "in_out") -> str:
    """A table of leaf, shape, optimizer and rule, for a person to check before a run.

    Args:
        params: parameters (arrays or shapes).
        matrices: as in :func:`resolve`.
        layout: as in :func:`matrix_axes`.

    Returns:
        One line a leaf. Leaves that no rule places say so instead of raising.

    Example:
        >>> import jax.numpy as jnp
        >>> print(describe({"up": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(4)}}))
        leaf       shape  optimizer  rule
        up/bias    (4,)   adamw      a vector
        up/kernel  (2, 4) muon       1 x (2 in, 4 out)
    """
    flat = [(path_str(p), tuple(x.shape)) for p, x in jax.tree_util.tree_leaves_with_path(params)]
    rows = [("leaf", "shape", "optimizer", "rule")]
    given = None if matrices is None else resolve(params, matrices, layout)
    for i, (text, shape) in enumerate(flat):
        try:
            axes, why = (given[i], "as given") if given else _rule(text, shape, layout)
        except ValueError as error:
            rows.append((text, str(shape), "ambiguous", str(error)))
            continue
        if axes is not None:
            count, inputs, outputs = axes.sizes(shape)
            why = f"{count} x ({inputs} in, {outputs} out)"
        rows.append((text, str(shape), "adamw" if axes is None else "muon", why))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(
        f"{leaf:<{widths[0]}}  {shape:<{widths[1]}} {which:<9}  {why}".rstrip()
        for leaf, shape, which, why in rows
    )


def sharding_role(path: Any) -> str:
    """Either "row", for projections back into the residual stream, or "column".

    Tensor parallelism shards the first kind on its input, the second on its output. Where a mesh
    hides the real sharding (Auto axes under ``jit``), this tells apart square matrices that must
    not share a bucket.

    Args:
        path: where the leaf is.

    Returns:
        "row" or "column".

    Example:
        >>> sharding_role("layers/attn/o/kernel"), sharding_role("layers/attn/q/kernel")
        ('row', 'column')
    """
    parts = path_str(path).split("/")
    return "row" if any(_ROW_PARALLEL.match(part) for part in parts[-2:]) else "column"


def _name(parts: list[str]) -> str:
    """The last component that is a name; an item of a list is called after its list."""
    names = [part for part in parts if part and not part.isdigit()]
    return names[-1] if names else ""


def _rule(text: str, shape: tuple[int, ...], layout: str) -> tuple[MatrixAxes | None, str]:
    if layout not in _LAYOUTS:
        raise ValueError(f"layout is one of {_LAYOUTS}, got {layout!r}")
    rank, parts = len(shape), text.split("/")
    name = _name(parts)
    if rank < 2:
        return None, "a vector" if rank else "a scalar"
    for part in parts:
        if _ADAMW_COMPONENT.search(part):
            return None, f"named {part}"
    if _ADAMW_NAME.search(name):
        return None, f"named {name}"

    stack = _stack_depth(parts, rank)
    owner = parts[-2] if len(parts) > 1 else ""
    is_matrix = _MATRIX_NAME.search(name) is not None or not name
    if is_matrix and layout == "in_out" and rank == stack + 3:
        lead = tuple(range(stack))
        if _DENSE_GENERAL_IN.match(owner):
            return MatrixAxes(lead, (stack,), (stack + 1, stack + 2)), "DenseGeneral"
        if _DENSE_GENERAL_OUT.match(owner) and any(_ATTENTION.search(p) for p in parts):
            return MatrixAxes(lead, (stack, stack + 1), (stack + 2,)), "DenseGeneral"
    if is_matrix and rank == stack + 2:
        first, second = (rank - 2,), (rank - 1,)
        fan_in, fan_out = (first, second) if layout == "in_out" else (second, first)
        return MatrixAxes(tuple(range(stack)), fan_in, fan_out), "a matrix"
    raise ValueError(
        f"cannot tell whether {text!r} {shape} holds matrices; say so with matrices=(a tree or a "
        "function of optax.contrib.MuonDimensionNumbers, None for adamw)"
    )


def _stack_depth(parts: list[str], rank: int) -> int:
    """How many leading axes count matrices.

    A container such as ``layers`` adds one axis. Followed by a number it is either a list of
    layers (no axis) or a tuple of consecutive stacks (one axis): the rank tells, except for
    DenseGeneral's kernels, which exist in lists only.
    """
    depth = 0
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        if not _STACK.search(part):
            continue
        if not following.isdigit():
            depth += 1
        elif rank == depth + 3 and not any(
            _DENSE_GENERAL_IN.match(p) or _DENSE_GENERAL_OUT.match(p) for p in parts
        ):
            depth += 1
    return depth


def _from_numbers(text: str, leaf: Any, spec: MuonDimensionNumbers | None) -> MatrixAxes | None:
    if spec is None:
        return None
    rank = len(leaf.shape)

    def axes(given) -> tuple[int, ...]:
        given = (given,) if isinstance(given, int) else tuple(given)
        if any(not -rank <= a < rank for a in given):
            raise ValueError(f"{text!r} {tuple(leaf.shape)} has no axes {given} ({spec})")
        return tuple(a % rank for a in given)

    fan_in, fan_out = axes(spec.reduction_axis), axes(spec.output_axis)
    if rank < 2 or not fan_in or not fan_out or len({*fan_in, *fan_out}) < len(fan_in + fan_out):
        raise ValueError(f"{text!r} {tuple(leaf.shape)} is no matrix under {spec}")
    stack = tuple(a for a in range(rank) if a not in fan_in + fan_out)
    return MatrixAxes(stack, fan_in, fan_out)
