"""Optimizers by name: options, schedules, combiners, and which of them go together.

The rows are in `optimizer_rows`, with what each needs from the step. A combiner turns two gradients
into one and fits `joint` rows only.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn import optim, options
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import Objective, coefficient
from train.options.optimizer_options import Options
from train.options.optimizer_rows import OPTIMIZERS
from train.options.rows import Rows
from train.runtime import suggest

COMBINERS: dict[str, Callable[[], optax.GradientTransformationExtraArgs] | None] = {
    "sum": None,
    "blur": optim.blur,
    "pcgrad": optim.pcgrad,
}

SEES = {
    "joint": "one gradient",
    "split": "forget and retain",
    "value": "values only",
    "lazy": "gradient or values",
}


def list_optimizers() -> list[str]:
    """One line per row: name, what a step sees, summary."""
    width = max(map(len, OPTIMIZERS))
    return [
        f"{row.name:{width}}  {SEES[row.needs]:18}  {row.summary}" for row in OPTIMIZERS.values()
    ]


def list_combiners() -> list[str]:
    """One line per combiner, from the first line of its docstring."""
    told = {
        name: "the gradient of the weighted sum" if make is None else _summary(make)
        for name, make in COMBINERS.items()
    }
    return [f"{name:10}  {text}" for name, text in told.items()]


def _summary(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").splitlines()[0].partition(": ")[2].rstrip(".")


def schedule_numbers(config: Options, steps: int) -> dict[str, float]:
    """The numbers of a schedule: its peak, the steps of warm-up, and the steps behind them."""
    warm = min(steps - 1, round(config.warmup * steps)) if steps > 1 else 0
    numbers = {
        "peak": float(config.learning_rate),
        "warm": float(warm),
        "rest": float(max(1, steps - warm)),
    }
    if config.schedule == "hold":
        numbers |= {"hold": config.hold, "floor": config.floor}
    return numbers


def schedule_of(form: str, numbers: Mapping[str, Any]) -> optax.Schedule:
    """A schedule of these numbers, which may be traced.

    Args:
        form: A word of `SCHEDULES`.
        numbers: The result of `schedule_numbers`.

    Example:
        >>> rate = schedule_of("linear", {"peak": 1.0, "warm": 2.0, "rest": 4.0})
        >>> [float(rate(step)) for step in range(7)]
        [0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]
        >>> held = {"peak": 1.0, "warm": 0.0, "rest": 10.0, "hold": 0.5, "floor": 0.25}
        >>> [round(float(schedule_of("hold", held)(step)), 2) for step in (0, 5, 6, 8, 9)]
        [1.0, 1.0, 0.8, 0.4, 0.25]
    """
    peak, warm, rest = (numbers[name] for name in ("peak", "warm", "rest"))
    hold, floor = numbers.get("hold", 0.0), numbers.get("floor", 0.0)

    def rate(count: Any) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        first = peak / jnp.maximum(warm, 1.0)
        rise = (first - peak) * (1 - step / jnp.maximum(warm, 1.0)) + peak
        done = jnp.clip(step - warm, 0.0, rest) / rest
        share = {
            "constant": lambda: 1.0,
            "linear": lambda: 1 - done,
            "cosine": lambda: 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "hold": lambda: jnp.clip((1 - done) / (1 - hold), floor, 1.0),
        }[form]()
        return jnp.where(step < warm, rise, peak * share)

    return rate


def options_of(name: str, /, **given: Any) -> Any:
    """The options of an optimizer by its name: an instance of `OPTIMIZERS[name].options`.

    Args:
        name: The name of a row.
        given: Options of the row; None: the row's default.

    Raises:
        UserError: an unknown name, or an option that the row does not have.

    Example:
        >>> options_of("sift", rank=8).rank
        8
    """
    row = suggest.choose(name, OPTIMIZERS, "optimizer")
    known = {field.name for field in fields(row.options)}
    for option in (given := {k: v for k, v in given.items() if v is not None}):
        if option not in known:
            raise not_read(row, option, given[option])
    return row.options(**given)


def other(config: Options, name: str) -> Any:
    """The options of another optimizer, with the values set in `config` that it has as well.

    Example:
        >>> other(options_of("muon", learning_rate=0.5, momentum=0.9), "adamw").learning_rate
        0.5
    """
    row = suggest.choose(name, OPTIMIZERS, "optimizer")
    known = {field.name for field in fields(row.options)} - {"name"}
    kept = {k: v for k, v in options.given(config).items() if k in known}
    return row.options(**kept)


def not_read(row: Any, option: str, value: Any, prefix: str = "--optimizer.") -> UserError:
    """The error for an option of another row."""
    return UserError(
        f"{prefix}{option.replace('_', '-')} {value}: {row.name} does not read it; "
        f"its own are {', '.join(n.replace('_', '-') for n in row.own)}"
    )


ROWS = Rows(OPTIMIZERS, options_of, other, not_read)


def check(config: Options) -> None:
    """Raise `UserError` for an unknown name, an unknown word, or numbers out of range."""
    row = suggest.choose(config.name, OPTIMIZERS, "optimizer")
    options.check(config, lambda name: f"--optimizer.{name.replace('_', '-')}")
    if config.clip_norm is not None and row.needs in ("value", "lazy"):
        raise UserError(
            f"--optimizer.clip-norm {config.clip_norm}: {config.name} has steps without a gradient "
            "to clip; leave it out"
        )


def over_rows(config: Any, rows: int, what: str = "a") -> Any:
    """The options for batches of so many rows: a row that evaluates parts of them has one a row.

    Args:
        config: The options of an optimizer.
        rows: The number of rows of a global batch.
        what: The name of the batch, for the message.

    Raises:
        UserError: a number of parts that does not divide the rows.

    Example:
        >>> over_rows(options_of("rowwise"), 8).queries
        8
    """
    if not suggest.choose(config.name, OPTIMIZERS, "optimizer").parts:
        return config
    parts = rows if config.queries is None else config.queries
    if parts < 1 or rows % parts:
        raise UserError(
            f"--optimizer.queries {parts}: {what} batch of {rows} rows does not divide into so "
            f"many parts of {config.name}; use a divisor of {rows}, or leave it out for one a row"
        )
    return dataclasses.replace(config, queries=parts)


def in_micro_batches(config: Any, accumulate: int) -> Any:
    """The options for a step in micro-batches: so many fewer parts are evaluated at a time.

    They are those of `over_rows`; an optimizer that evaluates no parts is left as it is, the
    batches of its evaluations are split in the step. Its numbers do not depend on it.

    Example:
        >>> in_micro_batches(over_rows(options_of("rowwise"), 8), 4).query_batch
        2
    """
    row = suggest.choose(config.name, OPTIMIZERS, "optimizer")
    if accumulate == 1 or not row.parts or config.query_batch is not None:
        return config
    return dataclasses.replace(config, query_batch=max(1, config.queries // accumulate))


def check_mesh(config: Options, mesh: Any, rows: int, what: str = "a") -> None:
    """Raise `UserError` for a mesh that does not divide the optimizer's evaluations.

    Args:
        config: The options of an optimizer, as they were given.
        mesh: The devices.
        rows: The number of rows of a global batch, as for `over_rows`.
        what: The name of the batch, for the message.
    """
    config = over_rows(config, rows, what)
    ways = mesh.shape.get("query", 1)
    row = suggest.choose(config.name, OPTIMIZERS, "optimizer")
    for axis in ("data", "fsdp") if row.parts else ():
        if mesh.shape.get(axis, 1) > 1:
            raise UserError(
                f"--mesh.{axis} {mesh.shape[axis]}: {row.name} evaluates rows on their own, which "
                f"cannot be split; let devices share them: --mesh.query {mesh.shape[axis]} "
                f"--mesh.{axis} 1"
            )
    jobs = row.sides * getattr(config, "queries", 0)
    if ways > 1 and not jobs:
        raise UserError(
            f"--mesh.query {ways}: {row.name} has no zeroth-order evaluations to share out; use "
            "--mesh.data or --mesh.fsdp"
        )
    if jobs % ways:
        raise UserError(
            f"--mesh.query {ways}: the {jobs} evaluation(s) of a step of {row.name} do not divide; "
            f"give --optimizer.queries a multiple of {ways // math.gcd(ways, row.sides)}"
        )


def check_pair(config: Options, combine: str, objective: Objective, settings: Any) -> None:
    """Raise `UserError` for an optimizer, a combiner and an objective that do not go together."""
    row = suggest.choose(config.name, OPTIMIZERS, "optimizer")
    needs, sides = row.needs, " and ".join(objective.sides)
    suggest.choose(combine, COMBINERS, "--combine")
    if row.parts and (objective.per_micro_batch or not objective.additive):
        raise UserError(
            f"optimizer {config.name} takes the loss of every part of a batch, and objective "
            f"{objective.name} with this compat form does not add up over rows; use mezo, or drop "
            "compat"
        )
    if combine != "sum" and needs != "joint":
        why = {
            "split": f"takes the gradients of {sides} itself",
            "value": "sees values of the loss alone and has no gradients to combine",
            "lazy": "has steps without a gradient, in which there is nothing to combine",
        }[needs]
        raise UserError(
            f"--combine {combine} does not go with optimizer {config.name}, which {why}; use "
            "--combine sum"
        )
    if (combine != "sum" or needs == "split") and not two_sided(objective, settings):
        what, use = f"optimizer {config.name}", "choose another optimizer or objective"
        if combine != "sum":
            what, use = f"--combine {combine}", "use --combine sum"
        here = f"here has {' and '.join(objective.streams)} alone"
        if zero := " and ".join(_unweighted(objective, settings)):
            here, use = f"here weighs {zero} with 0", f"raise the weight, or {use}"
        elif hasattr(settings, "retain"):
            use = f"set --objective.retain nll, or {use}"
        raise UserError(
            f"{what} needs the gradients of {sides}, and objective {objective.name} {here}; {use}"
        )


def two_sided(objective: Objective, settings: Any) -> bool:
    """Whether the objective's terms have two sides, with its options."""
    if getattr(settings, "retain", "") in (None, "none") or _unweighted(objective, settings):
        return False
    if objective.sides != ("forget", "retain"):
        return True  # the row says so
    return "retain" in objective.streams and len(objective.streams) > 1


def _unweighted(objective: Objective, settings: Any) -> list[str]:
    """The sides whose weight is the number 0; none where a state weighs them, or each term."""
    weights = {field.name for field in fields(settings) if field.name.endswith("_weight")}
    if objective.weigh is not None or not weights <= {f"{side}_weight" for side in objective.sides}:
        return []
    return [side for side in objective.sides if options.is_zero(coefficient(side, settings))]


def check_steps(config: Options, steps: int) -> None:
    """Raise `UserError` for a number of steps that the optimizer cannot take."""
    check_row = OPTIMIZERS[config.name].check_steps
    if check_row is not None:
        check_row(config, steps)


FIRST_ORDER = 3  # a backward pass costs two forward passes


def forwards(config: Options, steps: int) -> int:
    """The forward passes that steps cost: the loss values that the optimizer asks for.

    A first-order step counts as three. A zeroth-order step counts its evaluations; where each query
    is one of them, the loss without a perturbation is one more.

    Example:
        >>> forwards(options_of("adamw"), 10), forwards(options_of("mezo"), 10)
        (30, 20)
        >>> forwards(options_of("zo-muon", queries=4), 10)
        50
    """
    row = OPTIMIZERS[config.name]
    if row.forwards is not None:
        return row.forwards(config, steps)
    if row.needs != "value":
        return FIRST_ORDER * steps
    return steps * (row.sides * getattr(config, "queries", 1) + (row.sides == 1))


def steps_within(config: Options, budget: int) -> int:
    """The most steps that cost at most `budget` forward passes and that the optimizer can take.

    Example:
        >>> steps_within(options_of("zo-muon", queries=4), 40_000)
        8000

    Raises:
        UserError: there is no such step.
    """
    steps = bisect.bisect_right(
        range(1, budget + 1), budget, key=lambda steps: forwards(config, steps)
    )
    while steps and not _taken(config, steps):
        steps -= 1
    if steps:
        return steps
    least = next(n for n in itertools.count(1) if _taken(config, n))
    raise UserError(
        f"{budget} forward passes are too few: the fewest steps that {config.name} can take with "
        f"these options are {least}, which cost {forwards(config, least)}"
    )


def _taken(config: Options, steps: int) -> bool:
    try:
        check_steps(config, steps)
    except UserError:
        return False
    return True


def fitted(config: Options, steps: int) -> Any:
    """The options for a shortened run of `steps`: hybrid's period shrinks with it.

    Example:
        >>> fitted(options_of("hybrid", period=20), 10).period
        5
    """
    shortened = OPTIMIZERS[config.name].shortened
    return config if shortened is None else shortened(config, steps)


def build(
    config: Options, steps: int, combine: str = "sum", axis: str | None = None
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule, str]:
    """The transformation of `config` over `steps`, its schedule, and what the step must pass to it.

    `axis` is the mesh axis over which zeroth-order steps distribute their evaluations.
    """
    check(config)
    suggest.choose(combine, COMBINERS, "--combine")
    return transformation(config, schedule_numbers(config, steps), combine, axis)


def transformation(
    config: Options, numbers: Mapping[str, Any], combine: str = "sum", axis: str | None = None
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule, str]:
    """As `build`, of checked options and of `schedule_numbers`, which may be traced."""
    config = dataclasses.replace(config, learning_rate=numbers["peak"])
    row, schedule = OPTIMIZERS[config.name], schedule_of(config.schedule, numbers)
    more = (axis,) if row.sides else ()
    tx, needs = row.build(config, schedule, *more), row.needs
    make_combiner = COMBINERS[combine]
    if make_combiner is not None:
        tx, needs = optax.chain(make_combiner(), tx), "split"
    if config.clip_norm is not None and needs == "split":
        tx = optim.clip_streams(config.clip_norm, tx)
    elif config.clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    return optax.with_extra_args_support(tx), schedule, needs
