"""Gradients of a smoothed loss: at the worst nearby point (SAM), or averaged over random ones.

Both need the gradient *function*, ``grad_fn(params) -> tree``, and come in two forms: as a function
that returns the gradient, and as a transformation to chain before an optimizer, which replaces the
incoming updates. In unlearning they smooth the forget loss alone: chain them before a combiner,
``optax.chain(sam(0.01), blur(), optax.adamw(1e-5))`` with ``grad_fn`` of the forget loss; the
constraint gradient is left unchanged.

Perturbations are computed in float32 and rounded to the parameters' dtype: in bfloat16 a
perturbation below 1/256 of a parameter does nothing.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.arrays import concrete, explicit_sharding
from jaxlib_unlearn.optim.draws import normal
from jaxlib_unlearn.optim.matrices import path_str
from jaxlib_unlearn.optim.passing import passing_by

GradFunction = Callable[[Any], Any]


_PURPOSE = zlib.crc32(b"randomised_smoothing")  # no other method draws the same noise


class SamState(NamedTuple):
    """State of SAM: the number of steps and the norm of the last ascent gradient."""

    count: jax.Array  # () int32
    grad_norm: jax.Array  # () float32


class RandomisedSmoothingState(NamedTuple):
    """State of randomised smoothing: the number of steps and the seed of its noise."""

    count: jax.Array  # () int32
    seed: jax.Array  # () uint32


def sam_gradient(
    grad_fn: GradFunction, params: Any, rho: jax.typing.ArrayLike, ascent: Any = None
) -> Any:
    r"""The gradient at the worst point within a distance, to first order.

    .. math::
        g = \nabla \ell \left( \theta + \rho \frac{a}{\|a\|_2} \right), \qquad
        a = \nabla \ell(\theta)

    with one norm over all leaves. If the norm is zero there is no direction, and g is the plain
    gradient.

    Args:
        grad_fn: The gradient of the loss, ``params -> tree`` like ``params``.
        params: The parameters theta.
        rho: The distance; 0 gives the plain gradient.
        ascent: The gradient a, if it is known already (this saves a call of ``grad_fn``).

    Returns:
        The gradient, a tree as ``grad_fn`` returns it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> grad_fn = jax.grad(lambda w: jnp.sum(w**2))
        >>> sam_gradient(grad_fn, jnp.array([3.0, 4.0]), rho=5.0)
        Array([12., 16.], dtype=float32)

    References:
        Foret et al., arXiv:2010.01412; Fan et al., arXiv:2502.05374 (on the forget loss).
    """
    ascent = grad_fn(params) if ascent is None else ascent
    return _at_worst(grad_fn, params, rho, ascent, _norm(ascent))


def sam(rho: jax.typing.ArrayLike = 0.05) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimisation: replaces the updates by the gradient at the perturbed point.

    .. math::
        g = \nabla \ell \left( \theta + \rho \, a / \|a\|_2 \right)

    The call is ``update(updates, state, params, *, grad_fn)``: ``updates`` is the gradient at
    ``params`` and gives the direction of ascent; with None the gradient is computed here. Both ways
    cost two gradients in all.
    ``grad_fn`` must use the batch that ``updates`` was computed on.

    Args:
        rho: The distance in parameter space, one global 2-norm. The default is Foret's; unlearning
            on MUSE and WMDP used 0.01.

    Returns:
        A transformation whose state is a :class:`SamState`.

    Raises:
        ValueError: a negative ``rho``; at ``update``, no params or no ``grad_fn``.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> tx = optax.chain(sam(5.0), optax.sgd(0.1))
        >>> params, grad_fn = jnp.array([3.0, 4.0]), jax.grad(lambda w: jnp.sum(w**2))
        >>> tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]
        Array([-1.2, -1.6], dtype=float32)

    References:
        Foret et al., arXiv:2010.01412; Fan et al., arXiv:2502.05374.
    """
    if isinstance(rho, int | float) and rho < 0:
        raise ValueError(f"rho must not be negative, got {rho}")

    def init(params):
        del params
        return SamState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def update(updates, state, params=None, *, grad_fn=None, **extra_args):
        del extra_args
        grad_fn = _check(grad_fn, params, "sam")
        ascent = grad_fn(params) if updates is None else updates
        norm = _norm(ascent)
        gradient = _at_worst(grad_fn, params, rho, ascent, norm)
        count = jnp.asarray(optax.safe_increment(state.count))
        return optax.tree.cast_like(gradient, ascent), SamState(count, norm.astype(jnp.float32))

    return passing_by(optax.GradientTransformationExtraArgs(init, update))


def smoothed_gradient(
    grad_fn: GradFunction,
    params: Any,
    sigma: jax.typing.ArrayLike,
    num_samples: int,
    *,
    seed: jax.typing.ArrayLike = 0,
    count: jax.typing.ArrayLike = 0,
) -> Any:
    r"""The mean gradient at Gaussian perturbations of the parameters.

    .. math::
        g = \frac{1}{n} \sum_{k=1}^n \nabla \ell(\theta + \sigma z_k), \qquad z_k \sim N(0, I)

    Samples are computed one at a time, so memory holds one gradient and the running mean (float32
    or wider, and exact when all samples agree). Every draw belongs to (seed, count, sample, path of
    the leaf), so it does not depend on the other leaves, on the mesh or on JAX's default generator.

    Args:
        grad_fn: The gradient of the loss, ``params -> tree`` like ``params``.
        params: The parameters theta.
        sigma: The standard deviation of the perturbation; 0 gives the plain gradient.
        num_samples: The number n of random points, static.
        seed: The seed of the noise, uint32.
        count: The number of the step, int32.

    Returns:
        A tree with the dtypes of the gradients that ``grad_fn`` returns.

    Raises:
        ValueError: ``num_samples`` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> grad_fn = jax.grad(lambda w: jnp.sum(w**2))
        >>> smoothed_gradient(grad_fn, jnp.array([1.0, -2.0]), 0.0, 3)
        Array([ 2., -4.], dtype=float32)

    References:
        Fan et al., arXiv:2502.05374 (3 samples, sigma 1e-4 on WMDP).
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples is a positive whole number, got {num_samples!r}")
    step_key = jax.random.key(jnp.asarray(seed, jnp.uint32), impl="threefry2x32")
    for data in (_PURPOSE, count):
        step_key = jax.random.fold_in(step_key, data)

    def perturbed(sample):
        key = jax.random.fold_in(step_key, sample)
        return jax.tree_util.tree_map_with_path(
            lambda path, p: _add(p, sigma, _normal(key, path, p)), params
        )

    def add(mean, sample):
        # In this form the mean of equal gradients is that gradient, to the last bit.
        gradient, share = grad_fn(perturbed(sample)), 1.0 / (sample + 1)
        return jax.tree.map(
            lambda m, g: m + ((g - m) * share).astype(m.dtype), mean, gradient
        ), None

    kinds = jax.eval_shape(grad_fn, params)
    start = jax.tree.map(lambda p, g: jnp.zeros_like(p, dtype=_wide(g)), params, kinds)
    if concrete(params, seed, count, start):
        mean = start
        for sample in range(num_samples):
            mean, _ = add(mean, jnp.int32(sample))
    else:
        mean, _ = jax.lax.scan(add, start, jnp.arange(num_samples))
    return optax.tree.cast_like(mean, kinds)


def randomised_smoothing(
    sigma: jax.typing.ArrayLike = 1e-4, num_samples: int = 3, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Randomised smoothing: replaces the updates by the mean gradient at random nearby points.

    .. math::
        g = \frac{1}{n} \sum_{k=1}^n \nabla \ell(\theta + \sigma z_k), \qquad z_k \sim N(0, I)

    The call is ``update(updates, state, params, *, grad_fn)``; of ``updates``, which may be None,
    only the dtypes are used.

    Args:
        sigma: The standard deviation of the perturbation (WMDP: 1e-4).
        num_samples: The number n of random points, static.
        seed: The seed of the noise, uint32; it is kept in the state.

    Returns:
        A transformation whose state is a :class:`RandomisedSmoothingState`.

    Raises:
        ValueError: a bad argument; at ``update``, no params or no ``grad_fn``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tx, params = randomised_smoothing(0.1), jnp.ones(2)
        >>> grad_fn = jax.grad(jnp.sum)
        >>> tx.update(None, tx.init(params), params, grad_fn=grad_fn)[0]
        Array([1., 1.], dtype=float32)

    References:
        Fan et al., arXiv:2502.05374.
    """
    if isinstance(sigma, int | float) and sigma < 0:
        raise ValueError(f"sigma must not be negative, got {sigma}")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples is a positive whole number, got {num_samples!r}")

    def init(params):
        del params
        return RandomisedSmoothingState(jnp.zeros([], jnp.int32), jnp.array(seed, jnp.uint32))

    def update(updates, state, params=None, *, grad_fn=None, **extra_args):
        del extra_args
        grad_fn = _check(grad_fn, params, "randomised_smoothing")
        gradient = smoothed_gradient(
            grad_fn, params, sigma, num_samples, seed=state.seed, count=state.count
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        gradient = gradient if updates is None else optax.tree.cast_like(gradient, updates)
        return gradient, RandomisedSmoothingState(count, state.seed)

    return passing_by(optax.GradientTransformationExtraArgs(init, update))


def _check(grad_fn: GradFunction | None, params: Any, name: str) -> GradFunction:
    if grad_fn is None:
        raise ValueError(f"{name} needs update(..., grad_fn=f) with f(params) -> gradients")
    if params is None:
        raise ValueError(f"{name} needs update(updates, state, params, ...): params is None")
    return grad_fn


def _at_worst(grad_fn: GradFunction, params: Any, rho: Any, ascent: Any, norm: jax.Array) -> Any:
    scale = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1), 0)
    return grad_fn(jax.tree.map(lambda p, a: _add(p, scale, a), params, ascent))


def _add(p: jax.Array, factor: Any, direction: jax.Array) -> jax.Array:
    wide = _wide(p)
    return (p.astype(wide) + factor * direction.astype(wide)).astype(p.dtype)


def _norm(tree: Any) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(_wide(x)), tree))


def _normal(key: jax.Array, path: Any, p: jax.Array) -> jax.Array:
    key = jax.random.fold_in(key, zlib.crc32(path_str(path).encode()))
    # On Explicit axes a draw has the parameter's sharding; threefry's numbers do not depend on it.
    return normal(key, p.shape, _wide(p), out_sharding=explicit_sharding(p))


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
