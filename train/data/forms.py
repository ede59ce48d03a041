"""The forms in which people keep questions and answers, as rows of `question` and `answer`.

A table that has both columns is taken as it is. Elsewhere the first of `FORMS` whose columns it has
says how a row is read; `--data.columns` renames columns first. A conversation becomes one question
(`models.text.prompts.joined`): its last turn is the answer, those before are the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from models.text.prompts import joined

PLAIN = ("question", "answer")
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "prompter": "user"}


class Table(NamedTuple):
    """The raw contents of a file: the names of its columns, and its rows in order.

    A row has a value for each column; None where the file has none.
    """

    columns: list[str]
    rows: list[list[Any]]


class Form(NamedTuple):
    """A way to write a question and its answer.

    Args:
        needs: the columns that it is known by.
        read: `read(row by column) -> (question, answer)`; raises `ValueError` with the reason.
        may: further columns that it reads.
    """

    needs: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], tuple[Any, Any]]
    may: tuple[str, ...] = ()


def conversation(turns: Any) -> tuple[str, str]:
    """The turns of a conversation as one question, and its last turn, the answer.

    Args:
        turns: a list of `{"role", "content"}` (or `{"from", "value"}`): an optional system turn,
            then user and assistant in turn; the assistant's is the last.

    Raises:
        ValueError: the turns are others.

    Example:
        >>> conversation([{"role": "user", "content": "Who?"}, {"from": "gpt", "value": "Me."}])
        ('Who?', 'Me.')
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError("is no list of turns")
    found = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise ValueError("has a turn that is no object with role and content")
        role = turn.get("role", turn.get("from"))
        text = turn.get("content", turn.get("value"))
        if not isinstance(text, str):
            raise ValueError("has a turn whose content is no text")
        found.append((ROLES.get(str(role), str(role)), text))
    spoken = found[1:] if found and found[0][0] == "system" else found
    wanted = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or [role for role, _ in spoken] != wanted:
        raise ValueError("must have user and assistant turns alternately, the assistant's last")
    return joined(found[:-1]), found[-1][1]


def _completed(row: Mapping[str, Any]) -> tuple[Any, Any]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return conversation([*prompt, *completion])
    return prompt, completion


def _instructed(row: Mapping[str, Any]) -> tuple[Any, Any]:
    parts = [row["instruction"], row.get("input")]
    texts = [part for part in parts if isinstance(part, str) and part.strip()]
    return ("\n\n".join(texts) if texts else row["instruction"]), row["output"]


FORMS = (
    Form(("messages",), lambda row: conversation(row["messages"])),
    Form(("conversations",), lambda row: conversation(row["conversations"])),
    Form(("prompt", "completion"), _completed),
    Form(("prompt", "response"), lambda row: (row["prompt"], row["response"])),
    Form(("instruction", "output"), _instructed, ("input",)),
)
KNOWN = "; ".join(" and ".join(form.needs) for form in (Form(PLAIN, lambda row: ("", "")), *FORMS))


def plain_name(column: Any) -> str:
    """The name of a column; case, outer blanks and blanks for `_` do not matter."""
    return str(column).strip().casefold().replace(" ", "_")


def renamed(table: Table, columns: Mapping[str, str], place: str) -> Table:
    """The table with columns renamed.

    Args:
        table: the table of a file.
        columns: the file's name of a column by the name that it gets.
        place: the name of the file, for messages.

    Raises:
        UserError: the file has no such column.

    Example:
        >>> renamed(Table(["q", "a"], []), {"question": "q"}, "my.csv").columns
        ['question', 'a']
    """
    if absent := [name for name in columns.values() if name not in table.columns]:
        raise UserError(
            f"--data.columns: {place} has no column {' and no '.join(map(repr, absent))}; it has "
            f"{', '.join(map(str, table.columns))}"
        )
    names = {old: new for new, old in columns.items()}
    # Another column of that name makes room.
    kept = [
        names.get(c, f"{c} (not read)" if plain_name(c) in columns else c) for c in table.columns
    ]
    return Table(kept, table.rows)


def formed(table: Table, place: str) -> tuple[Table, str, list[str]]:
    """A table with the columns `question` and `answer`, made of the form that it has.

    Args:
        table: the table of a file.
        place: the name of the file, for messages.

    Returns:
        The table, the columns of its form ("" where it was left as it is), and one message for each
        problem.

    Example:
        >>> formed(Table(["instruction", "output"], [["Who?", "Me."]]), "my.json")
        (Table(columns=['question', 'answer'], rows=[['Who?', 'Me.']]), 'instruction, output', [])
    """
    at = {plain_name(column): i for i, column in reversed([*enumerate(table.columns)])}
    if any(name in at for name in PLAIN):
        return table, "", []
    form = next((form for form in FORMS if all(name in at for name in form.needs)), None)
    if form is None:
        return table, "", []
    read = [name for name in (*form.needs, *form.may) if name in at]
    others = [i for i, column in enumerate(table.columns) if plain_name(column) not in read]
    rows: list[list[Any]] = []
    wrong: dict[str, list[int]] = {}
    for number, row in enumerate(table.rows, 1):
        try:
            pair = form.read({name: row[at[name]] for name in read})
        except ValueError as error:
            wrong.setdefault(str(error), []).append(number)
            continue
        rows.append([*pair, *(row[i] for i in others)])
    problems = [
        f"{place}, row {numbers[0]}{f' and {len(numbers) - 1} more' * (len(numbers) > 1)}: "
        f"{form.needs[0]!r} {reason}"
        for reason, numbers in wrong.items()
    ]
    columns = [*PLAIN, *(table.columns[i] for i in others)]
    return Table(columns, rows), ", ".join(read), problems
