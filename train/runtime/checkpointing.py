"""Checkpoints that notice damage: Orbax arrays with a digest for every leaf and every file.

Orbax itself does not detect a flipped bit. A step whose digests do not match is skipped in favour
of the one before it, with a one-line message. Orbax is used in this file alone.

Several processes write one checkpoint, each its own part of the arrays, to a path that all of them
see (a shared folder or a bucket). Any number of processes can read it, on any mesh.
"""

from __future__ import annotations

import contextlib
import logging
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import one_line
from train.runtime import distributed, files, remote
from train.runtime.digests import combined, params_sha256, tree_digests, tree_shapes

MANIFEST = "manifest.json"
KEEP = 2

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax logs every save through it


def file_sums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below `folder`: a flipped bit in any of them changes it."""
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(2**22):
                crc = zlib.crc32(block, crc)
        sums[path.relative_to(folder).as_posix()] = [path.stat().st_size, crc]
    return sums


def _orbax():
    from orbax.checkpoint import v1 as ocp

    return ocp


@contextlib.contextmanager
def _quiet():
    """Orbax prints pages at WARNING for a damaged file; the caller reports it in one line."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(previous)


def save_tree(folder: Path, tree: Any, meta: dict[str, Any]) -> dict[str, Any]:
    """Write `tree` and a manifest (`meta`, digests, file sums) to `folder` atomically.

    Everything is written to a temporary sibling, which is then renamed; both are forced to the
    disk. Buckets have no rename: there the manifest is written last, and a folder without one
    counts as absent. Each process must call this.

    Returns:
        The manifest.

    Raises:
        UserError: the disk is full or not writable.
    """
    folder = remote.absolute(folder)
    mark = distributed.of_first(files.token)  # all processes write into one folder
    part = folder if remote.is_remote(folder) else files.part_of(folder, mark)
    manifest = {**meta, "digests": tree_digests(tree), "shapes": tree_shapes(tree)}

    def make_room() -> None:
        remote.remove(part)
        part.mkdir(parents=True)

    def finish() -> None:
        if part != folder:
            manifest["files"] = file_sums(part / "arrays")
        (part / MANIFEST).write_text(files.sealed(manifest))
        if part != folder:
            remote.remove(folder)
            files.put(part, folder)

    try:
        distributed.of_first(make_room)
        with distributed.together(), _quiet():
            _save(part / "arrays", tree)
        distributed.of_first(finish)
    except (OSError, UserError) as error:
        if distributed.is_first():
            with _quiet():
                _discard(part)
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        advice = "free space or choose another --output"
        if isinstance(error, TimeoutError):  # Orbax waits 20 minutes by the clock on the wall
            reason = "it took too long (was the machine suspended?)"
            advice = "the same command continues from the checkpoint before it"
        kind = distributed.Agreed if isinstance(error, distributed.Agreed) else UserError
        raise kind(f"cannot write checkpoint {folder}: {reason}; {advice}") from None
    return manifest


def _save(folder: Any, tree: Any) -> None:
    try:
        _orbax().save(str(folder), tree)
    except ValueError as error:  # TensorStore reports errors of the file system so
        raise OSError(str(error)) from error


def _discard(part: Any) -> None:
    """Remove what an error left. Orbax's threads may still write there and make the folder anew."""
    for wait in (0, 0.1, 0.2, 0.4, 0.8, 1.6):
        time.sleep(wait)
        if wait and not part.exists():
            return
        remote.remove(part)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a saved tree; None if it is missing or unreadable."""
    try:
        manifest = files.opened((folder / MANIFEST).read_bytes())
    except OSError:
        return None
    sound = manifest is not None and isinstance(manifest.get("digests"), dict)
    return manifest if sound else None


def load_tree(folder: Path, like: Any) -> Any:
    """Read a tree with the structure, dtypes and shardings of `like`; verify files and digests.

    Each process must call this.

    Raises:
        UserError: it is missing, unreadable, of another structure, or damaged.
    """
    manifest = distributed.of_first(lambda: read_manifest(folder))
    if manifest is None:
        raise UserError(f"no checkpoint in {folder}; delete that folder to compute it again")
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        like,
    )
    wanted = tree_shapes(abstract)
    if set(wanted) != set(manifest["digests"]) or wanted != manifest.get("shapes", wanted):
        raise UserError(
            f"checkpoint {folder} holds another model; use another --output or delete it"
        )
    arrays = remote.absolute(folder) / "arrays"
    kept = manifest.get("files")  # none in a bucket, which checksums its files itself
    there = {} if kept is None else distributed.of_first(lambda: file_sums(arrays))
    if kept is not None and kept != there:
        # Before Orbax reads: it does not notice damage in parts of a file that it does not use.
        names = sorted(set(kept) | set(there)) if isinstance(kept, dict) else []
        odd = [n for n in names if kept.get(n) != there.get(n)] or [MANIFEST]
        raise UserError(
            f"checkpoint {folder} is damaged ({len(odd)} file(s), first {one_line(odd[0])}); "
            "delete that folder"
        )
    try:
        with distributed.together(), _quiet():
            tree = _orbax().load(str(arrays), abstract)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(
            f"checkpoint {folder} cannot be read ({reason}); delete that folder"
        ) from None
    wrong = [n for n, d in tree_digests(tree).items() if d != manifest["digests"][n]]
    if wrong:
        raise UserError(
            f"checkpoint {folder} is damaged ({len(wrong)} array(s), first {wrong[0]}); "
            "delete that folder"
        )
    return tree


def what(error: UserError) -> str:
    """The problem that a `load_tree` error reports, without the advice after it."""
    return str(error).rpartition("; ")[0]


def steps_in(folder: Path) -> list[int]:
    """Steps with a complete checkpoint in `folder`, ascending; each process must call this."""

    def look() -> list[int]:
        if not folder.is_dir():
            return []
        return sorted(
            int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / MANIFEST).exists()
        )

    return distributed.of_first(look)


def remove(folder: Path) -> None:
    """Remove a saved tree, or a folder of them; each process must call this."""
    distributed.of_first(lambda: remote.remove(folder))


def save_step(folder: Path, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Save a training state under `folder/<step>` and keep the last `KEEP`."""
    save_tree(folder / str(step), state, {**meta, "step": step})
    stale = steps_in(folder)[:-KEEP]

    def clean() -> None:
        for path in [*folder.glob(f"*{files.PART}"), *(folder / str(old) for old in stale)]:
            remote.remove(path)

    distributed.of_first(clean)


def load_latest(folder: Path, like: Any, say: Callable[[str], None]) -> tuple[int, Any] | None:
    """The newest undamaged `(step, state)` of `folder`, or None.

    A damaged one is reported in one line and removed.
    """
    steps = steps_in(folder)
    while steps:
        step = steps.pop()
        try:
            return step, load_tree(folder / str(step), like)
        except UserError as error:
            then = f"using step {steps[-1]}" if steps else "none is left, starting over"
            say(f"{what(error)}; {then}")
            remove(folder / str(step))
    return None


__all__ = [
    "MANIFEST",
    "combined",
    "file_sums",
    "load_latest",
    "load_tree",
    "params_sha256",
    "read_manifest",
    "remove",
    "save_step",
    "save_tree",
    "steps_in",
    "tree_digests",
    "tree_shapes",
    "what",
]
