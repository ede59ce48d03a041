"""Factories that pass options on, with all of them in their signatures."""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def spelled_out(
    source: Callable[..., Any], before: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the ``**options`` of a factory are keyword arguments with names and defaults.

    A factory that only passes some options on takes ``**options: Unpack[T]``. The TypedDict T
    chooses them, and type checkers read it. Everyone else (``help``, notebooks,
    ``optax.inject_hyperparams``) sees each option as ``source`` declares it, default included, and
    a name that is not among them is the TypeError of any function.

    Args:
        source: the function that takes the options in the end.
        before: the argument of the factory in front of which they stand; None: behind them all.

    Returns:
        A decorator of factories.

    Raises:
        TypeError: at decoration, an option that ``source`` does not have.

    Example:
        >>> from typing import TypedDict, Unpack
        >>> class Options(TypedDict, total=False):
        ...     eps: float
        >>> def engine(rate, *, family="dense", eps: float = 1e-3, seed: int = 0):
        ...     return rate, family, eps, seed
        >>> @spelled_out(engine)
        ... def method(rate, *, keep=0.5, **options: Unpack[Options]):
        ...     return engine(rate, family=f"sparse {keep}", **options)
        >>> inspect.signature(method)
        <Signature (rate, *, keep=0.5, eps: float = 0.001)>
        >>> method(0.1, eps=0.1)
        (0.1, 'sparse 0.5', 0.1, 0)
        >>> method(0.1, seed=3)
        Traceback (most recent call last):
        ...
        TypeError: method() got an unexpected keyword argument 'seed'
    """

    def decorate(factory: Callable[P, R]) -> Callable[P, R]:
        signature = _spelled_out(inspect.signature(factory), inspect.signature(source), before)
        known = signature.parameters

        @functools.wraps(factory)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in known:
                    raise TypeError(
                        f"{factory.__name__}() got an unexpected keyword argument {name!r}"
                    )
            return factory(*args, **kwargs)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def _spelled_out(
    own: inspect.Signature, source: inspect.Signature, before: str | None
) -> inspect.Signature:
    *parameters, options = own.parameters.values()
    (chosen,) = typing.get_args(options.annotation)
    missing = set(chosen.__annotations__) - set(source.parameters)
    if missing:
        raise TypeError(f"no such options to pass on: {sorted(missing)}")
    added = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in source.parameters.items()
        if name in chosen.__annotations__
    ]
    names = [parameter.name for parameter in parameters]
    at = len(names) if before is None else names.index(before)
    return own.replace(parameters=[*parameters[:at], *added, *parameters[at:]])
