"""A run as one self-contained page and pictures; several runs side by side.

python -m train.report RUN              rebuilds RUN/report.html and its PNGs, prints the table
python -m train.report RUN RUN ... --html FILE --csv FILE --latex FILE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from jaxlib_unlearn.errors import UserError
from train.reporting import ending, page, tables
from train.runtime.plain import plain, shown


class _Parser(argparse.ArgumentParser):
    """A parser that reports errors as `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m train.report --help")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    import difflib

    parser = _Parser(
        prog="python -m train.report",
        description="A run as a page; several runs side by side.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        type=Path,
        help="run folder of train.unlearn or train.pretrain",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        nargs="?",
        const=Path("comparison.html"),
        help="the runs on a page: forget against retain, or validation loss over tokens "
        "(default: comparison.html)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="every number, one per line")
    parser.add_argument("--latex", type=Path, metavar="FILE", help="the table as a LaTeX tabular")
    parser.add_argument("--all", action="store_true", help="all metrics, not only the main ones")
    known = [o for a in parser._actions for o in a.option_strings if o.startswith("--")]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, 1, 0.5)
        raise UserError(
            f"unknown option {unknown[0]}; "
            + (f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}")
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    try:
        args = _parse(argv)
        runs = [tables.load_run(folder) for folder in args.runs]
        cols = tables.columns(runs)
        if args.html:
            from train.reporting import compare

            page.write(args.html, compare.page(runs).encode("utf-8", "replace"))
        if args.csv:
            page.write(args.csv, tables.to_csv(cols).encode())
        if args.latex:
            page.write(args.latex, tables.to_latex(cols, main=not args.all).encode())
        built = ending.show(args.runs[0], args.all) if len(runs) == 1 else None
    except UserError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    for column in cols:
        if len(set(map(str, column.seeds))) < column.n:
            where = f"{column.label} {column.model}".strip()
            print(f"note: {where}: the same seed counts twice", file=sys.stderr)
    if built is None:
        tables.show(cols, args.all)
    for path in (built, args.html, args.csv, args.latex):
        if path:
            print(shown(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
