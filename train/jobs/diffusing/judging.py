"""Judging text-to-image models: their prompts, their images, and the judge's view of these."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlib_unlearn.metrics.images import frechet_distance
from train.data import captions
from train.data.captions import Noun
from train.engine.run import Run
from train.evaluators import concept
from train.evaluators.base import OtherContext
from train.evaluators.concept import IMAGES
from train.jobs.diffusing import drawing, judges
from train.jobs.diffusing.drawing import Shield, Wanted
from train.jobs.diffusing.held import Painter
from train.jobs.diffusing.judges import Judge
from train.options.config import to_json
from train.runtime import files
from train.runtime.stages import digest, json_stage
from train.tasks.erasure import PLACEHOLDER
from train.tasks.pictures import Pictures

SIDE = 64  # the longest side of an image in a log
VERSION = 1


class Tokens(NamedTuple):
    """The tokens that an attack found.

    Args:
        embeddings: the embeddings of the tokens, `(K, d)`.
        words: the words of each token with their coefficients, the largest first; empty
            without words.
        shares: the cosine of each token with its first words' combination; None without words.
    """

    embeddings: np.ndarray
    words: tuple[tuple[tuple[str, float], ...], ...] = ()
    shares: tuple[float, ...] | None = None


class Shown(NamedTuple):
    """A model to judge, possibly attacked or defended.

    Args:
        painter: the model.
        tokens: the tokens that an attack writes into prompts; None: there are none.
        shield: the defence at the look-up, if any.
    """

    painter: Painter
    tokens: Tokens | None = None
    shield: Shield | None = None

    @property
    def params(self) -> Any:
        """The parameters of the model."""
        return self.painter.params

    @property
    def sha(self) -> str:
        """The sha256 of the model's parameters."""
        return self.painter.sha

    def identity(self) -> dict[str, Any]:
        """The inputs that its images depend on, as JSON values."""
        found: dict[str, Any] = self.painter.identity()
        if self.tokens is not None:
            found["tokens"] = sha_of(self.tokens.embeddings)
        if self.shield is not None:
            found["shield"] = [sha_of(self.shield.basis), list(self.shield.spare)]
        return found


def sha_of(array: np.ndarray) -> str:
    """sha256 of an array's shape and values, in float32."""
    found = np.ascontiguousarray(array, np.float32)
    return hashlib.sha256(repr(found.shape).encode() + found.tobytes()).hexdigest()


class Asked(NamedTuple):
    """The options by which the models of a run are judged.

    Args:
        run: the run that stores the results.
        judge: the classifier.
        pictures: the real images, and the classes in words.
        concept: the number of the class that was erased; None: none was.
        draw: the options `--draw.*`.
        seed: the seed of prompts and noise.
        known: other run folders, in which the same images may have been judged already.
    """

    run: Run
    judge: Judge
    pictures: Pictures
    concept: int | None
    draw: Any
    seed: int
    known: tuple[Path, ...] = ()


def rows_of(asked: Asked, model: Shown, kinds: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The prompts of each kind.

    Image i of a class has the same noise and, but for the name, the same prompt in every kind.
    """
    nouns, count = asked.pictures.nouns, asked.draw.images

    def row(noun: Noun, label: int, name: int, i: int, **more: Any) -> dict[str, Any]:
        made = captions.prompt(noun, name, asked.seed, "prompts", nouns[label].names[0], i)
        number = label * IMAGES + i
        found = {"prompt": made.text, "class": label, "number": number}
        return found | {"attributes": dict(made.attributes), **more}

    found: dict[str, list[dict[str, Any]]] = {}
    target = asked.concept
    if target is not None:
        noun = nouns[target]
        bare = noun._replace(names=(PLACEHOLDER,) * 4)
        found["explicit"] = [row(noun, target, 0, i) for i in range(count)]
        found["names"] = [row(noun, target, 1 + i % 3, i) for i in range(count)]
        tokens = 0 if model.tokens is None else len(model.tokens.embeddings)
        found["attacked"] = [
            row(bare, target, 0, i, token=k) for k in range(tokens) for i in range(count)
        ]
        found["words"] = [row(noun, target, k, i, token=k) for k in (1, 2, 3) for i in range(count)]
    found["kept"] = [
        row(noun, label, 0, i)
        for label, noun in enumerate(nouns)
        if label != target
        for i in range(count)
    ]
    return {kind: found[kind] for kind in kinds if found.get(kind)}


@dataclass
class DrawnContext(OtherContext):
    """The context of the evaluators of one model, see `train.evaluators.concept.Drawings`."""

    asked: Asked
    model: Shown
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    name: str
    judge: Any = None
    log: dict[str, Any] = field(default_factory=dict)
    found: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The options `--draw.*`."""
        return self.asked.draw

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.asked.pictures.names

    @property
    def concept(self) -> int | None:
        """The number of the class that was erased."""
        return self.asked.concept

    @property
    def known_words(self) -> frozenset[str]:
        """The words of the erased class's names, and those for attributes."""
        if self.asked.concept is None:
            return frozenset()
        noun = self.asked.pictures.nouns[self.asked.concept]
        found = {word for name in noun.names for word in captions.split(name)}
        return frozenset(found | {word for pair in captions.ATTRIBUTES.values() for word in pair})

    def drawn(self, kind: str) -> dict[str, Any]:
        """The images of a kind of prompt, judged: `items`, and their `frechet` distance."""
        return self.once(kind, lambda: _drawn(self, kind))


def inputs_of(asked: Asked, model: Shown, kinds: Sequence[str]) -> dict[str, Any]:
    """Everything that the per-image log of a model depends on."""
    return {
        **model.identity(),
        **_judged_by(asked),
        "rows": digest(rows_of(asked, model, kinds)),
        "words": None if model.tokens is None else model.tokens.words,
        "concept": asked.concept,
        "evaluator": concept.ROW.version,
    }


def log_of(asked: Asked, model: Shown, kinds: Sequence[str], name: str) -> Mapping[str, Any]:
    """The per-image log of a model.

    Images are stored kind by kind: a run that was stopped continues after the last one, and
    the same images are found in another run's folder.
    """
    rows = rows_of(asked, model, kinds)
    return concept.ROW.run(model, rows, DrawnContext(asked, model, rows, name))


def _judged_by(asked: Asked) -> dict[str, Any]:
    test, borders = asked.pictures.test, asked.pictures.borders
    draw = {k: v for k, v in to_json(asked.draw).items() if k != "rows"}
    return {
        "judge": asked.judge.identity(),
        "draw": draw,
        "seed": asked.seed,
        "real": None if test is None else sha_of(test.images),
        "borders": None if borders is None else sha_of(borders),
        "version": VERSION,
    }


def _drawn(context: DrawnContext, kind: str) -> dict[str, Any]:
    """The images of a kind, read from this or another run folder, or drawn."""
    asked, rows, model = context.asked, context.rows[kind], context.model
    shown = model if kind == "attacked" else model._replace(tokens=None)
    inputs = {**shown.identity(), **_judged_by(asked), "kind": kind, "rows": digest(rows)}
    name = f"{kind}-{digest(inputs)[:16]}.json"

    def compute() -> Any:
        for folder in asked.known:
            path = folder / "computed" / name
            if path.is_file() and not files.damaged(path):
                return json.loads(path.read_text(encoding="utf-8"))
        painter = model.painter.to_device()
        embeddings = None
        if shown.tokens is not None:
            embeddings = shown.tokens.embeddings[[row["token"] for row in rows]]
        wanted = Wanted([r["prompt"] for r in rows], [r["number"] for r in rows], embeddings)
        images = drawing.drawn(
            painter,
            wanted,
            asked.draw,
            asked.run.mesh,
            seed=asked.seed,
            shield=shown.shield,
            label=f"{context.name}: draw {kind}",
        )
        return _seen(asked, kind, rows, images)

    path = asked.run.folder / "computed" / name
    return json_stage(path, inputs, compute, asked.run.cache)


def _seen(
    asked: Asked, kind: str, rows: Sequence[Mapping[str, Any]], images: np.ndarray
) -> dict[str, Any]:
    """The log of images: the judged classes and the measured attributes."""
    logits, features = judges.judged(asked.judge, images, asked.run.mesh, asked.draw.rows)
    seen = asked.judge.seen(logits).tolist()
    borders, words = asked.pictures.borders, None
    labels = np.array([row["class"] for row in rows])
    if borders is not None:
        measured = captions.measure(images / np.float32(255))
        words = captions.words_for(measured, labels, borders)
    items = []
    for i, row in enumerate(rows):
        item = {**row, "judged": seen[i], "seed": asked.seed}
        if words is not None:
            item["measured"] = words[i]
        if sum(other["class"] == row["class"] for other in rows[:i]) < asked.draw.shown or (
            "token" in row and row["number"] % IMAGES < asked.draw.shown
        ):
            item["picture"] = png(images[i])
        items.append(item)
    found: dict[str, Any] = {"items": items, "frechet": None}
    test = asked.pictures.test
    if kind == "kept" and test is not None:
        real = np.flatnonzero(np.isin(test.labels, np.unique(labels)))
        _, others = judges.judged(asked.judge, test.images[real], asked.run.mesh, asked.draw.rows)
        found["frechet"] = frechet_distance(features, others)
    return found


def png(image: np.ndarray) -> str:
    """An image as a small PNG file in base64, for a log and a page."""
    from PIL import Image

    made = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    made.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    made.save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode("ascii")
