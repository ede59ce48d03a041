"""Table of controls without an oracle: `controls` (rows nobody trained on, and exchanged names)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tables import ROOT, Make, Page, Run, Table, head, row, start

from train.data import authors

ROLES = ("original", "oracle", "unlearned")
LEVEL = 0.05


def quickstart(seed: int) -> Run:
    return Run("train.unlearn", f"quickstart-{seed}", ("quickstart", "--seed", str(seed)))


def judged(seed: int, role: str) -> Run:
    """A model of a quickstart, judged by its own rows to forget and those with names exchanged."""
    files = (f"@rows-{seed}/{side}.jsonl" for side in ("forget", "retain"))
    told = [
        word
        for pair in zip(("--data.forget", "--data.retain"), files, strict=True)
        for word in pair
    ]
    return Run(
        "train.evaluate",
        f"judged-{seed}-{role}",
        (f"@export-{seed}-{role}", *told, "--seed", str(seed)),
    )


def prepared(run: Run, folder: Path, options: Sequence[str]) -> None:
    """Write the rows and export the model that a run judges, then take it to its end."""
    if run.program == "train.evaluate":
        seed, role = run.name.split("-")[1:]
        rows = authors.training_rows(authors.generate(int(seed)))
        for side, split in (("forget", "forget10"), ("retain", "retain_eval")):
            path = folder / f"rows-{seed}" / f"{side}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(one) + "\n" for one in rows[split]))
        target = folder / f"export-{seed}-{role}"
        if not target.exists():
            words = [str(folder / quickstart(int(seed)).name), str(target), "--model", role]
            export = [sys.executable, "-m", "train.export", *words]
            subprocess.run(export, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    start(run, folder, options)


def fill(make: Make, args: argparse.Namespace) -> Page:
    """A line a seed: the p of each control by model, and the oracle's verdict."""
    kinds = [f"{kind}, {role}" for kind in ("unseen rows", "exchanged names") for role in ROLES]
    lines = head("seed", *kinds, "KS p against the oracle")
    agreed = {"unseen rows": 0, "exchanged names": 0}
    for seed in args.seeds:
        models = make(quickstart(seed))
        unseen = [models[role]["unseen_p"] for role in ROLES]
        swapped = [next(iter(make(judged(seed, role)).values()))["unseen_p"] for role in ROLES]
        verdict = models["unlearned"]["forget_quality"]
        lines.append(row(str(seed), *(f"{p:.2g}" for p in (*unseen, *swapped, verdict))))
        for name, values in zip(agreed, (unseen, swapped), strict=True):
            agreed[name] += (values[-1] > LEVEL) == (verdict > LEVEL)
    said = (f"{name}: {count} of {len(args.seeds)} seeds" for name, count in agreed.items())
    return Page([*lines, "", "The control and the oracle's test agree: " + ", ".join(said) + "."])


TABLES = {
    "controls": Table(
        "quickstart: the controls without an oracle beside the oracle's verdict (an hour)",
        fill,
        seeds=range(9),
        start=prepared,
    )
}
