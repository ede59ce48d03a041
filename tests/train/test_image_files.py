"""Images in files: what is read, and what is refused in a line."""

import gzip
import importlib.util
import sys
import tracemalloc
import types

import numpy as np
import pytest
from PIL import Image

from jaxlib_unlearn.errors import UserError
from train.data import image_files
from train.data.batches import shuffled
from train.data.image_files import read_idx, read_images
from train.data.images import Picture, Pictures, resized
from train.data.stream import Stream
from train.jobs.classification_options import ClassifyData
from train.tasks import images as tasks
from train.tasks import labelled

SIDE = 6


def pixels(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def idx(path, array):
    """An IDX file; compressed where its name says so."""
    sizes = np.array(array.shape, ">i4").tobytes()
    data = bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def idx_folder(folder, train=12, test=6, classes=3, side=SIDE):
    folder.mkdir(exist_ok=True)
    for name, count in (("train", train), ("t10k", test)):
        idx(folder / f"{name}-images-idx3-ubyte.gz", pixels(count, side, side))
        idx(folder / f"{name}-labels-idx1-ubyte.gz", np.arange(count) % classes)
    return folder


def class_folders(folder, sizes=((SIDE, SIDE),), mode="L", classes=("cat", "dog"), each=2):
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(each):
            height, width = sizes[(i * each + j) % len(sizes)]
            shape = (height, width) if mode == "L" else (height, width, len(mode))
            image = Image.fromarray(pixels(1, *shape, seed=i * each + j)[0], mode=None)
            image.save(folder / name / f"{j}.png")
    return folder


def test_idx_files(tmp_path):
    found = read_images(idx_folder(tmp_path))
    assert found.held_out is not None and found.names is None
    assert len(found.train.images) == 12 and len(found.held_out.images) == 6
    np.testing.assert_array_equal(found.train.images[3][..., 0], pixels(12, SIDE, SIDE)[3])
    np.testing.assert_array_equal(found.held_out.labels, np.arange(6) % 3)
    for name, array in (("a", pixels(2, 3)), ("b.gz", pixels(1, 2, 3, 3))):
        idx(tmp_path / name, array)
        np.testing.assert_array_equal(read_idx(tmp_path / name), array)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_folder_for_each_class(tmp_path, mode):
    class_folders(tmp_path / "train", mode=mode)
    class_folders(tmp_path / "test", mode=mode, each=1)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    found = read_images(tmp_path)
    assert found.names == ("cat", "dog") and found.train.labels.tolist() == [0, 0, 1, 1]
    assert found.held_out is not None and len(found.held_out.images) == 2
    channels = 1 if mode == "L" else 3
    assert {image.shape for image in found.train.images} == {(SIDE, SIDE, channels)}
    want = pixels(1, SIDE, SIDE, *([len(mode)] * (mode != "L")), seed=2)[0]
    want = want.reshape(SIDE, SIDE, -1)[..., :3]  # without alpha
    np.testing.assert_array_equal(found.train.images[2], want)
    # One folder is one pool, and grey images among others become colours.
    if mode == "RGB":
        Image.fromarray(np.full((SIDE, SIDE), 7, np.uint8)).save(tmp_path / "train/cat/0.png")
        found = read_images(tmp_path / "train")
        assert found.held_out is None and found.train.images[0].tolist()[0][0] == [7, 7, 7]


def test_a_class_may_be_called_train(tmp_path):
    """Or test: it is a part of the data only where it has folders of classes itself."""
    found = read_images(class_folders(tmp_path / "a", classes=("test", "train", "tree"), each=1))
    assert found.names == ("test", "train", "tree") and found.held_out is None
    assert found.train.labels.tolist() == [0, 1, 2]
    class_folders(tmp_path / "b" / "train", classes=("train", "tree"))
    class_folders(tmp_path / "b" / "val", classes=("train", "tree"), each=1)
    found = read_images(tmp_path / "b")
    assert found.names == ("train", "tree") and found.held_out is not None


def test_no_more_is_unpacked_than_a_header_tells_of(tmp_path, monkeypatch):
    """Thirty kilobytes that unpack to thirty megabytes."""
    packed = gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(2**25))
    (tmp_path / "a.gz").write_bytes(packed)
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((2**15, 32, 32), np.uint8),
                        labels=np.arange(2**15) % 2)  # fmt: skip
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="more bytes, its header tells of 17"):
            read_idx(tmp_path / "a.gz")
        monkeypatch.setattr(image_files, "host_memory", lambda: 2**24)
        with pytest.raises(UserError, match="a.npz: its arrays take 0.0 GiB, this host has"):
            read_images(tmp_path / "a.npz")
        (tmp_path / "b").write_bytes(bytes([0, 0, 8, 1, 2, 0, 0, 0]) + b"less")
        with pytest.raises(UserError, match="b: its arrays take 0.0 GiB, this host has"):
            read_idx(tmp_path / "b")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_npz_files(tmp_path):
    path = tmp_path / "mnist.npz"
    x, y = pixels(6, SIDE, SIDE, 3), np.arange(6)[:, None] % 2
    np.savez(path, x_train=x, y_train=y, x_test=x[:2], y_test=y[:2], names=["no", "yes"])
    found = read_images(path)
    assert found.held_out is not None and found.names == ("no", "yes")
    np.testing.assert_array_equal(found.train.images[4], x[4])
    np.savez(path, images=x[..., 0], labels=y[:, 0])
    found = read_images(path)
    assert found.held_out is None and found.train.images[0].shape == (SIDE, SIDE, 1)


def cut(folder, name, keep=-9):
    data = gzip.decompress((folder / name).read_bytes())
    (folder / name).write_bytes(gzip.compress(data[:keep]))


def refused(name, folder):
    """A path with images that cannot be read."""
    images, labels = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
    path = folder / "data.npz"
    x, y = pixels(4, SIDE, SIDE), np.array([0, 1, 0, 1])
    match name:
        case "truncated":
            cut(idx_folder(folder), images)
        case "truncated gzip":
            data = (idx_folder(folder) / images).read_bytes()
            (folder / images).write_bytes(data[: len(data) // 2])
        case "damaged gzip":
            data = bytearray((idx_folder(folder) / images).read_bytes())
            data[40:60] = bytes(20)
            (folder / images).write_bytes(data)
        case "header alone":
            cut(idx_folder(folder), images, 6)
        case "no IDX":
            (idx_folder(folder) / images).write_bytes(b"hello")
        case "no labels":
            (idx_folder(folder) / labels).unlink()
        case "fewer labels":
            idx(idx_folder(folder) / labels, np.arange(5))
        case "test alone":
            (idx_folder(folder) / images).unlink()
            (folder / labels).unlink()
        case "gap":
            idx(idx_folder(folder) / labels, np.arange(12) % 3 * 2)
        case "empty class":
            class_folders(folder)
            (folder / "emu").mkdir()
        case "one class":
            class_folders(folder, classes=("cat",))
        case "mixed sizes":
            class_folders(folder, sizes=((6, 6), (6, 6), (5, 6)))
        case "other classes":
            class_folders(folder / "train")
            class_folders(folder / "test", classes=("cat", "emu"))
        case "no image":
            (class_folders(folder) / "cat" / "0.png").write_bytes(b"no png")
        case "deep":
            Image.fromarray(np.zeros((6, 6), np.uint16)).save(class_folders(folder) / "cat/0.png")
        case "no folders":
            (folder / "a.txt").write_text("x")
        case "npz":
            np.savez(path, a=x)
            return path
        case "npz floats":
            np.savez(path, images=x / 255, labels=y)
            return path
        case "npz objects":
            np.savez(path, images=np.array([{}] * 4), labels=y)
            return path
        case "npz cut":
            np.savez(path, images=x, labels=y)
            path.write_bytes(path.read_bytes()[:-30])
            return path
        case "npz names":
            np.savez(path, images=x, labels=y, names=["one"])
            return path
        case "npz large":
            np.savez(path, images=x, labels=y * 100_000)
            return path
        case "IDX too long":
            data = gzip.decompress((idx_folder(folder) / images).read_bytes())
            (folder / images).write_bytes(gzip.compress(data + b"x"))
        case "npz negative":
            np.savez(path, images=x, labels=y - 1)
            return path
        case "absent":
            return folder / "none"
        case "a file":
            (folder / "a.png").write_bytes(b"")
            return folder / "a.png"
    return folder


REFUSED = {
    "truncated": "train-images-idx3-ubyte.gz: truncated or damaged (439 bytes, its header tells",
    "truncated gzip": "train-images-idx3-ubyte.gz: truncated or damaged",
    "damaged gzip": "train-images-idx3-ubyte.gz: ",
    "header alone": "truncated or damaged",
    "no IDX": "truncated or damaged (no IDX file of bytes)",
    "no labels": "no labels to train-images-idx3-ubyte.gz",
    "fewer labels": "labels of uint8 (5,) to 12 images",
    "test alone": "no train-images-idx3-ubyte",
    "gap": "class 1 (and 1 more) has no image to train on",
    "empty class": "emu: a class without an image (.png, .jpg, .jpeg); add some",
    "one class": "1 class(es) of images",
    "mixed sizes": "0.png: 5 x 6 pixels, ",
    "other classes": "class dog is not in both parts",
    "no image": "0.png: cannot be read",
    "deep": "0.png: no image that can be read (mode I;16, in place of 8 bits a colour)",
    "no folders": "holds neither IDX files nor folders",
    "npz": "no x_train and y_train, and no images and labels in it (arrays found: a)",
    "npz floats": "images of float64 (4, 6, 6); they must be uint8",
    "npz objects": "cannot be read, truncated or damaged",
    "npz cut": "cannot be read, truncated or damaged",
    "npz names": "1 names for 2 classes",
    "npz large": "label 100000; number the classes from 0, at most 100,000",
    "IDX too long": "truncated or damaged (more bytes, its header tells of 448)",
    "npz negative": "label -1; number the classes from 0",
    "absent": "none does not exist; give a folder of images",
    "a file": "a.png is no folder and no .npz file",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    with pytest.raises(UserError) as caught:
        read_images(refused(name, tmp_path))
    assert REFUSED[name] in str(caught.value) and "\n" not in str(caught.value)


def test_images_of_several_sizes_may_be_resized(tmp_path):
    class_folders(tmp_path, sizes=((6, 6), (4, 9)))
    found = read_images(tmp_path, mixed=True)
    assert {image.shape for image in found.train.images} == {(6, 6, 1), (4, 9, 1)}
    stream = Pictures(found.train.images, found.train.labels, (8, 8, 3))
    batch = stream.batch(np.array([3, 0]))
    assert batch["image"].shape == (2, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["gold"].tolist() == [1, 0] and batch["row_id"].tolist() == [3, 0]
    # Grey stays grey, and a constant stays what it is.
    grey = resized(np.full((3, 5, 1), 9, np.uint8), (8, 8, 3))
    assert (grey == 9).all()
    ramp = np.arange(4, dtype=np.uint8)[None, :, None].repeat(4, 0) * 60
    np.testing.assert_array_equal(resized(ramp, (2, 2, 1))[0, :, 0], [43, 137])


def test_a_stream_of_images():
    images = pixels(5, 2, 2, 1)
    stream = Pictures(list(images), np.arange(5) % 2, (2, 2, 1))
    assert isinstance(stream, Stream) and len(stream) == 5 and stream.shape(np.arange(2)) == ()
    np.testing.assert_array_equal(stream.epoch_order(1, "a", 2), shuffled(1, "a", 2, 5))
    other = images.copy()
    other[4, 0, 0, 0] ^= 1
    known = {
        Pictures(list(images), gold, wanted).identity()
        for gold in (np.arange(5) % 2, np.arange(5) % 3)
        for wanted in ((2, 2, 1), (4, 4, 1))
    }
    known.add(Pictures(list(other), np.arange(5) % 2, (2, 2, 1)).identity())
    assert len(known) == 5 and stream.identity() in known


def rows_of(name, **changes):
    task = {row.name: row for row in tasks.ROWS}[name]
    options = {"train_rows": None, "dev_rows": 2} | changes
    return labelled.load(task, ClassifyData(**options), 0)


def test_rows_and_their_digest(tmp_path):
    rows = rows_of("images", path=idx_folder(tmp_path))
    assert [len(part) for part in (rows.train, rows.dev, rows.test)] == [10, 2, 6]
    row = rows.train[0]
    assert row["options"].words == ("0", "1", "2") and 0 <= row["gold"] < 3
    before = rows.digest()
    assert rows_of("images", path=tmp_path).digest() == before
    changed = row["image"].pixels.copy()
    changed[0, 0, 0] ^= 1
    rows.train[0] = {**row, "image": Picture(changed)}
    assert rows.digest() != before
    assert 0 < (rows.majority_accuracy or 0) < 1


def test_fashion_mnist_where_it_is_and_digits_where_it_is_not(tmp_path, monkeypatch):
    clothes = idx_folder(tmp_path / "fashion", train=30, test=10, classes=10)
    monkeypatch.setattr(tasks, "FASHION", clothes)
    rows = rows_of("fashion-mnist")
    assert rows.train[0]["options"].words == tasks.CLOTHES
    assert rows.notes[0].startswith("Fashion-MNIST: 28 rows to train on")
    for path in (clothes, idx_folder(tmp_path / "digits", train=30, test=10, classes=10)):
        words = rows_of("fashion-mnist", path=path).train[0]["options"].words
        assert words == (tasks.CLOTHES if path == clothes else tuple("0123456789"))
    monkeypatch.setattr(tasks, "FASHION", tmp_path / "none")
    scans = np.arange(1797 * 64).reshape(1797, 8, 8) % 17 / 1.0
    fake = types.SimpleNamespace(
        load_digits=lambda: types.SimpleNamespace(images=scans, target=np.arange(1797) % 10)
    )
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", fake)
    rows = rows_of("fashion-mnist")
    assert [len(part) for part in (rows.train, rows.dev, rows.test)] == [1435, 2, 360]
    image = rows.train[0]["image"].pixels
    assert image.shape == (8, 8, 1) and (image.min(), image.max()) == (0, 255)
    assert "scikit-learn's digits, since there is no Fashion-MNIST in" in rows.notes[0]
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="install Debian's package dataset-fashion-mnist or scikit"):
        rows_of("fashion-mnist")


@pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="needs scikit-learn")
def test_the_digits_of_scikit_learn():
    found = tasks.read_digits()
    assert len(found.train.images) == 1437 and np.bincount(found.train.labels).min() > 130
    assert found.held_out is not None and found.train.images[0].max() == 239


def test_own_images_need_a_path():
    with pytest.raises(UserError, match="--task images reads images of your own: give --data.path"):
        rows_of("images")
