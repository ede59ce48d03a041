"""The guarantees of Optax, kept by every optimizer: a new one is a row of `ROWS`.

The update rules themselves are compared with float64 loops in the file of each method.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim import orthogonalize

RATE = 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """An optimizer and its capabilities.

    Args:
        make: `rate -> transformation`.
        needs: what `update` receives: grads, split, value or lazy.
        factory: for `inject_hyperparams`, with its static arguments; None: it takes no rate.
        options: of the factory.
        wrappers: Optax's own wrappers that may be put around it.
    """

    name: str
    make: Callable[[Any], Any]
    needs: str = "grads"
    factory: Any = None
    static_args: tuple[str, ...] = ()
    options: dict = dataclasses.field(default_factory=dict)
    wrappers: tuple[str, ...] = ("multi_steps", "apply_if_finite", "partition", "masked")


def whole(name, factory, needs="grads", **options):
    """A row of a factory that takes a learning rate."""
    # Two streams: MultiSteps and apply_if_finite do not see the second one (optim.accumulate and
    # optim.finite do). Zeroth order: masks do not apply inside a value_fn. Variants of a row look
    # the same to a wrapper.
    few = name in ("muon", "teon", "sophia", "sign_momentum")
    wrappers = {
        "grads": ("multi_steps", "apply_if_finite", "partition", "masked") if few else (),
        "split": ("partition", "masked") if name in ("sift", "blur", "weighted_sum") else (),
        "value": (),
        "lazy": (),
    }[needs]
    static = optim.STATIC_ARGS.get(factory.__name__, ())
    return Row(
        name, lambda rate: factory(rate, **options), needs, factory, static, options, wrappers
    )


def bare(name, make, needs="grads"):
    """A row of a direction, chained with a learning rate."""
    row = whole(name, lambda rate: optax.chain(make(), optax.scale_by_learning_rate(rate)), needs)
    return dataclasses.replace(row, factory=None)


def wrapper(name, wrap):
    """A row of a wrapper, around a combiner of two streams and an optimizer of one."""
    return Row(
        name,
        lambda rate: wrap(optax.chain(optim.blur(), wide_adam(rate))),
        "split",
        wrappers=(),
    )


def wide_adam(rate):
    return optax.adam(rate, mu_dtype=jnp.float32)


def no_heads(path):
    return "q/" not in path


ROWS = [
    whole("muon", optim.muon),
    whole("muon-normuon", optim.muon, post=optim.normuon()),
    whole("muon-heads", optim.muon, split={"q/": 2}),
    whole("teon", optim.teon),
    # Half of the random matrices are fused.
    whole("sift", optim.sift, "split", threshold=0.0, adam_learning_rate=0.01, weight_decay=0.1),
    whole("sift-subspace", optim.sift, "split", bases="subspace", rank=2, spatial_mask=no_heads),
    whole("sophia", optim.sophia),
    whole("sophia-paper", optim.sophia, form="paper", b1=0.8, rho=0.1, weight_decay=0.1),
    whole("sign_momentum", optim.sign_momentum, beta=0.8, weight_decay=0.1),
    whole("mezo", optim.mezo, "value"),
    whole("sparse_mezo", optim.sparse_mezo, "value"),
    whole("lozo", optim.lozo, "value", rank=2, refresh_every=2),
    whole("subzero", optim.subzero, "value", rank=2),
    whole("hizoo", optim.hizoo, "value"),
    whole("subspace_mezo", optim.subspace_mezo, "value", rank=2, refresh_every=3),
    # Newton-Schulz, as in muon, amplifies the rounding that was divided by epsilon.
    whole("zo_muon", optim.zo_muon, "value", rank=2, orthogonalize=orthogonalize.svd()),
    whole("rada_zo", optim.rada_zo, "value"),
    whole("fzoo", optim.fzoo, "value", num_queries=2),
    whole("rowwise", optim.rowwise, "value"),
    bare("scale_by_muon", optim.scale_by_muon),
    bare("scale_by_teon", optim.scale_by_teon),
    bare("scale_by_sift", optim.scale_by_sift, "split"),
    bare("scale_by_sophia", optim.scale_by_sophia),
    bare("scale_by_sign_momentum", optim.scale_by_sign_momentum),
    bare("quantize_updates", lambda: optim.quantize_updates(4)),
    bare("blur", optim.blur, "split"),
    bare("pcgrad", optim.pcgrad, "split"),
    bare("weighted_sum", optim.weighted_sum, "split"),
    bare("sam", optim.sam, "lazy"),
    bare("randomised_smoothing", optim.randomised_smoothing, "lazy"),
    Row(
        "alternate",
        lambda rate: optim.alternate(wide_adam(rate), optim.rada_zo(rate), period=1),
        "lazy",
        wrappers=(),
    ),
    wrapper("accumulate", lambda tx: optim.accumulate(tx, 2)),
    wrapper("finite", optim.finite),
    wrapper("clip_streams", lambda tx: optim.clip_streams(1.0, tx)),
    wrapper("wrappers", lambda tx: optim.finite(optim.accumulate(optim.clip_streams(1.0, tx), 2))),
    Row(
        "keep_first_moments",
        lambda rate: optim.keep_first_moments(optax.adamw(rate), jnp.bfloat16),
        wrappers=(),
    ),
]

every = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def able(wrapper):
    rows = [row for row in ROWS if wrapper in row.wrappers]
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


def draw(seed, dtype=np.float32):
    """Stacked, wide, tall and square matrices, a vector per layer, and a vector."""
    rng = np.random.default_rng(seed)
    shapes = {
        "layers": {"q": {"kernel": (3, 4, 4)}, "up": {"kernel": (3, 4, 6)}, "ln": (3, 4)},
        "down": {"kernel": (6, 4)},
        "bias": (4,),
    }

    def one(shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, tuple))


def tree_of(row, seed, dtype=np.float32):
    """The tree of a row: a bare direction would take the stack of vectors for a matrix.

    Zeroth order, whose programs grow with every leaf, does without the square matrices.
    """
    tree = draw(seed, dtype)
    left_out = "ln" if row.factory is None else "q" if row.needs == "value" else ""
    return {**tree, "layers": {k: x for k, x in tree["layers"].items() if k != left_out}}


def value_fn(params):
    """Smooth, with a minimum, and never flat."""
    total = [jnp.sum(jnp.square(x.astype(jnp.float32) - 0.5)) for x in jax.tree.leaves(params)]
    return sum(total[1:], total[0]) / 10


@functools.cache
def stepper(row, rate=RATE):
    """The jitted step of a row's transformation; every test of the row shares its compilation.

    It donates parameters and state.
    """
    return jitted(row, row.make(rate), donate=(2, 3))


def jitted(row, tx, donate=()):
    """`(grads, constraint, state, params) -> (params, state)`, counting its traces."""

    def one(grads, constraint, state, params):
        one.traces += 1
        updates, state = handed(row, tx, grads, constraint, state, params)
        return optax.apply_updates(params, updates), state

    one.traces = 0
    return tx, jax.jit(one, donate_argnums=donate), one


def handed(row, tx, grads, constraint, state, params, **extra):
    """One update with the arguments that the row needs."""
    more = wanted(row, constraint)
    return tx.update(None if "value_fn" in more else grads, state, params, **more, **extra)


def wanted(row, constraint, value=value_fn):
    """The extra arguments that a row needs."""
    return {
        "grads": {},
        "split": {"constraint_grads": constraint},
        "value": {"value_fn": value},
        "lazy": {"value_fn": value, "grad_fn": gradient_of(value)},
    }[row.needs]


@functools.cache
def gradient_of(value):
    return jax.grad(value, allow_int=True)


def run(row, made, steps=3, state=None, params=None, first=0):
    """Parameters and state after some steps."""
    tx, step, _ = made
    params = tree_of(row, 0) if params is None else params
    state = tx.init(params) if state is None else state
    for i in range(first, first + steps):
        params, state = step(tree_of(row, 100 + i), tree_of(row, 200 + i), state, params)
    return params, state


def same(a, b, **limits):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.float64(x), np.float64(y), **limits)


def shapes(tree):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


@every
def test_moves_every_leaf_and_compiles_once(row):
    made = stepper(row)
    start = tree_of(row, 0)
    params, state = run(row, made, state=jax.jit(made[0].init)(start))
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(params), strict=True):
        assert np.all(np.isfinite(new)) and np.any(new != old)
    assert made[2].traces == 1 and made[1]._cache_size() == 1
    if row.factory is not None:  # wrappers do not count every step, combiners none
        assert {int(n) for _, n in optax.tree.get_all_with_path(state, "count")} == {3}
    leaves = jax.tree.leaves(state)
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves)


@every
def test_donates_parameters_and_state(row):
    """After an eager `init`: no buffer occurs twice, and none is a parameter's own."""
    tx, step, _ = stepper(row)
    params, grads, constraint = (tree_of(row, seed) for seed in (0, 100, 200))
    state = tx.init(params)
    assert shapes(state) == shapes(jax.eval_shape(tx.init, params))
    given = jax.tree.leaves(params)
    params, state = step(grads, constraint, state, params)
    assert all(x.is_deleted() for x in given)  # diagnostics of the state may not be inputs
    params, _ = step(grads, constraint, state, params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


# Four training loops, which keep parameters and state in different containers


def plain_loop(row, tx, params, grads, constraints):
    state = tx.init(params)
    for g, c in zip(grads, constraints, strict=True):
        updates, state = handed(row, tx, g, c, state, params)
        params = optax.apply_updates(params, updates)
    return params


def linen_loop(row, tx, params, *streams):
    params, streams = flax.core.freeze(params), [map(flax.core.freeze, s) for s in streams]
    state = TrainState.create(apply_fn=lambda: None, params=params, tx=tx)
    for g, c in zip(*streams, strict=True):
        updates, opt_state = handed(row, state.tx, g, c, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state.params


class Module(nnx.Module):
    def __init__(self, tree):
        for name, x in tree.items():
            setattr(self, name, Module(x) if isinstance(x, dict) else nnx.Param(x))


def nnx_loop(row, tx, params, *streams):
    model = Module(params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for g, c in zip(*streams, strict=True):
        g, c = (nnx.state(Module(x), nnx.Param) for x in (g, c))
        optimizer.update(model, g, **wanted(row, c))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


class Equinox(eqx.Module):
    bias: Any
    down: Any
    layers: Any
    activation: Callable = jax.nn.relu  # None among the parameters


def equinox_loop(row, tx, params, *streams):
    params, rest = eqx.partition(Equinox(**params), eqx.is_inexact_array)
    state = tx.init(params)
    for g, c in zip(*streams, strict=True):
        g, c = (eqx.filter(Equinox(**x), eqx.is_inexact_array) for x in (g, c))
        updates, state = handed(row, tx, g, c, state, params)
        params = eqx.apply_updates(params, updates)
    return jax.tree.leaves(eqx.filter(eqx.combine(params, rest), eqx.is_array))


LOOPS = {"linen": linen_loop, "nnx": nnx_loop, "equinox": equinox_loop}
loops = pytest.mark.parametrize("name", LOOPS)


@loops
@every
def test_two_steps_in_other_loops(row, name):
    """Traced only: what can fail there is the structure of the returned state."""
    tx, params = row.make(RATE), tree_of(row, 0)
    leaves = jax.eval_shape(lambda p, g: LOOPS[name](row, tx, p, [g] * 2, [g] * 2), params, params)
    assert shapes(leaves) == shapes(params)


def computed(*fast):
    """All rows, of which those that are not named are slow."""
    rows = [row if row.name in fast else pytest.param(row, marks=pytest.mark.slow) for row in ROWS]
    return pytest.mark.parametrize("row", rows, ids=[row.name for row in ROWS])


def quick(row):
    """A row's transformation, its update jitted; loops around it are not."""
    tx = row.make(RATE)
    update = jax.jit(tx.update, static_argnames=("value_fn", "grad_fn"))
    return optax.GradientTransformationExtraArgs(tx.init, update)


def close(row, found, want, start):
    # Zeroth order divides rounding by epsilon.
    same(found, want, atol=2e-3 if row.needs in ("value", "lazy") else 1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), want, start)
    assert min(jax.tree.leaves(moved)) > (0 if row.needs == "value" else 1e-3)


# In the fast suite, a row whose state is not a tree like the parameters.
@computed("sift-subspace")
def test_other_loops_compute_the_same(row):
    tx, params = quick(row), tree_of(row, 0)
    streams = [[tree_of(row, seed + i) for i in range(2)] for seed in (100, 200)]
    want = jax.tree.leaves(plain_loop(row, tx, params, *streams))
    for loop in LOOPS.values():
        found = jax.tree.leaves(loop(row, tx, params, *streams))
        close(row, found, want, jax.tree.leaves(params))


# Models of flax's layers, with gradients as flax takes them


class Block(nnx.Module):
    def __init__(self, rngs):
        self.q = nnx.Linear(4, 4, rngs=rngs)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.Block_0, self.Block_1 = Block(rngs), Block(rngs)

    def __call__(self, x):
        return self.Block_1.q(nnx.tanh(self.Block_0.q(x)))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="q")(x)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return LinenBlock(name="Block_1")(nn.tanh(LinenBlock(name="Block_0")(x)))


def losses(predict):
    """The losses of two streams, which ask for different outputs."""

    def loss(seed):
        x, y = np.float32(np.random.default_rng(seed).standard_normal((2, 5, 4)))
        return lambda model: jnp.mean((predict(model, x) - y) ** 2)

    return loss(0), loss(1)


def with_linen(row, tx, params):
    apply = Linen().apply
    primary, constraint = losses(lambda params, x: apply({"params": params}, x))
    state = TrainState.create(apply_fn=apply, params=params, tx=tx)
    for _ in range(2):
        more = wanted(row, jax.grad(constraint)(state.params), primary)
        g = jax.grad(primary)(state.params)
        updates, opt_state = state.tx.update(g, state.opt_state, state.params, **more)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state.params


def with_nnx(row, tx, params):
    model, graph = Net(), nnx.graphdef(Net())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    primary, constraint = losses(lambda model, x: model(x))

    def value(params):
        return primary(nnx.merge(graph, params))

    for _ in range(2):
        more = wanted(row, nnx.grad(constraint)(model), value)
        optimizer.update(model, nnx.grad(primary)(model), **more)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@computed("mezo", *(r.name for r in ROWS if r.needs != "value" and "scale_by" not in r.name))
def test_models_of_flax(row):
    tx, params = quick(row), nnx.to_pure_dict(nnx.state(Net(), nnx.Param))
    close(row, with_nnx(row, tx, params), with_linen(row, tx, params), params)


def test_apply_gradients_has_one_stream_only():
    """Pinned: keywords of flax's method are fields of the state, not arguments of the optimizer."""
    grads = {"w": jnp.ones((2, 3))}
    state = TrainState.create(apply_fn=lambda: None, params=grads, tx=optim.sift(RATE))
    for more in ({}, {"constraint_grads": grads}):
        with pytest.raises(ValueError, match="constraint_grads="):
            state.apply_gradients(grads=grads, **more)


@every
def test_integers_and_empty_leaves_pass_by(row):
    """From shapes alone; the state has no entry for them."""
    tx, params = row.make(RATE), tree_of(row, 0)
    more = {
        **params,
        "count": jnp.arange(3),
        "layers": {**params["layers"], "none": jnp.ones((3, 0, 4))},
    }

    def steps(p, g):
        return plain_loop(row, tx, p, [g] * 2, [g] * 2), tx.init(p)

    after, state = jax.eval_shape(steps, more, more)
    assert shapes(after) == shapes(more)
    if row.needs != "value":  # theirs is like the parameters, with None
        assert shapes(state) == shapes(jax.eval_shape(tx.init, params))


def test_integers_come_back_as_they_went():
    params = {"w": jnp.ones((2, 3)), "count": jnp.arange(3), "none": jnp.ones((0, 4))}
    tx = optim.muon(RATE)
    update = jax.jit(tx.update)
    updates, _ = update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["count"], params["count"])
    alone = {"w": params["w"]}
    np.testing.assert_array_equal(updates["w"], update(alone, tx.init(alone), alone)[0]["w"])
    # As from `jax.grad(..., allow_int=True)`.
    none = {**params, "count": np.zeros(3, jax.dtypes.float0)}
    updates, _ = tx.update(none, tx.init(params), params)
    np.testing.assert_array_equal(updates["count"], np.zeros(3))


@pytest.mark.parametrize(
    "row",
    [
        row
        for row in ROWS
        if row.name in ("lozo", "alternate", "accumulate", "randomised_smoothing")
    ],
    ids=lambda row: row.name,
)
def test_an_eager_step_compiles_once(row, caplog):
    """Also if the loss is a new function at every step, as with a new batch."""
    tx, params = row.make(RATE), tree_of(row, 0)
    state, grads = tx.init(params), tree_of(row, 100)

    def step(state):
        more = wanted(row, grads)
        more = {k: (lambda p, f=f: f(p)) if callable(f) else f for k, f in more.items()}
        return tx.update(None if "value_fn" in more else grads, state, params, **more)[1]

    state = step(step(state))  # one of either kind

    def compiled():
        return [r.message for r in caplog.records if r.message.startswith("Compiling")]

    with jax.log_compiles():
        state = step(step(state))
        assert not compiled()
        jax.jit(lambda x: x + 1)(1.0)
        assert compiled()  # the check detects a compilation


WIDE = [(row, jnp.float64) for row in ROWS if row.name == "sift-subspace"]


@pytest.mark.parametrize(
    ("row", "dtype"),
    [(row, dtype) for row in ROWS for dtype in (jnp.float32, jnp.bfloat16)] + WIDE,
    ids=lambda x: getattr(x, "name", None),
)
def test_shapes_and_dtypes_stay(row, dtype):
    """Of updates and state, from shapes alone; unknown extra arguments are ignored."""
    more = {"unknown": None, "loss": 1.0} | ({} if row.needs == "value" else {"value": 1.0})
    with jax.enable_x64(dtype == jnp.float64):
        tx = row.make(RATE)
        params = jax.eval_shape(lambda: tree_of(row, 0, dtype))
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(
            lambda g, s, p: handed(row, tx, g, g, s, p, **more), params, state, params
        )
    assert shapes(updates) == shapes(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert shapes(after) == shapes(state)
    weak = [x.weak_type for x in jax.tree.leaves((updates, after))]
    assert not any(weak)


@every
def test_saved_and_restored_mid_run(row):
    """Through plain arrays, as in a checkpoint: the trajectory continues bit for bit."""
    made = stepper(row)
    straight, _ = run(row, made, 4)
    params, state = run(row, made, 2)
    leaves, structure = jax.tree.flatten(state)
    state = jax.tree.unflatten(structure, [jnp.asarray(np.array(x)) for x in leaves])
    resumed, _ = run(row, made, 2, state=state, params=params, first=2)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


# By how much an eager step may differ: rtol and atol.
EAGER = {
    **dict.fromkeys(("sophia", "sophia-paper", "sign_momentum", "quantize_updates"), (1e-6, 0)),
    **dict.fromkeys(("muon", "teon", "blur", "pcgrad", "weighted_sum"), (1e-5, 5e-7)),
    **dict.fromkeys(("sam", "randomised_smoothing"), (1e-5, 5e-8)),
    **{"sift": (1e-7, 5e-8), "alternate": (1e-5, 5e-7)},
    **dict.fromkeys(("lozo", "zo_muon"), (0, 1e-3)),  # rounding, divided by epsilon
}


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.name in EAGER], ids=lambda row: row.name
)
def test_jit_is_eager(row):
    """From parameters so small that their sum with an update has the digits of the update."""
    made, (rtol, atol) = stepper(row), EAGER[row.name]
    grads, constraint, params = (tree_of(row, seed) for seed in (100, 200, 0))
    params = jax.tree.map(lambda x: x / 100, params)
    updates, state = handed(row, made[0], grads, constraint, made[0].init(params), params)
    eager = optax.apply_updates(params, updates)
    jitted_params, jitted_state = run(row, made, 1, params=params)
    same(jitted_params, eager, rtol=rtol, atol=atol)
    same(jitted_state, state, rtol=1e-5, atol=2e-3 if row.needs == "value" else 0)


SCHEDULED = [
    row for row in ROWS if row.needs in ("value", "lazy") or row.name in ("muon", "sift", "sophia")
]


@pytest.mark.parametrize("row", SCHEDULED, ids=lambda row: row.name)
def test_rate_as_schedule(row):
    steady = stepper(row)
    falling = jitted(row, row.make(lambda count: RATE / (1 + count)))
    once, half = run(row, steady, 1)[0], run(row, falling, 1)[0]
    same(once, half, atol=1e-6)
    # Three steps: the third is the second of one of `alternate`'s two, each with its own count.
    straight, slower = (jax.tree.leaves(run(row, made)[0]) for made in (steady, falling))
    assert any(np.any(a != b) for a, b in zip(straight, slower, strict=True))


# By how much an injected step may differ.
INJECTED = {
    "sign_momentum": {"rtol": 1e-6},
    **dict.fromkeys(("sophia", "sophia-paper"), {"rtol": 1e-5, "atol": 1e-7}),
}


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.factory is not None], ids=lambda row: row.name
)
def test_inject_hyperparams(row):
    """Every number that is not static is traced; the rate may be a schedule."""
    rate = optax.constant_schedule(RATE) if row.name == "sign_momentum" else RATE
    tx = optax.inject_hyperparams(row.factory, static_args=row.static_args)(rate, **row.options)
    found, want = (
        run(row, made, params=jax.tree.map(lambda x: x / 100, tree_of(row, 0)))
        for made in (jitted(row, tx), stepper(row))
    )
    limits = {"atol": 1e-4 if row.needs == "value" else 2e-6}
    same(found[0], want[0], **INJECTED.get(row.name, limits))
    if row.needs == "split":  # a matrix: no AdamW, which divides by 1 - b2, traced
        same(found[0]["down"], want[0]["down"], atol=5e-7)
    hyper = found[1].hyperparams
    options = {name: x.default for name, x in inspect.signature(row.factory).parameters.items()}
    numbers = {name for name, x in (options | row.options).items() if type(x) is float}
    assert set(hyper) == numbers - set(row.static_args) | {"learning_rate"}
    assert float(hyper["learning_rate"]) == pytest.approx(RATE)


@able("multi_steps")
def test_multi_steps(row):
    """Two calls with one gradient: no update first, then the plain step."""
    tx, step, _ = jitted(row, optax.MultiSteps(row.make(RATE), 2))
    params, grads = tree_of(row, 0), tree_of(row, 100)
    first, state = step(grads, grads, tx.init(params), params)
    same(first, params)
    second, _ = step(grads, grads, state, params)
    same(second, run(row, stepper(row), 1)[0], atol=1e-6)


@able("apply_if_finite")
def test_apply_if_finite(row):
    tx, step, _ = jitted(row, optax.apply_if_finite(row.make(RATE), 3))
    params, grads = tree_of(row, 0), tree_of(row, 100)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    skipped, state = step(bad, bad, tx.init(params), params)
    same(skipped, params)
    same(step(grads, grads, state, params)[0], run(row, stepper(row), 1)[0], atol=1e-6)


def labels_of(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "ours" if "layers" in jax.tree_util.keystr(path) else "other", params
    )


@able("partition")
def test_partition(row):
    """A part of the tree: the same step as on that part alone; another rule moves the rest."""
    two = {"ours": row.make(RATE), "other": optax.sgd(RATE)}
    tx = optax.partition(two, labels_of, mask_compatible_extra_args=True)
    params, grads = tree_of(row, 0), tree_of(row, 100)
    after, _ = run(row, jitted(row, tx), 1)
    alone = jitted(row, row.make(RATE))
    part, both = ({"layers": tree["layers"]} for tree in (params, grads))
    constraint = {"layers": tree_of(row, 200)["layers"]}
    want, _ = alone[1](both, constraint, alone[0].init(part), part)
    same(after["layers"], want["layers"], atol=1e-6)
    same(after["bias"], params["bias"] - RATE * grads["bias"], atol=1e-6)


@able("masked")
def test_masked(row):
    params, grads = tree_of(row, 0), tree_of(row, 100)
    mask = jax.tree.map(lambda label: label == "ours", labels_of(params))
    tx = optax.masked(row.make(RATE), mask, mask_compatible_extra_args=True)
    after, _ = run(row, jitted(row, tx), 1)
    same(after["bias"], params["bias"] + grads["bias"], atol=1e-6)  # passed through unchanged
    kernels = [tree["layers"]["q"]["kernel"] for tree in (after, params, grads)]
    assert np.abs(kernels[0] - kernels[1] - kernels[2]).max() > 1e-3


def test_every_public_optimizer_has_a_row():
    named = {row.name for row in ROWS}
    transforms = {
        name
        for name in optim.__all__
        if callable(getattr(optim, name)) and not isinstance(getattr(optim, name), type)
    }
    helpers = {"normuon", "ends_on_zeroth_order", "round_to_zeroth_order"}
    # Zeroth order: the whole method is its bare form and a rate (test_names.py).
    bare = {name for name in transforms if name.removeprefix("scale_by_") in named}
    missing = transforms - named - helpers - bare
    assert not missing, missing
