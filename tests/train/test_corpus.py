"""Corpora: which documents there are, their tokens on the disk, and the rows made of them."""

import collections
import json
import shutil
import sys

import jax
import numpy as np
import pytest

from jaxlib_unlearn.errors import UserError
from models import Decoder, DecoderConfig
from train.data import corpus, token_file
from train.data.bpe import train_bpe
from train.data.corpus import CorpusConfig, Counts, documents, identify, is_validation
from train.data.stream import Packable, Stream
from train.data.streams import batches_of
from train.data.token_file import Tokens, sha_of, tokenised
from train.data.token_rows import TokenRows
from train.evaluators.token_loss import row_sums
from train.runtime.stages import locked


def texts_of(**given):
    counts = Counts()
    found = [document.text for document in documents(CorpusConfig(**given), counts)]
    return found, counts


@pytest.fixture
def folder(tmp_path):
    """A folder of texts of every kind, with what must be left out."""
    root = tmp_path / "texts"
    (root / "b").mkdir(parents=True)
    (root / "b" / "one.txt").write_text("of the folder b")
    (root / "a.jsonl").write_bytes(
        b'{"text": "first", "id": 1}\n\n{"text": " "}\n{"text": "\xff"}\n{"text": "\\ud800"}\n'
        b'{"text": "second"}\n'
    )
    (root / "z.txt").write_bytes(b"\xfe\xff")
    (root / "empty.TXT").write_text("")
    (root / "notes.md").write_text("not read")
    return root


def test_texts_come_in_the_order_of_their_paths(folder):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": ["rows", None, "of parquet"], "other": [1, 2, 3]})
    parquet.write_table(table, folder / "c.parquet")
    found, counts = texts_of(source="text", path=folder)
    assert found == ["first", "second", "of the folder b", "rows", "of parquet"]
    assert (counts.empty, counts.not_utf8, counts.documents) == (3, 3, 5)
    assert counts.words() == "5 documents, 0.0 MB; left out: 3 empty, 3 not UTF-8"
    assert texts_of(source="text", path=folder, documents=3)[0] == found[:3]
    assert texts_of(source="text", path=folder / "a.jsonl")[0] == ["first", "second"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that must not be imported."""
    root = tmp_path / "site" / "unimported"
    (root / "tests").mkdir(parents=True)
    (root / "inner").mkdir()
    for name, text in {
        "__init__.py": "raise RuntimeError('imported')",
        "inner/code.py": "x = 1  # <eos>\n",
        "inner/copy.py": "x = 1  # <eos>\n",
        "inner/test_code.py": "of a test",
        "tests/helper.py": "of a test too",
        "conftest.py": "of a test as well",
        "a.py": "y = 2\n",
    }.items():
        (root / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(root.parent), *sys.path])
    return "unimported"


def test_packages_are_read_and_never_imported(package):
    found, counts = texts_of(packages=(package,))
    assert found == ["raise RuntimeError('imported')", "y = 2\n", "x = 1  # <eos>\n"]
    assert counts.duplicates == 1 and package not in sys.modules


def test_the_default_packages_are_installed():
    found, counts = texts_of(documents=3)
    assert len(found) == 3 and counts.num_bytes > 100


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": "text"}, "needs --data.path"),
        ({"source": "text", "path": "no"}, "no does not exist"),
        ({"source": "text", "path": "notes.md"}, "cannot be read; give .txt, .jsonl, .parquet"),
        ({"source": "text", "path": "none"}, "no .txt, .jsonl, .parquet file in it"),
        ({"source": "text", "path": "bad.jsonl"}, "bad.jsonl, line 2: is not JSON"),
        ({"source": "text", "path": "other.jsonl"}, 'line 1: has no "text", a string'),
        ({"source": "text", "path": "bad.parquet"}, "cannot be read as parquet"),
        ({"packages": ("nothere_",)}, "nothere_: no such package is installed"),
        ({"packages": ("os.path",)}, "os.path: no such package"),
        ({"packages": ()}, "--data.packages is empty"),
        ({"path": "x.txt"}, "--data.path is of --data.source text, and the source is packages"),
        ({"source": "text", "path": "x.txt", "packages": ("a",)}, "--data.packages is of"),
        (
            {"repository": "a/b"},
            "--data.repository is of --data.source hub, and the source is pack",
        ),
        ({"source": "text", "path": "x.txt", "revision": "v1"}, "--data.revision is of"),
        (
            {"source": "text", "path": "long.txt"},
            "long.txt: is one document of more than 0 MiB; wri",
        ),
        ({"source": "text", "path": "long.jsonl"}, "long.jsonl, line 2: is one document of more"),
        ({"source": "text", "path": "x.txt"}, "no validation document .1 documents"),
        ({"source": "text", "path": "x.txt", "validation": 0.999999}, "no training document"),
        ({"source": "text", "path": "many", "digest": "f" * 64}, "not --data.digest ffff"),
    ],
)
def test_bad_corpora(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "many").mkdir()
    for i in range(400):
        (tmp_path / "many" / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "x.txt").write_text("alone")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "other.jsonl").write_text('{"words": "a"}\n')
    monkeypatch.setattr(corpus, "LONGEST", 1000)
    (tmp_path / "long.txt").write_text("x" * 1001)
    (tmp_path / "long.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "x" * 990}) + "\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    config = CorpusConfig(**given)
    if config.path is not None:
        config = CorpusConfig(**given | {"path": tmp_path.__class__(given["path"])})
    with pytest.raises(UserError, match=message) as raised:
        identify(config)
    assert "\n" not in str(raised.value)


def test_one_document_in_a_hundred_is_held_out():
    import hashlib

    shas = [hashlib.sha256(str(i).encode()).digest() for i in range(40_000)]
    held = sum(is_validation(sha, 0.01) for sha in shas)
    assert abs(held - 400) < 4 * (400 * 0.99) ** 0.5
    assert not is_validation(b"\xff" * 32, 0.999) and is_validation(b"\x00" * 32, 1e-9)


def test_the_digest_is_that_of_the_documents_in_their_order(tmp_path):
    def digest(*lines):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        given = CorpusConfig(source="text", path=path, validation=0.5)
        return identify(given).config.digest

    letters = "abcdefgh"
    assert digest(*letters) == digest(*letters, " ") != digest(*reversed(letters))
    assert digest(*letters) != digest(*letters[:-1])


# Tokens on the disk.

WORDS = [f"number {i} is {i * i} and nothing else <eos> {chr(97 + i % 26) * 3}" for i in range(60)]


@pytest.fixture
def known(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    return identify(CorpusConfig(source="text", path=path, validation=0.2))


def split(part, tokenizer):
    """The documents of a part, decoded."""
    ends = [*part.starts[1:].tolist(), len(part.tokens)]
    rows = [part.tokens[a:b].tolist() for a, b in zip(part.starts, ends, strict=True)]
    assert all(row[-1] == tokenizer.eos_id and tokenizer.eos_id not in row[:-1] for row in rows)
    return [tokenizer.decode(row[:-1]) for row in rows]


def test_tokens_give_the_documents_back(known, tmp_path):
    found = tokenised(known, 300, tmp_path / "cache", None, None)
    train, held = (split(part, found.tokenizer) for part in (found.train, found.validation))
    kept = {text for text in WORDS if text in train}
    assert sorted(train + held) == sorted(WORDS) and train == [w for w in WORDS if w in kept]
    held_out = [d.text for d in documents(known.config) if is_validation(d.sha, 0.2)]
    assert held == held_out and 3 < len(held) < 25
    assert found.train.tokens.dtype == np.uint16 and not found.train.tokens.flags.writeable
    # The tokenizer knows the training documents alone.
    again = train_bpe(train, 300)
    assert again.backend.to_str() == found.tokenizer.backend.to_str()


def test_tokens_are_found_and_verified(known, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    first = tokenised(known, 300, cache, None, None)
    (folder,) = (p for p in cache.iterdir() if p.is_dir())
    written = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert {p.name for p in cache.iterdir()} == {folder.name, f"{folder.name}.lock"}

    def never(*args):
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(token_file, "write", never)
        assert tokenised(known, 300, cache, None, None).train.sha == first.train.sha
    for name in written:
        data = bytearray(written[name])
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        assert tokenised(known, 300, cache, None, None).train.sha == first.train.sha
        assert f"{folder} is damaged" in capsys.readouterr().err
        assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == written
    (folder / "validation.starts").unlink()
    tokenised(known, 300, cache, None, None)
    # Another vocabulary, share or tokenizer is another folder.
    tokenised(known, 290, cache, None, None)
    tokenised(known, 300, cache, first.tokenizer, None)
    assert sum(p.is_dir() for p in cache.iterdir()) == 3


def test_a_killed_write_leaves_nothing_that_is_read(known, tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(token_file, "_write_parts", killed)
        tokenised(known, 300, cache, None, None)
    assert not [p for p in cache.iterdir() if p.is_dir()]
    left, held = cache / "0123.7-ab.part", cache / "4567.7-ab.part"
    left.mkdir()
    with locked(cache / "4567", "tokens"):
        held.mkdir()  # of a run that writes it
        assert len(tokenised(known, 300, cache, None, None).train.tokens) > 100
        assert held.exists() and not left.exists()


def test_files_that_change_while_they_are_read(known, tmp_path):
    cache = tmp_path / "cache"
    with known.config.path.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(UserError, match="changed while it was read .sha256 .*; run again"):
        tokenised(known, 300, cache, None, None)
    assert not [p for p in cache.iterdir() if p.is_dir()]


def test_tokens_of_something_else_are_not_taken(known, tmp_path, capsys):
    cache = tmp_path / "cache"
    first = tokenised(known, 300, cache, None, None)
    (folder,) = (p for p in cache.iterdir() if p.is_dir())
    other = tokenised(known, 280, cache, None, None)
    (wrong,) = (p for p in cache.iterdir() if p.is_dir() and p != folder)
    assert other.train.sha != first.train.sha
    shutil.rmtree(folder)
    wrong.rename(folder)
    assert tokenised(known, 300, cache, None, None).train.sha == first.train.sha
    assert "is damaged (it was made from something else)" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["missing", "damaged"])
def test_another_host_makes_its_own(known, tmp_path, monkeypatch, state):
    """A process that is not the first, whose cache the first one does not see."""
    cache = tmp_path / "cache"
    if state == "damaged":
        tokenised(known, 300, cache, None, None)
        (path,) = cache.glob("*/train.tokens")
        path.write_bytes(path.read_bytes()[:-2])
    monkeypatch.setattr(token_file.distributed, "of_first", lambda work: False)
    monkeypatch.setattr(token_file.distributed, "is_first", lambda: False)
    assert len(tokenised(known, 300, cache, None, None).train.tokens) > 100
    assert not list(cache.glob("*.part")) and list(cache.glob("*.lock"))


def test_a_stream_ends_at_the_tokens_that_are_needed(known, tmp_path):
    streamed = known._replace(counts=None)
    found = tokenised(streamed, 300, tmp_path / "cache", None, 200)
    assert 200 <= len(found.train.tokens) < 300
    used = len(found.train.starts) + len(found.validation.starts)
    assert found.words.startswith(f"{used} documents") and used < len(WORDS)
    whole = tokenised(known, 300, tmp_path / "cache", None, None)
    assert whole.train.tokens[: len(found.train.tokens)].tolist() == found.train.tokens.tolist()


def test_a_stream_goes_on_to_the_first_document_that_is_held_out(known, tmp_path):
    rows = sorted(documents(known.config), key=lambda d: is_validation(d.sha, 0.2))
    path = tmp_path / "sorted.jsonl"
    path.write_text("".join(json.dumps({"text": row.text}) + "\n" for row in rows))
    streamed = identify(CorpusConfig(source="text", path=path, validation=0.2))
    found = tokenised(streamed._replace(counts=None), 300, tmp_path / "cache", None, 1)
    assert len(found.train.starts) == len(found.validation.starts) == 1
    assert found.words.startswith("2 documents")


# Rows.


def tokens_of(lengths, vocab=50, seed=0):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, vocab, sum(lengths)).astype(np.uint16)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype("<i8")
    return Tokens(tokens, starts, sha_of(tokens, starts))


PART = tokens_of([3, 9, 1, 20, 2, 2, 7, 31, 1, 1, 5])


@pytest.mark.parametrize("context", [4, 8, 82, 100])
def test_rows_against_a_loop(context):
    """Token by token: where it is, to which document it belongs, and what it predicts."""
    rows = TokenRows(PART, context)
    owner = np.searchsorted(PART.starts, np.arange(len(PART.tokens)), "right")
    batch = rows.batch(np.arange(len(rows)), (), 0)
    predicted = collections.Counter()
    for row in range(len(rows)):
        for slot in range(context):
            at = row * context + slot
            if at >= len(PART.tokens):
                assert batch["segment_ids"][row, slot] == batch["target_mask"][row, slot] == 0
                continue
            assert batch["tokens"][row, slot] == PART.tokens[at]
            first = max(PART.starts[owner[at] - 1], row * context)
            assert batch["positions"][row, slot] == at - first
            before = at - row * context and at > row * context
            if before:
                step = batch["segment_ids"][row, slot] - batch["segment_ids"][row, slot - 1]
                assert step == owner[at] - owner[at - 1]
            goes_on = at + 1 < len(owner) and owner[at + 1] == owner[at]
            assert batch["target_mask"][row, slot] == goes_on
            if goes_on:
                assert batch["targets"][row, slot] == PART.tokens[at + 1]
                predicted[at + 1] += 1
    firsts = set(PART.starts.tolist())
    assert predicted == {at: 1 for at in range(len(PART.tokens)) if at not in firsts}


def test_they_are_a_stream():
    rows = TokenRows(PART, 8)
    assert isinstance(rows, Stream) and not isinstance(rows, Packable)
    assert len(rows) == 11 and rows.shape(np.arange(2)) == ()
    assert rows.identity() == TokenRows(PART, 8).identity() != TokenRows(PART, 9).identity()
    assert rows.identity() != TokenRows(PART._replace(sha="other"), 8).identity()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_an_epoch_has_every_row_once_on_any_number_of_processes(parts):
    rows = TokenRows(tokens_of([10] * 32), 8)  # 40 rows
    mine = [np.arange(8).reshape(parts, -1)[i] for i in range(parts)]
    streams = {"train": rows}
    loads = [batches_of(streams, "train", 3, 8, here) for here in mine]
    seen = []
    for step in (4, 0, 2, 1, 3):  # any step by itself, as after a restart
        taken = [load(step)["train"] for load in loads]
        whole = batches_of(streams, "train", 3, 8)(step)["train"]
        for name, column in whole.items():
            assert np.array_equal(np.concatenate([t[name] for t in taken]), column)
        seen += whole["tokens"].tolist()
    every = rows.batch(np.arange(40), (), 0)["tokens"].tolist()
    assert sorted(seen) == sorted(every)


def test_the_loss_of_every_document_in_a_row_is_its_loss_alone():
    lengths = [5, 1, 12, 30, 9, 7]
    part = tokens_of(lengths)
    decoder = Decoder(DecoderConfig(64, 16, 32, 2, 2, 1, 8))
    params = decoder.init(jax.random.key(0))
    together = TokenRows(part, 64)
    batch = together.batch(np.arange(1), (), 0)
    segments = batch["segment_ids"][0]
    for i, (start, length) in enumerate(zip(part.starts, lengths, strict=True)):
        mine = dict(batch, target_mask=batch["target_mask"] * (segments == i + 1))
        packed, labels = row_sums(decoder, params, mine)
        own = part.tokens[start : start + length]
        alone = TokenRows(Tokens(own, np.zeros(1, "<i8"), ""), 64).batch(np.arange(1), (), 0)
        loss, count = row_sums(decoder, params, alone)
        assert labels[0] == count[0] == length - 1
        np.testing.assert_allclose(packed, loss, rtol=1e-6, atol=1e-6)


def test_every_slot_is_a_label_without_their_places():
    """`at_labels` gathers nothing where a batch has no `label_index`."""
    decoder = Decoder(DecoderConfig(64, 16, 32, 2, 2, 1, 8))
    params = decoder.init(jax.random.key(0))
    batch = TokenRows(PART, 16).batch(np.arange(3), (), 0)
    places = np.broadcast_to(np.arange(16, dtype=np.int32), (3, 16))
    found = row_sums(decoder, params, batch)
    gathered = row_sums(decoder, params, batch | {"label_index": places})
    for a, b in zip(found, gathered, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sources_are_those_of_the_option():
    field = CorpusConfig.__dataclass_fields__["source"]
    assert set(corpus.SOURCES) == set(field.metadata["choices"])


def test_a_corpus_of_the_hub_is_streamed(monkeypatch):
    seen = []

    class Datasets:
        @staticmethod
        def load_dataset(repo, config, **more):
            seen.append((repo, config, more))
            yield {"text": "first"}
            yield {"content": "another column"}

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    config = CorpusConfig(source="hub", repository="a/b", subset="c", revision="d")
    found = documents(config, Counts())
    assert next(found).text == "first"
    assert seen == [("a/b", "c", {"split": "train", "streaming": True, "revision": "d"})]
    with pytest.raises(UserError, match="a/b c: its rows have no column 'text', but content"):
        next(found)
    monkeypatch.setattr(Datasets, "load_dataset", lambda *a, **k: iter([].pop, None))
    with pytest.raises(UserError, match="a/b c: cannot be loaded .IndexError"):
        next(documents(config, Counts()))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package `datasets`"):
        next(documents(config, Counts()))
