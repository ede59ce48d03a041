"""A model's name: a path, unless it has the Hub's prefix or exists only on the Hub."""

from __future__ import annotations

import pytest

from jaxlib_unlearn.errors import UserError
from models.files import hub


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The Hub has `owner/there`; every request is recorded."""
    questions = []

    def model_info(self, repository, *, revision=None, timeout=None):
        questions.append((repository, revision))
        assert timeout
        if repository != "owner/there":
            raise LookupError("404: no such repository\nRequest ID: x")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.chdir(tmp_path)
    return questions


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("owner/there", ("owner/there", None)),
        ("owner/there@v1.0", ("owner/there", "v1.0")),
        ("hub:owner/elsewhere", None),
        ("hub:owner/elsewhere@main", None),
        ("gs://bucket/model", None),
        ("runs/export", None),
        ("runs", None),
    ],
)
def test_names_that_are_models(name, question, asked, tmp_path):
    for folder in (tmp_path / "runs", tmp_path / "runs" / "export"):
        folder.mkdir()
        (folder / "config.json").touch()
    hub.check_source(name)
    assert asked == ([question] if question else [])


@pytest.mark.parametrize(
    ("name", "parts", "questions"),
    [
        ("runs/exprt", ["no such file", "did you mean runs/export?", "404"], 1),
        ("rns", ["no such file or folder (did you mean runs?)"], 0),
        ("./owner/there", ["no such file"], 0),
        ("runs/a/b", ["no such file"], 0),
        ("owner/model.gguf", ["no such file"], 0),
        ("hub:x", ["no such file", "hub:owner/name"], 0),
        ("hub:../there/x", ["no such file"], 0),
        ("~nobody-of-this-name/x", ["cannot be a path", "home directory"], 0),
        ("a" * 5000, ["File name too long"], 0),
        ("owner/" + "a" * 300, ["no such file"], 0),
    ],
)
def test_names_that_are_none(name, parts, questions, asked, tmp_path):
    (tmp_path / "runs" / "export").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        hub.check_source(name)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600 and len(asked) == questions
    for part in parts:
        assert part in message


def test_a_model_in_the_cache_needs_no_network(monkeypatch, asked):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: "config.json")
    hub.check_source("owner/cached", "v2")
    assert asked == []


def test_revisions_are_of_hub_ids_and_one(asked, tmp_path):
    (tmp_path / "folder").mkdir()
    hub.check_source("owner/there", "abc")
    hub.check_source("owner/there@abc", "abc")
    assert asked == [("owner/there", "abc")] * 2
    for name in ("folder", "gs://bucket/model"):
        with pytest.raises(UserError, match="only a Hub id .owner/name. has revisions"):
            hub.check_source(name, "abc")
    with pytest.raises(UserError, match="give one of the two"):
        hub.check_source("owner/there@abc", "def")


@pytest.mark.parametrize("weights", [True, False])
def test_a_tokenizer_is_downloaded_without_weights(weights, monkeypatch, tmp_path):
    from fnmatch import fnmatch

    asked = {}

    def snapshot_download(repository, **given):
        asked.update(given, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.download("hub:owner/name@v1", weights=weights) == tmp_path
    assert (asked["repository"], asked["revision"]) == ("owner/name", "v1")
    names = ("tokenizer.json", "vocab.txt", "model-1.safetensors", "pytorch_model.bin")
    taken = [n for n in names if any(fnmatch(n, p) for p in asked["allow_patterns"])]
    assert taken == [*names[:2], *names[2:3] * weights]
