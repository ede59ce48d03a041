"""Labelled images in files: IDX (as MNIST has it), a folder of PNG files a class, or `.npz`.

A folder may hold images to train on and others to test on: `train-images-idx3-ubyte.gz` and
`t10k-images-idx3-ubyte.gz` with their labels, or the folders `train` and `test`. Pixels are uint8.
"""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import exists, one_line, reading
from models.bounds import host_memory
from train.runtime.tracking import progress

SUFFIXES = (".png", ".jpg", ".jpeg")
TRAIN, HELD_OUT = "train", ("test", "t10k", "validation", "val")
MOST_CLASSES = 100_000
IDX = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx\d-ubyte(\.gz)?$")
MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB", "LA": "L", "CMYK": "RGB"}


class Labels(NamedTuple):
    """Images with their classes.

    Args:
        images: uint8 `(H, W, C)` each, with one or three channels; an array where all are of one
            size.
        labels: the number of each image's class.
    """

    images: Sequence[np.ndarray] | np.ndarray
    labels: np.ndarray


class Images(NamedTuple):
    """A data set of images.

    Args:
        train: the images to train on; all images where none are held out.
        held_out: the images to test on; None: the data set is one pool.
        names: the names of the classes; None: classes have only numbers.
    """

    train: Labels
    held_out: Labels | None
    names: tuple[str, ...] | None = None


def read_images(path: Path, mixed: bool = False) -> Images:
    """The images of a folder or of a `.npz` file.

    Args:
        path: the path given by `--data.path`.
        mixed: whether images of several sizes are accepted.

    Raises:
        UserError: nothing there, a file that is damaged, a class without an image, or images of
            several sizes.
    """
    path = path.expanduser()
    if not exists(path, "give another --data.path"):
        raise UserError(f"--data.path {path} does not exist; give a folder of images")
    if path.suffix == ".npz":
        found = _read_npz(path)
    elif not path.is_dir():
        raise UserError(
            f"--data.path {path} is no folder and no .npz file; give a folder of IDX files, or one "
            "with a folder of PNG files for each class"
        )
    elif any(IDX.search(file.name) for file in path.iterdir()):
        found = _read_idx_folder(path)
    else:
        found = _read_class_folders(path, mixed)
    check_classes(found, path)
    return found


def check_classes(found: Images, where: object) -> None:
    """Raise `UserError` for fewer than two classes, or one without an image to train on."""
    known = found.names
    tops = [part.labels.max(initial=-1) for part in (found.train, found.held_out) if part]
    count = int(max(tops)) + 1 if known is None else len(known)
    if not 2 <= count <= MOST_CLASSES:
        raise UserError(f"{where}: {count} class(es) of images; give two or more")
    empty = np.flatnonzero(np.bincount(found.train.labels, minlength=count) == 0)
    if len(empty):
        name = empty[0] if known is None else known[empty[0]]
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(
            f"{where}: class {name}{more} has no image to train on; add some, or number the "
            "classes without a gap"
        )


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file, which may be compressed.

    Raises:
        UserError: it is truncated, damaged, or of another kind.
    """
    with reading(path, "download it again", "truncated or damaged"):
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            magic = file.read(4)
            if magic[:3] != b"\0\0\x08" or len(magic) < 4:
                raise ValueError("no IDX file of bytes")
            header = file.read(4 * magic[3])
            sizes = [int(n) for n in np.frombuffer(header[: len(header) // 4 * 4], ">i4")]
            need = math.prod(sizes)
            if len(sizes) != magic[3] or min(sizes, default=-1) < 0:
                raise ValueError(f"{4 + len(header)} bytes, no whole header")
            _check_room(need, path)
            data = file.read(need + 1)  # a small file may unpack to more than memory holds
        if len(data) != need:
            before = len(magic) + len(header)
            found = f"{before + len(data)} bytes" if len(data) < need else "more bytes"
            raise ValueError(f"{found}, its header tells of {before + need}")
        return np.frombuffer(data, np.uint8).reshape(sizes)


def _check_room(needed: int, where: object) -> None:
    """Raise `UserError` when `needed` bytes do not fit in this host's memory."""
    there = host_memory()
    if there is not None and needed > there:
        raise UserError(
            f"{where}: its arrays take {needed / 2**30:,.1f} GiB, this host has "
            f"{there / 2**30:,.1f} GiB of memory; give fewer or smaller images"
        )


def _read_idx_folder(path: Path) -> Images:
    found: dict[tuple[bool, str], Path] = {}
    for file in sorted(path.iterdir()):
        if match := IDX.search(file.name):
            key = match[1] == "train", match[2]
            if key in found and found[key].name.removesuffix(".gz") != file.name.removesuffix(
                ".gz"
            ):
                raise UserError(
                    f"{path}: both {found[key].name} and {file.name}; keep one data set in a folder"
                )
            found.setdefault(key, file)

    def part(train: bool) -> Labels | None:
        files = [found.get((train, what)) for what in ("images", "labels")]
        if files == [None, None]:
            return None
        for file, other, what in zip(files, files[::-1], ("images", "labels"), strict=True):
            if file is None:
                assert other is not None
                raise UserError(f"{path}: no {what} to {other.name}; add their file")
        images, labels = (read_idx(file) for file in files if file is not None)
        return _checked(images, labels, str(files[0]))

    train = part(True)
    if train is None:
        raise UserError(
            f"{path}: no train-images-idx3-ubyte(.gz); add the images to train on, and their labels"
        )
    return Images(train, part(False))


def _checked(images: np.ndarray, labels: np.ndarray, where: str) -> Labels:
    """Arrays as images with their classes."""
    given = images.shape
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(
            f"{where}: images of {images.dtype} {given}; they must be uint8 (images, "
            "height, width), or with a last axis of 1 or 3 colours"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise UserError(
            f"{where}: labels of {labels.dtype} {labels.shape} to {len(images)} images; there must "
            "be a whole number for each"
        )
    if not len(images):
        raise UserError(f"{where}: no images; give a file with some")
    if labels.min() < 0:
        raise UserError(f"{where}: label {labels.min()}; number the classes from 0")
    if labels.max() >= MOST_CLASSES:
        raise UserError(
            f"{where}: label {labels.max()}; number the classes from 0, at most {MOST_CLASSES:,}"
        )
    return Labels(images, labels.astype(np.int64))


NPZ_KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images", "labels", "test_images", "test_labels"),
)


def _read_npz(path: Path) -> Images:
    with reading(path, "write it again with numpy.savez", "cannot be read, truncated or damaged"):
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            there = archive.files
            keys = next((k for k in NPZ_KEYS if set(k[:2]) <= set(there)), None)
            if keys is None:
                listed = one_line(", ".join(there), 120) or "none"
                raise UserError(
                    f"{path}: no x_train and y_train, and no images and labels in it (arrays "
                    f"found: {listed}); name them so"
                )
            used = {f"{key}.npy" for key in (*keys, "names")}
            entries = archive.zip.infolist()  # of which no more is unpacked than they say
            _check_room(sum(e.file_size for e in entries if e.filename in used), path)
            train = _checked(archive[keys[0]], archive[keys[1]], f"{path}, {keys[0]}")
            held_out = None
            if set(keys[2:]) <= set(there):
                held_out = _checked(archive[keys[2]], archive[keys[3]], f"{path}, {keys[2]}")
            names = None
            if "names" in there:
                names = tuple(str(name) for name in archive["names"].tolist())
                most = max(int(part.labels.max()) for part in (train, held_out) if part)
                if most >= len(names):
                    raise UserError(f"{path}: {len(names)} names for {most + 1} classes; add some")
    return Images(train, held_out, names)


def _read_class_folders(path: Path, mixed: bool) -> Images:
    splits = {"train": path}
    if _folders(path / TRAIN):  # without folders of its own it is a class of that name
        splits["train"] = path / TRAIN
        there = [path / name for name in HELD_OUT if (path / name).is_dir()]
        if there:
            splits["held_out"] = there[0]
    listed = {split: _listed(folder) for split, folder in splits.items()}
    names = tuple(listed["train"])
    if "held_out" in listed and set(listed["held_out"]) != set(names):
        odd = sorted(set(listed["held_out"]) ^ set(names))[0]
        raise UserError(f"{path}: class {odd} is not in both parts; give both the same folders")
    total = sum(len(files) for part in listed.values() for files in part.values())
    with progress("read images", total) as advance:
        parts = {
            split: [(name, file, _decoded(file, advance)) for name in names for file in part[name]]
            for split, part in listed.items()
        }
    every = [entry for part in parts.values() for entry in part]
    colours = any(pixels.ndim == 3 for _, _, pixels in every)

    def shaped(pixels: np.ndarray) -> np.ndarray:
        if pixels.ndim == 3:
            return pixels
        return np.repeat(pixels[..., None], 3 if colours else 1, -1)

    first = every[0]
    for _, file, pixels in every:
        if pixels.shape[:2] != first[2].shape[:2] and not mixed:
            raise UserError(
                f"{file}: {size(pixels)} pixels, {first[1]} has {size(first[2])}; bring all images "
                "to one size, or give --data.resize"
            )

    def labels(part: list[tuple[str, Path, np.ndarray]]) -> Labels:
        numbers = np.array([names.index(name) for name, _, _ in part], np.int64)
        return Labels([shaped(pixels) for _, _, pixels in part], numbers)

    held_out = labels(parts["held_out"]) if "held_out" in parts else None
    return Images(labels(parts["train"]), held_out, names)


def size(pixels: np.ndarray) -> str:
    """The size of an image in words.

    Example:
        >>> size(np.zeros((2, 3, 1)))
        '2 x 3'
    """
    return " x ".join(map(str, pixels.shape[:2]))


def _folders(path: Path) -> list[Path]:
    """The folders in one, in the order of their names; none where it is no folder."""
    if not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _listed(folder: Path) -> dict[str, list[Path]]:
    """The images of every class folder, both in the order of their names."""
    classes = _folders(folder)
    if not classes:
        raise UserError(
            f"--data.path {folder} holds neither IDX files nor folders; give a folder of IDX "
            "files, or one with a folder of PNG files for each class"
        )
    found = {}
    for one in classes:
        files = sorted(p for p in one.iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(
                f"{one}: a class without an image ({', '.join(SUFFIXES)}); add some, or remove the "
                "folder"
            )
        found[one.name] = files
    return found


def _decoded(file: Path, advance: Any) -> np.ndarray:
    """The pixels of an image file, uint8 `(H, W)` or `(H, W, 3)`."""
    from PIL import Image

    with reading(file, "replace it, or remove it", "no image that can be read"):
        try:
            with Image.open(file) as image:
                if image.mode not in MODES:
                    raise ValueError(f"mode {image.mode}, in place of 8 bits a colour")
                pixels = np.asarray(image.convert(MODES[image.mode]))
        except (Image.DecompressionBombError, SyntaxError) as error:
            raise ValueError(str(error)) from None
    advance(1)
    return pixels
