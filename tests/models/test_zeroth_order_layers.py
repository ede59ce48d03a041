"""Zeroth order through the decoder's scan: the same numbers as materialised copies, less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn.optim.zeroth_order import perturbations
from jaxlib_unlearn.optim.zeroth_order.engine import zeroth_order
from jaxlib_unlearn.optim.zeroth_order.perturbations import Factored, Perturbed, matmul
from models.decoder.asked import AskedDecoder
from models.decoder.model import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=24,
    hidden_size=8,
    intermediate_size=12,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    qkv_bias=True,
)
DECODER = Decoder(CONFIG)
FAMILIES = {
    "dense": perturbations.dense(),
    "sparse": perturbations.sparse(0.5),
    "sphere": perturbations.sphere(),
    "uvt": perturbations.uvt(2),
    "uzv": perturbations.uzv(2),
    "subspace": perturbations.subspace(2),
    "signs": perturbations.signs(),
}


def batch(rows=2, length=6, width=4):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, CONFIG.vocab_size, (rows, length)), jnp.int32)
    index = jnp.tile(jnp.arange(width, dtype=jnp.int32), (rows, 1))
    return {
        "tokens": tokens,
        "positions": jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1)),
        "segment_ids": jnp.ones((rows, length), jnp.int32),
        "label_index": index,
        "targets": tokens[:, 1 : width + 1],
        "target_mask": jnp.ones((rows, width), jnp.float32),
    }


def layered_value_fn(decoder, data, params, layer_map):
    asked = AskedDecoder(decoder, params, options={"layer_map": layer_map})
    return -jnp.mean(asked.log_probs(data))


def value_fn(decoder, data, params):
    return -jnp.mean(AskedDecoder(decoder, params).log_probs(data))


def losses(family, params, decoder=DECODER, *, layered, factored=True, **options):
    """Value and coefficients; eps = 1, so that rounding is not magnified."""
    tx = zeroth_order(
        0.1, family, num_queries=2, eps=1.0, estimator="forward", factored=factored, **options
    )
    data = batch()
    if layered:
        kwargs = {"layered_value_fn": functools.partial(layered_value_fn, decoder, data)}
    else:
        kwargs = {"value_fn": functools.partial(value_fn, decoder, data)}

    @jax.jit
    def step(params):
        return tx.update(None, tx.init(params), params, **kwargs)

    updates, state = step(params)
    return updates, state


@functools.cache
def materialised(name):
    """`losses` of a family from perturbed copies, for the tests that compare with them."""
    return losses(FAMILIES[name], small(), layered=False)


@functools.cache
def small():
    """Parameters scaled down, so that a perturbation with entries of size one stays moderate."""
    return jax.jit(DECODER.init)(jax.random.key(0))


# That a layer draws what the stack draws is held of every family in test_perturbations.py.
DRAWN = ("sparse", "uvt", "signs")
EVERY = [pytest.param(n, marks=pytest.mark.slow) if n in DRAWN else n for n in FAMILIES]


@pytest.mark.parametrize("name", EVERY)
def test_layer_map_equals_materialised_copies(name):
    params = small()
    plain, a = materialised(name)
    inside, b = losses(FAMILIES[name], params, layered=True)
    # Losses of about 10 in float32; 1e-6 of that, for the two orders of summation.
    np.testing.assert_allclose(a.value, b.value, rtol=1e-6)
    np.testing.assert_allclose(a.coeffs, b.coeffs, rtol=1e-5, atol=1e-5)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(inside), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_curvature_scaled_directions_through_the_layer_map():
    from jaxlib_unlearn.optim.zeroth_order.methods import hizoo

    params, data = small(), batch()
    tx = hizoo(0.1, eps=0.5, smoothing=0.1)

    def two(kwargs):
        def steps(params):
            _, state = tx.update(None, tx.init(params), params, **kwargs)
            return tx.update(None, state, params, **kwargs)[1]

        return jax.jit(steps)(params)

    a = two({"value_fn": functools.partial(value_fn, DECODER, data)})
    b = two({"layered_value_fn": functools.partial(layered_value_fn, DECODER, data)})
    np.testing.assert_allclose(a.coeffs, b.coeffs, rtol=1e-5, atol=1e-5)
    h = a.moments["hessian"]["layers"]["mlp"]["up"]["kernel"]
    assert float(jnp.abs(h - 1).max()) > 1e-3


@pytest.mark.parametrize("estimator", ["central", "jvp"])
def test_other_estimators_and_remat(estimator):
    params, data = small(), batch()
    tx = zeroth_order(0.1, perturbations.subspace(2), num_queries=2, estimator=estimator, eps=0.5)
    results = []
    for kwargs in (
        {"value_fn": functools.partial(value_fn, DECODER, data)},
        {
            "layered_value_fn": functools.partial(
                layered_value_fn, Decoder(CONFIG, remat="full"), data
            )
        },
    ):
        step = jax.jit(lambda p, kwargs=kwargs: tx.update(None, tx.init(p), p, **kwargs)[1])
        results.append(step(params))
    np.testing.assert_allclose(results[0].value, results[1].value, rtol=1e-6)
    np.testing.assert_allclose(results[0].coeffs, results[1].coeffs, rtol=2e-5, atol=1e-5)


# Copies of segments equal segments through the layer map: the test of a frozen segment.
@pytest.mark.parametrize("layered", [pytest.param(False, marks=pytest.mark.slow), True])
def test_segments_draw_what_one_stack_draws(layered):
    params = small()
    stack = params["layers"]
    cut = {
        **params,
        "layers": tuple(jax.tree.map(lambda x, s=s: x[s], stack) for s in (slice(1), slice(1, 3))),
    }
    whole, a = materialised("uzv")
    parts, b = losses(FAMILIES["uzv"], cut, layered=layered)
    np.testing.assert_allclose(a.coeffs, b.coeffs, rtol=1e-5, atol=1e-5)
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *parts["layers"])
    for x, y in zip(jax.tree.leaves(whole["layers"]), jax.tree.leaves(joined), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_a_frozen_segment_stays_where_it_is():
    params = dict(small())
    stack = params["layers"]
    params["layers"] = tuple(
        jax.tree.map(lambda x, s=s: x[s], stack) for s in (slice(1), slice(1, 3))
    )
    family = perturbations.subspace(2)
    options = {"trainable": lambda path: path.startswith("layers/1/mlp")}
    plain, a = losses(family, params, layered=False, **options)
    _, b = losses(family, params, layered=True, **options)
    np.testing.assert_allclose(a.coeffs, b.coeffs, rtol=1e-5, atol=1e-6)
    assert not any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(plain["layers"][0]))
    assert bool(jnp.any(plain["layers"][1]["mlp"]["up"]["kernel"] != 0))


def parts(*sizes, dtype=jnp.float64):
    """x `(rows, in)`, a kernel `(in, out)` and factors of a rank, of sizes rows, in, out, rank."""
    rows, fan_in, fan_out, rank = sizes
    rng = np.random.default_rng(0)
    shapes = [(rows, fan_in), (fan_in, fan_out), (fan_in, rank), (fan_out, rank)]
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


@pytest.mark.parametrize("kind", [Factored, Perturbed])
@pytest.mark.parametrize("rows", [1, 40])
def test_factored_equals_multiplied_out_in_float64(kind, rows):
    with jax.enable_x64(True):
        x, kernel, left, right = parts(rows, 8, 6, 2)
        whole = kernel + left @ right.T
        out = matmul(x, kind(kernel, left, right))
        np.testing.assert_allclose(out, matmul(x, whole), rtol=1e-12)


PRODUCTS = {
    # 24 * 8 / (24 + 8) = 6 rows cost the same either way.
    "few rows": (Perturbed, 6, jnp.float32, 3),
    "many rows": (Perturbed, 7, jnp.float32, 2),
    "with gradients": (Factored, 7, jnp.float32, 3),
    "bfloat16": (Perturbed, 7, jnp.bfloat16, 3),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_perturbed_kernels_are_multiplied_out_where_it_is_cheaper(case):
    kind, rows, dtype, count = PRODUCTS[case]
    x, *kernel = parts(rows, 24, 8, 2, dtype=jnp.float32)
    text = str(jax.make_jaxpr(matmul)(x.astype(dtype), kind(*kernel)))
    assert text.count("dot_general") == count


def test_accelerators_that_round_products_get_factors(monkeypatch):
    x, *kernel = parts(7, 24, 8, 2, dtype=jnp.float32)

    def count():
        return str(jax.make_jaxpr(lambda x, k: matmul(x, k))(x, Perturbed(*kernel))).count("dot_g")

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert count() == 3
    with jax.default_matmul_precision("highest"):
        assert count() == 2


KINDS = {
    "differences": ({}, Perturbed),
    "forward mode": ({"estimator": "jvp"}, Factored),
    "rows": ({"family": perturbations.rowwise(1), "num_queries": 2}, Factored),
    "not asked": ({"factored": False}, jax.Array),
}


@pytest.mark.parametrize("case", KINDS)
def test_what_layer_map_makes_of_a_kernel(case):
    options, kind = KINDS[case]
    seen = []

    def fn(params, layer_map, part=None):
        del part
        layer = jax.tree.map(lambda x: x[0], params["layers"])
        mapped = layer_map(layer, jnp.int32(0))
        seen.append(mapped["mlp"]["up"]["kernel"])
        return jnp.sum(mapped["mlp"]["up"]["bias"]) if "bias" in mapped["mlp"]["up"] else 0.0

    params = small()
    tx = zeroth_order(0.1, **{"family": perturbations.subspace(2), **options})
    state = tx.init(params)
    jax.eval_shape(functools.partial(tx.update, layered_value_fn=fn), None, state, params)
    assert type(seen[-1]) is kind or (kind is jax.Array and isinstance(seen[-1], jax.Array))


def _temporaries(fn, *args, **jit_options):
    return jax.jit(fn, **jit_options).lower(*args).compile().memory_analysis().temp_size_in_bytes


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("sparse", "uzv")]


@pytest.mark.fused
@pytest.mark.parametrize("name", ["dense", "subspace", *SLOW])
def test_memory_of_value_stage_and_of_the_whole_step(name):
    """Temporaries, compiled, at 8 x 128 tokens, with directions drawn one layer at a time."""
    config = DecoderConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_layers=8,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
    )
    decoder, data = Decoder(config), jax.eval_shape(lambda: batch(rows=8, length=128, width=64))
    params = decoder.shapes()
    weights = sum(x.size for x in jax.tree.leaves(params)) * 4
    layer = sum(x.size for x in jax.tree.leaves(params["layers"])) * 4 // config.num_layers
    tx = zeroth_order(1e-3, FAMILIES[name], num_queries=2)
    state = jax.eval_shape(tx.init, params)

    def forward(data, params):
        return value_fn(decoder, data, params)

    def update(data, params, state):
        inside = functools.partial(layered_value_fn, decoder, data)
        return tx.update(None, state, params, layered_value_fn=inside)

    def value_stage(data, params, state):
        return update(data, params, state)[1].coeffs

    def step(data, params, state):
        updates, state = update(data, params, state)
        return jax.tree.map(jnp.add, params, updates), state

    # A plain forward pass keeps no layer's scores, since its attention is one fusion; with
    # directions drawn inside, XLA may write the scores of one layer.
    scores = 4 * 8 * config.num_heads * 128 * 128
    allowed = _temporaries(forward, data, params) + layer + scores
    value = _temporaries(value_stage, data, params, state)
    whole = weights + _temporaries(step, data, params, state, donate_argnums=(1, 2))
    print(f"{name}: weights {weights} allowed {allowed} value stage {value} step {whole}")
    assert value <= 1.3 * allowed
    assert whole <= 2.2 * weights + allowed
    # The saving: a perturbed copy of the weights for every evaluation.
    materialised = _temporaries(
        lambda data, params, state: (
            tx.update(None, state, params, value_fn=functools.partial(value_fn, decoder, data))[
                1
            ].coeffs
        ),
        data,
        params,
        state,
    )
    assert materialised > value + weights // 2
