"""A tokenised corpus on the disk: two memory-mapped arrays a part, and the tokenizer.

Its folder is named after the digest of its inputs, is written under another name and renamed, and
is verified when it is opened: a damaged one, or one with other inputs, is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import one_line
from models import Tokenizer
from train.data import corpus
from train.data.bpe import LONGEST_WORD, train_bpe
from train.runtime import distributed, files
from train.runtime.stages import alone, digest, locked, sweep_killed
from train.runtime.tracking import progress, say

VERSION = 2  # raise it when the same corpus may give other tokens
PARTS = ("train", "validation")
TRAINED_ON = 256 * 2**20  # bytes of training documents that a tokenizer is trained on at most
AT_ONCE = 4 * 2**20  # characters that are tokenised at once


class Tokens(NamedTuple):
    """The tokens of one part of a corpus.

    Args:
        tokens: the tokens of all documents in their order, (n,) uint16 or uint32.
        starts: the index at which each document begins, (documents,) int64, ascending from 0.
        sha: sha256 of both.
    """

    tokens: np.ndarray
    starts: np.ndarray
    sha: str


class Tokenised(NamedTuple):
    """A corpus as tokens, its tokenizer, and the line about its documents."""

    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer
    words: str


def tokenised(
    known: corpus.Known, vocab_size: int, cache: Path, given: Tokenizer | None, most: int | None
) -> Tokenised:
    """The tokens of a corpus, from `cache`; they are made there if they are missing or damaged.

    Args:
        known: the corpus (`corpus.identify`).
        vocab_size: the size of a tokenizer that is trained.
        cache: a local folder that runs share.
        given: the tokenizer; None: one is trained on the training documents.
        most: training tokens after which reading stops; None: all are read.

    Raises:
        UserError: the corpus cannot be read or is no longer the one that was identified, or `cache`
            cannot be written.
    """
    config = known.config
    inputs = {
        "version": VERSION,
        "corpus": config.digest,
        "validation": config.validation,
        "most": most,
        "tokenizer": ["train", vocab_size, LONGEST_WORD] if given is None else identity_of(given),
    }
    folder = cache / digest(inputs)[:16]

    def make() -> bool:
        found = read(folder, inputs)
        if found is None:
            write(folder, known, vocab_size, given, most, inputs)
        return found is not None

    with alone(folder, "tokens", "--data.cache"):
        if distributed.of_first(make):
            say(f"tokens: found in {folder}")
        distributed.of_first(lambda: sweep_killed(cache))
    with distributed.together():
        found = read(folder, inputs)
        if found is None and not distributed.is_first():
            # Another host, which does not share the folder; one of its processes makes it.
            with locked(folder, "tokens", "--data.cache"):
                make()
            found = read(folder, inputs)
        if found is None:
            raise UserError(f"{folder} was damaged as it was written; run again")
    return found


def identity_of(tokenizer: Tokenizer) -> str:
    """sha256 of everything that the tokens of a text depend on."""
    return digest([tokenizer.backend.to_str(), tokenizer.bos_id, tokenizer.eos_id])


def read(folder: Path, inputs: dict[str, Any]) -> Tokenised | None:
    """The content of a folder; None where there is none, or, with a message, where it is damaged.

    A folder that was not made from `inputs` counts as damaged.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = files.opened(path.read_bytes())
        if manifest is None:
            raise ValueError("its manifest does not match its CRC-32")
        if manifest["inputs"] != inputs:
            raise ValueError("it was made from something else")
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
        UserError: the corpus cannot be read or has changed, or the folder cannot be written.
    """
    part = files.part_of(folder)
    try:
        part.mkdir(parents=True)
        tokenizer = trained(known, vocab_size) if given is None else given
        dtype = np.dtype("<u2" if tokenizer.largest_id < 2**16 else "<u4")
        sizes, counts = _write_parts(part, known, tokenizer, dtype, most)
        (part / "tokenizer").mkdir()
        tokenizer.save(part / "tokenizer")
        manifest = {
            "inputs": inputs,
            "dtype": dtype.str,
            "documents": sizes,
            "words": counts.words(),
            "sha256": files.sums(part),
        }
        (part / "manifest.json").write_text(files.sealed(manifest))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        files.put(part, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return  # another run was first, on a file system without locks
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
        with progress(
            "tokenizer (MiB read)", min(total or TRAINED_ON, TRAINED_ON) >> 20
        ) as advance:
            for document, size, _ in _counted(config, corpus.Counts()):
                if not corpus.is_validation(document.sha, config.validation):
                    before, read = read, read + size
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
) -> tuple[dict[str, int], corpus.Counts]:
    """Write tokens and starts of both parts; returns the documents of each, and the counts.

    A stream ends at `most` training tokens, or at the first held-out document behind them.
    """
    config = known.config
    encode = encoder(tokenizer)
    sizes: dict[str, int] = {name: 0 for name in PARTS}
    lengths = dict(sizes)
    total = most if known.counts is None else known.counts.documents
    read, used, whole, ended = corpus.Counts(), corpus.Counts(), hashlib.sha256(), True
    with contextlib.ExitStack() as opened:
        out = {
            (name, kind): opened.enter_context((part / f"{name}.{kind}").open("wb"))
            for name in PARTS
            for kind in ("tokens", "starts")
        }
        advance = opened.enter_context(progress("tokens", total or 0))
        for some in _together(_counted(config, read)):
            before = lengths["train"]
            together = encode([document.text for document, _, _ in some])
            for (document, size, so_far), ids in zip(some, together, strict=True):
                whole.update(document.sha)
                name = PARTS[corpus.is_validation(document.sha, config.validation)]
                full = most is not None and lengths["train"] >= most
                if full and name == "train":
                    continue
                out[name, "starts"].write(np.int64(lengths[name]).astype("<i8").tobytes())
                out[name, "tokens"].write(np.asarray(ids, dtype).tobytes())
                lengths[name] += len(ids)
                sizes[name] += 1
                used = dataclasses.replace(
                    so_far, documents=used.documents + 1, num_bytes=used.num_bytes + size
                )
                full = most is not None and lengths["train"] >= most
                ended = not (full and sizes["validation"])
                if not ended:
                    break
            advance(len(some) if known.counts is not None else lengths["train"] - before)
            if not ended:
                break
    if ended and most is None:
        used = read
    if known.counts is not None and ended and whole.hexdigest() != config.digest:
        raise UserError(
            f"the corpus changed while it was read (sha256 {str(config.digest)[:16]}…, then "
            f"{whole.hexdigest()[:16]}…); run again when nothing writes its files"
        )
    for name, size in sizes.items():
        if not size:
            raise UserError(
                f"the corpus has no {name} document ({used.words()}); give more documents, or "
                f"another --data.validation than {config.validation:g}"
            )
    return sizes, used


Counted = tuple[corpus.Document, int, corpus.Counts]


def _counted(config: corpus.CorpusConfig, counts: corpus.Counts) -> Iterator[Counted]:
    """Documents, each with its size in bytes and with the counts after it was read."""
    before = 0
    for document in corpus.documents(config, counts):
        size, before = counts.num_bytes - before, counts.num_bytes
        yield document, size, dataclasses.replace(counts)


def _together(documents: Iterator[Counted]) -> Iterator[list[Counted]]:
    """Documents in lists of about `AT_ONCE` characters."""
    some: list[Counted] = []
    size = 0
    for one in documents:
        some.append(one)
        size += len(one[0].text)
        if size >= AT_ONCE:
            yield some
            some, size = [], 0
    if some:
        yield some


def encoder(tokenizer: Tokenizer) -> Any:
    """A function from texts to token ids, which begin with the BOS of each text.

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
