"""Several processes as one run: they find each other, agree, and stop together.

Every process runs the same program and issues the same computations in the same order. Decisions
that depend on a clock or on a file are therefore made by the first process and broadcast; it alone
writes files and prints. An error on one process is raised on all of them.

A TPU slice, the same command on every host (they find each other)::

    gcloud compute tpus tpu-vm ssh NAME --worker=all --command "cd jaxlib-unlearn && \
      pip install -e '.[train,tpu,gcs]' && python -m train.unlearn tofu-npo-llama3-8b \
      --distributed.auto --model.path gs://BUCKET/llama --output gs://BUCKET/runs/one"

One machine with 8 GPUs: one process, ``python -m train.unlearn PRESET --model.path DIR``. Slurm,
one process per GPU and a folder that all of them see::

    srun --nodes 4 --ntasks-per-node 8 --gpus-per-task 1 python -m train.unlearn PRESET \
      --distributed.auto --model.path /shared/llama --output /shared/runs/one

Any machines, each process with its own number::

    python -m train.unlearn PRESET --distributed.coordinator HOST0:8476 --distributed.processes 4 \
      --distributed.process 0 --mesh.data 1 --mesh.fsdp -1 --output /shared/runs/one

One of ``--mesh.data``, ``--mesh.fsdp``, ``--mesh.tp`` may be -1: all remaining devices. Weights are
read tensor by tensor onto the devices. After a machine is lost the same command resumes the run,
also on another number of devices. SIGTERM saves at the next step and exits 0. Buckets have no
locks: give each run a folder of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jaxlib_unlearn.errors import UserError
from train.runtime.plain import shown

T = TypeVar("T")
SHARED_SECONDS = 20.0
PACKAGES = ("jaxlib_unlearn", "models", "train")


@dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run; by default this one alone.

    Args:
        auto: find the others through the cluster: Cloud TPU, Slurm, Open MPI (elsewhere: alone).
        coordinator: `host:port` of the first process, where no cluster provides it.
        processes: number of processes.
        process: the number of this process, from 0.
        timeout: seconds to wait for the others at the start.
        heartbeat: seconds of silence after which a process counts as lost; a compilation is silent.
    """

    auto: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    timeout: int = 300
    heartbeat: int = 300


class Agreed(UserError):
    """An error that is raised on every process."""


class Preempted(BaseException):
    """The run was asked to stop (SIGTERM, Ctrl-C, SIGHUP); finished work is stored.

    It may be raised anywhere, like KeyboardInterrupt: no `except Exception` may catch it.
    """


class _State:
    """State of this process: its role among the others, and whether it was asked to stop."""

    first: bool = True
    many: bool = False
    asked: bool = False
    asked_by: int = signal.SIGTERM
    deferred: bool = False
    unsaved: bool = False  # steps were taken that are not on the disk yet
    points: Iterator[int] = itertools.count(1)


_state = _State()


def start(config: DistributedConfig) -> None:
    """Join the other processes; call it before anything asks JAX for devices.

    Raises:
        UserError: conflicting options, or some of the other processes do not appear.
    """
    given = (config.coordinator, config.processes, config.process)
    if not config.auto and all(x is None for x in given):
        return
    if config.auto == any(x is not None for x in given) or (None in given and not config.auto):
        raise UserError(
            "--distributed.auto stands alone, or --distributed.coordinator, --distributed.processes"
            " and --distributed.process together; give one of the two"
        )
    for name in ("timeout", "heartbeat"):
        if (seconds := getattr(config, name)) < 1:
            raise UserError(f"--distributed.{name} is {seconds}; it must be at least 1")
    if not config.auto:
        _check(config)
    # Only the CPU backend reads these two. Its collectives must start in the same order everywhere.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=config.timeout,
            heartbeat_timeout_seconds=config.heartbeat,
        )
    except ValueError as error:
        if not config.auto:
            raise UserError(f"--distributed.coordinator {config.coordinator}: {error}") from None
        jax.config.update("jax_cpu_enable_async_dispatch", True)
        return  # no cluster: a single machine
    except RuntimeError as error:
        where = config.coordinator or "the coordinator"
        reason = (str(error).splitlines() or ["no answer"])[0][:120]
        raise UserError(
            f"{where}: not all processes came within {config.timeout} s ({reason}); start all of "
            "them, with one coordinator"
        ) from None
    _state.many = jax.process_count() > 1
    _state.first = jax.process_index() == 0


def _check(config: DistributedConfig) -> None:
    host, colon, port = str(config.coordinator).rpartition(":")
    if not (host and colon and port.isdigit()):
        raise UserError(
            f"--distributed.coordinator {config.coordinator} is no host:port; give the address of "
            "the first process"
        )
    count, index = config.processes or 0, -1 if config.process is None else config.process
    if count < 1 or not 0 <= index < count:
        raise UserError(
            f"--distributed.process {config.process} of --distributed.processes "
            f"{config.processes}: they count from 0 to one less than their number"
        )


def many() -> bool:
    """Whether this run has several processes."""
    return _state.many


def is_first() -> bool:
    """Whether this process writes files and prints messages."""
    return _state.first


def say_on_first(message: str) -> None:
    """Print a line on stderr, from the first process alone; control bytes are escaped."""
    if _state.first:
        with contextlib.suppress(OSError):  # a terminal that was closed must not stop a save
            print(shown(message), file=sys.stderr, flush=True)


def leave(code: int, agreed: bool = False) -> None:
    """End this process at once, unless the others know that it ends.

    They would wait for it in their next computation, and it for them in JAX's shutdown.
    """
    if _state.many and not agreed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def gather(value: Any) -> list[Any]:
    """A JSON value from every process, in their order; each of them must call it."""
    if not _state.many:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data)))).reshape(-1)
    # Rounded up to few sizes: each one is compiled.
    padded = np.zeros(1 << max(10, int(max(sizes) - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error inside on one process is raised on all, with that process's message.

    For work that each process does by itself; computations on shared arrays go outside.

    Raises:
        Agreed: a `UserError` or an `OSError` of some process.
    """
    if not _state.many:
        yield
        return
    mine: BaseException | None = None
    try:
        yield
    except Agreed:
        raise  # raised on the others too
    except Exception as error:
        mine = error
    told = gather(None if mine is None else _words(mine))
    if mine is not None and not isinstance(mine, UserError | OSError):
        raise mine
    for index, words in enumerate(told):
        if words is not None:
            raise Agreed(words if index == 0 else f"process {index}: {words}") from mine


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def of_first(work: Callable[[], T]) -> T:
    """Run `work` on the first process alone and broadcast what it returns (a JSON value).

    Raises:
        Agreed: it failed there.
    """
    if not _state.many:
        return work()
    found: dict[str, Any] = {}
    mine: Exception | None = None
    if _state.first:
        try:
            found = {"value": work()}
        except Exception as error:
            found, mine = {"error": _words(error)}, error
    told = gather(found)[0]
    if mine is not None and not isinstance(mine, UserError | OSError):
        raise mine
    if "error" in told:
        raise Agreed(told["error"]) from mine
    return told["value"]


def array_of_first(value: np.ndarray | None) -> np.ndarray:
    """Broadcast an array of the first process to all of them."""
    if not _state.many:
        assert value is not None
        return value
    from jax.experimental import multihost_utils

    have = np.zeros(0) if value is None else value
    dtype, shape = of_first(lambda: (have.dtype.name, have.shape))
    mine = have if _state.first else np.zeros(tuple(shape), dtype)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine))


def code_digest() -> str:
    """sha256 of the source files of the three packages."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(path.read_bytes())
    return digest.hexdigest()


def check_same(config: dict[str, Any]) -> None:
    """Check that every process has this configuration, the same code and the same JAX.

    Args:
        config: the resolved configuration as JSON values, without per-process options.

    Raises:
        Agreed: they differ; the message names the difference.
    """
    if not _state.many:
        return
    told = gather({"configuration": config, "code": code_digest(), "jax": jax.__version__})
    words = {
        "code": "the code differs; check out one version everywhere",
        "jax": "the version of jax differs; install one everywhere",
    }
    for index, other in enumerate(told):
        for part, mine in told[0].items():
            if other[part] == mine:
                continue
            if part != "configuration":
                raise Agreed(f"processes 0 and {index}: {words[part]}")
            raise Agreed(
                f"processes 0 and {index} have different configurations "
                f"({first_difference(mine, other[part], ('process 0', f'process {index}'))}); "
                "start all with the same options"
            )


def first_difference(
    there: Any, wanted: Any, sides: tuple[str, str] = ("there", "here"), name: str = ""
) -> str:
    """The first entry in which two configurations differ, as text; empty when they are equal.

    A `name` goes before the options that come with it.

    Example:
        >>> first_difference({"a": {"b": 1}}, {"a": {"b": 2}})
        'a.b: 1 there, 2 here'
        >>> first_difference({"a": {"b": 1, "name": "x"}}, {"a": {"b": 2, "name": "y"}})
        'a.name: x there, y here'
    """
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in sorted(set(there) | set(wanted), key=lambda key: (key != "name", key)):
            inner = f"{name}.{key}" if name else key
            if found := first_difference(there.get(key), wanted.get(key), sides, inner):
                return found
        return ""
    if there == wanted:
        return ""
    return f"{name}: {there} {_at(sides[0])}, {wanted} {_at(sides[1])}"


def _at(side: str) -> str:
    return side if side in ("there", "here") else f"on {side}"


def check_shared(folder: Any) -> None:
    """Check that every process sees what the first one writes to `folder`.

    Raises:
        Agreed: some do not.
    """
    if not _state.many:
        return
    token = of_first(lambda: f".seen-by-all-{os.getpid()}-{time.time_ns()}")
    of_first(lambda: (folder / token).write_text("") and None)
    try:
        with together():
            deadline = time.monotonic() + SHARED_SECONDS  # a network file system may lag
            while not (folder / token).exists():
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{folder} is not the same folder for all processes; give an --output that "
                        "all of them see: a bucket (gs://…) or a shared file system"
                    )
                time.sleep(0.05)
    finally:
        if _state.first:
            (folder / token).unlink()


# Stopping on a signal.

# The name of each signal, and the exit code of a program stopped by it. SIGTERM is how a cloud
# reclaims a machine: a run that has saved all its work ended well.
STOPS = {
    signal.SIGTERM: ("SIGTERM", 0),
    signal.SIGINT: ("Ctrl-C", 130),
    signal.SIGHUP: ("SIGHUP", 129),
}


def stopped_by() -> tuple[str, int]:
    """The name of the signal that asked this run to stop, and the exit code for it."""
    return STOPS[signal.Signals(_state.asked_by)]


@contextlib.contextmanager
def signals_stop(leave_at_once: Callable[[], None] | None = None) -> Iterator[None]:
    """Inside, SIGTERM, Ctrl-C and SIGHUP raise `Preempted`: at once, or after `deferred` work.

    A second Ctrl-C does not wait. Ignored signals stay ignored (`nohup`, background jobs). With
    several processes JAX's own handler replaces this one for SIGTERM. It lets them agree on where
    to stop: at the next `stop_point` or `asked_to_stop` that all of them reach. It handles no other
    signal: those end a process immediately.

    Args:
        leave_at_once: a function that ends the process. The main thread runs no Python code (not
            even signal handlers) while XLA compiles, so a separate thread calls it: where no step
            would be lost, and on a second Ctrl-C anywhere. None: the process is not ours to end.
    """

    def handle(number, frame):
        again = _state.asked and number == signal.SIGINT == _state.asked_by
        if not _state.asked:
            _state.asked, _state.asked_by = True, number
        if _state.many and leave_at_once is not None:
            leave_at_once()
        if again:
            raise KeyboardInterrupt
        if not _state.deferred:
            raise Preempted

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.asked = _state.unsaved = False
    before = {
        number: signal.signal(number, handle)
        for number in STOPS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    with contextlib.ExitStack() as watched:
        if leave_at_once is not None:
            watched.enter_context(_watched(leave_at_once))
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            _state.asked = False  # handled: another run may follow in this process


@contextlib.contextmanager
def _watched(leave_at_once: Callable[[], None]) -> Iterator[None]:
    """A thread that receives Ctrl-C and SIGHUP at once, whatever the main thread does."""
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)

    def listen() -> None:
        count = 0
        while numbers := os.read(ear, 64):
            heard = [n for n in numbers if n in (signal.SIGINT, signal.SIGHUP)]
            count += len(heard)
            if heard and (count > 1 or not _state.unsaved):
                _state.asked_by = heard[0]
                leave_at_once()

    thread = threading.Thread(target=listen, name="Ctrl-C", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(mouth)  # ends the thread
        thread.join()
        os.close(ear)


def unsaved(steps: bool) -> None:
    """Record whether some steps exist in memory only; Ctrl-C then waits until they are saved.

    Leaving the outermost `deferred` block marks everything as saved.
    """
    _state.unsaved = steps


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, a request to stop is only recorded: check `asked_to_stop` where work can be left.

    Raises:
        Preempted: a stop was requested and the work did not check for it; raised at the end.
    """
    before, _state.deferred = _state.deferred, True
    try:
        yield
    finally:
        _state.deferred = before
        _state.unsaved = _state.unsaved and before
    if _state.asked and not before:
        raise Preempted


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A part of `deferred` work that may be interrupted anywhere.

    Raises:
        Preempted: the run was asked to stop.
    """
    before, _state.deferred = _state.deferred, False
    try:
        if _state.asked:
            raise Preempted
        yield
    finally:
        _state.deferred = before


def asked_to_stop() -> bool:
    """Whether to stop here; every process must call it, and gets the same answer."""
    if not _state.many:
        return _state.asked
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_state.points))


def stop_point() -> None:
    """Raise `Preempted` when the run was asked to stop and all processes are here.

    Raises:
        Preempted: see above.
    """
    if _state.many and not _state.deferred and asked_to_stop():
        raise Preempted
