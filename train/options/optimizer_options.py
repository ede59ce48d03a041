"""A row of the optimizers' table: its options and its transformation derive from its factory.

A factory marks the arguments that a command line may set (`jaxlib_unlearn.optim.signatures`). Its
signature gives their defaults and ranges, its docstring their texts.

A row's `needs` is `joint`, one gradient of the weighted sum of the objective's terms; `split`, the
gradients of its forget and of its retain side; `value`, the loss as a function and no gradient;
`lazy`, both as functions.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import optax

from jaxlib_unlearn.optim import signatures
from jaxlib_unlearn.options import option

SCHEDULES = ("constant", "linear", "cosine", "hold")


def _named(name: str) -> Any:
    return option(name, "The optimizer; --list says what each of them does.")


def _rate(default: float) -> Any:
    return option(
        default,
        "The peak of the learning rate. Leaves that AdamW trains beside muon, normuon and teon "
        "follow it too, unless `adam_learning_rate` is given.",
        above=0,
        wanted="positive",
    )


@dataclass(frozen=True)
class Options:
    """The options that all optimizers share; the options of a row are a subclass."""

    name: str = _named("")
    learning_rate: float = _rate(1e-5)
    schedule: str = option(
        "linear",
        "The form of the learning rate: linear and cosine decay to 0, hold is constant for a share "
        "of the steps and then falls in a line to a floor.",
        choices=SCHEDULES,
    )
    warmup: float = option(0.1, "The fraction of the steps of linear warm-up.", low=0, high=1)
    weight_decay: float = option(
        0.0,
        "Decoupled weight decay, not of norms and biases (muon, normuon, teon, sift: of matrices "
        "alone).",
        low=0,
    )
    clip_norm: float | None = option(
        None, "The bound of the global gradient norm; None: no clipping.", low=0
    )
    hold: float = option(
        0.4,
        "The share of the steps after the warm-up before the rate of schedule hold falls.",
        low=0,
        below=1,
    )
    floor: float = option(0.1, "The share of the peak at which schedule hold ends.", low=0, high=1)


SHARED = tuple(field.name for field in dataclasses.fields(Options))


class Words(NamedTuple):
    """An option whose words stand for values of an argument.

    Args:
        default: The word that is used when none is given.
        values: The value of the argument by the word.
        doc: The text of `--help`; "": the text of the argument.
    """

    default: str | None
    values: Mapping[str, Any]
    doc: str = ""

    def value(self, word: str | None) -> Any:
        """The value of the argument; None for no word."""
        return None if word is None else self.values[word]


# Options by the arguments that they set in every row, where the names differ.
SPELLED = {
    "adam_b1": "b1", "adam_b2": "b2", "adam_eps": "eps", "mu_dtype": "state_dtype",
    "num_queries": "queries", "refresh_every": "refresh", "aux_learning_rate": "vector_rate",
}  # fmt: skip
# These rates are peaks, and follow the schedule of the learning rate.
PEAKS = ("adam_learning_rate", "zo_learning_rate")
# A step changes a first moment by 5 to 10 %, and bfloat16 resolves 0.4 % (with a decay of 0.99 it
# would stay up to a fifth below a steady gradient). Second moments stay float32: with b2 0.999 one
# in bfloat16 would never fall, as a change of 0.1 % is rounded away.
STATE = Words(
    "float32",
    {"float32": "float32", "bfloat16": "bfloat16"},
    "The dtype of first moments and momenta: float32, or bfloat16 for half their memory.",
)
SENT = Words(
    "float32",
    {"float32": None, "bfloat16": "bfloat16"},
    "The dtype to which matrices are rounded when they are sent to the devices that orthogonalise "
    "them, and directions on the way back: float32, or bfloat16 for half the bytes and temporary "
    "memory of those collectives. It applies on one device too, so that results do not depend on "
    "the number of devices.",
)


def own_fields(
    factory: Callable[..., Any],
    spelled: Mapping[str, str],
    words: Mapping[str, Words],
    defaults: Mapping[str, Any],
    docs: Mapping[str, str],
) -> dict[str, tuple[str, Any, Any]]:
    """The options of a factory: name, type and field, by the argument that each of them sets.

    Args:
        factory: A function with marked arguments.
        spelled: The names of options, by arguments with another name.
        words: Arguments that are given as words.
        defaults: Defaults that are not the factory's, by option.
        docs: Texts that are not the factory's, by option.

    Example:
        >>> from jaxlib_unlearn import optim
        >>> for found in own_fields(optim.normuon, {"beta2": "decay"}, {}, {}, {}).values():
        ...     print(*found[:2], found[2].default)
        decay <class 'float'> 0.95
    """
    found, texts = {}, signatures.described(factory)
    for name, parameter in inspect.signature(factory, eval_str=True).parameters.items():
        allowed = signatures.allowed(parameter)
        if allowed is None:
            continue
        chosen, given = spelled.get(name, name), words.get(name)
        default = defaults.get(chosen, parameter.default)
        kind = _kind(signatures.plain_type(parameter))
        ranges: dict[str, Any] = allowed._asdict()
        if given is not None:
            kind, default = str, given.default
            ranges = {"choices": tuple(given.values)}
        text = docs.get(chosen) or (given.doc if given else "") or texts[name]
        kind = kind | None if default is None else kind
        found[name] = (chosen, kind, option(default, text, **ranges))
    return found


def _kind(annotation: Any) -> type:
    """The type of the words of a command line that set an argument of this type."""
    kinds = (annotation, *typing.get_args(annotation))
    if float in kinds:  # an array or a number: a number
        return float
    return next(kind for kind in (bool, int, str) if kind in kinds)


def options_type(
    name: str, own: Iterable[tuple[str, Any, Any]], rate: float | None
) -> type[Options]:
    """The dataclass of a row's options: the shared ones, then its own.

    Args:
        name: The name of the row.
        own: The name, type and field of its own options, from `own_fields`.
        rate: The learning rate to start from; None: that of `Options`.
    """
    shared: list[Any] = [("name", str, _named(name))]
    if rate is not None:
        shared.append(("learning_rate", float, _rate(rate)))
    title = name.title().replace("-", "")
    made = dataclasses.make_dataclass(title, [*shared, *own], bases=(Options,), frozen=True)
    made.__module__, made.__doc__ = __name__, f"The options of `{name}`."
    return made


@dataclass(frozen=True)
class Optimizer:
    """A row: the factory of an optimizer, how its arguments are options, and what it needs.

    The options of a row are the arguments that its factory marks, by `own_fields`.

    Args:
        name: The word that is given to `--optimizer.name`.
        factory: A function `(learning_rate, *, ...) -> optax transformation`.
        needs: What the step must pass to the transformation.
        summary: The line of `--list`.
        spelled: The names of options, by arguments with another name, beside `SPELLED`.
        words: Arguments that are given as words.
        defaults: Defaults that are not the factory's, by option.
        docs: Texts that are not the factory's, by option.
        fixed: Arguments that are no options.
        inner: Factories that make the values of arguments; what they mark are options too.
        sides: The loss evaluations per query of a zeroth-order row; 0: it has none.
        parts: Whether its queries are parts of the batch, see `zeroth_order.parts`.
        check_blocks: `check_blocks(options, num_layers)` raises `UserError` for a model that it
            cannot train with these options.
        check_runs: `check_runs(options, runs, num_layers)` raises `UserError` for runs of blocks,
            `(first, last)`, that it cannot train alone.
        check_rank: `check_rank(rank)` raises `UserError` for adapters that it cannot train.
        check_steps: `check_steps(options, steps)` raises `UserError` for a number of steps that it
            cannot take.
        shortened: `shortened(options, steps)` returns the options for a shortened run.
        forwards: `forwards(options, steps)` returns the forward passes that so many steps cost;
            None: each step costs the same (`optimizers.forwards`).
        replays: Whether the update of a `value` row follows from the coefficients of a step alone
            (`train.engine.replays.coefficients`): a step is then two programs, and a stage writes
            `replay.zo`.
        observe: `observe(opt_state) -> {name: array}`, a jittable function of the state of the
            whole transformation (`observations.state_of` finds a part of it). Training writes the
            arrays, of NumPy's own dtypes, after each step to `observed-STAGE/STEP.npz`.
    """

    name: str
    factory: Callable[..., optax.GradientTransformation]
    needs: str
    summary: str
    spelled: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, Words] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    docs: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    inner: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    sides: int = 0
    parts: bool = False
    check_blocks: Callable[[Any, int], None] | None = None
    check_runs: Callable[[Any, list[tuple[int, int]], int], None] | None = None
    check_rank: Callable[[int], None] | None = None
    check_steps: Callable[[Any, int], None] | None = None
    shortened: Callable[[Any, int], Any] | None = None
    forwards: Callable[[Any, int], int] | None = None
    replays: bool = False
    observe: Callable[[Any], dict[str, jax.Array]] | None = None

    @functools.cached_property
    def _words(self) -> Mapping[str, Words]:
        return {"mu_dtype": STATE, "comm_dtype": SENT, **self.words}

    @functools.cached_property
    def _options(self) -> dict[str, dict[str, tuple[str, Any, Any]]]:
        """The options by argument, of the factory ("") and of the inner ones."""
        spelled = SPELLED | dict(self.spelled)
        return {
            place: own_fields(factory, spelled, self._words, self.defaults, self.docs)
            for place, factory in {"": self.factory, **self.inner}.items()
        }

    @functools.cached_property
    def options(self) -> type[Options]:
        """The dataclass of its options."""
        own = [each for entries in self._options.values() for each in entries.values()]
        return options_type(self.name, own, self.defaults.get("learning_rate"))

    @property
    def own(self) -> tuple[str, ...]:
        """The options that not every row has."""
        names = [field.name for field in dataclasses.fields(self.options)]
        return tuple(name for name in names if name not in SHARED)

    @property
    def learning_rate(self) -> float | None:
        """The rate to start from when a preset gives none; None: that of `Options`."""
        default = self.options().learning_rate
        return None if default == Options().learning_rate else default

    def build(
        self, options: Any, schedule: optax.Schedule, axis: str | None = None
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation of checked options.

        Args:
            options: An instance of `self.options`.
            schedule: The learning rate by step.
            axis: The mesh axis that shares the evaluations of zeroth-order steps.
        """
        if self.parts and options.queries is None:
            raise ValueError("queries is None: `optimizers.over_rows` sets it to a batch's rows")
        given: dict[str, Any] = {"weight_decay": options.weight_decay, **self.fixed}
        if self.sides:
            given["query_axis"] = axis
        for place, make in self.inner.items():
            given[place] = make(**self._given(place, options, schedule))
        tx = self.factory(schedule, **given, **self._given("", options, schedule))
        return optax.with_extra_args_support(tx)

    def _given(self, place: str, options: Any, schedule: optax.Schedule) -> dict[str, Any]:
        given = {}
        for argument, (name, _, _) in self._options[place].items():
            value = getattr(options, name)
            if argument in self._words:
                value = self._words[argument].value(value)
            elif argument in PEAKS and value is not None:
                value = _in_proportion(schedule, value / options.learning_rate)
            given[argument] = value
        return given


def _in_proportion(schedule: optax.Schedule, ratio: Any) -> optax.Schedule:
    return lambda count: schedule(count) * ratio
