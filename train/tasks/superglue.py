"""Sentences and labels as prompts and label words: GLUE and SuperGLUE, and rows of one's own.

The templates are those of MeZO's code (arXiv 2305.17333), which ZO-Muon's (arXiv 2602.17155) uses
unchanged. Columns have the names of the Hub's data sets; GLUE's and SuperGLUE's own files
may call them otherwise.
"""

from __future__ import annotations

from typing import Any

from jaxlib_unlearn.errors import UserError
from train.data.labelled import Columns, Pools, Record, read_pools
from train.tasks import text_kinds
from train.tasks.labelled import Labelled, Row, label, read_from, text

GLUE, SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"
ENTAILS = ("entailment", "not_entailment")
FALSE_TRUE = ("false", "true")


def sst2(record: Record) -> Row:
    """`{sentence} It was` terrible or great."""
    return {
        "prompt": f"{text(record['sentence'], 'sentence')} It was",
        "options": [" terrible", " great"],
        "gold": label(record["label"], ("negative", "positive")),
    }


def rte(record: Record) -> Row:
    """Whether a premise means that a hypothesis is true: Yes, No."""
    premise, hypothesis = (text(record[name], name) for name in ("premise", "hypothesis"))
    return {
        "prompt": f'{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        "options": ["Yes", "No"],
        "gold": label(record["label"], ENTAILS),
    }


def cb(record: Record) -> Row:
    """Whether a hypothesis follows from a premise: Yes, No, Maybe."""
    premise, hypothesis = (text(record[name], name) for name in ("premise", "hypothesis"))
    return {
        "prompt": f'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        "options": ["Yes", "No", "Maybe"],
        "gold": label(record["label"], ("entailment", "contradiction", "neutral")),
    }


def boolq(record: Record) -> Row:
    """A question about a passage: Yes, No."""
    passage, question = (text(record[name], name) for name in ("passage", "question"))
    question = question if question.endswith("?") else question + "?"
    return {
        "prompt": f"{passage} {question[0].upper()}{question[1:]}\n",
        "options": ["Yes", "No"],
        "gold": 1 - label(record["label"], FALSE_TRUE),
    }


def wsc(record: Record) -> Row:
    """Whether a pronoun refers to a noun: No, Yes."""
    names = ("text", "span1_text", "span2_text")
    sentence, noun, pronoun = (text(record[name], name) for name in names)
    return {
        "prompt": f'{sentence}\nIn the previous sentence, does the pronoun "{pronoun.lower()}" '
        f"refer to {noun}? Yes or No?\n",
        "options": ["No", "Yes"],
        "gold": label(record["label"], FALSE_TRUE),
    }


def wic(record: Record) -> Row:
    """Whether a word has one meaning in two sentences: No, Yes."""
    names = ("word", "sentence1", "sentence2")
    word, first, second = (text(record[name], name) for name in names)
    return {
        "prompt": f'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        f"{first}\n{second}\n",
        "options": ["No", "Yes"],
        "gold": label(record["label"], FALSE_TRUE),
    }


def copa(record: Record) -> Row:
    """The choice of two sentences that is the cause, or the effect, of a premise."""
    premise = text(record["premise"], "premise").removesuffix(".")
    kind = text(record["question"], "question")
    links = {"effect": " so", "cause": " because"}
    if kind not in links:
        raise ValueError(f"question is {kind!r}; it must be cause or effect")
    options = []
    for name in ("choice1", "choice2"):
        words = text(record[name], name)
        alone = words.split(" ", 1)[0] == "I"
        options.append(" " + (words if alone else words[0].lower() + words[1:]))
    return {
        "prompt": premise + links[kind],
        "options": options,
        "gold": label(record["label"], ("choice1", "choice2")),
    }


def own(record: Record) -> Row:
    """A row as it is: `gold` is the number of the right option, or its text.

    Raises:
        ValueError: a column holds something else.
    """
    prompt, options, gold = (record[name] for name in ("prompt", "options", "gold"))
    text(prompt, "prompt")
    if not isinstance(options, list) or not all(isinstance(o, str) and o for o in options):
        raise ValueError("column 'options' must be a list of texts that are not empty")
    if isinstance(gold, str):
        stripped = [option.strip() for option in options]
        if gold.strip() not in stripped:
            raise ValueError(f"gold is {gold[:40]!r}, none of the options; give one, or its number")
        gold = stripped.index(gold.strip())
    if isinstance(gold, bool) or not isinstance(gold, int):
        raise ValueError("column 'gold' must be the number of the right option, or its text")
    return {"prompt": prompt, "options": options, "gold": gold}


def read_own(data: Any) -> Pools:
    """The rows of `--data.path`.

    Raises:
        UserError: there is none.
    """
    if data.path is None:
        raise UserError(
            "--task rows reads rows of your own: give --data.path FILE, JSON lines with prompt, "
            "options and gold"
        )
    return read_pools(data.path, (("prompt",), ("options",), ("gold",)))


def task(
    name: str, summary: str, row: Any, columns: Columns, hub: tuple[str, str], dev_rows: int = 500
) -> Labelled:
    """A task of the benchmarks."""
    return Labelled(name, summary, text_kinds.CHOICE, read_from(columns, *hub), row, dev_rows)


PAIR: Columns = (("premise", "sentence1"), ("hypothesis", "sentence2"), ("label",))
ROWS = (
    Labelled(
        "rows",
        "rows of your own: prompt, options, gold as JSON lines",
        text_kinds.CHOICE,
        read_own,
        own,
    ),
    task("sst2", "whether a review is good", sst2, (("sentence",), ("label",)), (GLUE, "sst2")),
    task("rte", "whether a text entails another", rte, PAIR, (SUPER_GLUE, "rte")),
    task("cb", "whether a text entails, contradicts or neither", cb, PAIR, (SUPER_GLUE, "cb"), 100),
    task(
        "boolq",
        "a yes-or-no question about a passage",
        boolq,
        (("passage",), ("question",), ("label", "answer")),
        (SUPER_GLUE, "boolq"),
    ),
    task(
        "wsc",
        "whether a pronoun refers to a noun",
        wsc,
        (("text",), ("span1_text",), ("span2_text",), ("label",)),
        (SUPER_GLUE, "wsc.fixed"),
        100,
    ),
    task(
        "wic",
        "whether a word means the same in two sentences",
        wic,
        (("word",), ("sentence1",), ("sentence2",), ("label",)),
        (SUPER_GLUE, "wic"),
    ),
    task(
        "copa",
        "which of two sentences is the cause or the effect",
        copa,
        (("premise",), ("question",), ("choice1",), ("choice2",), ("label",)),
        (SUPER_GLUE, "copa"),
        100,
    ),
)
