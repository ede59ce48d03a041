"""Chat templates of third-party models, rendered in a separate process.

Jinja's sandbox keeps a template from running code, but nested loops or `10 ** 10 ** 8` can run in
it forever, and nothing inside a process can stop a call into C code. So one worker process
(`chat_worker.py`) renders for all tokenizers: it is started at the first template (a tenth of a
second), capped in memory, killed by the kernel after a second of processor time for one text, and
restarted by the next one.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import one_line
from models.text import chat_worker, prompts

# Processor time is the limit that counts; this one is for a worker that never gets to run.
PATIENCE = 60.0
NEXT = "use another template, or a model without one"
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class _Ended(Exception):
    """The worker process is gone."""


class _Worker:
    """A started worker process, and the templates that it knows."""

    def __init__(self) -> None:
        folders = {str(Path(m.__path__[0]).parent) for m in (jinja2, markupsafe)}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", chat_worker.__file__, *sorted(folders)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
        except OSError as error:
            raise UserError(
                f"the process that renders chat templates cannot be started ({error}); run with a "
                "Python that can start itself, or use a model without a chat template"
            ) from error
        self.owner = os.getpid()
        self.known: set[str] = set()

    def ask(self, key: str, source: str, request: dict[str, Any]) -> dict[str, str]:
        """The answer to a request; raises `_Ended` or `TimeoutError`."""
        new = {} if key in self.known else {"source": source}
        line = json.dumps({"key": key, **new, **request}).encode() + b"\n"
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            while line:
                line = line[self.process.stdin.write(line) :]
        except BrokenPipeError:
            raise _Ended from None
        pipe, pieces = self.process.stdout.fileno(), []
        end = time.monotonic() + PATIENCE
        while not pieces or not pieces[-1].endswith(b"\n"):
            if not select.select([pipe], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError
            pieces.append(os.read(pipe, 2**20))
            if not pieces[-1]:
                raise _Ended
        answer = json.loads(b"".join(pieces))
        if "error" not in answer:
            self.known.add(key)
        return answer

    def stop(self) -> int:
        """Kill the process; its exit code."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        return self.process.wait()


_lock = threading.Lock()
_workers: list[_Worker] = []  # one at most per process; a forked child leaves its parent's alone


@atexit.register
def stop() -> None:
    """End the worker; the next template starts another."""
    while _workers:
        worker = _workers.pop()
        if worker.owner == os.getpid():
            worker.stop()


def render(source: str, scope: Mapping[str, Any], today: datetime.datetime | None = None) -> str:
    """Render a chat template.

    Args:
        source: Jinja.
        scope: the variables of the template, JSON values.
        today: the day that `strftime_now` reads, its only clock; None: the day of `prompts.DATE`.

    Returns:
        The text.

    Raises:
        UserError: the template is broken, holds control characters, refuses its messages, or takes
            more than a second of processor time, 512 MiB of memory or 4 Mi characters of text.

    Example:
        >>> render("{{ messages[0].content|upper }}", {"messages": [{"content": "hi"}]})
        'HI'
    """
    if len(source) > chat_worker.LARGEST_TEMPLATE:
        raise UserError(
            f"the chat template has {len(source):,} characters, more than the "
            f"{chat_worker.LARGEST_TEMPLATE:,} that are read; {NEXT}"
        )
    if found := CONTROL.search(source):
        raise UserError(
            f"the chat template holds the control character {found[0]!r}: it is damaged; get it "
            "anew, or use another one"
        )
    key = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
    today = prompts.day_of(prompts.DATE) if today is None else today
    request = {"scope": dict(scope), "now": today.isoformat()}
    with _lock:
        _workers[:] = [worker for worker in _workers if worker.owner == os.getpid()]
        if not _workers:
            _workers.append(_Worker())
        worker = _workers[0]
        try:
            answer = worker.ask(key, source, request)
        except BaseException as error:  # whatever happened, this pipe may hold half an answer
            _workers.remove(worker)
            code = worker.stop()
            if not isinstance(error, (_Ended, TimeoutError)):
                raise
            late = isinstance(error, TimeoutError) or code == -getattr(signal, "SIGPROF", 0)
            took = (
                f"takes more than {chat_worker.SECONDS:g} s of processor time"
                if late
                else f"ended the process that rendered it (code {code})"
            )
            raise UserError(f"the chat template {took}; {NEXT}") from None
    if "error" in answer:
        raise UserError(
            f"the chat template refuses these messages ({one_line(answer['error'])}); check their "
            "roles and order"
        )
    return answer["text"]
