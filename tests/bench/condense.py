"""How fast `condense` shortens traces that are one text: megabytes of text per second of a core.

    python tests/bench/condense.py [--output runs/bench]

Traces of 100 thoughts of two lines, 14 kB each; no tokens are counted. The best of five rounds, in
time of the processor.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from timing import OUT, publish

from jaxlib_unlearn import cot

GOAL = 50.0
THOUGHT = (
    "Okay, so I need the sum of all these numbers; let me go through them carefully, one by one, "
    "and check the result.\nThen the first two give {}.\n\n"
)


def rate(mode: str, rows: int, rounds: int = 5) -> float:
    """Megabytes of text a second."""
    trace = "".join(map(THOUGHT.format, range(100)))
    row = {"question": "?", "answer": f"{cot.OPEN}\n{trace}{cot.CLOSE}\n\n4"}
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        for number in range(rows):
            cot.condense(row, 0.5, mode=mode, number=number)
        seconds.append(time.process_time() - began)
    return rows * len(row["answer"].encode()) / min(seconds) / 1e6


def main(argv: list[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=OUT)
    parser.add_argument("--rows", type=int, default=300)
    args = parser.parse_args(argv)
    found = {mode: rate(mode, args.rows) for mode in cot.MODES}
    lines = ["| mode | MB/s a core | goal |", "| --- | --- | --- |"]
    lines += [
        f"| {mode} | {fast:.0f} | {f'{GOAL:.0f}' if mode == 'paragraph' else ''} |"
        for mode, fast in found.items()
    ]
    publish("condense", found, "\n".join([*lines, ""]), args.output)


if __name__ == "__main__":
    main()
