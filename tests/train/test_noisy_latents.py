"""Noise of a row belongs to seed, purpose, step and row, and is that of the forward process."""

import numpy as np
import pytest
import scipy.stats

from models.diffusion.schedulers import Schedule
from train.data.noisy_latents import NoisyLatents
from train.data.stream import Stream

ROWS, SIDE = 50, 8


def stream(**more):
    draw = np.random.default_rng(0)
    latents = draw.standard_normal((ROWS, SIDE, SIDE, 4)).astype(np.float32)
    tokens = draw.integers(1, 9, (ROWS, 5)).astype(np.int32)
    empty = np.zeros(5, np.int32)
    given = {"columns": {"tokens": tokens, "place": tokens[:, 0]}, "schedule": Schedule()}
    return NoisyLatents(latents, **{**given, "empty": empty, **more})


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


def test_it_is_a_stream():
    assert isinstance(stream(), Stream)
    assert sorted(stream().epoch_order(0, "train", 2).tolist()) == list(range(ROWS))


def test_a_row_is_the_same_in_any_batch():
    whole = stream(dropout=0.3).batch(np.arange(ROWS), (), 7)
    for rows in ([3], [9, 3, 40], list(range(ROWS))[::-1]):
        equal(
            stream(dropout=0.3).batch(np.array(rows), (), 7), {k: v[rows] for k, v in whole.items()}
        )


@pytest.mark.parametrize("change", [{"seed": 1}, {"purpose": "other"}, {"step": 8}])
def test_what_draws_belong_to(change):
    step = change.pop("step", 7)
    one, two = stream().batch(np.arange(9), (), 7), stream(**change).batch(np.arange(9), (), step)
    assert not np.any(one["noise"] == two["noise"])
    np.testing.assert_array_equal(one["tokens"], two["tokens"])


def test_the_forward_process():
    found = stream().batch(np.arange(ROWS), (), 0)
    abar = Schedule().abar[found["time"]].astype(np.float64)[:, None, None, None]
    want = np.sqrt(abar) * stream().latents + np.sqrt(1 - abar) * found["noise"]
    np.testing.assert_allclose(found["latents"], want, atol=1e-6)
    assert found["latents"].dtype == found["noise"].dtype == np.float32
    np.testing.assert_array_equal(found["row_id"], np.arange(ROWS))


def test_what_is_drawn_is_distributed_as_it_says():
    many = stream(dropout=0.1)
    found = [many.batch(np.arange(ROWS), (), step) for step in range(20)]
    noise = np.concatenate([x["noise"].ravel() for x in found])
    assert scipy.stats.kstest(noise, "norm").pvalue > 0.01
    time = np.concatenate([x["time"] for x in found])
    assert (time.min() >= 0) and (time.max() < 1000)
    assert scipy.stats.kstest(time / 1000, "uniform").pvalue > 0.01
    dropped = np.mean([(x["tokens"] == 0).all(1) for x in found])
    assert dropped == pytest.approx(0.1, abs=0.03)
    assert not (stream().batch(np.arange(ROWS), (), 0)["tokens"] == 0).any()


def test_identity_is_of_all_that_batches_are_made_from():
    changed = [
        {"seed": 1},
        {"purpose": "other"},
        {"dropout": 0.1},
        {"dropout": 0.2},
        {"dropout": 0.1, "empty": np.full(5, 3, np.int32)},
        {"schedule": Schedule(beta_end=0.02)},
        {"columns": {"tokens": np.ones((ROWS, 5), np.int32)}},
    ]
    found = [stream().identity(), *(stream(**change).identity() for change in changed)]
    assert len(set(found)) == len(found)
    assert stream().identity() == found[0]
    moved = stream()
    moved.latents[3, 2, 1, 0] += 1
    assert moved.identity() not in found


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="50 latents, but columns of {'tokens': 3}"):
        stream(columns={"tokens": np.zeros((3, 5), np.int32)})
    with pytest.raises(ValueError, match="empty one"):
        stream(empty=None, dropout=0.1)
