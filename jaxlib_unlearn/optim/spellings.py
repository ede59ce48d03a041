"""The spellings of ``optax.contrib.muon``: a TypeError that names the argument here."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_COEFFICIENTS = (
    "orthogonalize",
    "orthogonalize=optim.orthogonalize.newton_schulz(coeffs, steps), or a name: 'polar_express'",
)
_WHOLE = "the optimizer without scale_by_ takes the same objects as matrices="
OURS: dict[str, tuple[tuple[str, str], ...]] = {
    "ns_coeffs": (_COEFFICIENTS,),
    "ns_steps": (_COEFFICIENTS,),
    "eps": (
        ("adam_eps", "adam_eps= for AdamW's leaves; matrices need none, as zeros stay zeros"),
        ("", "none is needed, as zeros stay zeros"),
    ),
    "consistent_rms": (
        ("shape_scale", "shape_scale='match_rms' has the factor 0.2; None there is 'width'"),
    ),
    "adaptive": (
        (
            "orthogonalize",
            "orthogonalize=lambda z: (z * f(z)).sum((-2, -1), keepdims=True) * f(z) with f of "
            "optim.orthogonalize",
        ),
    ),
    "preconditioning": (
        ("orthogonalize", "orthogonalize='aol4' is 'aol', the default 'frobenius'"),
    ),
    "adam_eps_root": (
        ("", "chain your own with optax.partition, optim.matrices.labels and optim.scale_by_muon"),
    ),
    "weight_decay_mask": (("", "it is an argument of the optimizer without scale_by_"),),
    "muon_weight_dimension_numbers": (
        ("matrices", "matrices= takes the same objects"),
        ("", _WHOLE),
    ),
    "weight_dimension_numbers": (("matrices", "matrices= takes the same objects"), ("", _WHOLE)),
}
"""Optax's spellings, each with our arguments for it and words about them ("" for any factory)."""


def with_optax_spellings(factory: Callable[P, R]) -> Callable[P, R]:
    """A factory that raises a TypeError for one of Optax's arguments and names the one here.

    The signature stays the same, for ``optax.inject_hyperparams`` and for readers.

    Args:
        factory: A factory of a transformation.

    Returns:
        The factory, which raises a TypeError for the names in ``OURS`` that it does not have.

    Example:
        >>> with_optax_spellings(lambda learning_rate: None)(0.1, ns_steps=5)
        Traceback (most recent call last):
        ...
        TypeError: <lambda>() has no argument ns_steps...
    """
    own = inspect.signature(factory).parameters

    @functools.wraps(factory)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name in OURS and name not in own:
                ours = [text for argument, text in OURS[name] if not argument or argument in own]
                here = ours[0] if ours else "it has no counterpart here"
                raise TypeError(f"{factory.__name__}() has no argument {name}: {here}")
        return factory(*args, **kwargs)

    return call
