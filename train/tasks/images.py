"""Images and their classes: Fashion-MNIST, and images of one's own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxlib_unlearn.errors import UserError
from train.data.image_files import Images, Labels, read_images
from train.data.images import image_pools
from train.data.labelled import Pools, Record
from train.tasks import image_kinds
from train.tasks.labelled import Labelled, Row

# The folder of Debian's package dataset-fashion-mnist.
FASHION = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker"),
    *("Bag", "Ankle boot"),
)
TESTED = 360  # the number of digits, the last ones, to test on


def as_it_is(record: Record) -> Row:
    """The row of a record, which is the record."""
    return dict(record)


def read_fashion(data: Any) -> Pools:
    """`--data.path`, else Debian's package of Fashion-MNIST, else scikit-learn's digits.

    The pieces of clothing have their names in Debian's package alone.

    Raises:
        UserError: none of them is there, or the files cannot be read.
    """
    if data.path is not None and data.path.expanduser() != FASHION:
        return read_own(data)  # of unknown classes, also where there are ten
    if FASHION.is_dir():
        return image_pools(read_images(FASHION), "Fashion-MNIST", CLOTHES)
    place = f"scikit-learn's digits, since there is no Fashion-MNIST in {FASHION}"
    return image_pools(read_digits(), place)


def read_digits() -> Images:
    """The 1797 digits of 8 x 8 pixels that scikit-learn brings along; the last 360 to test on.

    Raises:
        UserError: it is not installed.
    """
    try:
        digits = importlib.import_module("sklearn.datasets").load_digits()
    except ImportError:
        raise UserError(
            f"no Fashion-MNIST in {FASHION}, and no scikit-learn, whose digits would take its "
            "place; install Debian's package dataset-fashion-mnist or scikit-learn, or give "
            "--data.path"
        ) from None
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = np.asarray(digits.target, np.int64)
    return Images(
        Labels(pixels[:-TESTED], labels[:-TESTED]), Labels(pixels[-TESTED:], labels[-TESTED:])
    )


def read_own(data: Any) -> Pools:
    """The images of `--data.path`.

    Raises:
        UserError: there is none.
    """
    if data.path is None:
        raise UserError(
            "--task images reads images of your own: give --data.path, a folder with a folder of "
            "PNG files for each class (in train and test, where there are both), of IDX files, or "
            "a .npz file"
        )
    return image_pools(read_images(data.path, data.resize), data.path.name)


ROWS = (
    Labelled(
        "fashion-mnist",
        "which piece of clothing it is (Debian's dataset-fashion-mnist; else digits)",
        image_kinds.CLASSES,
        read_fashion,
        as_it_is,
    ),
    Labelled(
        "images",
        "images of your own: PNG folders, IDX or .npz",
        image_kinds.CLASSES,
        read_own,
        as_it_is,
    ),
)
