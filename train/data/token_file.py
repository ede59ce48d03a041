"""A tokenised corpus on the disk: two memory-mapped arrays a part, and the tokenizer.

It lies in a folder that is named after what it was made from, is written under another name and
renamed, and is verified when it is opened: a damaged one is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import one_line
from models import Tokenizer
from train.data import corpus
from train.data.bpe import train_bpe
from train.runtime import distributed, files
from train.runtime.stages import alone, digest
from train.runtime.tracking import progress, say

VERSION = 1  # raise it when the same corpus may give other tokens
PARTS = ("train", "validation")
TRAINED_ON = 256 * 2**20  # bytes of training documents that a tokenizer is trained on at most
AT_ONCE = 4 * 2**20  # bytes that are tokenised at once


class Tokens(NamedTuple):
    """The tokens of one part of a corpus.

    Args:
        tokens: of all documents in their order, (n,) uint16 or uint32.
        starts: where each document begins, (documents,) int64, ascending from 0.
        sha: sha256 of both.
    """

    tokens: np.ndarray
    starts: np.ndarray
    sha: str


class Tokenised(NamedTuple):
    """A corpus as tokens, its tokenizer, and what was said of its documents."""

    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer
    words: str


def tokenised(
    known: corpus.Known, vocab_size: int, cache: Path, given: Tokenizer | None, most: int | None
) -> Tokenised:
    """The tokens of a corpus: those in `cache` when they are there undamaged, else made there.

    Args:
        known: the corpus (`corpus.identify`).
        vocab_size: of a tokenizer that is trained.
        cache: local folder that runs share.
        given: the tokenizer; None: one is trained on the training documents.
        most: training tokens after which reading stops; None: all are read.

    Raises:
        UserError: the corpus cannot be read, or `cache` cannot be written.
    """
    config = known.config
    inputs = {
        "version": VERSION,
        "corpus": config.digest,
        "validation": config.validation,
        "most": most,
        "tokenizer": ["train", vocab_size] if given is None else identity_of(given),
    }
    folder = cache / digest(inputs)[:16]

    def make() -> bool:
        found = read(folder)
        if found is None:
            write(folder, known, vocab_size, given, most, inputs)
        return found is not None

    with alone(folder, "tokens"):
        if distributed.of_first(make):
            say(f"tokens: found in {folder}")
    with distributed.together():
        if not distributed.is_first() and not (folder / "manifest.json").is_file():
            make()  # another host, which does not share the folder
        found = read(folder)
        if found is None:
            raise UserError(f"{folder} was damaged as it was written; run again")
    return found


def identity_of(tokenizer: Tokenizer) -> str:
    """sha256 of all that the tokens of a text depend on."""
    return digest([tokenizer.backend.to_str(), tokenizer.bos_id, tokenizer.eos_id])


def read(folder: Path) -> Tokenised | None:
    """What a folder holds; None where there is nothing, or where it is damaged, which is said."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        sums = manifest["sha256"]
        wrong = sorted({n for n in sums if files.sha256(folder / n) != sums[n]})
        if wrong:
            raise ValueError(f"{wrong[0]} does not match its sha256")
        train, validation = (_open(folder, name, manifest) for name in PARTS)
        tokenizer = Tokenizer.from_folder(folder / "tokenizer")
        return Tokenised(train, validation, tokenizer, manifest["words"])
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        say(f"{folder} is damaged ({one_line(error, 80)}); making it again")
        return None


def _open(folder: Path, name: str, manifest: dict[str, Any]) -> Tokens:
    tokens = np.memmap(folder / f"{name}.tokens", np.dtype(manifest["dtype"]), "r")
    starts = np.memmap(folder / f"{name}.starts", np.dtype("<i8"), "r")
    sums = [manifest["sha256"][f"{name}.{kind}"] for kind in ("tokens", "starts")]
    return Tokens(tokens, starts, digest([manifest["dtype"], *sums]))


def write(
    folder: Path,
    known: corpus.Known,
    vocab_size: int,
    given: Tokenizer | None,
    most: int | None,
    inputs: dict[str, Any],
) -> None:
    """Tokenise a corpus into a folder; arguments as in `tokenised`.

    Raises:
        UserError: the corpus cannot be read, or the folder cannot be written.
    """
    part = files.part_of(folder)
    try:
        part.mkdir(parents=True)
        tokenizer = trained(known, vocab_size) if given is None else given
        dtype = np.dtype("<u2" if tokenizer.largest_id < 2**16 else "<u4")
        counts = corpus.Counts()
        sizes = _write_parts(part, known, tokenizer, dtype, most, counts)
        (part / "tokenizer").mkdir()
        tokenizer.save(part / "tokenizer")
        manifest = {
            "inputs": inputs,
            "dtype": dtype.str,
            "documents": sizes,
            "words": counts.words(),
            "sha256": files.sums(part),
        }
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        files.put(part, folder)
    except OSError as error:
        if (folder / "manifest.json").is_file():
            return  # another process of this machine was first
        raise UserError(
            f"cannot write {folder}: {error.strerror}; free space or choose another --data.cache"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def trained(known: corpus.Known, vocab_size: int) -> Tokenizer:
    """A tokenizer trained on the training documents, on the first 256 MiB of them."""
    config = known.config
    total = None if known.counts is None else known.counts.num_bytes

    def texts() -> Iterator[str]:
        read = 0
        with progress("tokenizer (MB read)", min(total or TRAINED_ON, TRAINED_ON) >> 20) as advance:
            for document in corpus.documents(config):
                if not corpus.is_validation(document.sha, config.validation):
                    before, read = read, read + len(document.text)
                    advance((read >> 20) - (before >> 20))
                    yield document.text
                if read >= TRAINED_ON:
                    return

    return train_bpe(texts(), vocab_size)


def _write_parts(
    part: Path,
    known: corpus.Known,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    most: int | None,
    counts: corpus.Counts,
) -> dict[str, int]:
    """Write tokens and starts of both parts; returns the number of documents of each."""
    config = known.config
    encode = encoder(tokenizer)
    sizes: dict[str, int] = {name: 0 for name in PARTS}
    lengths = dict(sizes)
    total = most if known.counts is None else known.counts.documents
    with contextlib.ExitStack() as opened:
        out = {
            (name, kind): opened.enter_context((part / f"{name}.{kind}").open("wb"))
            for name in PARTS
            for kind in ("tokens", "starts")
        }
        advance = opened.enter_context(progress("tokens", total or 0))
        for some in _together(corpus.documents(config, counts)):
            before = lengths["train"]
            for document, ids in zip(some, encode([d.text for d in some]), strict=True):
                name = PARTS[corpus.is_validation(document.sha, config.validation)]
                out[name, "starts"].write(np.int64(lengths[name]).astype("<i8").tobytes())
                out[name, "tokens"].write(np.asarray(ids, dtype).tobytes())
                lengths[name] += len(ids)
                sizes[name] += 1
                if most is not None and lengths["train"] >= most:
                    break
            advance(len(some) if known.counts is not None else lengths["train"] - before)
            if most is not None and lengths["train"] >= most:
                break
    for name, size in sizes.items():
        if not size:
            raise UserError(
                f"the corpus has no {name} document ({counts.words()}); give more documents, or "
                f"another --data.validation than {config.validation:g}"
            )
    return sizes


def _together(documents: Iterator[corpus.Document]) -> Iterator[list[corpus.Document]]:
    """Documents in lists of about `AT_ONCE` characters."""
    some: list[corpus.Document] = []
    size = 0
    for document in documents:
        some.append(document)
        size += len(document.text)
        if size >= AT_ONCE:
            yield some
            some, size = [], 0
    if some:
        yield some


def encoder(tokenizer: Tokenizer) -> Any:
    """A function of texts: their token ids, after the token that begins a text, before its end.

    Special tokens that a text spells out are text.

    Example:
        >>> tokenizer = train_bpe(["a cat"], 258)
        >>> ids = encoder(tokenizer)(["<eos>"])[0]
        >>> len(ids), ids[-1] == tokenizer.eos_id
        (6, True)
    """
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.encode_special_tokens = True
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    last = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

    def encode(texts: list[str]) -> list[list[int]]:
        found = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [[*first, *one.ids, *last] for one in found]

    return encode


def sha_of(tokens: np.ndarray, starts: np.ndarray) -> str:
    """The sha256 of tokens that are in memory, for `Tokens`."""
    both = (np.ascontiguousarray(tokens), np.ascontiguousarray(starts, "<i8"))
    return digest([tokens.dtype.str, *(hashlib.sha256(x.tobytes()).hexdigest() for x in both)])
