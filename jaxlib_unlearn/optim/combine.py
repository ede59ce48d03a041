r"""Two gradients into one direction: BLUR, PCGrad and the weighted sum.

Everything that takes two gradients has one protocol: ``update(primary, state, params=None, *,
constraint_grads)``, where ``constraint_grads`` is a tree like ``primary``. In unlearning the
primary gradient belongs to the forget loss, the constraint gradient to the retain loss. Chain a
combiner before an optimizer: ``optax.chain(blur(), optax.adamw(1e-5))``; the optimizer receives one
gradient and every other extra argument. Clip after the combiner, not before: its result is applied.

Inner products run over *all* leaves at once, in float32 (float64 for float64), stacked into one
vector before they are added up; only scalars cross devices. Gradients are divided by a power of two
near their largest entry first, so their squares neither overflow nor underflow; the numbers in the
state are clipped to the largest number of their dtype. Average both gradients over micro-batches
(``optim.accumulate``) and replicas first: a mean of projections is not the projection of the means.
``optax.masked`` needs ``mask_compatible_extra_args=True`` here.
"""

import functools
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.passing import passing_by

Scalar = jax.typing.ArrayLike


class BlurStats(NamedTuple):
    """Statistics of the last step, () float32 each (float64 for float64 gradients).

    ``xi`` is the factor of the lower gradient. With ``scope="per_leaf"`` the first three are sums
    over leaves and ``xi`` is the mean weighted by the lower gradient's squared norms.
    """

    dot: jax.Array
    primary_sq: jax.Array
    constraint_sq: jax.Array
    xi: jax.Array


class PcgradStats(NamedTuple):
    """Statistics of the last step, sums over all leaves; () float32 (float64 for float64)."""

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
    r"""BLUR: descend the forget loss at a set rate, the retain loss orthogonally to it.

    .. math::
        u = g_{up} + \xi g_{low}, \qquad
        \xi = \gamma - \frac{\langle g_{up}, g_{low} \rangle}{\|g_{low}\|^2}
        \qquad\text{so that}\quad \langle u, g_{low} \rangle = \gamma \|g_{low}\|^2

    There is no max(0, .): the part of the upper gradient along the lower one is removed even when
    the two agree. If the lower gradient vanishes, u is the upper gradient. Adam after BLUR
    preserves neither this identity nor the scale: then only the ratio of gamma to 1 matters.

    Args:
        gamma: The rate of descent along the lower gradient.
        lower: The gradient that has priority: "primary" (BLUR) or "constraint" (roles swapped).
        constraint_weight: The factor alpha by which the constraint gradient is multiplied first;
            BLUR-RMU is alpha = 800 with gamma = 1, the same direction as alpha = 1 with gamma = 1 /
            alpha.
        eps: The bound of the lower gradient's squared norm: at or below it the gradient counts as
            zero.
        scope: The extent of an inner product: "global", all leaves, as published; "per_leaf", each
            leaf by itself, which is ours.

    Returns:
        A transformation whose state is the last :class:`BlurStats`.

    Raises:
        ValueError: a bad argument; at ``update``, gradients of different structure or shapes.

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
            raise ValueError(f"{name} must not be negative, got {value}")

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
        remember(direction, constraint_grads, _COMBINED.format("blur"))
        return direction, optax.tree.cast_like(stats, state)

    return passing_by(optax.GradientTransformationExtraArgs(init, update))


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
        primary: The primary gradient, a tree.
        constraint: The constraint gradient, a tree of the same structure and shapes.
        gamma: The rate of descent along the lower gradient.
        lower: The gradient that has priority, "primary" or "constraint".
        constraint_weight: The factor by which ``constraint`` is multiplied first.
        eps: The bound of the lower gradient's squared norm: at or below it the gradient counts as
            zero.
        scope: The extent of an inner product, "global" or "per_leaf".

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
    check_unspent(primary, constraint)
    table, powers = _inner_products(primary, constraint, constraint_weight, scope)
    total, column = table.sum(axis=0), 1 if lower == "primary" else 2

    def factor(products, powers):
        squares, power = products[..., column], powers[..., column]
        # Roots: the square itself may be out of range.
        found = (squares > 0) & (_ldexp(jnp.sqrt(squares), power // 2) > jnp.sqrt(eps))
        ratio = products[..., 0] / jnp.where(found, squares, 1)
        return jnp.where(found, gamma - _ldexp(ratio, powers[..., 0] - power), 0)

    if scope == "per_leaf":
        factors = factor(table, powers)
        # Weights by squared norm, relative to the largest power.
        most = jnp.max(powers[:, column], initial=0)
        weights = _ldexp(table[:, column], powers[:, column] - most)
        xi = (factors * weights).sum() / jnp.where(weights.sum() > 0, weights.sum(), 1)
    else:
        xi = factor(total, powers[0] if len(powers) else jnp.zeros(3, jnp.int32))
        factors = jnp.broadcast_to(xi, table.shape[:1])
    one = jnp.ones_like(factors)
    of_primary, of_constraint = (factors, one) if lower == "primary" else (one, factors)
    direction = _combine(
        primary, constraint, of_primary, jnp.asarray(constraint_weight * of_constraint)
    )
    return direction, BlurStats(*_in_range(table, powers), xi)


def pcgrad(
    *, constraint_weight: Scalar = 1.0, scope: str = "global"
) -> optax.GradientTransformationExtraArgs:
    r"""PCGrad: if forget and retain gradients conflict, each loses its part along the other.

    .. math::
        u = \begin{cases}
        g_p + g_c & \langle g_p, g_c \rangle \ge 0 \\
        \left(g_p - \frac{\langle g_p, g_c \rangle}{\|g_c\|^2} g_c\right) +
        \left(g_c - \frac{\langle g_p, g_c \rangle}{\|g_p\|^2} g_p\right) & \text{otherwise}
        \end{cases}

    The rule is symmetric: each gradient is projected against the *original* of the other, and both
    are added. (With two gradients the random order of the paper makes no difference.)

    Args:
        constraint_weight: The factor by which the constraint gradient is multiplied first.
        scope: The extent of an inner product: "global", all leaves; "per_leaf", each leaf by
            itself.

    Returns:
        A transformation whose state is the last :class:`PcgradStats`.

    Raises:
        ValueError: a bad argument; at ``update``, gradients of different structure or shapes.

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
        raise ValueError(f"constraint_weight must not be negative, got {constraint_weight}")

    def init(params):
        return PcgradStats(*(jnp.zeros([], dot_dtype(params)) for _ in PcgradStats._fields))

    def update(updates, state, params=None, *, constraint_grads=None, **extra_args):
        del params, extra_args
        check_streams(updates, constraint_grads)
        check_unspent(updates, constraint_grads)
        table, powers = _inner_products(updates, constraint_grads, constraint_weight, scope)
        used = table if scope == "per_leaf" else jnp.broadcast_to(table.sum(axis=0), table.shape)
        conflict = jnp.minimum(used[:, 0], 0)

        def kept(column):
            squares = used[:, column]
            ratio = conflict / jnp.where(squares > 0, squares, 1)
            return 1 - _ldexp(ratio, powers[:, 0] - powers[:, column])

        direction = _combine(
            updates, constraint_grads, kept(1), jnp.asarray(constraint_weight * kept(2))
        )
        remember(direction, constraint_grads, _COMBINED.format("pcgrad"))
        return direction, optax.tree.cast_like(PcgradStats(*_in_range(table, powers)), state)

    return passing_by(optax.GradientTransformationExtraArgs(init, update))


def weighted_sum(weight: Scalar = 1.0) -> optax.GradientTransformationExtraArgs:
    r"""The primary gradient plus a multiple of the constraint gradient: the usual penalty.

    .. math::
        u = g_p + w g_c

    Args:
        weight: The factor w of the constraint gradient.

    Returns:
        A transformation without state.

    Raises:
        ValueError: at ``update``, gradients of different structure or shapes.

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
        check_unspent(updates, constraint_grads)
        count = len(jax.tree.leaves(updates))
        ones = jnp.ones(count, dot_dtype(updates))
        direction = _combine(updates, constraint_grads, ones, jnp.asarray(weight * ones))
        remember(direction, constraint_grads, _COMBINED.format("weighted_sum"))
        return direction, state

    return passing_by(optax.GradientTransformationExtraArgs(init, update))


# Functions that other modules use as well


def check_streams(primary: Any, constraint: Any) -> None:
    """Raise unless the constraint gradient is a tree like the primary one.

    Args:
        primary: The primary gradient, a tree of arrays.
        constraint: The constraint gradient.

    Raises:
        ValueError: there is no constraint gradient, the structures differ, or a leaf has another
            shape (the message names its path).

    Example:
        >>> import jax.numpy as jnp
        >>> check_streams({"w": jnp.ones(2)}, {"w": jnp.ones(3)})
        Traceback (most recent call last):
        ...
        ValueError: constraint_grads['w'] has shape (3,), the primary gradient (2,)
    """
    structure = jax.tree.structure(primary)
    if constraint is None and primary is not None:
        raise ValueError("the constraint gradient is needed: update(..., constraint_grads=tree)")
    if jax.tree.structure(constraint) != structure:
        raise ValueError(
            f"constraint_grads must be a tree like the primary gradient ({structure}), got "
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


_COMBINED = (
    "{} has made one gradient of the two; chain it before an optimizer that takes one, such as muon"
)
_SPENT: dict[int, tuple[weakref.ref, weakref.ref, str]] = {}


def remember(direction: Any, constraint: Any, why: str) -> None:
    """Record a direction made with a constraint gradient that later links receive unchanged.

    ``optax.chain`` passes the same extra arguments to every link. A later link that takes two
    gradients would count the constraint again, or use it unclipped; there :func:`check_unspent`
    raises.

    Args:
        direction: The direction that the link returns, a tree.
        constraint: The constraint gradient that the link was given, or a tuple of them.
        why: The reason, for the message.

    Example:
        >>> import jax.numpy as jnp
        >>> made, constraint = jnp.ones(2), jnp.ones(2)
        >>> remember(made, constraint, "blur has made one gradient of the two")
        >>> check_unspent(made, constraint)
        Traceback (most recent call last):
        ...
        ValueError: the constraint gradient is lost: blur has made one gradient of the two
    """
    others = jax.tree.leaves(constraint)
    if not others:
        return
    for leaf in jax.tree.leaves(direction):
        number = id(leaf)
        try:
            gone = weakref.ref(leaf, lambda _, number=number: _SPENT.pop(number, None))
            _SPENT[number] = gone, weakref.ref(others[0]), why
        except TypeError:  # a plain number
            pass


def check_unspent(primary: Any, constraint: Any) -> None:
    """Raise if the primary gradient comes from a link that used the same constraint gradient.

    Args:
        primary: The primary gradient, a tree.
        constraint: The constraint gradient, or a tuple of them.

    Raises:
        ValueError: :func:`remember` was called for the two.

    Example:
        >>> import jax.numpy as jnp
        >>> check_unspent(jnp.ones(2), jnp.ones(2))
    """
    others = jax.tree.leaves(constraint)
    for leaf in jax.tree.leaves(primary):
        for made, spent, why in filter(None, [_SPENT.get(id(leaf))]):
            if made() is leaf and others and spent() is others[0]:
                raise ValueError(f"the constraint gradient is lost: {why}")


def dot_dtype(tree: Any) -> jnp.dtype:
    """The dtype for inner products over a tree: float32, or float64 if a leaf is that wide.

    Args:
        tree: A tree of arrays or ``jax.ShapeDtypeStruct``; complex leaves count by their real part.

    Returns:
        A real dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> dot_dtype({"w": jnp.ones(2, jnp.bfloat16)})
        dtype('float32')
    """
    kinds = [jnp.finfo(x.dtype).dtype for x in jax.tree.leaves(tree)]
    return jnp.dtype(functools.reduce(jnp.promote_types, kinds, jnp.dtype(jnp.float32)))


def _inner_products(
    primary: Any, constraint: Any, weight: Scalar, scope: str
) -> tuple[jax.Array, jax.Array]:
    """(leaves, 3): dot, squared norm of the primary, of the weighted constraint gradient.

    An entry is to be multiplied by two to the power in the second table, int32.
    """
    dtype = dot_dtype(primary)
    wide = functools.partial(jnp.promote_types, dtype)
    pairs = [
        [x.astype(wide(x.dtype)) for x in pair]
        for pair in zip(jax.tree.leaves(primary), jax.tree.leaves(constraint), strict=True)
    ]
    if not pairs:
        return jnp.zeros((0, 3), dtype), jnp.zeros((0, 3), jnp.int32)
    largest = jnp.stack([_largest(x).astype(dtype) for pair in pairs for x in pair]).reshape(-1, 2)
    if scope == "global":
        largest = jnp.broadcast_to(jnp.max(largest, axis=0), largest.shape)
    # Powers whose inverse is a normal number; what is left is far from the ends of the range.
    most = -jnp.finfo(dtype).minexp - 26
    power = jnp.clip(jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 1))[1], -most, most)
    shrink = _ldexp(jnp.ones_like(largest), -power)

    def products(p, c):
        parts = jnp.conj(p) * c, jnp.conj(p) * p, jnp.conj(c) * c
        return [jnp.real(jnp.sum(x)).astype(dtype) for x in parts]

    rows = [x for (p, c), (a, b) in zip(pairs, shrink, strict=True) for x in products(a * p, b * c)]
    weight = jnp.asarray(weight, dtype)
    table = jnp.stack(rows).reshape(-1, 3) * jnp.stack([weight, jnp.ones([], dtype), weight**2])
    return table, jnp.stack([power.sum(1), 2 * power[:, 0], 2 * power[:, 1]], axis=1)


def _largest(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return jnp.maximum(_largest(jnp.real(x)), _largest(jnp.imag(x)))
    return jnp.max(jnp.abs(x), initial=0)


def _ldexp(x: jax.Array, power: jax.Array) -> jax.Array:
    """``x 2^power``, in two steps: the power alone may be out of range."""
    half = power // 2
    one = jnp.ones_like(x)
    return x * jnp.ldexp(one, half) * jnp.ldexp(one, power - half)


def _in_range(table: jax.Array, powers: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three sums over leaves; finite ones that are too large become the largest number."""
    largest = jnp.finfo(table.dtype).max
    values = _ldexp(table, powers)
    values = jnp.where(jnp.isfinite(table), jnp.clip(values, -largest, largest), values).sum(axis=0)
    finite = jnp.isfinite(table).all(axis=0)
    dot, primary, constraint = jnp.where(finite, jnp.clip(values, -largest, largest), values)
    return dot, primary, constraint


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
