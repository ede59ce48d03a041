"""Programs ask for huge pages once, before they start; a choice made already is respected."""

import os
import platform
import subprocess
import sys

import pytest

from train.runtime import hugepages

ASKED = "glibc.malloc.hugetlb=1"
MADVISE = "always [madvise] never"


@pytest.mark.parametrize(
    ("known", "libc", "mode", "wanted"),
    [
        ({}, ("glibc", "2.35"), MADVISE, ASKED),
        ({"GLIBC_TUNABLES": ""}, ("glibc", "2.41"), MADVISE, ASKED),
        ({"GLIBC_TUNABLES": "glibc.a.b=2"}, ("glibc", "3.0"), MADVISE, f"glibc.a.b=2:{ASKED}"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, ("glibc", "2.41"), MADVISE, None),
        ({"GLIBC_TUNABLES": ASKED}, ("glibc", "2.41"), MADVISE, None),
        ({}, ("glibc", "2.34"), MADVISE, None),
        ({}, ("", ""), MADVISE, None),  # another C library
        ({}, ("glibc", "2.41"), "[always] madvise never", None),
        ({}, ("glibc", "2.41"), "always madvise [never]", None),
    ],
)
def test_when_a_process_has_to_ask(known, libc, mode, wanted):
    assert hugepages.tunables(known, libc, mode) == wanted


def test_it_starts_again_as_it_was_started(monkeypatch, tmp_path):
    started = []
    (tmp_path / "enabled").write_text(MADVISE)
    monkeypatch.setattr(hugepages, "MODE", tmp_path / "enabled")
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.41"))
    monkeypatch.setattr("os.execve", lambda *args: started.append(args))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "-m", "train.unlearn", "x y"])
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.a.b=2")
    hugepages.ask()
    ((program, command, environment),) = started
    assert program == sys.executable
    assert command == [sys.executable, "-X", "utf8", "-m", "train.unlearn", "x y"]
    assert environment == os.environ | {"GLIBC_TUNABLES": f"glibc.a.b=2:{ASKED}"}
    monkeypatch.setenv("GLIBC_TUNABLES", environment["GLIBC_TUNABLES"])
    hugepages.ask()  # once
    (tmp_path / "enabled").unlink()  # a kernel without them
    monkeypatch.delenv("GLIBC_TUNABLES")
    hugepages.ask()
    assert len(started) == 1


def is_a_choice() -> bool:
    """Whether a process here has huge pages only when it asks for them."""
    mode = hugepages.MODE
    return mode.is_file() and bool(hugepages.tunables({}, platform.libc_ver(), mode.read_text()))


@pytest.mark.skipif(not is_a_choice(), reason="huge pages are no choice of a process here")
@pytest.mark.parametrize("asked", [True, False])
def test_large_arrays_lie_in_them(asked):
    program = f"""
import sys
from train.runtime import hugepages
if {asked}:
    hugepages.ask()
array = bytearray(2**28)
lines = [line.split() for line in open("/proc/self/smaps_rollup")]
print(sum(int(line[1]) for line in lines if line[0] == "AnonHugePages:"))
"""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) > 0) == asked


@pytest.mark.parametrize("module", ["unlearn", "evaluate", "finetune", "export", "plan"])
def test_programs_keep_their_arguments_and_exit_codes(module):
    done = subprocess.run(
        [sys.executable, "-m", f"train.{module}", "--no such option"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    assert done.stderr.startswith("error: ")
