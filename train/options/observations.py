"""Observations of an optimizer's state: numbers that a row may show of it (`Optimizer.observe`).

They are read from the state after a step, and nothing is kept in a state for them.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax

from jaxlib_unlearn.optim.hybrid import AlternateState
from jaxlib_unlearn.optim.spectral.sift_direction import SiftState
from jaxlib_unlearn.optim.zeroth_order.engine import ZOState
from train.runtime.sharding import path_str

State = TypeVar("State")


def state_of(opt_state: Any, kind: type[State]) -> State:
    """The only state of a kind within that of an optimizer.

    It is found by its type: a tree of parameters in the state may have keys like its fields.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxlib_unlearn import optim
        >>> tx = optim.clip_streams(1.0, optim.alternate(optim.sign_momentum(1.0), optim.mezo(1.0)))
        >>> int(state_of(tx.init({"w": jnp.ones((2, 3))}), AlternateState).count)
        0
    """

    def is_one(x: Any) -> bool:
        return isinstance(x, kind)

    (found,) = filter(is_one, jax.tree.leaves(opt_state, is_leaf=is_one))
    return found


def conflicts(opt_state: Any) -> dict[str, jax.Array]:
    """The cosine of both momenta of every matrix in SIFT's last step, and whether it was fused.

    Returns:
        `cos/PATH` (float32) and `fused/PATH` (bool), shaped like the leaf's stack axes.
    """
    state = state_of(opt_state, SiftState)
    return {
        f"{name}/{path_str(path)}": leaf
        for name in ("cos", "fused")
        for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(state, name))
    }


def coefficients(opt_state: Any) -> dict[str, jax.Array]:
    """The coefficients of the last zeroth-order step, `(q,)`."""
    return {"coefficients": state_of(opt_state, ZOState).coeffs}


def orders(opt_state: Any) -> dict[str, jax.Array]:
    """The steps of each order that a hybrid took, and its last zeroth-order coefficients.

    Returns:
        `first_order_steps` and `zeroth_order_steps`, () int32; `coefficients`, `(q,)`.
    """
    zeroth = state_of(opt_state, ZOState).count
    return {
        "first_order_steps": state_of(opt_state, AlternateState).count - zeroth,
        "zeroth_order_steps": zeroth,
        **coefficients(opt_state),
    }
