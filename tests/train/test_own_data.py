"""The user's own rows: every kind of file, everything that can be wrong with one, a whole run."""

import csv
import json
import subprocess
import sys

import pytest

from jaxlib_unlearn.errors import UserError
from train.data.files import COLUMNS, check_table, load_own, read_table, write_examples
from train.options import cli
from train.options.config import RunConfig, replace
from train.presets import PRESETS
from train.tasks import load_task

ROWS = [{"question": f"question {i}?", "answer": f"answer {i}, and more."} for i in range(5)]
OTHERS = [{"question": f"other {i}?", "answer": f"other answer {i}."} for i in range(5)]
WHO = ["Ada Lane", "Bo Ray", "Ada Lane", "Cy Poe", "nobody"]
FULL = [
    row | {"paraphrased_answer": f"again {i}", "perturbed_answer": [f"no {i}", f"so {i}"]}
    for i, row in enumerate(ROWS)
]


def write(path, rows):
    """Rows in the format of the suffix."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" * (path.suffix == ".tsv") or ","
            )
            table.writeheader()
            for row in rows:
                lists = {k: json.dumps(v) for k, v in row.items() if isinstance(v, list)}
                table.writerow(row | lists)
    return path


def rows_of(path):
    rows, problems = check_table(read_table(path, "--data.forget"), "FILE")
    assert problems == []
    return rows


def fails(call, *parts):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    return message


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".CSV"])
def test_every_format_gives_the_same_rows(tmp_path, capfd, suffix):
    path = tmp_path / f"my facts [1]*?{suffix}"  # not a glob pattern, though it looks like one
    assert rows_of(write(path, ROWS)) == ROWS
    assert rows_of(write(path, FULL)) == FULL
    assert rows_of(write(path, ROWS[:1])) == ROWS[:1]
    assert capfd.readouterr() == ("", "")


def test_parquet_leaves_nothing_behind_and_asks_nobody(tmp_path, repo):
    path = write(tmp_path / "rows.parquet", FULL)
    code = (
        "import socket, sys\n"
        "def never(*a, **k): raise SystemExit('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = never\n"
        "from pathlib import Path\n"
        "from train.data.files import read_table\n"
        "sys.exit(len(read_table(Path(sys.argv[1]), 'x').rows) - 5)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        cwd=repo,
        env={"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


# Spreadsheets, text editors and colleagues write CSV in different ways.
@pytest.mark.parametrize(
    ("data", "answers"),
    [
        (b"question,answer\nq,a\n", ["a"]),
        (b"\xef\xbb\xbfquestion,answer\r\nq,a\r\n", ["a"]),  # a byte order mark, CRLF
        (b"question,answer\rq,a\r", ["a"]),  # an old Mac's
        (b"question,answer\nq,a", ["a"]),
        (b"question;answer\nq;a, b\n", ["a, b"]),  # Excel where the comma is a decimal
        (b"sep=;\r\nquestion;answer\r\nq;a\r\n", ["a"]),
        (b"sep=|\nquestion|answer\nq|a\n", ["a"]),
        (b"\n\nQuestion , ANSWER\nq,a\n", ["a"]),
        (b'question,answer\nq,"a, ""b"" c"\n', ['a, "b" c']),
        (b'question, answer\nq, "a, b"\n', ["a, b"]),
        (b'question,answer\nq,"two\r\nlines"\n', ["two\nlines"]),
        (b'question,answer\nq,5" and 6"\n', ['5" and 6"']),
        (b"id,answer,question,note\n7,a,q,\n", ["a"]),
        (b"question,answer\nq,a\n,\n\n , \n", ["a"]),  # empty rows below the last
        (b"question,answer\nq,a,\nq,b,,\n", ["a", "b"]),
        (b"question,answer\nq,NA\nq,null\nq,1990\nq,1.50\nq,2020-01-01\nq,TRUE\n",
         ["NA", "null", "1990", "1.50", "2020-01-01", "TRUE"]),  # no guessing of types
        ("question,answer\nq,Zürich 東京 🦀 a\u2028b\n".encode(), ["Zürich 東京 🦀 a\u2028b"]),
        (b"question,answer\nq," + b"x" * 200_000 + b"\n", ["x" * 200_000]),
    ],
)  # fmt: skip
def test_ways_to_write_csv(tmp_path, data, answers):
    path = tmp_path / "rows.csv"
    path.write_bytes(data)
    rows = rows_of(path)
    assert [row["answer"] for row in rows] == answers
    assert all(row["question"] == "q" and list(row) == ["question", "answer"] for row in rows)


def test_json_keeps_text_as_it_is(tmp_path):
    # Readers that guess types turn the first into a date and the second into a number.
    texts = ["1990-01-01 00:00:00", "007", "a\u2028b", " x ", "é"]
    rows = [{"Question": "q", "answer": text} for text in texts]
    assert [row["answer"] for row in rows_of(write(tmp_path / "x.jsonl", rows))] == texts


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]
SHARE = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("row", "form", "question", "answer"),
    [
        ({"messages": TURNS[1:3]}, "messages", "Who?", "Me."),
        ({"conversations": SHARE}, "conversations", "q", "a"),
        ({"prompt": "q", "completion": "a"}, "prompt, completion", "q", "a"),
        ({"prompt": TURNS[1:2], "completion": TURNS[2:3]}, "prompt, completion", "Who?", "Me."),
        ({"Prompt ": "q", "Response": "a"}, "prompt, response", "q", "a"),
        ({"instruction": "q", "output": "a"}, "instruction, output", "q", "a"),
        ({"instruction": "q", "input": "i", "output": "a"}, "instruction, output, input",
         "q\n\ni", "a"),
        ({"instruction": "q", "input": "", "output": 3}, "instruction, output, input", "q", "3"),
        ({"question": "q", "answer": True, "messages": []}, "", "q", "true"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_forms(tmp_path, row, form, question, answer, suffix):
    own = load_own(write(tmp_path / f"f{suffix}", [row]), write(tmp_path / "r.csv", OTHERS))
    assert own.forget == [{"question": question, "answer": answer}]
    assert (f"f{suffix}: read as {form}" in own.notes) == bool(form)


def test_columns_of_other_names(tmp_path):
    path = write(tmp_path / "f.csv", [{"q": "one?", "a": "yes", "question": "id 1"}])
    other = write(tmp_path / "r.csv", [{"q": "two?", "a": "no"}])
    task = task_of(
        "--data.forget", path, "--data.retain", other, "--data.columns", "question=q, answer=a"
    )
    assert (task.forget, task.retain) == (
        [{"question": "one?", "answer": "yes"}], [{"question": "two?", "answer": "no"}]
    )  # fmt: skip
    files = ["--data.forget", path, "--data.retain", other, "--data.columns"]
    fails(lambda: task_of(*files, "question=x"), "no column 'x'", "it has q, a")
    for wrong in ("question", "questoin=q", "question="):
        fails(lambda wrong=wrong: task_of(*files, wrong), "NAME=COLUMN", "question, answer")


def test_an_empty_parquet_file(tmp_path):
    from pyarrow import parquet

    path = write(tmp_path / "x.parquet", FULL)
    parquet.write_table(parquet.read_table(path).slice(0, 0), path)
    problems = check_table(read_table(path, "--data.forget"), "FILE")[1]
    assert problems == ["FILE: no rows; a question and an answer are the least"]


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("x.csv", b"", ["no column 'question' and no 'answer' (columns found: none)"]),
        ("x.csv", b"question,answer\n", ["no rows"]),
        ("x.json", b"[]", ["no column 'question' and no 'answer'"]),
        ("x.csv", b"prompt,reply\nq,a\n", ["columns found: prompt, reply", "--data.columns"]),
        ("x.csv", b"question\nq\n", ["no column 'answer' (columns found: question)"]),
        ("x.csv", b"What is it?," + b"y" * 90, ["columns found: What is it?, yyyy", "y…)"]),
        ("x.csv", b"question,answer,Answer\nq,a,b\n", ["'answer' and 'Answer' are one and the"]),
        ("x.csv", b"question,answer,answer\nq,a,b\n", ["'answer' and 'answer' are one and the"]),
        ("x.csv", b"question,answer\nq,a\nq,\n ,a\n", ["row 3: 'question'", "row 2: 'answer'"]),
        ("x.csv", b"question,answer\n" + b"q,\n" * 9, ["rows 1, 2, 3 and 6 more: 'answer' is"]),
        ("x.csv", b"question,answer\nq,Paris, France\n", ["line 2: 3 cells under 2", "quotes"]),
        ("x.csv", b'question,answer\nq,a\nq,"a\nq,a\n', ["after line 2: broken CSV"]),
        ("x.csv", b'question,answer\nq,"a"b\n', ["broken CSV"]),
        ("x.json", b'[{"text": "a"}]', ["texts need --data.source documents"]),
        ("x.json", b'[{"messages": "a"}]', ["row 1: 'messages' is no list of turns"]),
        ("x.json", b'[{"messages": [{"role": "user", "content": "q"}]}]', ["alternately"]),
        ("x.json", b'[{"messages": [{"role": "user", "content": 3}]}]', ["content is no text"]),
        ("x.csv", "question,answer\nq,Zürich\n".encode("cp1252"), ["UTF-8", "in Excel"]),
        ("x.csv", "question,answer\nq,a\n".encode("utf-16"), ["UTF-8 text at byte 0"]),
        ("x.csv", b"question,answer,paraphrased answer\nq,a,b\nq,a,\n", ["row 2: 'paraphrased"]),
        ("x.csv", b'question,answer,perturbed_answer\nq,a,"[""b"", 3]"\n', ["list of texts"]),
        ("x.json", b'[{"question": "q", "answer": 0.5}]', ["'answer' must be text, found float"]),
        ("x.json", b'[{"question": "q"}, {"question": "q", "answer": "a"}]', ["row 1: 'answer'"]),
        ("x.jsonl", b'{"question": "q"', ["line 1: broken JSON"]),
        ("x.parquet", b"PAR1 and nothing", ["cannot be read as parquet"]),
        ("x.xlsx", b"PK", [".xlsx cannot be read", ".csv, .tsv, .parquet", "'CSV UTF-8'"]),
        ("rows", b"", ["a file without a suffix"]),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, capfd, name, data, parts):
    path = tmp_path / name
    path.write_bytes(data)
    fails(lambda: load_own(path, write(tmp_path / "ok.csv", OTHERS)), path, *parts)
    assert capfd.readouterr() == ("", "")


def test_all_that_is_missing_is_one_message(tmp_path):
    fails(
        lambda: load_own(tmp_path / "no.csv", None), "no.csv does not exist", "--data.retain FILE"
    )
    fails(lambda: load_own(None, tmp_path), "--data.forget FILE is missing", "is a folder")
    bad = tmp_path / "bad.csv"
    bad.write_text("Question,perturbed_answer,paraphrased_answer\nq,w,\n,w,p\n")
    message = fails(lambda: load_own(bad, tmp_path / "no.jsonl"))
    assert message == (
        f"your own data: {bad}: no column 'answer' (columns found: Question, perturbed_answer, "
        f"paraphrased_answer); {bad}, row 2: 'question' is empty; {bad}, row 1: "
        "'paraphrased_answer' is empty; fill it everywhere, or remove the column; --data.retain: "
        f"file {tmp_path / 'no.jsonl'} does not exist"
    )


def test_one_note_says_what_is_left_out(tmp_path):
    plain, full = write(tmp_path / "a.csv", ROWS), write(tmp_path / "b.jsonl", FULL)
    keep = write(tmp_path / "c.csv", [row | {"id": 1, "topic": ""} for row in OTHERS])
    own = load_own(plain, keep)
    notes = [note for note in own.notes if note.startswith("not measured")]
    assert len(notes) == 1 and own.retain == OTHERS
    for part in ("forget quality", "truth ratio", "paraphrased_answer", "membership", "utility"):
        assert part in notes[0]
    assert f"{keep.name}: columns that are not read: id, topic" in own.notes
    note = load_own(full, keep).notes[-1]
    assert "forget quality" not in note and "the retain truth ratio" in note
    # Columns without a single text do not count.
    empty = write(tmp_path / "d.csv", [row | {"perturbed_answer": "[]"} for row in ROWS])
    assert load_own(empty, keep).forget == ROWS


def task_of(*options):
    preset = PRESETS["quickstart"].PRESET
    return load_task(cli.parse(RunConfig, preset, list(map(str, options)), "tests", ""))


def test_the_same_rows_on_both_sides(tmp_path, capsys):
    forget = write(tmp_path / "f.csv", ROWS)
    both = write(tmp_path / "b.jsonl", [*OTHERS, *ROWS])
    fails(lambda: load_own(forget, both), "every row of --data.forget", "also in", both)
    some = write(tmp_path / "s.jsonl", [*OTHERS, *ROWS[:2]])
    task = task_of("--data.forget", forget, "--data.retain", some)
    told = "2 forget rows are also retain rows; they pull both ways"
    assert f"warning: {told}" in capsys.readouterr().err and task.notes[-1] == told
    loud = [{name: f" {text.upper()}" for name, text in row.items()} for row in ROWS[:3]]
    some = write(tmp_path / "l.jsonl", [*OTHERS, *loud])
    twice = write(tmp_path / "t.jsonl", [*ROWS, *loud[:2]])
    task = task_of("--data.forget", twice, "--data.retain", some)
    assert "warning: 2 forget rows are also retain rows" in capsys.readouterr().err
    assert task.notes[-2:] == [
        "3 forget rows differ from retain rows in case or spaces",
        "2 forget rows repeat another one; they count twice",
    ]


def test_what_a_task_is_made_of(tmp_path):
    files = ["--data.forget", write(tmp_path / "f.csv", ROWS)]
    files += ["--data.retain", write(tmp_path / "r.csv", OTHERS)]
    task = task_of(*files, "--data.retain-rows", 2)
    assert (task.forget, task.retain) == (ROWS, OTHERS)
    assert task.evaluation == {"forget": ROWS, "retain": OTHERS[:2]} and task.refusals
    assert "retain: judged on the first 2 rows (--data.retain-rows)" in task.notes
    fails(lambda: task_of(*files, "--data.path", tmp_path), "--data.path does not go with")
    # The contents count, not the location: caches are found again.
    (tmp_path / "there").mkdir()
    moved = ["--data.forget", write(tmp_path / "there" / "f.csv", ROWS), *files[2:]]
    assert task_of(*moved, "--data.retain-rows", 2).digest() == task.digest()
    unseen = [row | {"question": f"unseen {row['question']}"} for row in ROWS]
    held = [*files, "--data.holdout", write(tmp_path / "h.csv", unseen), "--data.holdout-rows", 3]
    assert task_of(*held).evaluation["holdout"] == unseen[:3]
    fails(lambda: task_of(*files, "--data.holdout", files[1]), "5 row(s) of --data.holdout")
    named = [
        row | {"question": f"Where was {who} born?"} for row, who in zip(ROWS, WHO, strict=True)
    ]
    files[1] = write(tmp_path / "n.csv", named)
    task = task_of(*files)
    assert len(task.evaluation["exchanged"]) == 4 and "control: 4 rows" in " ".join(task.notes)
    config = replace(PRESETS["quickstart"].PRESET, **{"data.forget": (tmp_path / "f.csv",)})
    fails(lambda: load_task(config), "--data.retain FILE is missing")


def test_examples(program, tmp_path):
    folder = tmp_path / "my data"
    done = program("train.unlearn", "--example-data", folder)
    assert done.code == 0 and done.err == ""
    *paths, command, other = done.out.splitlines()
    assert [p.rpartition("/")[2] for p in paths] == [
        *(f"{side}.{kind}" for side in ("forget", "retain") for kind in ("csv", "jsonl", "txt")),
        *("holdout.csv", "holdout.jsonl"),
    ]
    assert other == command.replace("quickstart", "quickstart-documents").replace(".csv", ".txt")
    assert command == (
        f"python -m train.unlearn quickstart --data.forget '{folder}/forget.csv' --data.retain "
        f"'{folder}/retain.csv'"
    )
    sides = ("forget", "retain", "holdout")
    plain = load_own(*(folder / f"{side}.csv" for side in sides))
    full = load_own(*(folder / f"{side}.jsonl" for side in sides))
    assert len(plain.forget) == len(plain.retain) == len(plain.holdout) == 5
    assert all(list(row) == list(COLUMNS) for row in full.forget)
    assert all(list(row) == list(COLUMNS[:-1]) for row in full.retain)
    for mine, whole in ((plain.forget, full.forget), (plain.retain, full.retain)):
        assert mine == [{k: row[k] for k in ("question", "answer")} for row in whole]
    # Writing them again is fine; a user's own file is not overwritten.
    assert program("train.unlearn", f"--example-data={folder}").code == 0
    (folder / "retain.csv").write_text("mine")
    done = program("train.unlearn", "--example-data", folder)
    assert done.code == 2 and "retain.csv exists" in done.err and done.err.count("\n") == 1
    assert (folder / "retain.csv").read_text() == "mine"
    for argv in (["--example-data"], ["--example-data", "a", "b"]):
        done = program("train.unlearn", *argv)
        assert done.code == 2 and "takes one folder" in done.err
    (tmp_path / "file").touch()
    fails(lambda: write_examples(tmp_path / "file" / "x"), "cannot be written")


def test_the_walk_of_the_readme(program, small, tmp_path):
    """Five rows to forget and five to keep, question and answer alone, through a whole run."""
    program("train.unlearn", "--example-data", tmp_path / "mine")
    files = ["--data.forget", tmp_path / "mine" / "forget.csv"]
    files += ["--data.retain", tmp_path / "mine" / "retain.csv"]
    steps = "--finetune.steps 3 --unlearn.steps 2 --unlearn.curve-points 0".split()
    steps += ["--evaluate.leak-samples", "0"]
    root = tmp_path / "run"
    done = program("train.unlearn", "quickstart", *small, *files, *steps, "--output", root)
    assert done.code == 0, done.err
    assert done.err.count("not measured: forget quality") == 1
    summary = json.loads((root / "summary.json").read_text())
    for scores in summary.values():
        assert {"forget_rouge", "forget_probability", "retain_rouge"} <= set(scores)
        assert not {"forget_truth_ratio", "forget_quality", "privleak"} & set(scores)
    page = (root / "report.html").read_text()
    assert "not measured: forget quality" in page and "your own: " in page
    assert "paraphrased and wrong answers" in page  # where the verdict on forget quality would be
