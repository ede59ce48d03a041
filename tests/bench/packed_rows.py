"""Packed rows of whole examples against rows padded to the longest: padding, and time of a step.

    python tests/bench/packed_rows.py --data DIR [--output runs/bench]

DIR holds GSM8K's files: 64 of its solutions are learned by a small decoder in one step, forward and
backward, on one device; the best of three. Padding is that of all solutions in the files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from timing import OUT, publish

from jaxlib_unlearn import objectives
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from train.data.bpe import train_bpe
from train.data.packed_rows import PackedRows, pack_rows
from train.engine.step import Losses
from train.jobs import encoding
from train.jobs.finetuning_options import CondenseConfig, ReasoningData
from train.jobs.sources import load

MODEL = DecoderConfig(2048, 256, 768, 4, 4, 4, 64)
GOALS = {"padding": 0.08, "time": 0.6}


def seconds(decoder: Decoder, params: Any, rows: PackedRows, repeats: int) -> float:
    """Of the loss and the gradient of all rows in one batch."""
    row, options = objectives.resolve("nll")

    @jax.jit
    def step(params, batch):
        losses = Losses(DecoderLearner(decoder), row, options, params, {}, {"train": batch})
        return jax.value_and_grad(losses.value)(params)

    batch = jax.device_put(rows.batch(np.arange(len(rows)), (), 0))
    jax.block_until_ready(step(params, batch))
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(step(params, batch))
        spent.append(time.perf_counter() - began)
    return min(spent)


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=OUT)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--row-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    data = ReasoningData(source="gsm8k", path=args.data, test_rows=1, row_tokens=args.row_tokens)
    rows = load(data, 0).train
    tokenizer = train_bpe(encoding.texts(rows), MODEL.vocab_size)
    whole = CondenseConfig(tau=1.0)
    packed = encoding.learned(rows, tokenizer, whole, data, args.row_tokens, 0).stream
    some = [piece for row in packed.rows for piece in row]
    some = [some[i] for i in np.random.default_rng(0).permutation(len(some))[: args.examples]]
    decoder = Decoder(MODEL)
    params = decoder.init(jax.random.key(0))
    times = [
        seconds(decoder, params, pack_rows(some, args.row_tokens, mode), args.repeats)
        for mode in ("first-fit", "none")
    ]
    found = {"padding": packed.waste, "time": times[0] / times[1]}
    lines = [
        "| work | packed | padded to the longest | ratio | goal |",
        "| --- | --- | --- | --- | --- |",
        f"| padding of {len(packed)} rows | {packed.waste:.1%} | "
        f"{pack_rows(list(packed.pieces()), args.row_tokens, 'none').waste:.1%} | | "
        f"{GOALS['padding']:.0%} |",
        f"| step of {len(some)} examples, s | {times[0]:.3f} | {times[1]:.3f} | "
        f"{found['time']:.2f} | {GOALS['time']} |",
    ]
    publish("packed_rows", found, "\n".join([*lines, ""]), args.output)


if __name__ == "__main__":
    main()
