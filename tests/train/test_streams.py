"""Streams of any kind: the rows of a step, the order of an epoch, paired rows, one shape."""

import hashlib
import itertools

import numpy as np
import pytest

from train.data import streams as streams_module
from train.data.batches import paired_indices, random_bits, shuffled
from train.data.examples import Example
from train.data.permutation import keyed_order, permuted
from train.data.stream import Packable, Stream
from train.data.streams import batches_of, make_stream, pack_streams
from train.data.task import Paired, Task


class Pictures:
    """A new kind of stream: arrays with noise, no tokens; large ones have a keyed order."""

    def __init__(self, values, follows=None, order=shuffled):
        self.values, self.follows, self.order = values, follows, order
        self.asked = []

    def __len__(self):
        return len(self.values)

    def identity(self):
        return hashlib.sha256(self.values.tobytes()).hexdigest()

    def epoch_order(self, seed, name, epoch):
        self.asked.append((seed, name, epoch))
        return self.order(seed, name, epoch, len(self))

    def shape(self, rows):
        return ()

    def batch(self, rows, shape, step):
        assert shape == ()
        noise = [random_bits(step, "noise", int(row)).random_raw(2) % 1000 for row in rows]
        return {"row_id": rows, "pixels": self.values[rows], "noise": np.array(noise)}


def pictures(count, **options):
    return Pictures(np.random.default_rng(count).random((count, 4, 4, 3)), **options)


def texts(count, **options):
    draw = np.random.default_rng(count)
    sizes = draw.integers(3, 30, count).tolist()
    rows = [Example(draw.integers(2, 64, size).tolist(), 2) for size in sizes]
    return make_stream(rows, 0, batch_size=4, **options)


@pytest.mark.parametrize("order", [shuffled, keyed_order])
def test_arrays_go_through_the_same_batches(order):
    """Epochs of the main stream, samples of another, pairs of a third; noise of row and step."""
    streams = {
        "forget": pictures(10, order=order),
        "other": pictures(20, follows="forget"),
        "retain": pictures(7),
    }
    assert isinstance(streams["forget"], Stream) and not isinstance(streams["forget"], Packable)
    assert pack_streams(streams, 4, 4, 10**6) == streams  # nothing to pack
    make = batches_of(streams, "forget", 3, 4)
    half = batches_of(streams, "forget", 3, 4, here=np.array([2, 3]))
    walked, noise = [], {}
    for step in range(10):
        found, mine = make(step), half(step)
        rows = {name: batch["row_id"] for name, batch in found.items()}
        assert list(rows) == ["forget", "other", "retain"]
        assert np.array_equal(rows["other"], 2 * rows["forget"] + step % 2)
        assert np.array_equal(rows["retain"], paired_indices(3, "retain", step, 4, 7))
        walked += rows["forget"].tolist()
        for name, batch in found.items():
            assert np.array_equal(batch["pixels"], streams[name].values[rows[name]])
            for column, values in batch.items():
                assert np.array_equal(mine[name][column], values[2:])
            for row, drawn in zip(rows[name].tolist(), batch["noise"].tolist(), strict=True):
                assert noise.setdefault((step, row), drawn) == drawn
    assert [sorted(walked[i : i + 10]) for i in range(0, 40, 10)] == [list(range(10))] * 4
    assert walked[:10] != walked[10:20]
    assert len({tuple(drawn) for drawn in noise.values()}) > 0.9 * len(noise)


@pytest.mark.parametrize(("rows", "size"), [(10, 4), (8, 4), (3, 8), (40, 4)])
def test_the_order_of_an_epoch_is_asked_once(rows, size, monkeypatch):
    """Not once a step, nor once a stream that follows; also where a batch has several epochs."""
    asked = []

    def counted(seed, name, epoch, count):
        asked.append((seed, name, epoch))
        return shuffled(seed, name, epoch, count)

    monkeypatch.setattr(streams_module, "shuffled", counted)
    toy = {n: pictures(rows, follows=f) for n, f in (("forget", None), ("a", "forget"))}
    text = {n: texts(rows, follows=f) for n, f in (("forget", None), ("a", "forget"))}
    for streams in (toy, text, pack_streams(text, size, size, 10**6)):
        make = batches_of(streams, "forget", 5, size)
        asked.clear()
        toy["forget"].asked = asked if streams is toy else []
        for step in range(12):
            make(step)
        assert asked == [(5, "forget", epoch) for epoch in range(-(-12 * size // rows))]
        assert not toy["a"].asked


def test_streams_of_several_kinds_have_a_shape_each():
    """Arrays beside examples leave the examples' batches, padded alike, as they are."""
    text = {"forget": texts(12), "retain": texts(9)}
    alone = batches_of(text, "forget", 0, 4)
    made = batches_of({"pictures": pictures(5), **text}, "forget", 0, 4)
    for step in range(6):
        batch = made(step)
        assert batch["pictures"]["pixels"].shape == (4, 4, 4, 3)
        assert batch["forget"]["tokens"].shape == batch["retain"]["tokens"].shape
        for name, columns in alone(step).items():
            for column, values in columns.items():
                assert np.array_equal(batch[name][column], values)
    mixed = {"pictures": pictures(5), **text}
    assert isinstance(text["forget"], Packable) and pack_streams(mixed, 4, 4, 10**6) == mixed


def test_rows_that_follow():
    """Whom a stream follows is its own property, whatever its name; the main one follows none."""
    named = {"questions": texts(6), "answers": texts(12, follows="questions"), "idk": texts(6)}
    for step in range(4):
        rows = {n: b["row_id"] for n, b in batches_of(named, "questions", 0, 4)(step).items()}
        assert np.array_equal(rows["answers"], 2 * rows["questions"] + step % 2)
        assert np.array_equal(rows["idk"], paired_indices(0, "idk", step, 4, 6))
    # Also a stream that is sampled is followed row by row.
    sampled = {"main": texts(5), **named}
    rows = {n: b["row_id"] for n, b in batches_of(sampled, "main", 0, 4)(3).items()}
    assert np.array_equal(rows["questions"], paired_indices(0, "questions", 3, 4, 6))
    assert np.array_equal(rows["answers"], 2 * rows["questions"] + 1)
    alone = batches_of({"answers": named["answers"]}, "answers", 0, 4)
    walked = np.concatenate([alone(step)["answers"]["row_id"] for step in range(3)])
    assert sorted(walked.tolist()) == list(range(12))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"b": ("nowhere", 6)}, "stream b follows nowhere, but can follow only a"),
        ({"b": ("b", 6)}, "stream b follows b, but can follow only a"),
        ({"b": ("a", 6), "c": ("b", 6)}, "stream c follows b, but can follow only a"),
        ({"b": ("a", 9)}, "stream b follows a, but its 9 rows are not a multiple of the 6"),
        ({"b": ("a", 3)}, "stream b follows a, but its 3 rows are not a multiple of the 6"),
    ],
)
def test_rows_that_cannot_follow(more, message):
    streams = {"a": texts(6)} | {n: texts(count, follows=f) for n, (f, count) in more.items()}
    with pytest.raises(ValueError, match=message):
        batches_of(streams, "a", 0, 4)


def test_a_task_says_which_rows_are_paired():
    task = Task([], [], {}, [], [])
    assert {name: task.follows(name) for name in ("forget", "retain", "idk", "alternate")} == {
        "forget": None,
        "retain": None,
        "idk": "forget",
        "alternate": "forget",
    }
    rows = [{"question": "Who?", "answer": "Ada."}]
    own = {"riddle": lambda task, seed: rows, "hint": Paired(lambda task, seed: rows, "riddle")}
    task = task._replace(streams=own)
    assert (task.follows("riddle"), task.follows("hint")) == (None, "riddle")
    assert task.stream("hint", 0) == rows


# Keyed permutations.


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 10, 97, 1000, 4096, 10_007])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_a_keyed_permutation_is_one(key, count):
    places = np.arange(count)
    found = permuted(key, places, count)
    assert found.dtype == np.int64 and np.array_equal(np.sort(found), places)
    assert np.array_equal(permuted(key, places, count), found)
    # Every place by itself, in any shape.
    some = places[:: max(count // 7, 1)]
    assert [int(permuted(key, int(i), count)) for i in some] == found[some].tolist()
    assert np.array_equal(permuted(key, some[::-1, None], count), found[some[::-1, None]])
    if count > 5:
        assert not np.array_equal(permuted(key + 5, places, count), found)


def test_a_keyed_permutation_of_many_rows():
    """It answers for a place among more rows than memory holds; neighbours go far apart."""
    count = 10**15
    found = permuted(3, np.arange(4000), count)
    assert len(set(found.tolist())) == 4000 and 0 <= found.min() and found.max() < count
    # Uniform: mean and deviation of the rows, and of the distances between neighbours.
    assert abs(found.mean() / count - 1 / 2) < 5 * 12**-0.5 / 4000**0.5
    assert abs(np.abs(np.diff(found)).mean() / count - 1 / 3) < 0.02


def test_keyed_permutations_are_evenly_spread():
    """All orders of four rows come equally often over the epochs."""
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for epoch in range(2400):
        counts[tuple(keyed_order(0, "blocks", epoch, 4)[np.arange(4)].tolist())] += 1
    assert min(counts.values()) > 50 and max(counts.values()) < 150  # 100 each


def test_keyed_orders_depend_on_seed_name_and_epoch_alone():
    def order(seed=0, name="blocks", epoch=0):
        return keyed_order(seed, name, epoch, 50)[np.arange(50)].tolist()

    assert order() == order()
    assert all(order() != o for o in (order(seed=1), order(name="x"), order(epoch=1)))
    # Pinned: integer arithmetic is the same on every platform and numpy version.
    assert order()[:6] == [27, 48, 15, 25, 4, 46]


@pytest.mark.parametrize("place", [-1, 5, [0, 5]])
def test_places_outside_an_epoch(place):
    with pytest.raises(IndexError, match="a place outside the 5 rows"):
        permuted(0, place, 5)
    assert permuted(0, np.zeros(0, np.int64), 5).shape == (0,)
