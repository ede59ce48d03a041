"""Kinds of damage to a file, and the allowed outcomes of reading it.

A `Row` names a class of files: how a sound one is made, how the programs read it, and how it gets
damaged. `faults` must be refused in one line, or change nothing of what is read. `noise` may also
end in another value: where a flipped bit turns one valid value into another, only a digest could
detect it (`blind` describes these cases). Neither may raise anything but a `UserError`, take ten
seconds, or 4 GiB.
"""

from __future__ import annotations

import faulthandler
import json
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError

SECONDS = 10  # of processor time; a busy machine takes longer by the clock
CLOCK = 90
MEMORY = 4 * 2**30
LONGEST_MESSAGE = 2000

Damage = Callable[[bytes, Random], bytes]


class Row(NamedTuple):
    """A class of files.

    Args:
        name: as the table prints it.
        make: writes a sound sample into an empty folder; returns the file that gets damaged.
        read: reads that file as the programs do; its results can be compared.
        faults: damage that a reader must detect, or that changes nothing.
        noise: damage that may turn one valid value into another.
        blind: what noise can change undetected.
        cases: number of cases in `make test`.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    faults: Mapping[str, Damage]
    noise: Mapping[str, Damage]
    blind: str
    cases: int = 100


class Failure(NamedTuple):
    """A case with an outcome that is not allowed; `seed` reproduces it."""

    row: str
    damage: str
    seed: str
    what: str


class Hang(BaseException):
    """The time limit was exceeded; no reader may catch this."""


@contextmanager
def time_limit():
    """Raise `Hang` inside the block if it does not end in time."""

    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, CLOCK)
    # Inside C code no signal arrives. Where pytest captures, `sys.stderr` is not a file.
    faulthandler.dump_traceback_later(2 * CLOCK, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def peak() -> int:
    """Peak memory of this process or one of its children, in bytes."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(one).ru_maxrss for one in who) * 1024


def outcome(read: Callable[[Path], Any], path: Path, sound: Any) -> str:
    """How reading a damaged file ended: refused, same, changed, or what went wrong."""
    started, before = time.process_time(), peak()
    try:
        with time_limit():
            value = read(path)
        answer = "same" if value == sound else "changed"
    except UserError as error:
        text = str(error)
        printable = text.isprintable() and len(text) < LONGEST_MESSAGE
        answer = "refused" if printable else f"no line to print: {text[:300]!r}"
    except Hang:
        return f"hang: more than {CLOCK} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"traceback: {error!r:.200} at {last.filename}:{last.lineno}"
    if (took := time.process_time() - started) > SECONDS:
        return f"hang: {took:.1f} s of processor time"
    if peak() - before > MEMORY:
        return f"memory: {(peak() - before) / 2**30:.1f} GiB"
    return answer


def fuzz(
    row: Row, folder: Path, seed: str, cases: int | None = None, seconds: float = 0.0
) -> tuple[Counter[str], list[Failure]]:
    """Damage the sample of a row repeatedly.

    Args:
        row: the class of files.
        folder: an empty one.
        seed: determines everything random.
        cases: how many; None: as many as fit into `seconds`.
        seconds: time limit.

    Returns:
        The number of cases by outcome, and the cases whose outcome is not allowed.
    """
    path = row.make(folder)
    whole = path.read_bytes()
    sound = row.read(path)
    kinds = [*row.faults, *row.noise]
    tally: Counter[str] = Counter()
    failures = []
    number, until = 0, time.monotonic() + seconds
    while number < cases if cases is not None else time.monotonic() < until:
        kind, name = kinds[number % len(kinds)], f"{seed}-{number}"
        number += 1
        damaged = (row.faults | row.noise)[kind](whole, Random(f"{row.name} {name}"))
        if damaged == whole:
            tally["untouched"] += 1
            continue
        path.write_bytes(damaged)
        answer = outcome(row.read, path, sound)
        if answer == "changed" and kind in row.faults:
            answer = "silent acceptance"
        tally[answer.partition(":")[0]] += 1
        if answer not in ("refused", "same", "changed"):
            failures.append(Failure(row.name, kind, name, answer))
            (folder.parent / f"{row.name}-{name}".replace(" ", "-")).write_bytes(damaged)
    path.write_bytes(whole)
    return tally, failures


# Damage to any file.


def cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data))]


def flip(data: bytes, random: Random) -> bytes:
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        out[random.randrange(len(out))] ^= 1 << random.randrange(8)
    return bytes(out)


def overwrite(data: bytes, random: Random) -> bytes:
    patch = random.choice((b"\0" * 8, b"\xff" * 8, b"\xff" * 7 + b"\x7f", random.randbytes(4)))
    at = random.randrange(len(data))
    return data[:at] + patch + data[at + len(patch) :]


def lose(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data))
    return data[:at] + data[at + random.choice((1, 2, 7, 64, 4096)) :]


def repeat(data: bytes, random: Random) -> bytes:
    first, last = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return data[:last] + data[first:last] + data[last:]


def binary(data: bytes, random: Random) -> bytes:
    """Bytes that are not UTF-8."""
    at = random.randrange(len(data))
    return (
        data[:at] + random.choice((b"\xff\xfe", b"\xc3\x28", b"\x80", b"\xed\xa0\x80")) + data[at:]
    )


def empty(data: bytes, random: Random) -> bytes:
    return random.choice((b"", b"\0" * 100, b"\n", b"\xef\xbb\xbf"))


NOISE: dict[str, Damage] = {"flip": flip, "overwrite": overwrite, "lose": lose, "repeat": repeat}

# Damage to JSON. `RAW` is inserted as text, for what no Python value can express.
MARK = "@raw@"
DEEP = "[" * 100_000
RAW = {
    "digits": "9" * 5000,
    "infinite": "1e400",
    "nan": "NaN",
    "minus": "-1",
    "true": "true",
    "list": "[]",
    "object": "{}",
    "text": '"text"',
    "half a character": '"\\ud800"',
    "deep": DEEP,
    "nested": "[" * 3000 + "]" * 3000,
}


def spots(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in list(items) if isinstance(tree, (dict, list)) else ():
        found.append((tree, key))
        if isinstance(value, (dict, list)):
            found += spots(value)
    return found


def on_json(change: Callable[[Any, Random], Any]) -> Damage:
    """Damage to a JSON file from a change of its value."""

    def damage(data: bytes, random: Random) -> bytes:
        return json.dumps(change(json.loads(data), random)).encode()

    return damage


def replace(raw: str) -> Callable[[Any, Random], str]:
    """A JSON text with one value replaced by `raw`."""

    def change(tree: Any, random: Random) -> str:
        container, key = random.choice(spots(tree))
        container[key] = MARK
        return json.dumps(tree).replace(f'"{MARK}"', raw)

    return change


def twice(tree: Any, random: Random) -> str:
    """A JSON text in which an object has the same key twice."""
    places = [(c, k) for c, k in spots(tree) if isinstance(c, dict)]
    container, key = random.choice(places)
    container[MARK] = container[key] if random.random() < 0.5 else 0
    return json.dumps(tree).replace(f'"{MARK}"', json.dumps(key))


def misspell(tree: Any, random: Random) -> str:
    """A JSON text in which one letter of a key is changed."""
    container, key = random.choice([(c, k) for c, k in spots(tree) if isinstance(c, dict) and k])
    at = random.randrange(len(key))
    # No letter that turns one known key into another (eos_token, bos_token).
    letter = random.choice([c for c in "aqxyz_" if c != key[at]])
    container[key[:at] + letter + key[at + 1 :]] = container.pop(key)
    return json.dumps(tree)


def as_damage(change: Callable[[Any, Random], str]) -> Damage:
    return lambda data, random: change(json.loads(data), random).encode()


def json_faults(*without: str) -> dict[str, Damage]:
    """Damage that must be detected in any JSON value, without some entries of `RAW`."""
    faults = {name: as_damage(replace(raw)) for name, raw in RAW.items() if name not in without}
    rest = {"cut": cut, "binary": binary, "empty": empty, "twice": as_damage(twice)}
    rest["misspell"] = as_damage(misspell)
    return {**{k: v for k, v in rest.items() if k not in without}, **faults}


def by_line(damage: Damage) -> Damage:
    """Damage to one line of a file of JSON lines."""

    def change(data: bytes, random: Random) -> bytes:
        lines = data.splitlines()
        at = random.randrange(len(lines))
        lines[at] = damage(lines[at], random)
        return b"\n".join(lines) + b"\n"

    return change
