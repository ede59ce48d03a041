"""One jitted training step: an objective's terms, their global weights, one update.

Every term is a `(sum, weight)`; the step divides the sum over *all* micro-batches and devices by
the weight over all of them, so a number does not depend on how the batch was split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.objectives import Objective, combine
from models.decoder import Decoder
from models.policy import DecoderPolicy
from train.sharding import batch_sharding, constrain, param_shardings, state_shardings

Batches = Mapping[str, Mapping[str, jax.Array]]
OPTIMIZER_SCOPE = "optimizer"  # what the update's instructions are called in profiles and plans


class TrainState(NamedTuple):
    """Parameters, optimizer state and the number of steps taken (or the shardings of the three)."""

    params: Any
    opt_state: Any
    step: Any


def split_batch(batches: Batches, parts: int) -> Batches:
    """`(B, ...)` to `(parts, B // parts, ...)`; rows are dealt in turn: each keeps its device."""

    def cut(x):
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(cut, batches)


class Losses:
    """An objective on one global batch, as the functions of the parameters that optimizers ask for.

    The weights come first, from the loss on the whole batch: they depend on masks alone, so the
    compiler drops that forward pass.
    """

    def __init__(self, decoder, objective, options, params, frozen, batches, accumulate):
        def terms(params, part, layer_map=None):
            dtype = decoder.config.dtype

            def layer(leaves, index):
                if layer_map is not None:
                    return layer_map(leaves, index)  # of values alone: nothing flows back
                return constrain(leaves, dtype)

            outer = {k: v for k, v in params.items() if k != "layers"}
            model = constrain(outer, dtype) | {"layers": params["layers"]}
            policy = DecoderPolicy(decoder, model, frozen, {"layer_map": layer})
            return objective.loss(policy, part, options)

        self._terms, self._options = terms, options
        self._batches, self._accumulate = batches, accumulate
        self.weights = {
            name: jax.lax.stop_gradient(weight)
            for name, (_, weight) in terms(params, batches).items()
        }

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
        terms = self._terms(params, part, layer_map)
        sums = {name: total for name, (total, _) in terms.items()}
        weighted = {name: (total, self.weights[name]) for name, total in sums.items()}
        return combine(weighted, self.weights, self._options, side), sums

    def value(self, params: Any, layer_map: Any = None) -> jax.Array:
        """`sum_t coef_t * sum_t / weight_t` over the whole batch."""
        return self._over_parts(lambda part: self._total(params, part, None, layer_map)[0])

    def look(self, params: Any) -> dict[str, jax.Array]:
        """The total and the mean of every term, without a gradient."""
        return self._metrics(*self._over_parts(lambda part: self._total(params, part, None)))

    def grad(self, params: Any) -> Any:
        """The gradient of `value`."""
        return self.gradients(params)[1][0]

    def gradients(self, params: Any, sides: tuple[str | None, ...] = (None,)):
        """Metrics, and the gradient of the total of each side (None: of all)."""

        def one(part):
            first, *rest = sides
            fn = jax.value_and_grad(self._total, has_aux=True)
            (total, sums), grads = fn(params, part, first)
            found = [grads]
            for side in rest:
                more, grads = jax.value_and_grad(
                    lambda p, side=side: self._total(p, part, side)[0]
                )(params)
                total, found = total + more, [*found, grads]
            return (total, sums), tuple(found)

        (total, sums), grads = self._over_parts(one)
        return self._metrics(total, sums), grads

    def _metrics(self, total: jax.Array, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
        means = {f"{n}_loss": s / jnp.maximum(self.weights[n], 1e-9) for n, s in sums.items()}
        return {"loss": total, **means}


def make_step(
    decoder: Decoder,
    objective: Objective,
    options: Any,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    accumulate: int = 1,
    needs: str = "joint",
) -> Callable[[TrainState, Any, Batches], tuple[TrainState, dict[str, jax.Array]]]:
    """The un-jitted step `(state, frozen, batches) -> (state, metrics)`.

    `needs` says what the optimizer is handed: `joint`, one gradient; `split`, those of the forget
    side and of the retain side; `value`, the loss as a function (no gradient is computed); `lazy`,
    the loss and its gradient as functions.
    """

    def step(state: TrainState, frozen: Any, batches: Batches):
        params = state.params
        losses = Losses(decoder, objective, options, params, frozen, batches, accumulate)
        grads: Any = None
        extra: dict[str, Any] = {}
        if needs == "joint":
            metrics, (grads,) = losses.gradients(params)
            metrics["grad_norm"] = optax.tree.norm(grads)
        elif needs == "split":
            metrics, (grads, constraint) = losses.gradients(params, ("forget", "retain"))
            extra = {"constraint_grads": constraint}
            metrics["grad_norm"] = optax.tree.norm(optax.tree.add(grads, constraint))
        else:
            metrics = losses.look(params)
            # A loss that is known saves the forward estimator an evaluation.
            extra = {
                "value": metrics["loss"],
                "value_fn": losses.value,
                "layered_value_fn": losses.value,
            }
            if needs == "lazy":
                extra["grad_fn"] = losses.grad
        with jax.named_scope(OPTIMIZER_SCOPE):
            updates, opt_state = tx.update(grads, state.opt_state, params, **extra)
        metrics |= {
            "update_norm": optax.tree.norm(updates),
            "lr": jnp.asarray(schedule(state.step)),
        }
        params = optax.apply_updates(params, updates)
        return TrainState(params, opt_state, state.step + 1), metrics

    return step


def init_state(
    params: Any, tx: optax.GradientTransformationExtraArgs, mesh: Any
) -> tuple[TrainState, Any]:
    """A fresh training state laid out on the mesh, and its tree of shardings.

    The optimizer state is initialised with explicit output shardings: without them it lands on one
    device.
    """
    _, shardings = state_shapes(params, tx, mesh)
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(params, opt_state, step), shardings


def state_shapes(
    params: Any, tx: optax.GradientTransformationExtraArgs, mesh: Any
) -> tuple[TrainState, TrainState]:
    """A training state as shapes that know their layout, and its tree of shardings.

    `params` are arrays or shapes; nothing is computed.
    """
    opt_state = jax.eval_shape(tx.init, params)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = TrainState(
        param_shardings(params, mesh), state_shardings(opt_state, params, mesh), replicated
    )
    state = TrainState(params, opt_state, jax.ShapeDtypeStruct((), jnp.int32))
    return shaped(state, shardings), shardings


def shaped(tree: Any, shardings: Any) -> Any:
    """Arrays or shapes as shapes laid out by a tree of shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def compile_step(step: Callable[..., Any], shardings: TrainState, mesh: Any) -> Callable[..., Any]:
    """`jit` of a step with its layout fixed on both sides and the state's buffers donated."""
    replicated = shardings.step
    return jax.jit(
        step,
        in_shardings=(shardings, None, batch_sharding(mesh)),
        out_shardings=(shardings, replicated),
        donate_argnums=(0,),
    )
