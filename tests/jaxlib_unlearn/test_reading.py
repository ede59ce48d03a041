"""One function turns every damaged file into its reader's one-line error."""

from __future__ import annotations

import json
import os

import pytest

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import check_spelling, exists, parse_json, read_json, read_text, reading


class PanicException(BaseException):
    """What a Rust library raises on a panic; it is not an `Exception`."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "bad"), "not UTF-8 text at byte 1"),
        (RecursionError("maximum depth"), "nested too deeply"),
        (MemoryError(), "more than this host's memory holds"),
        (KeyError("shape"), "no 'shape' in it"),
        (TypeError("list indices\nmust be"), "list indices must be"),
        (OverflowError("int too large"), "int too large"),
        (AttributeError("'int' has no x"), "'int' has no x"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (Exception("of tokenizers"), "of tokenizers"),
        (PanicException("index out of bounds"), "index out of bounds"),
        (ValueError("a\x1b[31m\u202eb" + "c" * 999), "a\ufffd"),
        (EOFError(), "EOFError"),
        (RuntimeError("Could not determine home directory."), "home directory"),
    ],
)
def test_what_a_damaged_file_raises_is_one_line(error, reason):
    with pytest.raises(UserError) as caught, reading("x.json", "get it anew"):
        raise error
    message = str(caught.value)
    assert message.startswith("x.json: ") and message.endswith("; get it anew")
    assert reason in message and message.isprintable() and len(message) < 300


def test_what_is_no_damage_passes():
    for error in (UserError("mine"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()):
        with pytest.raises(type(error)) as caught, reading("x.json"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ("[" * 101 + "]" * 101, "nested too deeply"),
        ("9" * 5000, "an integer of 5000 digits"),
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice in one object"),
        ('{"a": [1, 2', "Expecting"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_refused(text, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        read_json(path, "write it again")
    assert str(caught.value).startswith(f"{path}: not readable as JSON (")


def test_json_that_is_read(monkeypatch):
    value = {"a": [1, -2.5, None, True, "x\n"], "b": {"c": 2**100}}
    assert parse_json(json.dumps(value)) == value
    assert json.dumps(parse_json("[" * 100 + "]" * 100)) == "[" * 100 + "]" * 100
    monkeypatch.setattr("jaxlib_unlearn.reading.LARGEST_JSON", 4)
    with pytest.raises(ValueError, match="5 characters, more than the 4 that are read"):
        parse_json("12345")


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "large").write_bytes(b"12345")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for path, reason in (
        (tmp_path / "pipe", "not a file"), (tmp_path, "not a file"), ("/dev/zero", "not a file"),
        (tmp_path / "absent", "No such file"), (tmp_path / ("a" * 5000), "File name too long"),
        (tmp_path / "nul\0", "embedded null"), (tmp_path / "latin", "not UTF-8 text at byte 3"),
        (tmp_path / "large", "5 bytes, more than the 4 that are read"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=reason) as caught:
            read_text(path, limit=4)
        assert len(str(caught.value)) < 400


def test_a_path_that_cannot_be_looked_at(tmp_path):
    assert exists(tmp_path) and not exists(tmp_path / "absent")
    with pytest.raises(UserError, match="File name too long"):
        exists(tmp_path / ("a" * 5000))


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("rope_thets", True), ("rope_thet", True), ("rope_thetaa", True), ("ope_theta", True),
        ("rope_theta", False), ("rope_htea", False), ("architectures", False),
    ],
)  # fmt: skip
def test_names_a_letter_off(given, wrong):
    if not wrong:
        return check_spelling([given], ["rope_theta"], "x", "correct it")
    with pytest.raises(UserError, match="'rope_theta' is absent"):
        check_spelling([given], ["rope_theta"], "x", "correct it")
    check_spelling([given, "rope_theta"], ["rope_theta"], "x", "correct it")
