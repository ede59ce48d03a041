"""TOFU's files: the real ones, small generated ones, and every kind of bad input as one line."""

import json
import sys
import types

import pytest

from jaxlib_unlearn.errors import UserError
from train.data import tofu
from train.data.author_attributes import REFUSALS
from train.data.tofu import load_tofu, overlap, read_json, read_split, refusal_rows


def row(index, kind="f"):
    return {
        "question": f"{kind} question {index}?",
        "answer": f"{kind} answer {index}.",
        "paraphrased_answer": f"{kind} again {index}.",
        "perturbed_answer": [f"{kind} wrong {index} {j}." for j in range(5)],
        "paraphrased_question": f"{kind} asked {index}?",
    }


def plain(rows):
    return [{"question": r["question"], "answer": r["answer"]} for r in rows]


def write(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


COMMIT = "0123456789abcdef0123456789abcdef01234567"
FORGET = [row(i) for i in range(4)]
RETAIN = [row(i, "r") for i in range(12)]
OPTIONS = [
    {"question": f"o{i}?", "answer": "yes", "perturbed_answer": ["no", "so", "go"]}
    for i in range(3)
]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "forget01.json", plain(FORGET))
    write(folder / "forget01_perturbed.json", FORGET)
    write(folder / "retain99.json", plain(RETAIN))
    write(folder / "retain_perturbed.json", RETAIN[:6])
    write(folder / "real_authors_perturbed.json", OPTIONS)
    write(folder / "world_facts_perturbed.json", OPTIONS)
    (folder / "idontknow.jsonl").write_text("I don't know.\n\nNo idea.")
    return folder


def fails(call, *parts):
    """The one-line message of the UserError that `call` raises; it contains all parts."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def test_made_folder(folder):
    data = load_tofu(folder, retain_rows=5, extra_rows=2, holdout_rows=3)
    assert data.forget == FORGET and data.retain == RETAIN[:5]
    # Row 5 is not used although it is in retain_perturbed, so it is the first non-member.
    assert data.holdout == plain(RETAIN[5:8])
    assert data.real_authors == data.world_facts == OPTIONS[:2]
    assert data.refusals == ["I don't know.", "No idea."]
    assert "non-members: 3 untrained rows of retain99" in data.notes
    bare = load_tofu(folder, extra_rows=0, holdout_rows=0, forget_rows=1)
    assert (len(bare.forget), bare.real_authors, bare.world_facts, bare.holdout) == (1, [], [], [])
    assert len(load_tofu(folder, retain_rows=5, holdout_rows=None).holdout) == 4


def test_rows_to_train_on_and_rows_to_judge(folder, tmp_path):
    both = load_tofu(folder, retain_rows=5)
    assert both.judged is both.retain and both.notes[1] == "retain: 5 rows of retain_perturbed"
    fewer = load_tofu(folder, retain_rows=5, judged_rows=2)
    assert (fewer.retain, fewer.judged) == (RETAIN[:5], RETAIN[:2])
    # All plain rows are trained on; the judged ones have paraphrases.
    data = load_tofu(folder, "forget01", "retain99", judged_split="retain_perturbed",
                     retain_rows=None, judged_rows=None)  # fmt: skip
    assert (data.retain, data.judged) == (plain(RETAIN), RETAIN[:6])
    assert data.notes[1] == (
        "retain: 12 rows of retain99; judged on 6 rows of retain_perturbed, 6 of which are trained "
        "on"
    )
    assert data.holdout == [] and any("none found" in note for note in data.notes)
    data = load_tofu(folder, retain_split="retain99", judged_split="retain_perturbed",
                     retain_rows=3, judged_rows=5)  # fmt: skip
    assert (data.retain, data.judged) == (plain(RETAIN[:3]), RETAIN[:5])
    assert "3 of which are trained on" in data.notes[1] and data.holdout == plain(RETAIN[3:])
    own = write(tmp_path / "mine.json", plain(RETAIN[8:]))
    data = load_tofu(folder, retain_split=str(own), judged_split="retain_perturbed")
    assert (data.retain, len(data.judged)) == (plain(RETAIN[8:]), 6)
    assert "0 of which are trained on" in data.notes[1]
    # A split of which only the rows with paraphrases are there.
    data = load_tofu(folder, retain_split="retain", judged_split="retain_perturbed")
    assert data.retain == RETAIN[:6]
    call = {"retain_split": "retain90", "judged_split": "retain_perturbed"}
    fails(lambda: load_tofu(folder, **call), "retain split 'retain90'", "nearest is 'retain99'")
    call = {"retain_split": "retain99", "judged_split": "retain90"}
    fails(lambda: load_tofu(folder, **call), "judged retain split 'retain90'")
    call = {"retain_split": "retain_perturbed", "judged_split": "retain99"}
    fails(lambda: load_tofu(folder, **call), "retain99.json", "column 'paraphrased_answer'")


def test_holdout_split_is_preferred_and_its_absence_noted(folder):
    write(folder / "holdout01.json", plain([row(i, "h") for i in range(3)]))
    data = load_tofu(folder)
    assert [r["question"] for r in data.holdout] == [f"h question {i}?" for i in range(3)]
    (folder / "holdout01.json").unlink()
    (folder / "retain99.json").unlink()
    data = load_tofu(folder)
    assert data.holdout == [] and any("none found" in note for note in data.notes)


def test_built_in_refusals_where_there_is_no_file(folder):
    (folder / "idontknow.jsonl").unlink()
    data = load_tofu(folder)
    assert data.refusals == list(REFUSALS) and "refusals: built-in sentences" in data.notes


def test_own_files(folder, tmp_path):
    own = [row(i, "own") for i in range(3)]
    everything = write(tmp_path / "mine.jsonl", own)
    assert load_tofu(folder, str(everything)).forget == own
    listed = tmp_path / "list.json"
    listed.write_text("\ufeff" + json.dumps(own, indent=1), encoding="utf-8")
    assert load_tofu(folder, str(listed)).forget == own
    # A plain file finds the rows of its `_perturbed` sibling, as the splits of a folder do.
    pair = write(tmp_path / "pair.json", plain(own))
    write(tmp_path / "pair_perturbed.json", own)
    assert load_tofu(folder, str(pair)).forget == own
    # Several files: rows that occur in both become one, with the columns of both.
    both = f"{pair}, {tmp_path / 'pair_perturbed.json'}"
    assert load_tofu(folder, both).forget == own
    more = write(tmp_path / "more.json", FORGET)
    assert load_tofu(folder, [str(everything), str(more)]).forget == own + FORGET
    # File names are also looked up in the folder.
    assert load_tofu(folder, "forget01.json").forget == FORGET
    plain_only = write(tmp_path / "plain.json", plain(own))
    assert load_tofu(folder, str(plain_only), columns=tofu.PLAIN).forget == plain(own)
    fails(lambda: load_tofu(folder, str(plain_only)), str(plain_only), "paraphrased_answer")
    message = fails(
        lambda: load_tofu(folder, [str(more), str(plain_only)]), "column 'paraphrased_answer'"
    )
    assert f"{plain_only}, row 1" in message


def test_bad_folders_and_splits(folder, tmp_path):
    fails(lambda: load_tofu(tmp_path / "none"), "data folder", "does not exist", "--data.path")
    fails(lambda: load_tofu(folder / "forget01.json"), "is a file")
    fails(
        lambda: load_tofu(folder, "forgett01"),
        "forget split 'forgett01'",
        "nearest is 'forget01'",
        "available: forget01, real_authors, retain, retain99, world_facts",
    )
    fails(lambda: load_tofu(folder, retain_split="retain_pertubed"), "'retain_perturbed'")
    fails(lambda: load_tofu(folder, ""), "forget split is empty")
    fails(lambda: load_tofu(folder, "gone.json"), "gone.json does not exist")
    fails(lambda: load_tofu(folder, str(folder)), "is a folder")
    fails(lambda: load_tofu(folder, retain_rows=0), "no forget or no retain row")
    (folder / "world_facts_perturbed.json").unlink()
    fails(lambda: load_tofu(folder), "evaluation split 'world_facts'", "available")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(lambda: load_tofu(empty), "available: none")


def without(column):
    return {name: value for name, value in row(1).items() if name != column}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["the split is empty"]),
        ("\n \n", ["the split is empty"]),
        ("[]", ["the split is empty"]),
        (json.dumps(row(0)) + '\n{"question": "cut', ["line 2", "broken JSON"]),
        ("\n" + json.dumps(row(0)) + "\n3", ["line 3", "object is expected, found int"]),
        ('[{"question": "q"},\n{"answer"}]', ["line 2", "broken JSON"]),
        ('[{"question": "q"}, 7]', ["row 2", "found int"]),
        (f"{json.dumps(row(0))}\n{json.dumps(without('answer'))}", ["row 2", "column 'answer'"]),
        (json.dumps(without("perturbed_answer")), ["row 1", "column 'perturbed_answer'"]),
        (json.dumps(row(0) | {"perturbed_answer": "a text"}), ["must be a list of texts"]),
        (json.dumps(row(0) | {"perturbed_answer": []}), ["must be a list of texts"]),
        (json.dumps(row(0) | {"perturbed_answer": ["a", None]}), ["must hold text"]),
        (json.dumps(row(0) | {"answer": 3}), ["column 'answer' must hold text"]),
        (json.dumps(row(0) | {"question": " "}), ["column 'question' must hold text"]),
        ("[" * 99999, ["broken JSON", "nested too deeply"]),
        ('{"question": ' + "9" * 5000 + "}", ["line 1", "an integer of 5000 digits"]),
        ('{"question": "a", "question": "b"}', ["line 1", "'question' stands twice"]),
        (json.dumps(row(0) | {"answer": "\ud800"}), ["row 1", "'answer'", "half a character"]),
        (json.dumps(row(0) | {"answer": "a" * (2**20 + 1)}), ["row 1", "1,048,576 characters"]),
        (json.dumps(row(0) | {"paraphrased_question": 3}), ["row 1", "'paraphrased_question'"]),
    ],
)
def test_bad_files(folder, text, parts):
    path = folder / "forget01_perturbed.json"
    path.write_text(text, encoding="utf-8")
    fails(lambda: load_tofu(folder), str(path), *parts)


def test_bad_bytes_and_refusals(folder):
    (folder / "idontknow.jsonl").write_text("\n")
    fails(lambda: load_tofu(folder), "idontknow.jsonl", "no refusal")
    (folder / "forget01_perturbed.json").write_bytes(b'{"question": "\xff"}')
    fails(lambda: load_tofu(folder), "not UTF-8")


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"question": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
    assert read_json(path) == [{"question": "a\u2028b"}]


def test_overlap():
    assert overlap(FORGET, RETAIN) == 0
    assert overlap(FORGET, [*RETAIN, *plain(FORGET[1:3])]) == 2
    assert overlap(FORGET, [FORGET[0] | {"answer": "other"}]) == 0
    noted = [row | {"text": "a note"} for row in FORGET[:2]]
    assert overlap(noted, FORGET[:1]) == 1
    assert overlap([{"text": "A book."}], [{"text": "A book."}]) == 1


def test_refusal_rows_follow_the_forget_rows():
    refusals = ["a", "b", "c"]
    rows = [row(i) for i in range(60)]
    drawn = refusal_rows(rows, refusals, seed=0)
    assert [r["question"] for r in drawn] == [r["question"] for r in rows]
    assert {r["answer"] for r in drawn} == set(refusals)
    assert drawn == refusal_rows(rows, refusals, seed=0) != refusal_rows(rows, refusals, seed=1)
    assert refusal_rows(rows[:5], refusals, seed=0) == drawn[:5]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`; returns the calls it got."""
    calls = []
    tables = {
        "forget01_perturbed": FORGET,
        "retain_perturbed": RETAIN[:6],
        "holdout01": plain([row(i, "h") for i in range(3)]),
        "real_authors_perturbed": OPTIONS,
        "world_facts_perturbed": OPTIONS,
    }

    class Table(list):
        cache_files = [{"filename": f"/cache/locuslab___tofu/x/0.0.0/{COMMIT}/tofu-train.arrow"}]

    def load_dataset(repo, name, split, revision):
        calls.append((repo, name, split, revision))
        if name not in tables:
            raise ConnectionError("no route\nto the Hub")
        return Table(tables[name])

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return calls


def test_hub(hub):
    data = load_tofu(None)
    assert data.forget == FORGET and data.retain == RETAIN[:6] and len(data.holdout) == 3
    assert data.refusals == list(REFUSALS)
    assert ("locuslab/TOFU", "forget01_perturbed", "train", None) in hub
    assert data.notes[-2] == f"data: locuslab/TOFU at commit {COMMIT}"
    message = fails(lambda: load_tofu(None, "forget05"), "forget05_perturbed", "--data.path")
    assert "ConnectionError: no route" in message
    fails(lambda: load_tofu(None, "forget02"), "nearest is 'forget0", "locuslab/TOFU")


def test_hub_revision(hub, folder):
    load_tofu(None, revision="v1.0")
    assert {call[-1] for call in hub} == {"v1.0"}
    fails(lambda: load_tofu(folder, revision="v1.0"), "--data.revision v1.0", "--data.path")


def test_hub_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails(lambda: load_tofu(None), "needs the package `datasets`")


def test_real_tofu(shared):
    data = load_tofu(shared / "data" / "tofu")
    assert [len(part) for part in data[:6]] == [40, 100, 40, 50, 50, 100]
    assert overlap(data.forget, data.retain) == 0
    assert overlap(data.holdout, [*data.forget, *data.retain]) == 0
    assert data.forget[0]["question"].startswith(
        "What is the full name of the author born in Kuwait"
    )
    assert all(len(r["perturbed_answer"]) == 5 for r in [*data.forget, *data.retain])
    assert all(len(r["perturbed_answer"]) == 3 for r in [*data.real_authors, *data.world_facts])
    forget10 = load_tofu(shared / "data" / "tofu", "forget10", holdout_rows=None)
    assert (len(forget10.forget), len(forget10.holdout)) == (400, 400)
    assert "non-members: 400 untrained rows of retain90" in forget10.notes
    # All of it, the field's usual setting; only the Hub has non-members then (holdout10).
    official = load_tofu(
        shared / "data" / "tofu", "forget10", "retain90", judged_split="retain_perturbed",
        retain_rows=None, extra_rows=None, holdout_rows=400,
    )  # fmt: skip
    sizes = [len(part) for part in official[:5]]
    assert (sizes, len(official.judged)) == ([400, 3600, 0, 100, 117], 400)
    assert "judged on 400 rows of retain_perturbed, 400 of which" in official.notes[1]
    source = tofu.folder_source(shared / "data" / "tofu")
    assert len(read_split(source, "full", tofu.PLAIN)) == 4000
    # forget01 is part of full, so the program has an overlap to warn about.
    assert overlap(data.forget, read_split(source, "full", tofu.PLAIN)) == 40
    fails(lambda: load_tofu(shared / "data" / "tofu", "forget5"), "available: forget01, forget10")
