"""The options of Muon, NorMuon and TEON: a row's step is the library's with the same words."""

import jax
import numpy as np
import pytest

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim.spectral.groups import picker
from train.options.optimizer_rows import GROUPS
from train.options.optimizers import build, options_of, schedule_numbers, schedule_of

LEAVES = {
    "layers": {
        "attn": {"q": {"kernel": (4, 6, 10)}, "o": {"kernel": (4, 10, 6)}},
        "mlp": {"up": {"kernel": (4, 6, 14)}},
    },
    "embed": {"embedding": (9, 6)},
    "norm": {"scale": (6,)},
}


def drawn(seed):
    draw = np.random.default_rng(seed)
    shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    return jax.tree.map(lambda s: draw.standard_normal(s).astype(np.float32), LEAVES, **shape)


PARAMS, GRADS = drawn(0), [drawn(1), drawn(2)]


def steps_of(tx):
    """The updates of two steps."""
    state, found = tx.init(PARAMS), []
    for grads in GRADS:
        updates, state = tx.update(grads, state, PARAMS)
        found.append(updates)
    return found


@pytest.mark.parametrize(
    ("name", "given", "make", "words"),
    [
        ("muon", {}, optim.muon, {"shape_scale": "match_rms"}),
        ("muon", {"nesterov": False, "shape_scale": "unit", "orthogonalize": "svd"}, optim.muon,
         {"nesterov": False, "shape_scale": "unit", "orthogonalize": "svd"}),
        ("muon", {"shape_scale": "spectral", "orthogonalize": "you"}, optim.muon,
         {"shape_scale": "spectral", "orthogonalize": "you6"}),
        ("normuon", {"second_momentum": 0.8}, optim.muon,
         {"shape_scale": "match_rms", "post": optim.normuon(0.8)}),
        ("teon", {}, optim.teon, {"shape_scale": "match_rms"}),
        ("teon", {"axis": "out", "shape_scale": "width", "group_size": 4, "nesterov": True},
         optim.teon, {"axis": "out", "shape_scale": "width", "group_size": 4, "nesterov": True}),
        ("teon", {"groups": "all", "orthogonalize": "jordan"}, optim.teon,
         {"groups": None, "orthogonalize": "jordan", "shape_scale": "match_rms"}),
    ],
)  # fmt: skip
def test_rows_are_the_library(name, given, make, words):
    rate = {"learning_rate": 0.03, "weight_decay": 0.1}
    tx, _, _ = build(options_of(name, schedule="constant", warmup=0.0, **rate, **given), 5)
    for ours, theirs in zip(steps_of(tx), steps_of(make(0.03, weight_decay=0.1, **words)),
                            strict=True):  # fmt: skip
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-9), ours,
                     theirs)  # fmt: skip


def test_groups_are_projections():
    paths = [f"layers/{p}/kernel" for p in "attn/q attn/k attn/v attn/o mlp/gate mlp/up".split()]
    for word, count in (("qkv", 3), ("qkvo", 4), ("all", 6)):
        picked = picker(GROUPS.value(word))
        assert [path for path in paths if picked(path)] == paths[:count]


@pytest.mark.parametrize("name", ["muon", "normuon", "teon"])
def test_the_other_leaves_have_a_rate_of_their_own(name):
    """Both follow the schedule; without decay AdamW's first step is its rate."""
    same = {"schedule": "linear", "warmup": 0.0, "learning_rate": 0.5}
    alike = steps_of(build(options_of(name, **same), 4)[0])
    apart = steps_of(build(options_of(name, **same, adam_learning_rate=0.01), 4)[0])
    np.testing.assert_allclose(abs(apart[0]["norm"]["scale"]), 0.01, rtol=1e-4)
    for one, other in zip(alike, apart, strict=True):
        kernels = [(tree["layers"], tree["embed"]["embedding"]) for tree in (one, other)]
        jax.tree.map(np.testing.assert_array_equal, kernels[0][0], kernels[1][0])
        np.testing.assert_allclose(kernels[1][1], 0.02 * kernels[0][1], rtol=1e-5)


@pytest.mark.parametrize(("hold", "floor", "warmup"), [(0.4, 0.1, 0.0), (0.0, 0.0, 0.2)])
def test_a_schedule_that_holds(hold, floor, warmup):
    """Constant for a share of what follows the warm-up, then a line to 0 down to the floor."""
    config = options_of("adamw", learning_rate=2.0, schedule="hold", warmup=warmup, hold=hold,
                        floor=floor)  # fmt: skip
    rate = schedule_of("hold", schedule_numbers(config, 50))
    warm = round(warmup * 50)
    for step in range(50):
        done = (step - warm) / (50 - warm)
        want = 2.0 if done <= hold else max(floor, (1 - done) / (1 - hold)) * 2.0
        if step >= warm:
            assert float(rate(step)) == pytest.approx(want, rel=1e-5)
        else:
            assert 0 < float(rate(step)) < 2.0
    at_floor = np.array([float(rate(step)) for step in range(50)]) <= 2.0 * floor + 1e-6
    assert at_floor.sum() == (3 if floor else 0)  # reached after nine tenths of the fall
