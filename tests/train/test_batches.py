"""Batches: shapes, labels against a slow loop, and the same rows on any number of processes."""

import itertools

import numpy as np
import pytest

from train.data.batches import (
    batch_shape,
    bucket_length,
    collate,
    make_buckets,
    paired_indices,
    score_batches,
    shuffled,
    training_indices,
)
from train.data.examples import LEAF, Example, Group

LENGTHS = (16, 32, 64)
LABELS = (8, 16, 32)


def training(seed, stream, step, batch_size, num_rows):
    """Rows of a step in shuffled epochs."""
    return training_indices(
        lambda epoch: shuffled(seed, stream, epoch, num_rows), step, batch_size, num_rows
    )


@pytest.fixture(scope="module")
def examples():
    rng = np.random.Generator(np.random.Philox(7))
    found = []
    for _ in range(37):
        num_prompt, num_labels = int(rng.integers(1, 30)), int(rng.integers(1, 30))
        tokens = rng.integers(3, 99, num_prompt + num_labels).tolist()
        found.append(Example(tokens, num_prompt))
    return found


def group():
    prompt, first, second = [5, 6, 7], [8, 9, 1], [10, 1]
    return Group(
        tokens=[5, 6, 7, 8, 9, 10],
        positions=[0, 1, 2, 3, 4, 3],
        segment_ids=[1, 1, 1, 1 + LEAF, 1 + LEAF, 1 + 2 * LEAF],
        label_index=[2, 3, 4, 2, 5],
        targets=[*first, *second],
        answer=[0, 0, 0, 1, 1],
        num_cut=len(prompt) - 3,
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_buckets_waste_least(count):
    """No other choice of buckets pads a list of lengths to less."""
    draw = np.random.default_rng(count)
    for size in (1, 4, 30):
        lengths = draw.integers(1, 70, size).tolist()
        allowed = sorted({-(-n // 8) * 8 for n in lengths})

        def total(buckets, lengths=lengths):
            return sum(bucket_length(n, buckets) for n in lengths)

        found = make_buckets(lengths, count=count, multiple=8)
        assert len(found) <= count and list(found) == sorted(found) and found[-1] == allowed[-1]
        others = itertools.combinations(allowed[:-1], min(count, len(allowed)) - 1)
        assert total(found) == min(total((*some, allowed[-1])) for some in others)


def test_collate_against_a_slow_loop(examples):
    rows = [3 * i for i in range(len(examples))]
    batch = collate(examples, rows, 64, 32, batch_size=40, pad_id=77)
    assert {name: (c.shape, c.dtype.name) for name, c in batch.items()} == {
        "tokens": ((40, 64), "int32"),
        "positions": ((40, 64), "int32"),
        "segment_ids": ((40, 64), "int32"),
        "row_id": ((40,), "int32"),
        "label_index": ((40, 32), "int32"),
        "targets": ((40, 32), "int32"),
        "target_mask": ((40, 32), "float32"),
    }
    for b, example in enumerate(examples):
        count = len(example.tokens)
        for t in range(64):
            assert batch["tokens"][b, t] == (example.tokens[t] if t < count else 77)
            assert batch["segment_ids"][b, t] == (1 if t < count else 0)
            assert batch["positions"][b, t] == (t if t < count else 0)
        # A label at token t is predicted one slot before it.
        labels = [(t - 1, example.tokens[t]) for t in range(example.num_prompt, count)]
        mask = batch["target_mask"][b] == 1.0
        index, targets = batch["label_index"][b][mask], batch["targets"][b][mask]
        assert list(zip(index.tolist(), targets.tolist(), strict=True)) == labels
        assert mask[: len(labels)].all() and not mask[len(labels) :].any()
        assert batch["row_id"][b] == rows[b]
    assert (batch["row_id"][37:] == -1).all()
    assert not batch["target_mask"][37:].any() and not batch["segment_ids"][37:].any()


def test_collate_without_a_prompt_predicts_from_the_first_token():
    batch = collate([Example([4, 5, 6], 0)], [0], 4, 4)
    assert batch["label_index"][0, :2].tolist() == [0, 1]
    assert batch["targets"][0, :2].tolist() == [5, 6]
    assert batch["target_mask"].sum() == 2


def test_collate_groups():
    batch = collate([group()], [9], 8, 6, batch_size=2)
    assert batch["segment_ids"][0].tolist() == [1, 1, 1, 1 + LEAF, 1 + LEAF, 1 + 2 * LEAF, 0, 0]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 4, 3, 0, 0]
    assert batch["label_index"][0].tolist() == [2, 3, 4, 2, 5, 0]
    assert batch["targets"][0].tolist() == [8, 9, 1, 10, 1, 0]
    assert batch["answer"].tolist() == [[0, 0, 0, 1, 1, -1], [-1] * 6]
    assert batch["target_mask"].sum(-1).tolist() == [5, 0]


def test_collate_refuses_what_does_not_fit():
    example = Example(list(range(10)), 4)
    with pytest.raises(ValueError, match="row 5: 10 tokens and 6 labels"):
        collate([example], [5], 8, 8)
    with pytest.raises(ValueError, match="row 5"):
        collate([example], [5], 16, 4)
    with pytest.raises(ValueError, match="2 examples"):
        collate([example] * 2, [0, 1], 16, 8, batch_size=1)


def test_buckets(examples):
    assert [bucket_length(n, LENGTHS) for n in (1, 16, 17, 64)] == [16, 16, 32, 64]
    with pytest.raises(ValueError, match="above the last bucket"):
        bucket_length(65, LENGTHS)
    lengths = [len(example.tokens) for example in examples]
    for count in (1, 2, 4, 50):
        buckets = make_buckets(lengths, count=count, multiple=8)
        assert len(buckets) <= count and list(buckets) == sorted(set(buckets))
        assert all(bucket % 8 == 0 for bucket in buckets)
        assert 0 <= buckets[-1] - max(lengths) < 8
    with pytest.raises(ValueError):
        make_buckets([])


@pytest.mark.parametrize("options", [{"batch_size": 8}, {"batch_tokens": 256}, {}])
def test_score_batches_cover_every_row_once_in_few_shapes(examples, options):
    ids = [100 + i for i in range(len(examples))]
    batches = list(score_batches(examples, row_ids=ids, row_multiple=4, **options))
    rows = np.concatenate([batch["row_id"] for batch in batches])
    assert sorted(rows[rows >= 0].tolist()) == ids
    assert len({batch["tokens"].shape + batch["targets"].shape for batch in batches}) <= 4
    widths = [batch["tokens"].shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    for batch in batches:
        assert len(batch["row_id"]) % 4 == 0
        for b, row in enumerate(batch["row_id"]):
            if row < 0:
                continue
            example = examples[row - 100]
            assert batch["tokens"][b, : len(example.tokens)].tolist() == example.tokens
            assert batch["target_mask"][b].sum() == len(example.tokens) - example.num_prompt
    assert list(score_batches([])) == []


def test_score_batches_of_groups():
    (batch,) = score_batches([group()] * 3, batch_size=4)
    assert batch["row_id"].tolist() == [0, 1, 2, -1] and batch["answer"].shape == (4, 16)


@pytest.mark.parametrize("num_rows", [1, 5, 12, 16, 40])
def test_every_epoch_is_a_permutation(num_rows):
    stream = np.concatenate([training(3, "forget", s, 8, num_rows) for s in range(num_rows)])
    for epoch in range(8):
        part = stream[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(part.tolist()) == list(range(num_rows))
    if num_rows > 5:
        assert stream[:num_rows].tolist() != stream[num_rows : 2 * num_rows].tolist()


def test_indices_depend_on_seed_stream_and_step_alone():
    def draw(function, seed=0, stream="retain", step=4):
        return function(seed, stream, step, 16, 1000).tolist()

    for function in (training, paired_indices):
        assert draw(function) == draw(function)
        others = [draw(function, seed=1), draw(function, stream="x"), draw(function, step=5)]
        assert all(draw(function) != other for other in others)
        with pytest.raises(ValueError):
            function(0, "retain", 0, 4, 0)
    # Resuming needs the step only: the batch of step 4 does not need the earlier ones.
    whole = training(0, "retain", 0, 16 * 5, 1000)
    assert draw(training) == whole[64:].tolist()
    # Pinned: raw Philox bits are the same on every platform and numpy version.
    assert training(0, "forget", 0, 6, 10).tolist() == [2, 3, 4, 7, 5, 6]
    assert paired_indices(0, "retain", 0, 6, 10).tolist() == [2, 8, 6, 6, 8, 6]


def test_paired_indices_are_uniform():
    drawn = np.concatenate([paired_indices(0, "retain", s, 50, 10) for s in range(200)])
    counts = np.bincount(drawn, minlength=10)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(900)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_same_rows_and_shapes_on_any_number_of_processes(examples, processes):
    for step in range(6):
        indices = training(5, "forget", step, 8, len(examples))
        shape = batch_shape([examples[i] for i in indices], LENGTHS, LABELS)
        whole = collate([examples[i] for i in indices], indices.tolist(), *shape)
        parts = []
        for process in range(processes):
            again = training(5, "forget", step, 8, len(examples))
            mine = np.split(again, processes)[process]
            shape_here = batch_shape([examples[i] for i in again], LENGTHS, LABELS)
            assert shape_here == shape
            parts.append(collate([examples[i] for i in mine], mine.tolist(), *shape_here))
        for name, column in whole.items():
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(joined, column)
