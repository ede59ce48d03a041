"""Atomic files: each exists as a whole or not at all, even after a crash or a power cut.

A file is written under a name that no other process uses, forced to the disk and renamed; the
rename is forced to the disk too. A file may have a key beside it: the digest of its inputs, and the
sha256 of its bytes, which detects a flipped bit. A line of JSON may end in a CRC-32 of its own.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import uuid
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError

PART = ".part"
CRC = re.compile(rb'(.*), "crc": ([0-9]{1,10})\}', re.DOTALL)
# File systems whose folders cannot be opened or synchronised (some network and FUSE ones).
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EISDIR)


@functools.lru_cache(maxsize=1)
def _token(pid: int) -> str:
    # Not the process number alone: it may be the same on machines that share a folder.
    return f"{pid}-{uuid.uuid4().hex[:8]}"


def token() -> str:
    """A string unique to this process, part of the names of its unfinished files."""
    return _token(os.getpid())


def part_of(path: Path, mark: str | None = None) -> Path:
    """The temporary name of `path` while it is written; `mark` replaces this process's token.

    Example:
        >>> part_of(Path("runs/config.json"), "7-ab")
        PosixPath('runs/config.json.7-ab.part')
    """
    return path.with_name(f"{path.name}.{mark or token()}{PART}")


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
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
    """Rename a finished file or folder; a power cut leaves either the old one or the new one."""
    (sync_tree if part.is_dir() else sync)(part)
    os.replace(part, path)
    sync(path.parent)


def write(path: Path, data: str | bytes | Callable[[Path], None]) -> None:
    """Write a file through a temporary sibling; its folder must exist.

    Args:
        path: the file.
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
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.filename == str(part):
            error.filename = str(path)
        raise


def sweep(found: Iterable[Path]) -> None:
    """Remove files that stopped processes left unfinished; pass none of a running process."""
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
    """The sha256 of every file below a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


def key_of(path: Path) -> Path:
    """The path of a file's key."""
    return path.with_suffix(".key")


def key_text(data: str, inputs: str = "") -> str:
    """The key of a file with this text: the digest of its inputs, then that of its bytes."""
    return inputs + hashlib.sha256(data.encode()).hexdigest()


def damaged(path: Path) -> bool:
    """Whether a file does not match its key; files without a key pass."""
    try:
        key = key_of(path).read_bytes()
    except OSError:
        return False
    try:
        return not key.endswith(sha256(path).encode())
    except OSError:
        return True


def check_key(path: Path) -> None:
    """Raise `UserError` for a file of a run folder that changed after the run wrote it.

    Raises:
        UserError: its bytes do not match its key.
    """
    if damaged(path):
        raise UserError(
            f"{path} is not what the run wrote (its sha256 is not in {key_of(path).name}): damaged "
            "or edited (keep an edited copy elsewhere); the run's own command writes it again and "
            "computes nothing that is stored"
        )


def sealed(row: dict[str, Any]) -> str:
    """A JSON object with entries, whose last one becomes the CRC-32 of the rest.

    Example:
        >>> sealed({"stage": "original", "step": 3, "loss": 0.5})
        '{"stage": "original", "step": 3, "loss": 0.5, "crc": 1043071103}'
    """
    text = json.dumps(row)
    return f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}'


def opened(line: bytes) -> dict[str, Any] | None:
    """The object in a text of `sealed`, or without a CRC-32 (of earlier versions); None: damaged.

    Texts of earlier versions end in no whole number: such a number has lost the name `crc`.

    Example:
        >>> opened(b'{"a": 3.0, "crc": 5}'), opened(b'{"a": 3.0, "crk": 5}'), opened(b'{"a": 3.0}')
        (None, None, {'a': 3.0})
    """
    if (found := CRC.fullmatch(line)) is not None:
        line = found[1] + b"}"
        if zlib.crc32(line) != int(found[2]):
            return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or (found is None and type(["", *row.values()][-1]) is int):
        return None
    return row
