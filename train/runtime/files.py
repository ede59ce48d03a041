"""Files that are there as a whole or not at all, whatever stops the process or the machine.

A file is written under a name that no other process uses, forced to the disk and renamed; the
rename is forced to the disk too. Beside a file may lie its key: what it was made from, and the
sha256 of its bytes, by which a flipped bit is noticed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxlib_unlearn.errors import UserError

PART = ".part"
# File systems whose folders cannot be opened or synchronised (some network and FUSE ones).
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EISDIR)


@functools.lru_cache(maxsize=1)
def _token(pid: int) -> str:
    # Not the process number alone: machines that share a folder may have the same one.
    return f"{pid}-{uuid.uuid4().hex[:8]}"


def token() -> str:
    """What is in the names of this process's unfinished files, and of no other's."""
    return _token(os.getpid())


def part_of(path: Path, mark: str | None = None) -> Path:
    """The name under which `path` is written; `mark` takes the place of this process's token.

    Example:
        >>> part_of(Path("runs/config.json"), "7-ab")
        PosixPath('runs/config.json.7-ab.part')
    """
    return path.with_name(f"{path.name}.{mark or token()}{PART}")


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if path.is_dir() and error.errno in NO_SYNC:
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Force everything in a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_dir() or path.is_file():
            sync(path)
    sync(folder)


def put(part: Path, path: Path) -> None:
    """Rename a finished file or folder to its name, so that a power cut leaves one or the other."""
    (sync_tree if part.is_dir() else sync)(part)
    os.replace(part, path)
    sync(path.parent)


def write(path: Path, data: str | bytes | Callable[[Path], None]) -> None:
    """Write a file through a temporary sibling; the folder is there.

    Args:
        path: where to.
        data: text (as UTF-8), bytes, or a function that writes the file it is given.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
    """
    part = part_of(path)
    try:
        if callable(data):
            data(part)
        else:
            part.write_bytes(data.encode() if isinstance(data, str) else data)
        put(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def sweep(found: Iterable[Path]) -> None:
    """Remove what stopped processes left unfinished; files of one that runs are not among it."""
    from shutil import rmtree

    for path in list(found):
        if path.is_dir() and not path.is_symlink():
            rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums(folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """sha256 by name of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


def key_of(path: Path) -> Path:
    """Where the key of a file lies."""
    return path.with_suffix(".key")


def key_text(data: str, inputs: str = "") -> str:
    """The key of a file of this text: the digest of what it was made from, and of its bytes."""
    return inputs + hashlib.sha256(data.encode()).hexdigest()


def damaged(path: Path) -> bool:
    """Whether a file has a key that is not its own; files without a key pass."""
    try:
        key = key_of(path).read_bytes()
    except OSError:
        return False
    try:
        return not key.endswith(sha256(path).encode())
    except OSError:
        return True


def check_key(path: Path) -> None:
    """Raise `UserError` for a file of a run folder that is not what the run wrote.

    Raises:
        UserError: its bytes are not those of its key.
    """
    if damaged(path):
        raise UserError(
            f"{path} is not what the run wrote (its sha256 is not in {key_of(path).name}): damaged "
            "or edited (keep an edited copy elsewhere); the run's own command writes it again and "
            "computes nothing that is stored"
        )
