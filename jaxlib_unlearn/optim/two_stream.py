r"""Two gradients into one direction: BLUR, PCGrad and the weighted sum.

One protocol for everything that takes two gradients: ``update(primary, state, params=None, *,
constraint_grads)``, where ``constraint_grads`` is a tree like ``primary``. In unlearning the
primary gradient is that of the forget loss, the constraint that of the retain loss. Chain these
before an optimizer: ``optax.chain(blur(), optax.adamw(1e-5))``; what follows receives one gradient,
and every other extra argument. Clip after them, not before: what comes out is what is applied.

Inner products run over *all* leaves at once, in float32 (float64 for float64), stacked into one
vector before they are added up; only scalars cross devices. Average both gradients
over micro-batches (``optim.accumulate``) and replicas first: a mean of projections is not the
projection of the means. ``optax.masked`` needs ``mask_compatible_extra_args=True`` here.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Scalar = jax.typing.ArrayLike

BLUR_STATIC_ARGS = ("lower", "scope")
"""``static_args`` for ``optax.inject_hyperparams(blur, static_args=...)``."""
PCGRAD_STATIC_ARGS = ("scope",)
"""``static_args`` for ``optax.inject_hyperparams(pcgrad, static_args=...)``."""
WEIGHTED_SUM_STATIC_ARGS = ()
"""``static_args`` for ``optax.inject_hyperparams(weighted_sum, static_args=...)``."""


class BlurStats(NamedTuple):
    """What the last step saw; () float32 each (float64 for float64 gradients).

    ``xi`` is the factor of the lower gradient. With ``scope="per_leaf"`` the first three are sums
    over leaves and ``xi`` is the mean weighted by the lower gradient's squared norms.
    """

    dot: jax.Array
    primary_sq: jax.Array
    constraint_sq: jax.Array
    xi: jax.Array


class PcgradStats(NamedTuple):
    """What the last step saw, sums over all leaves; () float32 (float64 for float64)."""

    dot: jax.Array
    primary_sq: jax.Array
    constraint_sq: jax.Array


def blur(
    gamma: Scalar = 1.0,
    *,
    lower: str = "primary",
    constraint_weight: Scalar = 1.0,
    eps: Scalar = 0.0,
    scope: str = "global",
) -> optax.GradientTransformationExtraArgs:
    r"""BLUR: descend the lower loss at a set rate, the upper one orthogonally to it.

    .. math::
        u = g_{up} + \xi g_{low}, \qquad
        \xi = \gamma - \frac{\langle g_{up}, g_{low} \rangle}{\|g_{low}\|^2}
        \qquad\text{so that}\quad \langle u, g_{low} \rangle = \gamma \|g_{low}\|^2

    There is no max(0, .): the part of the upper gradient along the lower one goes even when the two
    agree. Where the lower gradient vanishes, u is the upper gradient. Adam after it keeps neither
    the identity nor the scale: only the ratio of gamma to 1 matters then.

    Args:
        gamma: rate of descent along the lower gradient.
        lower: which gradient has priority: "primary" (BLUR) or "constraint" (roles swapped).
        constraint_weight: alpha, multiplies the constraint gradient first; BLUR-RMU is alpha = 800
            with gamma = 1, the same direction as alpha = 1 with gamma = 1 / alpha.
        eps: the lower gradient counts as zero where its squared norm is at most this.
        scope: "global", one inner product over all leaves, as published; "per_leaf", ours.

    Returns:
        A transformation whose state is the last :class:`BlurStats`.

    Raises:
        ValueError: a bad argument; at ``update``, streams of different structure or shapes.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> forget, retain = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -1.0])}
        >>> tx = optax.chain(blur(), optax.sgd(1.0))
        >>> updates, state = tx.update(forget, tx.init(forget), constraint_grads=retain)
        >>> [round(float(x), 4) for x in updates["w"]], round(float(state[0].xi), 4)
        ([-3.8, -0.6], 0.8)

    References:
        Reisizadeh et al., "BLUR: A bi-level optimization approach for LLM unlearning",
        arXiv:2506.08164, section 3.
    """
    _check_choice("lower", lower, ("primary", "constraint"))
    _check_choice("scope", scope, ("global", "per_leaf"))
    for name, value in (("gamma", gamma), ("eps", eps), ("constraint_weight", constraint_weight)):
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{name} is not negative, got {value}")

    def init(params):
        return BlurStats(*(jnp.zeros([], dot_dtype(params)) for _ in BlurStats._fields))

    def update(updates, state, params=None, *, constraint_grads=None, **extra_args):
        del params, extra_args
        direction, stats = blur_combine(
            updates,
            constraint_grads,
            gamma,
            lower=lower,
            constraint_weight=constraint_weight,
            eps=eps,
            scope=scope,
        )
        return direction, optax.tree.cast_like(stats, state)

    return optax.GradientTransformationExtraArgs(init, update)


def blur_combine(
    primary: Any,
    constraint: Any,
    gamma: Scalar = 1.0,
    *,
    lower: str = "primary",
    constraint_weight: Scalar = 1.0,
    eps: Scalar = 0.0,
    scope: str = "global",
) -> tuple[Any, BlurStats]:
    """The direction of :func:`blur` as a function of two trees.

    Args:
        primary: a tree of gradients.
        constraint: another one, same structure and shapes.
        gamma: rate of descent along the lower gradient.
        lower: "primary" or "constraint".
        constraint_weight: multiplies ``constraint`` first.
        eps: at or below this the lower gradient's squared norm counts as zero.
        scope: "global" or "per_leaf".

    Returns:
        The direction, with the structure and dtypes of ``primary``, and :class:`BlurStats`.

    Raises:
        ValueError: the trees have different structures or shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> g, h = jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0])
        >>> blur_combine(g, h, constraint_weight=2.0)[0].tolist()
        [6.60, -0.80]
    """
    check_streams(primary, constraint)
    table = _inner_products(primary, constraint, constraint_weight)
    dot, primary_sq, constraint_sq = table.sum(axis=0)
    column = 1 if lower == "primary" else 2

    def factor(dots, squares):
        found = squares > eps
        return jnp.where(found, gamma - dots / jnp.where(found, squares, 1), 0)

    lower_sq = (primary_sq, constraint_sq)[column - 1]
    if scope == "per_leaf":
        factors = factor(table[:, 0], table[:, column])
        weighted = (factors * table[:, column]).sum()
        xi = weighted / jnp.where(lower_sq > 0, lower_sq, 1)
    else:
        xi = factor(dot, lower_sq)
        factors = jnp.broadcast_to(xi, table.shape[:1])
    one = jnp.ones_like(factors)
    of_primary, of_constraint = (factors, one) if lower == "primary" else (one, factors)
    direction = _combine(
        primary, constraint, of_primary, jnp.asarray(constraint_weight * of_constraint)
    )
    return direction, BlurStats(dot, primary_sq, constraint_sq, xi)


def pcgrad(
    *, constraint_weight: Scalar = 1.0, scope: str = "global"
) -> optax.GradientTransformationExtraArgs:
    r"""PCGrad for two gradients: if they conflict, each loses its part along the other.

    .. math::
        u = \begin{cases}
        g_p + g_c & \langle g_p, g_c \rangle \ge 0 \\
        \left(g_p - \frac{\langle g_p, g_c \rangle}{\|g_c\|^2} g_c\right) +
        \left(g_c - \frac{\langle g_p, g_c \rangle}{\|g_p\|^2} g_p\right) & \text{otherwise}
        \end{cases}

    Symmetric: both are projected, each against the other's *original*, and added. (With two
    gradients the random order of the paper makes no difference.)

    Args:
        constraint_weight: multiplies the constraint gradient first.
        scope: "global", one inner product over all leaves; "per_leaf", one for every leaf.

    Returns:
        A transformation whose state is the last :class:`PcgradStats`.

    Raises:
        ValueError: a bad argument; at ``update``, streams of different structure or shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> forget, retain = jnp.array([1.0, 0.0]), jnp.array([-1.0, 1.0])
        >>> tx = pcgrad()
        >>> tx.update(forget, tx.init(forget), constraint_grads=retain)[0]
        Array([0.5, 1.5], dtype=float32)

    References:
        Yu et al., "Gradient surgery for multi-task learning", arXiv:2001.06782, algorithm 1.
    """
    _check_choice("scope", scope, ("global", "per_leaf"))
    if isinstance(constraint_weight, int | float) and constraint_weight < 0:
        raise ValueError(f"constraint_weight is not negative, got {constraint_weight}")

    def init(params):
        return PcgradStats(*(jnp.zeros([], dot_dtype(params)) for _ in PcgradStats._fields))

    def update(updates, state, params=None, *, constraint_grads=None, **extra_args):
        del params, extra_args
        check_streams(updates, constraint_grads)
        table = _inner_products(updates, constraint_grads, constraint_weight)
        total = table.sum(axis=0)
        used = table if scope == "per_leaf" else jnp.broadcast_to(total, table.shape)
        dot, primary_sq, constraint_sq = used.T
        conflict = jnp.minimum(dot, 0)

        def kept(squares):
            return 1 - conflict / jnp.where(squares > 0, squares, 1)

        direction = _combine(
            updates,
            constraint_grads,
            kept(primary_sq),
            jnp.asarray(constraint_weight * kept(constraint_sq)),
        )
        return direction, optax.tree.cast_like(PcgradStats(*total), state)

    return optax.GradientTransformationExtraArgs(init, update)


def weighted_sum(weight: Scalar = 1.0) -> optax.GradientTransformationExtraArgs:
    r"""The primary gradient plus a multiple of the constraint gradient: the usual penalty.

    .. math::
        u = g_p + w g_c

    Args:
        weight: w.

    Returns:
        A transformation without state.

    Raises:
        ValueError: at ``update``, streams of different structure or shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = weighted_sum(0.5)
        >>> tx.update(jnp.array([1.0, 2.0]), tx.init(None), constraint_grads=jnp.ones(2))[0]
        Array([1.5, 2.5], dtype=float32)
    """

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, *, constraint_grads=None, **extra_args):
        del params, extra_args
        check_streams(updates, constraint_grads)
        count = len(jax.tree.leaves(updates))
        ones = jnp.ones(count, dot_dtype(updates))
        return _combine(updates, constraint_grads, ones, jnp.asarray(weight * ones)), state

    return optax.GradientTransformationExtraArgs(init, update)


# Pieces that other modules use, too


def check_streams(primary: Any, constraint: Any) -> None:
    """Raises unless the constraint gradient is a tree like the primary one.

    Args:
        primary: a tree of arrays.
        constraint: another one.

    Raises:
        ValueError: no constraint gradient, different structures, or a leaf of another shape (named
            by its path).

    Example:
        >>> import jax.numpy as jnp
        >>> check_streams({"w": jnp.ones(2)}, {"w": jnp.ones(3)})
        Traceback (most recent call last):
        ...
        ValueError: constraint_grads['w'] has shape (3,), the primary gradient (2,)
    """
    structure = jax.tree.structure(primary)
    if constraint is None and primary is not None:
        raise ValueError("two streams are needed: update(..., constraint_grads=tree)")
    if jax.tree.structure(constraint) != structure:
        raise ValueError(
            f"constraint_grads is a tree like the primary gradient ({structure}), got "
            f"{jax.tree.structure(constraint)}"
        )
    for (path, p), c in zip(
        jax.tree_util.tree_leaves_with_path(primary), jax.tree.leaves(constraint), strict=True
    ):
        if jnp.shape(p) != jnp.shape(c):
            raise ValueError(
                f"constraint_grads{jax.tree_util.keystr(path)} has shape {jnp.shape(c)}, the "
                f"primary gradient {jnp.shape(p)}"
            )


def dot_dtype(tree: Any) -> jnp.dtype:
    """The dtype for inner products over a tree: float32, or float64 if a leaf is that wide.

    Args:
        tree: arrays or ``jax.ShapeDtypeStruct``; complex leaves count by their real part.

    Returns:
        A real dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> dot_dtype({"w": jnp.ones(2, jnp.bfloat16)})
        dtype('float32')
    """
    kinds = [jnp.finfo(x.dtype).dtype for x in jax.tree.leaves(tree)]
    return jnp.dtype(functools.reduce(jnp.promote_types, kinds, jnp.dtype(jnp.float32)))


def _inner_products(primary: Any, constraint: Any, weight: Scalar) -> jax.Array:
    """(leaves, 3): dot, squared norm of the primary, of the weighted constraint gradient."""
    dtype = dot_dtype(primary)
    wide = functools.partial(jnp.promote_types, dtype)

    def products(p, c):
        p, c = p.astype(wide(p.dtype)), c.astype(wide(c.dtype))
        parts = jnp.conj(p) * c, jnp.conj(p) * p, jnp.conj(c) * c
        return [jnp.real(jnp.sum(x)).astype(dtype) for x in parts]

    leaves = zip(jax.tree.leaves(primary), jax.tree.leaves(constraint), strict=True)
    rows = [x for p, c in leaves for x in products(p, c)]
    if not rows:
        return jnp.zeros((0, 3), dtype)
    weight = jnp.asarray(weight, dtype)
    return jnp.stack(rows).reshape(-1, 3) * jnp.stack([weight, jnp.ones([], dtype), weight**2])


def _combine(primary: Any, constraint: Any, of_primary: jax.Array, of_constraint: jax.Array) -> Any:
    """``of_primary[i] * p + of_constraint[i] * c`` for leaf i, in the dtype of the primary one."""
    leaves, structure = jax.tree.flatten(primary)
    others = jax.tree.leaves(constraint)
    out = []
    for i, (p, c) in enumerate(zip(leaves, others, strict=True)):
        # Factors are float32 or wider: the sum is rounded to a narrow dtype once, at the end.
        out.append((of_primary[i] * p + of_constraint[i] * c).astype(p.dtype))
    return jax.tree.unflatten(structure, out)


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is one of {known}, got {value!r}")
