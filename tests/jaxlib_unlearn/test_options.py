"""Option fields that declare their ranges and choices, and the error messages made of them."""

import dataclasses
import math

import pytest

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import LARGEST, check, defaults, given, option, words_of


@dataclasses.dataclass(frozen=True)
class Mine:
    kind: str = option("svd", "of bases.", choices=("svd", "qr"))
    kinds: str = option("a,b", "some.", words=("a", "b"))
    rate: float = option(0.1, "peak.", above=0, wanted="positive")
    beta: float = option(0.1, "inverse temperature.", above=0)
    decay: float = option(0.9, "of a mean.", low=0, below=1)
    share: float = option(0.5, "of the steps.", low=0, high=1)
    weight: float = option(1.0, "of a side.", low=0, wanted="0 or more")
    delta: float = option(0.0, "margin.")
    seconds: float = option(1.0, "between two.", low=0, high=math.inf)
    rank: int | None = option(None, "of bases.", low=1)
    plain: int = 3
    flag: bool = option(False, "or not.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sdv"}, "--kind 'sdv' is unknown; did you mean 'svd'? (svd, qr)"),
        ({"kind": "zzz"}, "--kind 'zzz' is unknown; did you mean "),
        ({"rate": 0.0}, "--rate is 0.0; it must be positive"),
        ({"rate": math.nan}, "--rate is nan; it must be positive"),
        ({"rate": math.inf}, "--rate is inf; it must be a number that float32 holds"),
        ({"rate": "1"}, "--rate is '1'; it must be positive"),
        ({"beta": -1}, "--beta is -1; it must be greater than 0"),
        ({"decay": 1}, "--decay is 1; it must be at least 0 and below 1"),
        ({"decay": -0.1}, "--decay is -0.1; it must be at least 0 and below 1"),
        ({"decay": math.nan}, "--decay is nan; it must be a number that float32 holds"),
        ({"share": 1.5}, "--share is 1.5; it must be from 0 to 1"),
        ({"weight": -1.0}, "--weight is -1.0; it must be 0 or more"),
        ({"delta": math.nan}, "--delta is nan; it must be a number that float32 holds"),
        ({"delta": 2 * LARGEST}, "it must be a number that float32 holds"),
        ({"delta": "x"}, "--delta is 'x'; it must be a finite number"),
        ({"delta": True}, "--delta is True; it must be a finite number"),
        ({"seconds": -1.0}, "--seconds is -1.0; it must be at least 0"),
        ({"rank": 0}, "--rank is 0; it must be at least 1"),
        ({"rank": 2**31}, "--rank is 2147483648; it must be below 2^31"),
        ({"plain": -(2**31)}, "--plain is -2147483648; it must be below 2^31"),
        ({"plain": 10**99}, f"--plain is {str(10**99)[:24]}; it must be below 2^31"),
    ],
)
def test_what_no_field_may_be_is_one_line(changes, message):
    with pytest.raises(UserError) as error:
        check(Mine(**changes), "--{}".format)
    assert str(error.value).startswith(message) or message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kind": "qr", "kinds": "anything", "rank": 1, "flag": True},
        {"decay": 0, "share": 0, "weight": 0, "seconds": math.inf, "delta": -LARGEST},
        {"share": 1, "rank": 2**31 - 1, "plain": 1 - 2**31, "beta": 1e-30},
    ],
)
def test_what_fields_may_be_passes(changes):
    check(Mine(**changes))


def test_defaults_and_what_was_given():
    assert defaults(Mine)["rate"] == 0.1 and list(defaults(Mine))[0] == "kind"
    assert given(Mine()) == {}
    assert given(Mine(rank=4, beta=0.1, plain=2)) == {"rank": 4, "plain": 2}
    words = {field.name: words_of(field) for field in dataclasses.fields(Mine)}
    assert {name: w for name, w in words.items() if w} == {
        "kind": ("svd", "qr"),
        "kinds": ("a", "b"),
    }
