"""The user's own rows: a file to forget and a file to keep, in JSON, JSONL, CSV or parquet.

A question and an answer are enough; the metrics that need paraphrases or wrong answers are left out
where a file lacks these. All problems of both files are reported in one message.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from train.data import authors
from train.data.author_alternates import alternates
from train.data.forms import KNOWN, Table, formed, plain_name, renamed
from train.data.tofu import PLAIN, Row, overlap, read_json

COLUMNS = (
    *(*PLAIN, "paraphrased_answer", "perturbed_answer", "paraphrased_question"),
    "alternate_answer",
)
LISTS = ("perturbed_answer", "alternate_answer")
MOST = 2**31 - 1  # characters of a cell
SHOWN = 3  # rows named in an error message; the others are counted


class Own(NamedTuple):
    """The user's rows, reduced to the known columns, and notes for the report."""

    forget: list[Row]
    retain: list[Row]
    holdout: list[Row]
    notes: list[str]


def _read_objects(path: Path) -> Table:
    found = read_json(path)
    columns = list(dict.fromkeys(name for row in found for name in row))
    return Table(columns, [[row.get(name) for name in columns] for row in found])


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text at byte {error.start}; save it again as UTF-8 (in Excel: 'CSV "
            "UTF-8')"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check path and permissions"
        ) from None


def _separator(header: str) -> str:
    """The separator of the columns: a comma, Excel's semicolon or a tab."""

    def known(separator: str) -> tuple[int, int]:
        names = next(csv.reader([header], delimiter=separator, skipinitialspace=True), [])
        return len(_places(names)), len(names)

    return max(",;\t", key=known)  # ties go to the first


def _read_csv(path: Path) -> Table:
    # Not through `datasets`: its reader treats an answer "NA" as missing, guesses types, and shifts
    # the columns of a file whose rows are all one cell too long.
    lines = _read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    said = lines[0].lower().startswith("sep=") and len(lines[0]) == 5  # Excel's separator line
    separator = lines[0][4] if said else ","
    lines[0] = "" if said else lines[0]
    columns: list[str] = []
    rows = []
    line = 0
    most = csv.field_size_limit(MOST)  # a cell may be a long text
    try:
        if not said:
            separator = _separator(next(filter(str.strip, lines), ""))
        reader = csv.reader(
            (one + "\n" for one in lines), delimiter=separator, skipinitialspace=True, strict=True
        )
        for cells in reader:
            line = reader.line_num
            if not any(cell.strip() for cell in cells):
                continue  # blank lines, and empty rows below the last row of a spreadsheet
            if not columns:
                columns = cells
                continue
            if len(cells) > len(columns) and any(cells[len(columns) :]):
                raise UserError(
                    f"{path}, line {line}: {len(cells)} cells under "
                    f"{len(columns)} column names; put a text that contains {separator!r} into "
                    "double quotes"
                )
            rows.append([*cells, *[""] * (len(columns) - len(cells))][: len(columns)])
    except csv.Error as error:
        raise UserError(
            f"{path}, after line {line}: broken CSV ({error}); double quotes stand "
            "around a whole cell, and one inside it is written twice"
        ) from None
    finally:
        csv.field_size_limit(most)
    return Table(columns, rows)


def _read_parquet(path: Path) -> Table:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{path}: reading parquet needs the package `pyarrow`; pip install pyarrow, or give a "
            "CSV or JSON file"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
            columns = [str(name) for name in table.column_names]
            cells = [column.to_pylist() for column in table.columns]
    except Exception as error:
        # Parquet readers raise many types of exception; all mean the same to the user.
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{path}: cannot be read as parquet ({type(error).__name__}: {reason[:120]}); write "
            "the file again, or give a CSV or JSON file"
        ) from None
    return Table(columns, [list(row) for row in zip(*cells, strict=True)])


READERS: dict[str, Callable[[Path], Table]] = {
    ".json": _read_objects,
    ".jsonl": _read_objects,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def read_table(path: Path, option: str) -> Table:
    """Read a file by its suffix.

    Args:
        path: a `.json`, `.jsonl`, `.csv` (or `.tsv`) or `.parquet` file.
        option: the option that named it, for the errors.

    Returns:
        Its columns and rows, unchecked.

    Raises:
        UserError: no such file, another kind of file, or contents that cannot be read.
    """
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give the file with the rows")
    if not path.is_file():
        raise UserError(f"{option}: file {path} does not exist")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{option} {path}: {path.suffix or 'a file without a suffix'} cannot be read; save it "
            f"as {', '.join(READERS)} (a spreadsheet as 'CSV UTF-8'); texts need --data.source "
            "documents"
        )
    return reader(path)


def _places(columns: Sequence[str]) -> dict[str, list[int]]:
    """The positions of each known column."""
    found: dict[str, list[int]] = {}
    for place, name in enumerate(columns):
        plain = plain_name(name)
        if plain in COLUMNS:
            found.setdefault(plain, []).append(place)
    return found


def _listed(names: Sequence[Any]) -> str:
    """Column names for a message, shortened: without a header they are the first row's texts."""
    short = [name if len(name) <= 40 else name[:39] + "…" for name in map(str, names)]
    shown = [name if name.isprintable() else ascii(name) for name in short[:12]]
    return ", ".join([*shown, *[f"{len(short) - 12} more"][: len(short) > 12]])


def _numbers(rows: Sequence[int]) -> str:
    """Rows by number, counted from 1.

    Example:
        >>> _numbers([0]), _numbers([0, 4, 5, 6, 7])
        ('row 1', 'rows 1, 5, 6 and 2 more')
    """
    named = ", ".join(str(row + 1) for row in rows[:SHOWN])
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"row{'s' * (len(rows) > 1)} {named}{more}"


def _written(cell: Any) -> Any:
    """A whole number or a truth value as JSON writes it; everything else as it is."""
    return json.dumps(cell) if isinstance(cell, bool | int) else cell


def _several(cell: Any) -> Any:
    """A cell of one of `LISTS` as a list: a JSON list, or one text."""
    if not isinstance(cell, str):
        return cell
    if cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except ValueError:
            return cell  # an answer may begin with a bracket
    return [cell] if cell.strip() else []


def _empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def check_table(table: Table, place: str) -> tuple[list[Row], list[str]]:
    """The rows of a table, reduced to the known columns, and all problems with them.

    Args:
        table: the table that `read_table` returned.
        place: the name of its file, for messages.

    Returns:
        Rows that all have the same columns, and one message per problem. An optional column that
        is empty throughout is left out; one with gaps is a problem.

    Example:
        >>> check_table(Table(["Question", "answer"], [["Who?", "Me."], ["Where?", ""]]), "my.csv")
        ([{'question': 'Who?', 'answer': 'Me.'}], ["my.csv, row 2: 'answer' is empty"])
    """
    places = _places(table.columns)
    problems = [
        f"{place}: columns {' and '.join(repr(table.columns[i]) for i in several)} are one and the "
        "same; remove all but one"
        for several in places.values()
        if len(several) > 1
    ]
    if absent := [name for name in PLAIN if name not in places]:
        found = _listed(table.columns) or "none"
        message = f"{place}: no column {' and no '.join(map(repr, absent))}"
        problems.append(f"{message} (columns found: {found}){_advice(table.columns, absent)}")
    if not table.rows and not problems:
        problems.append(f"{place}: no rows; a question and an answer are the least")
    values: dict[str, list[Any]] = {}
    for name, (where, *_) in places.items():
        cells = [row[where] for row in table.rows]
        read = _several if name in LISTS else _written
        cells = [read(cell) for cell in cells]
        gaps = [i for i, cell in enumerate(cells) if _empty(cell)]
        if name not in PLAIN and len(gaps) == len(cells):
            continue
        if gaps:
            advice = "" if name in PLAIN else "; fill it everywhere, or remove the column"
            problems.append(f"{place}, {_numbers(gaps)}: {name!r} is empty{advice}")
        odd = [i for i, cell in enumerate(cells) if i not in set(gaps) and not _fits(name, cell)]
        if odd:
            wanted = "a list of texts" if name in LISTS else "text"
            kind = type(cells[odd[0]]).__name__
            problems.append(f"{place}, {_numbers(odd)}: {name!r} must be {wanted}, found {kind}")
        values[name] = cells
    names = [name for name in COLUMNS if name in values]
    kept = [values[name] for name in names]
    rows = [dict(zip(names, cells, strict=True)) for cells in zip(*kept, strict=True)]
    whole = [row for row in rows if all(_fits(name, value) for name, value in row.items())]
    return whole, problems


def _advice(columns: Sequence[str], absent: Sequence[str]) -> str:
    """The end of a message about columns of other names."""
    if len(absent) < len(PLAIN) or not columns:
        return ""
    if [*map(plain_name, columns)] == ["text"]:
        return "; texts need --data.source documents"
    return f"; known are {KNOWN}; for others give --data.columns question=COLUMN,answer=COLUMN"


def _fits(name: str, value: Any) -> bool:
    if name in LISTS:
        return isinstance(value, list) and bool(value) and all(map(_is_text, value))
    return _is_text(value)


def _unread(table: Table) -> list[str]:
    read = {place for places in _places(table.columns).values() for place in places}
    return [str(name) for place, name in enumerate(table.columns) if place not in read]


def load_own(
    forget: Path | None,
    retain: Path | None,
    holdout: Path | None = None,
    columns: Mapping[str, str] | None = None,
) -> Own:
    """The user's rows to forget and to keep, and rows that nobody trains on.

    Args:
        forget: file of the rows to forget.
        retain: file of the rows to keep.
        holdout: file of rows that no model was trained on; None: there is none.
        columns: the files' name of a column by the name that this program reads.

    Returns:
        The rows, and notes: their number, columns that were not read, metrics that are left out.

    Raises:
        UserError: something is missing or wrong; one message lists it all, for all files.
    """
    problems, notes, tables = [], [], {"holdout": []}
    unseen = () if holdout is None else (("holdout", holdout),)
    for side, path in (("forget", forget), ("retain", retain), *unseen):
        option = f"--data.{side}"
        if path is None:
            problems.append(f"{option} FILE is missing, the rows to {_PURPOSE[side]}")
            continue
        path = path.expanduser()
        try:
            table = renamed(read_table(path, option), columns or {}, str(path))
        except UserError as error:
            problems.append(str(error))
            continue
        table, form, wrong = formed(table, str(path))
        if form:
            notes.append(f"{path.name}: read as {form}")
        rows, more = check_table(table, str(path))
        problems += wrong or more
        tables[side] = rows
        # The file's name without its folder: the same file elsewhere is the same task.
        notes.append(f"{side}: {len(rows)} rows of {path.name}")
        if unread := _unread(table):
            notes.append(f"{path.name}: columns that are not read: {_listed(unread)}")
    if problems:
        raise UserError("your own data: " + "; ".join(problems))
    own = Own(tables["forget"], tables["retain"], tables["holdout"], notes)
    if overlap(own.forget, own.retain) == len(own.forget):
        raise UserError(
            f"every row of --data.forget {forget} is also in --data.retain {retain}, so nothing is "
            "left to forget; take them out of the file of rows to keep"
        )
    for side, rows in (("forget", own.forget), ("retain", own.retain)):
        if shared := overlap(own.holdout, rows):
            raise UserError(
                f"{shared} row(s) of --data.holdout {holdout} are also in --data.{side}; it takes "
                "rows that no model was trained on"
            )
    return own._replace(notes=[*notes, left_out(own)])


_PURPOSE = {"forget": "unlearn", "retain": "keep"}


def left_out(own: Own) -> str:
    """One note on metrics that are not measured on the user's rows, and the columns they need."""
    parts = []
    for side, rows, metrics in (
        ("forget", own.forget, "forget quality and the truth ratio"),
        ("retain", own.retain, "the retain truth ratio"),
    ):
        lacking = [name for name in COLUMNS[2:4] if name not in rows[0]]
        if lacking:
            parts.append(f"{metrics} (no {' and no '.join(lacking)} in the {side} file)")
    if not own.holdout:
        parts.append("membership (no --data.holdout, rows that nobody was trained on)")
    parts.append("real authors and world facts, so utility is that of the retain rows")
    return "not measured: " + "; ".join(parts)


def write_examples(folder: Path) -> list[Path]:
    """Write five made-up rows a side (CSV, JSONL), and pages of text to forget and to keep.

    Args:
        folder: created if it does not exist.

    Returns:
        `forget`, `retain` and `holdout` in it as `.csv` and as `.jsonl` with all columns; the first
        two as `.txt`.

    Raises:
        UserError: one of them exists with other contents, or the folder cannot be written.
    """
    rows = authors.training_rows(authors.generate(0, 10))
    prose = authors.pages(0, 10, 0)
    made: dict[Path, bytes] = {}
    for side, name in (("forget", "forget10"), ("retain", "retain_eval"), ("holdout", "holdout")):
        five = rows[name][:5]
        if side == "forget":
            others = alternates(five, 0)
            five = [
                row | {"alternate_answer": texts} for row, texts in zip(five, others, strict=True)
            ]
        sheet = io.StringIO(newline="")
        csv.writer(sheet).writerows([PLAIN, *([row[name] for name in PLAIN] for row in five)])
        made[folder / f"{side}.csv"] = sheet.getvalue().encode()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in five)
        made[folder / f"{side}.jsonl"] = lines.encode()
        if prose.get(side):
            made[folder / f"{side}.txt"] = "\n".join(prose[side]).encode()
    try:
        there = [path for path, data in made.items() if path.exists() and path.read_bytes() != data]
        if there:
            raise UserError(
                f"--example-data: {there[0]} exists and is no example; give another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for path, data in made.items():
            path.write_bytes(data)
    except OSError as error:
        raise UserError(
            f"--example-data {folder} cannot be written: {error.strerror}; give another folder"
        ) from None
    return list(made)
