"""Whole against condensed traces on epic-tiny: `make epic-table` (an hour on two cores).

    python tests/bench/epic_table.py [--only full edge ...] [--seeds 0 1 2]

Every policy at tau 0.5, as many tokens of whole examples, and two policies at tau 0.3, each on the
same seeds: accuracy, tokens, minutes of training, and the time of a run over that of whole traces,
measured and as its work lets expect. Every run is `python -m train.finetune epic-tiny ...` in a
process of its own, with a folder below `--output`; what is there undamaged is not computed again,
and a run that was stopped goes on. The measured ratio of runs that were stopped, or that had not
the machine to themselves, says little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import ROOT, head, ran, row, write

OUT = ROOT / "runs" / "bench" / "epic"
SEEDS = (0, 1, 2)
WHOLE = "full"
# Its options; the preset keeps half of the thoughts, the first and the last.
VARIANTS: dict[str, tuple[str, ...]] = {
    WHOLE: ("--condense.tau", "1"),
    "edge": (),
    "head": ("--condense.policy", "head"),
    "tail": ("--condense.policy", "tail"),
    "middle": ("--condense.policy", "middle"),
    "random": ("--condense.policy", "random"),
    "cost-matched": ("--condense.cost-matched",),
    "edge-0.3": ("--condense.tau", "0.3"),
    "middle-0.3": ("--condense.tau", "0.3", "--condense.policy", "middle"),
}

Train = Callable[[str, int], Mapping[str, Any]]  # (variant, seed) -> what summary.json says


def table(train: Train, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The lines of the table; ratios are paired by seed with whole traces, and averaged."""
    lines = head("traces", *(f"accuracy, seed {s}" for s in seeds), "mean", "finished",
                 "answer NLL", "tokens", "minutes", "time measured", "time expected")  # fmt: skip
    for name in names:
        found = [train(name, seed) for seed in seeds]
        cells = [f"{flat['answer_accuracy']:.3f}" for flat in found]
        cells += [mean(found, key, digits) for key, digits in
                  (("answer_accuracy", 3), ("finished", 3), ("answer_nll", 3))]  # fmt: skip
        cells.append(f"{statistics.mean(flat['train_tokens'] for flat in found):,.0f}")
        cells.append(mean(found, "train_seconds", 2, 60))
        whole = [train(WHOLE, seed) for seed in seeds] if WHOLE in names else []
        cells += [ratio(found, whole, key) for key in ("train_seconds", "train_flops")]
        lines.append(row(name, *cells))
    return lines


def mean(found: Sequence[Mapping[str, Any]], key: str, digits: int, unit: float = 1) -> str:
    """Of the seeds; "-" where one of them has no value."""
    values = [flat[key] for flat in found]
    return "-" if None in values else f"{statistics.mean(values) / unit:.{digits}f}"


def ratio(found: Sequence[Mapping[str, Any]], whole: Sequence[Mapping[str, Any]], key: str) -> str:
    """Mean of the ratios to whole traces, by seed."""
    pairs = [(a[key], b[key]) for a, b in zip(found, whole, strict=False)]
    if not pairs or any(None in pair for pair in pairs):
        return "-"
    return f"{statistics.mean(a / b for a, b in pairs):.2f}"


def run(name: str, seed: int, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """`train.finetune` in a process; the numbers of its summary."""
    root = folder / f"{name}-seed{seed}"
    command = ["epic-tiny", "--seed", str(seed), *VARIANTS[name], *options]
    command += ["--stage.cache", str(folder / "cache"), "--output", str(root)]
    return ran("train.finetune", command, root)["finetuned"]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(VARIANTS), default=[*VARIANTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="S")
    parser.add_argument("--smoke", action="store_true", help="a few steps each, for a first look")
    parser.add_argument("--output", type=Path, default=OUT, metavar="DIR")
    args = parser.parse_args(argv)
    folder = args.output.resolve() / ("smoke" if args.smoke else "")
    options = ["--smoke"] if args.smoke else []
    found: dict[tuple[str, int], dict[str, Any]] = {}
    # Seed by seed: a table that is stopped early compares what it has.
    for seed in args.seeds:
        for name in args.only:
            found[name, seed] = run(name, seed, folder, options)
    lines = table(lambda name, seed: found[name, seed], args.only, args.seeds)
    write(lines, folder / "epic_table.md")


if __name__ == "__main__":
    main(sys.argv[1:])
