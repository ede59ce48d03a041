"""Ctrl-C, SIGHUP and SIGTERM: one line, the exit code, and never a crash during exit."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from train.runtime import distributed, folder
from train.runtime.distributed import Preempted


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "word", "code"),
    [
        (signal.SIGINT, "Ctrl-C", 130),
        pytest.param(signal.SIGHUP, "SIGHUP", 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_xla_compiles(repo, tmp_path, number, word, code):
    """The interpreter used to end in a segmentation fault: XLA was still compiling at exit."""
    root = tmp_path / "run"
    argv = ["-m", "train.unlearn", "quickstart", "--mesh.data", "1", "--output", str(root)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1"}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    with subprocess.Popen(
        [sys.executable, *argv], cwd=repo, env=env, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "jaxpr to MLIR module conversion jit(step)" in line:
                break  # XLA compiles next
        process.send_signal(number)
        rest = process.stderr.read().splitlines()
    assert process.returncode == code
    (said,) = [line for line in rest if line and " jit(" not in line]
    assert said.startswith(f"stopped by {word}, finished work is stored; resume with: python ")
    assert said.endswith(f"train.unlearn quickstart --mesh.data 1 --output {root}")
    with folder.locked(root):  # it is unlocked
        assert (root / "config.json").exists() and (root / "config.key").exists()


def test_a_second_ctrl_c_does_not_wait():
    done = []
    with pytest.raises(KeyboardInterrupt), distributed.signals_stop(), distributed.deferred():
        send()
        done.append("noted")
        send()
        done.append("never")
    assert done == ["noted"]
    # A SIGTERM after it is no second Ctrl-C, nor is a Ctrl-C after a SIGTERM.
    for pair in ((signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)):
        with pytest.raises(Preempted), distributed.signals_stop(), distributed.deferred():
            for number in pair:
                send(number)
        assert distributed.stopped_by() == distributed.STOPS[pair[0]]


def test_where_no_python_runs_a_thread_leaves():
    """At once if every step is on the disk; otherwise only on the second Ctrl-C."""
    left = threading.Event()
    with pytest.raises(Preempted), distributed.signals_stop(left.set), distributed.deferred():
        send()
        assert left.wait(30)
    left.clear()
    with (
        pytest.raises(KeyboardInterrupt),
        distributed.signals_stop(left.set),
        distributed.deferred(),
    ):
        distributed.unsaved(True)
        send()
        assert distributed.asked_to_stop() and not left.wait(0.2)
        try:
            send()
        finally:
            assert left.wait(30)
    assert not distributed._state.unsaved


def test_ignored_signals_stay_ignored():
    """As for `nohup` and background jobs of shells."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.signals_stop():
            send(signal.SIGHUP)
            assert not distributed.asked_to_stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_stops_no_save(monkeypatch):
    class Closed:
        def write(self, text):
            raise OSError(5, "Input/output error")

        def flush(self):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Closed())
    distributed.say_on_first("stopped by SIGHUP")
