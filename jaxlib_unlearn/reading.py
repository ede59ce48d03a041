"""Reading of files of any origin: any defect of one becomes a one-line `UserError`.

Every reader of the project goes through `reading`, so that a wrong encoding, nesting, type or key
gives the same kind of message everywhere, and nothing is read that is not a file or is too large.
"""

from __future__ import annotations

import contextlib
import json
import numbers
import os
import stat
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError

# Parsed, a JSON text of n bytes takes up to 24 n bytes: 1.5 GiB here, and some seconds.
LARGEST_JSON = 2**26
DEEPEST_JSON = 100  # lists and objects in one another
LARGEST_TEXT = 2**28
LONGEST_INTEGER = 40
# Exceptions that parsers raise for damaged files. `Exception` itself comes from `tokenizers`.
DAMAGE = (
    *(OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError),
    *(AssertionError, RuntimeError, MemoryError, Warning),
    *(zipfile.BadZipFile, zlib.error),
)


def is_damage(error: BaseException) -> bool:
    """Whether an exception is about the input; this includes panics of Rust libraries."""
    kind = type(error)
    return isinstance(error, DAMAGE) or kind is Exception or kind.__name__ == "PanicException"


def one_line(error: object, limit: int = 160) -> str:
    """The text of an error on one line, printable, cut to `limit` characters."""
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def reason(error: BaseException) -> str:
    """The reason of an error, in a few words.

    Example:
        >>> reason(KeyError("shape"))
        "no 'shape' in it"
    """
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text at byte {error.start}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "more than this host's memory holds"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"no {one_line(error)} in it"
    return one_line(error) or type(error).__name__


@contextlib.contextmanager
def reading(
    where: object, advice: str = "get it anew", what: str = "cannot be read"
) -> Iterator[None]:
    """Turn the exception that a damaged file raises in this block into a `UserError`.

    Args:
        where: the file, as the message names it.
        advice: the end of the message, which says what to do.
        what: the defect of the content, for the message; the reason follows in brackets.

    Raises:
        UserError: `where: what (reason); advice`. A `UserError` from inside passes as it is.

    Example:
        >>> with reading("a.json", "write it again"):
        ...     {}["shape"]
        Traceback (most recent call last):
        ...
        jaxlib_unlearn.errors.UserError: a.json: cannot be read (no 'shape' in it); write it again
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not is_damage(error):
            raise
        what = "cannot be read" if isinstance(error, OSError) else what
        raise UserError(f"{one_line(where, 400)}: {what} ({reason(error)}); {advice}") from error


def exists(path: Path, advice: str = "give another path") -> bool:
    """`path.exists()`; a path that cannot be examined (too long, no permission) is an error.

    Raises:
        UserError: it cannot be examined.
    """
    with reading(shortened_path(path), advice, "cannot be looked at"):
        return path.exists()


def shortened_path(path: object, limit: int = 200) -> str:
    """A path as messages show it: only its end where it is very long.

    Example:
        >>> shortened_path("a" * 300, 9)
        '...aaaaaa'
    """
    text = str(path)
    return text if len(text) <= limit else "..." + text[3 - limit :]


def read_text(
    path: Any,
    advice: str = "get it anew",
    *,
    what: str = "cannot be read",
    limit: int = LARGEST_TEXT,
    encoding: str = "utf-8",
) -> str:
    """The text of a file.

    Args:
        path: a local path, or one of `etils.epath` in a bucket.
        advice: the end of the message if it cannot be read, which says what to do.
        what: the defect of the content, see `reading`.
        limit: the largest number of bytes of a local file.
        encoding: the encoding of the text.

    Returns:
        The text, line ends as `\\n`.

    Raises:
        UserError: missing, not a regular file, too large, or not text.
    """
    where = shortened_path(path)
    with reading(where, advice, what):
        if "://" in str(path):
            return path.read_text(encoding=encoding)
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{where}: not a file; {advice}")
        if found.st_size > limit:
            raise UserError(
                f"{where}: {found.st_size:,} bytes, more than the {limit:,} that are read; {advice}"
            )
        return Path(path).read_text(encoding=encoding)


def parse_json(text: str) -> Any:
    """A JSON value; stricter than `json.loads`, so that nothing is lost silently.

    Args:
        text: the whole text.

    Returns:
        The value. NaN and Infinity are read, as Python writes them.

    Raises:
        ValueError: not JSON, too long, nested too deeply, an integer of more than 40 digits, or an
            object with a duplicate key.

    Example:
        >>> parse_json('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ...
        ValueError: the key 'a' stands twice in one object
    """
    if len(text) > LARGEST_JSON:
        raise ValueError(f"{len(text):,} characters, more than the {LARGEST_JSON:,} that are read")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    """Python's own bound differs by version: 3.13 reads thousands of brackets, 3.11 a thousand."""
    level: list[Any] = [[value]]
    for _ in range(DEEPEST_JSON + 1):
        parts = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for part in parts for x in part if isinstance(x, dict | list)]
        if not level:
            return
    raise ValueError("nested too deeply")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {one_line(twice, 60)!r} stands twice in one object")
    return value


def _integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def read_json(path: Any, advice: str = "get it anew", *, what: str = "not readable as JSON") -> Any:
    """The value of a JSON file.

    Raises:
        UserError: it cannot be read, or `parse_json` refuses it.
    """
    text = read_text(path, advice, what=what, limit=LARGEST_JSON)
    with reading(shortened_path(path), advice, what):
        return parse_json(text)


def check_spelling(
    given: Iterable[str], known: Collection[str], where: object, advice: str
) -> None:
    """Raise `UserError` for an unknown name that is one letter off a known, absent one.

    Such a name would be ignored, and a default or nothing used in place of its value.

    Args:
        given: names found in a file.
        known: names that are read.
        where: the file, for the message.
        advice: the end of the message, which says what to do.

    Example:
        >>> check_spelling(["rope_thets"], ["rope_theta"], "config.json", "correct it")
        Traceback (most recent call last):
        ...
        jaxlib_unlearn.errors.UserError: config.json: 'rope_thets' is unknown, and 'rope_theta' ...
    """
    given = set(given)
    for name in sorted(given - set(known)):
        for key in known:
            if key not in given and _a_letter_off(name, key):
                raise UserError(
                    f"{where}: {one_line(name, 60)!r} is unknown, and {key!r} is absent; {advice}"
                )


def _a_letter_off(one: str, other: str) -> bool:
    """Whether two words differ by one letter, changed, removed or added."""
    if abs(len(one) - len(other)) > 1:
        return False
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), -1)
    if same < 0:
        return len(one) != len(other)
    rest, other_rest = one[same:], other[same:]
    return other_rest[1:] in (rest, rest[1:]) or other_rest == rest[1:]


def number(value: Any) -> float:
    """A JSON number as a float.

    Raises:
        TypeError: it is not a number; true and false are not.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{one_line(repr(value), 40)} is no number")
    return float(value)
