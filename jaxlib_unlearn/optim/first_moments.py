r"""First moments in a narrower dtype than the gradients, without a narrower decay.

A bfloat16 moment times a Python number is computed in bfloat16, so the number is rounded too: 0.9
becomes 0.898, which makes :math:`m \leftarrow \beta m + (1 - \beta) g` settle at 0.985 of the
gradient; 0.99 becomes 0.988 (0.85 of the gradient), and 0.999 becomes 1 (the moment grows without
limit). So moments are widened before use and rounded once, when they are stored.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.passing import passing_by


def widen(moments: Any, gradients: Any) -> Any:
    """Moments in the wider dtype of moment and gradient.

    Args:
        moments: A tree of moments.
        gradients: A tree of gradients of the same structure.

    Returns:
        The moments.

    Example:
        >>> import jax.numpy as jnp
        >>> widen(jnp.ones(2, jnp.bfloat16), jnp.ones(2)).dtype
        dtype('float32')
    """
    return jax.tree.map(
        lambda m, g: m.astype(jnp.promote_types(m.dtype, g.dtype)), moments, gradients
    )


def keep_first_moments(
    tx: optax.GradientTransformation, dtype: jax.typing.DTypeLike | None
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer whose first moments are kept in ``dtype`` and used in float32.

    .. math::
        m_t = \mathrm{round}\left( \beta\, m_{t-1} + (1 - \beta)\, g_t \right)

    The effect is that of ``optax.adamw(..., mu_dtype=dtype)``, but :math:`\beta` stays as given:
    Optax rounds it to ``dtype`` as well. Only fields named ``mu`` are narrowed. Second moments are
    not: a step changes them by less than bfloat16 resolves (0.001 of them at b2 = 0.999).

    Args:
        tx: Any transformation with its moments in NamedTuple fields ``mu``, e.g. ``optax.adamw``.
        dtype: The dtype of the first moments, e.g. ``jnp.bfloat16``; None returns ``tx`` unchanged.

    Returns:
        A transformation with the state of ``tx``; its updates have the gradients' dtypes.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = keep_first_moments(optax.adamw(0.1), jnp.bfloat16)
        >>> state = tx.init(jnp.ones(2))
        >>> state[0].mu.dtype, state[0].nu.dtype
        (dtype(bfloat16), dtype('float32'))
        >>> updates, state = tx.update(jnp.ones(2), state, jnp.ones(2))
        >>> updates.dtype, state[0].mu.dtype
        (dtype('float32'), dtype(bfloat16))
    """
    inner = optax.with_extra_args_support(tx)
    if dtype is None:
        return inner

    def init(params):
        return _at_mu(lambda x: x.astype(dtype), inner.init(params))

    def update(updates, state, params=None, **extra_args):
        wide = _at_mu(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), state)
        new, after = inner.update(updates, wide, params, **extra_args)
        return optax.tree.cast_like(new, updates), optax.tree.cast_like(after, state)

    return passing_by(optax.GradientTransformationExtraArgs(init, update))


def _at_mu(fn: Any, state: Any) -> Any:
    """``fn`` of every array under a field ``mu`` of a state."""

    def one(path, x):
        return fn(x) if any(getattr(key, "name", None) == "mu" for key in path) else x

    return jax.tree_util.tree_map_with_path(one, state)
