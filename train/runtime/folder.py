"""The run folder: its lock, and the configuration that it holds.

Every program opens its folder in two steps: `claim` among the checks before compute, `enter` when
nothing can be wrong any more.

One run at a time: the first holds a lock that is released when its process ends, even by `kill -9`.
Buckets have no locks; two runs in one `gs://` folder are not noticed there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlib_unlearn.errors import UserError
from train.runtime import distributed, files, remote
from train.runtime.plain import plain
from train.runtime.stages import digest, write_atomic
from train.runtime.tracking import say

LOCK = "run.lock"
BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
# Unfinished files of killed runs; a model is first exported into a hidden sibling folder.
LEFT = tuple(
    f"{folder}*{files.PART}" for folder in ("", "evals/", "caches/", "stages/", "observed-*/")
)
LEFT += (f"checkpoints/*/*{files.PART}", ".export.*")
_held: set[Path] = set()


class Place(NamedTuple):
    """A folder that a program writes into.

    Args:
        folder: its path, local or in a bucket.
        check: `check(root)`, called in the first process: whether there is a folder to continue in;
            raises `UserError` for a folder that is not the program's.
        make: `make(root)`, called in every process: creates the folder, or enters the existing one.
    """

    folder: Path
    check: Callable[[Path], bool]
    make: Callable[[Path], Any]


def run_place(folder: Path, identity: dict[str, Any]) -> Place:
    """The folder of a run whose configuration is `identity`."""
    return Place(
        folder, lambda root: check_folder(root, identity), lambda root: _enter_run(root, identity)
    )


def claim(place: Place, held: contextlib.ExitStack | None = None) -> None:
    """Refuse a folder that is not the program's; lock one that exists.

    Thus another run in it is noticed before data and model are read. With several processes the
    first one looks.

    Args:
        place: the folder.
        held: the stack that keeps the lock; None: nothing is locked.

    Raises:
        UserError: the folder is another program's or configuration's, or in use.
    """
    if not distributed.is_first():
        return
    exists = place.check(remote.mirror(place.folder))
    if exists and held is not None and not remote.is_remote(place.folder):
        held.enter_context(lock(place.folder))


def enter(place: Place, held: contextlib.ExitStack | None = None) -> Path:
    """Lock the folder, created if necessary, and enter it; each process must call this.

    Args:
        place: the folder.
        held: the stack that keeps the lock; None: nothing is locked.

    Returns:
        The folder in which the first process keeps its files: this one, or its local mirror.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    if held is not None:
        held.enter_context(locked(place.folder))
    root = remote.mirror(place.folder)
    place.make(root)
    return root


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder, created if necessary, against other processes.

    With several processes in a run the first one holds the lock. A process may lock a folder twice.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        if not remote.is_remote(folder):
            distributed.of_first(lambda: held.enter_context(lock(folder)))
        yield


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """`locked` for one process alone."""
    place = folder.resolve()
    if place in _held:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _taken(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; give another --output") from None
    _held.add(place)
    try:
        files.sweep(path for pattern in LEFT for path in folder.glob(pattern))
        yield
    finally:
        _held.discard(place)
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()  # while locked: a process that has just opened it will retry
        file.close()


def _taken(folder: Path) -> Any:
    """The locked lock file, open; its text names the holder."""
    while True:
        file = (folder / LOCK).open("a+", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = plain(file.read(200)) or "another process"
            file.close()
            if error.errno in BUSY:
                raise UserError(
                    f"--output {folder} is in use by {holder}; wait for its end, or give another "
                    "--output"
                ) from None
            say(f"{folder}: no locks on this file system ({error.strerror}); start one run only")
            return (folder / LOCK).open("a+")
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                break
        file.close()  # the lock file of a run that has just ended
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    file.flush()
    return file


def _name(identity: dict[str, Any]) -> str:
    """The digest of a run's configuration without the mesh, on which results do not depend."""
    return digest({name: value for name, value in identity.items() if name != "mesh"})


def _kept(root: Path) -> str | None:
    """The digest of the configuration that a run folder was made with; None if not stored."""
    try:
        found = files.key_of(root / "config.json").read_text()[:64]
    except (OSError, ValueError):
        return None
    return found if len(found) == 64 else None


def _stored(root: Path) -> bool:
    """Whether any result of a stage is stored; results are found by their inputs."""
    patterns = ("stages/*/manifest.json", "checkpoints/*/*/manifest.json")
    return (root / "metrics.jsonl").exists() and any(any(root.glob(p)) for p in patterns)


def check_folder(root: Path, wanted: dict[str, Any]) -> bool:
    """Whether `root` is the folder of the run `wanted`; False when it can be created.

    True also if its `config.json` is damaged and its key matches `wanted`, or missing and no key
    contradicts `wanted`: `enter_folder` then writes it again.

    Raises:
        UserError: the folder holds another run's configuration, or other files.
    """
    path, kept = root / "config.json", _kept(root)
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        reads = isinstance(there, dict)
    except (FileNotFoundError, NotADirectoryError):
        there, reads = None, False
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise  # not damage: there can be no such folder
        there, reads = {}, False
    if there is None:
        if kept is not None and kept != _name(wanted):
            raise UserError(
                f"{remote.home(root)} has lost its config.json, and these are not the options of "
                "its run; give those, which write it again and keep what is stored, or another "
                "--output"
            )
        if kept is not None or _stored(root):
            return True
        # A run that was killed while it wrote its first file leaves no more than this behind.
        if root.exists() and (
            not root.is_dir()
            or any(p.name != LOCK and not p.name.endswith(files.PART) for p in root.iterdir())
        ):
            raise UserError(
                f"--output {remote.home(root)} exists and is not a run folder; give another "
                "--output"
            )
        return False
    # Results do not depend on the mesh: a run may continue on other devices.
    there = (there if reads else {}) | {"mesh": wanted.get("mesh")}
    difference = distributed.first_difference(there, wanted)
    if not difference or kept == _name(wanted):
        return True
    if kept is not None and kept != _name(there):
        raise UserError(
            f"{path} is damaged, and these are not the options that it was written with; give "
            "those, which write it again and keep what is stored, or another --output"
        )
    if not reads:
        raise UserError(
            f"{path} does not read; give another --output, or delete this one file: then the run's "
            "own options write it again, and what is stored is kept"
        )
    if _of_another_version(there, wanted):
        raise UserError(
            f"{remote.home(root)} was begun by another version, whose options are not written as "
            "these are; finish it with that version, or give another --output"
        )
    home = remote.home(root)
    raise UserError(
        f"{home} holds another run's config ({difference}); give another --output, as {home}-2"
    )


def _of_another_version(there: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether an objective or optimizer of the same name has different options in the two."""
    for key, ours in wanted.items():
        theirs = there.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            same = "name" in ours and ours["name"] == theirs.get("name")
            if same and set(ours) != set(theirs) or _of_another_version(theirs, ours):
                return True
    return False


def enter_folder(root: Path, wanted: dict[str, Any]) -> Path:
    """Create `root` with `wanted` as its `config.json`, or enter it when it holds the same.

    Raises:
        UserError: see `check_folder`; or the folder cannot be written.
    """
    ours = check_folder(root, wanted)
    path = root / "config.json"
    key = files.key_of(path)
    if path.exists() and _kept(root) == _name(wanted) and not files.damaged(path):
        return root
    text = json.dumps(wanted, indent=1)
    if ours and path.exists() and not key.exists():
        text = path.read_text(encoding="utf-8")  # earlier versions stored no key
    elif ours:
        say(f"{path} or its key was damaged or gone; written again from the options given")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {root}: {error.strerror}; give another --output") from None
    write_atomic(path, text)
    write_atomic(key, files.key_text(text, _name(wanted)))
    return root


def _enter_run(root: Path, identity: dict[str, Any]) -> None:
    """Create or enter a run folder, local or in a bucket, that all processes see."""
    distributed.of_first(lambda: str(enter_folder(root, identity)))
    distributed.check_shared(remote.home(root))
    distributed.of_first(lambda: remote.send(root))


def read_minutes(root: Path) -> dict[str, float]:
    """Minutes per phase that earlier starts of the same run have spent."""
    broken = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
    with contextlib.suppress(*broken, OverflowError):
        if files.damaged(root / "run.json"):
            return {}
        about = json.loads((root / "run.json").read_text())
        found = {str(name): float(spent) for name, spent in about["minutes"].items()}
        return {name: spent for name, spent in found.items() if 0 <= spent < 1e9}
    return {}


def write_about(
    root: Path, minutes: dict[str, float], notes: list[str], judging: Mapping[str, Any] = {}
) -> None:
    """`run.json`: minutes per phase, notes, where it ran, and `judging` (its roles, evaluators)."""
    about = {
        "minutes": {k: round(v, 3) for k, v in minutes.items()},
        "notes": notes,
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        **judging,
    }
    text = json.dumps(about, indent=1)
    write_atomic(root / "run.json", text)
    write_atomic(root / "run.key", files.key_text(text))
    remote.send(root)
