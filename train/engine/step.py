"""One jitted training step: an objective's terms, their global weights, one update.

Every term is a `(sum, weight)`; the step divides the sum over *all* micro-batches and devices by
the weight over all of them, so no result depends on how the batch was split.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlib_unlearn.objectives import (
    Estimate,
    Objective,
    Progress,
    coefficient,
    combine,
    row_keys,
    side_of,
)
from jaxlib_unlearn.objectives.smoothing import with_forward
from jaxlib_unlearn.optim.zeroth_order.parts import Part, take
from jaxlib_unlearn.options import is_zero
from models import arrays
from models.learner import Frozen, Learner
from train.runtime.sharding import batch_sharding, state_shardings

Batches = Mapping[str, Mapping[str, jax.Array]]
OPTIMIZER_SCOPE = "optimizer"  # scope of the update's instructions in profiles and plans
Bind = Callable[..., tuple[Any, Any]]


def whole(trainable: Any, frozen: Any, layer_map: Any = None) -> tuple[Any, Any]:
    """The trained tree is all of the model's parameters."""
    del frozen
    return trainable, layer_map


class Binding(NamedTuple):
    """The functions by which the trained tree and the frozen arrays of a stage form models.

    Args:
        bind: `(trainable, frozen, layer_map=None) -> (params, layer_map)`, the model that is
            trained, as a learner takes it. The `layer_map` passed in is one of the trainable tree's
            layers.
        fork: `frozen -> params` of the frozen model, for rows that ask it in the step; None: no
            row does.
        head: `frozen -> params` that unembed cached hidden states of the frozen model.
        train_from: the first block that is trained.
        key: a value that is equal for bindings that form the same models of the same trees. A
            binding without one equals no other, and its programs serve one stage.
    """

    bind: Bind = whole
    fork: Callable[[Any], Any] | None = None
    head: Callable[[Any], Any] = lambda frozen: frozen
    train_from: int = 0
    key: Hashable | None = None


ALL = Binding(key="all")  # every parameter is trained


class TrainState(NamedTuple):
    """The trained tree, the optimizer's state, the number of steps, and the objective's state.

    (Or the shardings of the four.)
    """

    params: Any
    opt_state: Any
    step: Any
    objective: Any = ()


def split_batch(batches: Batches, parts: int) -> Batches:
    """`(B, ...)` to `(parts, B // parts, ...)`; rows are dealt in turn, so each keeps its device.

    Examples that share a row of tokens stay together.
    """

    def split(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        rows = min(x.shape[0] for x in batch.values())

        def cut(x):
            tail = x.shape[1:]
            dealt = x.reshape(rows // parts, parts, x.shape[0] // rows, *tail)
            return jnp.swapaxes(dealt, 0, 1).reshape(parts, x.shape[0] // parts, *tail)

        return {name: cut(x) for name, x in batch.items()}

    return {name: split(batch) for name, batch in batches.items()}


def key_of(high: Any, low: Any) -> jax.Array:
    """The key of a stage's seed, `high * 2^32 + low`."""
    return jax.random.fold_in(jax.random.key(high), low)


class Losses:
    """An objective on one global batch, as the functions of the parameters that optimizers need.

    `params` is the trained tree; `binding` makes models of it and `frozen`.

    The weights are computed first, from the loss on the whole batch: they depend on masks alone, so
    the compiler removes that forward pass.

    Args:
        learner: the kind of model.
        objective: the row of the objective.
        options: its options.
        params: the trained tree.
        frozen: the stage's other arrays.
        batches: the batches by stream.
        accumulate: the number of micro-batches.
        binding: the functions that form models of `params` and `frozen`.
        key: the key from which the row draws; None: it may not draw.
        step: the number of the step, for the same.
        state: the row's state.
    """

    def __init__(
        self,
        learner: Learner,
        objective: Objective,
        options: Any,
        params: Any,
        frozen: Any,
        batches: Batches,
        accumulate: int = 1,
        binding: Binding = ALL,
        *,
        key: jax.Array | None = None,
        step: Any = 0,
        state: Any = (),
    ):
        questions = with_forward(
            objective.questions(options), objective, options, learner.sizes.get("blocks", 0)
        )

        def terms(trainable, part, layer_map=None, joined=True):
            params, layer_map = binding.bind(trainable, frozen, layer_map)
            fork = None if binding.fork is None else binding.fork(frozen)
            context = learner.context(
                params,
                Frozen(binding.head(frozen), fork),
                part,
                questions,
                layer_map=layer_map,
                fuse=joined,
                train_from=binding.train_from,
            )
            context = context._replace(state=state)
            if key is not None:
                context = context._replace(row_keys=row_keys(key, step))
            return objective.loss(context, part, options)

        weighed = options if objective.weigh is None else objective.weigh(options, state)
        self._terms, self._options = terms, weighed
        self._estimators = {} if objective.estimators is None else objective.estimators(options)
        self._seed = 0 if key is None else jax.random.bits(key, dtype=jnp.uint32)
        self._step = step
        self._batches, self._accumulate = batches, accumulate
        self._own_means = objective.per_micro_batch and accumulate > 1
        self.weights = {
            name: jax.lax.stop_gradient(weight)
            for name, (_, weight) in terms(params, batches).items()
        }
        # The number 0 as a coefficient leaves a term out, with its passes and its metric; a traced
        # 0 costs them. A row that advances its state reads the means of all terms.
        zero = {name for name in self.weights if is_zero(coefficient(name, weighed))}
        self._left_out = zero if objective.advance is None and zero < set(self.weights) else set()

    def _over_parts(self, fn: Callable[[Batches], Any]) -> Any:
        """The sum of a function over the micro-batches."""
        if self._accumulate == 1:
            return fn(self._batches)
        parts = split_batch(self._batches, self._accumulate)
        shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts))
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def body(carry, part):
            return jax.tree.map(jnp.add, carry, fn(part)), None

        return jax.lax.scan(body, start, parts)[0]

    def _total(self, params: Any, part: Batches, side: str | None, layer_map: Any = None):
        # One side's gradient does not go through the other side's rows, nor does any through rows
        # that are left out.
        joined = side is None and not self._left_out
        return self._combined(self._terms(params, part, layer_map, joined=joined), side)

    def _combined(self, terms: Mapping[str, Any], side: str | None):
        """The weighted total of a side, and the sums of its terms."""
        terms = {name: term for name, term in terms.items() if name not in self._left_out}
        sums = {name: total for name, (total, _) in terms.items()}
        if self._own_means:
            # `combine` divides by the global weight, which cancels: sum_a (1/A) sum_a / weight_a.
            share = {n: jnp.maximum(own, 1e-9) * self._accumulate for n, (_, own) in terms.items()}
            sums = {name: total * self.weights[name] / share[name] for name, total in sums.items()}
        weighted = {name: (total, self.weights[name]) for name, total in sums.items()}
        # Without the other side's: they would cost a forward pass for these metrics alone.
        mine = {n: total for n, total in sums.items() if side in (None, side_of(n))}
        return combine(weighted, self.weights, self._options, side), mine

    def value(self, params: Any, layer_map: Any = None, part: Part | None = None) -> jax.Array:
        """`sum_t coef_t * sum_t / weight_t` over the whole batch, or the loss of one of its parts.

        A part is divided by its share of the global weights, so that the mean over all parts is the
        value of the whole batch. It is not split into micro-batches.
        """
        if part is not None:
            rows = {name: take(batch, part) for name, batch in self._batches.items()}
            return part.count * self._total(params, rows, None, layer_map)[0]
        return self._over_parts(lambda part: self._total(params, part, None, layer_map)[0])

    def look(self, params: Any) -> dict[str, jax.Array]:
        """The total and the mean of every term, without a gradient."""
        return self._metrics(*self._over_parts(lambda part: self._total(params, part, None)))

    def grad(self, params: Any) -> Any:
        """The gradient of `value`, with the estimators of the row's sides."""
        return self.gradients(params)[1][0]

    def gradients(self, params: Any, sides: tuple[str | None, ...] = (None,)):
        """Metrics, and the gradient of the total of each side (None: of all).

        The gradient of a side that has an estimator is the estimator's.
        """
        if not self._estimators:
            return self._plain(params, sides)
        used = (name for name in self.weights if name not in self._left_out)
        present = tuple(dict.fromkeys(map(side_of, used)))
        wanted = present if sides == (None,) else sides
        metrics, found = self._plain(params, wanted)
        grads = [self._estimated(params, s, g) for s, g in zip(wanted, found, strict=True)]
        if sides == (None,):
            grads = [jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *grads)]
        return metrics, tuple(grads)

    def _estimated(self, params: Any, side: str | None, gradient: Any) -> Any:
        estimator = self._estimators.get(side or "")
        if estimator is None:
            return gradient

        def grad_fn(at: Any) -> Any:
            return self._plain(at, (side,))[1][0]

        return estimator(Estimate(grad_fn, params, gradient, self._seed, self._step))

    def _plain(self, params: Any, sides: tuple[str | None, ...]):
        """Metrics, and the gradients by automatic differentiation."""

        def one(part):
            # XLA merges the forward passes of sides that share a stream, but not inside the loop
            # over micro-batches.
            if len(part) == 1 and len(sides) > 1:
                return shared(part)
            fn = jax.value_and_grad(self._total, has_aux=True)
            totals, sums, found = [], {}, []
            for side in sides:
                (total, mine), grads = fn(params, part, side)
                totals.append(total)
                sums |= mine
                found.append(grads)
            return (sum(totals[1:], totals[0]), sums), tuple(found)

        def shared(part):
            """One forward pass of the only stream, and a backward pass for each side."""

            def every(params):
                terms = self._terms(params, part, None, joined=False)
                found = [self._combined(terms, side) for side in sides]
                return [total for total, _ in found], {n: x for _, m in found for n, x in m.items()}

            totals, linear, sums = jax.linearize(every, params, has_aux=True)
            grads = [
                jax.linear_transpose(lambda tangents, i=i: linear(tangents)[i], params)(
                    jnp.ones_like(total)
                )[0]
                for i, total in enumerate(totals)
            ]
            return (sum(totals[1:], totals[0]), sums), tuple(grads)

        (total, sums), grads = self._over_parts(one)
        return self._metrics(total, sums), grads

    def _metrics(self, total: jax.Array, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
        means = {f"{n}_loss": s / jnp.maximum(self.weights[n], 1e-9) for n, s in sums.items()}
        return {"loss": total, **means}


def make_step(
    learner: Learner,
    objective: Objective,
    options: Any,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    accumulate: int = 1,
    needs: str = "joint",
    binding: Binding = ALL,
    key: jax.Array | None = None,
    length: Mapping[str, Any] | None = None,
) -> Callable[[TrainState, Any, Batches], tuple[TrainState, dict[str, jax.Array]]]:
    """The un-jitted step `(state, frozen, batches) -> (state, metrics)`.

    `needs` says what the optimizer receives: `joint`, one gradient; `split`, those of the forget
    side and of the retain side (the row's `sides`); `value`, the loss as a function (no gradient is
    computed); `lazy`, the loss and its gradient as functions. `binding` makes models of the trained
    tree; `key` is the key from which the row draws; `length` holds the `steps` and `epoch_steps` of
    the stage, for rows that advance a state.
    """

    def step(state: TrainState, frozen: Any, batches: Batches):
        params = state.params
        losses = Losses(
            learner,
            objective,
            options,
            params,
            frozen,
            batches,
            accumulate,
            binding,
            key=key,
            step=state.step,
            state=state.objective,
        )
        grads: Any = None
        extra: dict[str, Any] = {}
        if needs == "joint":
            metrics, (grads,) = losses.gradients(params)
            metrics["grad_norm"] = optax.tree.norm(grads)
        elif needs == "split":
            metrics, (grads, constraint) = losses.gradients(params, objective.sides)
            extra = {"constraint_grads": constraint}
            metrics["grad_norm"] = optax.tree.norm(optax.tree.add(grads, constraint))
        else:
            metrics = losses.look(params)
            extra = value_functions(learner, losses, metrics)
            if needs == "lazy":
                extra["grad_fn"] = losses.grad
        with jax.named_scope(OPTIMIZER_SCOPE):
            updates, opt_state = tx.update(grads, state.opt_state, params, **extra)
        metrics |= {
            "update_norm": optax.tree.norm(updates),
            "lr": jnp.asarray(schedule(state.step)),
        }
        if needs in ("value", "lazy"):
            # The update does not depend on these metrics of parameters and update. With a formal
            # dependence XLA writes the new parameters in place; without it, it may keep a copy of
            # the old ones for whichever comes later.
            after = 0.0 * (metrics["loss"] + metrics["update_norm"])
            updates = jax.tree.map(lambda u: u + after.astype(u.dtype), updates)
        params = optax.apply_updates(params, updates)
        memory = advanced(objective, options, state, losses, metrics, length)
        return TrainState(params, opt_state, state.step + 1, memory), metrics

    return step


def value_functions(learner: Learner, losses: Losses, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The extra arguments of an optimizer that asks for values; `metrics` are `losses.look`'s."""
    # The known loss saves the forward estimator an evaluation.
    extra: dict[str, Any] = {"value": metrics["loss"], "value_fn": losses.value}
    if learner.layered:
        extra["layered_value_fn"] = losses.value
        extra["factored_leaves"] = getattr(learner, "factored", ())
    return extra


def advanced(
    objective: Objective,
    options: Any,
    state: TrainState,
    losses: Losses,
    metrics: Mapping[str, Any],
    length: Mapping[str, Any] | None,
) -> Any:
    """The objective's state after a step."""
    if objective.advance is None:
        return state.objective
    means = {n: metrics[f"{n}_loss"] for n in losses.weights if f"{n}_loss" in metrics}
    given = {"steps": 1, "epoch_steps": 1} if length is None else length
    return objective.advance(state.objective, means, options, Progress(state.step, **given))


def objective_state(learner: Learner, objective: Objective, options: Any, seed: int) -> Any:
    """The state that a row starts with; `()` for rows without one."""
    if objective.init_state is None:
        return ()
    return objective.init_state(key_of(*divmod(seed, 2**32)), options, learner.sizes)


def init_state(
    params: Any, tx: optax.GradientTransformationExtraArgs, mesh: Any, memory: Any = ()
) -> tuple[TrainState, Any]:
    """A fresh training state laid out on the mesh, and its tree of shardings.

    The optimizer state is initialised with explicit output shardings: without them it lands on one
    device.

    Args:
        params: the trained tree, on the mesh.
        tx: the optimizer.
        mesh: the devices.
        memory: the objective's state.
    """
    _, shardings = state_shapes(params, tx, mesh, memory)
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    memory = jax.tree.map(
        lambda x, where: arrays.put(np.asarray(x), where), memory, shardings.objective
    )
    return TrainState(params, opt_state, step, memory), shardings


def state_shapes(
    params: Any, tx: optax.GradientTransformationExtraArgs, mesh: Any, memory: Any = ()
) -> tuple[TrainState, TrainState]:
    """A training state as shapes with their shardings, and its tree of shardings.

    `params` are arrays or shapes with their shardings; nothing is computed.
    """
    opt_state = jax.eval_shape(tx.init, params)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = TrainState(
        jax.tree.map(lambda x: x.sharding, params),
        state_shardings(opt_state, params, mesh),
        replicated,
        jax.tree.map(lambda x: replicated, memory),
    )
    state = TrainState(params, opt_state, jax.ShapeDtypeStruct((), jnp.int32), memory)
    return shaped(state, shardings), shardings


def shaped(tree: Any, shardings: Any) -> Any:
    """Arrays or shapes as `jax.ShapeDtypeStruct`s with the given shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def compile_step(step: Callable[..., Any], shardings: TrainState, mesh: Any) -> Callable[..., Any]:
    """`jit` of a step with its layout fixed on both sides and the state's buffers donated.

    The first argument of the step is the state, the last one the batches.
    """
    others = len(inspect.signature(step).parameters) - 2
    replicated = shardings.step
    return jax.jit(
        step,
        in_shardings=(shardings, *[None] * others, batch_sharding(mesh)),
        out_shardings=(shardings, replicated),
        donate_argnums=(0,),
    )
