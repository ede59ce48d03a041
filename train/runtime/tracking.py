"""Run logging: a JSON line per step, optional loggers, and progress with an ETA on stderr."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from train.runtime import distributed, files, reporters
from train.runtime.steplog import odd, split_steps, step_line


def say(message: str) -> None:
    """Print a line for the user on stderr; with several processes only the first one prints."""
    distributed.say_on_first(message)


class Tracker:
    """Writes `metrics.jsonl`; lines of steps that are redone after a crash are dropped first.

    With several processes only the first one writes.

    Args:
        folder: the run folder.
        report_to: the names of other loggers that get the same numbers (`reporters.REPORTERS`).
        config: the run's configuration, for those logs.
    """

    def __init__(
        self,
        folder: Path,
        report_to: tuple[str, ...] = (),
        config: Mapping[str, Any] | None = None,
    ):
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        first = distributed.is_first()
        self.others = reporters.open_all(report_to, folder, config or {}) if first else []
        if first:
            self._set_aside()

    def _set_aside(self) -> None:
        """Move damaged lines to `metrics.jsonl.bad`: a damaged log never stops a run."""
        steps, bad = split_steps(self.path)
        if not bad:
            if words := odd(steps):
                say(f"{self.path}: {words}; the run goes on, its curves may differ")
            return
        aside = self.path.with_name(self.path.name + ".bad")
        with aside.open("ab") as file:
            file.writelines(line + b"\n" for _, line in bad)
        self._keep([line for line, _ in steps])
        say(
            f"{self.path}: {len(bad)} damaged line(s) moved to {aside.name}, the first was line "
            f"{bad[0][0]}"
        )

    def _keep(self, lines: list[bytes]) -> None:
        files.write(self.path, b"".join(line + b"\n" for line in lines))

    def resume(self, stage: str, step: int) -> None:
        """Drop the lines of `stage` at `step` and later (and a line truncated by a crash)."""
        if not (distributed.is_first() and self.path.exists()):
            return
        files.key_of(self.path).unlink(missing_ok=True)  # of a run that had ended
        steps, _ = split_steps(self.path)
        kept = [(line, row) for line, row in steps if row["stage"] != stage or row["step"] < step]
        if words := odd([pair for pair in kept if pair[1]["stage"] == stage], stage, step):
            say(f"{self.path}: {words}; the run goes on, its curves may differ")
        self._keep(list(dict.fromkeys(line for line, _ in kept)))

    def write(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        """Append one line."""
        if not distributed.is_first():
            return
        clean = {k: float(v) for k, v in scalars.items()}
        with self.path.open("a") as file:
            file.write(step_line(stage, step, clean))
        self._hand_on(lambda other: other.write(stage, step, clean))

    def close(self, summary: Mapping[str, Mapping[str, Any]]) -> None:
        """Pass the final numbers of every model to the other loggers, and close those."""
        numbers = {
            f"{model}/{name}": float(value)
            for model, scores in summary.items()
            for name, value in scores.items()
            if isinstance(value, int | float)
        }
        self._hand_on(lambda other: other.close(numbers))
        self.others = []

    def _hand_on(self, call: Callable[[reporters.Reporter], None]) -> None:
        """Call every other logger; one that fails is dropped, and the run continues."""
        for other in list(self.others):
            try:
                call(other)
            except Exception as error:
                self.others.remove(other)
                reason = reporters.public((str(error).strip().splitlines() or [""])[0][:160])
                say(
                    f"warning: {other.name} takes no numbers any more ({type(error).__name__}: "
                    f"{reason}); they are all in {self.path}"
                )


class Timed(Tracker):
    """A log of steps that also records their times, without evaluations between steps.

    Only the steps of the stage that wrote last count.
    """

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.stage = ""
        self.marks: list[float] = []
        self.looked = 0.0

    def write(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        """Append one line."""
        if stage != self.stage:
            self.stage, self.marks = stage, []
        if "lr" in scalars:  # the line behind the last step has only an evaluation's numbers
            self.marks.append(time.monotonic() - self.looked)
        super().write(stage, step, scalars)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """A block whose time does not count."""
        began = time.monotonic()
        yield
        self.looked += time.monotonic() - began

    def seconds(self, steps: int = 1) -> float | None:
        """The seconds that `steps` steps take, by the median of this process's steps.

        It is None where fewer than two steps were taken here.
        """
        spent = [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]
        return steps * statistics.median(spent) if spent else None


def _eta(seconds: float, done: int, left: int) -> str:
    """The time that `left` units will take, if `done` units took so many seconds.

    Example:
        >>> _eta(10.0, 5, 35), _eta(0.0, 0, 35)
        ('ETA 1:10', '')
    """
    if done <= 0 or seconds <= 0:
        return ""
    eta = math.ceil(left * seconds / done)
    return f"ETA {eta // 60}:{eta % 60:02d}"


@contextlib.contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yield `advance(n=1, note="", compiling=0.0)`: progress with an ETA.

    A bar on a terminal, a line every ten seconds elsewhere; nothing in the first two seconds. The
    time before the first call is mostly compilation, and `compiling` is the time that a later unit
    spent on it. The ETA counts neither, so there is none before the second call.
    """
    start = last = time.monotonic()
    state = {"done": done, "shown": False}
    begun: tuple[float, int] | None = None  # the time when the first units were done, their number
    tty = sys.stderr.isatty()

    def advance(n: int = 1, note: str = "", compiling: float = 0.0) -> None:
        nonlocal last, begun
        state["done"] += n
        now = time.monotonic()
        if begun is None:
            begun, eta = (now, state["done"]), ""
        else:
            begun = (begun[0] + compiling, begun[1])
            eta = _eta(now - begun[0], state["done"] - begun[1], total - state["done"])
        if now - start < 2 or now - last < (0.2 if tty else 10) or not distributed.is_first():
            return
        last = now
        filled = round(24 * state["done"] / max(total, 1))
        bar = "█" * filled + "░" * (24 - filled) if tty else ""
        line = f"{label} {bar} {state['done']}/{total}  {eta}  {note}"
        print(
            ("\r\033[K" if tty else "") + line, end="" if tty else "\n", file=sys.stderr, flush=True
        )
        state["shown"] = True

    yield advance
    if tty and state["shown"]:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    seconds = time.monotonic() - start
    if seconds >= 2:
        say(f"{label}: {state['done']} in {seconds:.0f} s")
