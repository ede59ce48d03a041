"""Bytes and products of a whole unlearning step of SmolLM2-135M, compiled without running it.

    python tests/bench/memory.py [--rows 8] [--length 128] [--only optimizers | knobs]

The step is that of `train.unlearn`: gradient difference with a retain loss, float32, the state
donated. The first table compares optimizers; the second compares what saves memory: remat
policies, the dtype of first moments, adapters. MiB are those of one device; arguments are
parameters, optimizer state and batches.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_unlearn.objectives import options_of as objective_of
from jaxlib_unlearn.objectives import resolve
from models.decoder import lora
from models.decoder.learner import DecoderLearner
from models.decoder.model import REMAT, Decoder, DecoderConfig
from train.costs.flops import flops
from train.engine.loop import step_bytes
from train.engine.step import ALL, Binding, Losses, TrainState, make_step
from train.options.optimizers import OPTIMIZERS, build, over_rows
from train.options.optimizers import options_of as optimizer_of

REPO = Path(__file__).resolve().parent.parent.parent
SMOLLM2 = DecoderConfig(49152, 576, 1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64)
MIB = 2**20


class Knobs(NamedTuple):
    """One line of the second table."""

    optimizer: str = "adamw"
    remat: str = "none"
    state_dtype: str = "float32"
    rank: int | None = None


KNOBS = (
    *(Knobs(remat=remat) for remat in REMAT),
    Knobs(remat="dots", state_dtype="bfloat16"),
    Knobs("muon", "dots"),
    Knobs("muon", "dots", "bfloat16"),
    Knobs("sift", "dots"),
    Knobs("sift", "dots", "bfloat16"),
    *(Knobs(remat=remat, rank=16) for remat in REMAT),
    Knobs("muon", "full", rank=16),
)


class Cost(NamedTuple):
    """The cost of a compiled step: bytes, and floating-point operations of its products."""

    state: int
    arguments: int
    temporaries: int
    whole: int
    flops: int


def batch(rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one stream; half of the tokens are answers."""
    ints = ("tokens", "positions", "segment_ids")
    shapes = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in ints}
    labels = (rows, length // 2)
    shapes |= {name: jax.ShapeDtypeStruct(labels, jnp.int32) for name in ("label_index", "targets")}
    shapes["target_mask"] = jax.ShapeDtypeStruct(labels, jnp.float32)
    return shapes | {"row_id": jax.ShapeDtypeStruct((rows,), jnp.int32)}


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def cost(config: DecoderConfig, rows: int, length: int, knobs: Knobs) -> Cost:
    """Compile one step and read its cost."""
    decoder = Decoder(config, knobs.remat)
    trained, frozen, binding = decoder.shapes(), None, ALL
    if knobs.rank is not None:
        frozen, binding = trained, Binding(functools.partial(lora.bind, scale=1.0))
        trained = jax.eval_shape(lambda: lora.init(frozen, knobs.rank, list(lora.kernels(frozen))))
    objective, options = resolve(objective_of("graddiff", retain="nll"))
    batches = {name: batch(rows, length) for name in objective.streams}
    reads = "state_dtype" in OPTIMIZERS[knobs.optimizer].own
    more = {"state_dtype": knobs.state_dtype} if reads else {}
    optimizer = over_rows(optimizer_of(knobs.optimizer, **more), rows)
    tx, schedule, needs = build(optimizer, 100)
    step = make_step(
        DecoderLearner(decoder), objective, options, tx, schedule, needs=needs, binding=binding
    )

    def dead(params, frozen, batches):  # weights depend on masks alone: XLA drops this pass
        return Losses(
            DecoderLearner(decoder), objective, options, params, frozen, batches, 1, binding
        ).weights

    opt_state = jax.eval_shape(tx.init, trained)
    state = TrainState(trained, opt_state, jax.ShapeDtypeStruct((), jnp.int32))
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batches).compile()
    memory = compiled.memory_analysis()
    return Cost(
        bytes_of(opt_state),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        step_bytes(compiled) or 0,
        flops(step, state, frozen, batches) - flops(dead, trained, frozen, batches),
    )


def rows(config: DecoderConfig, size: int, length: int, names=tuple(OPTIMIZERS)) -> Iterator[str]:
    """The lines of the table of optimizers, one by one as they are measured."""
    weights = bytes_of(Decoder(config).shapes()) / MIB
    yield "| optimizer | optimizer state, MiB | whole step, MiB | step / weights |"
    yield "|---|---|---|---|"
    for name in names:
        found = cost(config, size, length, Knobs(name))
        total = found.whole / MIB
        yield f"| {name} | {found.state / MIB:.0f} | {total:.0f} | {total / weights:.2f} |"


def knob_rows(config: DecoderConfig, size: int, length: int, knobs=KNOBS) -> Iterator[str]:
    """The lines of the table of memory savings, one by one as they are measured."""
    yield (
        "| optimizer | trained | remat | first moments | optimizer state, MiB | arguments, MiB | "
        "temporaries, MiB | whole step, MiB | products, TFLOP |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for one in knobs:
        found = cost(config, size, length, one)
        trained = "all" if one.rank is None else f"LoRA, rank {one.rank}"
        cells = [one.optimizer, trained, one.remat, one.state_dtype]
        cells += [f"{x / MIB:.0f}" for x in found[:4]] + [f"{found.flops / 1e12:.2f}"]
        yield f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8, help="of each stream")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--only", choices=("optimizers", "knobs"), help="one of the two tables")
    parser.add_argument("--output", type=Path, default=REPO / "runs" / "bench")
    args = parser.parse_args(argv)
    tables = {"optimizers": ("memory.md", rows), "knobs": ("memory_knobs.md", knob_rows)}
    args.output.mkdir(parents=True, exist_ok=True)
    for name, (file, table) in tables.items():
        if args.only in (None, name):
            found = []
            for row in table(SMOLLM2, args.rows, args.length):
                print(row, flush=True)
                found.append(row)
            (args.output / file).write_text("\n".join(found) + "\n")


if __name__ == "__main__":
    main()
