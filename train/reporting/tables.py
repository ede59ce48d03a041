"""Runs as tables: mean and spread over seeds, for the terminal, as CSV and as LaTeX."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxlib_unlearn import reading
from jaxlib_unlearn.errors import UserError
from train.options.roles import QUESTION_ANSWERING, ROLES, Roles, roles_of
from train.reporting import labels
from train.reporting.metrics_table import (
    LEGEND,
    MISSING,
    describe,
    format_number,
    metrics_of,
    ordered,
)
from train.runtime import files
from train.runtime.plain import plain

if TYPE_CHECKING:
    from rich.table import Table

SMOKE = (
    "SMOKE run: steps and samples are cut to see the program work. Its numbers say nothing about "
    "the method, so there is no verdict."
)


class Run(NamedTuple):
    """A finished run folder: `config.json`, `summary.json` by model, `run.json` where present.

    `roles` are the roles of its models, `evaluators` the names of the evaluators that were run.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, dict[str, Any]]
    about: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    roles: Roles = ROLES
    evaluators: tuple[str, ...] = QUESTION_ANSWERING

    @property
    def judged(self) -> dict[str, Any]:
        """Flat metrics of the model that the run is about."""
        return self.summary[self.roles.judged]

    @property
    def models(self) -> list[str]:
        """All models of the run, in reading order."""
        return self.roles.order(self.summary)


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        UserError: it cannot be read or is not JSON.
    """
    return reading.read_json(path, "give an undamaged copy", what="is not valid JSON")


def load_run(folder: str | Path) -> Run:
    """Read a run folder.

    Args:
        folder: a folder that `train.unlearn --output` wrote.

    Raises:
        UserError: no such folder, or it is not the folder of a finished run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no run folder {folder}{_nearest(folder)}")
    for name in ("config.json", "summary.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} is not a finished run: no {name}; give the --output folder of a "
                "`python -m train.unlearn` that ended"
            )
        files.check_key(folder / name)
    config = read_json(folder / "config.json")
    summary = read_json(folder / "summary.json")
    if not isinstance(config, dict) or not isinstance(summary, dict):
        raise UserError(f"config.json and summary.json in {folder} must be JSON objects")
    notes: list[str] = []
    about, damage = _about(folder / "run.json")
    notes += damage
    for source in (config, summary, about):
        found = source.get("notes") or []
        notes += [str(note) for note in (found if isinstance(found, list) else [found])]
    # Names are shown on terminals and in tables: no control bytes from here on.
    summary = {
        plain(model): {plain(name): value for name, value in scores.items()}
        for model, scores in summary.items()
        if isinstance(scores, dict)
    }
    roles = roles_of(about.get("roles"))
    if roles.judged not in summary:
        raise UserError(
            f"{folder / 'summary.json'} has no model {roles.judged!r}; finish the run first"
        )
    judged_by = about.get("evaluators")
    if not isinstance(judged_by, list):  # a run of an earlier version, which did not record it
        judged_by = QUESTION_ANSWERING
    evaluators = tuple(name for name in judged_by if isinstance(name, str))
    return Run(folder, config, summary, about, tuple(notes), roles, evaluators)


def _about(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The content of `run.json`, and a note where it is damaged: no metric depends on it."""
    if not path.is_file():
        return {}, []
    try:
        files.check_key(path)
        about = read_json(path)
        minutes = about.get("minutes") or {}
        minutes = {str(name): float(spent) for name, spent in minutes.items()}
    except (UserError, AttributeError, TypeError, ValueError, OverflowError):
        return {}, [f"{path.name} is damaged: minutes and device are left out."]
    return about | {"minutes": minutes}, []


def _nearest(folder: Path) -> str:
    import difflib

    try:
        names = [p.name for p in folder.parent.iterdir() if p.is_dir()]
    except OSError:
        return "; give the --output folder of a run"
    close = difflib.get_close_matches(folder.name, names, 1, 0.5)
    return f"; did you mean {folder.parent / close[0]}?" if close else ""


class Cell(NamedTuple):
    """A metric over seeds: mean, sample standard deviation (None when n = 1), n."""

    mean: float
    sd: float | None
    n: int

    def text(self) -> str:
        """`0.312 ± 0.012`, or the number alone."""
        return format_number(self.mean) + (f" ± {self.spread()}" if self.sd is not None else "")

    def spread(self) -> str:
        """The standard deviation with as many decimals as the mean."""
        mean = format_number(self.mean)
        if self.sd is None or "e" in mean or not math.isfinite(self.sd):
            return format_number(self.sd)
        decimals = 3 if mean == "0" else len(mean.partition(".")[2])
        return f"{self.sd:,.{decimals}f}"


class Column(NamedTuple):
    """One model of one experiment, aggregated over its seeds."""

    label: str
    model: str
    seeds: tuple[Any, ...]
    cells: dict[str, Cell]
    digests: tuple[str, ...]

    @property
    def n(self) -> int:
        """The number of runs."""
        return len(self.seeds)


def aggregate(values: Sequence[float]) -> Cell:
    """Mean and sample standard deviation: m = sum x / n, s^2 = sum (x - m)^2 / (n - 1).

    Example:
        >>> aggregate([1.0, 2.0, 3.0])
        Cell(mean=2.0, sd=1.0, n=3)
    """
    mean = math.fsum(values) / len(values)
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Cell(mean, sd, len(values))


def groups(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs grouped by experiment (without `labels.INCIDENTAL`), each group with a distinct label.

    Experiments with equal names are distinguished by few options, the learning rate first; a label
    shows another option only where its value is not the commonest.
    """
    keyed: dict[str, list[Run]] = {}
    flats: dict[str, dict[str, Any]] = {}
    for run in {run.folder.resolve(): run for run in runs}.values():
        flat = labels.flat(run.config)
        key = json.dumps(flat, sort_keys=True, default=str)
        keyed.setdefault(key, []).append(run)
        flats[key] = flat
    folders = [members[0].folder.name for members in keyed.values()]
    named = labels.named([flats[key] for key in keyed], folders)
    return list(zip(named, keyed.values(), strict=True))


def columns(runs: Sequence[Run]) -> list[Column]:
    """Every model of every group, in order; a model that several groups share appears once.

    Args:
        runs: the runs, of any number of experiments and seeds.
    """
    found = groups(runs)
    out: list[Column] = []
    for label, members in found:
        smoke = "SMOKE" if members[0].config.get("smoke") else ""
        roles = members[0].roles
        for model in roles.order(m for run in members for m in run.summary):
            have = [run for run in members if model in run.summary]
            if not have:
                continue
            values = [metrics_of(run.summary[model]) for run in have]
            cells = {
                name: aggregate([v[name] for v in values if name in v])
                for name in ordered(n for v in values for n in v)
            }
            seeds = tuple(run.config.get("seed") for run in have)
            digests = [str(run.summary[model].get("params_sha256") or "") for run in have]
            digests = tuple(sorted(digests)) if all(digests) else ()
            column = Column(label if len(found) > 1 else smoke, model, seeds, cells, digests)
            shared = digests and model != roles.judged
            same = [c for c in out if shared and c[1:] == column[1:]]
            if same:
                out[out.index(same[0])] = same[0]._replace(label=smoke)
            else:
                out.append(column)
    return out


def _rows(cols: Sequence[Column], main: bool) -> list[str]:
    names = ordered(name for column in cols for name in column.cells)
    if not main:
        return names
    known = {name: describe(name) for name in names}
    ends = {m.family: [n for n in names if known[n].family == m.family] for m in known.values()}
    logs = {m.name: m.log10_of for m in known.values() if m.log10_of}
    # A mean of p over seeds is meaningless; the mean of log10 p is not.
    hidden = set(logs if all(column.n == 1 for column in cols) else logs.values())
    return [
        n
        for n in names
        if known[n].main
        and n not in hidden
        and (not known[n].ends or n in (ends[known[n].family][0], ends[known[n].family][-1]))
    ]


def terminal(cols: Sequence[Column], width: int = 80, main: bool = True) -> list[Table]:
    """The comparison as rich tables, metrics down and models across, split to fit the width.

    Args:
        cols: the columns that `columns` returned.
        width: the number of characters of a line of the terminal.
        main: whether to show only the main metrics.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names = _rows(cols, main)
    first = max([len(describe(n).label) + 2 for n in names] + [10])
    heads = []
    for column in cols:
        head = f"{column.label}\n{column.model}" if column.label else column.model
        heads.append(head + (f"\n(n={column.n})" if column.n > 1 else ""))
    texts = [[c.cells[n].text() if n in c.cells else MISSING for n in names] for c in cols]
    sizes = [
        max(len(line) for line in [*head.splitlines(), *text]) + 2
        for head, text in zip(heads, texts, strict=True)
    ]
    chunks: list[list[int]] = [[]]
    used = first + 3
    for i, size in enumerate(sizes):
        if chunks[-1] and used + size > width:
            chunks.append([])
            used = first + 3
        chunks[-1].append(i)
        used += size
    tables = []
    for chunk in chunks:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        table.add_column("metric")
        for i in chunk:
            table.add_column(Text(heads[i]), justify="right", no_wrap=True)
        for r, name in enumerate(names):
            metric = describe(name)
            # As `Text`: what looks like rich's markup in a name is part of the name.
            label = Text(f"{metric.label} {metric.arrow}".strip())
            table.add_row(label, *(Text(texts[i][r]) for i in chunk))
        tables.append(table)
    return tables


def to_csv(cols: Sequence[Column]) -> str:
    """One line per number: experiment, model, metric, n, mean, sd, seeds (all digits kept)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["experiment", "model", "metric", "n", "mean", "sd", "seeds"])
    for column in cols:
        seeds = " ".join(plain(seed) for seed in column.seeds)
        for name, cell in column.cells.items():
            sd = "" if cell.sd is None else repr(cell.sd)
            writer.writerow([column.label, column.model, name, cell.n, repr(cell.mean), sd, seeds])
    return out.getvalue()


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", MISSING: "--",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "≈": r"$\approx$", "→": r"$\to$",
}  # fmt: skip


def escape_tex(text: str) -> str:
    """Text escaped so that LaTeX prints it literally.

    Example:
        >>> escape_tex("a_b & 5%")
        'a\\\\_b \\\\& 5\\\\%'
    """
    return "".join(_TEX.get(c, c) for c in text)


def _tex(text: str) -> str:
    if "e" in text:
        mantissa, exponent = text.split("e")
        return rf"{mantissa}\times 10^{{{int(exponent)}}}"
    return text.replace("inf", r"\infty").replace(",", "{,}")


def to_latex(cols: Sequence[Column], main: bool = True) -> str:
    r"""A `tabular` with booktabs rules, ready for `\input`.

    Args:
        cols: the columns that `columns` returned.
        main: whether to show only the main metrics.
    """
    lines = [r"% needs \usepackage{booktabs}"]
    lines += [r"\begin{tabular}{l" + "r" * len(cols) + "}", r"\toprule"]
    if any(column.label for column in cols):
        lines.append(" & ".join(["", *(escape_tex(c.label) for c in cols)]) + r" \\")
    heads = [escape_tex(c.model) + (f" ($n={c.n}$)" if c.n > 1 else "") for c in cols]
    lines += [" & ".join(["Metric", *heads]) + r" \\", r"\midrule"]
    for name in _rows(cols, main):
        metric = describe(name)
        row = [escape_tex(f"{metric.label} {metric.arrow}".strip())]
        for column in cols:
            cell = column.cells.get(name)
            if cell is None:
                row.append("--")
            elif cell.sd is None:
                row.append(f"${_tex(format_number(cell.mean))}$")
            else:
                row.append(rf"${_tex(format_number(cell.mean))} \pm {_tex(cell.spread())}$")
        lines.append(" & ".join(row) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def show(cols: Sequence[Column], every: bool = False) -> None:
    """Print the tables on stdout, as wide as the terminal.

    Args:
        cols: the columns that `columns` returned.
        every: whether to show all metrics, not only the main ones.
    """
    from rich.console import Console

    console = Console(highlight=False)
    for table in terminal(cols, console.width, main=not every):
        console.print(table)
    console.print(LEGEND)
    if any(column.label.startswith("SMOKE") for column in cols):
        console.print(SMOKE, soft_wrap=True)
