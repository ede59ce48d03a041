"""Plain texts: chunks, what is refused, and a run from files to the report."""

import json
from types import SimpleNamespace

import pytest

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from train import tasks
from train.data.authors import pages
from train.data.bpe import train_bpe
from train.data.examples import encode_text
from train.evaluators import verbatim
from train.evaluators.base import Results
from train.options.config import RunConfig, replace
from train.presets import PRESETS
from train.tasks import documents

TEXT = "In Lima a baker wrote of rivers and of long winters. " * 8


@pytest.fixture(scope="module")
def words():
    return train_bpe([text for texts in pages(0, 10, 2).values() for text in texts], 512)


@pytest.mark.parametrize(
    "text", [pages(1, 10, 0)["forget"][0], TEXT, "ab" * 300, "東京の川は長い。🦀" * 30]
)
@pytest.mark.parametrize("size", [16, 40, 10_000])
def test_chunks_are_the_text_in_pieces_that_fit(words, text, size):
    found = documents.chunks(words, {"text": text, "document": "a.txt"}, size)
    assert "".join("".join(c["text"].split()) for c in found) == "".join(text.split())
    for chunk in found:
        assert len(encode_text(words, chunk["text"], 10**6).tokens) <= size
        assert chunk["prompt"] and chunk["continuation"].strip()
        assert chunk["prompt"] + chunk["continuation"] == chunk["text"]
    if " " in text and size >= 40:  # cut between words, unless one fills half a chunk
        known = set(text.split())
        halves = [c[part] for c in found for part in ("prompt", "continuation")]
        assert all(word in known for half in halves for word in half.split())


def config_of(**data):
    preset = PRESETS["quickstart-documents"].PRESET
    return replace(preset, **{f"data.{name}": value for name, value in data.items()})


def test_what_a_task_is_made_of(words, tmp_path):
    folder = tmp_path / "keep" / "below"
    folder.mkdir(parents=True)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.MD").write_text("# A title\n" + TEXT)
    (folder / "c.jsonl").write_text(json.dumps({"text": TEXT + "c", "id": 3}) + "\n")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    config = config_of(
        forget=(tmp_path / "a.txt", tmp_path / "b.MD"), retain=(tmp_path / "keep",), max_length=64
    )
    task = tasks.load_task(config)
    assert [row["document"] for row in task.forget + task.retain] == [
        "a.txt", "b.MD", "c.jsonl, row 1",
    ]  # fmt: skip
    assert any("not measured: membership" in note for note in task.notes)
    shape = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=48))
    fitted = documents.fit(task, SimpleNamespace(tokenizer=words, decoder=shape), config)
    assert fitted.evaluation == {"forget": fitted.forget, "retain": fitted.retain}
    assert any(note.startswith("chunks of at most 48 tokens") for note in fitted.notes)
    nll, _ = objectives.resolve("graddiff")
    assert fitted.rows_of(nll, 0) == {"forget": fitted.forget, "retain": fitted.retain}
    with pytest.raises(UserError, match="trained on 'idk', which the data do not have"):
        fitted.rows_of(objectives.resolve("idk")[0], 0)


def test_generated_pages_by_the_seed():
    task, again = (tasks.load_task(config_of(seed=3)) for _ in range(2))
    counts = {split: len(rows) for split, rows in task.evaluation.items()}
    assert counts == {"forget": 4, "retain": 36, "holdout": 20}
    assert task == again != tasks.load_task(config_of(seed=4))


def test_files_of_answers_still_select_their_own_benchmark(tmp_path):
    one = (tmp_path / "rows.csv",)
    for source, name in (("authors", "files"), ("tofu", "files"), ("documents", "documents")):
        found = tasks.find({"source": source, "forget": one})
        assert found is not None and found.name == name
    with pytest.raises(UserError, match="for texts say --data.source documents"):
        tasks.load_task(RunConfig(data=config_of(source="authors", forget=one * 2).data))


OK = ("ok.txt", TEXT.encode())


@pytest.mark.parametrize(
    ("forget", "retain", "parts"),
    [
        (("x.txt", b""), OK, ["x.txt: is empty"]),
        (("x.md", b" \n"), OK, ["x.md: is empty"]),
        (("x.txt", b"\x89PNG\r\n\x1a\n\0"), OK, ["x.txt", "not UTF-8 text at byte 0"]),
        (("x.txt", b"a\0b"), OK, ["x.txt: a binary file; save it as UTF-8 text"]),
        (("x.txt", b"Too short."), OK, ["x.txt: ", "tokens, and a chunk has 16 or more"]),
        (OK, OK, ["every document of --data.forget is also in --data.retain"]),
        (("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n'), OK, ["x.jsonl, row 2: no column 'text'"]),
        (("x.jsonl", b'{"text": 3}\n'), OK, ["x.jsonl, row 1: no column 'text' with a text"]),
        (("x.jsonl", b"[]\n"), OK, ["x.jsonl"]),
        (("x.pdf", b"%PDF"), OK, ["x.pdf: no text; give .txt, .md, .jsonl"]),
        (("folder/x.pdf", b"%PDF"), OK, ["folder: no text in this folder"]),
        (("no.txt", None), OK, ["--data.forget: file", "no.txt does not exist"]),
        (OK, None, ["--data.retain FILE is missing"]),
    ],
)
def test_what_is_refused(program, small, tmp_path, monkeypatch, forget, retain, parts):
    def reached(*args, **options):
        raise AssertionError("compute began")

    monkeypatch.setattr("train.engine.loop.run", reached)
    argv = ["quickstart-documents", *small, "--output", tmp_path / "run"]
    for side, given in (("forget", forget), ("retain", retain)):
        if given is None:
            continue
        path = tmp_path / side / given[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        if given[1] is not None:
            path.write_bytes(given[1])
        argv += [f"--data.{side}", path.parent if "/" in given[0] else path]
    done = program("train.unlearn", *argv)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith("error: ") and not (tmp_path / "run").exists()
    for part in parts:
        assert part in done.err


def test_from_files_to_the_report(program, small, tmp_path):
    """The walk of the README with texts, at the size of the other small runs."""
    program("train.unlearn", "--example-data", tmp_path / "mine")
    argv = ["quickstart-documents", "--smoke", *small, "--data.max-length", "48"]
    argv += ["--finetune.steps", "3", "--unlearn.steps", "2", "--data.retain-rows", "6"]
    for side in ("forget", "retain"):
        argv += [f"--data.{side}", tmp_path / "mine" / f"{side}.txt"]
    root = tmp_path / "run"
    done = program("train.unlearn", *argv, "--output", root)
    assert done.code == 0, done.err
    summary = json.loads((root / "summary.json").read_text())
    assert list(summary) == ["original", "oracle", "unlearned"]
    for scores in summary.values():
        assert {"forget_verbatim", "retain_verbatim", "extraction_strength"} <= set(scores)
        assert all(0 <= scores[f"{side}_verbatim"] <= 1 for side in ("forget", "retain"))
        assert "forget_rouge" not in scores and "privleak" not in scores
    log = json.loads((root / "evals" / "original.json").read_text())
    for item in log["forget_verbatim"]["value_by_index"].values():
        assert item["input"] and item["ground_truth"]
    assert len(log["retain_verbatim"]["value_by_index"]) == 6
    page = (root / "report.html").read_text()
    assert "Documents to forget" in page and "Verbatim recall" in page
    assert (root / "verbatim.png").exists()


@pytest.mark.parametrize(
    ("start", "reference", "judged", "kept", "states"),
    [
        (0.98, 0.3, 0.35, 0.97, ("good", "good")),
        (0.98, 0.3, 0.15, 0.97, ("mixed", "good")),
        (0.98, 0.3, 0.5, 0.9, ("mixed", "mixed")),
        (0.98, 0.3, 0.3, 0.8, ("good", "bad")),
        (0.98, 0.3, 0.8, 0.97, ("bad", "good")),
        (0.4, 0.3, 0.3, 0.97, ("mixed", "good")),
        (0.98, None, 0.3, None, ("unknown", "unknown")),
    ],
)
def test_verdicts(start, reference, judged, kept, states):
    values = {"original": (start, 0.99), "oracle": (reference, 0.99), "unlearned": (judged, kept)}
    summary = {
        name: {"forget_verbatim": forget, "retain_verbatim": retain}
        for name, (forget, retain) in values.items()
    }
    results = Results(summary)
    assert (verbatim.forgot(results).state, verbatim.kept(results).state) == states
