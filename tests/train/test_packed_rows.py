"""Packed rows of whole examples: a slow first fit, what every label sees, loss and gradient."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlib_unlearn import objectives
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from train.data.examples import Example
from train.data.packed_rows import CHOPPED, PackedRows, first_fit, pack_rows
from train.data.stream import Positioned, Stream
from train.engine.step import Losses
from train.runtime.sharding import MeshConfig, make_mesh, put_batch, put_params

TINY = DecoderConfig(64, 16, 32, 2, 4, 2, 4, dtype="float64")


def examples_of(seed, count, most=20):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tokens = rng.integers(1, 64, int(rng.integers(2, most + 2))).tolist()
        found.append(Example(tokens, int(rng.integers(0, len(tokens)))))
    return found


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 64))
def test_first_fit_against_a_slow_loop(sizes, room):
    rows = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [row for row in rows if sum(sizes[i] for i in row) + sizes[item] <= room]
        if not fitting:
            fitting = [[]]
            rows += fitting
        fitting[0].append(item)
    assert first_fit(sizes, room) == rows


def test_an_item_that_does_not_fit():
    with pytest.raises(ValueError, match="size 9 does not fit rows of 8"):
        first_fit([3, 9], 8)
    with pytest.raises(ValueError, match="no prompts to mask"):
        pack_rows(examples_of(0, 3), 32, "chop", mask_prompt=True)


@pytest.mark.parametrize("mask_prompt", [False, True])
def test_every_label_sees_its_own_example(mask_prompt):
    examples = examples_of(1, 40)
    packed = pack_rows(examples, 48, mask_prompt=mask_prompt, pad_id=9)
    assert isinstance(packed, Stream) and isinstance(packed, Positioned)
    batch = packed.batch(np.arange(len(packed)), (), 0)
    assert (batch["tokens"][batch["segment_ids"] == 0] == 9).all()
    seen, wanted = [], []
    for b in range(len(packed)):
        mine = {name: column[b] for name, column in batch.items()}
        for w in np.flatnonzero(mine["target_mask"]):
            slot = mine["label_index"][w]
            there = (mine["segment_ids"] == mine["segment_ids"][slot])[: slot + 1]
            read = np.flatnonzero(there)
            assert mine["positions"][read].tolist() == list(range(len(read)))
            seen.append((*mine["tokens"][read].tolist(), int(mine["targets"][w])))
    for example in examples:
        first = max(example.num_prompt, 1) if mask_prompt else 1
        wanted += [tuple(example.tokens[: k + 1]) for k in range(first, len(example.tokens))]
    assert sorted(seen) == sorted(wanted)
    slots = sum(len(e.tokens) - 1 for e in examples)
    assert packed.used == slots and packed.waste == 1 - slots / (48 * len(packed))
    assert packed.longest == max(len(e.tokens) for e in examples) - 1


def test_chopped_as_the_published_trainer_does():
    examples = examples_of(2, 2 * CHOPPED + 7, 6)
    packed = pack_rows(examples, 16, "chop")
    batch = packed.batch(np.arange(len(packed)), (), 0)
    row = 0
    for start in range(0, len(examples), CHOPPED):
        text = [t for e in examples[start : start + CHOPPED] for t in e.tokens]
        for i in range(0, len(text) - 1, 16):
            chunk = text[i : i + 16]
            n = len(chunk) - 1
            assert batch["tokens"][row, :n].tolist() == chunk[:-1]
            assert batch["targets"][row, :n].tolist() == chunk[1:]
            assert batch["positions"][row, :n].tolist() == list(range(n))
            assert batch["segment_ids"][row].tolist() == [1] * n + [0] * (16 - n)
            assert batch["target_mask"][row].sum() == n
            row += 1
    assert row == len(packed)


def test_identity_tells_rows_apart():
    examples = examples_of(3, 6)
    one = pack_rows(examples, 40)
    assert one.identity() == pack_rows(examples, 40).identity()
    others = [
        pack_rows(examples, 41),
        pack_rows(examples, 40, "none"),
        pack_rows(examples, 40, mask_prompt=True),
        pack_rows(examples[:5], 40),
        dataclasses.replace(one, rows=one.rows[::-1]),
        dataclasses.replace(one, pad_id=3),
    ]
    assert len({one.identity(), *(o.identity() for o in others)}) == 7
    order = one.epoch_order(0, "train", 0)
    assert sorted(order.tolist()) == list(range(len(one)))


# Loss and gradient


@jax.jit
def measured(params, batch):
    """The mean loss of a batch and its gradient, by the function that a step uses."""
    row, options = objectives.resolve("nll")
    learner = DecoderLearner(Decoder(TINY, "none"))
    losses = Losses(learner, row, options, params, {}, {"train": batch})
    return jax.value_and_grad(losses.value)(params)


def padded(packed: PackedRows, rows: int) -> dict[str, np.ndarray]:
    """All rows, and as many without a token as make `rows`."""
    filled = dataclasses.replace(packed, rows=[*packed.rows, *[[]] * (rows - len(packed))])
    return filled.batch(np.arange(rows), (), 0)


def test_packed_equals_unpacked(float64):
    """In any order of rows and in rows, and on four devices."""
    params = jax.tree.map(
        lambda x: 4 * jnp.asarray(x, jnp.float64), Decoder(TINY).init(jax.random.key(0))
    )
    examples = examples_of(4, 30)
    alone = pack_rows(examples, 40, "none", mask_prompt=True)
    packed = pack_rows(examples, 40, mask_prompt=True)
    mixed = dataclasses.replace(packed, rows=[row[::-1] for row in packed.rows[::-1]])
    assert len(packed) < 12 < len(alone)
    want, grad = measured(params, alone.batch(np.arange(30), (), 0))
    assert want.dtype == np.float64 and want > 1
    four = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    for arguments in (
        (params, padded(packed, 12)),
        (params, padded(mixed, 12)),
        (put_params(params, four), put_batch(padded(packed, 12), four)),
    ):
        found, other = measured(*arguments)
        np.testing.assert_allclose(found, want, rtol=1e-10)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(grad), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_little_is_wasted(shared):
    """Lengths of real solutions (in words), as rows four times as long as the longest."""
    lines = (shared / "data" / "gsm8k" / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    examples = [Example([1] * (2 + len(f"{r['question']} {r['answer']}".split())), 0) for r in rows]
    longest = max(len(e.tokens) for e in examples)
    packed = pack_rows(examples, 2 * longest)
    assert packed.waste <= 0.01
    assert pack_rows(examples, longest, "none").waste > 0.5
