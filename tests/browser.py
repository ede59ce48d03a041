"""Headless Chromium by its DevTools protocol over two pipes: what a page looks like to a person."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"),
)
# Defects that a person would see, one text each. Text boxes are those of the lines of text nodes;
# labels made by CSS are no nodes, so a box that is narrower than what is in it counts too.
CHECK = """
(() => {
  const found = [], wide = document.documentElement.clientWidth;
  const say = (what, node) => found.push(
    what + ': ' + (node.textContent || node.outerHTML || '').trim().slice(0, 60));
  const scrolls = e => e && e !== document.documentElement &&
    (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX) ||
     scrolls(e.parentElement));
  const closed = e => e && ((e.tagName === 'DETAILS' && !e.open) || closed(e.parentElement));
  if (document.documentElement.scrollWidth > wide)
    say('the page is wider than the window', document.querySelector('title'));
  for (const e of document.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect();
    if (!box.width || closed(e) || scrolls(e)) continue;
    if (box.right > wide + 1 || box.left < -1) say('outside the window', e);
    if (e.clientWidth && e.scrollWidth > e.clientWidth + 1) say('wider than its box', e);
  }
  for (const e of document.images) if (!e.complete || !e.naturalWidth) say('picture not loaded', e);
  const lines = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    if (!node.textContent.trim() || closed(node.parentElement)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const r of range.getClientRects()) if (r.width > 1) lines.push([r, node]);
  }
  lines.sort((a, b) => a[0].top - b[0].top);
  lines.forEach(([a, one], i) => {
    for (let j = i + 1; j < lines.length && lines[j][0].top < a.bottom; j++) {
      const [b, other] = lines[j];
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (one !== other && across > 1 && down > .4 * Math.min(a.height, b.height))
        say('printed over "' + one.textContent.trim().slice(0, 30) + '"', other);
    }
  });
  return found;
})()
"""


class Browser:
    """One page of a running Chromium."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = os.fdopen(write, "wb", 0), os.fdopen(read, "rb", 0)
        self._rest, self._last = b"", 0
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        at = {"targetId": target, "flatten": True}
        self._session = self.ask("Target.attachToTarget", **at)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self._write.close()
        self._read.close()

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while True:
            told = self._message()
            if told.get("id") == self._last:
                assert "error" not in told, told
                return told["result"]
            self._events.append(told)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = self._read.read(1 << 20)
            assert part, "Chromium has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, width: int, dark: bool = False) -> list[str]:
        """Show a page and wait until it is loaded; return the defects that a person would see."""
        media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=media)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self._events.clear()
        self.ask("Page.navigate", url=page.absolute().as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self._events):
            self._events.append(self._message())
        found = self.ask("Runtime.evaluate", expression=CHECK, returnByValue=True)["result"]
        assert "value" in found, found
        asked = (e for e in self._events if e.get("method") == "Network.requestWillBeSent")
        urls = [e["params"]["request"]["url"] for e in asked]
        mine = (page.absolute().as_uri(), "data:")
        return found["value"] + [f"asks for {u[:80]}" for u in urls if not u.startswith(mine)]

    def background(self) -> list[int]:
        """The colour of the page, red, green and blue."""
        code = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)"
        return self.ask("Runtime.evaluate", expression=code, returnByValue=True)["result"]["value"]

    def screenshot(self) -> bytes:
        """The whole page as a PNG file."""
        made = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(made["data"])


@contextlib.contextmanager
def started() -> Iterator[Browser]:
    """A running Chromium, which is stopped at the end."""
    assert CHROMIUM is not None
    theirs, write = os.pipe()
    read, back = os.pipe()
    # Chromium reads commands from 3 and answers on 4, which may be numbers of our own pipes.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs, back)]
    null = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0)
    copies = ((0, 1), (0, 2), (ends[0], 3), (ends[1], 4))
    actions = [null, *((os.POSIX_SPAWN_DUP2, *copy) for copy in copies)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        argv = [CHROMIUM, *OPTIONS, f"--user-data-dir={folder}", "about:blank"]
        # No subprocess with a function between fork and exec: JAX's threads forbid a fork.
        process = os.posix_spawn(CHROMIUM, argv, os.environ, file_actions=actions, setpgroup=0)
        for end in (theirs, back, *ends):
            os.close(end)
        try:
            with Browser(write, read) as found:
                yield found
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
