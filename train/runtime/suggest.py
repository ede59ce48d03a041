"""Look-up of names in a table, with the nearest one suggested for an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlib_unlearn.errors import UserError


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word closest to `word`; one that it abbreviates comes first.

    Example:
        >>> nearest("--optimizer.lr", ["--optimizer.rank", "--optimizer.learning-rate"])
        '--optimizer.learning-rate'
    """

    def last(name: str) -> str:
        return name.rpartition(".")[2].lstrip("-")

    def initials(name: str) -> str:
        return "".join(part[:1] for part in last(name).split("-"))

    meant = [k for k in known if len(last(word)) > 1 and initials(k) == last(word)]
    return difflib.get_close_matches(word, meant or known, 1, 0.0)[0]


def choose(word: str, table: Mapping[str, Any], what: str) -> Any:
    """`table[word]`, or a `UserError` that names the nearest entry and all of them."""
    if word not in table:
        raise UserError(
            f"{what} {word!r} is unknown; did you mean {nearest(word, list(table))!r}? "
            f"({', '.join(table)})"
        )
    return table[word]


def check_choice(option: str, value: str, known: Sequence[str]) -> None:
    """Raise `UserError` for a word that is none of `known`, naming the nearest."""
    choose(value, dict.fromkeys(known), option)
