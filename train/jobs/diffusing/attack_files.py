"""Tokens that an attack found, in the folder of its run, and the models that they are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn import concepts
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import reading
from models.diffusion.denoiser import TEXT
from train.jobs.diffusing import judges
from train.jobs.diffusing.held import Painter
from train.jobs.diffusing.judging import Tokens, sha_of
from train.jobs.diffusing.stored import Source
from train.jobs.job import Started
from train.runtime import distributed, files
from train.runtime.stages import write_atomic

FILE, TENSORS = "attack.json", "tokens.safetensors"
SHARE = 50  # words whose part in a token is reported


def vocabulary_of(source: Source) -> str:
    """The sha256 of the vocabulary of a run, to which tokens belong."""
    return files.sha256(source.folder / "export" / "tokenizer" / "vocab.json")


def check_vocabulary(vocabulary: str, other: Source, option: str) -> None:
    """Raise `UserError` for a run whose model has another vocabulary."""
    if vocabulary_of(other) != vocabulary:
        raise UserError(
            f"{option} {other.folder}: its model has another vocabulary, whose embeddings mean "
            "something else; give a run that began with the same model"
        )


def embeddings_sha(original: Painter) -> str:
    """sha256 of a model's token embeddings, rounded to bfloat16.

    It is the same of exports in float32 and in bfloat16.

    Args:
        original: the model before a concept was erased; a defence changes embeddings.
    """
    table = jnp.asarray(original.params[TEXT]["embed"]["embedding"])
    return sha_of(np.asarray(table.astype(jnp.bfloat16), np.float32))


def check_embeddings(embeddings: str | None, original: Painter, what: str, where: str) -> None:
    """Raise `UserError` where the words have other embeddings than those that made the tokens.

    Args:
        embeddings: `embeddings_sha` of the model that the tokens are for; None: not known.
        original: the model to use them with, before a concept was erased.
        what: the name of the tokens, for the message.
        where: the name of that model, for the message.
    """
    if embeddings is not None and embeddings != embeddings_sha(original):
        raise UserError(
            f"{what}: its tokens are for a model with other embeddings than that of {where}, "
            "where they mean nothing; give runs that began with the same model"
        )


def write(started: Started, source: Source, original: Painter, found: Tokens | None) -> None:
    """Write `attack.json` and `tokens.safetensors`."""
    from safetensors.numpy import save

    folder, config = started.run.folder, started.config
    embeddings = None if found is None else found.embeddings
    told: dict[str, Any] = {
        "attack": config.attack.name,
        "concept": source.concept,
        "vocabulary_sha256": vocabulary_of(source),
        "embeddings_sha256": embeddings_sha(original),
        "tokens": [],
    }
    if found is not None and embeddings is not None:
        told["tokens_sha256"] = sha_of(embeddings)
        for k, embedding in enumerate(embeddings):
            token: dict[str, Any] = {"norm": float(np.linalg.norm(embedding))}
            if found.words:
                token["words"] = [{"word": w, "alpha": alpha} for w, alpha in found.words[k]]
            if found.shares is not None:
                token[f"share_of_top_{SHARE}"] = found.shares[k]
            told["tokens"].append(token)

    def put() -> None:
        if embeddings is not None:
            basis = np.asarray(concepts.span(embeddings), np.float32)
            data = save({"embeddings": embeddings.astype(np.float32), "basis": basis})
            files.write(folder / TENSORS, data)
        write_atomic(folder / FILE, text := json.dumps(told, indent=1))
        write_atomic(files.key_of(folder / FILE), files.key_text(text))

    distributed.of_first(put)


class Stored(NamedTuple):
    """The tokens of a finished attack.

    Args:
        folder: the folder of its run.
        tokens: the tokens, `(K, d)`, and their words.
        vocabulary: the sha256 of the vocabulary to which they belong.
        embeddings: the sha256 of its embeddings; None: an older attack did not store it.
        concept: the concept that they bring back.
    """

    folder: Path
    tokens: Tokens
    vocabulary: str
    embeddings: str | None
    concept: str


def read(folder: Path | None, option: str) -> Stored:
    """The tokens of a finished attack.

    Raises:
        UserError: there are none, or the files do not read.
    """
    if folder is None:
        raise UserError(f"{option} is missing; give the folder of a run of train.attack")
    folder = folder.expanduser()
    if not (folder / FILE).is_file() or not (folder / "summary.json").is_file():
        raise UserError(f"{option} {folder} is no finished run of train.attack; give one")
    files.check_key(folder / FILE)
    with reading(folder / FILE, "run the command of its run again", "does not read"):
        told = json.loads((folder / FILE).read_text(encoding="utf-8"))
        words = tuple(
            tuple((str(w["word"]), float(w["alpha"])) for w in token.get("words", ()))
            for token in told["tokens"]
        )
        vocabulary, concept, name = (
            str(told[key]) for key in ("vocabulary_sha256", "concept", "attack")
        )
        embeddings = told.get("embeddings_sha256")
        if told["tokens"]:
            sha = str(told["tokens_sha256"])
    if not words:
        raise UserError(
            f"{option} {folder}: attack {name!r} has no tokens to take out; give one of subattack, "
            "cce or random"
        )
    found = judges.read_tensors(folder / TENSORS)["embeddings"]
    if sha_of(found) != sha:
        raise UserError(f"{folder / TENSORS} is damaged; run the command of its run again")
    return Stored(
        folder, Tokens(found, words if any(words) else ()), vocabulary, embeddings, concept
    )


def read_for(source: Source, folder: Path | None, option: str) -> Stored:
    """The tokens of a finished attack, for the model of a run.

    Raises:
        UserError: there are none, or their concept or their vocabulary is another one.
    """
    found = read(folder, option)
    if found.concept != source.concept:
        raise UserError(
            f"{option} {found.folder} brings back {found.concept!r}, RUN {source.folder} erased "
            f"{source.concept!r}; give an attack on that"
        )
    if found.vocabulary != vocabulary_of(source):
        raise UserError(
            f"{option} {found.folder}: its tokens are of another vocabulary than the model of "
            f"{source.folder}; give an attack on it"
        )
    return found
