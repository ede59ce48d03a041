"""Tokenizers and chat templates from folders, GGUF metadata and fresh training."""

from __future__ import annotations

import json

import pytest
import tokenizers

from jaxlib_unlearn.errors import UserError
from models.text.tokenizer import Tokenizer

TEXT = ["the cat sat on the mat", "the dog ate 12 cats", "naïve café — 3,50 €", "def f(x):\n    x"]
CHATML = (
    "{% for m in messages %}\n"
    "    {{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
USER = [{"role": "user", "content": "hi"}]


def trained() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    return backend


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(trained(), CHATML, bos_id=0, eos_id=2)


@pytest.mark.parametrize("text", [*TEXT, "", " ", "\n\n\t x", "🙂🚀", "人工 हिन्दी", "a<|im_end|>b"])
def test_decode_undoes_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == text.replace("<|im_end|>", "")


def test_ids(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 2, 2)
    assert Tokenizer(trained(), eos_id=2, pad_id=1).pad_id == 1
    assert Tokenizer(trained()).pad_id is None
    assert tokenizer.encode("<|im_start|>x")[0] == 1
    assert tokenizer.largest_id == tokenizer.vocab_size - 1


def test_long_text_is_neither_cut_nor_padded():
    backend = trained()
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    tokenizer = Tokenizer(backend)
    assert len(tokenizer.encode("the cat " * 50)) > 50
    assert len(tokenizer.encode("a")) == 1


def test_chat_trims_blocks(tokenizer):
    assert tokenizer.has_chat_template
    assert tokenizer.chat(USER) == "    <|im_start|>user\nhi<|im_end|>\n\n"
    assert tokenizer.chat(USER, True).endswith("\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages|length }}{{ eos_token }}", "<bos>1<|im_end|>"),
        ("{{ pad_token is defined }}", "False"),
        ("{{ messages[0]|tojson }}", '{"role": "user", "content": "hi"}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{% for m in messages %}{% break %}x{% endfor %}y", "y"),
        ("{{ strftime_now('%Y')|length }}", "4"),
        ("{% if tools is not none %}t{% endif %}{{ date_string }}", "26 Jul 2024"),
    ],
)
def test_template_features(template, text):
    tokenizer = Tokenizer(trained(), template + "{{ messages[0].content }}", bos_id=0, eos_id=2)
    assert tokenizer.chat(USER, date_string="26 Jul 2024") == text + "hi"


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ ' [INST] ' + m.content|trim + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
LAST = "{{ messages[-1]['content'] }}"


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (MISTRAL, USER, "<bos> [INST] hi [/INST]"),
        (MISTRAL, [*USER, {"role": "assistant", "content": "a"}, *USER], None),
        ("{{ messages|tojson }}", USER, '[{"role": "user", "content": "hi"}]'),
        ("{{ (messages|last).content|title|replace('i', 'o') }}", USER, "Ho"),
        (LAST, [{"role": "user", "content": ""}], ""),
        ("said", [{"role": "assistant", "content": "a"}], "said"),  # nothing is asked
        (LAST + "\r\n\t\u3000é", USER, "hi\n\t\u3000é"),
    ],
)
def test_a_template_that_prints_the_users_message_is_used(template, messages, text):
    found = Tokenizer(trained(), template, bos_id=0, eos_id=2).chat(messages)
    assert text is None or found == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ bos_token }}", "does not print the user's message"),
        (LAST.replace("content", "contenu"), "does not print the user's message"),
        (CHATML.replace("'content'", "'role'"), "does not print the user's message"),
        ("{% if messages|length > 1 %}" + LAST + "{% endif %}", "does not print the user's"),
        (LAST + "\x00", r"holds the control character '\\x00'"),
        ("\x1b" + LAST, r"holds the control character '\\x1b'"),
        (LAST + "\x85", r"holds the control character '\\x85'"),
    ],
)
def test_a_damaged_template_is_refused(template, message):
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer(trained(), template, bos_id=0, eos_id=2).chat(USER)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\\nalternate') }}", "roles must alternate"),
        ("{% for %}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),  # the sandbox
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        (None, "no chat template"),
    ],
)
def test_template_errors_are_one_line(template, message):
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer(trained(), template).chat(USER)
    assert "\n" not in str(caught.value)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    back = Tokenizer.from_folder(tmp_path)
    for text in TEXT:
        assert back.encode(text) == tokenizer.encode(text)
    assert (back.bos_id, back.eos_id, back.pad_id) == (0, 2, 2)
    assert back.chat(USER, True) == tokenizer.chat(USER, True)
    assert (tmp_path / "chat_template.jinja").read_text() == CHATML
    again = tmp_path / "again"
    again.mkdir()
    back.save(again)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_settings_of_the_source_are_kept_but_no_code_and_no_origin(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    raw = json.loads(file.read_text())
    raw |= {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 99, "auto_map": {"x": "y.z"}}
    raw |= {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False}}
    raw |= {"name_or_path": "somewhere", "unk_token": "<bos>"}
    file.write_text(json.dumps(raw))
    back = Tokenizer.from_folder(tmp_path)
    assert back.eos_id == 2
    back.save(tmp_path)
    saved = json.loads(file.read_text())
    assert saved["tokenizer_class"] == "Qwen2Tokenizer" and saved["model_max_length"] == 99
    assert saved["eos_token"] == raw["eos_token"] and saved["unk_token"] == "<bos>"
    assert "auto_map" not in saved and "name_or_path" not in saved


def test_template_inside_the_configuration(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    file = tmp_path / "tokenizer_config.json"
    raw = json.loads(file.read_text())
    assert not Tokenizer.from_folder(tmp_path).has_chat_template
    file.write_text(json.dumps({**raw, "chat_template": "one {{ messages[0].content }}"}))
    assert Tokenizer.from_folder(tmp_path).chat(USER) == "one hi"
    three = "three {{ messages[0].content }}"
    named = [{"name": "rag", "template": "two"}, {"name": "default", "template": three}]
    file.write_text(json.dumps({**raw, "chat_template": named}))
    assert Tokenizer.from_folder(tmp_path).chat(USER) == "three hi"


def test_special_tokens_map_alone(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    back = Tokenizer.from_folder(tmp_path)
    assert (back.bos_id, back.eos_id) == (None, 2)


def test_a_text_that_the_library_panics_over_is_one_line():
    backend = trained()
    pattern = tokenizers.Regex("(x+x+)+y")  # gives up after a tenth of a second
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, behavior="isolated")
    with pytest.raises(UserError, match="the tokenizer cannot read the text 'xxxx.*retry-limit"):
        Tokenizer(backend).encode("x" * 99)
    with pytest.raises(UserError, match="the tokenizer cannot read the text 'a"):
        Tokenizer(trained()).encode("a\ud800")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": "<no such>"}, "eos_token is '<no such>', no token of tokenizer.json"),
        ({"eos_token": 5}, "eos_token is 5, no token"),
        ({"pad_token": ["a"]}, "pad_token is .'a'., no token"),
        ({"eos_token": "\ud800"}, "special tokens of tokenizer_config.json do not read"),
        ({"chat_template": 5}, "chat_template is a int, not a text"),
        ({"chat_template": []}, "chat_template of tokenizer_config.json does not read"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, "no 'default' in it"),
        ({"chat_templbte": "x"}, "'chat_templbte' is unknown, and 'chat_template' is absent"),
    ],
)
def test_settings_that_cannot_be(tokenizer, tmp_path, changes, message):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_settings_as_published_models_have_them(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    more = {"bos_token": None, "unk_token": "", "pad_token": "[absent]", "eot_token": "x"}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    back = Tokenizer.from_folder(tmp_path)
    assert (back.bos_id, back.eos_id, back.pad_id) == (None, 2, 2)


def test_unreadable_files(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json in it"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: cannot be read"):
        Tokenizer.from_folder(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json: not readable as JSON"):
        Tokenizer.from_folder(tmp_path)


# GGUF metadata: the same vocabulary and merges give the same tokenizer.


def metadata(backend: tokenizers.Tokenizer, **changes) -> dict:
    model = json.loads(backend.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    raw = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": words,
        "token_type": [3] * 3 + [1] * (len(words) - 3),
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 2,
        **changes,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in raw.items() if v is not None}


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default", None])
def test_gguf_gives_the_same_ids(pre):
    backend = trained()
    rebuilt = Tokenizer.from_gguf(metadata(backend, pre=pre), "x.gguf")
    for text in [*TEXT, "x<|im_start|>user\nhi<|im_end|>", "  a  1\n\n", "🙂"]:
        assert rebuilt.encode(text) == backend.encode(text).ids
        assert rebuilt.decode(rebuilt.encode(text), False) == text
    assert (rebuilt.bos_id, rebuilt.eos_id, rebuilt.pad_id) == (0, 2, 2)
    assert not rebuilt.has_chat_template


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["It", "'s", " 12345", " ok", "!!", "\n"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", " ok", "!!\n"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", " ok", "!!\n"]),
    ],
)
def test_gguf_pre_tokenizers_cut_digits_as_named(pre, pieces):
    backend = Tokenizer.from_gguf(metadata(trained(), pre=pre), "x.gguf").backend
    cut = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("It's 12345 ok!!\n")]
    assert [backend.decoder.decode([piece]) for piece in cut] == pieces


@pytest.mark.parametrize(
    ("pre", "flag", "begins"),
    [
        ("smollm", None, False),
        ("smollm", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_gguf_begin_token_only_when_asked(pre, flag, begins):
    raw = metadata(trained(), pre=pre, add_bos_token=flag)
    tokenizer = Tokenizer.from_gguf(raw, "x.gguf")
    plain = tokenizer.encode("the cat")
    assert tokenizer.encode("the cat", add_special_tokens=True) == [0] * begins + plain


def test_gguf_user_defined_tokens_stay_whole_and_are_no_specials():
    raw = metadata(trained())
    raw["tokenizer.ggml.token_type"][1] = 4
    tokenizer = Tokenizer.from_gguf(raw, "x.gguf")
    assert tokenizer.encode("a<|im_start|>")[-1] == 1
    assert tokenizer.decode(tokenizer.encode("a<|im_start|><|im_end|>")) == "a<|im_start|>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "tokenizer 't5' is not supported"),
        ({"pre": "unheard-of"}, "pre-tokenizer 'unheard-of' is not supported"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"merges": None}, "no tokenizer.ggml.tokens or merges"),
        ({"merges": ["☃ ☃"]}, "vocabulary and merges disagree"),
        ({"merges": ["ab"]}, "vocabulary and merges disagree"),
        ({"merges": [3]}, "tokenizer.ggml.merges is no list of texts"),
        ({"tokens": ["a", "a"]}, "a token stands twice"),
        ({"tokens": 7}, "tokenizer.ggml.tokens is no list of texts"),
        ({"token_type": [1]}, "token_type is no list of"),
        ({"eos_token_id": 9999}, "eos_token_id is 9999, none of"),
        ({"bos_token_id": True}, "bos_token_id is True, none of"),
        ({"add_bos_token": 1}, "add_bos_token is 1, not true or false"),
    ],
)
def test_gguf_errors(changes, message):
    with pytest.raises(UserError, match=message):
        Tokenizer.from_gguf(metadata(trained(), **changes), "x.gguf")
