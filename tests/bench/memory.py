"""Bytes of a whole unlearning step of SmolLM2-135M, by optimizer: compiled, nothing runs.

    python tests/bench/memory.py [--rows 8] [--length 128] [--output runs/bench]

The step is the one of `train.unlearn`: gradient difference with a retain loss, float32, activations
kept (no remat), the state donated. MiB are those of one device: arguments (parameters, optimizer
state, batches), results and temporaries.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxlib_unlearn.objectives import ObjectiveConfig, resolve
from models.decoder import Decoder, DecoderConfig
from train.loop import step_bytes
from train.optimizers import OPTIMIZERS, OptimizerConfig, build
from train.step import TrainState, make_step

REPO = Path(__file__).resolve().parent.parent.parent
SMOLLM2 = DecoderConfig(49152, 576, 1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64)


def batch(rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one stream; half of the tokens are answers."""
    ints = ("tokens", "positions", "segment_ids")
    shapes = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in ints}
    labels = (rows, length // 2)
    shapes |= {name: jax.ShapeDtypeStruct(labels, jnp.int32) for name in ("label_index", "targets")}
    shapes["target_mask"] = jax.ShapeDtypeStruct(labels, jnp.float32)
    return shapes | {"row_id": jax.ShapeDtypeStruct((rows,), jnp.int32)}


def rows(config: DecoderConfig, size: int, length: int, names=tuple(OPTIMIZERS)) -> Iterator[str]:
    """The lines of the table, as they are measured."""
    decoder = Decoder(config)
    params = decoder.shapes()
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)) / 2**20
    objective, options = resolve(ObjectiveConfig("graddiff", retain="nll"))
    batches = {name: batch(size, length) for name in objective.streams}
    yield "| optimizer | optimizer state, MiB | whole step, MiB | step / weights |"
    yield "|---|---|---|---|"
    for name in names:
        tx, schedule, needs = build(OptimizerConfig(name), 100)
        step = make_step(decoder, objective, options, tx, schedule, needs=needs)
        opt_state = jax.eval_shape(tx.init, params)
        state = TrainState(params, opt_state, jax.ShapeDtypeStruct((), jnp.int32))
        compiled = jax.jit(step, donate_argnums=0).lower(state, None, batches).compile()
        kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(opt_state)) / 2**20
        total = (step_bytes(compiled) or 0) / 2**20
        yield f"| {name} | {kept:.0f} | {total:.0f} | {total / weights:.2f} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8, help="of each stream")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--output", type=Path, default=REPO / "runs" / "bench")
    args = parser.parse_args(argv)
    found = []
    for row in rows(SMOLLM2, args.rows, args.length):
        print(row, flush=True)
        found.append(row)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "memory.md").write_text("\n".join(found) + "\n")


if __name__ == "__main__":
    main()
