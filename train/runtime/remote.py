"""Bucket paths (`gs://…`) as well as local ones.

Every process reads and writes arrays in the bucket itself. All other files of a run are small
(except the exported model): the first process keeps them in a local folder, its mirror, which is
downloaded at the start and uploaded after each stage and checkpoint.
"""

from __future__ import annotations

import atexit
import importlib.util
import re
import shutil
import tempfile
import uuid
import zlib
from pathlib import Path
from typing import Any

from etils import epath

from jaxlib_unlearn.errors import UserError
from train.runtime import distributed

PACKAGES = {"gs": ("gcsfs", "google.cloud.storage")}  # buckets that Orbax writes to; their packages
ARRAYS = ("stages", "checkpoints")  # folders of a run that Orbax writes in place
_mirrors: dict[Path, Any] = {}
_sent: dict[Path, int] = {}


def located(path: str | Path | epath.Path) -> Any:
    """A local path, or the bucket path that it stands for: pathlib turns `gs://b/x` into `gs:/b/x`.

    Example:
        >>> located(Path("gs://bucket/run"))
        PosixGPath('gs://bucket/run')
        >>> located("runs/one")
        PosixPath('runs/one')
    """
    found = re.match(r"([a-z][a-z0-9]+):/+(.*)", str(path))
    if found is None:
        return Path(path)
    scheme, rest = found.groups()
    if scheme not in PACKAGES:
        known = ", ".join(f"{name}://…" for name in PACKAGES)
        raise UserError(
            f"{scheme}://{rest}: runs go to local folders and {known}; give one of them"
        )
    return epath.Path(f"{scheme}://{rest}")


def is_remote(path: Any) -> bool:
    """Whether a path is in a bucket."""
    return re.match(r"[a-z][a-z0-9]+:/", str(path)) is not None


def absolute(path: Any) -> Any:
    """The absolute path; bucket paths are absolute already."""
    return path if is_remote(path) else path.resolve()


def check(path: Any, option: str, write: bool = True) -> None:
    """Raise `UserError` unless a bucket path can be reached (and written); local ones pass.

    Args:
        path: the path that was given.
        option: the option that gave it, for the message.
        write: also create a file there and delete it.

    Raises:
        UserError: a package for such buckets is missing, no credentials, no such bucket.
    """
    if not is_remote(path):
        return
    there = located(path)
    missing = [name for name in PACKAGES[str(there).partition(":")[0]] if not _installed(name)]
    if missing:
        raise UserError(f"{option} {there} needs {' and '.join(missing)}; pip install -e '.[gcs]'")
    try:
        there.exists()
        if write:
            there.mkdir(parents=True, exist_ok=True)
            trial = there / f".can-write-{uuid.uuid4().hex}"  # every process has its own
            trial.write_text("")
            trial.unlink()
    except Exception as error:  # each service has its own errors, without a common base
        raise UserError(
            f"{option} {there} cannot be {'written' if write else 'read'} "
            f"({type(error).__name__}: {_line(error)}); check the bucket's name and log in to it"
        ) from None


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def remove(path: Any) -> None:
    """Remove a folder and its contents, local or in a bucket, if it exists."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.rmtree()


def mirror(path: Path) -> Path:
    """The local folder to work in for a run folder: itself, or the mirror of one in a bucket."""
    if not is_remote(path):
        return path
    there = located(path)
    for local, known in _mirrors.items():
        if str(known) == str(there):
            return local
    local = Path(tempfile.mkdtemp(prefix="jaxlib-unlearn-"))
    atexit.register(shutil.rmtree, local, ignore_errors=True)  # and see `forget`
    _mirrors[local] = there
    if distributed.is_first() and there.exists():
        _fetch(there, local, ARRAYS)
    return local


def _fetch(there: Any, local: Path, skip: tuple[str, ...] = ()) -> None:
    local.mkdir(parents=True, exist_ok=True)
    for item in there.iterdir():
        if item.name in skip or item.name.endswith(".safetensors"):  # never read again
            continue
        if item.is_dir():
            _fetch(item, local / item.name)
        else:
            with item.open("rb") as source, (local / item.name).open("wb") as sink:
                shutil.copyfileobj(source, sink, 2**22)
            _sent[local / item.name] = _crc(local / item.name)


def forget() -> None:
    """Remove the mirrors, for a process that ends without running its `atexit` handlers."""
    for local in _mirrors:
        shutil.rmtree(local, ignore_errors=True)


def home(root: Path) -> Any:
    """The real location of a run folder and its arrays: a bucket if `root` is a mirror."""
    return _mirrors.get(root, root)


def send(root: Path) -> None:
    """Upload the changed files of a mirror; does nothing for a local run folder."""
    if root not in _mirrors or not distributed.is_first():
        return
    there = _mirrors[root]
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        if path.name.endswith(".part"):
            continue
        crc = _crc(path)
        if _sent.get(path) != crc:
            target = there / path.relative_to(root).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 2**22)
            _sent[path] = crc


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return crc
