"""The tables of RESULTS.md that compare runs, a row of `TABLES` each.

    python tests/bench/table.py NAME [--only ROW ...] [--seeds 0 1 2] [--output DIR] [-- OPTIONS]

Every run is a program of `train` in a process of its own, with a folder below `--output`
(`runs/bench/NAME`). Runs that are there undamaged are not computed again, and one that was stopped
goes on. Options behind `--` go to every run: `-- --smoke` for a first look. The table is printed
and written to `NAME.md`. `NAME --help` lists its rows and its own options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import table_of_concepts
import table_of_controls
import table_of_programs
import table_of_rates
import table_of_runs
from tables import ROOT, maker, overlay, place

TABLES = {
    **table_of_runs.TABLES,
    **table_of_rates.TABLES,
    **table_of_concepts.TABLES,
    **table_of_programs.TABLES,
    **table_of_controls.TABLES,
}


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of a table, and those behind `--`, which go to its runs."""
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, table in TABLES.items():
        one = kinds.add_parser(name, help=table.about, description=table.about)
        if table.rows:
            names = {"choices": table.rows, "help": "; ".join(table.rows), "metavar": "ROW"}
            one.add_argument("--only", nargs="+", default=table.rows, **names)
        if table.seeds:
            one.add_argument("--seeds", type=int, nargs="+", default=table.seeds, metavar="S")
        for flag, option in table.options.items():
            one.add_argument(flag, **option)
        one.add_argument("--output", type=Path, default=ROOT / "runs/bench" / name, metavar="DIR")
    return parser.parse_args(argv[:at]), list(argv[at + 1 :])


def main(argv: Sequence[str]) -> None:
    """Fill a table, print it and write it."""
    args, options = parse(argv)
    folder = place(args.output, options)
    page = TABLES[args.name].fill(maker(TABLES[args.name], folder, options), args)
    text = "\n".join(page.lines)
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{page.name or args.name}.md").write_text(text + "\n")
    if page.curves:
        overlay([folder / run.name for run in dict.fromkeys(page.curves)], folder / "curves.html")


if __name__ == "__main__":
    main(sys.argv[1:])
