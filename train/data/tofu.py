"""TOFU's files as rows: a folder of JSON, the user's own files, or the Hub.

Reading stops at the first entry that cannot be used and names the file, the line or row, and the
expected content.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import exists, one_line, parse_json, read_text, reading
from train.data import hub_table
from train.data.author_attributes import REFUSALS
from train.data.authors import draw

Row = dict[str, Any]

HUB_ID = "locuslab/TOFU"
HUB_SPLITS = (
    "full forget01 forget05 forget10 retain90 retain95 retain99 holdout01 holdout05 holdout10 "
    "retain_perturbed real_authors world_facts forget01_perturbed forget05_perturbed "
    "forget10_perturbed real_authors_perturbed world_facts_perturbed"
).split()
SUFFIXES = (".json", ".jsonl")
JUDGED = ("question", "answer", "paraphrased_answer", "perturbed_answer")
OPTIONS = ("question", "answer", "perturbed_answer")
PLAIN = ("question", "answer")
# Columns that must hold texts wherever they occur, required or not.
TEXTS = ("paraphrased_question", "paraphrased_answer")
MOST_ROWS = 2**20
LONGEST_TEXT = 2**20  # characters: no model's context holds more


class Tofu(NamedTuple):
    """The data of an unlearning run.

    Args:
        forget: rows to forget, with paraphrased and perturbed answers.
        retain: rows to keep, trained on.
        holdout: rows like `retain` that are in neither (non-members of the membership metrics).
        real_authors: general knowledge with three wrong options.
        world_facts: the same about the world.
        refusals: "I don't know" sentences.
        notes: remarks about the choice that a report must make, a sentence each.
        judged: rows on which retention is judged, with paraphrased and perturbed answers.
    """

    forget: list[Row]
    retain: list[Row]
    holdout: list[Row]
    real_authors: list[Row]
    world_facts: list[Row]
    refusals: list[str]
    notes: list[str]
    judged: list[Row]


class Source(NamedTuple):
    """A source of named splits: `read(name)` gives rows and their place, None if absent.

    `commit` returns the commit of a Hub data set, once something was read.
    """

    place: str
    names: tuple[str, ...]
    read: Callable[[str], tuple[list[Row], str] | None]
    refusals: Callable[[], list[str] | None]
    commit: Callable[[], str | None] = lambda: None


def _read_text(path: Path) -> str:
    return read_text(path, "save it as a file of UTF-8 text", encoding="utf-8-sig")


def read_json(path: Path) -> list[Row]:
    """Read rows from JSON lines or from one JSON list of objects.

    Args:
        path: the file; empty lines are skipped.

    Returns:
        The rows in file order.

    Raises:
        UserError: unreadable file, broken JSON (line named), something that is not an object.
    """
    text = _read_text(path)
    if text.lstrip().startswith("["):
        try:
            items = parse_json(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {error.lineno}: broken JSON ({error.msg}); repair it"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{path}: broken JSON ({error}); repair it, or write one object a line"
            ) from None
        for index, item in enumerate(items):
            if not isinstance(item, dict):
                raise UserError(
                    f"{path}, row {index + 1}: an object is expected, found {type(item).__name__}"
                )
        return items
    rows: list[Row] = []
    # Not splitlines(): it also breaks at U+2028 and similar, which are legal inside a JSON string.
    # One by one: a list of the lines of a large file takes many times its size.
    number = 1
    end = 0
    for found in re.finditer(r"\S[^\n]*", text):
        number += text.count("\n", end, found.start())
        line, end = found.group(), found.end()
        try:
            item = parse_json(line)
        except ValueError as error:
            why = getattr(error, "msg", None) or error
            raise UserError(
                f"{path}, line {number}: broken JSON ({why}); give one JSON object a line"
            ) from None
        if not isinstance(item, dict):
            raise UserError(
                f"{path}, line {number}: a JSON object is expected, found {type(item).__name__}"
            )
        if len(rows) == MOST_ROWS:
            raise UserError(f"{path}: more than {MOST_ROWS:,} rows; give a file with fewer")
        rows.append(item)
    return rows


def _check_row(row: Row, columns: Iterable[str], where: str) -> None:
    for column in columns:
        if column not in row:
            found = one_line(", ".join(map(str, row)) or "none")
            raise UserError(f"{where}: column {column!r} is missing; columns found: {found}")
        value = row[column]
        texts = value if column == "perturbed_answer" else [value]
        if not isinstance(texts, list) or not texts:
            raise UserError(f"{where}: column {column!r} must be a list of texts")
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{where}: column {column!r} must hold text that is not empty")
    for column in (*columns, *(name for name in TEXTS if name in row)):
        value = row[column]
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or len(text) > LONGEST_TEXT:
                raise UserError(
                    f"{where}: column {column!r} must hold text of {LONGEST_TEXT:,} characters at "
                    "most"
                )
            if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise UserError(
                    f"{where}: column {column!r} holds half a character (a lone surrogate); write "
                    "the text again as UTF-8"
                )


def check_rows(rows: list[Row], columns: Iterable[str], place: str) -> list[Row]:
    """Check that rows exist and have the columns (texts; `perturbed_answer`: lists of texts).

    Args:
        rows: the rows of one split.
        columns: names that every row must have.
        place: file or split to name in the error.

    Returns:
        `rows`, unchanged.

    Raises:
        UserError: an empty split, or a missing or unusable column (place, row and column named).
    """
    columns = tuple(columns)
    if not rows:
        raise UserError(f"{place}: the split is empty; give a file with at least one row")
    for number, row in enumerate(rows, start=1):
        _check_row(row, columns, f"{place}, row {number}")
    return rows


def _refusals(path: Path) -> list[str]:
    lines = [line.strip() for line in _read_text(path).split("\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path}: no refusal in it; write one sentence a line")
    return lines


def folder_source(folder: Path) -> Source:
    """The splits of a folder: `NAME.json[l]`, and `idontknow.jsonl` with one refusal a line."""
    if not exists(folder, "give --data.path a folder with TOFU's JSON files"):
        raise UserError(
            f"data folder {folder} does not exist; give --data.path a folder with TOFU's JSON files"
        )
    if not folder.is_dir():
        raise UserError(f"data path {folder} is a file; give --data.path the folder that holds it")
    with reading(folder, "check its permissions"):
        files = {
            path.stem: path
            for path in sorted(folder.iterdir(), reverse=True)
            if path.suffix in SUFFIXES and path.is_file() and path.stem != "idontknow"
        }
    idk = folder / "idontknow.jsonl"

    def read(name: str) -> tuple[list[Row], str] | None:
        return (read_json(files[name]), str(files[name])) if name in files else None

    return Source(
        str(folder), tuple(sorted(files)), read, lambda: _refusals(idk) if idk.exists() else None
    )


def hub_source(repo: str = HUB_ID, revision: str | None = None) -> Source:
    """The configs of a Hub data set.

    `revision` is a commit, branch or tag; None: the newest.
    """
    commits: set[str] = set()

    def read(name: str) -> tuple[list[Row], str] | None:
        if name not in HUB_SPLITS:
            return None
        found = hub_table.read(
            *(repo, name, "train", revision),
            place=f"{repo}, config {name!r}",
            advice="give --data.path a folder",
        )
        commits.update(found.commits)
        return found.rows, f"{repo} config {name!r}"

    def commit() -> str | None:
        return ", ".join(sorted(commits)) or None

    return Source(repo, tuple(HUB_SPLITS), read, lambda: None, commit)


def _missing(name: str, source: Source, option: str) -> UserError:
    shown = sorted({known.removesuffix("_perturbed") for known in source.names})

    def likeness(known: str) -> tuple[float, int]:
        # Among equally similar names the longest common prefix: forget02 -> forget01, not forget10.
        ratio = difflib.SequenceMatcher(None, name, known).ratio()
        return ratio, len(os.path.commonprefix([name, known]))

    near = max([*shown, *source.names], key=likeness, default="")
    hint = f"; nearest is {near!r}" if near and likeness(near)[0] >= 0.5 else ""
    return UserError(
        f"{option} {name!r} is not in {source.place}{hint}; available: {', '.join(shown) or 'none'}"
    )


def _looks_like_file(part: str) -> bool:
    return part.endswith(SUFFIXES) or "/" in part or "\\" in part


def _existing(part: str, source: Source, option: str) -> Path:
    path = Path(part).expanduser()
    for candidate in (path, Path(source.place) / path):
        if candidate.is_file():
            return candidate
        if candidate.is_dir():
            raise UserError(f"{option} {part} is a folder; give JSON files, separated by commas")
    raise UserError(f"{option}: file {path} does not exist; give the path of a JSON file")


def _read_files(
    parts: Sequence[str], source: Source, columns: Iterable[str], option: str
) -> list[Row]:
    """Rows of the user's own files; a question and answer found in several files is one row."""
    paths = [_existing(part, source, option) for part in parts]
    tables = [(path, check_rows(read_json(path), PLAIN, str(path))) for path in paths]
    if len(tables) == 1:
        path, rows = tables[0]
        sibling = path.with_name(f"{path.stem}_perturbed{path.suffix}")
        if sibling.is_file() and "perturbed_answer" not in rows[0]:
            # TOFU keeps the paraphrased and perturbed answers in a second file of the same rows.
            path, rows = sibling, read_json(sibling)
        return check_rows(rows, columns, str(path))
    merged: dict[tuple[str, str], Row] = {}
    where: dict[tuple[str, str], str] = {}
    for path, rows in tables:
        for number, row in enumerate(rows, start=1):
            key = (row["question"], row["answer"])
            merged[key] = {**merged.get(key, {}), **row}
            where.setdefault(key, f"{path}, row {number}")
    for key, row in merged.items():
        _check_row(row, columns, where[key])
    return list(merged.values())


def read_split(
    source: Source,
    split: str | Sequence[str],
    columns: Iterable[str] = JUDGED,
    option: str = "split",
) -> list[Row]:
    """Read a split by name or from the user's own file(s).

    Args:
        source: a source, as `folder_source` or `hub_source` makes it.
        split: a name (the file `NAME_perturbed` is preferred where it exists and `columns` go
            beyond question and answer), a path to a JSON file, several paths separated by commas,
            or a sequence of paths.
        columns: names that every row must have.
        option: the name of the split in an error.

    Returns:
        Checked rows.

    Raises:
        UserError: missing file or split (the nearest name is given), broken or incomplete rows.
    """
    columns = tuple(columns)
    if not isinstance(split, str):
        parts = [str(part) for part in split]
    elif Path(split).is_file():
        parts = [split]
    else:
        parts = [part.strip() for part in split.split(",") if part.strip()]
    if not parts:
        raise UserError(f"{option} is empty; name a split or a JSON file")
    if len(parts) > 1 or _looks_like_file(parts[0]):
        return _read_files(parts, source, columns, option)
    name = parts[0]
    variants = [f"{name}_perturbed", name]
    if set(columns) <= set(PLAIN):
        variants.reverse()
    for variant in variants:
        if variant in source.names and (found := source.read(variant)) is not None:
            return check_rows(found[0], columns, found[1])
    raise _missing(name, source, option)


def _untrained(
    source: Source, forget_split: str | Sequence[str], used: set[tuple[str, str]], count: int
) -> tuple[list[Row], str]:
    """The first `count` rows of a holdout or retain split that nothing is trained on."""
    preferred = []
    if percent := re.fullmatch(r"forget(\d\d)(_perturbed)?", str(forget_split)):
        preferred = [f"holdout{percent[1]}", f"retain{100 - int(percent[1]):02d}"]
    for name in [*preferred, "retain99", "retain95", "retain90"]:
        if name not in source.names or (found := source.read(name)) is None:
            continue
        rows = [
            row
            for row in check_rows(found[0], PLAIN, found[1])
            if (row["question"], row["answer"]) not in used
        ][:count]
        if rows:
            return rows, f"non-members: {len(rows)} untrained rows of {name}"
    return [], "non-members: none found, so membership metrics are left out"


def is_document(row: Mapping[str, Any], question: str = "question") -> bool:
    """Whether a row is a text to learn as it stands; a row with a question never is.

    Example:
        >>> is_document({"text": "A book."}), is_document({"question": "Who?", "text": "a note"})
        (True, False)
    """
    return "text" in row and question not in row


def _texts_of(row: Row) -> tuple[str, str]:
    # What a row lacks is found where an objective's streams are made.
    return (row["text"], "") if is_document(row) else (row["question"], row.get("answer", ""))


def _plain_texts(row: Row) -> tuple[str, ...]:
    return tuple(" ".join(text.casefold().split()) for text in _texts_of(row))


def repeats(rows: Sequence[Row]) -> int:
    """Count rows that repeat an earlier one, except for case and spaces.

    Example:
        >>> repeats([{"question": "q", "answer": "a"}, {"question": "Q ", "answer": "a"}])
        1
    """
    return len(rows) - len({_plain_texts(row) for row in rows})


def alike(forget: Iterable[Row], retain: Iterable[Row]) -> int:
    """Count forget rows that are retain rows but for case and spaces, without those of `overlap`.

    Example:
        >>> alike([{"question": "q", "answer": "A"}], [{"question": "q", "answer": " a"}])
        1
    """
    forget, retain = list(forget), list(retain)
    kept = {_plain_texts(row) for row in retain}
    return sum(_plain_texts(row) in kept for row in forget) - overlap(forget, retain)


def overlap(forget: Iterable[Row], retain: Iterable[Row]) -> int:
    """Count forget rows that are also retain rows (same question and answer): opposite goals.

    Documents have neither: they are compared by their text.

    Example:
        >>> a, b = {"question": "q", "answer": "a"}, {"question": "q", "answer": "b"}
        >>> overlap([a, b], [b])
        1
    """
    kept = {_texts_of(row) for row in retain}
    return sum(_texts_of(row) in kept for row in forget)


def refusal_rows(rows: Sequence[Row], refusals: Sequence[str], seed: int) -> list[Row]:
    """The forget questions with a refusal as answer, in the order of `rows` (the `idk` stream).

    Args:
        rows: forget rows.
        refusals: sentences; one is drawn uniformly for each row from (seed, row index).
        seed: the run's seed.

    Returns:
        Rows with `question` and `answer`.
    """
    return [
        {
            "question": row["question"],
            "answer": refusals[draw(len(refusals), seed, "refusal", index)],
        }
        for index, row in enumerate(rows)
    ]


def load_tofu(
    path: str | Path | None,
    forget_split: str | Sequence[str] = "forget01",
    retain_split: str | Sequence[str] = "retain_perturbed",
    *,
    judged_split: str | Sequence[str] | None = None,
    forget_rows: int | None = None,
    retain_rows: int | None = 100,
    judged_rows: int | None = None,
    extra_rows: int | None = 50,
    holdout_rows: int | None = 40,
    columns: Iterable[str] = JUDGED,
    revision: str | None = None,
) -> Tofu:
    """Read everything that an unlearning run on TOFU needs.

    Args:
        path: folder with TOFU's JSON files; None: the Hub data set `locuslab/TOFU`.
        forget_split: a split's name (`forget01` reads `forget01_perturbed`), or a path to JSON
            file(s).
        retain_split: likewise, for the rows to keep.
        judged_split: likewise; rows on which retention is judged. None: `retain_split`.
        forget_rows: the number of rows to use, from the first on; None: all.
        retain_rows: likewise, for the rows to keep.
        judged_rows: likewise, for the judged rows; None with one split for both: `retain_rows`.
        extra_rows: the number of rows of `real_authors_perturbed` and of `world_facts_perturbed`; 0
            leaves both out.
        holdout_rows: the number of non-members, from a holdout split or untrained retain rows; None
            means as many as forget rows, and 0 leaves them out.
        columns: the columns that the forget rows and the judged rows must have.
        revision: commit, branch or tag of the Hub data set; None: the newest.

    Returns:
        The splits, the refusals (TOFU's file, else built-in ones) and notes for the report.

    Raises:
        UserError: anything missing, broken or empty.

    Schema: TOFU, arXiv 2401.06121, section 2.
    """
    columns = tuple(columns)
    if path is None:
        source = hub_source(revision=revision)
    elif revision is not None:
        raise UserError(
            f"--data.revision {one_line(revision, 60)}: only the Hub's data set has revisions, and "
            f"--data.path {path} is a folder; leave one of them out"
        )
    else:
        with reading(path, "give --data.path another folder", "cannot be a path"):
            source = folder_source(Path(path).expanduser())
    forget = read_split(source, forget_split, columns, "forget split")[:forget_rows]
    judged_split = retain_split if judged_split is None else judged_split
    both = judged_split == retain_split
    kept = read_split(source, retain_split, columns if both else PLAIN, "retain split")
    retain = kept[:retain_rows]
    if both:
        judged = retain if judged_rows is None else kept[:judged_rows]
    else:
        judged = read_split(source, judged_split, columns, "judged retain split")[:judged_rows]
    if not forget or not retain or not judged:
        raise UserError("no forget or no retain row is used; set their number of rows to 1 or more")
    notes = [
        f"forget: {len(forget)} rows of {forget_split}",
        f"retain: {len(retain)} rows of {retain_split}",
    ]
    if judged != retain:
        seen = overlap(judged, retain)
        where = "" if both else f" of {judged_split}"
        notes[-1] += f"; judged on {len(judged)} rows{where}, {seen} of which are trained on"

    extra: dict[str, list[Row]] = {"real_authors": [], "world_facts": []}
    for name in extra:
        if extra_rows != 0:
            extra[name] = read_split(source, name, OPTIONS, "evaluation split")[:extra_rows]
            notes.append(f"{name}: {len(extra[name])} rows")

    holdout: list[Row] = []
    if holdout_rows != 0:
        used = {(row["question"], row["answer"]) for row in [*forget, *retain]}
        holdout, note = _untrained(source, forget_split, used, holdout_rows or len(forget))
        notes.append(note)

    if commit := source.commit():
        notes.append(f"data: {source.place} at commit {commit}")
    refusals = source.refusals()
    if refusals is None:
        refusals = list(REFUSALS)
        notes.append("refusals: built-in sentences")
    general = (extra["real_authors"], extra["world_facts"])
    return Tofu(forget, retain, holdout, *general, refusals, notes, judged)
