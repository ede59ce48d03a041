"""`train.condense`: whole files or none, all else as it was, and counts that a recount confirms."""

import datetime
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet as parquet
import pytest
import tokenizers

import models
from jaxlib_unlearn import cot
from jaxlib_unlearn.errors import UserError
from train.data import reasoning

THOUGHTS = ["Read it.", "Perhaps 3?", "Wait, no.", "Try 5.", "It is 4."]
TRACE = "\n\n".join(THOUGHTS)
TEXT = f"<think>\n{TRACE}\n</think>\n\nSo 4."
MESSAGES = [{"role": "user", "content": "1+3?"}, {"role": "assistant", "content": TEXT}]
ROWS = [
    {"id": 7, "question": "1+3?", "thoughts": THOUGHTS, "answer": "4", "more": [0.1, None]},
    {"question": "1 + 3 = \u2026?", "answer": TEXT},
    {"messages": MESSAGES, "answer": "4", "odd": "\ud800 alone"},
    {"question": "1?", "thoughts": ["One."], "answer": "1"},
]


@pytest.fixture
def lines(tmp_path):
    """A JSONL file as others write them: blank lines, another line end, no line end."""
    path = tmp_path / "rows.jsonl"
    texts = [json.dumps(row, separators=(",", ":")) for row in ROWS]
    path.write_bytes((texts[0] + "\n \n" + texts[1] + "\r\n" + "\n".join(texts[2:])).encode())
    return path


@pytest.fixture
def table(tmp_path):
    """A parquet file of the third form, with columns that JSON cannot hold."""
    path = tmp_path / "rows.parquet"
    columns = {
        "messages": [MESSAGES, MESSAGES],
        "when": [datetime.datetime(2026, 1, 2, 3, 4, 5, 6), None],
        "raw": [b"\xff", b""],
    }
    found = pyarrow.table(columns).replace_schema_metadata({"origin": "here"})
    parquet.write_table(found, path)
    return path


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a byte-level tokenizer."""
    kinds, pre = tokenizers.models, tokenizers.pre_tokenizers
    alphabet = sorted(pre.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(kinds.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    models.Tokenizer(backend).save(folder)
    return folder


def read(path):
    return [row for _, row in reasoning.read_rows(path)]


@pytest.mark.parametrize("policy", [*cot.POLICIES])
def test_lines(program, lines, tokenizer, tmp_path, policy):
    out = tmp_path / "out.jsonl"
    done = program(
        *("train.condense", lines, out, "--tau", "0.4", "--policy", policy, "--seed", "3"),
        *("--tokenizer", tokenizer),
    )
    assert done.code == 0, done.err
    condensed = [cot.condense(row, 0.4, policy, seed=3, number=i) for i, row in enumerate(ROWS)]
    assert read(out) == [one.row for one in condensed]
    before, after = lines.read_bytes(), out.read_bytes()
    assert after.endswith(before.splitlines()[-1])  # a line that does not change, as it was
    assert after.count(b"\r\n") == 1 and after.count(b"\n") == 3
    told = json.loads((tmp_path / "out.report.json").read_text())
    assert list(told)[:5] == [
        *("rows", "thoughts_before", "thoughts_after", "tokens_before", "tokens_after"),
    ]
    assert (told["rows"], told["thoughts_before"], told["thoughts_after"]) == (4, 16, 7)
    assert (told["tau"], told["policy"], told["seed"]) == (0.4, policy, 3)

    def num_bytes(traces):  # each is a token
        return sum(len(text.encode()) for one in traces for text in (one.question, one.text))

    assert told["tokens_before"] == num_bytes(one.before for one in condensed)
    assert told["tokens_after"] == num_bytes(one.after for one in condensed)
    assert f"{told['tokens_after']:,} of {told['tokens_before']:,} tokens" in done.err


def test_all_thoughts_are_the_same_bytes(program, lines, tmp_path):
    out = tmp_path / "out.jsonl"
    assert program("train.condense", lines, out, "--tau", "1").code == 0
    assert out.read_bytes() == lines.read_bytes().replace(b"\n \n", b"\n")
    told = json.loads((tmp_path / "out.report.json").read_text())
    assert told["tokens_before"] is None and told["thoughts_after"] == 16


def test_parquet_keeps_its_other_columns(program, table, tmp_path):
    out = tmp_path / "out.parquet"
    assert program("train.condense", table, out, "--tau", "0.2").code == 0
    before, after = parquet.read_table(table), parquet.read_table(out)
    assert after.schema.equals(before.schema, check_metadata=True)
    for name in ("when", "raw"):
        assert after.column(name).equals(before.column(name))
    kept = f"<think>\n{THOUGHTS[0]}\n\n{THOUGHTS[-1]}\n</think>\n\nSo 4."
    assert [row["messages"][1]["content"] for row in read(out)] == [kept, kept]
    listed = tmp_path / "listed.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[::3]), listed)
    assert program("train.condense", listed, out, "--tau", "0.2").code == 0
    assert [row["thoughts"] for row in read(out)] == [[THOUGHTS[0], THOUGHTS[-1]], ["One."]]


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


GOOD = '{"question": "?", "thoughts": ["a", "b", "c"], "answer": "4"}\n'


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "?", "answer": "4"}, "no <think> in 'answer'"),
        ({"question": "?", "answer": "<think>a"}, "1 <think> and 0 </think>"),
        ({"question": "?", "answer": "<think>It is 4.</think> "}, "inside the trace only"),
        ({"question": "?", "answer": "<think>\n\n</think>4"}, "no thought between"),
        ({"question": "?", "thoughts": [""], "answer": "4"}, "thought 1 of 'thoughts' is empty"),
        ({"question": "?", "thoughts": ["a"]}, "no 'answer'"),
        ("{", "is not JSON"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ("[1]", "is no JSON object"),
    ],
)
def test_a_bad_row_leaves_nothing(program, tmp_path, row, said):
    source, out = write(tmp_path / "in.jsonl", GOOD, row), tmp_path / "out" / "out.jsonl"
    out.parent.mkdir()
    out.write_text("as before")
    done = program("train.condense", source, out)
    assert done.code == 2 and done.err.count("\n") == 1
    assert f"error: {source}, line 2: " in done.err and said in done.err
    assert [p.name for p in out.parent.iterdir()] == ["out.jsonl"]
    assert out.read_text() == "as before"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["IN"], "two arguments are needed"),
        (["IN", "OUT", "--tau", "1.5"], "--tau is 1.5; it must be from 0 to 1"),
        (["IN", "OUT", "--tau", "-1"], "--tau is -1.0; it must be from 0 to 1"),
        (["IN", "OUT", "--policy", "edges"], "did you mean 'edge'"),
        (["IN", "OUT", "--polcy", "edge"], "did you mean --policy?"),
        (["IN", "OUT", "--head-share", "2"], "--head-share is 2.0"),
        (["IN", "OUT", "--mode", "word"], "--mode 'word' is unknown"),
        (["IN", "OUT", "--tokenizer", "NOWHERE"], "--tokenizer NOWHERE: no such file or folder"),
        (["NOWHERE", "OUT"], "NOWHERE: no such file"),
        (["IN", "IN"], "is the file that is read"),
        (["IN", "LINK"], "is the file that is read"),
        (["IN", "FOLDER"], "is a folder; give a file to write"),
        (["IN", "FOLDER/none/out.jsonl"], "none does not exist"),
        (["IN", "FOLDER/out.json"], "give a file *.jsonl"),
        (["FOLDER/a.txt", "OUT"], "give a file .jsonl or .parquet"),
        (["FOLDER/a.parquet", "FOLDER/out.parquet"], "cannot be read as parquet"),
        (["FOLDER/none.jsonl", "OUT"], "has no rows"),
    ],
)
def test_bad_arguments(program, tmp_path, argv, said):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.txt", "a.parquet", "none.jsonl"):
        (folder / name).write_text("" if name == "none.jsonl" else "no rows")
    source, link = write(tmp_path / "in.jsonl", GOOD), tmp_path / "link.jsonl"
    link.symlink_to(source)
    places = {"IN": source, "OUT": folder / "out.jsonl", "LINK": link, "FOLDER": folder}
    given = [str(places.get(a, a.replace("FOLDER", str(folder)))) for a in argv]
    before = sorted(p.name for p in folder.iterdir())
    done = program("train.condense", *given)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert said in done.err
    assert sorted(p.name for p in folder.iterdir()) == before and source.read_text() == GOOD


@pytest.mark.parametrize(
    ("content", "kept"),
    [("[]", True), ('{"rows": 3}', True), ("not JSON", True), (None, False)],
)
def test_a_report_replaces_none_but_a_report(program, tmp_path, content, kept):
    source, out = write(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl"
    report = tmp_path / "out.report.json"
    if content is None:
        assert program("train.condense", source, out, "--tau", "1").code == 0
        assert json.loads(report.read_text())["tau"] == 1
    else:
        report.write_text(content)
    done = program("train.condense", source, out, "--tau", "0.5")
    if kept:
        assert done.code == 2 and "out.report.json is no report of this program" in done.err
        assert report.read_text() == content and not out.exists()
    else:
        assert done.code == 0 and json.loads(report.read_text())["tau"] == 0.5


def test_parquet_text_that_is_not_utf_8(program, tmp_path):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    raw = pyarrow.array([b"4", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    columns = {"question": ["?", "?"], "thoughts": [["a", "b", "c"]] * 2, "answer": raw}
    parquet.write_table(pyarrow.table(columns), source)
    said = f"{source}: cannot be read as parquet (not UTF-8 text at byte 0)"
    with pytest.raises(UserError) as caught:
        read(source)
    assert str(caught.value).startswith(said)
    done = program("train.condense", source, out)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1
    assert not out.exists()


INTERRUPTED = """
import os, runpy, signal, sys
from jaxlib_unlearn import cot
real = cot.condense
def condense(row, *args, **options):
    if options["number"] == 400:
        os.kill(os.getpid(), signal.SIGINT)
    return real(row, *args, **options)
cot.condense = condense
runpy.run_module("train.condense", run_name="__main__", alter_sys=True)
"""


def test_ctrl_c_leaves_nothing(repo, tmp_path):
    source, folder = tmp_path / "in.jsonl", tmp_path / "out"
    folder.mkdir()
    source.write_text(GOOD * 600)
    argv = [sys.executable, "-c", INTERRUPTED, str(source), str(folder / "out.jsonl")]
    done = subprocess.run(argv, cwd=repo, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "stopped by Ctrl-C" in done.stderr and not list(folder.iterdir())
