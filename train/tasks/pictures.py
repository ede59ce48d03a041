"""The images of a run with their classes, captions and measured attributes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlib_unlearn.errors import UserError
from train.data import captions
from train.data.captions import Noun
from train.data.image_files import Images, Labels, read_images
from train.data.shapes import draw_shapes
from train.tasks.images import FASHION, read_digits

NOUNS: dict[str, tuple[Noun, ...]] = {
    "fashion": captions.CLOTHES,
    "digits": captions.DIGITS,
    "shapes": captions.CLOTHES,
    "objects": captions.OBJECTS,
}


class Part(NamedTuple):
    """Images of one size, uint8 `(N, H, W, C)`, and the numbers of their classes, `(N,)`."""

    images: np.ndarray
    labels: np.ndarray


class Pictures(NamedTuple):
    """The images of a run.

    Args:
        train: the images to train on; None: the run has no images of its own.
        test: the images to judge by, of the same size.
        nouns: the classes in words.
        borders: the borders of attributes that `captions.thirds` gives; None without images.
        place: the place that they come from.
    """

    train: Part | None
    test: Part | None
    nouns: tuple[Noun, ...]
    borders: np.ndarray | None
    place: str

    def digest(self) -> str:
        """The sha256 of images and classes."""
        made = hashlib.sha256(repr(self.nouns).encode())
        for part in (self.train, self.test):
            for array in part or ():
                made.update(np.ascontiguousarray(array).tobytes())
        return made.hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and colours of an image."""
        assert self.train is not None
        height, width, colours = self.train.images.shape[1:]
        return height, width, colours

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes."""
        return tuple(noun.names[0] for noun in self.nouns)

    def class_of(self, concept: str) -> int:
        """The number of a class, by its first name.

        Raises:
            UserError: the data has no such class.
        """
        if concept in self.names:
            return self.names.index(concept)
        for noun in self.nouns:
            if concept in noun.names:
                raise UserError(
                    f"concept {concept!r} is another name of {noun.names[0]!r}; give that"
                )
        from train.runtime import suggest

        suggest.choose(concept, dict.fromkeys(self.names), "concept")
        raise AssertionError


def load(config: Any, multiple: int) -> Pictures:
    """The images of `--data.*`, with a black border so that `multiple` divides their sides.

    Raises:
        UserError: there are none, they cannot be read, or their classes are not those of the
            source.
    """
    nouns = NOUNS[config.source]
    found, place = _read(config)
    if found is None:
        return Pictures(None, None, nouns, None, place)
    both = _both(found, place)
    most = (config.train_rows, config.test_rows)
    train, test = (
        Part(_padded(part.images[:count], multiple, place), part.labels[:count])
        for part, count in zip(both, most, strict=True)
    )
    count = int(max(train.labels.max(), test.labels.max())) + 1
    if count != len(nouns):
        raise UserError(
            f"{place}: {count} classes of images; captions are written for the {len(nouns)} of "
            f"--data.source {config.source} ({', '.join(n.names[0] for n in nouns)})"
        )
    measured = captions.measure(train.images / np.float32(255))
    borders = captions.thirds(measured, train.labels, len(nouns))
    return Pictures(train, test, nouns, borders, place)


def _read(config: Any) -> tuple[Images | None, str]:
    """The images as they are stored, and their place."""
    if config.path is not None:
        found = read_images(config.path)
        return _ordered(found, config), config.path.name
    if config.source == "fashion":
        if not FASHION.is_dir():
            raise UserError(
                f"no Fashion-MNIST in {FASHION}; install Debian's package dataset-fashion-mnist, "
                "give its files (--data.path), or --data.source digits"
            )
        return read_images(FASHION), "Fashion-MNIST"
    if config.source == "digits":
        return read_digits(), "scikit-learn's digits"
    if config.source == "shapes":
        return draw_shapes(), "drawn shapes"
    return None, "no images"


def _ordered(found: Images, config: Any) -> Images:
    """Images in folders named as the classes, in the order of the classes."""
    if found.names is None:
        return found
    names = [noun.names[0] for noun in NOUNS[config.source]]
    known = [name.lower().replace("_", " ") for name in found.names]
    odd = [name for name in known if name not in names]
    if odd:
        raise UserError(
            f"--data.path {config.path}: class {odd[0]!r} is none of --data.source "
            f"{config.source} ({', '.join(names)}); name the folders so"
        )
    places = np.array([names.index(name) for name in known])
    parts = [
        None if part is None else Labels(part.images, places[part.labels])
        for part in (found.train, found.held_out)
    ]
    assert parts[0] is not None
    return Images(parts[0], parts[1])


def _both(found: Images, place: str) -> tuple[Labels, Labels]:
    """The images to train on and to test on; without own test images every fifth of a class."""
    if found.held_out is not None:
        return found.train, found.held_out
    images, labels = found.train
    rank = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        rank[labels == label] = np.arange(np.sum(labels == label))
    held = rank % 5 == 4
    if not held.any():
        raise UserError(f"{place}: {len(labels)} images, of no class five; give more")

    def part(which: np.ndarray) -> Labels:
        return Labels([images[i] for i in np.flatnonzero(which).tolist()], labels[which])

    return part(~held), part(held)


def _padded(images: Sequence[np.ndarray] | np.ndarray, multiple: int, place: str) -> np.ndarray:
    """Square images, uint8 `(N, H, W, C)`, with sides that `multiple` divides."""
    images = np.stack(list(images))
    height, width = images.shape[1:3]
    if height != width:
        raise UserError(f"{place}: images of {height} x {width} pixels; give square ones")
    side = -(-height // multiple) * multiple
    before = (side - height) // 2
    both = (before, side - height - before)
    return np.pad(images, ((0, 0), both, both, (0, 0)))


def captions_of(pictures: Pictures, seed: int) -> list[str]:
    """A caption of every image that is trained on."""
    assert pictures.train is not None and pictures.borders is not None
    measured = captions.measure(pictures.train.images / np.float32(255))
    words = captions.words_for(measured, pictures.train.labels, pictures.borders)
    return [
        captions.caption(pictures.nouns[label], mine, seed, "captions", i).text
        for i, (label, mine) in enumerate(zip(pictures.train.labels.tolist(), words, strict=True))
    ]
