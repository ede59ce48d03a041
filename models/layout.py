"""Layout of the parameters of our models on a mesh: one rule a leaf, by its path.

Parameters are split over `fsdp`, and over `tp` along the wide axis of attention and MLP kernels.
Each kind of model has its rules; a learner (`models.learner`) names them.
"""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from jaxlib_unlearn.optim.zeroth_order.perturbations import Factored

# First match wins; the specs name the trailing axes of a leaf, leading (stack) axes are not split.
Rules = tuple[tuple[str, tuple[str | None, ...]], ...]

DECODER: Rules = (
    (r"embed/embedding$", ("tp", "fsdp")),
    (r"positions/embedding$", (None, "fsdp")),  # few rows, of which every device needs most
    (r"lm_head/kernel$", ("fsdp", "tp")),
    (r"attn/(q|k|v)/kernel$", ("fsdp", "tp")),
    (r"attn/o/kernel$", ("tp", "fsdp")),
    (r"mlp/(gate|up)/kernel$", ("fsdp", "tp")),
    (r"mlp/down/kernel$", ("tp", "fsdp")),
    # Adapters of the kernels above: their long axis is split like the kernel's.
    (r"(attn/(q|k|v)|mlp/(gate|up))/lora_a/kernel$", ("fsdp", None)),
    (r"(attn/(q|k|v)|mlp/(gate|up))/lora_b/kernel$", (None, "tp")),
    (r"(attn/o|mlp/down)/lora_a/kernel$", ("tp", None)),
    (r"(attn/o|mlp/down)/lora_b/kernel$", (None, "fsdp")),
    (r"(scale|bias)$", ()),
)


CONVOLUTION = MuonDimensionNumbers((0, 1, 2), (3,))


def path_str(path: Any) -> str:
    """`("layers", "mlp", "up", "kernel")` as `"layers/mlp/up/kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = DECODER) -> P:
    """The partition spec of one parameter; an axis that does not divide evenly is not split.

    The program still divides the work on it, by padding
    (`models.activation_sharding.padded_over_tp`).

    Raises:
        ValueError: no rule matches `path`.
    """
    axes = next((axes for pattern, axes in rules if re.search(pattern, path)), None)
    if axes is None:
        raise ValueError(
            f"no sharding rule matches parameter {path!r}; add one to the rules of its model "
            "(models/layout.py)"
        )
    full = (None,) * (len(shape) - len(axes)) + axes
    return P(
        *(
            a if a and size % mesh.shape[a] == 0 else None
            for a, size in zip(full, shape, strict=True)
        )
    )


def constrain(tree: Any, dtype: Any = None, rules: Rules = DECODER) -> Any:
    """Constrain parameters, or one layer of them, to the layout of the rules on their own mesh.

    It matters in the backward pass: the gradient is constrained as well, so each device gets its
    part of the sum (a reduce-scatter) and not the whole of it (an all-reduce). With `dtype` the
    leaves are cast first, so that communication uses the dtype of the computation.
    """

    def one(path, leaf):
        if isinstance(leaf, Factored):  # its factors are thin
            return leaf._replace(kernel=one(path, leaf.kernel))
        leaf = leaf if dtype is None else leaf.astype(dtype)
        mesh: Any = jax.typeof(leaf).sharding.mesh
        if mesh.empty or mesh.size == 1 or AxisType.Explicit in mesh.axis_types:
            return leaf
        sharding = NamedSharding(mesh, spec_of(path_str(path), leaf.shape, mesh, rules))
        return jax.lax.with_sharding_constraint(leaf, sharding)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda x: isinstance(x, Factored))


def matrices(params: Any) -> Any:
    """Marks the leaves that are matrices, for `matrices=` of the optimizers.

    A convolution's kernel `(k, k, in, out)` is one matrix `(k k in, out)`; the rules of
    `jaxlib_unlearn.optim` place all other leaves: dense kernels are matrices, norms, biases and
    tables are not.

    Args:
        params: a tree of arrays or shapes, of one network or of several.

    Returns:
        The tree with `optax.contrib.MuonDimensionNumbers` or the word "rules" for each leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxlib_unlearn.optim.matrices import describe
        >>> params = {"conv": {"kernel": jnp.zeros((3, 3, 4, 8)), "bias": jnp.zeros(8)}}
        >>> print(describe(params, matrices=matrices))
        leaf         shape        optimizer  rule
        conv/bias    (8,)         adamw      a vector
        conv/kernel  (3, 3, 4, 8) muon       1 x (36 in, 8 out)
    """

    def one(path, leaf):
        kernel = path_str(path).endswith("kernel") and len(leaf.shape) == 4
        return CONVOLUTION if kernel else "rules"

    return jax.tree_util.tree_map_with_path(one, params)
