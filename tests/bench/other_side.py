"""The other side of a benchmark: a process of its own that answers requests, a JSON line each."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """One step of one side: its seconds, and its result."""

    seconds: float
    value: Any


@contextlib.contextmanager
def asking(
    program: Path, work: str, folder: Path, data: Any, environment: Mapping[str, str]
) -> Iterator[Callable[[Any], Turn]]:
    """Yields a function that sends a request to the other process and returns its turn.

    Args:
        program: the file that is run, with `work` and `folder` as arguments.
        work: what it shall do.
        folder: of the model that it loads.
        data: its first request, which is no turn.
        environment: its environment variables.
    """
    with subprocess.Popen(
        [sys.executable, str(program), work, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdin and process.stdout
        stdin, stdout = process.stdin, process.stdout

        def ask(request: Any) -> dict[str, Any]:
            with contextlib.suppress(BrokenPipeError):  # then there is no answer either
                stdin.write(json.dumps(request) + "\n")
                stdin.flush()
            answer = stdout.readline()
            if not answer:
                raise RuntimeError(f"{work}: torch's process ended; its error stands above")
            return json.loads(answer)

        ask(data)
        yield lambda request: Turn(**ask(request))
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
