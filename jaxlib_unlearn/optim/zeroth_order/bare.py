"""The bare directions of the published zeroth-order methods, with the gradient's sign.

``scale_by_x`` takes the arguments of ``x`` except learning rates and decay, and is called as ``x``
is: ``update(None, state, params, value_fn=f)``. Chain it with the learning rate, or with one of
Optax's rules:

    >>> import jax, jax.numpy as jnp, optax
    >>> tx = optax.chain(scale_by_mezo(), optax.scale_by_adam(), optax.scale_by_learning_rate(1e-5))
    >>> params = {"w": jnp.ones((2, 3))}
    >>> def step(params, state):
    ...     return tx.update(None, state, params, value_fn=lambda p: jnp.sum(p["w"]))
    >>> updates, state = jax.jit(step)(params, tx.init(params))
    >>> updates["w"].shape
    (2, 3)
"""

import inspect
from collections.abc import Callable
from typing import Any

import optax

from jaxlib_unlearn.optim.zeroth_order import methods

_OUTSIDE = ("learning_rate", "aux_learning_rate", "weight_decay")


def _bare(method: Callable[..., Any]) -> Callable[..., optax.GradientTransformationExtraArgs]:
    own = inspect.signature(method).parameters
    rates = {name: None for name in ("learning_rate", "aux_learning_rate") if name in own}
    signature = inspect.Signature([p for name, p in own.items() if name not in _OUTSIDE])

    def scale_by(**options: Any) -> optax.GradientTransformationExtraArgs:
        signature.bind(**options)  # a TypeError for what the method does not take
        return method(**rates, **options)

    name = method.__name__
    scale_by.__name__ = scale_by.__qualname__ = f"scale_by_{name}"
    scale_by.__doc__ = f"""The direction of :func:`{name}`: no learning rates, no decay.

    Args:
        {", ".join(signature.parameters)}:
            see :func:`{name}`.

    Returns:
        A transformation; ``update`` takes ``value_fn=`` (see ``zeroth_order``).

    Raises:
        ValueError: a bad argument, or a masked tree.
    """
    scale_by.__signature__ = signature  # type: ignore[attr-defined]
    return scale_by


scale_by_fzoo = _bare(methods.fzoo)
scale_by_hizoo = _bare(methods.hizoo)
scale_by_lozo = _bare(methods.lozo)
scale_by_mezo = _bare(methods.mezo)
scale_by_rada_zo = _bare(methods.rada_zo)
scale_by_rowwise = _bare(methods.rowwise)
scale_by_sparse_mezo = _bare(methods.sparse_mezo)
scale_by_subspace_mezo = _bare(methods.subspace_mezo)
scale_by_subzero = _bare(methods.subzero)
