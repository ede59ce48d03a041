"""Orthogonalisers: bands, signs, symmetries, extremes, and the generator of Polar Express."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn.optim import coefficients
from jaxlib_unlearn.optim import orthogonalize as o

# Lowest and highest output singular value for inputs in [1e-2, 1] (relative to the normaliser).
BANDS = {
    "jordan": (0.682, 1.134),
    "you5": (0.978, 1.032),
    "you6": (0.996, 0.999),
    "polar_express": (0.870, 1.124),
    "polar_express_speedrun": (0.859, 1.141),
    "polar_express_gram": (0.846, 1.124),
    "cans5": (0.884, 1.120),
    "aol4": (0.941, 1.050),
    "cubic5": (0.774, 1.300),
    "deepseek10": (1.0, 1.0),
    "classical": (0.229, 1.0),
}
FROBENIUS = [name for name in o.TABLES if o.TABLES[name].preconditioner == "frobenius"]
BUILDERS = {
    **{name: functools.partial(o.newton_schulz, name) for name in o.TABLES},
    "gram": o.gram_newton_schulz,
    "gram jordan": functools.partial(o.gram_newton_schulz, "jordan"),
    "svd": o.svd,
}
builders = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


def gaussian(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def polar(x):
    u, _, vh = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ vh


def test_every_table_has_a_band():
    assert BANDS.keys() == o.TABLES.keys()


@pytest.mark.parametrize("name", o.TABLES)
def test_scalar_map_lands_in_its_band(name):
    table = o.TABLES[name]
    low, high = BANDS[name]
    _, rows = coefficients.rows_of(name, None)
    # The band of the authors' Polar Express includes the safety factor of the normaliser.
    sigma = np.linspace(1e-2, 1, 20001) / (table.margin if name == "polar_express" else 1)
    for a, b, c in rows:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    assert sigma.min() == pytest.approx(low, abs=1e-3)
    assert sigma.max() == pytest.approx(high, abs=1e-3)


@pytest.mark.parametrize("dtype, slack", [("float64", 1e-3), ("float32", 1e-3), ("bfloat16", 0.08)])
@pytest.mark.parametrize("name", FROBENIUS)
def test_matrix_lands_in_the_band(name, dtype, slack):
    # Singular values between 1e-2 and 1 of the normaliser's, in float64 built exactly.
    u, _, vh = np.linalg.svd(gaussian((16, 24), dtype=np.float64), full_matrices=False)
    s = np.geomspace(0.02, 1.0, 16)
    with jax.enable_x64(dtype == "float64"):
        y = o.newton_schulz(name)(jnp.asarray(u * s @ vh, dtype))
        assert y.dtype == dtype
        out = np.linalg.svd(np.asarray(y, np.float64), compute_uv=False)
    low, high = BANDS[name]
    if name == "polar_express_speedrun":
        low, high = 0.847, 1.141  # a margin in the normaliser puts values below 1e-2
    assert low - slack <= out.min() and out.max() <= high + slack


@builders
def test_sign_is_kept(build):
    f = build()
    q = polar(gaussian((6, 10)))
    x = np.stack([np.outer(gaussian(6), gaussian(10, 1)), q, gaussian((6, 10), 2)])
    for dtype in (jnp.float32, jnp.bfloat16):
        y = np.asarray(f(jnp.asarray(x, dtype)), np.float64)
        assert np.all(np.sum(x * y, axis=(1, 2)) > 0)
        # Singular values at the very edge of the normaliser do not diverge in low precision.
        assert np.linalg.norm(y, 2, axis=(1, 2)).max() < 1.35


@builders
def test_zero_and_tiny_inputs(build):
    f = build()
    for dtype in (jnp.bfloat16, jnp.float32):
        assert not jnp.any(f(jnp.zeros((3, 6, 10), dtype)))
        normal = jnp.asarray(gaussian((3, 6, 10)), dtype)
        assert bool(jnp.all(jnp.isfinite(f(normal * jnp.asarray(1e-30, dtype)))))
        # The scale of a gradient cancels exactly, however small or large it is.
        for power in (-100, 100):
            scaled = f(normal * jnp.asarray(2.0**power, dtype))
            assert scaled.dtype == dtype
            np.testing.assert_array_equal(scaled, f(normal))


@builders
def test_transpose_equivariance(build):
    f = build()
    x = jnp.asarray(gaussian((3, 6, 10)))
    turned = jnp.swapaxes(f(jnp.swapaxes(x, 1, 2)), 1, 2)
    np.testing.assert_allclose(turned, f(x), atol=1e-6)


@builders
def test_batch_equals_loop_and_zero_rows_stay(build):
    f = build()
    x = gaussian((3, 6, 10))
    x[1, 4] = 0
    batched = np.asarray(f(jnp.asarray(x)))
    np.testing.assert_allclose(batched, [f(jnp.asarray(m)) for m in x], atol=1e-4)
    np.testing.assert_allclose(batched, f(jnp.asarray(x)[None])[0], atol=1e-5)
    assert np.abs(batched[1, 4]).max() < 1e-6


@pytest.mark.parametrize("name", FROBENIUS)
def test_orthogonal_equivariance(name):
    p, r = polar(gaussian((6, 6), 1)), polar(gaussian((10, 10), 2))
    x = gaussian((6, 10), dtype=np.float64)
    with jax.enable_x64(True):
        f = o.newton_schulz(name)
        np.testing.assert_allclose(f(jnp.asarray(p @ x @ r)), p @ f(jnp.asarray(x)) @ r, atol=1e-9)


def test_numpy_reference_in_float64():
    x = gaussian((9, 5), dtype=np.float64)
    ref = x.T / np.linalg.norm(x)
    for _ in range(5):
        a = ref @ ref.T
        ref = 3.4445 * ref + (-4.7750 * a + 2.0315 * a @ a) @ ref
    with jax.enable_x64(True):
        np.testing.assert_allclose(o.newton_schulz()(jnp.asarray(x)), ref.T, atol=1e-6)


def test_svd_is_the_polar_factor():
    x = gaussian((4, 6, 9))
    y = np.asarray(o.svd()(jnp.asarray(x)))
    np.testing.assert_allclose(
        y @ y.swapaxes(1, 2), np.broadcast_to(np.eye(6), (4, 6, 6)), atol=1e-5
    )
    np.testing.assert_allclose(y, [polar(m) for m in x], atol=1e-5)
    rank_one = np.outer(gaussian(6), gaussian(9, 1))
    unit = rank_one / np.linalg.norm(rank_one)
    np.testing.assert_allclose(o.svd()(jnp.asarray(rank_one)), unit, atol=1e-5)


def test_complex_by_conjugate_transpose():
    x = gaussian((6, 4)) + 1j * gaussian((6, 4), 1)
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    for f in (o.polar_express(9), o.svd(), o.gram_newton_schulz("polar_express", 9, (2, 5))):
        y = f(jnp.asarray(x, jnp.complex64))
        assert y.dtype == jnp.complex64
        np.testing.assert_allclose(y, u @ vh, atol=1e-4)


@pytest.mark.parametrize("restarts", [(), (2,), (1, 3)])
@pytest.mark.parametrize(
    "name", ["jordan", "you6", "polar_express", "polar_express_gram", "cubic5"]
)
def test_gram_equals_plain_in_float64(name, restarts):
    with jax.enable_x64(True):
        for shape in ((3, 6, 10), (10, 6), (6, 6)):
            x = jnp.asarray(gaussian(shape, dtype=np.float64))
            plain = o.newton_schulz(name)(x)
            gram = o.gram_newton_schulz(name, restarts=restarts)(x)
            np.testing.assert_allclose(gram, plain, atol=1e-12)


def test_aol_scales_an_orthogonal_matrix_by_nothing():
    q = polar(gaussian((5, 8)))
    np.testing.assert_allclose(o._precondition_aol(jnp.asarray(q, jnp.float32)), q, atol=1e-5)


def test_low_precision_products_stay_close():
    x = jnp.asarray(gaussian((64, 128)))
    exact = polar(x)
    for dtype, limit in ((None, 0.11), (jnp.bfloat16, 0.13), (jnp.float16, 0.11)):
        y = np.asarray(o.polar_express(dtype=dtype)(x))
        assert y.dtype == np.float32
        assert np.linalg.norm(y - exact) / np.linalg.norm(exact) < limit


def test_wrong_arguments():
    with pytest.raises(ValueError, match="unknown coefficients 'none'"):
        o.newton_schulz("none")
    with pytest.raises(ValueError, match="6 steps, got steps=5"):
        o.newton_schulz("you6", 5)
    with pytest.raises(ValueError, match="positive"):
        o.polar_express(0)
    with pytest.raises(ValueError, match="shape"):
        o.newton_schulz([1.0, 2.0])
    with pytest.raises(ValueError, match="Frobenius"):
        o.gram_newton_schulz("aol4")
    with pytest.raises(ValueError, match="rows, columns"):
        o.newton_schulz()(jnp.ones(3))
    # A table that was published and withdrawn: it flips the sign of large singular values.
    with pytest.raises(ValueError, match="signs turn"):
        o.newton_schulz([(4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959)])
    assert len(coefficients.rows_of([(2.0, -1.5, 0.5)] * 3, None)[1]) == 3


# Polar Express: the generator, from the paper's description


def remez(low, high, scale_low):
    """Odd quintic closest to 1 on [max(low, cushion), high]."""
    cushioned = max(low, scale_low * high)
    if cushioned / high >= 1 - 5e-6:
        return np.array([15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5])
    q, r = (3 * cushioned + high) / 4, (cushioned + 3 * high) / 4
    error = np.inf
    while True:
        points = np.array([cushioned, q, r, high])
        system = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], 1)
        a, b, c, new = np.linalg.solve(system, np.ones(4))
        if abs(new - error) < 1e-15:
            break
        error = new
        q, r = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b**2 - 20 * a * c)) / (10 * c))
    row = np.array([a, b, c])
    if cushioned > low:
        row *= 2 / (row @ [low, low**3, low**5] + row @ [high, high**3, high**5])
    return row


def test_polar_express_table_comes_from_its_generator():
    low, high = 1e-3, 1.0
    for published in coefficients._POLAR_EXPRESS:
        row = remez(low, high, 0.02407327424182761)
        np.testing.assert_allclose(row, published, rtol=1e-9)
        low = row @ [low, low**3, low**5]
        high = 2 - low


def _decaying(values) -> np.ndarray:
    """A 48 x 144 float32 matrix with these singular values."""
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((48, 48)))
    v, _ = np.linalg.qr(rng.standard_normal((144, 48)))
    return ((u * values) @ v.T).astype(np.float32)


@pytest.mark.parametrize("name", ["jordan", "you5", "polar_express"])
@pytest.mark.parametrize(
    "values",
    [np.arange(48) < 4, np.arange(1, 49.0) ** -2, np.exp(-np.arange(48) / 4)],
    ids=["rank 4", "quadratic decay", "exponential decay"],
)
def test_wide_matrices_on_cpus_lose_nothing(name, values):
    """The path by Gram matrices against float64's plain iteration, beside float32's plain one."""
    x = _decaying(values)
    with jax.enable_x64(True):
        _, f = o.newton_schulz(name).args
        exact = np.asarray(f(jnp.asarray(x, jnp.float64)))
    plain = np.asarray(f(jnp.asarray(x)))
    here = np.asarray(o.newton_schulz(name)(jnp.asarray(x)))
    assert not np.array_equal(here, plain)
    size = np.linalg.norm(exact)
    assert np.linalg.norm(plain - exact) < 4e-4 * size
    assert np.linalg.norm(here - exact) < 4e-4 * size


@pytest.mark.parametrize(
    ("platform", "shape", "dtype", "products"),
    [
        ("tpu", (96, 32), "float32", 15),  # five steps of three
        ("cpu", (96, 32), "bfloat16", 15),
        ("cpu", (48, 32), "float32", 15),
        ("cpu", (96, 32), "float32", 18),  # two of one, all but three small
        ("cpu", (7, 96, 32), "float32", 18),
    ],
)
def test_only_cpus_in_float32_take_gram_matrices(platform, shape, dtype, products):
    x = jax.ShapeDtypeStruct(shape, dtype)
    program = jax.jit(o.newton_schulz()).trace(x).lower(lowering_platforms=(platform,))
    text = program.as_text()
    assert text.count("stablehlo.dot_general") == products
    assert ("stablehlo.while" in text) == (len(shape) == 3)
