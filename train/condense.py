"""Shorten the chains of thought of a file of reasoning rows (EPiC), with a report beside it.

python -m train.condense IN.jsonl OUT.jsonl                     (half of the thoughts, both ends)
python -m train.condense IN.parquet OUT.parquet --tau 0.3 --policy head
python -m train.condense IN.jsonl OUT.jsonl --tokenizer MODEL   (counts tokens as well)

A row has `question`, `thoughts` (a list) and `answer`; or `question` and `answer`, which is
`<think>…</think>` and the text behind it; or `messages`, the last of which is such a text. OUT and
its .report.json are written as a whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlib_unlearn import cot
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import MOST, option
from jaxlib_unlearn.reading import read_json, reading
from models import Tokenizer
from models.files import gguf_files, hub
from train.data import reasoning
from train.engine.base_models import model_source
from train.options import cli
from train.options.config import to_json
from train.runtime import distributed, files
from train.runtime.tracking import progress, say


@dataclass(frozen=True)
class CondenseRun(cot.Condense):
    """One file that is shortened.

    Args:
        source: set by the first argument: a `.jsonl` or `.parquet` file.
        output: set by the second: the file to write, of the same kind.
    """

    source: Path = Path()
    output: Path = Path()
    tokenizer: str = option(
        "",
        "folder, `.gguf` file or Hub id of a model, or `smollm2`: its tokenizer counts the tokens "
        "of question, trace and answer; without it none are counted.",
    )
    seed: int = option(0, "of `random`.", low=0, high=MOST)


@dataclass
class Counts:
    """The numbers of the report; without a tokenizer no tokens are counted."""

    rows: int = 0
    thoughts_before: int = 0
    thoughts_after: int = 0
    tokens_before: int = 0
    tokens_after: int = 0


def main(argv: list[str]) -> None:
    """The program."""
    if len(argv) < 2 or argv[0] in ("-h", "--help"):
        print(__doc__)
        if "--help" in argv or "-h" in argv:
            cli.parse(CondenseRun, CondenseRun(), ["--help"], "train.condense IN OUT", "options")
            return
        raise UserError("two arguments are needed: a file of rows, and the file to write")
    default = CondenseRun(source=Path(argv[0]).expanduser(), output=Path(argv[1]).expanduser())
    run(cli.parse(CondenseRun, default, argv[2:], "train.condense IN OUT", "shorten traces"))


def run(config: CondenseRun) -> Counts:
    """Write the shortened file and its report.

    Raises:
        UserError: options, a file or a row that cannot be used; nothing is written then.
    """
    from train.options import checks

    checks.check_numbers(config)
    kind, report = check_files(config.source, config.output), report_of(config.output)
    tokenizer = tokenizer_of(config.tokenizer) if config.tokenizer else None
    counts = Counts()

    def change(places: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        found = [
            shorter(config, where, row, counts.rows + i)
            for i, (where, row) in enumerate(zip(places, rows, strict=True))
        ]
        counts.rows += len(found)
        counts.thoughts_before += sum(len(one.before.thoughts) for one in found)
        counts.thoughts_after += sum(len(one.after.thoughts) for one in found)
        if tokenizer is not None:
            counts.tokens_before += num_tokens(tokenizer, [one.before for one in found])
            counts.tokens_after += num_tokens(tokenizer, [one.after for one in found])
        return [one.row for one in found]

    def write(part: Path) -> None:
        with progress(f"{config.source.name}, percent", 100) as advance:
            told = 0
            for share in kind.rewrite(config.source, part, change):
                advance(int(100 * share) - told)
                told = int(100 * share)
        if not counts.rows:
            raise UserError(f"{config.source}: has no rows; give a file of rows")

    distributed.unsaved(True)  # Ctrl-C then removes the unfinished file
    try:
        files.write(config.output, write)
        how = {name: value for name, value in to_json(config).items() if name not in PLACES}
        told = {name: value or None for name, value in vars(counts).items()}
        files.write(report, json.dumps({**told, **how}, indent=1) + "\n")
    finally:
        distributed.unsaved(False)
    say(f"{config.output}: {words(counts)}; {report}")
    return counts


PLACES = ("source", "output")


def check_files(source: Path, output: Path) -> reasoning.Format:
    """The kind of both files.

    Raises:
        UserError: one that cannot be read or written, or both are the same.
    """
    found = reasoning.format_of(source)
    with reading(output, "give another file to write", "cannot be looked at"):
        there = output.exists()
        if there and output.samefile(source):
            raise UserError(f"{output} is the file that is read; give another file to write")
        if output.is_dir() or not output.parent.is_dir():
            what = "a folder" if there else f"in no folder: {output.parent} does not exist"
            raise UserError(f"{output} is {what}; give a file to write")
    if output.suffix.lower() != source.suffix.lower():
        raise UserError(f"{output}: is written as {source} is; give a file *{source.suffix}")
    report = report_of(output)
    if report.is_dir():
        raise UserError(f"{report} is a folder, where the report goes; give another file to write")
    if report.exists() and not is_report(report):
        raise UserError(
            f"{report} is no report of this program, and would be replaced by one; move it, or "
            "write to another folder"
        )
    return found


def report_of(output: Path) -> Path:
    """The report of a file, beside it; files of one folder have reports of their own.

    Example:
        >>> report_of(Path("short.jsonl")).name
        'short.report.json'
    """
    return output.with_suffix(".report.json")


def is_report(path: Path) -> bool:
    """Whether a file is a report of an earlier run."""
    try:
        told = read_json(path)
    except UserError:
        return False
    return isinstance(told, dict) and set(vars(Counts())) <= set(told)


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer of a model folder, a `.gguf` file or a Hub id.

    Raises:
        UserError: there is none.
    """
    try:
        name = str(model_source(name))
        here = hub.local(name) if hub.is_here(name) else hub.download(name, weights=False)
        if here.suffix == ".gguf":
            with gguf_files.opened(here) as (_, _, tokenizer):
                return tokenizer
        return Tokenizer.from_folder(here.parent if here.name == "tokenizer.json" else here)
    except UserError as error:
        raise UserError(f"--tokenizer {error}") from None


def shorter(config: CondenseRun, where: str, row: Mapping[str, Any], number: int) -> cot.Condensed:
    """A row with fewer thoughts; an error names its place."""
    try:
        return cot.condense(
            row,
            config.tau,
            config.policy,
            head_share=config.head_share,
            mode=config.mode,
            seed=config.seed,
            number=number,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def num_tokens(tokenizer: Tokenizer, traces: Sequence[cot.Trace]) -> int:
    """The number of tokens of questions, traces and answers, without a chat template."""
    return sum(
        len(tokenizer.encode(text)) for trace in traces for text in (trace.question, trace.text)
    )


def words(counts: Counts) -> str:
    """The report in a line.

    Example:
        >>> words(Counts(2, 10, 5))
        '2 rows, 5 of 10 thoughts (50 %)'
    """
    parts = [f"{counts.rows:,} rows"]
    for what, after, before in (
        ("thoughts", counts.thoughts_after, counts.thoughts_before),
        ("tokens", counts.tokens_after, counts.tokens_before),
    ):
        if before:
            parts.append(
                f"{after:,} of {before:,} {what} ({after / before:.0%})".replace("%", " %")
            )
    return ", ".join(parts)


if __name__ == "__main__":
    cli.main(main)
