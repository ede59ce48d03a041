"""AdamW for the leaves that are not matrices, beside Muon, TEON and SIFT for the matrices.

The matrices have a decay and a learning rate of their own; AdamW trains every other leaf.
"""

import dataclasses
from typing import Any

import jax
import optax

from jaxlib_unlearn.optim.first_moments import keep_first_moments
from jaxlib_unlearn.optim.matrices import Specs, labels
from jaxlib_unlearn.optim.passing import passing_by

DecayMask = Any
"""None, a tree of bools like the parameters (or a prefix of one), or a function that returns it."""


@dataclasses.dataclass(frozen=True)
class AdamWRest:
    """The AdamW of the other leaves, from the ``adam_*`` arguments of ``optim.muon`` and its kin.

    Args:
        learning_rate: A number or a schedule; None for the learning rate of the matrices.
        b1: The decay of the first moment.
        b2: The decay of the second moment.
        eps: The epsilon of AdamW.
        weight_decay: The decoupled weight decay.
        mu_dtype: The dtype of the first moment; None for the parameters'.
    """

    learning_rate: optax.ScalarOrSchedule | None
    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    weight_decay: float | jax.Array
    mu_dtype: jax.typing.DTypeLike | None

    def optimizer(
        self, learning_rate: optax.ScalarOrSchedule, mask: DecayMask = None
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation.

        Args:
            learning_rate: The learning rate of the matrices.
            mask: The leaves that decay, as in ``optax.add_decayed_weights``.

        Example:
            >>> import jax.numpy as jnp
            >>> rest = AdamWRest(None, 0.9, 0.999, 1e-8, 0.0, jnp.bfloat16)
            >>> rest.optimizer(0.1).init(jnp.ones(2))[0].mu.dtype
            dtype(bfloat16)
        """
        rate = learning_rate if self.learning_rate is None else self.learning_rate
        adamw = optax.adamw(
            rate, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay, mask=mask
        )
        return keep_first_moments(adamw, self.mu_dtype)


def with_adamw(
    direction: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | jax.Array,
    rest: AdamWRest,
    weight_decay_mask: DecayMask = None,
    matrices: Specs = None,
    layout: str = "in_out",
    before_rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A direction with decay and learning rate for the matrices, AdamW for the rest.

    Args:
        direction: The direction of the matrices. Extra arguments that are trees like the parameters
            (``constraint_grads``) are masked like them.
        learning_rate: The learning rate of the matrices.
        weight_decay: The decoupled weight decay of the matrices.
        rest: The AdamW of the other leaves.
        weight_decay_mask: The leaves that decay, among the matrices and the others.
        matrices: The choice of matrices, as in ``optim.muon``.
        layout: The order of a kernel's axes, "in_out" or "out_in", for the rules.
        before_rest: A transformation of the gradients that AdamW receives.

    Returns:
        A transformation whose updates have the gradients' dtypes; ``optax.partition`` by "muon" and
        "adamw".

    Example:
        >>> import jax.numpy as jnp, optax
        >>> rest = AdamWRest(1e-3, 0.9, 0.999, 1e-8, 0.0, None)
        >>> tx = with_adamw(optax.with_extra_args_support(optax.identity()), 0.1, 0.0, rest)
        >>> sorted(tx.init({"w": jnp.ones((2, 2)), "bias": jnp.ones(2)}).inner_states)
        ['adamw', 'muon']
    """

    def both(tree):
        mask = weight_decay_mask
        if callable(mask):
            # Here it sees all parameters; inside the partition it would see only a part of them.
            # Its result may be callable as well (equinox), so both parts get a function.
            decays = mask(tree)
            mask = lambda _: decays  # noqa: E731
        own = optax.chain(
            direction,
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
        adamw = rest.optimizer(learning_rate, mask)
        if before_rest is not None:
            adamw = optax.chain(before_rest, adamw)
        return optax.partition(
            {"muon": own, "adamw": adamw},
            lambda params: labels(params, matrices=matrices, layout=layout),
            mask_compatible_extra_args=True,
        )

    def init(params):
        return both(params).init(params)

    def update(updates, state, params=None, **extra_args):
        tx = both(updates if params is None else params)
        # AdamW with a wider momentum would widen the updates.
        new, state = tx.update(updates, state, params, **extra_args)
        return optax.tree.cast_like(new, updates), state

    return passing_by(optax.GradientTransformationExtraArgs(init, update))
