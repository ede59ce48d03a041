"""Erasing a concept in closed form: an edit of the inputs of cross-attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_unlearn.concepts import rece, uce
from models.diffusion.denoiser import TEXT, UNET
from models.files.weights import flatten, insert
from train.data import captions
from train.data.captions import Noun
from train.engine.run import Work, compute
from train.jobs.diffusing import prompts
from train.jobs.diffusing.held import Painter
from train.jobs.job import Started
from train.runtime.sharding import put_params
from train.tasks import erasure as methods

EDITED = ("attn2/to_k/kernel", "attn2/to_v/kernel")


def edited(started: Started, original: Painter) -> Painter:
    """The model after a closed-form edit of the kernels that cross-attention reads with."""
    erase, found = started.config.erase, started.rows
    target = found.class_of(erase.concept)
    noun = found.nouns[target]
    others = [(n, i) for c, n in enumerate(found.nouns) if c != target for i in range(4)]
    made: Any = compute(
        started.run,
        "erased",
        edit,
        kind=erase.name,
        version=2,
        like=original.denoiser,  # pyright: ignore[reportArgumentType]
        model=original.denoiser,
        erase=chosen_rows(original, [(noun, 0)], erase.positions),
        guide=guides(original, noun, erase),
        preserve=chosen_rows(original, others, erase.positions),
        options=erase,
    )
    return original._replace(denoiser=made)


def texts_of(noun: Noun, name: int) -> list[str]:
    """A name by itself, in every template, with every word for an attribute, at every place.

    Without these words, UCE left "a wide sneaker" as it was.
    """
    said = captions.phrase(noun, name)
    words = [word for pair in captions.ATTRIBUTES.values() for word in pair]
    templates = itertools.cycle(captions.TEMPLATES)
    return [
        noun.names[name],
        *(t.format(said) for t in captions.TEMPLATES),
        *(next(templates).format(captions.phrase(noun, name, [word])) for word in words),
        *(f"{next(templates).format(said)} {place}" for place in captions.PLACES),
    ]


def chosen_rows(
    painter: Painter, nouns: Sequence[tuple[Noun, int]], positions: str
) -> list[list[list[int]]]:
    """The prompts for names, each as its token ids and the positions of the chosen states."""
    texts = [(text, noun, name) for noun, name in nouns for text in texts_of(noun, name)]
    rows = prompts.encode(painter.tokenizer, [text for text, _, _ in texts], painter.length)
    found = []
    for (_, noun, name), tokens, last in zip(texts, rows.tokens, rows.last, strict=True):
        size = len(painter.tokenizer.encode(noun.names[name]))
        first = {"last": int(last), "onward": int(last) - size + 1, "all": 0}[positions]
        behind = int(last) + 1 if positions == "last" else painter.length
        found.append([tokens.tolist(), list(range(first, behind))])
    return found


def guides(painter: Painter, noun: Noun, erase: Any) -> list[list[list[int]]]:
    """The states that each of the erased states shall read as, as token ids and positions.

    The empty prompt's state for the last word is its first one, as published.
    """
    mine = chosen_rows(painter, [(noun, 0)], erase.positions)
    if not erase.towards:
        empty = prompts.encode(painter.tokenizer, [""], painter.length).tokens[0].tolist()
        if erase.positions == "last":
            return [[empty, [0]] for _ in mine]
        return [[empty, places] for _, places in mine]
    other = noun._replace(names=(erase.towards,) * 4)
    found = chosen_rows(painter, [(other, 0)], erase.positions)
    # Names of another length: their states are paired from the first one on, the last one repeats.
    return [
        [tokens, [there[min(i, len(there) - 1)] for i in range(len(places))]]
        for (_, places), (tokens, there) in zip(mine, found, strict=True)
    ]


def edit(work: Work, model: Any, erase: Any, guide: Any, preserve: Any, options: Any) -> Any:
    """The parameters of a denoiser whose cross-attention reads a concept as its guides.

    The kernels of keys and values are edited in closed form.
    """
    params = model.to_device().params
    text = model.model.text

    def states(rows: Any) -> jax.Array:
        ids = jnp.asarray([tokens for tokens, _ in rows], jnp.int32)
        found = jax.jit(text.apply)(params[TEXT], ids)
        return jnp.concatenate([found[i, jnp.asarray(p)] for i, (_, p) in enumerate(rows)])

    flat = flatten(params[UNET])
    kernels = {name: leaf for name, leaf in flat.items() if name.endswith(EDITED)}
    asked = tuple(states(rows).astype(jnp.float32) for rows in (erase, guide, preserve))
    weights = {
        "keep": options.keep,
        "erase_weight": options.erase_weight,
        "preserve_weight": options.preserve_weight,
    }
    if isinstance(options, methods.RECE):
        weights |= {"rounds": options.rounds, "adversarial_keep": options.adversarial_keep}
        weights |= {"again": options.again}
        changed = rece(kernels, *asked, **weights)
    else:
        changed = uce(kernels, *asked, **weights)
    tree: dict[str, Any] = {}
    for name, leaf in (flat | changed).items():
        insert(tree, name, leaf)
    return put_params({**params, UNET: tree}, work.mesh, model.learner.rules)
