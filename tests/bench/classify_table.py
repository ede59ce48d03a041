"""Zeroth-order methods and AdamW on one preset of train.classify, at an equal budget of forwards.

    python tests/bench/classify_table.py sst2-tiny [--only mezo zo-muon ...] [--seeds 0 1 2]
        [--tune N [--factors 0.1 1 10]] [-- --data.path DIR ...]

What follows `--` goes to every run. `sst2-tiny` starts from the preset's export of pretrain-tiny,
`vit-fashion` trains its model in the run. Every method takes the learning rate that its preset
names, or this file (ZO-Muon that only normalises). A page beside the table overlays the accuracy on
the dev rows.

`--tune N` compares these rates, times every factor, on seed 0 with a budget of N forward passes, by
the NLL on the dev rows; a rate that is best at an end is marked. The best rate of a short budget
may be too high for a long one: with the preset's own budget as N the runs are those of the table.

"rowwise, minutes of mezo" is a row of its own: as many forward passes as row-wise directions make
in the time that MeZO needs for the budget, both timed over 2000 passes, one after the other. Where
these are within 5 % of the budget the row is that of the budget: times are no more exact than that.
Minutes are those of the training steps alone, and mean something where the machine had nothing else
to do. Every run is `python -m train.classify PRESET ...` in a process of its own, with a folder
below `--output` that is called after its rate; what is there undamaged is not computed again, and a
run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tables import ROOT, cut, head, overlay, place, ran, row, write

from train.presets.classify import PRESETS
from train.runtime.steplog import read_steps

OUT = ROOT / "runs" / "bench" / "classify"
LOOKS = 5  # of the curve that the table shows
TIMED = 2000  # forward passes of the runs that say how fast a method is
SAME = 0.05  # share of a budget below which equal minutes are equal passes
FACTORS = (0.1, 1.0, 10.0)  # of a preset's rate, which are tried


class Method(NamedTuple):
    """A row of the table.

    Args:
        optimizer: its name.
        more: options beside the preset's.
        minutes_of: the method whose training time it is given, in place of an equal budget.
        rates: by preset, its learning rate where that is not the optimizer's.
    """

    optimizer: str
    more: tuple[str, ...] = ()
    minutes_of: str | None = None
    rates: Mapping[str, float] = MappingProxyType({})


METHODS = {
    "adamw": Method("adamw"),
    "mezo": Method("mezo"),
    "zo-muon": Method("zo-muon"),
    "zo-muon, normalise only": Method(
        "zo-muon", ("--optimizer.orthogonalize", "normalize"), rates={"vit-fashion": 0.0333333}
    ),
    "subspace-mezo": Method("subspace-mezo"),
    "rowwise": Method("rowwise"),
    "rowwise, minutes of mezo": Method("rowwise", minutes_of="mezo"),
}


class Job(NamedTuple):
    """One run; `forwards` None is the preset's, a group a folder of its own among the runs."""

    method: str
    seed: int
    rate: float
    forwards: int | None = None
    group: str = ""

    @property
    def name(self) -> str:
        """Of its folder."""
        method = self.method.replace(", ", "-").replace(" ", "-")
        parts = [method, f"seed{self.seed}", f"rate{self.rate:g}"]
        parts += [] if self.forwards is None else [f"forwards{self.forwards}"]
        return "-".join(parts)


def rate_of(name: str, preset: str) -> float:
    """The learning rate of a method."""
    method = METHODS[name]
    usual = PRESETS[preset].OPTIMIZERS[method.optimizer][0].learning_rate
    return method.rates.get(preset, usual)


class Outcome(NamedTuple):
    """What a run came to: its models by name, and the dev accuracy over forward passes."""

    models: Mapping[str, Mapping[str, Any]]
    curve: Sequence[tuple[int, float]]


def run(job: Job, preset: str, folder: Path, options: Sequence[str]) -> Outcome:
    """`train.classify` in a process."""
    root = root_of(job, folder)
    command = [*command_of(job, preset), "--stage.cache", str(folder / "cache"), *options]
    models = ran("train.classify", [*command, "--output", str(root)], root)
    return Outcome(models, curve(root / "metrics.jsonl", models["finetuned"]))


def root_of(job: Job, folder: Path) -> Path:
    """Its run folder."""
    return folder / job.group / job.name


def command_of(job: Job, preset: str) -> list[str]:
    """What tells a job from the others."""
    method = METHODS[job.method]
    command = [preset, "--optimizer.name", method.optimizer, *method.more, "--seed", str(job.seed)]
    command += ["--optimizer.learning-rate", str(job.rate)]
    if job.forwards is not None:
        command += ["--train.forwards", str(job.forwards)]
    return command


def curve(path: Path, told: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Forward passes and dev accuracy at every look."""
    passes = told["forwards"] / told["steps"]
    return [
        (round(passes * line["step"]), line["dev_accuracy"])
        for line in read_steps(path)
        if line["stage"] == "finetuned" and "dev_accuracy" in line
    ]


def table(found: Mapping[tuple[str, int], Outcome], names: Sequence[str]) -> list[str]:
    """Test accuracy by seed, what it cost, and the dev accuracy over the budget."""
    seeds = sorted({seed for _, seed in found})
    lines = head("method", *(f"accuracy, seed {s}" for s in seeds), "mean", "prior out", "NLL",
                 "forwards", "minutes", "step, MiB")  # fmt: skip
    start = {seed: out.models["base"] for (_, seed), out in found.items()}
    lines.append(row("before", *accuracies(start, seeds), *means(start.values()), "-", "-", "-"))
    for name in names:
        of = {seed: out.models["finetuned"] for (n, seed), out in found.items() if n == name}
        seconds = [flat["seconds"] for flat in of.values() if flat["seconds"] is not None]
        cost = [f"{max(flat['forwards'] for flat in of.values()):,}"]
        cost += [f"{statistics.mean(seconds) / 60:.1f}" if seconds else "-"]
        cost += [f"{max(flat['step_mib'] for flat in of.values()):.0f}"]
        lines.append(row(name, *accuracies(of, seeds), *means(of.values()), *cost))
    majority = {out.models["majority_accuracy"] for out in found.values()}
    lines += ["", f"Always the commonest label: {', '.join(f'{x:.3f}' for x in sorted(majority))}."]
    lines += ["", "Dev accuracy over forward passes, mean of the seeds.", ""]
    lines += head("method", *(f"{k}/{LOOKS} of the budget" for k in range(1, LOOKS + 1)))
    for name in names:
        curves = [out.curve for (n, _), out in found.items() if n == name]
        cells = []
        for k in range(1, LOOKS + 1):
            values = [nearest(points, k / LOOKS) for points in curves if points]
            cells.append(f"{statistics.mean(values):.3f}" if values else "-")
        lines.append(row(name, *cells))
    return lines


def accuracies(of: Mapping[int, Mapping[str, Any]], seeds: Sequence[int]) -> list[str]:
    """By seed, and their mean."""
    cells = [f"{of[seed]['accuracy']:.3f}" if seed in of else "-" for seed in seeds]
    return [*cells, f"{statistics.mean(flat['accuracy'] for flat in of.values()):.3f}"]


def means(flats: Any) -> list[str]:
    """The accuracy without the prior of the labels, and the NLL."""
    cells = []
    for key in ("accuracy_without_prior", "nll"):
        values = [flat[key] for flat in flats if flat.get(key) is not None]
        cells.append(f"{statistics.mean(values):.3f}" if values else "-")
    return cells


def nearest(points: Sequence[tuple[int, float]], share: float) -> float:
    """The value at the look that is nearest to a share of the budget.

    Example:
        >>> nearest([(10, 0.5), (20, 0.6), (40, 0.9)], 0.6)
        0.6
    """
    wanted = share * points[-1][0]
    return min(points, key=lambda point: abs(point[0] - wanted))[1]


def tuned(found: Mapping[tuple[str, float], Outcome]) -> list[str]:
    """The dev NLL of every method at every rate, and which is best."""
    lines = head("method", "rate", "dev NLL", "dev accuracy")
    for name in dict.fromkeys(name for name, _ in found):
        of = {r: out.models["finetuned"] for (n, r), out in found.items() if n == name}
        best = min(of, key=lambda r: of[r]["dev_nll"])
        for rate, flat in of.items():
            end = " (at the end)" if rate in (min(of), max(of)) else ""
            mark = f" **best**{end}" if rate == best else ""
            values = (flat["dev_nll"], flat["dev_accuracy"])
            lines.append(row(name, f"{rate:g}{mark}", *(f"{value:.4f}" for value in values)))
    return lines


def budget_of(ours: Outcome, theirs: Outcome, budget: int) -> int:
    """The forward passes that `ours` makes in the time of `theirs` for a budget."""
    mine, other = ours.models["finetuned"], theirs.models["finetuned"]
    if mine["seconds"] is None or other["seconds"] is None:
        raise SystemExit("a run was stopped behind its last step, so its time is not known")
    speed = mine["forwards"] / mine["seconds"]
    return round(speed * budget * other["seconds"] / other["forwards"])


def main(argv: list[str]) -> None:
    mine, options = cut(argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("preset", choices=tuple(PRESETS))
    parser.add_argument("--only", nargs="+", choices=tuple(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,), metavar="S")
    parser.add_argument("--tune", type=int, metavar="N", help="compare rates at N forward passes")
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS, metavar="F")
    parser.add_argument("--output", type=Path, default=OUT, metavar="DIR")
    args = parser.parse_args(mine)
    known = PRESETS[args.preset].OPTIMIZERS
    names = args.only or [name for name, method in METHODS.items() if method.optimizer in known]
    rates = {name: rate_of(name, args.preset) for name in names}
    folder = place(args.output / args.preset, options)
    if args.tune is not None:
        forwards = None if args.tune == PRESETS[args.preset].PRESET.train.forwards else args.tune
        tried = [
            (name, float(f"{rates[name] * factor:.6g}"))
            for name in names
            if METHODS[name].minutes_of is None
            for factor in args.factors
        ]
        trials = {
            (name, rate): run(Job(name, 0, rate, forwards), args.preset, folder, options)
            for name, rate in tried
        }
        write(tuned(trials), folder / f"rates-{args.tune}.md")
        return

    @functools.cache
    def outcome(job: Job) -> Outcome:
        return run(job, args.preset, folder, options)

    def job_of(name: str, seed: int) -> Job:
        """A line's run, with the preset's budget or as many passes as fit another's minutes."""
        plain, other = METHODS[name].optimizer, METHODS[name].minutes_of
        if other is None:
            return Job(name, seed, rates[name])
        rate, theirs = rates[name], rate_of(other, args.preset)
        budget = outcome(Job(other, seed, theirs)).models["finetuned"]["forwards"]
        # Its own run where that is no longer.
        short, group = (None, "") if budget <= TIMED else (TIMED, "timed")
        ours = outcome(Job(plain, seed, rate, short, group))
        forwards = budget_of(ours, outcome(Job(other, seed, theirs, short, group)), budget)
        same = abs(forwards / budget - 1) < SAME
        return Job(plain, seed, rate) if same else Job(name, seed, rate, forwards)

    # Seed by seed: a table that is stopped early compares what it has.
    found, roots = {}, []
    for seed, name in itertools.product(args.seeds, names):
        job = job_of(name, seed)
        found[name, seed] = outcome(job)
        roots.append(root_of(job, folder))
    write(table(found, names), folder / "classify_table.md")
    overlay(list(dict.fromkeys(roots)), folder / "curves.html")


if __name__ == "__main__":
    main(sys.argv[1:])
