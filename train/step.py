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
from train.sharding import batch_sharding, param_shardings, state_shardings

Batches = Mapping[str, Mapping[str, jax.Array]]


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


def loss_and_grads(
    decoder: Decoder,
    objective: Objective,
    options: Any,
    params: Any,
    frozen: Any,
    batches: Batches,
    accumulate: int,
) -> tuple[dict[str, jax.Array], Any]:
    """Metrics and the gradient of `sum_t coef_t * sum_t / weight_t` over the whole batch.

    The weights come first, from the loss on the whole batch: they depend on masks alone, so the
    compiler drops that forward pass.
    """
    terms = objective.loss(DecoderPolicy(decoder, params, frozen), batches, options)
    weights = {name: jax.lax.stop_gradient(weight) for name, (_, weight) in terms.items()}

    def loss(params, part):
        policy = DecoderPolicy(decoder, params, frozen)
        terms = objective.loss(policy, part, options)
        sums = {name: total for name, (total, _) in terms.items()}
        return combine({n: (s, weights[n]) for n, s in sums.items()}, weights, options), sums

    gradient = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        (total, sums), grads = gradient(params, batches)
    else:

        def body(carry, part):
            (total, sums), grads = gradient(params, part)
            return jax.tree.map(jnp.add, carry, (total, sums, grads)), None

        start = jax.tree.map(
            jnp.zeros_like, (jnp.zeros(()), {n: s for n, (s, _) in terms.items()}, params)
        )
        (total, sums, grads), _ = jax.lax.scan(body, start, split_batch(batches, accumulate))
    metrics = {f"{n}_loss": s / jnp.maximum(weights[n], 1e-9) for n, s in sums.items()}
    return {"loss": total, **metrics}, grads


def make_step(
    decoder: Decoder,
    objective: Objective,
    options: Any,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    accumulate: int = 1,
) -> Callable[[TrainState, Any, Batches], tuple[TrainState, dict[str, jax.Array]]]:
    """The un-jitted step `(state, frozen, batches) -> (state, metrics)`."""

    def step(state: TrainState, frozen: Any, batches: Batches):
        metrics, grads = loss_and_grads(
            decoder, objective, options, state.params, frozen, batches, accumulate
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "lr": jnp.asarray(schedule(state.step)),
        }
        return TrainState(params, opt_state, state.step + 1), metrics

    return step


def init_state(
    params: Any, tx: optax.GradientTransformationExtraArgs, mesh: Any
) -> tuple[TrainState, Any]:
    """A fresh training state laid out on the mesh, and its tree of shardings.

    The optimizer state is initialised with explicit output shardings: without them it lands on one
    device.
    """
    shapes = jax.eval_shape(tx.init, params)
    opt_shardings = state_shardings(shapes, params, mesh)
    opt_state = jax.jit(tx.init, out_shardings=opt_shardings)(params)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step = jax.device_put(jnp.zeros((), jnp.int32), replicated)
    shardings = TrainState(param_shardings(params, mesh), opt_shardings, replicated)
    return TrainState(params, opt_state, step), shardings


def compile_step(step: Callable[..., Any], shardings: TrainState, mesh: Any) -> Callable[..., Any]:
    """`jit` of a step with its layout fixed on both sides and the state's buffers donated."""
    replicated = shardings.step
    return jax.jit(
        step,
        in_shardings=(shardings, None, batch_sharding(mesh)),
        out_shardings=(shardings, replicated),
        donate_argnums=(0,),
    )
