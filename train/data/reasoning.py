"""Files of reasoning rows (`jaxlib_unlearn.cot`), read and rewritten a few rows at a time.

The formats are JSONL (one object a line) and parquet. A rewriting keeps all that it does not
change: the bytes of a line, the other columns of a table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import parse_json, reading

COLUMNS = ("question", "thoughts", "answer", "messages")
LONGEST = 64 * 2**20  # bytes of a line, which is in memory as a whole
LINES, TABLE_ROWS = 256, 2048  # at once; in parquet these are its row groups
Change = Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Sequence[Mapping[str, Any]]]


class Format(NamedTuple):
    """A kind of file.

    Args:
        rows: a function that yields every row with its place, for messages.
        rewrite: `rewrite(source, target, change)` writes `change(places, rows)` of a few rows at a
            time, and yields the share of the file that is done.
    """

    rows: Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]
    rewrite: Callable[[Path, Path, Change], Iterator[float]]


def read_rows(path: Path, option: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a file, with its place for messages.

    Args:
        path: a `.jsonl` or `.parquet` file.
        option: the option that named it, for messages.

    Raises:
        UserError: no such file, another kind of file, or contents that cannot be read.
    """
    return format_of(path, option).rows(path)


def format_of(path: Path, option: str = "") -> Format:
    """The reader and writer of a file, by its suffix.

    Raises:
        UserError: no such file, or another suffix.
    """
    said = f"{option} {path}".strip()
    if not path.is_file():
        raise UserError(f"{said}: no such file; give a file of rows")
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{said}: cannot be read; give a file {' or '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines that are not blank, each with its place and its line end."""
    with reading(path, "correct that"), path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
            where = f"{path}, line {number}"
            if len(line) > LONGEST:
                raise UserError(f"{where}: has more than {LONGEST >> 20} MiB; write it as parquet")
            if line.strip():
                yield where, line


def _row(where: str, line: bytes) -> dict[str, Any]:
    with reading(where, "give one JSON object a line", "is not JSON"):
        row = parse_json(line.decode("utf-8-sig"))
    if not isinstance(row, dict):
        raise UserError(f"{where}: is no JSON object; give one a line")
    return row


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _lines(path):
        yield where, _row(where, line)


def _rewrite_jsonl(source: Path, target: Path, change: Change) -> Iterator[float]:
    size, done, lines = source.stat().st_size, 0, _lines(source)
    with target.open("wb") as out:
        while some := list(islice(lines, LINES)):
            rows = [_row(where, line) for where, line in some]
            for row, changed, (_, line) in zip(
                rows, change([where for where, _ in some], rows), some, strict=True
            ):
                done += len(line)
                out.write(line if changed is row else _written(changed) + _end_of(line))
            yield done / size


def _written(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape
        return json.dumps(row).encode()


def _end_of(line: bytes) -> bytes:
    return line[len(line.rstrip(b"\r\n")) :]


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"{path}: reading parquet needs the package `pyarrow`; pip install pyarrow, or give a "
            "JSONL file"
        ) from None
    with reading(path, "write the file again", "cannot be read as parquet"):
        return parquet.ParquetFile(path)


def _batches(
    path: Path, file: Any, columns: list[str] | None = None
) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """Some rows at a time: their table, and the values of `COLUMNS` as Python objects."""
    names = _named(file)
    with reading(path, "write the file again", "cannot be read as parquet"):
        for batch in file.iter_batches(batch_size=TABLE_ROWS, columns=columns):
            yield batch, batch.select(names).to_pylist()


def _named(file: Any) -> list[str]:
    return [name for name in COLUMNS if name in file.schema_arrow.names]


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    file, number = _parquet(path), 0
    for _, rows in _batches(path, file, _named(file)):
        for row in rows:
            number += 1
            yield f"{path}, row {number}", row


def _rewrite_parquet(source: Path, target: Path, change: Change) -> Iterator[float]:
    file, done = _parquet(source), 0
    import pyarrow
    import pyarrow.parquet as parquet

    names, schema = _named(file), file.schema_arrow
    with parquet.ParquetWriter(target, schema) as out:
        for batch, rows in _batches(source, file):
            places = [f"{source}, row {done + i + 1}" for i in range(len(rows))]
            changed = change(places, rows)
            for name in names:
                values = [row[name] for row in changed]
                if any(new is not row[name] for new, row in zip(values, rows, strict=True)):
                    place = schema.get_field_index(name)
                    array = pyarrow.array(values, schema.field(place).type)
                    batch = batch.set_column(place, schema.field(place), array)
            out.write_batch(batch)
            done += len(rows)
            yield done / file.metadata.num_rows


FORMATS = {
    ".jsonl": Format(_jsonl_rows, _rewrite_jsonl),
    ".parquet": Format(_parquet_rows, _rewrite_parquet),
}
