"""Signatures as declarations of arguments: their ranges, their texts, and whether they are static.

The signature of an optimizer and the "Args" of its docstring are the only declaration of its
options. ``Annotated[type, Allowed(...)]`` marks an argument that a command line may set.
"""

import functools
import inspect
import re
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


class Allowed(NamedTuple):
    """The values of an argument that a command line may set; the bounds are those of ``option``.

    Args:
        low: The lowest value.
        high: The highest value.
        above: A bound that values must exceed.
        below: A bound that values must stay under.
        wanted: The allowed values in words, for messages; "": derived from the bounds.
        choices: The allowed words.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    wanted: str = ""
    choices: tuple[str, ...] = ()


# With decay 1 a mean never takes up a gradient, and its bias correction divides by 0.
DECAY = Allowed(low=0, below=1)
AT_LEAST_ONE = Allowed(low=1)
POSITIVE = Allowed(above=0, wanted="positive")

Decay = Annotated[jax.typing.ArrayLike, DECAY]
Count = Annotated[int, AT_LEAST_ONE]
# Adam divides 0 by its epsilon where a gradient has always been 0.
Epsilon = Annotated[jax.typing.ArrayLike, Allowed(low=1e-30)]
Dtype = Annotated[jax.typing.DTypeLike | None, Allowed()]
Step = Annotated[jax.typing.ArrayLike, Allowed(low=1e-12)]


def allowed(parameter: inspect.Parameter) -> Allowed | None:
    """The allowed values of an argument; None for one that no command line sets.

    Example:
        >>> def toy(rate, *, rank: Count = 8, seed: int = 0): ...
        >>> [allowed(p) is not None for p in inspect.signature(toy).parameters.values()]
        [False, True, False]
    """
    found = getattr(parameter.annotation, "__metadata__", ())
    return next((each for each in found if isinstance(each, Allowed)), None)


def plain_type(parameter: inspect.Parameter) -> Any:
    """The annotation of an argument without its ``Allowed``."""
    marked = allowed(parameter) is not None
    return parameter.annotation.__origin__ if marked else parameter.annotation


def static_args(factory: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments that ``optax.inject_hyperparams`` must not trace: those that are no arrays.

    Example:
        >>> def toy(rate: jax.Array | float, *, rank: Count = 8, beta: Decay = 0.9): ...
        >>> static_args(toy)
        ('rank',)
    """
    return tuple(
        name
        for name, parameter in inspect.signature(factory, eval_str=True).parameters.items()
        if jax.Array not in typing.get_args(plain_type(parameter))
    )


def described(factory: Callable[..., Any]) -> dict[str, str]:
    """The text of every argument, from "Args" of the docstring; "see :func:`x`" is followed.

    Example:
        >>> described(described)
        {'factory': 'a function with a docstring.'}

    Args:
        factory: a function with a docstring.
    """
    block = (inspect.getdoc(factory) or "").partition("Args:\n")[2].partition("\n\n")[0]
    texts = {}
    for names, text in re.findall(r"^    (\w[\w,\s]*):\s(.*(?:\n {8}.*)*)", block, re.M):
        elsewhere = re.match(r"see :func:`(\w+)`", text.strip())
        for name in re.split(r",\s+", names):
            texts[name] = " ".join(text.split())
            if elsewhere:
                other = inspect.unwrap(factory).__globals__.get(elsewhere[1])
                texts[name] = described(other)[name] if other else texts[name]
    return {name: re.sub(r":func:|`(?=`)|(?<=`)`", "", text) for name, text in texts.items()}


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
