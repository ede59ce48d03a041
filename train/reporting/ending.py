"""The end of a run: its summary, its page, its table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from train.reporting import page, tables
from train.runtime import distributed, files, remote
from train.runtime.stages import write_atomic
from train.runtime.tracking import say


def publish(
    run: Any,
    summary: Mapping[str, Any],
    tracked: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """`summary.json`, the page and its pictures, and the table on the terminal.

    Args:
        run: the `train.engine.run.Run`.
        summary: metrics by model, as they are stored.
        tracked: those that trackers receive; None: the same.
        notes: lines below the table.
    """

    def write() -> None:
        write_atomic(run.folder / "summary.json", text := json.dumps(summary, indent=1))
        write_atomic(run.folder / "summary.key", files.key_text(text))
        page.build(run.folder)
        tables.show(tables.columns([tables.load_run(run.folder)]))
        remote.send(run.folder)

    distributed.of_first(write)
    run.tracker.close(summary if tracked is None else tracked)
    for note in notes:
        say(note)
    where = remote.home(run.folder)
    minutes = 0.0 if run.clock is None else run.clock.minutes["all"]
    made = f"model: {where / 'export'}   " if (run.folder / "export").is_dir() else ""
    say(f"report: {where / 'report.html'}   {made}{minutes:.1f} minutes")
