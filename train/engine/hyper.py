"""Numbers of a step that are arguments of the compiled program, not constants in it.

The peak of the learning rate, the lengths of its schedule, and the numbers of the objective
(coefficients, beta, temperature, ...) are arrays: stages and runs that differ in them alone share
one compiled step, and `jax.vmap` takes several of them at once. Ranges are checked where options
are parsed. What shapes a program stays in it: ranks, periods, dtypes, and whether a term is there
at all (a weight of 0 leaves it out).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.objectives import Objective
from models.learner import Learner
from train.engine.step import ALL, Batches, Binding, TrainState, key_of, make_step
from train.options import optimizers

Hyper = Mapping[str, Any]


def traced_fields(options: Any) -> tuple[str, ...]:
    """The fields of an objective's options that are arguments: numbers other than 0.

    Example:
        >>> from jaxlib_unlearn.objectives import options_of
        >>> traced_fields(options_of("asu", retain="nll"))
        ('forget_weight', 'retain_weight', 'temperature', 'beta', 'delta')
    """
    types = typing.get_type_hints(type(options))
    return tuple(
        field.name
        for field in dataclasses.fields(options)
        if types[field.name] is float and getattr(options, field.name) != 0
    )


def hyper_of(
    options: Any,
    optimizer: optimizers.Options,
    steps: int,
    seed: int = 0,
    epoch_steps: float | None = None,
) -> Hyper:
    """The numbers of a stage, as scalars on the host.

    Args:
        options: the checked options of the objective.
        optimizer: its options, checked.
        steps: the number of steps of the stage.
        seed: the seed from which the objective draws.
        epoch_steps: the number of steps of an epoch; None: the stage is one.
    """
    dtype = jnp.result_type(float)
    numbers = {
        "objective": {name: getattr(options, name) for name in traced_fields(options)},
        "schedule": optimizers.schedule_numbers(optimizer, steps),
        "length": {"steps": steps, "epoch_steps": steps if epoch_steps is None else epoch_steps},
    }
    found = jax.tree.map(lambda x: np.asarray(x, dtype), numbers)
    return found | {"seed": np.asarray(divmod(seed, 2**32), np.uint32)}


def resolved(options: Any, hyper: Hyper) -> Any:
    """The options of the objective, its numbers taken from `hyper`."""
    return dataclasses.replace(options, **hyper["objective"])


def static_of(options: Any, optimizer: optimizers.Options) -> tuple[Any, Any]:
    """The options without their numbers, which are equal for stages that share a program."""
    nothing = dict.fromkeys(traced_fields(options))
    # The warm-up is a number of steps, which is an argument.
    rest = dataclasses.replace(optimizer, learning_rate=0.0, warmup=0.0)
    return dataclasses.replace(options, **nothing), rest


def traced_step(
    learner: Learner,
    objective: Objective,
    options: Any,
    optimizer: optimizers.Options,
    combine: str = "sum",
    axis: str | None = None,
    accumulate: int = 1,
    binding: Binding = ALL,
) -> Callable[[TrainState, Hyper, Any, Batches], tuple[TrainState, dict[str, jax.Array]]]:
    """The un-jitted step `(state, hyper, frozen, batches) -> (state, metrics)`.

    Args:
        learner: the kind of model.
        objective: the row of the objective.
        options: its options; `hyper` replaces those that it holds.
        optimizer: the optimizer and its options; `hyper` gives its learning rate.
        combine: the rule that makes one gradient of those of the two sides.
        axis: the mesh axis over which zeroth-order steps share their evaluations.
        accumulate: the number of micro-batches.
        binding: the functions that form models of the trained tree and the frozen arrays.
    """

    def step(state: TrainState, hyper: Hyper, frozen: Any, batches: Batches):
        given = resolved(options, hyper)
        tx, schedule, needs = optimizers.transformation(optimizer, hyper["schedule"], combine, axis)
        one = make_step(
            learner, objective, given, tx, schedule, accumulate, needs, binding,
            key_of(*hyper["seed"]), hyper["length"],
        )  # fmt: skip
        return one(state, frozen, batches)

    return step
