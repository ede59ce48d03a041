"""What a run tells: a JSON line a step, TensorBoard if asked, progress with an ETA on stderr."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from train import distributed, files
from train.runlogs import split_steps, step_line


def say(message: str) -> None:
    """One line to the person, on stderr; of several processes the first one speaks."""
    distributed.say_on_first(message)


class Tracker:
    """Writes `metrics.jsonl`; lines of steps that are redone after a crash are dropped first.

    Of several processes the first one writes.

    Args:
        folder: the run folder.
        tensorboard: also write TensorBoard events there.
    """

    def __init__(self, folder: Path, tensorboard: bool = False):
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.board: Any = None
        if distributed.is_first():
            self._set_aside()
        if tensorboard and distributed.is_first():
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise UserError(
                    "--tensorboard needs tensorboardX; pip install 'jaxlib-unlearn[tensorboard]'"
                ) from None
            self.board = SummaryWriter(str(folder / "tensorboard"))

    def _set_aside(self) -> None:
        """Move damaged lines to `metrics.jsonl.bad`: a log never keeps a run from going on."""
        steps, bad = split_steps(self.path)
        if not bad:
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
        """Forget the lines of `stage` at `step` and later (and a line a crash cut short)."""
        if not (distributed.is_first() and self.path.exists()):
            return
        steps, _ = split_steps(self.path)
        self._keep([line for line, row in steps if row["stage"] != stage or row["step"] < step])

    def write(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        """Append one line."""
        if not distributed.is_first():
            return
        clean = {k: float(v) for k, v in scalars.items()}
        with self.path.open("a") as file:
            file.write(step_line(stage, step, clean))
        if self.board is not None:
            for name, value in clean.items():
                self.board.add_scalar(f"{stage}/{name}", value, step)


@contextlib.contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yield `advance(n=1, note="")`: progress with an ETA.

    A bar on a terminal, a line every ten seconds elsewhere; nothing in the first two seconds.
    """
    start = last = time.monotonic()
    state = {"done": done, "shown": False}
    tty = sys.stderr.isatty()

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal last
        state["done"] += n
        now = time.monotonic()
        if now - start < 2 or now - last < (0.2 if tty else 10) or not distributed.is_first():
            return
        last = now
        speed = (state["done"] - done) / (now - start)
        eta = math.ceil((total - state["done"]) / speed) if speed > 0 else 0
        filled = round(24 * state["done"] / max(total, 1))
        bar = "█" * filled + "░" * (24 - filled) if tty else ""
        line = f"{label} {bar} {state['done']}/{total}  ETA {eta // 60}:{eta % 60:02d}  {note}"
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
