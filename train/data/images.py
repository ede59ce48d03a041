"""Images as rows and as a stream: pixels stay uint8 until the model normalises them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxlib_unlearn.errors import UserError
from train.data.batches import shuffled
from train.data.image_files import Images, Labels
from train.data.labelled import Pools


@dataclass(frozen=True, eq=False)
class Picture:
    """The image of a row.

    As text it is the sha256 of its shape and pixels, which stands for it in digests of rows.

    Args:
        pixels: uint8 `(H, W, C)`.
    """

    pixels: np.ndarray

    def __str__(self) -> str:
        shape = np.asarray(self.pixels.shape, "<i4").tobytes()
        return hashlib.sha256(shape + self.pixels.tobytes()).hexdigest()


@dataclass(frozen=True)
class Names:
    """The names of the classes, which all rows share; as text, their sha256."""

    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.words)

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __str__(self) -> str:
        return hashlib.sha256("\0".join(self.words).encode()).hexdigest()


def image_pools(found: Images, place: str, names: Sequence[str] | None = None) -> Pools:
    """A data set of images as records with `image`, `options` (the classes) and `gold`.

    Args:
        found: the images.
        place: the name of their source.
        names: the names of the classes, where the data has none and their numbers agree.
    """
    parts = [part for part in (found.train, found.held_out) if part is not None]
    count = max(int(part.labels.max()) for part in parts) + 1
    known = found.names
    if known is None:
        fits = names is not None and len(names) == count
        known = tuple(names) if fits and names is not None else tuple(map(str, range(count)))
    options = Names(known)

    def records(part: Labels) -> list[dict]:
        pairs = zip(part.images, part.labels.tolist(), strict=True)
        return [{"image": Picture(x), "options": options, "gold": gold} for x, gold in pairs]

    held = None if found.held_out is None else records(found.held_out)
    return Pools(records(found.train), held, place)


def check_image(pixels: np.ndarray, shape: tuple[int, int, int], resize: bool, where: str) -> None:
    """Raise `UserError` for an image that the model cannot read.

    Args:
        pixels: the image.
        shape: the shape of the model's images, `(H, W, C)`.
        resize: whether it may be brought to that shape.
        where: the name of the image, for the message.
    """
    if pixels.shape == shape or resize:
        return

    def words(shape: tuple[int, ...]) -> str:
        return f"{shape[0]} x {shape[1]} pixels in {'grey' if shape[2] == 1 else 'colour'}"

    raise UserError(
        f"{where}: an image of {words(pixels.shape)}, the model reads {words(shape)}; give "
        "--data.resize, other images or another model"
    )


def resized(pixels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """An image in the size and the colours of a model, bilinear as its published preprocessing.

    Args:
        pixels: uint8 `(H, W, C)`.
        shape: the wanted shape.

    Example:
        >>> resized(np.full((2, 2, 1), 7, np.uint8), (4, 4, 3)).shape
        (4, 4, 3)
    """
    if pixels.shape == shape:
        return pixels
    from PIL import Image

    height, width, channels = shape
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image = image.convert("L" if channels == 1 else "RGB")
    found = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return found.reshape(shape)


@dataclass(frozen=True)
class Pictures:
    """A stream of images with their classes.

    Args:
        images: uint8 `(H, W, C)` each.
        gold: the number of each image's class.
        wanted: the shape of the images in a batch, to which others are resized.
        follows: None, since it follows no other stream.
    """

    images: Sequence[np.ndarray]
    gold: np.ndarray
    wanted: tuple[int, int, int]
    follows: str | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def identity(self) -> str:
        """sha256 of images and classes, and of the shape in a batch."""
        found = hashlib.sha256(repr(self.wanted).encode() + self.gold.astype("<i8").tobytes())
        for pixels in self.images:
            found.update(repr(pixels.shape).encode())
            found.update(pixels.tobytes())
        return found.hexdigest()

    def epoch_order(self, seed: int, name: str, epoch: int) -> np.ndarray:
        """All rows, shuffled."""
        return shuffled(seed, name, epoch, len(self))

    def shape(self, rows: np.ndarray) -> tuple[int, ...]:
        """Nothing is padded."""
        return ()

    def batch(
        self, rows: np.ndarray, shape: tuple[int, ...] = (), step: int = 0
    ) -> dict[str, np.ndarray]:
        """`image` uint8 `(B, H, W, C)`, `gold` and `row_id` int32 `(B,)`."""
        del shape, step
        return {
            "image": np.stack([resized(self.images[i], self.wanted) for i in rows]),
            "gold": self.gold[rows].astype(np.int32),
            "row_id": np.asarray(rows, np.int32),
        }
