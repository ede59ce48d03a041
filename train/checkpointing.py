"""Checkpoints that notice damage: Orbax arrays with a digest for every leaf, verified on load.

Orbax by itself loads a flipped bit without a word. A step whose digests do not match is skipped in favour of the one
before it, said in one line. All use of Orbax sits in this file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlib_unlearn.errors import UserError
from train.sharding import path_str

MANIFEST = "manifest.json"
KEEP = 2

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save on it


def leaf_digest(leaf: Any) -> str:
    """sha256 of one array's dtype, shape and bytes."""
    array = np.ascontiguousarray(np.asarray(leaf))
    digest = hashlib.sha256(f"{array.dtype.name}{array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def tree_digests(tree: Any) -> dict[str, str]:
    """Path to sha256 for every leaf."""
    return {path_str(p): leaf_digest(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def params_sha256(params: Any) -> str:
    """One sha256 for a parameter tree: the digest of its sorted (path, leaf digest) pairs."""
    pairs = sorted(tree_digests(params).items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


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
    """Write `tree` and a manifest (digests, `meta`) to `folder` atomically: a temporary sibling, then one rename.

    Returns:
        The manifest.

    Raises:
        UserError: the disk is full or not writable.
    """
    folder = folder.resolve()
    part = folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        manifest = {**meta, "digests": tree_digests(tree)}
        with _quiet():
            _orbax().save(part / "arrays", tree)
        (part / MANIFEST).write_text(json.dumps(manifest))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except (OSError, ValueError) as error:
        shutil.rmtree(part, ignore_errors=True)
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot write checkpoint {folder}: {reason}; free space or choose another --output"
        ) from None
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a saved tree, or None when there is none that reads."""
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def load_tree(folder: Path, like: Any) -> Any:
    """Read a tree with the structure, dtypes and shardings of `like`, and verify every digest.

    Raises:
        UserError: it is missing, unreadable, of another structure, or damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"no checkpoint in {folder}; delete that folder to compute it again")
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        like,
    )
    names = {path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(abstract)}
    if names != set(manifest["digests"]):
        raise UserError(
            f"checkpoint {folder} holds another model; use another --output or delete it"
        )
    try:
        with _quiet():
            tree = _orbax().load(folder.resolve() / "arrays", abstract)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(
            f"checkpoint {folder} cannot be read ({reason}); delete that folder"
        ) from None
    wrong = [n for n, d in tree_digests(tree).items() if d != manifest["digests"][n]]
    if wrong:
        raise UserError(
            f"checkpoint {folder} is damaged ({len(wrong)} array(s), first {wrong[0]}); delete that folder"
        )
    return tree


def steps_in(folder: Path) -> list[int]:
    """Steps with a complete checkpoint in `folder`, ascending."""
    if not folder.is_dir():
        return []
    return sorted(
        int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / MANIFEST).exists()
    )


def save_step(folder: Path, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Save a training state under `folder/<step>` and keep the last `KEEP`."""
    save_tree(folder / str(step), state, {**meta, "step": step})
    for old in steps_in(folder)[:-KEEP]:
        shutil.rmtree(folder / str(old), ignore_errors=True)


def load_latest(folder: Path, like: Any, say: Callable[[str], None]) -> tuple[int, Any] | None:
    """The newest undamaged `(step, state)` of `folder`, or None; what is damaged is said and skipped."""
    for step in reversed(steps_in(folder)):
        try:
            return step, load_tree(folder / str(step), like)
        except UserError as error:
            say(f"{error}; using the one before it")
            shutil.rmtree(folder / str(step), ignore_errors=True)
    return None
