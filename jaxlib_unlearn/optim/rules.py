"""The rules that place a leaf by its path and rank. The first match wins:

======================================================  ========================================
rank 0 or 1                                             adamw
the last component says bias, scale, ..                 adamw
the owner says embed, head, norm, router, conv1d, ..    adamw
``query|key|value/kernel`` with one axis too many       in, (heads, head size) (DenseGeneral)
``attn/out/kernel`` with one axis too many              (heads, head size), out (DenseGeneral)
below ``layers``, ``blocks``, ``experts``, ..           leading stack axes, then in, out
rank 2 and named kernel, weight, w, .. or a bare array  in, out
any other name below embed, head, ..                    adamw
any other name, with ``matrices="all_2d"``              in, out
anything else                                           ValueError
======================================================  ========================================

Components of a path are separated by "/" or ".". The owner is the last named component that is not
``kernel``, ``weight``, ``w`` or ``value``: a dense layer inside ``PreNormBlock_0`` or ``score`` is
a matrix. Three more cases are errors: a matrix below ``head``, ``embed``, ``router`` and the like
(``lm_head/Dense_0/kernel`` may be a hidden layer or the output), an owner that says both
(``embed_proj``), and neighbours in a stack that agree on the second axis but not on the first.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax


class MatrixAxes(NamedTuple):
    """A leaf as a stack of matrices: ``x.transpose(stack + fan_in + fan_out)``, then reshape.

    Args:
        stack: The axes that count matrices.
        fan_in: The axes that together are the input (reduction) dimension.
        fan_out: The axes that together are the output dimension.
    """

    stack: tuple[int, ...]
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]

    def sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The numbers of matrices, inputs and outputs of a leaf of this shape."""
        count, inputs, outputs = (math.prod(shape[a] for a in axes) for axes in self)
        return count, inputs, outputs


# The owners of parameters for lookups, additions, gates or predictions.
_EMBED_OR_NORM = re.compile(r"embed|norms?(_?\d+)?$|(^|_)norm_|normali[sz]ation", re.IGNORECASE)
_ADAMW_OWNER = re.compile(
    r"router|conv_?1d|rotary|codebook|^logits"
    r"|^(wte|wpe|lm_?head|head|unembed|classifier|score|gating|ln(_.*|\d*)|bn\d*|cls"
    r"|gamma|beta)$",
    re.IGNORECASE,
)
# With one of these words at its end, an owner that says embed or norm is ambiguous.
_MATRIX_WORD = re.compile(
    r"(dense|linear|proj|projection|mlp|fc|ffn|attn|attention)(_?\d+)?$", re.IGNORECASE
)
# Containers whose matrices may be embeddings or heads as well as hidden ones.
_ADAMW_ABOVE = re.compile(
    r"^(patch|token|tok|pos|position|word|input|un)?_?embed(s|ders?|dings?)?(_?\d+)?$"
    r"|^(wte|wpe|lm_?head|head|logits|classifier|cls|router|gating|codebook)$",
    re.IGNORECASE,
)
# Below these, a leaf whose rank is not a matrix's (a patch convolution) is not ambiguous.
_ADAMW_ABOVE_OTHERS = re.compile(r"embed|router|conv_?1d|rotary|codebook", re.IGNORECASE)
_ADAMW_NAME = re.compile(r"(^|_)(bias(es)?|scales?|gains?|temperature|b)$", re.IGNORECASE)
_MATRIX_NAME = re.compile(
    r"(^|_)(kernel|weights?|w|w\d+|matrix|dense|linear|proj|projection|fc\d*)$", re.IGNORECASE
)
_OWNED = re.compile(r"^(kernel|weights?|w)$", re.IGNORECASE)
EXPERTS = re.compile(r"experts?$", re.IGNORECASE)
_STACK = re.compile(r"^(layers|blocks|stack|scan|experts)$|^scan", re.IGNORECASE)
_DENSE_GENERAL_IN = re.compile(r"^(query|key|value|qkv|q_proj|k_proj|v_proj)$")
_DENSE_GENERAL_OUT = re.compile(r"^(out|out_proj|attn_out)$")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_ROW_PARALLEL = re.compile(
    r"^(o|out|wo|down|w2|fc2|c_proj|[a-z_]*(o|out|down)_proj"
    r"|to_out_0|net_2|conv2|linear_2)$"  # of diffusion models
)
_ADAPTER = re.compile(r"^lora_[ab]$", re.IGNORECASE)
_REFUSED_BARE_NAME = re.compile(r"(bias(es)?|scales?)$", re.IGNORECASE)

_LAYOUTS = ("in_out", "out_in")


def path_str(path: Any) -> str:
    """A path as text, e.g. ``layers/attn/q/kernel``; ``nnx.State``'s ending ``/value`` is dropped.

    Args:
        path: A key path of ``jax.tree_util``, or text already.

    Returns:
        The components joined by "/".

    Example:
        >>> path_str("layers/0/kernel/value")
        'layers/0/kernel'
    """
    text = path if isinstance(path, str) else jax.tree_util.keystr(path, simple=True, separator="/")
    return re.sub(r"/(raw_)?value$", "", text)


def place(
    text: str, shape: tuple[int, ...], layout: str, all_2d: bool = False
) -> tuple[MatrixAxes | None, str]:
    """The axes of the matrices in a leaf (None for AdamW), and the reason.

    Args:
        text: The path of the leaf.
        shape: The shape of the leaf.
        layout: The order of a kernel's axes, "in_out" or "out_in".
        all_2d: True to treat two axes (after those of stacks) as a matrix if the name says nothing.

    Returns:
        The axes and the rule in words.

    Raises:
        ValueError: no rule places the leaf, or the layout is unknown.

    Example:
        >>> place("up/bias", (4,), "in_out")
        (None, 'a vector')
        >>> place("PreNormBlock_0/Dense_0/kernel", (2, 4), "in_out")[0]
        MatrixAxes(stack=(), fan_in=(0,), fan_out=(1,))
    """
    if layout not in _LAYOUTS:
        raise ValueError(f"layout is one of {_LAYOUTS}, got {layout!r}")
    rank, parts = len(shape), split_path(text)
    name = _name(parts)
    if rank < 2:
        return None, "a vector" if rank else "a scalar"
    if _ADAMW_NAME.search(name) and not _ADAPTER.match(name):
        return None, f"named {name}"

    axes = _axes(parts, rank, layout)
    is_matrix = axes is not None and (_MATRIX_NAME.search(name) is not None or not name)
    at = owner_at(parts)
    owner = parts[at] if at >= 0 else ""
    if _ADAMW_OWNER.search(owner):
        return None, f"named {owner}"
    if _EMBED_OR_NORM.search(owner):
        if is_matrix and _MATRIX_WORD.search(owner):
            raise ValueError(_ambiguous(text, shape, f", as {owner!r} says both"))
        return None, f"named {owner}"
    above = next((part for part in parts[: max(at, 0)] if _ADAMW_ABOVE.search(part)), None)
    if is_matrix:
        if above is not None:
            raise ValueError(_ambiguous(text, shape, f" or, below {above!r}, what adamw takes"))
        return axes, "a matrix"
    if above is None and axes is None:
        above = next(
            (part for part in parts[: max(at, 0)] if _ADAMW_ABOVE_OTHERS.search(part)), None
        )
    if above is not None:
        return None, f"below {above}"
    if axes is not None and all_2d:
        return axes, "two axes"
    raise ValueError(_ambiguous(text, shape, "", axes is not None))


_SPECS = (
    "matrices=(a tree, prefixes allowed, of optax.contrib.MuonDimensionNumbers, None for adamw and "
    "'rules' for what is plain)"
)


def _ambiguous(text: str, shape: tuple[int, ...], why: str, all_2d: bool = False) -> str:
    hint = "matrices='all_2d' (two axes make a matrix where the name says nothing) or " * all_2d
    return f"cannot tell whether {text!r} {shape} holds matrices{why}; say so with {hint}{_SPECS}"


def _axes(parts: list[str], rank: int, layout: str) -> MatrixAxes | None:
    """The axes of a leaf if it holds matrices; None if its rank says that it holds none."""
    stack = stack_depth(parts, rank)
    lead = tuple(range(stack))
    if layout == "in_out" and rank == stack + 3:
        owner = parts[-2] if len(parts) > 1 else ""
        if not _MATRIX_NAME.search(_name(parts)):
            return None
        if _DENSE_GENERAL_IN.match(owner):
            return MatrixAxes(lead, (stack,), (stack + 1, stack + 2))
        if _DENSE_GENERAL_OUT.match(owner) and any(_ATTENTION.search(p) for p in parts):
            return MatrixAxes(lead, (stack, stack + 1), (stack + 2,))
    if rank != stack + 2:
        return None
    first, second = (rank - 2,), (rank - 1,)
    return MatrixAxes(lead, *((first, second) if layout == "in_out" else (second, first)))


def place_all(
    leaves: Sequence[tuple[str, tuple[int, ...]]], layout: str, all_2d: Sequence[bool]
) -> list[tuple[MatrixAxes | None, str] | ValueError]:
    """:func:`place` for all leaves of a tree, with the check that needs their neighbours.

    Args:
        leaves: The path and the shape of every leaf.
        layout: The order of a kernel's axes, as in :func:`place`.
        all_2d: One value of the argument of :func:`place` for every leaf.

    Returns:
        The result of :func:`place` for every leaf, or the error that it raises. Stacked matrices of
        one parent that agree on their second axis but not on the first are an error too: their
        layers are stacked along the second axis (as in MaxText).

    Example:
        >>> maxtext = [("layers/mlp/wi/kernel", (8, 3, 16)), ("layers/mlp/wo/kernel", (16, 3, 8))]
        >>> [type(found).__name__ for found in place_all(maxtext, "in_out", [False] * 2)]
        ['ValueError', 'ValueError']
    """
    found: list[tuple[MatrixAxes | None, str] | ValueError] = []
    siblings: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, (text, shape) in enumerate(leaves):
        try:
            axes, why = place(text, shape, layout, all_2d[i])
        except ValueError as error:
            found.append(error)
            continue
        found.append((axes, why))
        parts = split_path(text)
        stacks = stacks_of(parts, len(shape))
        if axes is not None and stacks and not EXPERTS.search(stacks[0]):
            siblings[tuple(parts[: max(owner_at(parts), 0)])].append(i)
    for members in siblings.values():
        shapes = [leaves[i][1] for i in members]
        if len({shape[0] for shape in shapes}) > 1 and len({shape[1] for shape in shapes}) == 1:
            for i in members:
                found[i] = ValueError(
                    f"{leaves[i][0]!r} {leaves[i][1]} and its neighbours agree on axis 1 and not "
                    "on axis 0, which should count layers; stack along axis 0 (in MaxText "
                    f"param_scan_axis=0), or say so with {_SPECS}"
                )
    return found


def refused_bare(text: str) -> bool:
    """True if a name says that a leaf of rank >= 2 is not a stack of matrices.

    Example:
        >>> refused_bare("layers/norm"), refused_bare("layers/q"), refused_bare("PreNorm_0/w")
        (True, False, True)
        >>> refused_bare("PreNorm_0/Dense_0/kernel"), refused_bare("embed/table")
        (False, True)
    """
    parts = split_path(text)
    at, name = owner_at(parts), _name(parts)
    if _REFUSED_BARE_NAME.search(name):
        return True
    if at < 0:
        return False
    # A name that says nothing, or a bare parameter, takes its meaning from its parent.
    known = _OWNED.match(parts[-1]) or _MATRIX_NAME.search(name)
    near = parts[at : at + 1] if known else parts[max(at - 1, 0) : at + 1]
    return any(_EMBED_OR_NORM.search(part) for part in near)


def sharding_role(path: Any) -> str:
    """Either "row", for projections back into the residual stream, or "column".

    Tensor parallelism shards the first kind on its input, the second on its output. If a mesh hides
    the real sharding (Auto axes under ``jit``), the role separates square matrices that must not
    share a bucket. An adapter has the role of its kernel.

    Args:
        path: The path of the leaf.

    Returns:
        "row" or "column".

    Example:
        >>> sharding_role("layers/attn/o/kernel"), sharding_role("layers/attn/q/kernel")
        ('row', 'column')
        >>> sharding_role("layers/attn/o/lora_a/kernel"), sharding_role("attn2/to_out_0/kernel")
        ('row', 'row')
    """
    parts = [part for part in split_path(path_str(path)) if not _ADAPTER.match(part)]
    return "row" if any(_ROW_PARALLEL.match(part) for part in parts[-2:]) else "column"


def split_path(text: str) -> list[str]:
    """The components of a path as text: "/" and "." (HF names) separate them.

    Example:
        >>> split_path("model.layers.0/q"), split_path("")
        (['model', 'layers', '0', 'q'], [''])
    """
    return re.split(r"[/.]", text)


def owner_at(parts: list[str]) -> int:
    """The index of the part that names a leaf's module or a bare parameter; -1 without one."""
    for i in reversed(range(len(parts))):
        nameless = not parts[i] or parts[i].isdigit()
        if not (nameless or _OWNED.match(parts[i]) or parts[i:] == ["value"]):
            return i
    return -1


def _name(parts: list[str]) -> str:
    """The last component that is a name; an item of a list is named after its list."""
    names = [part for part in parts if part and not part.isdigit()]
    return names[-1] if names else ""


def stack_depth(parts: list[str], rank: int) -> int:
    """The number of leading axes that count matrices.

    A container such as ``layers`` adds one axis. If a number follows, it is either a list of layers
    (no axis) or a tuple of consecutive stacks (one axis): the rank decides, except for
    DenseGeneral's kernels, which exist in lists only.

    Example:
        >>> stack_depth(["layers", "q", "kernel"], 3), stack_depth(["layers", "0", "q"], 2)
        (1, 0)
    """
    return len(stacks_of(parts, rank))


def stacks_of(parts: list[str], rank: int) -> list[str]:
    """The containers that add a leading axis."""
    found: list[str] = []
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        if not _STACK.search(part):
            continue
        if not following.isdigit():
            found.append(part)
        elif rank == len(found) + 3 and not any(
            _DENSE_GENERAL_IN.match(p) or _DENSE_GENERAL_OUT.match(p) for p in parts
        ):
            found.append(part)
    return found
