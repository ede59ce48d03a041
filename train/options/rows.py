"""Fields of a configuration whose type depends on a name: `--objective.name`, `--optimizer.name`.

A table has a row for each name, and each row its own dataclass of options. Command lines and files
are read in this order: first the name, then the options of that row's dataclass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import option, words_of


class Rows(NamedTuple):
    """A table that a field of a configuration chooses from.

    Args:
        table: The rows by name; a row's `options` is a dataclass with a field `name`.
        options_of: A function `options_of(name, **given)` that returns the options of a row.
        other: A function `other(options, name)` that returns the options of the row `name`, which
            replace `options`.
        refusal: A function `refusal(row, option, value, prefix)` that returns the error for an
            option of another row.
    """

    table: Mapping[str, Any]
    options_of: Callable[..., Any]
    other: Callable[[Any, str], Any]
    refusal: Callable[[Any, str, Any, str], UserError]

    def words(self) -> dict[str, tuple[str, ...]]:
        """The options of all rows, each with the words that any of the rows accepts."""
        found: dict[str, tuple[str, ...]] = {"name": tuple(self.table)}
        for row in self.table.values():
            for field in dataclasses.fields(row.options):
                both = (*found.get(field.name, ()), *words_of(field))
                found[field.name] = tuple(dict.fromkeys(both))
        return found

    def read(
        self, entries: Mapping[str, Any], default: str, prefix: str
    ) -> tuple[type, dict[str, Any]]:
        """The dataclass of options to which the entries of a file belong, and these entries.

        Raises:
            UserError: an unknown name, or an option of another row.
        """
        named = entries.get("name", default)
        options = self.options_of(named if isinstance(named, str) else default)
        own = {field.name for field in dataclasses.fields(options)}
        for name in entries.keys() & self.words().keys() - own:
            raise self.refusal(self.table[options.name], name, entries[name], prefix)
        return type(options), {**entries}


def chosen(rows: Rows, default: Any) -> Any:
    """A field of a configuration that holds the options of one row of a table."""
    return option(default, "", rows=rows)


def rows_of(field: dataclasses.Field) -> Rows | None:
    """The table that a field chooses from; None for an ordinary field."""
    return field.metadata.get("rows")


def places(config: Any, prefix: str = "") -> Iterator[tuple[str, Rows, Any]]:
    """Dotted name, table and value of every such field of a configuration, nested ones too."""
    for field in dataclasses.fields(config):
        value, rows = getattr(config, field.name), rows_of(field)
        if rows is not None:
            yield prefix + field.name, rows, value
        elif dataclasses.is_dataclass(value):
            yield from places(value, f"{prefix}{field.name}.")
