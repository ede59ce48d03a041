"""The command line: presets overridden by options, and errors that a user can act on.

Bad input ends in one line on stderr and exit code 2, before compute; a run that cannot continue
ends in one line and exit code 1.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import difflib
import errno
import io
import itertools
import os
import re
import shlex
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import one_line, shortened_path
from train.options.choices import FIRST, grouped, known_words, options
from train.options.config import replace
from train.options.rows import places, rows_of
from train.runtime import suggest
from train.runtime.plain import plain

# A full or write-protected disk is not a bug, wherever the error is raised.
UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.EFBIG),
)


def check_options(cls: type, args: Sequence[str]) -> None:
    """Raise `UserError` for an option that `cls` does not have, naming the nearest one."""
    known = known_words(cls)
    for arg, following in itertools.zip_longest(args, args[1:]):
        if not arg.startswith("--") or arg == "--help":
            continue
        name = arg.partition("=")[0].replace("_", "-")
        head, _, last = name.rpartition(".")
        plain = (
            f"{head}.{last.removeprefix('no-')}" if head else "--" + name[2:].removeprefix("no-")
        )
        if name not in known and plain not in known:
            value = arg.partition("=")[2] or following or ""
            right = meant(name, value, known)
            raise UserError(f"option {name} is unknown; did you mean {right}? (--help lists all)")


def check_values(cls: type, default: Any, args: Sequence[str]) -> None:
    """Raise `UserError` for an option of several values that is given none."""
    several = {
        option.name for option in options(cls, default) if typing.get_origin(option.kind) is tuple
    }
    for arg, following in itertools.zip_longest(args, args[1:]):
        if arg.replace("_", "-") in several and (following is None or following.startswith("--")):
            raise UserError(f"option {arg} needs a value; give one or more, or leave it out")


def with_rows(config: Any, args: Sequence[str]) -> Any:
    """The configuration with the rows chosen by `--objective.name` and the like.

    Raises:
        UserError: an unknown name, or an option of another row.
    """
    for place, rows, chosen in list(places(config)):
        prefix = f"--{place.replace('_', '-')}."
        name = option_value(args, prefix + "name")
        if name is not None and name != chosen.name:
            chosen = rows.other(chosen, name)
            config = replace(config, **{place: chosen})
        own = {field.name for field in dataclasses.fields(chosen)}
        for option in rows.words():
            value = option_value(args, prefix + option.replace("_", "-"))
            if option not in own and value is not None:
                raise rows.refusal(rows.table[chosen.name], option, value, prefix)
    return config


def meant(name: str, value: str, known: Mapping[str, Sequence[str]]) -> str:
    """The option that was meant, in any group, with its value where the value is a known word.

    Args:
        name: The option as it was given.
        value: The argument after the option.
        known: All options, each with the words that it accepts.

    Example:
        >>> known = {"--seed": (), "--optimizer.name": ("adamw", "muon"), "--optimizer.rank": ()}
        >>> meant("--optimizer", "muon", known)
        '--optimizer.name muon'
        >>> meant("--batch-size", "4", {"--seed": (), "--unlearn.batch-size": ()})
        '--unlearn.batch-size'
    """
    order = {option: i for i, option in enumerate(FIRST)}
    first = sorted(known, key=lambda o: (order.get(o, len(order)), o.startswith("--finetune.")))
    groups = {o[2:].partition(".")[0] for o in known if "." in o}
    word = name.removeprefix("--")
    if "." not in word:
        word = next(iter(difflib.get_close_matches(word, groups, 1, 0.8)), word)
    inside = [o for o in first if o.startswith(f"--{word}.")]
    same = [o for o in first if o.rpartition(".")[2].lstrip("-") == word]
    alike = [o for o in first if len(word) > 2 and o.rpartition(".")[2].startswith(word)]
    if word != "none" and (told := [o for o in first if word in known[o]]):
        return f"{told[0]} {word}"  # --muon
    if fits := [o for o in [*inside, *same] if value in known[o]]:
        return f"{fits[0]} {value}"  # --optimizer muon
    usual = [o for o in (f"--{word}.name", f"--{word}.path") if o in known]
    found = next(iter([*usual, *same, *inside, *alike]), None)
    return found or suggest.nearest(name, list(known))


def option_value(args: Sequence[str], option: str) -> str | None:
    """The value of an option on a command line, `--a b` or `--a=b`; None when it is absent."""
    for arg, following in itertools.zip_longest(args, args[1:]):
        name, equals, value = arg.partition("=")
        if name.replace("_", "-") == option:
            return value if equals else following
    return None


def parse(cls: type, default: Any, args: Sequence[str], prog: str, summary: str) -> Any:
    """`default` overridden by command-line options, as a `cls`, which may have more options."""
    tyro = _tyro()
    if type(default) is not cls:
        fields = dataclasses.fields(default)
        default = cls(**{f.name: getattr(default, f.name) for f in fields})
    if "--help" in args or "-h" in args:
        default = with_rows(default, args)
        tyro.cli(grouped(cls, default), args=["--help"], prog=prog, description=summary)
    check_options(cls, args)
    default = with_rows(default, args)
    check_values(cls, default, args)
    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught), contextlib.redirect_stdout(caught):
            found = tyro.cli(cls, default=default, args=list(args), prog=prog, description=summary)
    except SystemExit as stop:
        complaint = _complaint(caught.getvalue())[:240]
        raise UserError(f"{complaint} (--help lists all options)") from stop
    for place, _, chosen in places(found):
        wanted = next(value.name for at, _, value in places(default) if at == place)
        if chosen.name != wanted:
            option = f"--{place.replace('_', '-')}.name"
            raise UserError(f"{option} is {wanted} and {chosen.name}; give it once")
    return found


def _tyro() -> Any:
    """Import tyro, which hashes all builtins: `_` of a Python shell may be a tuple with a list."""
    values = builtins.__dict__
    last = {"_": values.pop("_")} if "_" in values else {}
    try:
        import tyro
    finally:
        values.update(last)
    return tyro


_TYPES = {"INT": "a whole number", "FLOAT": "a number", "PATH": "a path", "STR": "a text"}


def _complaint(printed: str) -> str:
    """The message of a tyro error on one line, in words.

    Example:
        >>> _complaint("Error parsing --seed: invalid literal for int() with base 10: 'ten'")
        "--seed takes a whole number, got 'ten'"
        >>> _complaint("Error parsing --unlearn.steps: no type matching {None}|INT could be "
        ...            "instantiated from ['1.5']. Got errors: ...")
        "--unlearn.steps takes a whole number or None, got '1.5'"
    """
    message = _message(printed)
    for pattern, kinds in _UNPARSED:
        if found := re.match(pattern, message):
            wanted = kinds or found["kinds"]
            words = [_TYPES.get(kind, kind.strip("{}")) for kind in wanted.split("|")]
            words.sort(key=lambda word: word == "None")
            return f"{found['option']} takes {' or '.join(words)}, got {found['value']}"
    return message


_UNPARSED = (
    (r"Error parsing (?P<option>--\S+): invalid literal for int\(\).*: (?P<value>'.*')$", "INT"),
    (r"Error parsing (?P<option>--\S+): could not convert .* float: (?P<value>'.*')$", "FLOAT"),
    (
        r"Error parsing (?P<option>--\S+): no type matching (?P<kinds>\S+) could be instantiated "
        r"from \[(?P<value>.*?)\]",
        "",
    ),
)


def _message(printed: str) -> str:
    """The text of a tyro error, whose box has a title, the message and help."""
    words = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", " ", printed)
    blocks = [" ".join(block.split()) for block in re.split(r"[-─]{4,}", words)]
    blocks = [block for block in blocks if block]
    return blocks[min(1, len(blocks) - 1)] if blocks else "these options cannot be read"


def from_json(cls: Any, value: Any, name: str = "") -> Any:
    """Rebuild a configuration dataclass from the JSON values of `config.to_json`.

    Args:
        cls: The dataclass, or the type of one of its entries.
        value: The JSON values.
        name: The dotted name of the entry, for errors.

    Raises:
        UserError: an unknown entry, or one of another type.
    """
    if dataclasses.is_dataclass(cls):
        if not isinstance(value, dict):
            raise UserError(f"configuration entry {name or 'as a whole'} must be a JSON object")
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(typing.cast(Any, cls))}
        if unknown := set(value) - known:
            raise UserError(
                f"configuration has an unknown entry {sorted(unknown)[0]!r}; it was written by "
                "another version"
            )
        prefix = f"{name}." if name else ""
        entries = {}
        for field in dataclasses.fields(typing.cast(Any, cls)):
            if field.name in value:
                kind, entry, rows = hints[field.name], value[field.name], rows_of(field)
                if rows is not None and isinstance(entry, dict):
                    kind, entry = rows.read(entry, field.default.name, f"--{prefix}{field.name}.")
                entries[field.name] = from_json(kind, entry, prefix + field.name)
        return typing.cast(Any, cls)(**entries)
    union = typing.get_origin(cls) in (typing.Union, types.UnionType)
    for kind in typing.get_args(cls) if union else (cls,):
        with contextlib.suppress(TypeError):
            return _value(kind, value)
    shown = one_line(repr(value), 80)
    raise UserError(f"configuration entry {name} is {shown}, which does not fit; correct it")


def _value(kind: Any, value: Any) -> Any:
    """A JSON value as `kind`: a plain type, `Path`, `None`, `Literal` or `tuple[T, ...]`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal and value in inner:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_value(inner[0], item) for item in value)
    if kind is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    if kind is float and type(value) is int:
        return value
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise TypeError(kind)


def unusable(error: OSError) -> str:
    """The message, with advice, for a path that is not valid or cannot be written."""
    name = plain(shortened_path(error.filename or "a file"))
    if error.errno == errno.ENAMETOOLONG:
        return f"{name}: {error.strerror}; give a shorter path"
    return f"cannot write {name}: {error.strerror}; free space or choose another --output"


def command() -> str:
    """The command line that starts this process again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = sys.argv[0] if spec is None else f"-m {spec.name.removesuffix('.__main__')}"
    return f"python {name} {shlex.join(sys.argv[1:])}".rstrip()


def _end(code: int) -> typing.NoReturn:
    """Remove the temporary folders of this process and end it at once."""
    from train.runtime import remote

    remote.forget()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def main(program: Callable[[list[str]], None]) -> None:
    """Run `program(argv)`; turn its errors into one line and an exit code."""
    from train.runtime import distributed
    from train.runtime.errors import TrainingError

    # A program in `__main__` is all that this process does; another caller may go on.
    ours = program.__module__ == "__main__"
    stopping = threading.Lock()

    def stop() -> typing.NoReturn:
        stopping.acquire()  # never released: a second thread waits here until the process ends
        word, code = distributed.stopped_by()
        with contextlib.suppress(OSError, ValueError):
            if sys.stderr.isatty():  # over "^C" and a progress bar
                print("\r\033[K", end="", file=sys.stderr)
        distributed.say_on_first(
            f"stopped by {word}, finished work is stored; resume with: {command()}"
        )
        if ours and (code or not distributed.many()):
            # No orderly shutdown: it crashes while XLA still compiles or computes.
            _end(code)
        sys.exit(code)

    try:
        with distributed.signals_stop(stop if ours else None):
            program(sys.argv[1:])
    except distributed.Preempted:
        stop()
    except UserError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        distributed.leave(2, isinstance(error, distributed.Agreed))
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(f"error: {unusable(error)}", file=sys.stderr)
        distributed.leave(2)
        sys.exit(2)
    except TrainingError as error:
        distributed.say_on_first(f"stopped: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        distributed.say_on_first(f"stopped by Ctrl-C, the same command continues: {command()}")
        if ours:
            _end(130)
        sys.exit(130)
    except Exception:
        if distributed.many():
            traceback.print_exc()
            distributed.leave(1)
        raise
