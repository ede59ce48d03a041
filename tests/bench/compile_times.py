"""Seconds that XLA compiles a step of SIFT for, on the JAX of this interpreter.

    python tests/bench/compile_times.py [--repeats 3]

Run it with two interpreters to compare two releases of JAX, while the machine does nothing else.
The programs are SIFT's update of SmolLM2's parameters, and the whole step (two gradients, update)
that the quickstart takes. Nothing is read from a cache. Each number is the least of the repeats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from optimizers import tree
from timing import machine

from jaxlib_unlearn.optim.spectral.sift import sift
from train.options import optimizers
from train.options.config import replace
from train.planning import programs
from train.presets import quickstart
from train.runtime import sharding

LENGTH, LABELS = 128, 64  # tokens of a row, and how many of them are learned


def update() -> Any:
    """SIFT's update, lowered."""
    tx, shapes = sift(1e-3), tree("smollm2")

    def step(grads: Any, other: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, constraint_grads=other)
        return optax.apply_updates(params, updates), state

    return jax.jit(step).lower(shapes, shapes, jax.eval_shape(tx.init, shapes), shapes)


def whole_step() -> Any:
    """The quickstart's step with SIFT, lowered."""
    config = replace(quickstart.PRESET, optimizer=optimizers.options_of("sift", learning_rate=1e-3))
    mesh = sharding.make_mesh(config.mesh)
    decoder = programs.decoder_of(config)
    made = programs.train_program(config, decoder, mesh, LENGTH, LABELS)
    return made.call.lower(*made.args, **made.static)


def seconds(lowered: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """The least seconds to lower and to compile."""
    times = []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        one = lowered()
        middle = time.perf_counter()
        one.compile()
        times.append((middle - start, time.perf_counter() - middle))
    return min(a for a, _ in times), min(b for _, b in times)


def main() -> None:
    """Print a row a program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    jax.config.update("jax_enable_compilation_cache", False)
    print(machine("jaxlib"))
    for name, lowered in {"SIFT update, SmolLM2": update, "quickstart step": whole_step}.items():
        lower, compiled = seconds(lowered, repeats)
        print(f"{name}: lowered in {lower:.1f} s, compiled in {compiled:.1f} s")


if __name__ == "__main__":
    main()
