"""CLIP's tokenizer: lower-case byte-pair encoding with `</w>` behind words, rows of 77 ids.

It is a `models.text.tokenizer.Tokenizer` around a pipeline of the `tokenizers` library, whose ids
are those of transformers' `CLIPTokenizer`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import one_line, read_json, read_text, reading
from models.files.hub import local
from models.text.tokenizer import Tokenizer

LENGTH = 77
BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
VOCAB, MERGES, WHOLE = "vocab.json", "merges.txt", "tokenizer.json"
SPECIAL = ("tokenizer_config.json", "special_tokens_map.json")
# Special tokens, English endings, words, single digits, runs of other signs.
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
ADVICE = "use the tokenizer the model was published with"
Merges = Sequence[tuple[str, str]]


class Prompts(NamedTuple):
    """Prompts as rows of token ids.

    Args:
        ids: int32 `(B, length)`: the first token, the prompt, the end token, padding.
        dropped: int32 `(B,)`, the number of tokens cut off at the end of a prompt; 0: it is whole.
    """

    ids: np.ndarray
    dropped: np.ndarray


def encode(tokenizer: Tokenizer, prompts: Iterable[str], length: int = LENGTH) -> Prompts:
    """Rows of token ids, as a text encoder reads them.

    A prompt of more than `length - 2` tokens is cut behind these, as CLIP does.

    Args:
        tokenizer: any that has a first and an end token.
        prompts: B texts; "" is the prompt of unconditional predictions.
        length: the number of tokens of a row.

    Returns:
        The rows, and how many tokens of each prompt were cut off.

    Raises:
        UserError: a text that cannot be read, or a tokenizer without these tokens.

    Example:
        >>> tokenizer = of_merges([("a", "t</w>"), ("c", "at</w>")])
        >>> encode(tokenizer, ["Cat", "at cat at"], 4)
        Prompts(ids=array([[514, 513, 515, 515],
                           [514, 512, 513, 515]], dtype=int32), dropped=array([0, 1], dtype=int32))
    """
    bos, eos, pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    if bos is None or eos is None or pad is None:
        raise UserError(f"this tokenizer has no first or no end token; {ADVICE}")
    texts = [tokenizer.encode(prompt) for prompt in prompts]
    ids = np.full((len(texts), length), pad, np.int32)
    for row, text in zip(ids, texts, strict=True):
        whole = [bos, *text[: length - 2], eos]
        row[: len(whole)] = whole
    dropped = [max(len(text) - (length - 2), 0) for text in texts]
    return Prompts(ids, np.asarray(dropped, np.int32))


def from_folder(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder: `vocab.json` and `merges.txt`, or both in `tokenizer.json`.

    Rows are filled with the padding token that the folder names, with the end token (as Stable
    Diffusion v1 does) where it names none.

    Args:
        folder: such as `tokenizer` of a Stable Diffusion model.

    Returns:
        The tokenizer.

    Raises:
        UserError: no such files, damaged ones, or ones of another kind of tokenizer.

    Example:
        >>> from_folder("nowhere")
        Traceback (most recent call last):
        ...
        jaxlib_unlearn.errors.UserError: nowhere: neither vocab.json and merges.txt nor ...
    """
    folder = local(str(folder))
    if (folder / VOCAB).is_file() and (folder / MERGES).is_file():
        vocab = read_json(folder / VOCAB)
        merges = _pairs(read_text(folder / MERGES), folder / MERGES)
    elif (folder / WHOLE).is_file():
        vocab, merges = _of_pipeline(folder / WHOLE)
    else:
        raise UserError(f"{folder}: neither {VOCAB} and {MERGES} nor {WHOLE} in it; {ADVICE}")
    pad = EOS
    for name in SPECIAL:
        if (folder / name).is_file():
            with reading(folder / name, ADVICE, "special tokens do not read"):
                value = read_json(folder / name).get("pad_token") or pad
                pad = value if isinstance(value, str) else value["content"]
    return _built(vocab, merges, pad, str(folder))


def of_merges(merges: Merges, where: str = "merges") -> Tokenizer:
    """The tokenizer of a list of merges.

    Ids count 256 signs for bytes, the same with `</w>`, the merges, and the two tokens that
    begin and end a text, in this order.

    Args:
        merges: pairs of tokens, the first to be joined first.
        where: the place that they come from, for messages.

    Returns:
        The tokenizer.

    Raises:
        UserError: a merge of tokens that neither bytes nor earlier merges make.

    Example:
        >>> of_merges([("c", "a"), ("ca", "t</w>")]).encode("cat, act")
        [513, 267, 64, 66, 339]
    """
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = [first + second for first, second in merges]
    words = [*signs, *(sign + END_OF_WORD for sign in signs), *joined, BOS, EOS]
    if len(set(words)) < len(words):
        raise UserError(f"{where}: two merges make the same token; {ADVICE}")
    return _built({word: i for i, word in enumerate(words)}, merges, EOS, where)


def of_words(words: Sequence[str], where: str = "words") -> Tokenizer:
    """The tokenizer of a small vocabulary: every word is one token.

    Ids count the words, in their order, then the parts of words that merges make, then the two
    tokens that begin and end a text. Merges join a word from its end, so no word gets in another's
    way. Other words become letters.

    Args:
        words: words of lower-case letters, or single digits.
        where: the place that they come from, for messages.

    Returns:
        The tokenizer.

    Raises:
        UserError: a word that is given twice, or that is cut into several before merges begin.

    Example:
        >>> of_words(["shoe", "a", "horse"]).encode("A horse shoe")
        [1, 2, 0]
    """
    wrong = [w for w in words if not (w.isascii() and (w.isalpha() or len(w) == 1 and w.isdigit()))]
    wrong += [w for w in words if w != w.lower()]
    if wrong or len(set(words)) < len(words):
        raise UserError(
            f"{where}: {one_line((wrong or ['a word given twice'])[0], 40)!r} is no token; words "
            "are different ones of lower-case letters, or single digits"
        )
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for i in range(len(word) - 2, -1, -1):
            merges.setdefault((word[i], word[i + 1 :] + END_OF_WORD))
    signs = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789"]
    tokens = [word + END_OF_WORD for word in words]
    tokens += [first + second for first, second in merges]
    tokens += [*signs, *(sign + END_OF_WORD for sign in signs), BOS, EOS]
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return _built(ids, list(merges), EOS, where)


def save(tokenizer: Tokenizer, folder: str | Path, length: int = LENGTH) -> None:
    """Write the files that diffusers and transformers read: vocabulary, merges, special tokens.

    Args:
        tokenizer: one of this module.
        folder: an existing folder.
        length: the number of tokens of a row.
    """
    folder = Path(folder)
    tokenizer.backend.model.save(str(folder))
    special: dict[str, Any] = {
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": tokenizer.token(tokenizer.pad_id),
        "unk_token": EOS,
    }
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
    for name, value in zip(SPECIAL, (config, special), strict=True):
        text = json.dumps(value, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def _pairs(text: str, where: Path) -> list[tuple[str, str]]:
    """The merges of a file: a pair a line, behind a line that names the version."""
    lines = text.split("\n")
    if "#version" in lines[0]:
        del lines[0]
    found = []
    for line in lines:
        if pair := line.split():
            if len(pair) != 2:
                raise UserError(f"{where}: {one_line(line, 40)!r} is no pair of tokens; {ADVICE}")
            found.append((pair[0], pair[1]))
    return found


def _of_pipeline(path: Path) -> tuple[Any, list[tuple[str, str]]]:
    """Vocabulary and merges of a `tokenizer.json`."""
    with reading(path, ADVICE, "does not read"):
        model = read_json(path)["model"]
        kind = model.get("type"), model.get("end_of_word_suffix")
        if kind != ("BPE", END_OF_WORD):
            raise UserError(
                f"{path}: no byte-pair encoding with {END_OF_WORD} behind words, as CLIP has it; "
                f"{ADVICE}"
            )
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        return model["vocab"], [(first, second) for first, second in merges]


def _built(vocab: Any, merges: Merges, pad: str, where: str) -> Tokenizer:
    """The pipeline: normal form, one space, lower case; words; bytes; merges."""
    if not isinstance(vocab, Mapping) or not all(type(i) is int for i in vocab.values()):
        raise UserError(f"{where}: its vocabulary does not give tokens their ids; {ADVICE}")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"{where}: the ids of its tokens are not 0 to {len(vocab) - 1}; {ADVICE}")
    for token in (BOS, EOS, pad):
        if token not in vocab:
            raise UserError(f"{where}: {one_line(token, 40)!r} is none of its tokens; {ADVICE}")
    with reading(where, ADVICE, "vocabulary and merges do not fit"):
        model = tokenizers.models.BPE(
            vocab=dict(vocab),
            merges=list(merges),
            end_of_word_suffix=END_OF_WORD,
            unk_token=EOS,
        )
        backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(END_OF_WORD, " "), decoders.Strip(" ", 0, 1)]
    )
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=True) for token in (BOS, EOS)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        pair=f"{BOS} $A {EOS} {EOS} $B {EOS}",
        special_tokens=[(BOS, vocab[BOS]), (EOS, vocab[EOS])],
    )
    settings = {"tokenizer_class": "CLIPTokenizer", "unk_token": EOS}
    return Tokenizer(backend, None, vocab[BOS], vocab[EOS], vocab[pad], settings)
