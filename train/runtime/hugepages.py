"""Huge pages for large arrays on Linux, where a process has to ask for them.

XLA allocates the memory of a step from the C library and frees it again, step after step. In pages
of 4 KiB a step of SmolLM2 touches 390 000 new ones; in huge pages, 1 300, and where page faults are
expensive the step is an eighth faster. Kernels mostly leave the choice to the process ("madvise"),
and glibc (2.35 and later) uses huge pages only when its tunables say so at start-up. So a program
of this package re-executes itself once, with `GLIBC_TUNABLES` set, before anything else is
imported; this takes some 20 milliseconds.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def tunables(environment: Mapping[str, str], libc: tuple[str, str], mode: str) -> str | None:
    """The `GLIBC_TUNABLES` to restart with; None if they are not needed, useless or already chosen.

    Args:
        environment: the environment variables of this process.
        libc: its C library and version, as `platform.libc_ver` returns them.
        mode: the content of the kernel's `transparent_hugepage/enabled`.

    Example:
        >>> tunables({}, ("glibc", "2.36"), "always [madvise] never")
        'glibc.malloc.hugetlb=1'
        >>> tunables({}, ("glibc", "2.36"), "[always] madvise never")  # it has them without asking
    """
    name, version = libc
    if name != "glibc" or "[madvise]" not in mode:
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 35):
        return None
    known = environment.get("GLIBC_TUNABLES", "")
    return None if TUNABLE in known else ":".join([*filter(None, [known]), f"{TUNABLE}=1"])


def ask() -> None:
    """Re-execute this command with huge pages; return if that is not needed."""
    if not sys.platform.startswith("linux") or not MODE.is_file():
        return
    wanted = tunables(os.environ, platform.libc_ver(), MODE.read_text())
    if wanted is not None:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, os.environ | {"GLIBC_TUNABLES": wanted})
