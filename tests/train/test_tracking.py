"""Progress on stderr: the ETA counts the work alone, never the compilation before it."""

import re
import types

import pytest

from train.runtime import tracking


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = types.SimpleNamespace(t=0.0)
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now.t)
    return now


def etas(text):
    """(units done, ETA in seconds or None) of every line of progress."""
    found = re.findall(r"(\d+)/\d+(?: +ETA (\d+):(\d+))?", text)
    return [(int(done), None if not m else 60 * int(m) + int(s)) for done, m, s in found]


def test_the_compilation_is_no_part_of_the_eta(clock, capsys):
    with tracking.progress("train", 100) as advance:
        clock.t = 120.0  # two minutes of compilation, then a unit every 10 s
        advance(1, "loss 1")
        for _ in range(3):
            clock.t += 10
            advance(1)
        # A second program is compiled on the way.
        clock.t += 70
        advance(1, "", 60.0)
        clock.t += 10
        advance(1)
    shown = etas(capsys.readouterr().err)
    assert shown == [(1, None), (2, 980), (3, 970), (4, 960), (5, 950), (6, 940)]


def test_units_that_were_done_before_do_not_count(clock, capsys):
    with tracking.progress("train", 100, 50) as advance:
        for t in (30.0, 40.0, 50.0):
            clock.t = t
            advance()
    assert etas(capsys.readouterr().err) == [(51, None), (52, 480), (53, 470)]


def test_a_short_job_shows_nothing(clock, capsys):
    with tracking.progress("score", 3) as advance:
        for _ in range(3):
            clock.t += 0.5
            advance()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_line_is_written_over(clock, capsys, monkeypatch):
    """Nothing else is asked of the terminal: a run that is killed leaves it as it was."""
    monkeypatch.setattr(tracking.sys.stderr, "isatty", lambda: True)
    with tracking.progress("train [1]", 2) as advance:
        for _ in range(2):
            clock.t += 10
            advance(1, "loss [red]1[/red]")
    first, second, end = capsys.readouterr().err.split("\r\x1b[K")[1:]
    assert "\x1b" not in first + second + end and "\r" not in first + second + end
    assert re.fullmatch(r"train \[1\] █{12}░{12} 1/2 +loss \[red\]1\[/red\]", first)
    assert re.fullmatch(r"train \[1\] █{24} 2/2 +ETA 0:00 +loss \[red\]1\[/red\]", second)
    assert end == "train [1]: 2 in 20 s\n"
