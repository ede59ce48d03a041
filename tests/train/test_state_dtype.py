"""Optimizer state in bfloat16: which arrays, how many bytes, and that steps stay the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn.errors import UserError
from models.decoder.model import Decoder, DecoderConfig
from train.options.optimizers import OPTIMIZERS, build, check, over_rows
from train.options.optimizers import options_of as optimizer_of
from train.runtime.sharding import path_str

SHAPES = Decoder(DecoderConfig(32, 8, 12, 2, 2, 1, 4)).shapes()
READS = [name for name, row in OPTIMIZERS.items() if "state_dtype" in row.own]
FIRST = {"mu", "mu_constraint"}  # the fields of a state that hold first moments and momenta


def config_of(name, dtype):
    more = {"state_dtype": dtype} if name in READS or dtype != "float32" else {}
    options = optimizer_of(name, learning_rate=1e-3, schedule="constant", warmup=0.0, **more)
    return over_rows(options, 4)


def state_of(name, dtype):
    tx, _, _ = build(config_of(name, dtype), 2)
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, SHAPES))
    return {path_str(path): leaf for path, leaf in leaves}


def is_first(path):
    parts = path.split("/")
    return bool(FIRST & set(parts)) and "zeroth_order" not in parts  # hybrid's other half


def test_who_keeps_a_first_moment_reads_it():
    assert READS == ["adamw", "muon", "normuon", "teon", "sift", "sophia", "sign", "hybrid"]
    for name in set(OPTIMIZERS) - {"optax-muon"}:  # the peer is used as it is
        assert any(map(is_first, state_of(name, "float32"))) == (name in READS), name
    for name in set(OPTIMIZERS) - set(READS):
        with pytest.raises(UserError, match=f"--optimizer.state-dtype bfloat16: {name} does not"):
            check(config_of(name, "bfloat16"))


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UserError, match="--optimizer.state-dtype 'float16' is unknown.*bfloat16"):
        check(config_of("muon", "float16"))


@pytest.mark.parametrize("name", READS)
def test_first_moments_take_half_the_bytes_and_nothing_else_changes(name):
    whole, half = state_of(name, "float32"), state_of(name, "bfloat16")
    assert whole.keys() == half.keys()
    size = {"first": 0, "first, halved": 0}
    for path, leaf in whole.items():
        assert half[path].shape == leaf.shape
        if is_first(path):
            assert (leaf.dtype, half[path].dtype) == (jnp.float32, jnp.bfloat16), path
            size["first"] += leaf.size * leaf.dtype.itemsize
            size["first, halved"] += half[path].size * half[path].dtype.itemsize
        else:
            assert half[path].dtype == leaf.dtype, path
    # SIFT has a momentum per stream; of AdamW's leaves (embedding, norms) only that of the sum.
    sizes = {path_str(p): x.size for p, x in jax.tree_util.tree_leaves_with_path(SHAPES)}
    twice = sum(n for p, n in sizes.items() if name == "sift" and p.endswith("kernel"))
    assert size["first"] == 4 * (sum(sizes.values()) + twice)
    assert 2 * size["first, halved"] == size["first"]


def steps(name, dtype, count):
    """Updates of every step and the last state, on gradients of a fixed direction and noise."""
    tx, _, needs = build(config_of(name, dtype), count)
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: draw.standard_normal(x.shape, np.float32), SHAPES)
    drift = jax.tree.map(lambda x: draw.standard_normal(x.shape, np.float32), SHAPES)
    state, found = tx.init(params), []
    extra = {"value_fn": lambda p: jnp.zeros(())} if needs == "lazy" else {}
    update = jax.jit(lambda g, s, more: tx.update(g, s, params, **more, **extra))
    for _ in range(count):
        noise = [
            jax.tree.map(lambda x: draw.standard_normal(x.shape, np.float32), SHAPES)
            for _ in range(2)
        ]
        one, other = (jax.tree.map(lambda d, n: 0.5 * d + n, drift, n) for n in noise)
        more = {"constraint_grads": other} if needs == "split" else {}
        updates, new = update(one, state, more)
        assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(updates))
        state = new
        found.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates)]))
    return np.stack(found), state


# Orthogonalised directions amplify rounding of small singular values; a sign flips where the
# momentum is about zero.
@pytest.mark.parametrize(
    ("name", "limit"),
    [("adamw", 0.005), ("sophia", 0.005), ("muon", 0.04), ("teon", 0.04), ("sift", 0.04),
     ("sign", 0.1)],
)  # fmt: skip
def test_steps_do_not_drift(name, limit):
    """After 60 steps an update is as close to that of a float32 state as after a few."""
    whole, _ = steps(name, "float32", 60)
    half, _ = steps(name, "bfloat16", 60)
    off = np.linalg.norm(half - whole, axis=1) / np.linalg.norm(whole, axis=1)
    assert 0 < off.max() < limit, off.max()
    assert off[-20:].mean() < 1.5 * off[20:40].mean()
    lean = np.vdot(half - whole, whole) / np.vdot(whole, whole)  # longer or shorter overall
    assert abs(lean) < 1e-3


@pytest.mark.parametrize("name", ["adamw", "muon", "sophia", "sign"])
def test_the_decay_is_not_rounded(name):
    """0.9 in bfloat16 is 0.898: after 60 steps without a gradient a tenth less would remain."""
    decay = {"muon": {"momentum": 0.9}, "sophia": {"b1": 0.9**0.5}}.get(name, {"b1": 0.9})
    tx = build(optimizer_of(name, state_dtype="bfloat16", **decay), 100)[0]
    ones = {"up": {"kernel": jnp.eye(4)}}
    zeros = jax.tree.map(jnp.zeros_like, ones)
    state = tx.init(ones)
    _, state = tx.update(ones, state, ones)
    (first,) = moments(state)
    state, _ = jax.lax.scan(lambda s, _: (tx.update(zeros, s, ones)[1], None), state, None, 60)
    (last,) = moments(state)
    assert last.dtype == jnp.bfloat16
    left = np.diag(last.astype(jnp.float32) / first.astype(jnp.float32))
    np.testing.assert_allclose(left, 0.9**60, rtol=0.05)


def moments(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [x for path, x in leaves if is_first(path_str(path))]


def test_why_second_moments_stay_wide():
    """A second moment in bfloat16 never decreases: 0.999 of it rounds back to it."""

    def after(dtype):
        decay = jax.jit(lambda v: (0.999 * v.astype(jnp.float32)).astype(dtype))
        v = jnp.ones((), dtype)
        for _ in range(100):
            v = decay(v)
        return float(v)

    assert after(jnp.bfloat16) == 1.0
    assert after(jnp.float32) == pytest.approx(0.999**100, rel=1e-4)
