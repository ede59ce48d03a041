"""Chat templates that never end, exhaust memory or fail: a user error, and the next one renders."""

from __future__ import annotations

import datetime
import signal
import time

import pytest

from jaxlib_unlearn.errors import UserError
from models.text import chat_templates, chat_worker, prompts
from models.text.chat_templates import render

SCOPE = {"messages": [{"role": "user", "content": "hi"}]}
LOOPS = "{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"
DOUBLE = (
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% set r = range(99999)|list %}" + LOOPS, "takes more than 1 s of processor time"),
        ("{% set n = 10 ** 9 ** messages|length %}{{ 3 ** n }}", "processor time"),
        (DOUBLE, "too much memory|processor time"),
        ("{{ 'a' * 10 ** 10 }}", "too much memory"),
        ("{{ '%9999999999d' % 1 }}", "too much memory"),
        ("{% for i in range(9999) %}{{ 'a' * 999 }}{% endfor %}", "prints more than 4194304"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{{ " + "(" * 9999 + ")" * 9999 + " }}", "maximum recursion depth"),
        ("{% for a in messages %}" * 30 + "{% endfor %}" * 30, "nested blocks"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('no\n' * 9999) }}", "no no no"),
        ("{{ messages[0]['x'].y }}", "no attribute 'x'"),
        ("{% include 'x' %}", "no loader"),
        ("x" * (2**20 + 1), "has 1,048,577 characters"),
    ],
)
def test_what_no_template_may_do_is_one_line(template, message):
    with pytest.raises(UserError, match=message) as caught:
        render(template, SCOPE)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert render("{{ messages[0].content }}", SCOPE) == "hi"


def test_the_clock_is_the_callers():
    day = datetime.datetime(2025, 4, 10)
    assert render("{{ strftime_now('%d %b %Y') }}", {}, day) == "10 Apr 2025"
    assert render("{{ strftime_now('%d %b %Y') }}", {}) == prompts.DATE  # not the time of day
    for drawn in ("{{ lipsum() }}", "{{ [1, 2]|random }}"):
        with pytest.raises(UserError):
            render(drawn, {})


def test_one_process_renders_for_all_and_comes_back_when_it_died():
    render("a", {})
    (worker,) = chat_templates._workers
    assert render("b{{ x }}", {"x": "\ud800\n"}) == "b\ud800\n"
    assert chat_templates._workers == [worker] and len(worker.known) >= 2
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(UserError, match="ended the process that rendered it"):
        render("a", {})
    assert render("a", {}) == "a"
    assert chat_templates._workers != [worker]
    chat_templates.stop()
    assert chat_templates._workers == [] and render("a", {}) == "a"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_the_whole_group_is_not_for_the_worker(name):
    """The program that asked stops by itself, and may render until it has."""
    if not hasattr(signal, name):
        pytest.skip(f"this system has no {name}")
    assert render("{{ messages[0].content }}", SCOPE) == "hi"
    (worker,) = chat_templates._workers
    worker.process.send_signal(getattr(signal, name))
    assert render("{{ 1 + 1 }}", SCOPE) == "2"
    assert chat_templates._workers == [worker] and worker.process.poll() is None


def test_an_interrupted_question_leaves_no_answer_for_the_next(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    render("a", {})
    with monkeypatch.context() as patched:
        patched.setattr("select.select", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render("late", {})
    assert render("next", {}) == "next"


def test_a_worker_that_does_not_run_is_given_up(monkeypatch):
    monkeypatch.setattr(chat_templates, "PATIENCE", 0.0)
    monkeypatch.setattr("select.select", lambda *_: ([], [], []))
    with pytest.raises(UserError, match="processor time"):
        render("a", {})


def test_rendering_costs_little():
    render("a{{ messages }}", SCOPE)
    started = time.process_time()
    for _ in range(200):
        render("a{{ messages }}", SCOPE)
    assert time.process_time() - started < 1.0


def test_the_worker_needs_nothing_but_the_standard_library_and_jinja():
    text = chat_worker.__loader__.get_source(chat_worker.__name__)
    assert "jaxlib_unlearn" not in text and "import models" not in text
