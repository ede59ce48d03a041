"""Tables of optimizers, each at the best rate of a grid: `pretrain`, and presets of `classify`."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tables import Make, Page, Run, Table, head, mean, row, slug, summary

from train.presets.classify import PRESETS
from train.runtime.steplog import read_steps

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
LOOKS = 5  # points of the curve that the table shows
TIMED = 2000  # forward passes of the runs that say how fast a method is
SAME = 0.05  # the share of a budget below which equal minutes are equal passes
FACTORS = (0.1, 1.0, 10.0)  # the factors of a preset's rate that are tried


def marked(rate: float, of: Mapping[float, float]) -> str:
    """A rate of a grid, marked where its number is the least.

    Example:
        >>> marked(0.1, {0.01: 2.0, 0.1: 1.0, 1.0: 2.0}), marked(0.1, {0.01: 2.0, 0.1: 1.0})
        ('0.1 **best**', '0.1 **best** (at the end)')
    """
    end = " (at the end)" if rate in (min(of), max(of)) else ""
    return f"{rate:g} **best**{end}" if rate == min(of, key=lambda r: of[r]) else f"{rate:g}"


def pretraining(optimizer: str, rate: float, seed: int, more: Sequence[str] = ()) -> Run:
    """A run of the table of pre-training."""
    words = [word.removeprefix("--optimizer.") for word in more]
    name = "-".join([optimizer, f"{rate:g}", f"seed{seed}", *words])
    argv = ("pretrain-tiny", "--optimizer.name", optimizer, "--seed", str(seed))
    rest = ("--optimizer.learning-rate", str(rate), *more, "--data.cache", "@corpora")
    return Run("train.pretrain", name, (*argv, *rest))


def pretrain(make: Make, args: argparse.Namespace) -> Page:
    """The rates and seeds of all optimizers, and the changes to TEON at its best rate."""

    def told(*which: Any) -> Mapping[str, Any]:
        return make(pretraining(*which))["pretrained"]

    def losses(name: str) -> dict[float, float]:
        return {rate: told(name, rate, 0)["val_perplexity"] for rate in GRID[name]}

    @functools.cache
    def best(name: str) -> float:
        of = losses(name)
        return min(of, key=lambda rate: of[rate])

    lines, curves = [], []
    if "grid" in args.only:
        lines += head("optimizer", "rate", "validation perplexity", "training perplexity",
                      "tokens a s")  # fmt: skip
        for name, rates in GRID.items():
            of = losses(name)
            for rate in rates:
                cells = shown(told(name, rate, 0), "val_perplexity", "train_perplexity")
                lines.append(row(name, marked(rate, of), *cells))
        lines += ["", "At the best rates, nats a held-out token; differences are paired by seed."]
        lines += ["", *paired(told, best)]
        curves += [pretraining(n, best(n), seed) for n, seed in itertools.product(GRID, SEEDS)]
    if "ablations" in args.only:
        rate = best("teon")
        lines += ["", f"TEON at rate {rate:g}, seed 0, one change at a time.", ""]
        lines += head("TEON", "validation perplexity", "nats minus the paper's", "tokens a s")
        usual = math.log(told("teon", rate, 0)["val_perplexity"])
        for name, more in ABLATIONS.items():
            flat = told("teon", rate, 0, more)
            perplexity, speed = shown(flat, "val_perplexity")
            apart = math.log(flat["val_perplexity"]) - usual
            lines.append(row(name, perplexity, f"{apart:+.4f}", speed))
        curves += [pretraining("teon", rate, 0, more) for more in ABLATIONS.values() if more]
    return Page(lines, curves)


def shown(flat: Mapping[str, Any], *keys: str) -> list[str]:
    """The cells of perplexities and speed."""
    return [*(f"{flat[key]:.3f}" for key in keys), mean([flat["tokens_per_second"]], ".0f")]


def paired(told: Any, best: Any) -> list[str]:
    """The losses at the best rates by seed, and their differences."""
    others = [name for name in GRID if name != "teon"]
    lines = head("optimizer", *(f"seed {s}" for s in SEEDS), "mean ± sd",
                 *(f"minus {name}" for name in others))  # fmt: skip
    losses = {
        name: [math.log(told(name, best(name), seed)["val_perplexity"]) for seed in SEEDS]
        for name in GRID
    }
    for name, values in losses.items():
        apart = [
            "-"
            if name == other
            else deviation([a - b for a, b in zip(values, losses[other], strict=True)], "+")
            for other in others
        ]
        lines.append(row(name, *(f"{v:.4f}" for v in values), deviation(values), *apart))
    return lines


def deviation(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):{sign}.4f} ± {statistics.stdev(values):.4f}"


class Method(NamedTuple):
    """A row of the tables of classification.

    Args:
        optimizer: the name of the optimizer.
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


class Outcome(NamedTuple):
    """The result of a run: the numbers of its models by name, and its dev accuracy over passes."""

    models: Mapping[str, Mapping[str, Any]]
    curve: Sequence[tuple[int, float]]


def outcome(folder: Path) -> Outcome:
    """The result of a finished run."""
    models = summary(folder)
    passes = models["finetuned"]["forwards"] / models["finetuned"]["steps"]
    points = [
        (round(passes * line["step"]), line["dev_accuracy"])
        for line in read_steps(folder / "metrics.jsonl")
        if line["stage"] == "finetuned" and "dev_accuracy" in line
    ]
    return Outcome(models, points)


def rate_of(name: str, preset: str) -> float:
    """The learning rate of a method."""
    method = METHODS[name]
    usual = PRESETS[preset].OPTIMIZERS[method.optimizer][0].learning_rate
    return method.rates.get(preset, usual)


def classifying(
    preset: str, name: str, seed: int, rate: float, forwards: int | None = None, group: str = ""
) -> Run:
    """A run of a table of classification.

    Args:
        preset: the preset of train.classify.
        name: the method.
        seed: the seed.
        rate: the learning rate.
        forwards: the forward passes; None: the preset's.
        group: a folder of its own among the runs.
    """
    budget = () if forwards is None else ("--train.forwards", str(forwards))
    told = f"{group}{slug(name)}-seed{seed}-rate{rate:g}"
    told += "" if forwards is None else f"-forwards{forwards}"
    argv = (preset, "--optimizer.name", METHODS[name].optimizer, *METHODS[name].more)
    rest = ("--seed", str(seed), "--optimizer.learning-rate", str(rate), *budget)
    return Run("train.classify", told, (*argv, *rest, "--stage.cache", "@cache"))


def classify(preset: str, make: Make, args: argparse.Namespace) -> Page:
    """Test accuracy by seed, its cost, and the dev accuracy over the budget."""
    if args.tune is not None:
        return tuned(preset, make, args)
    runs: dict[tuple[str, int], Run] = {}
    # Seed by seed: a table that is stopped early compares what it has.
    for seed, name in itertools.product(args.seeds, args.only):
        runs[name, seed] = budgeted(preset, make, name, seed)
        make(runs[name, seed])
    found = {key: make(run) for key, run in runs.items()}
    lines = head("method", *(f"accuracy, seed {s}" for s in args.seeds), "mean", "prior out",
                 "NLL", "forwards", "minutes", "step, MiB")  # fmt: skip
    before = [found[args.only[0], seed].models["base"] for seed in args.seeds]
    lines.append(row("before", *judged(before), "-", "-", "-"))
    for name in args.only:
        flats = [found[name, seed].models["finetuned"] for seed in args.seeds]
        seconds = [flat["seconds"] / 60 for flat in flats if flat["seconds"] is not None]
        forwards, mib = (max(flat[key] for flat in flats) for key in ("forwards", "step_mib"))
        cost = (f"{forwards:,}", mean(seconds, ".1f"), f"{mib:.0f}")
        lines.append(row(name, *judged(flats), *cost))
    majority = {out.models["majority_accuracy"] for out in found.values()}
    lines += ["", f"Always the commonest label: {', '.join(f'{x:.3f}' for x in sorted(majority))}."]
    lines += ["", "Dev accuracy over forward passes, mean of the seeds.", ""]
    shares = [k / LOOKS for k in range(1, LOOKS + 1)]
    lines += head("method", *(f"{k}/{LOOKS} of the budget" for k in range(1, LOOKS + 1)))
    for name in args.only:
        curves = [curve for seed in args.seeds if (curve := found[name, seed].curve)]
        lines.append(row(name, *(mean([nearest(c, share) for c in curves]) for share in shares)))
    return Page(lines, list(runs.values()))


def judged(flats: Sequence[Mapping[str, Any]]) -> list[str]:
    """The accuracy by seed and its mean, that without the prior of the labels, and the NLL."""
    of = {
        key: [flat[key] for flat in flats if flat.get(key) is not None]
        for key in ("accuracy", "accuracy_without_prior", "nll")
    }
    return [*(f"{value:.3f}" for value in of["accuracy"]), *map(mean, of.values())]


def nearest(points: Sequence[tuple[int, float]], share: float) -> float:
    """The value at the look that is nearest to a share of the budget.

    Example:
        >>> nearest([(10, 0.5), (20, 0.6), (40, 0.9)], 0.6)
        0.6
    """
    wanted = share * points[-1][0]
    return min(points, key=lambda point: abs(point[0] - wanted))[1]


def budgeted(preset: str, make: Make, name: str, seed: int) -> Run:
    """A row's run, with the preset's budget or as many passes as fit another's minutes.

    Both are timed over `TIMED` passes, one after the other.
    """
    plain, other, rate = METHODS[name].optimizer, METHODS[name].minutes_of, rate_of(name, preset)
    if other is None:
        return classifying(preset, name, seed, rate)
    theirs = rate_of(other, preset)
    budget = make(classifying(preset, other, seed, theirs)).models["finetuned"]["forwards"]
    # Its own run where that is no longer.
    short = () if budget <= TIMED else (TIMED, "timed/")
    mine, peer = (
        make(classifying(preset, *which, *short)).models["finetuned"]
        for which in ((plain, seed, rate), (other, seed, theirs))
    )
    if mine["seconds"] is None or peer["seconds"] is None:
        raise SystemExit("a run was stopped behind its last step, so its time is not known")
    speed = mine["forwards"] / mine["seconds"]
    forwards = round(speed * budget * peer["seconds"] / peer["forwards"])
    if abs(forwards / budget - 1) < SAME:  # times are no more exact than that
        return classifying(preset, plain, seed, rate)
    return classifying(preset, name, seed, rate, forwards)


def tuned(preset: str, make: Make, args: argparse.Namespace) -> Page:
    """The dev NLL of every method at every rate, with a budget of its own, and the best."""
    forwards = None if args.tune == PRESETS[preset].PRESET.train.forwards else args.tune
    lines = head("method", "rate", "dev NLL", "dev accuracy")
    for name in args.only:
        if METHODS[name].minutes_of is not None:
            continue
        rates = [float(f"{rate_of(name, preset) * factor:.6g}") for factor in args.factors]
        of = {
            rate: make(classifying(preset, name, 0, rate, forwards)).models["finetuned"]
            for rate in rates
        }
        losses = {rate: flat["dev_nll"] for rate, flat in of.items()}
        for rate, flat in of.items():
            values = (f"{flat[key]:.4f}" for key in ("dev_nll", "dev_accuracy"))
            lines.append(row(name, marked(rate, losses), *values))
    return Page(lines, name=f"rates-{args.tune}")


TUNING = {
    "--tune": dict(
        type=int,
        metavar="N",
        help="compare rates on seed 0 with N forward passes, by the NLL on the dev rows; the best "
        "rate of a short budget may be too high for a long one",
    ),
    "--factors": dict(
        type=float, nargs="+", default=FACTORS, metavar="F", help="the factors of its rate"
    ),
}
TABLES = {
    "pretrain": Table(
        "AdamW, Muon, NorMuon and TEON on pretrain-tiny (80 minutes): rates on seed 0, the best of "
        "each on seeds 0 to 2, paired by seed; then one change of TEON at a time.",
        pretrain,
        ("grid", "ablations"),
    ),
    **{
        preset: Table(
            f"Zeroth-order methods and AdamW on {preset} at an equal budget of forward passes, or "
            "of minutes. Minutes are those of the training steps, on a machine with nothing else "
            "to do.",
            functools.partial(classify, preset),
            [name for name, method in METHODS.items() if method.optimizer in known.OPTIMIZERS],
            (0,),
            TUNING,
            read=outcome,
        )
        for preset, known in PRESETS.items()
    },
}
