"""AdamW, Muon, NorMuon and TEON on pretrain-tiny: `make pretrain-table` (80 minutes on one core).

    python tests/bench/pretrain_table.py [--only grid|ablations] [--text FOLDER] [--tokens N]

Four or five learning rates each on seed 0, the best of each on seeds 1 and 2, and differences
paired by seed, whoever wins; then one change of TEON at a time, on seed 0. Every run is `python -m
train.pretrain pretrain-tiny ...` in a process of its own, with a folder below `--output`; what is
there undamaged is not computed again, and a run that was stopped goes on. `--text` trains on the
texts of a folder in place of the installed packages. A rate that is best at the end of its grid is
marked. A page overlays the losses of the best rates and of the changes.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tables import ROOT, head, overlay, ran, row, write

OUT = ROOT / "runs" / "bench" / "pretrain"
SEEDS = (0, 1, 2)
GRID: dict[str, tuple[float, ...]] = {
    "adamw": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "muon": (0.005, 0.01, 0.02, 0.04),
    "normuon": (0.005, 0.01, 0.02, 0.04),
    "teon": (0.005, 0.01, 0.02, 0.04),
}
# One change of TEON's row each.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "K 1 (Muon, without Nesterov)": ("--optimizer.group-size", "1"),
    "K 2, axis in, q/k/v, Polar Express": (),
    "K 4": ("--optimizer.group-size", "4"),
    "axis out": ("--optimizer.axis", "out"),
    "q/k/v and o": ("--optimizer.groups", "qkvo"),
    "q/k/v, o and MLP": ("--optimizer.groups", "all"),
    "Jordan": ("--optimizer.orthogonalize", "jordan"),
    "svd": ("--optimizer.orthogonalize", "svd"),
    "Nesterov": ("--optimizer.nesterov",),
}


class Job(NamedTuple):
    """One run: optimizer, learning rate, seed, and further options."""

    optimizer: str
    rate: float
    seed: int
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its folder."""
        words = [word.removeprefix("--optimizer.") for word in self.more]
        return "-".join([self.optimizer, f"{self.rate:g}", f"seed{self.seed}", *words])


Train = Callable[[Job], Mapping[str, float]]  # what summary.json says of the model


def grid(train: Train) -> tuple[list[str], dict[str, float]]:
    """The lines of the table of rates and seeds, and the best rate of each optimizer."""
    first = {name: {r: train(Job(name, r, 0)) for r in rates} for name, rates in GRID.items()}
    best = {n: min(found, key=lambda r: found[r]["val_perplexity"]) for n, found in first.items()}
    lines = head("optimizer", "rate", "validation perplexity", "training perplexity", "tokens a s")
    for name, found in first.items():
        for rate, flat in found.items():
            edge = " (end of the grid)" if rate in (GRID[name][0], GRID[name][-1]) else ""
            mark = f" **best**{edge}" if rate == best[name] else ""
            values = (flat["val_perplexity"], flat["train_perplexity"])
            shown = [f"{value:.3f}" for value in values]
            speed = flat["tokens_per_second"]
            told = "-" if speed is None else f"{speed:.0f}"
            lines.append(row(name, f"{rate:g}{mark}", *shown, told))
    losses = {
        name: [math.log(train(Job(name, best[name], seed))["val_perplexity"]) for seed in SEEDS]
        for name in GRID
    }
    lines += ["", "At the best rates, nats a held-out token; differences are paired by seed.", ""]
    others = [name for name in GRID if name != "teon"]
    lines += head("optimizer", *(f"seed {s}" for s in SEEDS), "mean ± sd",
                  *(f"minus {name}" for name in others))  # fmt: skip
    for name, values in losses.items():
        apart = [
            "-" if name == other else spread(paired(values, losses[other]), "+") for other in others
        ]
        lines.append(row(name, *(f"{v:.4f}" for v in values), spread(values), *apart))
    return lines, best


def ablations(train: Train, rate: float) -> list[str]:
    """The lines of the table of changes to TEON, one seed each, at one learning rate."""
    lines = head("TEON", "validation perplexity", "nats minus the paper's", "tokens a s")
    found = {name: train(Job("teon", rate, 0, more)) for name, more in ABLATIONS.items()}
    usual = next(flat for name, flat in found.items() if not ABLATIONS[name])
    for name, flat in found.items():
        apart = math.log(flat["val_perplexity"]) - math.log(usual["val_perplexity"])
        speed = flat["tokens_per_second"]
        told = "-" if speed is None else f"{speed:.0f}"
        lines.append(row(name, f"{flat['val_perplexity']:.3f}", f"{apart:+.4f}", told))
    return lines


def paired(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Differences by seed."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):{sign}.4f} ± {statistics.stdev(values):.4f}"


def run(job: Job, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """`train.pretrain` in a process; the numbers of its summary."""
    root = folder / job.name
    command = ["pretrain-tiny", "--optimizer.name", job.optimizer, "--seed", str(job.seed)]
    command += ["--optimizer.learning-rate", str(job.rate), *job.more, *options]
    command += ["--output", str(root), "--data.cache", str(folder / "corpora")]
    return ran("train.pretrain", command, root)["pretrained"]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("grid", "ablations"), help="one of the two tables")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="texts to train on")
    parser.add_argument("--tokens", type=int, metavar="N", help="to train on, for a first look")
    parser.add_argument("--rate", type=float, help="of TEON in the ablations; default: the best")
    parser.add_argument("--output", type=Path, default=OUT, metavar="DIR")
    args = parser.parse_args(argv)
    options: list[str] = []
    folder = args.output.resolve()
    if args.text is not None:
        options += ["--data.source", "text", "--data.path", str(args.text.resolve())]
        mark = hashlib.sha256(str(args.text.resolve()).encode()).hexdigest()[:8]
        folder /= f"text-{args.text.resolve().name}-{mark}"
    if args.tokens is not None:
        options += ["--train.tokens", str(args.tokens)]
        folder /= f"tokens-{args.tokens}"

    @functools.cache
    def train(job: Job) -> Mapping[str, float]:
        return run(job, folder, options)

    lines: list[str] = []
    rate, overlaid = args.rate, []
    if args.only != "ablations" or rate is None:
        lines, best = grid(train)
        rate = best["teon"] if rate is None else rate
        overlaid += [Job(name, best[name], seed) for name in GRID for seed in SEEDS]
    if args.only != "grid":
        overlaid += [Job("teon", rate, 0, more) for more in ABLATIONS.values() if more]
        lines += ["", f"TEON at rate {rate:g}, seed 0, one change at a time.", ""]
        lines += ablations(train, rate)
    write(lines, folder / "pretrain_table.md")
    overlay([folder / job.name for job in overlaid], folder / "losses.html")


if __name__ == "__main__":
    main(sys.argv[1:])
