"""Text to token ids and back, and chat templates, without transformers.

`Tokenizer` wraps the `tokenizers` library. It comes from a Hugging Face folder, from the metadata
of a GGUF file, or from a tokenizer just trained, and is saved in the form that transformers loads.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxlib_unlearn import reading
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import one_line
from models.text import chat_templates
from models.text.prompts import PromptFormat, day_of

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# Keys of tokenizer_config.json about its origin, or that would run code.
DROPPED = ("chat_template", "auto_map", "name_or_path", "is_local", "local_files_only", "backend")
# Further special tokens of some models, one letter off one of those.
OTHERS = tuple(f"{name}_token" for name in "eot eom eod eop eoi boi bot bop sos".split())
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types of GGUF
NO_TOKEN = (-1, 2**32 - 1)  # ids by which some files say that there is no such token
MARKER = "17296501729650"  # digits, which no filter of templates for texts changes
LARGEST = 2**28  # bytes of a tokenizer.json; the largest published ones have 35 million


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object from a file; `why` says what a missing file is needed for."""
    with reading.reading(path, what="cannot be looked at"):
        there = path.is_file()
    if not there:
        raise UserError(f"{path.parent}: no {path.name} in it ({why}); give another folder")
    value = reading.read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}, not an object; get it anew")
    return value


class Tokenizer:
    """A byte-pair (or any `tokenizers`) tokenizer with special tokens and a chat template.

    Args:
        backend: the `tokenizers.Tokenizer`; its truncation and padding are switched off.
        chat_template: Jinja source, or None.
        bos_id: token id that begins a text, or None.
        eos_id: token id that ends a text, or None.
        pad_id: token id that fills rows; None falls back to `eos_id`.
        settings: further keys of tokenizer_config.json.

    Example:
        >>> from tokenizers import models, pre_tokenizers
        >>> backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}))
        >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = Tokenizer(backend, "{{ messages[0].content }}", eos_id=1)
        >>> tokenizer.encode(tokenizer.chat([{"role": "user", "content": "b a"}]))
        [1, 0]
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.chat_template = chat_template
        self.bos_id, self.eos_id = bos_id, eos_id
        self._pad_id = pad_id
        self.settings = dict(settings or {"tokenizer_class": "PreTrainedTokenizerFast"})
        self.format = PromptFormat()
        self._prints = False  # whether the template is known to print the user's message

    def formatted(self, format: PromptFormat) -> Tokenizer:
        """The same tokenizer with another format of its prompts."""
        other = copy.copy(self)
        other.format = format
        return other

    @property
    def pad_id(self) -> int | None:
        """The padding token's id; the end token's where there is none."""
        return self.eos_id if self._pad_id is None else self._pad_id

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        return self.chat_template is not None

    def token(self, index: int | None) -> str | None:
        """The token with this id, as the vocabulary spells it."""
        return None if index is None else self.backend.id_to_token(index)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; special tokens written in the text are recognised."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:  # the library raises bare Exception, and panics
            if not reading.is_damage(error):
                raise
            raise UserError(
                f"the tokenizer cannot read the text {one_line(text, 40)!r} ({one_line(error)}); "
                "correct the text, or use the tokenizer the model was published with"
            ) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Messages as the text the model was trained on.

        Args:
            messages: `{"role": ..., "content": ...}` each.
            add_generation_prompt: end with the opening of an assistant's turn.
            variables: further names for the template. `date_string` and `strftime_now` give the day
                `self.format.date`, never the clock's: texts do not differ from day to day.

        Raises:
            UserError: there is no template, it refuses the messages, it takes too long, or it does
                not print the user's message.
        """
        if self.chat_template is None:
            raise UserError(
                "this tokenizer has no chat template; use a model that has one or plain prompts"
            )
        date = variables.get("date_string", self.format.date)
        names = {key: self.token(value) for key, value in self._special_ids().items()}
        turns = [dict(turn) for turn in messages]
        scope: dict[str, Any] = {key: value for key, value in names.items() if value is not None}
        scope |= {"tools": None, "documents": None, "date_string": date, **variables}
        scope |= {"messages": turns, "add_generation_prompt": add_generation_prompt}
        text = chat_templates.render(self.chat_template, scope, day_of(date))
        asked = [turn for turn in turns if turn.get("role") == "user"]
        if asked and not self._prints:
            asked[-1]["content"] = MARKER
            if MARKER not in chat_templates.render(self.chat_template, scope, day_of(date)):
                raise UserError(
                    "the chat template does not print the user's message: it is damaged; get it "
                    f"anew, or {chat_templates.NEXT}"
                )
            self._prints = True
        return text

    def with_template(self, chat_template: str | None) -> Tokenizer:
        """The same tokenizer with another chat template."""
        ids = self.bos_id, self.eos_id, self._pad_id
        return Tokenizer(self.backend, chat_template, *ids, self.settings)

    def _special_ids(self) -> dict[str, int | None]:
        unk = _content(self.settings.get("unk_token"))
        return {
            "bos_token": self.bos_id,
            "eos_token": self.eos_id,
            "pad_token": self._pad_id,
            "unk_token": None if unk is None else self.backend.token_to_id(unk),
        }

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into a folder."""
        folder = Path(folder)
        # Its own `save` raises a plain `Exception` where the disk is full.
        text = self.backend.to_str(pretty=True)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        settings = {key: value for key, value in self.settings.items() if key not in SPECIAL}
        for key, index in self._special_ids().items():
            token = self.token(index)
            if token is not None:
                given = self.settings.get(key)
                settings[key] = given if _content(given) == token else token
        settings.setdefault("clean_up_tokenization_spaces", False)
        text = json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face model folder.

        Raises:
            UserError: there is no tokenizer.json, or a file cannot be read.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"{folder}: no tokenizer.json in it; save one there with the tokenizer's "
                "save_pretrained of transformers"
            )
        if file.stat().st_size > LARGEST:
            raise UserError(f"{file}: more than {LARGEST:,} bytes; get it anew")
        with reading.reading(file):
            backend = tokenizers.Tokenizer.from_file(str(file))
            if not backend.get_vocab_size():
                raise ValueError("its vocabulary is empty")
        raw: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                raw |= read_json(folder / name, "special tokens")
        names = (*SPECIAL, "chat_template")
        advice = "correct it in tokenizer_config.json"
        reading.check_spelling((k for k in raw if k not in OTHERS), names, folder, advice)
        with reading.reading(folder, what="special tokens of tokenizer_config.json do not read"):
            ids = {key: _special_id(key, raw.get(key), backend, folder) for key in SPECIAL}
        settings = {key: value for key, value in raw.items() if key not in DROPPED}
        return cls(
            backend,
            _template_of(folder, raw),
            ids["bos_token"],
            ids["eos_token"],
            ids["pad_token"],
            settings or None,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: str) -> Tokenizer:
        """The byte-pair tokenizer that the metadata of a GGUF file describes.

        Args:
            metadata: the `tokenizer.*` keys.
            where: the name of the file in error messages.

        Raises:
            UserError: another kind of tokenizer, an unknown pre-tokenizer or missing lists.
        """
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "gpt2":
            raise UserError(
                f"{where}: tokenizer {kind!r} is not supported in GGUF files; supported: gpt2 "
                "(byte-pair); use the safetensors version of the model"
            )
        words = metadata.get("tokenizer.ggml.tokens")
        merges = metadata.get("tokenizer.ggml.merges")
        if not words or merges is None:
            raise UserError(f"{where}: no tokenizer.ggml.tokens or merges; download it again")
        _check_lists(words, merges, where)
        pre = metadata.get("tokenizer.ggml.pre", "default")
        if pre not in PRE_TOKENIZERS:
            raise UserError(
                f"{where}: pre-tokenizer {pre!r} is not supported; supported: "
                f"{', '.join(PRE_TOKENIZERS)}; use the safetensors version of the model"
            )
        size = len(words)
        vocab = {word: index for index, word in enumerate(words)}
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        with reading.reading(where, "download it again", "vocabulary and merges disagree"):
            model = tokenizers.models.BPE(
                vocab=vocab, merges=pairs, ignore_merges=PRE_TOKENIZERS[pre] == 3
            )
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = _pre_tokenizer(PRE_TOKENIZERS[pre])
        if pre == "qwen2":
            backend.normalizer = tokenizers.normalizers.NFC()
        backend.decoder = tokenizers.decoders.ByteLevel()
        types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(words)
        if not isinstance(types, list) or len(types) != len(words):
            raise UserError(
                f"{where}: tokenizer.ggml.token_type is no list of {len(words)} types; download it "
                "again"
            )
        added = {
            wanted: [
                tokenizers.AddedToken(word, normalized=False, special=wanted == CONTROL)
                for word, given in zip(words, types, strict=False)
                if given == wanted
            ]
            for wanted in (CONTROL, USER_DEFINED)
        }
        backend.add_special_tokens(added[CONTROL])
        backend.add_tokens(added[USER_DEFINED])

        def special(name: str) -> int | None:
            index = metadata.get(f"tokenizer.ggml.{name}_token_id")
            if index is None or index in NO_TOKEN:
                return None
            if isinstance(index, bool) or not isinstance(index, int) or index not in range(size):
                raise UserError(
                    f"{where}: tokenizer.ggml.{name}_token_id is {one_line(repr(index), 40)}, none "
                    f"of {size} tokens; download it again"
                )
            return index

        bos = special("bos")
        # Llama 3 files may leave the flag out; llama.cpp then begins every text with it.
        begin = metadata.get("tokenizer.ggml.add_bos_token", PRE_TOKENIZERS[pre] == 3)
        if not isinstance(begin, bool):
            raise UserError(
                f"{where}: tokenizer.ggml.add_bos_token is {begin!r}, not true or false"
            )
        if begin and bos is not None:
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{words[bos]} $A",
                pair=f"{words[bos]} $A $B",
                special_tokens=[(words[bos], bos)],
            )
        unknown = special("unknown")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if unknown is not None:
            settings["unk_token"] = words[unknown]
        template = metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise UserError(f"{where}: tokenizer.chat_template is no text; download it again")
        return cls(backend, template, bos, special("eos"), special("padding"), settings)


# Longest run of digits that stays together, by the name GGUF gives the pre-tokenizer; 0: the
# splitting of GPT-2. `smollm` is read as GPT-2's, as transformers reads it (llama.cpp and the
# published tokenizer also split off every digit first).
PRE_TOKENIZERS = {
    "default": 0,
    "gpt-2": 0,
    "gpt2": 0,
    "smollm": 0,
    "llama-bpe": 3,
    "llama3": 3,
    "llama-v3": 3,
    "qwen2": 1,
}


def _check_lists(words: Any, merges: Any, where: str) -> None:
    """Raise `UserError` unless tokens and merges are lists of strings, the tokens distinct."""
    for name, value in (("tokens", words), ("merges", merges)):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UserError(
                f"{where}: tokenizer.ggml.{name} is no list of texts; download it again"
            )
    if len(set(words)) < len(words):
        raise UserError(
            f"{where}: a token stands twice in tokenizer.ggml.tokens; download it again, or use "
            "the safetensors version of the model"
        )


def _pre_tokenizer(digits: int) -> tokenizers.pre_tokenizers.PreTokenizer:
    kinds = tokenizers.pre_tokenizers
    if digits == 0:
        return kinds.ByteLevel(add_prefix_space=False)
    pattern = "|".join(
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English endings
            r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word with one character before it
            r"\p{N}" if digits == 1 else rf"\p{{N}}{{1,{digits}}}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation up to the line's end
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    )
    return kinds.Sequence(
        [
            kinds.Split(tokenizers.Regex(pattern), behavior="isolated"),
            kinds.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _content(value: Any) -> str | None:
    """A special token's text: a string, or an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_id(key: str, value: Any, backend: tokenizers.Tokenizer, folder: Path) -> int | None:
    """The id of a special token; `bos_token` and `eos_token`, if given, must have one.

    Raises:
        UserError: the value is not a text, or not a token where a run depends on it.
    """
    if value is None or value == "":  # means none; published files have it
        return None
    text = _content(value)
    index = None if text is None else backend.token_to_id(text)
    if index is None and (text is None or key in ("bos_token", "eos_token")):
        raise UserError(
            f"{folder}: {key} is {one_line(repr(value), 60)}, no token of tokenizer.json; use the "
            "files the model was published with"
        )
    return index


def _template_of(folder: Path, raw: Mapping[str, Any]) -> str | None:
    """The chat template: its own file, else inside the configuration, alone or named `default`."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return reading.read_text(file, limit=LARGEST)
    value = raw.get("chat_template")
    if isinstance(value, list):
        with reading.reading(folder, what="chat_template of tokenizer_config.json does not read"):
            value = {item["name"]: item["template"] for item in value}["default"]
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{folder}: chat_template is a {type(value).__name__}, not a text; use the "
            "tokenizer_config.json the model was published with"
        )
    return value
