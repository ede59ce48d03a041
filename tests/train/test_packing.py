"""Rows that several examples share: every label against a slow loop, sizes, order, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder.labels import gather, spread
from train.data.examples import LEAF, Example, pack, packed_length
from train.data.packing import balanced, collate_packed, make_packing, num_labels
from train.data.streams import batches_of, make_stream, pack_streams

PROMPT = [7, 7, 7]


@pytest.fixture(scope="module")
def examples():
    """Examples whose prompts have a common prefix."""
    rng = np.random.Generator(np.random.Philox(7))
    found = []
    for _ in range(36):
        num_prompt, num_labels = int(rng.integers(1, 30)), int(rng.integers(1, 30))
        tokens = rng.integers(8, 99, num_prompt + num_labels).tolist()
        found.append(Example(PROMPT + tokens, len(PROMPT) + num_prompt))
    return found


@pytest.mark.parametrize("together", [1, 2, 3, 6])
def test_collate_packed_against_a_slow_loop(examples, together):
    """Every label sees the tokens of its own example before it, in order, and nothing else."""
    some = examples[:12]
    packing = make_packing(some, together, 12)
    shape = packing.shape(some)
    batch = collate_packed(some, range(100, 112), together, shape, 32, pad_id=77)
    rows = 12 // together
    assert {name: (c.shape, c.dtype.name) for name, c in batch.items()} == {
        "tokens": ((rows, shape[0]), "int32"),
        "positions": ((rows, shape[0]), "int32"),
        "segment_ids": ((rows, shape[0]), "int32"),
        "row_id": ((12,), "int32"),
        "label_index": ((12, 32), "int32"),
        "targets": ((12, 32), "int32"),
        "target_mask": ((12, 32), "float32"),
        "label_source": ((rows, shape[1]), "int32"),
        "label_place": ((12, 32), "int32"),
    }
    segments, positions = batch["segment_ids"], batch["positions"]
    assert (batch["tokens"][segments == 0] == 77).all()
    for b, example in enumerate(some):
        row, count = b // together, num_labels([example])
        assert batch["row_id"][b] == 100 + b
        assert batch["target_mask"][b].tolist() == [1.0] * count + [0.0] * (32 - count)
        assert batch["targets"][b, :count].tolist() == example.tokens[example.num_prompt :]
        for w, slot in enumerate(batch["label_index"][b, :count]):
            leaf = segments[row, slot] // LEAF
            seen = [t for t in range(slot + 1) if segments[row, t] // LEAF in (0, leaf)]
            length = example.num_prompt + w
            assert batch["tokens"][row, seen].tolist() == example.tokens[:length]
            assert positions[row, seen].tolist() == list(range(length))
    # The common prefix is stored once, and last tokens are not stored.
    used = int((segments > 0).sum())
    assert used <= sum(len(e.tokens) - 1 for e in some) - len(PROMPT) * (12 - rows)


@pytest.mark.parametrize("together", [2, 4])
def test_labels_side_by_side_and_back(examples, together):
    some = examples[:8]
    batch = collate_packed(some, range(8), together, (400, 130), 32)
    mask = batch["target_mask"] > 0
    values = jnp.arange(8 * 32).reshape(8, 32)
    packed = gather(batch, values)
    assert packed.shape == (8 // together, 130)
    assert np.asarray(spread(batch, packed))[mask].tolist() == np.asarray(values)[mask].tolist()
    deep = gather(batch, jnp.stack([values, -values], -1))
    np.testing.assert_array_equal(deep[..., 0], packed)
    np.testing.assert_array_equal(deep[..., 1], -packed)
    np.testing.assert_array_equal(
        np.asarray(spread(batch, deep))[mask][:, 1], -np.asarray(values)[mask]
    )
    # Each label once, those of an example in order.
    for row in range(8 // together):
        count = int(mask[row * together : (row + 1) * together].sum())
        there = np.flatnonzero(mask[row * together : (row + 1) * together].ravel())
        assert batch["label_source"][row, :count].tolist() == there.tolist()


def test_a_batch_without_packing_is_left_as_it_is():
    x = jnp.ones((2, 3, 4))
    assert gather({}, x) is x and spread({}, x) is x


@pytest.mark.parametrize(
    "shape, width, message",
    [
        ((4, 9), 9, r"rows \[3, 4\]: 5 tokens and 4 labels, at most 2 of one, do not fit 4, 9"),
        ((5, 3), 9, "do not fit 5, 3 and 9"),
        ((5, 4), 1, "do not fit 5, 4 and 1"),
    ],
)
def test_what_does_not_fit(shape, width, message):
    pair = [Example([5, 6, 7, 8], 2), Example([5, 9, 7, 8], 2)]
    collate_packed(pair, [3, 4], 2, (5, 4), 2)
    with pytest.raises(ValueError, match=message):
        collate_packed(pair, [3, 4], 2, shape, width)
    with pytest.raises(ValueError, match="3 examples and 3 row ids do not make rows of 2"):
        collate_packed(pair[:1] * 3, [0, 1, 2], 2, (9, 9), 9)


@pytest.mark.parametrize("together", [2, 3, 4])
def test_balanced_rows(together):
    sizes = np.random.default_rng(together).integers(10, 90, 24).tolist()
    order = balanced(sizes, together)
    assert sorted(order) == list(range(24))
    spread_of = [
        np.ptp(np.array(x).reshape(-1, together).sum(1)) for x in (sizes, np.take(sizes, order))
    ]
    assert spread_of[1] < spread_of[0] / 2


def test_an_example_twice_in_a_row():
    example = Example([5, 6, 7, 8, 9], 3)
    group = pack([example, example])
    assert group.tokens == [5, 6, 7, 8, 8] and packed_length([example, example]) == 5
    assert group.label_index == [2, 3, 2, 4] and group.targets == [8, 9, 8, 9]


def test_any_batch_fits_and_most_fit_well(examples):
    """Padded sizes hold every batch, with few empty slots."""
    plain = {"forget": make_stream(examples, 0, batch_size=8)}
    assert pack_streams(plain, 8, 8, 0) == plain  # one example in each row
    assert pack_streams(plain, 8, 1, 10**6) == plain  # a device sees one of them
    packed = pack_streams(plain, 8, 8, 160)
    assert packed["forget"].packing.together == 4
    slots, used = {}, {}
    for name, streams in (("plain", plain), ("packed", packed)):
        make = batches_of(streams, "forget", 0, 8)
        batches = [make(step)["forget"] for step in range(60)]
        slots[name] = sum(b["tokens"].size for b in batches)
        used[name] = sum(int((b["segment_ids"] > 0).sum()) for b in batches)
        labels = sum(b.get("label_source", b["targets"]).size for b in batches)
        slots[name, "labels"] = labels
        seen = sorted(np.concatenate([b["row_id"] for b in batches[:9]]).tolist())
        assert seen == sorted([*range(36)] * 2)  # two epochs, in any order
    assert used["packed"] > 0.75 * slots["packed"]
    assert slots["packed"] < 0.75 * slots["plain"]
    assert slots["packed", "labels"] < 0.75 * slots["plain", "labels"]


def test_streams_share_one_shape(examples):
    """Streams of unequal rows have batches of equal shapes, so that one forward pass takes all."""
    short = [Example(e.tokens[: e.num_prompt + 1], e.num_prompt) for e in examples]
    plain = {"forget": make_stream(examples, 0), "retain": make_stream(short, 0)}
    packed = pack_streams(plain, 8, 4, 10**6)
    for step in range(5):
        made = batches_of(packed, "forget", 0, 8)(step)
        shapes = [jax.tree.map(np.shape, batch) for batch in made.values()]
        assert shapes[0] == shapes[1]
        assert shapes[0]["tokens"][0] == 2
