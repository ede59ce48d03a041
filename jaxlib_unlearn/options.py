"""Options as frozen dataclasses whose fields carry their documentation, range and choices.

Each method of a choice has its own dataclass, with fields made by :func:`option`. Allowed values,
``--help`` and error messages all derive from the fields::

    @dataclass(frozen=True)
    class NPO:
        beta: float = option(0.1, "inverse temperature.", above=0)

    check(NPO(beta=0.0), "npo: {}".format)  # npo: beta is 0.0; it must be greater than 0

Rules between several fields stay with the method they belong to.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any

from jaxlib_unlearn.errors import UserError

LARGEST = 3.4028234663852886e38  # the largest float32, in which steps are computed
MOST = 2**31 - 1  # the largest int32


def option(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    wanted: str = "",
    choices: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
    none: str = "",
    **more: Any,
) -> Any:
    """A dataclass field with its documentation and allowed values.

    Args:
        default: its default.
        doc: a sentence for ``--help``.
        low: the lowest value.
        high: the highest value; infinity: infinity itself is allowed too.
        above: a bound that values must exceed.
        below: a bound that values must stay under.
        wanted: the allowed values in words, for messages; "": derived from the bounds.
        choices: the allowed words.
        words: words that ``--help`` shows but :func:`check` ignores, for values that combine
            several words or are checked where they are read.
        none: one word for the meaning of None.
        more: further metadata.

    Returns:
        A ``dataclasses.field``.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Mine:
        ...     rank: int = option(8, "of the bases.", low=1)
        >>> check(Mine(rank=0))
        Traceback (most recent call last):
        ...
        jaxlib_unlearn.errors.UserError: rank is 0; it must be at least 1
    """
    metadata = {
        "doc": doc, "low": low, "high": high, "above": above, "below": below, "wanted": wanted,
        "choices": choices, "words": words, "none": none,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata | more)


def is_zero(value: Any) -> bool:
    """Whether an option is the number 0, which leaves a term out; a traced number is not.

    Example:
        >>> is_zero(0.0), is_zero(0.5)
        (True, False)
    """
    return isinstance(value, int | float) and value == 0


def check(options: Any, name: Callable[[str], str] = str) -> None:
    """Check every field of a dataclass against its own metadata.

    Args:
        options: an instance of a dataclass.
        name: the function that gives a field's name in messages.

    Raises:
        UserError: a word that is not a choice, a number out of range, not finite, or too large for
            float32 or int32.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Mine:
        ...     kind: str = option("svd", "of bases.", choices=("svd", "qr"))
        >>> check(Mine("svdd"), "--{}".format)
        Traceback (most recent call last):
        ...
        jaxlib_unlearn.errors.UserError: --kind 'svdd' is unknown; did you mean 'svd'? (svd, qr)
    """
    for field in dataclasses.fields(options):
        check_value(field, getattr(options, field.name), name(field.name))


def check_value(field: dataclasses.Field, value: Any, name: str) -> None:
    """:func:`check` for one field's value; None is left to the field's type."""
    if value is None:
        return
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1, 0.0)[0]
        raise UserError(
            f"{name} {value!r} is unknown; did you mean {near!r}? ({', '.join(choices)})"
        )
    bounds = {k: field.metadata.get(k) for k in ("above", "low", "high", "below")}
    given = {k: v for k, v in bounds.items() if v is not None}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number:
        if "above" in given and not value > given["above"]:
            raise UserError(f"{name} is {value}; it must be {_wanted(field, given)}")
        check_number(value, name, infinite=given.get("high") == math.inf)
    elif given or isinstance(field.default, float):
        raise UserError(f"{name} is {value!r}; it must be {_wanted(field, given)}")
    if not number or not given:
        return
    low, high = given.get("low", -math.inf), given.get("high", math.inf)
    if not low <= value <= high or ("below" in given and not value < given["below"]):
        raise UserError(f"{name} is {value}; it must be {_wanted(field, given)}")


def check_number(value: Any, name: str, infinite: bool = False) -> None:
    """Raise ``UserError`` for a number that neither float32 nor int32 holds.

    Example:
        >>> check_number(float("nan"), "--seed")
        Traceback (most recent call last):
        ...
        jaxlib_unlearn.errors.UserError: --seed is nan; it must be a number that float32 holds
    """
    if isinstance(value, float) and not infinite and not abs(value) <= LARGEST:
        raise UserError(f"{name} is {value}; it must be a number that float32 holds")
    if type(value) is int and abs(value) > MOST:
        raise UserError(f"{name} is {str(value)[:24]}; it must be below 2^31")


def _wanted(field: dataclasses.Field, given: dict[str, float]) -> str:
    """The allowed numbers, in words."""
    if field.metadata.get("wanted"):
        return field.metadata["wanted"]
    if "above" in given:
        return f"greater than {given['above']:g}"
    if "below" in given:
        return f"at least {given['low']:g} and below {given['below']:g}"
    if given.get("high", math.inf) != math.inf:
        return f"from {given['low']:g} to {given['high']:.10g}"
    return f"at least {given['low']:g}" if "low" in given else "a finite number"


def defaults(cls: type) -> dict[str, Any]:
    """The default of every field.

    Example:
        >>> defaults(dataclasses.make_dataclass("Mine", [("rank", int, option(8, "of bases."))]))
        {'rank': 8}
    """
    return {field.name: field.default for field in dataclasses.fields(cls)}


def given(options: Any) -> dict[str, Any]:
    """The fields that are not at their default.

    Example:
        >>> Mine = dataclasses.make_dataclass("Mine", [("rank", int, 8), ("kind", str, "svd")])
        >>> given(Mine(rank=4))
        {'rank': 4}
    """
    return {
        name: value
        for name, default in defaults(type(options)).items()
        if (value := getattr(options, name)) != default
    }


def words_of(field: dataclasses.Field) -> tuple[str, ...]:
    """The words that a field takes or combines; empty if it takes numbers, paths or free text."""
    return tuple(field.metadata.get("choices") or field.metadata.get("words") or ())
