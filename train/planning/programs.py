"""The programs of a run as shapes, which a plan compiles without weights, data or devices.

They are the functions that a run calls, on `jax.ShapeDtypeStruct`s laid out as the run lays out
its arrays, so the planned programs are those that will run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn import objectives
from jaxlib_unlearn.objectives import Objective
from models import layout
from models.decoder import generate
from models.decoder.labels import score
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder
from models.files.architectures import config_of
from models.learner import Learner
from train.data.batches import collate
from train.data.references import REFERENCE_COLUMNS, cached_streams, settled
from train.data.stream import Stream
from train.engine.base_models import scratch_shape
from train.engine.hyper import hyper_of, traced_step
from train.engine.step import TrainState, compile_step, objective_state, shaped, state_shapes
from train.engine.trainable import Trainable, trainable_of
from train.jobs.unlearning_stages import forgetting
from train.options import checks, optimizers
from train.options.config import RunConfig
from train.runtime import sharding

STEPS = 100  # length of the schedule, if the data is not there; costs do not depend on it


@dataclass(frozen=True)
class AbstractProgram:
    """A jitted function and the shapes it is called with.

    Args:
        name: `train`, `score`, `prefill` or `decode`.
        call: the jitted function.
        args: the shapes with shardings, and static arguments unchanged.
        unit: the name of the work of one call.
        static: keyword arguments of `call` that are not arrays.
    """

    name: str
    call: Any
    args: tuple[Any, ...]
    unit: str
    static: dict[str, Any] = dataclasses.field(default_factory=dict)


def decoder_of(config: RunConfig) -> Decoder:
    """The decoder of a run, without its weights.

    Raises:
        UserError: the shapes of the model are not known.
    """
    m = config.model
    if config.stage.original is None and m.path == "scratch":
        shape = scratch_shape(m, m.vocab_size, config.data.max_length)
    else:
        shape = config_of(config.stage.original or m.path)
    return Decoder(dataclasses.replace(shape, dtype=m.dtype), m.remat)


def batch_shapes(rows: int, length: int, labels: int, mesh: Mesh) -> dict[str, Any]:
    """A training or scoring batch as shapes, with the columns that `collate` makes."""
    batch = collate([], [], length, labels, batch_size=1)
    where = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=where)
        for name, x in batch.items()
    }


def shapes_of(stream: Stream, rows: int, mesh: Mesh) -> dict[str, Any]:
    """A batch of `rows` rows of a stream as shapes."""
    first = np.zeros(1, int)
    batch, where = stream.batch(first, stream.shape(first), 0), sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=where)
        for name, x in batch.items()
    }


def param_shapes(model: Any, mesh: Mesh, rules: layout.Rules = layout.DECODER) -> Any:
    """Parameters of anything that has `shapes()`, as shapes laid out on the mesh."""
    shapes = model.shapes()
    return shaped(shapes, sharding.param_shardings(shapes, mesh, rules))


def trained_shapes(config: RunConfig, params: Any, mesh: Mesh, row: Objective) -> Trainable:
    """The trainable part of the unlearning stage, as shapes laid out on the mesh."""
    dtype = config.model.dtype
    return laid_out(trainable_of(params, row, config.lora, config.train, dtype=dtype), mesh)


def laid_out(made: Trainable, mesh: Mesh) -> Trainable:
    """The trained and the frozen part of a stage, as shapes laid out on the mesh."""

    def laid(tree: Any) -> Any:
        return shaped(tree, sharding.param_shardings(tree, mesh))

    return made._replace(start=laid(made.start), frozen=laid(made.frozen))


def train_program(
    config: RunConfig, decoder: Decoder, mesh: Mesh, length: int, labels: int
) -> AbstractProgram:
    """One step of the unlearning stage.

    Raises:
        UserError: the batch does not divide over the mesh, or options that do not go together.
    """
    objective, options = objectives.resolve(config.objective)
    rows, recipe = config.unlearn.batch_size, forgetting(config)
    learner, params = DecoderLearner(decoder), param_shapes(decoder, mesh)
    checks.check_recipe(recipe, (objective, options), mesh, "unlearning")
    checks.check_model(recipe, (objective, options), learner, params)
    first = checks.train_from(params, config.train)
    objective = settled(objective, options, first, decoder.config.hidden_size)
    made = trained_shapes(config, params, mesh, objective)
    batches = {name: batch_shapes(rows, length, labels, mesh) for name in objective.streams}
    for name, kind in cached_streams(objective).items():
        for column, quantity, _ in REFERENCE_COLUMNS[kind]:
            tail = () if quantity == "logps" else (decoder.config.hidden_size,)
            batches[name][column] = jax.ShapeDtypeStruct(
                (rows, length if quantity == "hidden_all" else labels, *tail),
                jnp.float32,
                sharding=sharding.batch_sharding(mesh),
            )
    tokens = rows * length * len(objective.streams)
    return step_program(
        learner,
        (objective, options),
        optimizers.over_rows(config.optimizer, rows),
        made,
        batches,
        mesh,
        f"a step of {len(objective.streams)} x {rows} rows of {length} tokens ({tokens} tokens)",
        combine=config.combine,
        accumulate=config.unlearn.accumulate,
        steps=config.unlearn.steps or STEPS,
    )


def step_program(
    learner: Learner,
    objective: tuple[Objective, Any],
    optimizer: optimizers.Options,
    made: Trainable,
    batches: Any,
    mesh: Mesh,
    unit: str,
    *,
    combine: str = "sum",
    accumulate: int = 1,
    steps: int = STEPS,
) -> AbstractProgram:
    """One training step of any kind of model.

    Args:
        learner: the kind of model.
        objective: a row and its options.
        optimizer: the row of the optimizer and its options.
        made: the trained part, as shapes laid out on the mesh.
        batches: the shapes of the batches by stream.
        mesh: the devices.
        unit: the name of the work of one step.
        combine: the combiner of the gradients of the two sides.
        accumulate: the number of micro-batches.
        steps: the length of the schedule.
    """
    row, options = objective
    optimizer = optimizers.in_micro_batches(optimizer, accumulate)
    axis = sharding.query_axis(mesh)
    tx, _, _ = optimizers.build(optimizer, steps, combine, axis)
    memory = jax.eval_shape(lambda: objective_state(learner, row, options, 0))
    state, shardings = state_shapes(made.start, tx, mesh, memory)
    step = traced_step(learner, row, options, optimizer, combine, axis, accumulate, made.binding)
    hyper = jax.eval_shape(lambda: hyper_of(options, optimizer, steps))
    hyper = shaped(hyper, jax.tree.map(lambda _: shardings.step, hyper))
    args = (state, hyper, made.frozen, batches)
    return AbstractProgram("train", compile_step(step, shardings, mesh), args, unit)


def score_program(
    config: RunConfig, decoder: Decoder, mesh: Mesh, length: int, labels: int
) -> AbstractProgram:
    """One batch of the likelihood metrics."""
    ways = sharding.batch_ways(mesh)
    rows = max(1, config.evaluate.score_tokens // length // ways) * ways
    args = (decoder, param_shapes(decoder, mesh), batch_shapes(rows, length, labels, mesh))
    call = jax.jit(score, static_argnums=0)
    return AbstractProgram("score", call, args, f"{rows} rows of {length} tokens")


def generate_programs(
    config: RunConfig, decoder: Decoder, mesh: Mesh, prompt: int
) -> Iterator[AbstractProgram]:
    """Prefill for a chunk of prompts, and decoding of one more token for each of its rows."""
    ways = sharding.batch_ways(mesh)
    rows = -(-config.evaluate.generate_rows // ways) * ways
    new = config.evaluate.max_new_tokens
    params = param_shapes(decoder, mesh)
    where = sharding.batch_sharding(mesh)
    whole = NamedSharding(mesh, P())

    def array(shape: tuple[int, ...], dtype: Any, split: bool = True) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where if split else whole)

    lengths = array((rows,), jnp.int32)
    yield AbstractProgram(
        "prefill",
        generate.prefill,
        (decoder, params, array((rows, prompt), jnp.int32), lengths),
        f"{rows} prompts of {prompt} tokens",
    )

    dtype = jnp.dtype(decoder.config.dtype)
    cache = jax.eval_shape(lambda: decoder.init_cache(rows, prompt + new - 1, dtype))
    split = {
        name: NamedSharding(mesh, P(None, ("data", "fsdp"))) if name in ("k", "v") else where
        for name in cache
    } | {"index": whole}
    state = generate.Rows(
        shaped(cache, split),
        tokens=array((rows, new), jnp.int32),
        lengths=lengths,
        last=lengths,
        done=array((rows,), bool),
        step=array((), jnp.int32, False),
    )
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    scalar = array((), jnp.float32, False)
    draw = generate.Draw(
        array(key.shape, key.dtype), lengths, lengths, array((1,), jnp.int32, False), scalar, scalar
    )
    until = array((), jnp.int32, False)
    static = {"top_k": 0, "greedy": False}
    yield AbstractProgram(
        "decode",
        generate.advance,
        (decoder, params, state, draw, until),
        f"a token for {rows} rows behind {prompt + new} slots",
        static,
    )


def update_program(config: RunConfig, decoder: Decoder, mesh: Mesh) -> tuple[Any, tuple] | None:
    """The optimizer's update alone and its shapes; None for optimizers that evaluate the loss.

    The work of those is mostly that of the model, several times over.
    """
    optimizer = optimizers.over_rows(config.optimizer, config.unlearn.batch_size)
    objective, _ = objectives.resolve(config.objective)
    params = param_shapes(decoder, mesh)
    trained = trained_shapes(config, params, mesh, objective).start
    return update_of(optimizer, config.combine, trained, mesh)


def update_of(
    optimizer: optimizers.Options, combine: str, trained: Any, mesh: Mesh
) -> tuple[Any, tuple] | None:
    """The same as `update_program`, given the shapes of the trained part."""
    tx, _, needs = optimizers.build(optimizer, STEPS, combine)
    if needs not in ("joint", "split"):
        return None
    state, _ = state_shapes(trained, tx, mesh)

    def update(grads, opt_state, params, other):
        extra = {"constraint_grads": other} if needs == "split" else {}
        return tx.update(grads, opt_state, params, **extra)

    return update, (trained, state.opt_state, trained, trained)


__all__ = [
    "AbstractProgram",
    "TrainState",
    "batch_shapes",
    "decoder_of",
    "generate_programs",
    "param_shapes",
    "score_program",
    "shapes_of",
    "train_program",
    "trained_shapes",
    "update_program",
]
