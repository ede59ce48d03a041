"""Memoised stages: a result is stored under the digest of all its inputs.

A stage with a stored result is never computed twice, and a killed run continues where it stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from train.runtime import checkpointing, distributed, files, remote
from train.runtime.tracking import say


def digest(value: Any) -> str:
    """sha256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def folder_of(root: Path, name: str, inputs: dict[str, Any]) -> Path:
    """The folder of the result of stage `name` made from `inputs`."""
    return root / "stages" / f"{name}-{digest(inputs)[:16]}"


@contextlib.contextmanager
def alone(folder: Path, name: str, option: str = "--stage.cache") -> Iterator[None]:
    """Lock `folder` against other runs; it is released when the process ends, even by `kill -9`.

    Buckets have no locks: two runs may then compute the same result, each in full. `option` is the
    option that chose the place of the folder.

    Raises:
        UserError: the folder cannot be created or written.
    """
    with contextlib.ExitStack() as held:
        if not remote.is_remote(folder):
            distributed.of_first(lambda: held.enter_context(locked(folder, name, option)))
        yield


@contextlib.contextmanager
def locked(folder: Path, name: str, option: str = "--stage.cache") -> Iterator[None]:
    """Like `alone`, for a local folder, and also against other processes of the same run."""
    with _lock(folder, name, option):
        # No other run writes here now: unfinished files were left by runs that were killed.
        files.sweep(folder.parent.glob(f"{folder.name}.*{files.PART}"))
        yield


def sweep_killed(parent: Path) -> None:
    """Remove the unfinished files that killed runs left in `parent`, except in locked folders."""
    for part in parent.glob(f"*{files.PART}"):
        with (
            contextlib.suppress(OSError),
            (parent / f"{part.name.split('.')[0]}.lock").open("w") as file,
        ):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            files.sweep([part])


@contextlib.contextmanager
def _lock(folder: Path, name: str, option: str) -> Iterator[None]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_name(folder.name + ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot write {folder.parent}: {error.strerror}; give another {option}"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            say(f"{name}: another run is computing it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: as in a bucket, two runs may compute the same
        yield


def params_stage(
    root: Path,
    name: str,
    inputs: dict[str, Any],
    like: Any,
    compute: Callable[[Path], Any],
    cache: Path | None = None,
) -> tuple[Any, str]:
    """Parameters of a stage and their sha256: read when stored undamaged, else computed and stored.

    Args:
        root: the run folder.
        name: the stage.
        inputs: everything the result depends on, as JSON values.
        like: a tree with the structure, dtypes and shardings of the result.
        compute: a function of a folder for checkpoints that returns the parameters.
        cache: a folder shared with other runs, in place of `root`; if several runs want the
            same result, one computes it and the others wait.
    """
    if cache is not None:
        shared = remote.located(cache)
        with alone(folder_of(shared, name, inputs), name):
            return params_stage(shared, name, inputs, like, compute)
    root = remote.home(root)
    folder = folder_of(root, name, inputs)
    manifest = distributed.of_first(lambda: checkpointing.read_manifest(folder))
    if manifest is not None:
        try:
            params = checkpointing.load_tree(folder, like)
            say(f"{name}: found, made from the same inputs")
            return params, checkpointing.combined(manifest["digests"])  # load_tree verified them
        except UserError as error:
            say(f"{checkpointing.what(error)}; computing it again")
    checkpoints = root / "checkpoints" / folder.name
    with distributed.deferred():
        params = compute(checkpoints)
        manifest = checkpointing.save_tree(folder, params, {"stage": name, "inputs": inputs})
        checkpointing.remove(checkpoints)  # each holds the optimizer state too
    return params, checkpointing.combined(manifest["digests"])


def json_stage(
    path: Path, inputs: dict[str, Any], compute: Callable[[], Any], cache: Path | None = None
) -> Any:
    """A JSON result stored beside a key of its inputs; if the key does not match, it is recomputed.

    `cache` is a folder shared with other runs, which is searched before the result is computed.
    """
    if cache is not None:
        shared = (
            remote.located(cache) / path.parent.name / f"{path.stem}-{digest(inputs)[:16]}.json"
        )

        def look() -> Any:
            with alone(shared, path.stem):
                return json_stage(shared, inputs, compute)

        return json_stage(path, inputs, look)
    key_path = files.key_of(path)
    key = digest(inputs)

    def read() -> Any:
        try:
            if key_path.read_text() == key + hashlib.sha256(path.read_bytes()).hexdigest():
                return {"value": json.loads(path.read_text())}
        except (OSError, ValueError, RecursionError):
            pass
        return None

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(value)
        write_atomic(path, text)
        write_atomic(key_path, files.key_text(text, key))

    if (found := distributed.of_first(read)) is not None:
        return found["value"]
    value = compute()
    distributed.of_first(write)
    return value


def amend_json(path: Path, value: Any) -> None:
    """Rewrite the result of a `json_stage` with additions of other results; its key stays valid."""
    before, text = path.read_text(), json.dumps(value)
    if text == before:
        return
    made_from = files.key_of(path).read_text().removesuffix(files.key_text(before))
    write_atomic(path, text)
    write_atomic(files.key_of(path), files.key_text(text, made_from))


def write_atomic(path: Path, text: str) -> None:
    """Write a text file atomically, also across a power cut (`train.runtime.files`).

    Raises:
        UserError: the disk is full or not writable.
    """
    try:
        if remote.is_remote(path):
            path.write_text(text)  # objects in buckets are written atomically
        else:
            files.write(path, text)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free space or choose another --output"
        ) from None


# Increase it when the same inputs may give another result: stored results are then not found.
VERSION = 4
