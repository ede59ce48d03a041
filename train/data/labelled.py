"""Labelled data sets as records by split: GLUE's TSV, JSON lines, CSV or parquet, or the Hub.

A file is one pool, which a run divides by its seed. A folder may have a file for training and one
for validation (GLUE's `train.tsv` and `dev.tsv`, `train-00000-of-00001.parquet`, ...).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import exists, one_line, read_text
from train.data import hub_table
from train.data.batches import shuffled
from train.data.files import READERS, read_table
from train.data.tofu import read_json

Record = Mapping[str, Any]
Columns = Sequence[tuple[str, ...]]
SUFFIXES = tuple(READERS)
TRAIN, HELD_OUT = ("train",), ("validation", "dev", "val")


class Pools(NamedTuple):
    """The records of a data set.

    Args:
        train: the records to train on; all records where none are held out.
        held_out: the records of the validation split; None: the data set is one pool.
        place: the name of their source, for messages and notes.
    """

    train: Sequence[Record]
    held_out: Sequence[Record] | None
    place: str


def read_pools(path: Path, columns: Columns) -> Pools:
    """The records of a file, or of the splits in a folder.

    Args:
        path: the path given by `--data.path`.
        columns: the columns that records must have, each with the names that it may have in files.

    Raises:
        UserError: nothing there, a file that cannot be read, or a column that is missing.
    """
    path = path.expanduser()
    if not exists(path, "give another --data.path"):
        raise UserError(f"--data.path {path} does not exist; give a file or a folder of files")
    if not path.is_dir():
        return Pools(read_records(path, columns), None, path.name)
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    found = {}
    for split, names in (("train", TRAIN), ("held_out", HELD_OUT)):
        for name in names:
            mine = [p for p in files if re.split(r"[-_.]", p.name.lower())[0] == name]
            if mine:
                found[split] = [record for p in mine for record in read_records(p, columns)]
                break
    if "train" not in found:
        listed = ", ".join(p.name for p in files[:6]) or "none"
        raise UserError(
            f"--data.path {path} has no file named train with one of the suffixes "
            f"{' '.join(SUFFIXES)} (files found: {listed}); give a file, or a folder that has one"
        )
    return Pools(found["train"], found.get("held_out"), path.name)


def read_records(path: Path, columns: Columns) -> list[Record]:
    """The records of a file, with the columns by their first names.

    Raises:
        UserError: another kind of file, contents that cannot be read, or a column that is missing.
    """
    suffix = path.suffix.lower()
    if suffix == ".tsv":
        records = _read_tsv(path, columns)
    elif suffix in (".json", ".jsonl"):
        records = [_flat(row) for row in read_json(path)]
    else:
        table = read_table(path, "--data.path")
        records = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    return named(records, columns, str(path))


def _flat(row: Record) -> Record:
    """A record of SuperGLUE's JSON lines, whose `target` holds columns of its own."""
    inner = row.get("target")
    return {**row, **inner} if isinstance(inner, Mapping) else row


def _read_tsv(path: Path, columns: Columns) -> list[Record]:
    """GLUE's TSV: no quoting. Without a header the columns are those of the task, in its order."""
    text = read_text(path, "save it as UTF-8", encoding="utf-8-sig")
    lines = [line.rstrip("\r").split("\t") for line in text.split("\n")]
    lines = [(number, cells) for number, cells in enumerate(lines, 1) if any(map(str.strip, cells))]
    if not lines:
        return []
    known = {name for names in columns for name in names}
    header = [cell.strip() for cell in lines[0][1]]
    if known & set(header):
        lines = lines[1:]
    else:
        header = [names[0] for names in columns]
    for number, cells in lines:
        if len(cells) != len(header):
            raise UserError(
                f"{path}, line {number}: {len(cells)} cells in place of {len(header)} "
                f"({one_line(', '.join(header))}); separate cells by tabs"
            )
    return [dict(zip(header, cells, strict=True)) for _, cells in lines]


def named(records: Iterable[Record], columns: Columns, place: str) -> list[Record]:
    """Records with the wanted columns alone, by their first names.

    Raises:
        UserError: a column is missing, or there is no record.
    """
    found = []
    for number, record in enumerate(records, 1):
        kept = {}
        for names in columns:
            have = [name for name in names if name in record]
            if not have:
                there = one_line(", ".join(map(str, record)) or "none")
                raise UserError(
                    f"{place}, row {number}: column {names[0]!r} is missing; columns found: {there}"
                )
            kept[names[0]] = record[have[0]]
        found.append(kept)
    if not found:
        raise UserError(f"{place}: no rows; give a file with some")
    return found


def hub_pools(
    repo: str, config: str | None, columns: Columns, revision: str | None = None
) -> Pools:
    """The splits `train` and `validation` of a Hub data set.

    Raises:
        UserError: no such package, or the data set cannot be loaded.
    """
    place = f"{repo} {config}" if config else repo
    pools, commits = [], set()
    for split in ("train", "validation"):
        found = hub_table.read(
            *(repo, config, split, revision),
            place=f"{place}, split {split!r}",
            advice="give --data.path a file or folder",
        )
        pools.append(named(found.rows, columns, f"{place} {split}"))
        commits.update(found.commits)
    return Pools(
        pools[0], pools[1], " ".join([place, *(f"at commit {c}" for c in sorted(commits))])
    )


class Divided(NamedTuple):
    """The rows of a run by split; each is named by its place in its pool."""

    train: list[Any]
    dev: list[Any]
    test: list[Any]


def divide(
    pools: Pools, train: int | None, dev: int, test: int | None, seed: int
) -> tuple[Divided, list[str]]:
    """Rows to train on, to evaluate during training and to test on, drawn by a seed, and notes.

    Training and dev rows are drawn from the training pool. The test rows are the validation
    split, or where there is none, the rest of the pool.

    Args:
        pools: the data set.
        train: the number of rows to train on; None: all that are left.
        dev: the number of rows to evaluate during training.
        test: the largest number of rows to test on; None: all.
        seed: the seed of the draw.

    Raises:
        UserError: too few rows.
    """
    rows = [pools.train[i] for i in shuffled(seed, "rows/train", 0, len(pools.train))]
    notes = []
    apart = pools.held_out is not None
    least = dev + 1 if apart else dev + 1 + (train or 1)
    if len(rows) < least or (train is None and not apart):
        whole = "" if apart else f" + {'all' if train is None else train} to train on"
        raise UserError(
            f"{pools.place}: {len(rows)} rows do not make {dev} dev rows{whole} and "
            f"{'one to train on' if apart else 'one to test on'}; lower --data.dev-rows or "
            "--data.train-rows, or give a folder with a validation file"
        )
    if apart:
        held = pools.held_out or []
        left = len(rows) - dev
        if train is not None and left < train:
            notes.append(f"{left} training rows: {pools.place} has no more beside {dev} dev rows")
        end = left if train is None else min(train, left)
        tests = [held[i] for i in shuffled(seed, "rows/test", 0, len(held))]
    else:
        end = train or 0
        tests = rows[end + dev :]
    found = Divided(rows[:end], rows[end : end + dev], tests[:test])
    source = "its validation split" if apart else "the rest of its rows"
    notes.insert(
        0,
        f"{pools.place}: {len(found.train)} rows to train on, {len(found.dev)} dev rows, "
        f"{len(found.test)} test rows ({source})",
    )
    return found, notes
