"""Steps of training against each other, as ratios: `python tests/bench/steps.py` (minutes).

    python tests/bench/steps.py [--only muon teon loader r2mu] [--repeats 5] [--output runs/bench]

The programs are those that `train.plan` compiles for a preset: the step a run takes, of shapes that
are filled with numbers here, so no data is needed and no weights. Sides take turns, and each number
is a median. Ratio: ours / the other's, below 1 ours is faster (`loader`: above 1); the bound is
what the project promises.

- muon, teon: a step of pretrain-tiny against AdamW's.
- loader: tokens a second that rows of a corpus are read at, against those that AdamW's step takes.
- r2mu: a step of R2MU on SmolLM2-135M (three MLP matrices of blocks 5 to 7) against NPO's, which
  trains all of it, at as many tokens.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import OUT, in_turns, machine, markdown, publish, within

from jaxlib_unlearn.objectives import options_of
from models.decoder.model import Decoder
from train.data.token_file import Tokens
from train.data.token_rows import TokenRows
from train.jobs import new_models
from train.options.config import RunConfig, SelectConfig, UnlearnConfig, replace
from train.planning import pretraining_program, programs
from train.presets import pretraining, r2mu_smollm2
from train.runtime import hugepages, sharding

BOUNDS = {"muon": 1.10, "teon": 1.15, "loader": 20.0, "r2mu": 0.35}
LENGTH = 128  # tokens of a row of R2MU and NPO
ROWS = 4  # of each of R2MU's four streams; NPO's two have twice as many
CORPUS = 2**21  # tokens that the loader reads from

Stepper = Callable[[], float]


def filled(shapes: Any, vocab: int) -> Any:
    """Arrays of the shapes of a program's batches: random tokens, one document, all labels."""
    draw = np.random.default_rng(0)

    def fill(path: Any, shape: Any) -> jax.Array:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name in ("tokens", "targets"):
            value = draw.integers(0, vocab, shape.shape)
        elif name in ("positions", "target_index"):
            value = np.broadcast_to(np.arange(shape.shape[-1]), shape.shape)
        elif name == "row_id":
            value = np.arange(shape.shape[0])
        else:
            value = np.ones(shape.shape)
        return jax.device_put(jnp.asarray(value, shape.dtype), shape.sharding)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def stepper(program: programs.AbstractProgram, decoder: Decoder) -> Stepper:
    """A function that takes the next step of a program and returns its seconds."""
    state, hyper, frozen, batches = program.args
    draw = np.random.default_rng(1)

    def weights(shape: Any) -> jax.Array:
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            return jnp.zeros(shape.shape, shape.dtype)
        return jnp.asarray(0.02 * draw.standard_normal(shape.shape, np.float32), shape.dtype)

    def zeros(shape: Any) -> jax.Array:
        return jnp.zeros(shape.shape, shape.dtype)

    start = state._replace(
        params=jax.tree.map(weights, state.params),
        opt_state=jax.tree.map(zeros, state.opt_state),
        step=zeros(state.step),
        objective=jax.tree.map(weights, state.objective),
    )
    rates = jax.tree.map(lambda shape: jnp.full(shape.shape, 1e-4, shape.dtype), hyper)
    rest = jax.tree.map(weights, frozen)
    held, batch = [start], filled(batches, decoder.config.vocab_size)

    def step() -> float:
        since = time.perf_counter()
        held[0], found = program.call(held[0], rates, rest, batch)
        jax.block_until_ready((held[0], found))
        return time.perf_counter() - since

    return step


def tiny(name: str, mesh: Any) -> tuple[Any, Decoder, Stepper]:
    """pretrain-tiny with an optimizer as the preset tunes it: configuration, model and step."""
    preset = pretraining.PRESETS["pretrain-tiny"]
    config = replace(preset.PRESET, optimizer=preset.OPTIMIZERS[name][0])
    decoder = new_models.decoder_of(config)
    program = pretraining_program.pretraining_program(config, decoder, mesh)
    return config, decoder, stepper(program, decoder)


def optimizer_rows(names: tuple[str, ...], mesh: Any, repeats: int) -> list[dict[str, Any]]:
    """Muon and TEON against AdamW."""
    steppers = {name: tiny(name, mesh)[2] for name in ("adamw", *names)}
    seconds = in_turns(steppers, repeats)
    return [
        within(
            f"{name}: a step of pretrain-tiny, s",
            "adamw",
            seconds[name],
            seconds["adamw"],
            BOUNDS[name],
        )
        for name in names
    ]


def loader_row(mesh: Any, repeats: int) -> dict[str, Any]:
    """Rows read from a file of tokens and put on the device, in tokens a second."""
    config, decoder, step = tiny("adamw", mesh)
    context, tokens = config.data.context, config.train.batch_tokens
    draw = np.random.default_rng(2)
    starts = np.unique(np.append(0, draw.integers(0, CORPUS, CORPUS // 700)))
    with tempfile.TemporaryDirectory() as folder:
        ids = draw.integers(0, decoder.config.vocab_size, CORPUS).astype(np.uint16)
        ids.tofile(Path(folder) / "tokens")
        mapped = np.memmap(Path(folder) / "tokens", np.uint16, "r")
        stream = TokenRows(Tokens(mapped, starts, ""), context)
        numbers = itertools.count()

        def load() -> float:
            since = time.perf_counter()
            number = next(numbers)
            first = number * (tokens // context)
            order = stream.epoch_order(0, "train", 0)
            rows = order[np.arange(first, first + tokens // context) % len(stream)]
            batch = stream.batch(rows, stream.shape(rows), number)
            jax.block_until_ready(sharding.put_batch(batch, mesh))
            return time.perf_counter() - since

        seconds = in_turns({"loader": load, "step": step}, repeats)
        speeds = {name: tokens / value for name, value in seconds.items()}
    work, other = "loader: tokens a second", "those of AdamW's step"
    return within(work, other, *speeds.values(), BOUNDS["loader"])


def r2mu_row(mesh: Any, repeats: int, base: RunConfig = r2mu_smollm2.PRESET) -> dict[str, Any]:
    """R2MU's step on three matrices against NPO's on the whole model."""
    chosen = {
        "r2mu": replace(base, unlearn=UnlearnConfig(batch_size=ROWS)),
        "npo": replace(
            base,
            unlearn=UnlearnConfig(batch_size=2 * ROWS),
            objective=options_of("npo"),
            train=SelectConfig(),
        ),
    }
    decoder = programs.decoder_of(base)
    seconds = in_turns(
        {
            name: stepper(
                programs.train_program(config, decoder, mesh, LENGTH, LENGTH // 2), decoder
            )
            for name, config in chosen.items()
        },
        repeats,
    )
    work = f"r2mu: a step of {4 * ROWS * LENGTH} tokens on {base.model.path}, s"
    return within(work, "npo", *seconds.values(), BOUNDS["r2mu"])


def main(argv: list[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BOUNDS, default=list(BOUNDS))
    parser.add_argument("--repeats", type=int, default=5, help="counted steps of each side")
    parser.add_argument("--output", type=Path, default=OUT)
    args = parser.parse_args(argv)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    rows: list[dict[str, Any]] = []
    if names := tuple(name for name in ("muon", "teon") if name in args.only):
        rows += optimizer_rows(names, mesh, args.repeats)
    if "loader" in args.only:
        rows.append(loader_row(mesh, args.repeats))
    if "r2mu" in args.only:
        rows.append(r2mu_row(mesh, args.repeats))
    text = markdown(f"Steps on {machine()}, seed 0", rows)
    publish("steps", rows, text, args.output)


if __name__ == "__main__":
    hugepages.ask()  # as the programs of `train` do
    main()
