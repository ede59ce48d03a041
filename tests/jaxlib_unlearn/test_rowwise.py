"""Row-wise directions and random signs: a dense loop over rows in float64, means, shared axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import random_tree

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim.zeroth_order import directions, perturbations
from jaxlib_unlearn.optim.zeroth_order.engine import scale_by_zeroth_order, zeroth_order
from jaxlib_unlearn.optim.zeroth_order.leaves import layout_of
from jaxlib_unlearn.optim.zeroth_order.parts import Part, take
from jaxlib_unlearn.optim.zeroth_order.perturbations import QUERY, Factored, leaf_keys, matmul

ROWS, LENGTH, VOCAB, WIDTH = 6, 3, 7, 4
TOKENS = np.random.default_rng(2).integers(0, VOCAB, (ROWS, LENGTH))
TAKES = ("embed/embedding", "lm_head/kernel")


def tree(seed=0):
    """A table, stacked layers with kernels and vectors, a head: every kind of leaf."""
    shapes = {
        "embed": {"embedding": (VOCAB, WIDTH)},
        "layers": {
            "up": {"kernel": (2, WIDTH, 5), "bias": (2, 5)}, "down": {"kernel": (2, 5, WIDTH)},
        },
        "lm_head": {"kernel": (WIDTH, VOCAB)},
        "shift": (VOCAB,),
    }  # fmt: skip
    return random_tree(seed, np.float64, shapes)


def loss(params, layer_map=None, tokens=TOKENS):
    """Mean negative log-likelihood of the next token, in the arithmetic of its arguments."""
    tokens = jnp.asarray(tokens)
    table = params["embed"]["embedding"]
    if isinstance(table, Factored):
        x = table.kernel[tokens] + table.left[tokens] @ table.right.T
    else:
        x = jnp.asarray(table)[tokens]

    def block(x, inputs):
        layer, index = inputs
        layer = layer if layer_map is None else layer_map(layer, index)
        inner = jnp.tanh(matmul(x, layer["up"]["kernel"]) + layer["up"]["bias"])
        return x + matmul(inner, layer["down"]["kernel"]), None

    x, _ = jax.lax.scan(block, x, (params["layers"], jnp.arange(2)))
    logits = matmul(x, params["lm_head"]["kernel"]) + params["shift"]
    log_p = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], -1))


def by_part(params, layer_map=None, part=None):
    """The loss of the batch, or of one part."""
    rows = TOKENS if part is None else take(jnp.asarray(TOKENS), part)
    return loss(params, layer_map, rows)


def dense_directions(params, step, count, rank, seed=0):
    """Every query's direction as NumPy trees, multiplied out leaf by leaf and layer by layer."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), QUERY), step)
    leaves, structure = jax.tree.flatten(params)

    def one(leaf, shape, key):
        if leaf.axes is None:
            return np.asarray(jax.random.normal(key, shape))
        _, fan_in, fan_out = leaf.axes.sizes(shape)
        r = min(rank, fan_in, fan_out)
        core = np.asarray(jax.random.normal(key, (1, fan_in + fan_out, r)))[0]
        z = core[:fan_in] @ core[fan_in:].T / np.sqrt(r)
        return z if shape == (fan_in, fan_out) else z.T  # a table is (out, in)

    found = []
    for query in range(count):
        mine, zs = jax.random.fold_in(key, query), []
        for leaf, x in zip(layout_of(params).leaves, leaves, strict=True):
            stacked = leaf.path.startswith("layers")
            layers = range(len(x)) if stacked else [None]
            drawn = [one(leaf, leaf.shape, leaf_keys(mine, [leaf], index)[0]) for index in layers]
            zs.append(np.stack(drawn) if stacked else drawn[0])
        found.append(jax.tree.unflatten(structure, zs))
    return found


@pytest.mark.parametrize(
    ("form", "rank", "parts"),
    [
        pytest.param("copies", 1, ROWS, marks=pytest.mark.slow),
        ("layers", 3, ROWS),
        ("factored leaves", 2, 2),
        pytest.param("factored leaves", 1, ROWS, marks=pytest.mark.slow),
    ],
)
def test_every_row_perturbed_alone_in_float64(form, rank, parts):
    """Coefficients and update of two steps, against a loop over rows with dense matrices."""
    with jax.enable_x64(True):
        params, eps, decay = jax.tree.map(jnp.asarray, tree()), 0.3, 0.1
        tx = optim.rowwise(0.5, rank=rank, num_queries=parts, eps=eps, weight_decay=decay)
        extra = {"value_fn": functools.partial(by_part, layer_map=None)}
        if form != "copies":
            extra = {"layered_value_fn": by_part}
        if form == "factored leaves":
            extra["factored_leaves"] = TAKES
        step = jax.jit(functools.partial(tx.update, None, **extra))
        state = tx.init(params)
        value = jax.jit(loss, static_argnames="layer_map")
        for number in range(2):
            updates, state = step(state, params)
            zs = dense_directions(params, number, parts, rank)
            rows, coeffs, ends = np.split(TOKENS, parts), [], []
            for z, mine in zip(zs, rows, strict=True):
                pair = [
                    float(value(jax.tree.map(lambda x, d, e=e: x + e * d, params, z), tokens=mine))
                    for e in (eps, -eps)
                ]
                coeffs.append((pair[0] - pair[1]) / (2 * eps))
                ends += pair
            np.testing.assert_allclose(state.coeffs, coeffs, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(state.value, np.mean(ends), rtol=1e-12)
            for leaf, got, x, *mine in zip(
                layout_of(params).leaves, *map(jax.tree.leaves, (updates, params, *zs)), strict=True
            ):
                mean = sum(c * z for c, z in zip(coeffs, mine, strict=True)) / parts
                want = -0.5 * (mean + (decay * x if leaf.decayed else 0))
                np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12, err_msg=leaf.path)
            params = jax.tree.map(jnp.add, params, updates)


def wavy(params):
    return jnp.sum(jnp.sin(params["w"])) + jnp.sum(jnp.square(params["w"] @ params["b"]))


def pair(seed=0):
    draw = np.random.default_rng(seed)
    return {"w": jnp.asarray(draw.normal(size=(3, 4))), "b": jnp.asarray(draw.normal(size=4))}


def test_one_part_is_the_whole_batch():
    """Then no part is asked for, and a direction of rank one is tried on all rows."""
    with jax.enable_x64(True):
        params, eps = pair(), 0.3
        tx = optim.rowwise(0.5, eps=eps)
        (z,) = dense_directions(params, 0, 1, 1)
        ends = [wavy(jax.tree.map(lambda x, d, e=e: x + e * d, params, z)) for e in (eps, -eps)]
        state = jax.jit(lambda p: tx.update(None, tx.init(p), p, value_fn=wavy)[1])(params)
        np.testing.assert_allclose(state.coeffs, [(ends[0] - ends[1]) / (2 * eps)], rtol=1e-10)


def test_the_mean_over_draws_is_the_gradient_of_a_quadratic():
    """Rows with losses of their own; smoothing adds a constant to a quadratic, so nothing here."""
    rows, shape = 4, (3, 5)
    draw = np.random.default_rng(0)
    x, y, w = (draw.normal(size=s) for s in ((rows, 3), (rows, 5), shape))
    data = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), {"x": x, "y": y})
    params = {"w": jnp.asarray(w, jnp.float32)}
    want = x.T @ (x @ w - y) / rows

    def value_fn(params, part):
        mine = take(data, part)
        return 0.5 * jnp.sum(jnp.square(mine["x"] @ params["w"] - mine["y"])) / len(mine["x"])

    def estimate(seed):
        tx = scale_by_zeroth_order(
            perturbations.rowwise(2), num_queries=rows, eps=0.5, query_batch=rows
        )
        state = tx.init(params)._replace(seed=seed)
        return tx.update(None, state, params, value_fn=value_fn)[0]["w"]

    found = np.asarray(jax.jit(jax.vmap(estimate))(jnp.arange(20000, dtype=jnp.uint32)), np.float64)
    error = found.std(0) / len(found) ** 0.5
    assert error.max() < 0.03 * np.abs(want).max()
    # 15 entries: 3.5 standard errors are passed by one of them in 150 tries.
    assert (np.abs(found.mean(0) - want) < 3.5 * error).all()


def test_the_mean_over_draws_of_a_cubic_is_as_documented():
    """``E[f'(w + eps z) v^2]`` with ``f = w^3``, which is ``3 w^2 + 9 eps^2``."""
    eps, w = 0.5, 0.7
    params = {"w": jnp.full((1, 1, 2, 2), w)}  # matrices of one entry would be vectors
    weights = jnp.zeros((2, 2)).at[0, 0].set(1.0)

    def estimate(seed):
        tx = scale_by_zeroth_order(perturbations.rowwise(1), eps=eps)
        state = tx.init(params)._replace(seed=seed)
        out, _ = tx.update(
            None, state, params, value_fn=lambda p: jnp.sum(weights * p["w"][0, 0] ** 3)
        )
        return out["w"][0, 0, 0, 0]

    found = np.asarray(jax.jit(jax.vmap(estimate))(jnp.arange(100000, dtype=jnp.uint32)))
    error = found.std() / len(found) ** 0.5
    assert error < 0.1
    assert abs(found.mean() - (3 * w**2 + 9 * eps**2)) < 3.5 * error


def test_variance_of_entries_and_rank_of_a_direction():
    layout = layout_of({"w": jnp.zeros((6, 5))})
    draws = directions.Draws(jax.random.key(0), jax.random.key(1), [()], [{}])

    def one(query):
        family = perturbations.rowwise(2)
        start = [jnp.zeros((6, 5))]
        return directions.perturbed(family, layout, draws, start, query, jnp.float32(1.0))[0]

    z = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(4000)))
    assert np.linalg.svd(z[0], compute_uv=False)[2] < 1e-5
    flat = z.reshape(len(z), -1)
    second = flat.T @ flat / len(z)
    # An entry's square has the variance 3 * 3 / 2 + 1.5 - 1 = 5; products less.
    assert np.abs(second - np.eye(30)).max() < 5 * (5 / len(z)) ** 0.5


def test_more_queries_than_are_multiplied_at_once(monkeypatch):
    """Sums in chunks, the last one filled up."""
    params = {"w": jnp.ones((4, 3))}
    tx = scale_by_zeroth_order(perturbations.rowwise(1), num_queries=5)
    coeffs = jnp.arange(1.0, 6.0)
    state = tx.init(params)
    want = jax.jit(lambda: tx.update(None, state, params, coeffs=coeffs)[0]["w"])()
    monkeypatch.setattr(directions, "AT_ONCE", 2)
    got = jax.jit(lambda: tx.update(None, state, params, coeffs=coeffs)[0]["w"])()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_devices_share_the_rows():
    """On an axis of its own, and fewer of them at a time: the same step."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree())
    mesh = jax.make_mesh((2,), ("query",), (AxisType.Auto,), devices=jax.devices()[:2])
    found = []
    for axis, at_once in ((None, None), ("query", 4)):
        tx = optim.rowwise(0.1, num_queries=ROWS, eps=0.5, query_axis=axis, query_batch=at_once)
        mine = params
        if axis is not None:
            mine = jax.device_put(params, NamedSharding(mesh, P()))
        extra = {"layered_value_fn": by_part, "factored_leaves": TAKES}
        step = jax.jit(lambda p, t=tx, e=extra: t.update(None, t.init(p), p, **e))
        found.append(jax.device_get(step(mine)))
    (alone, first), (shared, second) = found
    # float32 losses of about 3 are rounded by 2e-7.
    np.testing.assert_allclose(second.coeffs, first.coeffs, atol=2e-6)
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_what_does_not_go_together_is_told():
    with pytest.raises(ValueError, match="rowwise.*as many evaluations as 'central'"):
        zeroth_order(0.1, perturbations.rowwise(1), estimator="forward")
    with pytest.raises(ValueError, match="not linear"):
        zeroth_order(0.1, perturbations.rowwise(1), reshape_core=lambda x: x)
    with pytest.raises(ValueError, match="rank"):
        optim.rowwise(0.1, rank=0)
    with pytest.raises(ValueError, match="6 rows do not divide into 4 parts"):
        take({"tokens": jnp.asarray(TOKENS)}, Part(0, 4))
    with pytest.raises(ValueError, match="num_queries is at least 2"):
        optim.fzoo(0.1, num_queries=1)


# FZOO


def test_fzoo_equals_its_formula_in_float64():
    with jax.enable_x64(True):
        params, eps, count = pair(), 0.1, 4
        tx = optim.fzoo(0.5, num_queries=count, eps=eps, weight_decay=0.1)
        value = jax.jit(wavy)
        updates, state = jax.jit(lambda p: tx.update(None, tx.init(p), p, value_fn=wavy))(params)
        layout, (leaves, structure) = layout_of(params), jax.tree.flatten(params)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), QUERY), 0)
        draws = directions.Draws(key, key, [()] * len(leaves), [{}] * len(leaves))
        zero, one = [jnp.zeros_like(x) for x in leaves], jnp.ones(())
        draw = functools.partial(directions.perturbed, perturbations.signs(), layout, draws, zero)
        drawn = jax.jit(lambda: [draw(jnp.int32(i), one) for i in range(count)])()
        assert all(bool(jnp.all(jnp.abs(z) == 1)) for zs in drawn for z in zs)
        zs = [jax.tree.unflatten(structure, z) for z in drawn]
        base = float(value(params))
        values = np.array(
            [float(value(jax.tree.map(lambda x, d: x + eps * d, params, z))) for z in zs]
        )
        coeffs = (values - base) / np.std(values, ddof=1)
        np.testing.assert_allclose(state.coeffs, coeffs, rtol=1e-9)
        np.testing.assert_allclose(state.value, base, rtol=1e-12)
        for leaf, got, x, *mine in zip(
            layout.leaves, *map(jax.tree.leaves, (updates, params, *zs)), strict=True
        ):
            mean = sum(c * z for c, z in zip(coeffs, mine, strict=True)) / count
            want = -0.5 * (mean + (0.1 * x if leaf.decayed else 0))
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_fzoo_does_not_see_the_scale_of_the_loss_and_rests_where_it_is_flat():
    params = {"w": jnp.arange(12.0).reshape(3, 4)}

    def step(scale):
        tx = optim.fzoo(0.1)

        def value_fn(p):
            return scale * jnp.sum(jnp.sin(p["w"]))

        return jax.jit(lambda p: tx.update(None, tx.init(p), p, value_fn=value_fn)[0])(params)["w"]

    np.testing.assert_array_equal(step(4.0), step(1.0))  # a power of two: no rounding
    assert float(jnp.abs(step(1.0)).max()) > 0
    np.testing.assert_array_equal(step(0.0), jnp.zeros((3, 4)))
