"""The program that renders chat templates, in a process that may be killed (`chat_templates`).

It imports the standard library and Jinja alone: it is started as a file, with the folder of Jinja
as its argument. Every input line is a request and every output line its answer, both JSON. A
sandbox keeps a template from running code; the kernel limits its time and memory.
"""

from __future__ import annotations

import datetime
import json
import signal
import sys
from typing import Any

SECONDS = 1.0  # of processor time for one rendering, its compilation included
MEMORY = 2**29  # bytes of address space
LONGEST = 2**22  # characters of a rendered text
LARGEST_TEMPLATE = 2**20


def environment() -> Any:
    """Jinja as chat templates expect it, in its sandbox."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant said; for rendering it only groups."""

        tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        # Jinja's own filter escapes HTML, which no chat template expects.
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    found.filters["tojson"] = to_json
    found.globals["raise_exception"] = raise_exception
    # A conversation always gives the same text: templates get no random functions.
    del found.globals["lipsum"], found.filters["random"]
    return found


def render(template: Any, scope: dict[str, Any], now: str) -> dict[str, str]:
    """The answer to a request: a text, or the template's error."""
    clock = datetime.datetime.fromisoformat(now)
    size, pieces = 0, []
    for piece in template.generate(strftime_now=clock.strftime, **scope):
        size += len(piece)
        if size > LONGEST:
            return {"error": f"it prints more than {LONGEST} characters"}
        pieces.append(piece)
    return {"text": "".join(pieces)}


def limit_memory() -> None:
    """Cap the address space where the system supports it."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):
        pass


def limit_time(seconds: float) -> None:
    """Have the kernel kill this process after `seconds` of its processor time; 0: no limit.

    The signal's default action is what ends a single call of C code that never returns.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    """Answer requests until there are no more."""
    # They reach a whole process group, and are for the program that asked, which ends this one.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.path += sys.argv[1:]
    sandbox = environment()
    limit_memory()
    templates: dict[str, Any] = {}
    answers = sys.stdout.buffer
    for line in sys.stdin.buffer:
        limit_time(SECONDS)
        try:
            request = json.loads(line)
            key = request["key"]
            if "source" in request:
                templates[key] = sandbox.from_string(request["source"])
            answer = render(templates[key], request["scope"], request["now"])
        except Exception as error:
            kind = type(error).__name__
            text = str(error)[:1000] if not isinstance(error, MemoryError) else "too much memory"
            answer = {"error": text or kind, "kind": kind}
        limit_time(0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
