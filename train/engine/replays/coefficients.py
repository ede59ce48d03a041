"""A zeroth-order step as two programs: `evaluate`, and `apply`, which replays a step as well.

`evaluate` turns losses into coefficients, one a query; `apply` draws the directions again and takes
the step. All that a model learnt in a step is in the coefficients. A replay that runs the same
`apply` on the same parameters ends with the same bits; in one program the update would be compiled
together with the loss, and a replay without the loss would differ in the last bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.objectives import Objective
from jaxlib_unlearn.optim.zeroth_order.engine import ZOState
from models.learner import Learner
from train.engine.hyper import Hyper, resolved
from train.engine.step import (
    ALL,
    OPTIMIZER_SCOPE,
    Batches,
    Binding,
    Losses,
    TrainState,
    advanced,
    key_of,
    value_functions,
)
from train.options import observations
from train.options.optimizers import OPTIMIZERS, Options, transformation
from train.runtime.compiling import compiled
from train.runtime.sharding import batch_sharding

NOTHING: Any = None  # takes the place of a gradient


def seed_of_draws(seed: int) -> int:
    """A stage's seed in the 32 bits of an optimizer's: a multiple of 2**32 does not vanish.

    Example:
        >>> len({seed_of_draws(run * 2**32 + stage) for run in range(4) for stage in range(4)})
        16
    """
    return zlib.crc32(str(seed).encode())


class Evaluated(NamedTuple):
    """The results of an evaluation.

    Args:
        coeffs: `(q,)` float32, the coefficients of the step's directions.
        value: () the loss.
        step: () int32, the number of the next step.
        objective: the objective's state after the step.
        metrics: the numbers for the log.
    """

    coeffs: jax.Array
    value: jax.Array
    step: jax.Array
    objective: Any
    metrics: dict[str, jax.Array]


Evaluate = Callable[[TrainState, Hyper, Any, Batches], Evaluated]
Apply = Callable[[Any, Any, Mapping[str, Any], jax.Array], tuple[Any, Any, dict[str, jax.Array]]]


def replays(optimizer: Options) -> bool:
    """Whether the coefficients of a step are all that its update needs."""
    return OPTIMIZERS[optimizer.name].replays


def _is_state(x: Any) -> bool:
    return isinstance(x, ZOState)


def state_of(opt_state: Any) -> ZOState:
    """The state of the zeroth-order steps in that of an optimizer."""
    return observations.state_of(opt_state, ZOState)


def with_state(opt_state: Any, **fields: Any) -> Any:
    """The state of an optimizer with other fields of its zeroth-order state."""
    return jax.tree.map(
        lambda x: x._replace(**fields) if _is_state(x) else x, opt_state, is_leaf=_is_state
    )


def make_evaluate(
    learner: Learner,
    objective: Objective,
    options: Any,
    optimizer: Options,
    axis: str | None = None,
    accumulate: int = 1,
    binding: Binding = ALL,
) -> Evaluate:
    """The un-jitted `(state, hyper, frozen, batches) -> Evaluated`; see `hyper.traced_step`."""

    def evaluate(state: TrainState, hyper: Hyper, frozen: Any, batches: Batches) -> Evaluated:
        tx, schedule, _ = transformation(optimizer, hyper["schedule"], axis=axis)
        losses = Losses(
            learner,
            objective,
            resolved(options, hyper),
            state.params,
            frozen,
            batches,
            accumulate,
            binding,
            key=key_of(*hyper["seed"]),
            step=state.step,
            state=state.objective,
        )
        metrics = losses.look(state.params)
        extra = value_functions(learner, losses, metrics)
        with jax.named_scope(OPTIMIZER_SCOPE):
            # The update is not used here, so the compiler leaves it out.
            _, after = tx.update(NOTHING, state.opt_state, state.params, **extra)
        found = state_of(after).coeffs
        memory = advanced(
            objective, resolved(options, hyper), state, losses, metrics, hyper["length"]
        )
        metrics |= {"lr": jnp.asarray(schedule(state.step))}
        return Evaluated(found, metrics["loss"], state.step + 1, memory, metrics)

    return evaluate


def make_apply(optimizer: Options) -> Apply:
    """The un-jitted `(params, opt_state, schedule, coeffs) -> (params, opt_state, metrics)`.

    It is that of training and of every replay, on any number of devices; `schedule` are the numbers
    of `optimizers.schedule_numbers`.
    """

    def apply(params: Any, opt_state: Any, schedule: Mapping[str, Any], coeffs: jax.Array):
        tx, _, _ = transformation(optimizer, schedule)
        with jax.named_scope(OPTIMIZER_SCOPE):
            updates, opt_state = tx.update(NOTHING, opt_state, params, coeffs=coeffs)
        norm = optax.tree.norm(updates)
        # As in `step.make_step`: a formal dependence, with which parameters are written in place.
        updates = jax.tree.map(lambda u: u + (0.0 * norm).astype(u.dtype), updates)
        return optax.apply_updates(params, updates), opt_state, {"update_norm": norm}

    return apply


def compile_apply(optimizer: Options, shardings: TrainState) -> Any:
    """`jit` of `make_apply`, the buffers of parameters and optimizer state donated."""
    everywhere = shardings.step
    return jax.jit(
        make_apply(optimizer),
        in_shardings=(shardings.params, shardings.opt_state, everywhere, everywhere),
        out_shardings=(shardings.params, shardings.opt_state, everywhere),
        donate_argnums=(0, 1),
    )


def compiler(
    learner: Learner,
    objective: Objective,
    options: Any,
    optimizer: Options,
    axis: str | None,
    accumulate: int,
    binding: Binding,
    shardings: TrainState,
    mesh: Any,
) -> Callable[..., tuple[Callable[..., Any], tuple[Any, ...]]]:
    """`(state, hyper, frozen, batches) -> step, programs`, which compiles for these shapes.

    The step takes the arguments of one in a single program, and the state is donated as well.
    `apply` does not see the batches: it is compiled once.
    """
    evaluate = jax.jit(
        make_evaluate(learner, objective, options, optimizer, axis, accumulate, binding),
        in_shardings=(shardings, None, None, batch_sharding(mesh)),
        out_shardings=shardings.step,
    )
    apply = compile_apply(optimizer, shardings)
    applies: list[Any] = []

    def compile_for(state: TrainState, hyper: Hyper, frozen: Any, batches: Batches):
        first = compiled(evaluate.lower(state, hyper, frozen, batches))
        if not applies:
            coeffs = state_of(state.opt_state).coeffs
            args = (state.params, state.opt_state, hyper["schedule"], coeffs)
            applies.append(compiled(apply.lower(*args)))
        (second,) = applies

        def step(state: TrainState, hyper: Hyper, frozen: Any, batches: Batches):
            found = first(state, hyper, frozen, batches)
            numbers = hyper["schedule"]
            params, opt_state, more = second(state.params, state.opt_state, numbers, found.coeffs)
            # The optimizer's state holds the loss, as after a step in one program.
            opt_state = with_state(opt_state, value=found.value)
            after = TrainState(params, opt_state, found.step, found.objective)
            return after, found.metrics | more

        return step, (first, second)

    return compile_for
