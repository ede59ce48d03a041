"""The rules that place a leaf by its path and rank. First match wins:

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

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax


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
_LAYERS = re.compile(r"^(layers|blocks|h|stack)$", re.IGNORECASE)
_STACK = re.compile(r"^(layers|blocks|stack|scan|experts)$|^scan", re.IGNORECASE)
_DENSE_GENERAL_IN = re.compile(r"^(query|key|value|qkv|q_proj|k_proj|v_proj)$")
_DENSE_GENERAL_OUT = re.compile(r"^(out|out_proj|attn_out)$")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_ROW_PARALLEL = re.compile(r"^(o|out|wo|down|w2|fc2|c_proj|[a-z_]*(o|out|down)_proj)$")
_ADAPTER = re.compile(r"^lora_[ab]$", re.IGNORECASE)
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


def place(text: str, shape: tuple[int, ...], layout: str) -> tuple[MatrixAxes | None, str]:
    """Axes of the matrices in a leaf (None: AdamW's), and why.

    Args:
        text: where the leaf is.
        shape: its shape.
        layout: "in_out" or "out_in".

    Returns:
        The axes and the rule in words.

    Raises:
        ValueError: no rule places the leaf, or the layout is unknown.

    Example:
        >>> place("up/bias", (4,), "in_out")
        (None, 'a vector')
    """
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

    stack = stack_depth(parts, rank)
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


def refused_bare(text: str) -> bool:
    """Whether a name says that a leaf of rank >= 2 is no stack of matrices.

    Example:
        >>> refused_bare("layers/norm"), refused_bare("layers/q")
        (True, False)
    """
    name = _name(text.split("/"))
    return bool(_REFUSED_BARE.search(text) or _REFUSED_BARE_NAME.search(name))


def sharding_role(path: Any) -> str:
    """Either "row", for projections back into the residual stream, or "column".

    Tensor parallelism shards the first kind on its input, the second on its output. Where a mesh
    hides the real sharding (Auto axes under ``jit``), this tells apart square matrices that must
    not share a bucket. An adapter has the role of the kernel it stands beside.

    Args:
        path: where the leaf is.

    Returns:
        "row" or "column".

    Example:
        >>> sharding_role("layers/attn/o/kernel"), sharding_role("layers/attn/q/kernel")
        ('row', 'column')
        >>> sharding_role("layers/attn/o/lora_a/kernel")
        'row'
    """
    parts = [part for part in path_str(path).split("/") if not _ADAPTER.match(part)]
    return "row" if any(_ROW_PARALLEL.match(part) for part in parts[-2:]) else "column"


def layer_of(path: Any, stacked: bool) -> tuple[str, int | None] | None:
    """Which projection a leaf is, the same word in every block, and of which block.

    Args:
        path: where the leaf is.
        stacked: whether its first axis counts blocks.

    Returns:
        ``(kind, block)``; block None for a leaf that holds a stack of them (consecutive stacks,
        ``layers/0`` and ``layers/1``, are of one kind). None for a leaf of no block.

    Example:
        >>> layer_of("layers/3/attn/q/kernel", False)
        ('layers/*/attn/q/kernel', 3)
        >>> layer_of("layers/attn/q/kernel", True)
        ('layers/attn/q/kernel', None)
        >>> layer_of("mlp/kernel", False)
    """
    parts = path_str(path).split("/")
    named = [
        i for i, (a, b) in enumerate(itertools.pairwise(parts)) if b.isdigit() and _LAYERS.search(a)
    ]
    numbers = [i + 1 for i in named] or [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return (path_str(path), None) if stacked else None
    at = numbers[0]
    kind = "/".join([*parts[:at], "*", *parts[at + 1 :]])
    return kind, None if stacked else int(parts[at])


def _name(parts: list[str]) -> str:
    """The last component that is a name; an item of a list is called after its list."""
    names = [part for part in parts if part and not part.isdigit()]
    return names[-1] if names else ""


def stack_depth(parts: list[str], rank: int) -> int:
    """How many leading axes count matrices.

    A container such as ``layers`` adds one axis. Followed by a number it is either a list of
    layers (no axis) or a tuple of consecutive stacks (one axis): the rank tells, except for
    DenseGeneral's kernels, which exist in lists only.

    Example:
        >>> stack_depth(["layers", "q", "kernel"], 3), stack_depth(["layers", "0", "q"], 2)
        (1, 0)
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
