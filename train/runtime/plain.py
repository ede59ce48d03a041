"""Text from files and options, made safe for terminals, CSV files and LaTeX tables."""

from __future__ import annotations

import unicodedata
from typing import Any

# Bidirectional control characters: a name must not reorder the line that contains it.
TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def shown(text: Any) -> str:
    r"""Text with control characters, line breaks and lone surrogates escaped.

    An escape sequence in a name would move the cursor or change colours; a line break would end the
    line of a message.

    Example:
        >>> shown("a\x1b[31m  b\n")
        'a\\x1b[31m  b\\n'
    """
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in TURNS
        else c
        for c in str(text)
    )


def plain(text: Any) -> str:
    r"""`shown`, on one line: line breaks and runs of white space become one space.

    Example:
        >>> plain("a\x1b[31mb\r\n  c")
        'a\\x1b[31mb c'
    """
    return shown(" ".join(str(text).split()))


def clean(text: Any, limit: int = 700) -> str:
    """Text for a page: no control characters or lone surrogates, cut after `limit` characters."""
    text = str(text).encode("utf-8", "replace").decode("utf-8").strip()
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} characters more)"
