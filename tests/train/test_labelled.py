"""Labelled rows: files and templates, how they are divided, and what is refused."""

import json
import sys

import numpy as np
import pytest

from jaxlib_unlearn.errors import UserError
from train.data.labelled import Pools, divide, hub_pools, read_pools
from train.jobs.classification_options import TASKS, ClassifyData
from train.tasks import labelled, text_kinds

SST2 = (("sentence",), ("label",))
PAIR = (("premise", "sentence1"), ("hypothesis", "sentence2"), ("label",))


def refused(call, *parts):
    with pytest.raises(UserError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line and all(part in line for part in parts), line


# Templates: a record of each task as the Hub has it, and as its own file may.

RECORDS = {
    "sst2": (
        {"sentence": "a fine film ", "label": 1},
        {"sentence": "a fine film", "label": "1"},
        ("a fine film It was", [" terrible", " great"], 1),
    ),
    "rte": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
        {"sentence1": "It rains.", "sentence2": "It is wet.", "label": "entailment"},
        (
            'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n',
            ["Yes", "No"],
            0,
        ),
    ),
    "cb": (
        {"premise": "It rains.", "hypothesis": "it is wet", "label": 2},
        {"premise": "It rains.", "hypothesis": "it is wet", "label": "neutral"},
        (
            'Suppose It rains. Can we infer that "it is wet"? Yes, No, or Maybe?\n',
            ["Yes", "No", "Maybe"],
            2,
        ),
    ),
    "boolq": (
        {"passage": "The sea is salt.", "question": "is the sea salt", "label": 1},
        {"passage": "The sea is salt.", "question": "is the sea salt?", "answer": True},
        ("The sea is salt. Is the sea salt?\n", ["Yes", "No"], 0),
    ),
    "wsc": (
        {"text": "Ada met Bo; She left.", "span1_text": "Ada", "span2_text": "She", "label": 1},
        {
            "text": "Ada met Bo; She left.",
            "target": {"span1_text": "Ada", "span2_text": "She"},
            "label": True,
        },
        (
            'Ada met Bo; She left.\nIn the previous sentence, does the pronoun "she" refer to Ada? '
            "Yes or No?\n",
            ["No", "Yes"],
            1,
        ),
    ),
    "wic": (
        {"word": "bank", "sentence1": "A bank.", "sentence2": "River bank.", "label": 0},
        {"word": "bank", "sentence1": "A bank.", "sentence2": "River bank.", "label": "false"},
        (
            'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
            "A bank.\nRiver bank.\n",
            ["No", "Yes"],
            0,
        ),
    ),
    "copa": (
        {
            "premise": "It rained.", "question": "effect", "choice1": "The street was wet.",
            "choice2": "I slept.", "label": 0,
        },
        {
            "premise": "It rained.", "question": "effect", "choice1": "The street was wet.",
            "choice2": "I slept.", "label": "0",
        },
        ("It rained so", [" the street was wet.", " I slept."], 0),
    ),
    "rows": (
        {"prompt": "2 + 2 =", "options": ["4", "5"], "gold": 0},
        {"prompt": "2 + 2 =", "options": ["4", "5"], "gold": "4"},
        ("2 + 2 =", ["4", "5"], 0),
    ),
}  # fmt: skip
ANSWERS = {
    "squad": (
        {
            "title": "Moon", "context": "It is round.", "question": "What is it? ",
            "answers": {"text": ["round", "It is round"], "answer_start": [6, 0]},
        },
        "Title: Moon\nContext: It is round.\nQuestion: What is it?\nAnswer:",
    ),
    "drop": (
        {
            "passage": "It is round.", "question": "What is it?",
            "answers_spans": {"spans": ["round", "It is round"], "types": ["span"]},
        },
        "Passage: It is round.\nQuestion: What is it?\nAnswer:",
    ),
}  # fmt: skip


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_task_has_a_record_here():
    texts = (text_kinds.CHOICE, text_kinds.ANSWER)
    assert {*RECORDS, *ANSWERS} == {name for name, task in TASKS.items() if task.kind in texts}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_becomes_a_prompt_with_options(name, tmp_path):
    *records, (prompt, options, gold) = RECORDS[name]
    for record in records:
        file = write(tmp_path / "some.jsonl", [record] * 4)
        data = ClassifyData(path=file, train_rows=2, dev_rows=1)
        rows = labelled.load(TASKS[name], data, 0)
        wanted = {"prompt": prompt, "options": options, "gold": gold}
        assert rows.train == [wanted] * 2 and rows.dev == rows.test == [wanted]
        assert rows.majority_accuracy == 1.0


@pytest.mark.parametrize("name", ANSWERS)
def test_a_record_becomes_a_prompt_with_answers(name, tmp_path):
    record, prompt = ANSWERS[name]
    file = write(tmp_path / "some.jsonl", [record] * 3)
    rows = labelled.load(TASKS[name], ClassifyData(path=file, train_rows=1, dev_rows=1), 0)
    assert rows.test == [{"prompt": prompt, "answers": ["round", "It is round"]}]
    assert rows.majority_accuracy is None


# Files.


def test_glue_folders_with_and_without_a_header(tmp_path):
    for header in ("sentence\tlabel\n", ""):
        (tmp_path / "train.tsv").write_text(header + 'a "quote\t0\nb\t1\n\nc\t1\n')
        (tmp_path / "dev.tsv").write_text(header + "d\t0\r\n")
        (tmp_path / "test.tsv").write_text("index\tsentence\n0\te\n")  # has no labels
        found = read_pools(tmp_path, SST2)
        assert [r["sentence"] for r in found.train] == ['a "quote', "b", "c"]
        assert found.held_out == [{"sentence": "d", "label": "0"}]


def test_parquet_parts_are_one_split(tmp_path):
    import pyarrow
    from pyarrow import parquet

    for i in range(2):
        table = pyarrow.table({"sentence": [f"s{i}"], "label": [i], "idx": [i]})
        parquet.write_table(table, tmp_path / f"train-0000{i}-of-00002.parquet")
    found = read_pools(tmp_path, SST2)
    assert found.train == [{"sentence": "s0", "label": 0}, {"sentence": "s1", "label": 1}]
    assert found.held_out is None


class Table(list):
    """Rows of a Hub data set, and where `datasets` keeps them."""

    cache_files = ({"filename": f"/cache/nyu-mll___glue/sst2/0.0.0/{'ab' * 20}/glue-train.arrow"},)


def test_a_hub_data_set_is_read_lazily(monkeypatch):
    class Datasets:
        @staticmethod
        def load_dataset(repo, config, split, revision):
            assert (repo, config, revision) == ("nyu-mll/glue", "sst2", "abc")
            return Table([{"sentence": split, "label": 0, "idx": 1}])

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    data = ClassifyData(revision="abc")
    found = TASKS["sst2"].read(data)
    sentences = [part[0]["sentence"] for part in (found.train, found.held_out or [])]
    assert sentences == ["train", "validation"]
    assert found.place == f"nyu-mll/glue sst2 at commit {'ab' * 20}"

    def broken(*args, **more):
        raise OSError("no\nroute")

    monkeypatch.setattr(Datasets, "load_dataset", broken)
    refused(lambda: TASKS["sst2"].read(data), "nyu-mll/glue sst2, split 'train'", "no route")


BAD_FILES = {
    "columns": (
        "some.jsonl",
        '{"sentence": "a"}\n',
        ["row 1: column 'label' is missing"],
    ),
    "cells": ("some.tsv", "sentence\tlabel\na\t0\nb\n", ["line 3: 1 cells in place of 2"]),
    "header": ("some.tsv", "text\tstars\tid\na\t1\t2\n", ["line 1: 3 cells in place of 2"]),
    "empty": ("some.tsv", "", ["no rows"]),
    "bytes": ("some.tsv", b"a\xff\t0\n", ["not UTF-8"]),
    "suffix": ("some.docx", "a", ["cannot be read"]),
    "json": ("some.jsonl", "{", ["line 1", "broken JSON"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_cannot_be_used(name, tmp_path):
    file, content, parts = BAD_FILES[name]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: read_pools(path, SST2), *parts)


def test_folders_that_cannot_be_used(tmp_path):
    refused(lambda: read_pools(tmp_path / "nowhere", SST2), "does not exist")
    (tmp_path / "dev.tsv").write_text("a\t0\n")
    refused(lambda: read_pools(tmp_path, SST2), "no file named train", "dev.tsv")
    refused(lambda: hub_pools("a/b", None, SST2), "a/b, split 'train': cannot be loaded")


BAD_ROWS = {
    "sst2": [({"sentence": "a", "label": 2}, "row 2: label 2 is none of negative, positive")]
    + [({"sentence": " ", "label": 1}, "row 2: column 'sentence' must hold text")]
    + [({"sentence": "a", "label": "good"}, "label 'good' is none of")]
    + [({"sentence": "a", "label": -1}, "label -1 is none of")],
    "copa": [(RECORDS["copa"][0] | {"question": "why"}, "question is 'why'; it must be cause")],
    "rows": [
        ({"prompt": "a", "options": ["b", "c"], "gold": 2}, "gold is 2, none of the 2 options"),
        ({"prompt": "a", "options": ["b", "c"], "gold": -1}, "gold is -1, none of"),
        ({"prompt": "a", "options": ["b", "c"], "gold": "d"}, "gold is 'd', none of the options"),
        ({"prompt": "a", "options": ["b"], "gold": 0}, "1 option(s), and there is nothing"),
        ({"prompt": "a", "options": "b", "gold": 0}, "'options' must be a list of texts"),
        ({"prompt": "a", "options": ["b", "c"], "gold": 0.5}, "'gold' must be the number"),
        ({"prompt": "", "options": ["b", "c"], "gold": 0}, "'prompt' must hold text"),
    ],
    "squad": [(ANSWERS["squad"][0] | {"answers": {"text": []}}, "row 2: no answer")],
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_cannot_be_used(name, tmp_path):
    good = RECORDS[name][0] if name in RECORDS else ANSWERS[name][0]
    for bad, message in BAD_ROWS[name]:
        file = write(tmp_path / "some.jsonl", [good, bad, good, good])
        data = ClassifyData(path=file, train_rows=1, dev_rows=1)
        refused(lambda data=data: labelled.load(TASKS[name], data, 0), message)
    refused(lambda: TASKS["rows"].read(ClassifyData()), "give --data.path FILE")


# How rows are divided.


def pools(count, held=None):
    rows = [{"i": i} for i in range(count)]
    return Pools(rows, None if held is None else [{"j": i} for i in range(held)], "some")


def test_one_pool_is_divided_by_seed():
    found, notes = divide(pools(30), 10, 5, None, 0)
    assert [len(part) for part in found] == [10, 5, 15]
    every = [row["i"] for part in found for row in part]
    assert sorted(every) == list(range(30)) and every != list(range(30))
    assert divide(pools(30), 10, 5, None, 0)[0] == found != divide(pools(30), 10, 5, None, 1)[0]
    assert "10 rows to train on, 5 dev rows, 15 test rows (the rest of its rows)" in notes[0]
    assert divide(pools(30), 10, 5, 4, 0)[0].test == found.test[:4]
    # more rows to train on keep those that there were
    assert divide(pools(30), 12, 5, None, 0)[0].train[:10] == found.train


def test_a_validation_split_is_the_test():
    found, notes = divide(pools(30, 8), 10, 5, None, 3)
    assert [len(part) for part in found] == [10, 5, 8] and len(notes) == 1
    assert sorted(row["j"] for row in found.test) == list(range(8))
    assert not {row["i"] for row in found.train} & {row["i"] for row in found.dev}
    found, notes = divide(pools(30, 8), None, 5, 2, 3)
    assert [len(part) for part in found] == [25, 5, 2]
    found, notes = divide(pools(12, 8), 10, 5, None, 3)
    assert len(found.train) == 7 and "7 training rows: some has no more beside 5 dev" in notes[1]


@pytest.mark.parametrize(
    ("made", "train", "dev"),
    [(pools(15), 10, 5), (pools(15), None, 5), (pools(5, 9), 1, 5), (pools(1), 1, 1)],
)
def test_too_few_rows(made, train, dev):
    refused(lambda: divide(made, train, dev, None, 0), f"{len(made.train)} rows do not make")


def test_the_commonest_label_of_the_training_rows_is_judged_on_the_test_rows():
    def rows(*golds):
        return [{"prompt": "a", "options": ["b", "c"], "gold": gold} for gold in golds]

    found = labelled.Rows(rows(1, 1, 0), rows(0), rows(0, 0, 0, 1), [])
    assert found.majority_accuracy == 0.25
    assert found.digest() != found._replace(dev=rows(1)).digest()


def test_real_sst2(shared):
    data = ClassifyData(path=shared / "data" / "sst2")
    rows = labelled.load(TASKS["sst2"], data, 0)
    assert [len(part) for part in rows[:3]] == [1000, 500, 872]
    assert np.isclose(np.mean([row["gold"] for row in rows.test]), 444 / 872)
    assert all(row["prompt"].endswith(" It was") for row in rows.train)
