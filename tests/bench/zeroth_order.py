"""Zeroth-order steps against the forward passes they are made of.

    python tests/bench/zeroth_order.py [--shape smollm2|vit-fashion] [--rows 32] [--length 128]
        [--labels 16] [--rank 1] [--layers 30] [--repeats 5] [--only rowwise step query-batch]
        [--output runs/bench]

`smollm2` is a decoder of SmolLM2's shape, `vit-fashion` the small vision transformer of that preset
(64 images unless `--rows` says otherwise). Weights and inputs are random: only time is measured.
Programs alternate run by run, so that both sides of a ratio see the same machine; each number is a
median. Ratios are theirs / ours; a goal is a ratio to reach.

rowwise: tokens a second of a forward pass in which every row has a direction of its own, over those
of a plain pass (theirs, once for each of the two signs); and the passes that MeZO needs for as many
directions, of which one is timed and multiplied. The whole step multiplies the factors of all rows
and has no goal.

step: a whole step against as many forward passes as it evaluates. "Without draws" a direction is
one number per key in place of random numbers, which leaves all other work.

query-batch: four queries at a time against one at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import OUT, faster, in_turns, machine, markdown, publish

from jaxlib_unlearn import objectives, optim
from jaxlib_unlearn.optim.zeroth_order import perturbations
from jaxlib_unlearn.optim.zeroth_order.engine import zeroth_order
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from models.vision.vit import ViT, ViTConfig, ViTLearner
from train.engine.step import Losses
from train.jobs.classification_options import StartConfig

SMOLLM2 = DecoderConfig(49152, 576, 1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64)
START = StartConfig()  # what vit-fashion trains
VIT_FASHION = ViTConfig(
    28, START.patch_size, 1, START.hidden_size, START.intermediate_size,
    num_layers=START.num_layers, num_heads=START.num_heads, num_classes=10,
)  # fmt: skip
CASES = ("rowwise", "step", "query-batch")
QUERIES = 4  # of the rows with a subspace
RANK = 64  # of the subspace


def flat(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """In place of random numbers: one that depends on the key, everywhere."""
    number = jax.random.key_data(key)[0].astype(jnp.float32) * 2.0**-32 - 0.5
    return jnp.broadcast_to(number.astype(dtype), shape)


def without_draws(make: Callable[[], Any]) -> Callable[[], Any]:
    """`make` a transformation, and trace its update, with `flat` in place of the draws."""

    def build():
        tx = make()

        def update(*args, **kwargs):
            with mock.patch.object(perturbations, "normal", flat):
                return tx.update(*args, **kwargs)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return build


def dense(**options: Any) -> Any:
    """MeZO; without draws its entries are `flat` as well."""
    family = perturbations.dense()._replace(sample=options.pop("sample", perturbations.normal))
    return zeroth_order(1e-7, family, **options)


class Model(NamedTuple):
    """A kind of model, what it is trained with, and one batch.

    Args:
        learner: the kind.
        objective: its loss, with options.
        params: random weights.
        batch: random inputs.
        told: its size, for the heading.
    """

    learner: DecoderLearner | ViTLearner
    objective: tuple[objectives.Objective, Any]
    params: Any
    batch: Mapping[str, Any]
    told: str


def smollm2(rows: int, length: int, labels: int, layers: int | None) -> Model:
    """A decoder, and rows whose last tokens are labels."""
    config = SMOLLM2 if layers is None else dataclasses.replace(SMOLLM2, num_layers=layers)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    batch = {
        "tokens": tokens,
        "positions": places,
        "segment_ids": np.ones((rows, length), np.int32),
        "label_index": places[:, -labels - 1 : -1],
        "targets": tokens[:, -labels:],
        "target_mask": np.ones((rows, labels), np.float32),
        "row_id": np.arange(rows, dtype=np.int32),
    }
    model = Decoder(config)
    told = f"{config.num_layers} blocks, {rows} x {length} tokens"
    loss = objectives.resolve("nll")
    return Model(DecoderLearner(model), loss, model.init(jax.random.key(0)), batch, told)


def vit_fashion(rows: int, layers: int | None) -> Model:
    """A vision transformer, and images with their classes."""
    config = VIT_FASHION
    config = config if layers is None else dataclasses.replace(config, num_layers=layers)
    draw = np.random.default_rng(0)
    batch = {
        "image": draw.integers(0, 256, (rows, *config.image_shape)).astype(np.uint8),
        "gold": draw.integers(0, config.num_classes, rows).astype(np.int32),
        "row_id": np.arange(rows, dtype=np.int32),
    }
    model = ViT(config)
    told = f"{config.num_layers} blocks, {rows} images of {config.num_tokens} tokens"
    loss = objectives.resolve("classes", objectives.LEARNING)
    return Model(ViTLearner(model), loss, model.init(jax.random.key(0)), batch, told)


class Bench:
    """Programs on a model and its batch."""

    def __init__(self, model: Model):
        self.learner, self.objective, self.params = model.learner, model.objective, model.params
        self.batch = jax.tree.map(jnp.asarray, dict(model.batch))
        self.rows = len(model.batch["row_id"])

    def losses(self, params: Any, batch: Any) -> Losses:
        return Losses(self.learner, *self.objective, params, None, {"train": batch})

    def forward(self) -> Callable[[], float]:
        """A plain forward pass to the loss."""
        fn = jax.jit(lambda params, batch: self.losses(params, batch).value(params))
        compiled = fn.lower(self.params, self.batch).compile()
        return timed(lambda: compiled(self.params, self.batch))

    def values(self, make: Callable[[], Any], **given: Any) -> Callable[[], float]:
        """The evaluations of a step, to its coefficients."""
        return self._program(make, False, given)

    def step(self, make: Callable[[], Any], **given: Any) -> Callable[[], float]:
        """A whole step: the new parameters."""
        return self._program(make, True, given)

    def _program(self, make, whole: bool, given) -> Callable[[], float]:
        tx = make()
        # Not the first step, which draws the arrays that a family keeps.
        state = tx.init(self.params)
        state = state._replace(count=jnp.int32(1), proj=jax.tree.map(_unit, state.proj))

        def run(params, state, batch):
            extra: dict[str, Any] = {"layered_value_fn": self.losses(params, batch).value, **given}
            extra["factored_leaves"] = self.learner.factored
            updates, state = tx.update(None, state, params, **extra)
            return optax.apply_updates(params, updates) if whole else state.coeffs

        compiled = jax.jit(run).lower(self.params, state, self.batch).compile()
        return timed(lambda: compiled(self.params, state, self.batch))


def _unit(x: jax.Array) -> jax.Array:
    """Columns of about unit length in the place of a basis: what is in it takes no time."""
    return jnp.full_like(x, x.shape[-2] ** -0.5)


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    """A function that runs once and returns its seconds."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    return once


def rowwise(bench: Bench, rank: int, repeats: int) -> list[dict[str, Any]]:
    """Row-wise directions against plain passes, and against MeZO's for as many directions."""
    make = functools.partial(optim.rowwise, 1e-7, rank=rank, num_queries=bench.rows)
    mezo = functools.partial(dense, num_queries=1)
    found = in_turns(
        {
            "forward": bench.forward(),
            "passes": bench.values(make),
            "step": bench.step(make),
            "mezo": bench.values(mezo),
        },
        repeats,
    )
    what = f"rowwise, rank {rank}, {bench.rows} rows"
    plain, many = 2 * found["forward"], bench.rows * found["mezo"]
    return [
        faster(f"{what}: both signs, s", "two forward passes", found["passes"], plain, 0.9),
        faster(f"{what}: step, s", "two forward passes", found["step"], plain, None),
        faster(f"{what}: both signs, s", f"MeZO's {bench.rows} pairs", found["passes"], many, None),
    ]


def steps(bench: Bench, repeats: int) -> list[dict[str, Any]]:
    """Whole steps against the forward passes that they evaluate."""
    many = {"num_queries": QUERIES, "rank": RANK}
    makers = {
        "zo_muon": functools.partial(optim.zo_muon, 1e-3, **many),
        "subspace_mezo": functools.partial(optim.subspace_mezo, 1e-6, num_queries=1, rank=RANK),
        "lozo": functools.partial(optim.lozo, 1e-7, num_queries=1),
        "mezo": functools.partial(dense, num_queries=1),
    }
    bare = {name: without_draws(make) for name, make in makers.items()}
    bare["mezo"] = without_draws(functools.partial(dense, num_queries=1, sample=flat))
    # Where differences are one-sided the training step knows the loss already, from a pass for its
    # log, which is one of the q + 1.
    given = {name: {"value": jnp.float32(1.0)} if name == "zo_muon" else {} for name in makers}
    programs = {"forward": bench.forward()}
    programs |= {name: bench.step(make, **given[name]) for name, make in makers.items()}
    programs |= {
        f"{name}, no draws": bench.step(make, **given[name]) for name, make in bare.items()
    }
    found, table = in_turns(programs, repeats), []
    for name in makers:
        passes = QUERIES + 1 if name == "zo_muon" else 2
        known = found["forward"] if name == "zo_muon" else 0.0
        peer = f"{passes} forward passes"
        whole = passes * found["forward"]
        goal = 1 / 1.6 if name == "mezo" else None
        table.append(faster(f"{name}: step, s", peer, found[name] + known, whole, goal))
        ours = found[f"{name}, no draws"] + known
        table.append(faster(f"{name}: step without draws, s", peer, ours, whole, 1 / 1.05))
    return table


def query_batch(bench: Bench, repeats: int) -> list[dict[str, Any]]:
    """Queries evaluated together against one after another."""
    programs = {}
    for at_once in (QUERIES, None):
        options = {"num_queries": QUERIES, "rank": RANK, "query_batch": at_once}
        programs[str(at_once)] = bench.step(functools.partial(optim.zo_muon, 1e-3, **options))
    found = in_turns(programs, repeats)
    what = f"zo_muon, {QUERIES} queries at a time: step, s"
    return [faster(what, "one at a time", found[str(QUERIES)], found["None"], None)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=("smollm2", "vit-fashion"), default="smollm2")
    parser.add_argument("--rows", type=int, help="rows of the batch; default: 32, of images 64")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row, of smollm2")
    parser.add_argument("--labels", type=int, default=16, help="labels of a row, of smollm2")
    parser.add_argument("--rank", type=int, default=1, help="rank of a row's direction")
    parser.add_argument("--layers", type=int, help="blocks; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each program")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--output", type=Path, default=OUT)
    args = parser.parse_args(argv)
    if args.shape == "smollm2":
        model = smollm2(args.rows or 32, args.length, args.labels, args.layers)
    else:
        model = vit_fashion(args.rows or 64, args.layers)
    bench = Bench(model)
    result: dict[str, Any] = {
        "device": machine(), "shape": args.shape, "model": model.told, "rows": []
    }  # fmt: skip
    cases = {
        "rowwise": lambda: rowwise(bench, args.rank, args.repeats),
        "step": lambda: steps(bench, args.repeats),
        "query-batch": lambda: query_batch(bench, args.repeats),
    }
    for name in args.only:
        result["rows"] += cases[name]()
    heading = f"Zeroth order on {result['device']}, {args.shape}: {model.told}"
    publish("zeroth_order", result, markdown(heading, result["rows"]), args.output)


if __name__ == "__main__":
    main()
