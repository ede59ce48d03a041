"""Ten drawn shapes in the place of clothes, for a first look without any file.

Each is an outline of rectangles on a black ground, with the labels of Fashion-MNIST. Its
brightness, width and pattern are random, so that captions can describe them.
"""

from __future__ import annotations

import numpy as np

from train.data.image_files import Images, Labels

SIDE = 16
CLASSES = 10
# Of each class, rectangles as top, bottom, left and right, in sixteenths of the image.
OUTLINES: tuple[tuple[tuple[int, int, int, int], ...], ...] = (
    ((2, 14, 5, 11), (2, 6, 2, 14)),  # short sleeves
    ((2, 14, 4, 7), (2, 14, 9, 12), (2, 5, 4, 12)),  # two legs
    ((2, 14, 5, 11), (2, 14, 1, 4), (2, 5, 1, 15), (2, 14, 12, 15)),  # long sleeves
    ((1, 7, 6, 10), (7, 15, 4, 12)),  # wide below
    ((1, 15, 3, 8), (1, 15, 9, 13)),  # open in front
    ((11, 14, 2, 14), (7, 11, 6, 8)),  # a sole and a strap
    ((1, 14, 5, 11), (3, 9, 2, 14)),  # middle sleeves
    ((9, 13, 1, 15), (6, 9, 1, 8)),  # low
    ((6, 14, 2, 14), (2, 6, 5, 6), (2, 6, 10, 11), (2, 3, 5, 11)),  # a handle
    ((2, 14, 3, 8), (10, 14, 3, 14)),  # high
)


def draw_shapes(train: int = 400, held_out: int = 100, seed: int = 0) -> Images:
    """Images of shapes, as many of each class.

    Args:
        train: the number of images of each class to train on.
        held_out: the number of images of each class to test on.
        seed: the seed of all differences between images of a class.

    Example:
        >>> found = draw_shapes(20, 10)
        >>> found.train.images.shape, found.held_out.labels.tolist()
        ((20, 16, 16, 1), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    generator = np.random.default_rng(seed)

    def part(count: int) -> Labels:
        labels = np.arange(count) % CLASSES
        return Labels(np.stack([_drawn(int(c), generator) for c in labels]), labels)

    return Images(part(train), part(held_out))


def _drawn(label: int, generator: np.random.Generator) -> np.ndarray:
    light, narrower, contrast = generator.uniform((0.5, 0.0, 0.0), (1.0, 0.25, 0.4))
    image = np.zeros((SIDE, SIDE))
    for top, bottom, left, right in OUTLINES[label]:
        shift = round(narrower * (right - left) / 2)
        image[top:bottom, left + shift : max(right - shift, left + shift + 1)] = light
    image[:, ::2] *= 1 - contrast  # stripes
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)[..., None]
