"""Update time and FLOPs of the optimizers on real parameter trees, compared with optax and torch.

    python tests/bench/optimizers.py [--tree smollm2 gpt2] [--repeats 3] [--output runs/bench]

A step is what a training loop does with a gradient: `update` and `apply_updates` in one compiled
program whose parameters and state are donated. Contenders alternate step by step, so both sides of
a ratio see the same machine; each number is a median. Ratios are theirs / ours: above 1, ours is
faster (or needs fewer operations). A goal is a ratio to reach; methods that do more work than
their peer have none. torch, if it is installed, runs in a separate process, whose threads are idle
while JAX computes; in "float32" its own code runs without the cast to bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import OUT, faster, machine, markdown, publish, shown

from jaxlib_unlearn.optim import matrices, orthogonalize
from jaxlib_unlearn.optim.sign import sign_momentum
from jaxlib_unlearn.optim.sophia import sophia
from jaxlib_unlearn.optim.spectral.muon import muon
from jaxlib_unlearn.optim.spectral.sift import sift
from jaxlib_unlearn.optim.spectral.teon import teon
from train.costs.flops import count

# Layers, width, MLP width, key-value width, vocabulary.
SIZES = {
    "smollm2": (30, 576, 1536, 192, 49152),
    "gpt2": (12, 768, 3072, 768, 50257),
    "tiny": (3, 16, 32, 8, 64),
}
SLOW = 60.0  # seconds: a contender whose step takes longer is timed once


def tree(name: str) -> dict[str, Any]:
    """The shapes of a model's parameters, blocks stacked, kernels (in, out)."""
    layers, d, f, kv, vocab = SIZES[name]
    if name == "gpt2":
        dense = {"c_attn": (d, 3 * d), "c_proj": (d, d), "c_fc": (d, f), "c_out": (f, d)}
        biases = {n: {"bias": (layers, out)} for n, (_, out) in dense.items()}
        tables = {"embed": {"embedding": (vocab, d)}, "wpe": {"embedding": (1024, d)}}
    else:
        dense = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d)}
        dense |= {"gate": (d, f), "up": (d, f), "down": (f, d)}
        biases, tables = {}, {"embed": {"embedding": (vocab, d)}}
    blocks: dict[str, Any] = {
        n: {"kernel": (layers, *s)} | biases.get(n, {}) for n, s in dense.items()
    }
    blocks |= {n: {"scale": (layers, d)} for n in ("norm1", "norm2")}
    shapes = tables | {"layers": blocks, "final_norm": {"scale": (d,)}}
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )


def dimension_numbers(params: Any) -> Any:
    """What `optax.contrib.muon` has to be given to orthogonalise the same matrices."""
    axes = matrices.resolve(params)
    numbers = [a and optax.contrib.MuonDimensionNumbers(a.fan_in, a.fan_out) for a in axes]
    return jax.tree.unflatten(jax.tree.structure(params), numbers)


def optax_muon() -> optax.GradientTransformation:
    return optax.contrib.muon(
        1e-3, adam_learning_rate=1e-4, muon_weight_dimension_numbers=dimension_numbers
    )


class Contender(NamedTuple):
    """An optimizer, and whether it takes a second gradient."""

    build: Callable[[], optax.GradientTransformation]
    constraint: bool = False


class Pair(NamedTuple):
    """One line of the table: the contender, its peer, and the ratio to reach."""

    ours: str
    theirs: str
    goal: float | None


ADAM = {"adam_learning_rate": 1e-4}
NARROW = orthogonalize.newton_schulz(dtype=jnp.bfloat16)
CONTENDERS = {
    "muon": Contender(partial(muon, 1e-3, **ADAM)),
    "muon, bfloat16 products": Contender(partial(muon, 1e-3, orthogonalize=NARROW, **ADAM)),
    "teon": Contender(partial(teon, 1e-3, orthogonalize=orthogonalize.newton_schulz(), **ADAM)),
    "sift, rank 64, subspace": Contender(
        partial(sift, 1e-3, rank=64, bases="subspace", **ADAM), constraint=True
    ),
    "sophia": Contender(partial(sophia, 1e-3)),
    "sign_momentum": Contender(partial(sign_momentum, 1e-3)),
    "optax.contrib.muon": Contender(optax_muon),
    "optax.adamw": Contender(partial(optax.adamw, 1e-3)),
}
TORCH = {"torch.optim.Muon, float32": "float32", "torch.optim.Muon": "bfloat16"}
PAIRS = (
    Pair("muon", "optax.contrib.muon", 1.0),
    Pair("muon", "torch.optim.Muon, float32", 1.0),
    Pair("muon, bfloat16 products", "torch.optim.Muon", 1.0),
    Pair("teon", "optax.contrib.muon", None),
    Pair("sift, rank 64, subspace", "optax.contrib.muon", None),
    Pair("sophia", "optax.adamw", 1.0),
    Pair("sign_momentum", "optax.adamw", 1.0),
)


def random_like(shapes: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32)), shapes
    )


def jax_stepper(contender: Contender, shapes: Any, grads: Any) -> Callable[[], float]:
    """A function that takes one step and returns its seconds."""
    tx = contender.build()
    # The same tree reversed: cosines of either sign, so that SIFT fuses about half of it.
    extra = {"constraint_grads": jax.tree.map(lambda g: g[::-1], grads)}

    def step(grads, extra, state, params):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    extra = extra if contender.constraint else {}
    params = random_like(shapes, 0)
    state = tx.init(params)
    compiled = jax.jit(step, donate_argnums=(2, 3)).lower(grads, extra, state, params).compile()
    held = [params, state]
    del params, state

    def run() -> float:
        start = time.perf_counter()
        held[:] = compiled(grads, extra, held[1], held[0])
        jax.block_until_ready(held)
        return time.perf_counter() - start

    return run


# The other process reads a line, takes a step and writes the seconds that it took.
TORCH_PROGRAM = """
import json, sys, time
import torch

shapes, dtype = json.loads(sys.argv[1])
if dtype == "float32":
    torch.Tensor.bfloat16 = lambda self: self.clone()
generator = torch.Generator().manual_seed(0)
groups = {"matrices": [], "rest": []}
for kind, shape in shapes:
    p = torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator))
    p.grad = 0.02 * torch.randn(shape, generator=generator)
    groups[kind].append(p)
optimizers = [
    torch.optim.Muon(groups["matrices"], lr=1e-3, weight_decay=0.0),
    torch.optim.AdamW(groups["rest"], lr=1e-4, weight_decay=0.0),
]
print("ready", torch.__version__, flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    for optimizer in optimizers:
        optimizer.step()
    print(time.perf_counter() - start, flush=True)
"""


@contextlib.contextmanager
def torch_stepper(shapes: Any, dtype: str):
    """Yields a function that takes a step in the torch process and returns its seconds, or None.

    Kernels are (out, in), one parameter per layer, as in torch. None: torch is not installed.
    """
    flat = []
    for leaf, axes in zip(jax.tree.leaves(shapes), matrices.resolve(shapes), strict=True):
        if axes is None:
            flat.append(("rest", leaf.shape))
        else:
            layers, fan_in, fan_out = axes.sizes(leaf.shape)
            flat += [("matrices", (fan_out, fan_in))] * layers
    command = [sys.executable, "-c", TORCH_PROGRAM, json.dumps([flat, dtype])]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        started = process.stdout.readline()
        if not started.startswith("ready"):
            reason = (process.stderr.read().strip().splitlines() or ["it wrote nothing"])[-1]
            print(f"no torch: {reason}", file=sys.stderr)
            yield None
            return
        stdin, stdout = process.stdin, process.stdout

        def run() -> float:
            stdin.write("\n")
            stdin.flush()
            return float(stdout.readline())

        yield run
        stdin.close()


def time_in_turns(steppers: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each; the first step of everything that is not slow is not counted.

    The order is reversed every time, so that no contender always follows the same one.
    """
    seconds: dict[str, list[float]] = {}
    for name, run in steppers.items():
        first = run()
        seconds[name] = [first] if first > SLOW else []
    for turn in range(repeats):
        for name, run in list(steppers.items())[:: 1 if turn % 2 else -1]:
            if not seconds[name] or seconds[name][0] <= SLOW:
                seconds[name].append(run())
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_flops(name: str, shapes: Any) -> tuple[int, str]:
    """FLOPs of an update, and the decompositions that are not counted."""
    contender = CONTENDERS[name]
    tx = contender.build()
    state = jax.eval_shape(tx.init, shapes)
    extra = {"constraint_grads": shapes} if contender.constraint else {}
    found = count(lambda g, s, p, extra: tx.update(g, s, p, **extra), shapes, state, shapes, extra)
    return found.flops, ", ".join(f"{n} {what}" for what, n in found.uncounted.items())


def bench(name: str, repeats: int, with_torch: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one tree, and a line for each count of matrix products."""
    shapes = tree(name)
    grads = random_like(shapes, 1)
    rows, seconds, notes = [], {}, []
    # Slow and fast ones apart: a step of seconds between two of milliseconds cools every cache.
    light = {"sophia", "sign_momentum", "optax.adamw"}
    heavy = [n for n in CONTENDERS if n not in light]
    for group in (heavy, [n for n in CONTENDERS if n in light]):
        with contextlib.ExitStack() as stack:
            steppers = {n: jax_stepper(CONTENDERS[n], shapes, grads) for n in group}
            for peer, dtype in TORCH.items() if with_torch and "muon" in group else ():
                stepper = stack.enter_context(torch_stepper(shapes, dtype))
                if stepper is not None:
                    steppers[peer] = stepper
            seconds |= time_in_turns(steppers, repeats)

    for ours, theirs, goal in PAIRS:
        if ours in seconds and theirs in seconds:
            times = seconds[ours], seconds[theirs]
            rows.append(faster(f"{name}: {ours}, s", theirs, *times, goal))
    operations = {n: measure_flops(n, shapes) for n in CONTENDERS}
    for ours, theirs, goal in PAIRS:
        if ours in operations and theirs in operations and operations[theirs][0]:
            counts = operations[ours][0], operations[theirs][0]
            rows.append(faster(f"{name}: {ours}, FLOPs", theirs, *counts, goal))
    for n, (flops, rest) in operations.items():
        if not flops:
            continue
        notes.append(f"- {name}, {n}: {flops:.3e} FLOPs" + (f", and {rest}" if rest else ""))
    return rows, notes


def cell(line: Mapping[str, Any], key: str) -> str:
    """Seconds and ratios as others; counts with their exponent."""
    value = line[key]
    counted = key in ("ours", "theirs") and not line["work"].endswith(", s")
    return f"{value:.3e}" if counted else shown(value)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tree", nargs="+", choices=SIZES, default=["smollm2", "gpt2"])
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each contender")
    parser.add_argument("--output", type=Path, default=OUT)
    parser.add_argument("--no-torch", action="store_true", help="leave torch out")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"device": machine("optax"), "rows": []}
    notes: list[str] = []
    for name in args.tree:
        rows, more = bench(name, args.repeats, not args.no_torch)
        result["rows"] += rows
        notes += more
    counted = "FLOPs of the products in one update (of two branches, as SIFT has, the dearer one):"
    heading = f"Optimizers on {result['device']}"
    text = markdown(heading, result["rows"], [counted, "", *notes], cell)
    publish("optimizers", result, text, args.output)


if __name__ == "__main__":
    main()
