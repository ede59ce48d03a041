"""What `help` and type checkers see of factories that pass options on."""

import inspect
import re
import typing
from typing import TypedDict, Unpack

import pytest

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim.signatures import spelled_out
from jaxlib_unlearn.optim.spectral.sift_direction import SiftOptions, sift_direction
from jaxlib_unlearn.optim.zeroth_order import zo_muon
from jaxlib_unlearn.optim.zeroth_order.engine import zeroth_order
from jaxlib_unlearn.optim.zeroth_order.options import ZOOptions

WHOLE = [name for name in optim.__all__ if f"scale_by_{name}" in optim.__all__]
PASSED_ON = {
    "zeroth order": (ZOOptions, zeroth_order),
    "zo_muon": (zo_muon._Options, zeroth_order),
    "sift": (SiftOptions, sift_direction),
}


@pytest.mark.parametrize("name", PASSED_ON)
def test_type_checkers_read_what_the_source_declares(name):
    options, source = PASSED_ON[name]
    declared = typing.get_type_hints(source)
    types = typing.get_type_hints(options)
    assert types and types == {name: declared[name] for name in types}


@pytest.mark.parametrize("name", WHOLE)
def test_every_argument_is_documented(name):
    factory = getattr(optim, name)
    doc = inspect.getdoc(factory) or ""
    entries = re.findall(r"^    (\w[\w,\s]*):", doc.split("\nArgs:\n")[1].split("\n\n")[0], re.M)
    described = [argument for entry in entries for argument in re.split(r",\s+", entry)]
    assert sorted(described) == sorted(inspect.signature(factory).parameters)
    sections = re.findall(r"^(Args|Returns|Raises|Example|References):$", doc, re.M)
    assert sections == ["Args", "Returns", "Raises", "Example", "References"]
    assert f"{name}(" in doc.split("\nExample:\n")[1]


NOT_THEIRS = {
    "mezo": (lambda: optim.mezo(0.1, matrices=None), "matrices"),
    "hizoo": (lambda: optim.hizoo(0.1, estimator="jvp"), "estimator"),
    "zo_muon": (lambda: optim.zo_muon(0.1, reshape_core=None), "reshape_core"),
    "scale_by_zo_muon": (lambda: optim.scale_by_zo_muon(weight_decay=0.1), "weight_decay"),
    "sift": (lambda: optim.sift(0.1, find_axes=None), "find_axes"),
    "scale_by_sift": (lambda: optim.scale_by_sift(matrices=None), "matrices"),
}


@pytest.mark.parametrize("name", NOT_THEIRS)
def test_only_chosen_options_are_passed_on(name):
    """What the source has besides is as unknown as any other name."""
    call, argument = NOT_THEIRS[name]
    message = rf"{name}\(\) got an unexpected keyword argument '{argument}'"
    with pytest.raises(TypeError, match=message):
        call()


class Options(TypedDict, total=False):
    eps: float
    seed: int


def source(rate, *, seed: int = 7, unseen: int = 0, eps: float = 0.5):
    return rate, seed, unseen, eps


@pytest.mark.parametrize(
    ("before", "order"),
    [
        (None, ["rate", "own", "last", "seed", "eps"]),
        ("last", ["rate", "own", "seed", "eps", "last"]),
    ],
)
def test_place_order_and_defaults(before, order):
    @spelled_out(source, before)
    def factory(rate, *, own=1, last=2, **options: Unpack[Options]):
        return source(rate, **options), own, last

    parameters = inspect.signature(factory).parameters
    assert list(parameters) == order
    assert [parameters[name].default for name in ("seed", "eps")] == [7, 0.5]
    assert factory(0.1, eps=2.0, last=3) == ((0.1, 7, 0, 2.0), 1, 3)


def test_an_option_that_the_source_lacks_is_refused_at_decoration():
    with pytest.raises(TypeError, match=r"no such options to pass on: \['eps'\]"):

        @spelled_out(lambda rate, *, seed=7: None)
        def factory(rate, **options: Unpack[Options]):
            del rate, options
