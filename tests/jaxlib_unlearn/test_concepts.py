"""Edits, attack tokens and projections against float64 references and their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree

from jaxlib_unlearn import concepts
from jaxlib_unlearn.concepts import tokens

WIDTH, WORDS = 6, 40


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def kernels(dtype: type = np.float64):
    return {
        name: {"kernel": random(WIDTH, out, seed=out).astype(dtype)}
        for name, out in (("to_k", 4), ("to_v", 9))
    }


# UCE and RECE


@pytest.mark.parametrize("preserved", [0, 3, None])
def test_uce_solves_its_normal_equations(preserved):
    """Published form, transposed: W' (lam I + sum) = lam W + sum of targets."""
    erase, guide = random(2, WIDTH), random(2, WIDTH, seed=1)
    preserve = None if preserved is None else random(preserved, WIDTH, seed=2)
    with jax.enable_x64(True):
        weights = {"keep": 0.3, "erase_weight": 1.7, "preserve_weight": 0.6}
        edited = concepts.uce(kernels(), erase, guide, preserve, **weights)
    kept = np.zeros((0, WIDTH)) if preserve is None else preserve
    for name, tree in kernels().items():
        old, new = tree["kernel"].T, np.asarray(edited[name]["kernel"]).T
        left = new @ (0.3 * np.eye(WIDTH) + 1.7 * erase.T @ erase + 0.6 * kept.T @ kept)
        right = 0.3 * old + 1.7 * (old @ guide.T) @ erase + 0.6 * (old @ kept.T) @ kept
        np.testing.assert_allclose(left, right, atol=1e-10)


def test_uce_leaves_kernels_alone_where_nothing_is_erased():
    nothing = np.zeros((0, WIDTH))
    for given in (kernels(np.float32), jax.tree.map(lambda x: x.astype(jnp.bfloat16), kernels())):
        edited = concepts.uce(given, nothing, nothing, random(3, WIDTH))
        for old, new in zip(jax.tree.leaves(given), jax.tree.leaves(edited), strict=True):
            assert old.dtype == new.dtype
            np.testing.assert_array_equal(old, new)


def test_a_heavy_weight_keeps_the_kernels():
    given = kernels()
    with jax.enable_x64(True):
        edited = concepts.uce(given, random(2, WIDTH), random(2, WIDTH, seed=1), keep=1e12)
    for old, new in zip(jax.tree.leaves(given), jax.tree.leaves(edited), strict=True):
        np.testing.assert_allclose(old, new, atol=1e-10)


def test_a_light_weight_reads_the_concept_as_its_guide_and_keeps_the_others():
    states = random(4, WIDTH)
    with jax.enable_x64(True):
        given = kernels()
        edited = concepts.uce(given, states[:1], states[1:2], states[2:], keep=1e-12)
    for name in given:
        old, new = (np.asarray(tree[name]["kernel"]) for tree in (given, edited))
        np.testing.assert_allclose(states[:1] @ new, states[1:2] @ old, atol=1e-8)
        np.testing.assert_allclose(states[2:] @ new, states[2:] @ old, atol=1e-8)


def test_adversarial_states_are_where_their_definition_is_least():
    given, states = kernels(), random(3, WIDTH, seed=4)
    with jax.enable_x64(True):
        edited = concepts.uce(given, states, random(3, WIDTH, seed=5))
        found = concepts.adversarial(given, edited, states, keep=0.2)

        def distance(x):
            parts = [
                jnp.sum((x @ edited[name]["kernel"] - states @ given[name]["kernel"]) ** 2)
                for name in given
            ]
            return sum(parts) + 0.2 * jnp.sum(x**2)

        np.testing.assert_allclose(jax.grad(distance)(found), 0, atol=1e-10)


def test_rece_begins_as_uce_and_moves_the_way_back_further_away():
    given = kernels()
    states = random(5, WIDTH, seed=6)
    parts = (states[:1], states[1:2], states[2:])
    with jax.enable_x64(True):
        edited = {n: concepts.rece(given, *parts, rounds=n) for n in (0, 1, 3)}
        first = concepts.uce(given, *parts, keep=0.1, preserve_weight=0.1)
        jax.tree.map(np.testing.assert_array_equal, edited[0], first)

        def away(kernels):
            back = concepts.adversarial(given, kernels, states[:1])
            parts = [
                back @ kernels[name]["kernel"] - states[:1] @ given[name]["kernel"]
                for name in given
            ]
            return float(np.linalg.norm(np.concatenate(parts, axis=1)))

        # A second edit, by hand.
        back = concepts.adversarial(given, first, states[:1])
        second = concepts.uce(first, back, *parts[1:], keep=0.1, preserve_weight=0.1)
        jax.tree.map(np.testing.assert_array_equal, edited[1], second)
        assert away(edited[0]) < away(edited[1])


@pytest.mark.parametrize("seed", [0, 10, 20, 30])
def test_a_round_of_rece_that_erases_again_keeps_more_of_what_was_erased(seed):
    """States that fill their space, one guide: how far from its reading they are read."""
    states = random(2 * WIDTH, WIDTH, seed=7 + seed)
    guide = np.repeat(random(1, WIDTH, seed=8 + seed), 2 * WIDTH, axis=0)
    with jax.enable_x64(True):
        given = kernels()

        def off(edited):
            parts = [states @ edited[n]["kernel"] - guide @ given[n]["kernel"] for n in given]
            return float(sum(np.sum(np.square(part)) for part in parts))

        first = concepts.rece(given, states, guide, rounds=0, again=True)
        jax.tree.map(
            np.testing.assert_array_equal, first, concepts.uce(given, states, guide, keep=0.1)
        )
        once, both = (
            concepts.rece(given, states, guide, rounds=1, again=again) for again in (False, True)
        )
        assert off(first) < off(both) < off(once)

        # The second edit, by hand.
        back = concepts.adversarial(given, first, states)
        second = concepts.uce(
            first, np.concatenate([states, back]), np.concatenate([guide, guide]), keep=0.1
        )
        jax.tree.map(np.testing.assert_array_equal, both, second)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: concepts.uce(kernels(), random(2, 5), random(2, 5)), r"\(2, 5\).*depth \[6\]"),
        (lambda: concepts.uce(kernels(), random(2, 6), random(3, 6)), r"\(2, 6\) and \(3, 6\)"),
        (lambda: concepts.uce(kernels(), random(6), random(6)), r"rows as wide.*got \(6,\)"),
        (lambda: concepts.uce(kernels(), random(1, 6), random(1, 6), random(1, 7)), "preserve"),
        (lambda: concepts.adversarial(kernels(), kernels(), random(1, 7)), "erased"),
        (lambda: concepts.rece(kernels(), random(1, 6), random(1, 6), rounds=-1), "got -1"),
        (lambda: concepts.coefficients(network(), random(2, WIDTH), "exp"), "softplus.*'exp'"),
        (lambda: concepts.attack_token(network(), random(2, WIDTH), ZEROS, form="x"), "'x'"),
        (lambda: concepts.words_of([1.0], ["a", "b"]), "1 coefficients of 2 words"),
    ],
)
def test_what_does_not_fit_is_said(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# Attack tokens

ZEROS = np.zeros((WIDTH, 3))


def network(seed=0, hidden=8, dtype=jnp.float32):
    made = concepts.init_network(jax.random.key(seed), WIDTH, hidden)
    return jax.tree.map(lambda x: x.astype(dtype), made)


@pytest.mark.parametrize("form", tokens.FORMS)
@pytest.mark.parametrize("positive", ["softplus", "abs", "relu"])
def test_a_token_is_the_sum_that_its_definition_says(form, positive):
    vocabulary, taken = random(WORDS, WIDTH), np.linalg.qr(random(WIDTH, 2, seed=3))[0]
    with jax.enable_x64(True):
        theta = network(dtype=jnp.float64)
        got = concepts.attack_token(theta, vocabulary, taken, form=form, positive=positive)
    apply = {
        "softplus": lambda x: np.log1p(np.exp(x)), "abs": np.abs, "relu": lambda x: np.maximum(x, 0)
    }[positive]  # fmt: skip
    w = jax.tree.map(np.asarray, theta)
    deflated = np.array([v - taken @ (taken.T @ v) for v in vocabulary])
    alpha, total = [], np.zeros(WIDTH)
    for seen, row in zip(deflated if form == "deflate" else vocabulary, deflated, strict=True):
        hidden = np.maximum(seen @ w["hidden"]["kernel"] + w["hidden"]["bias"], 0)
        alpha.append(apply((hidden @ w["output"]["kernel"] + w["output"]["bias"])[0]))
        total += alpha[-1] * row
    length = np.mean([np.linalg.norm(v) for v in vocabulary])
    np.testing.assert_allclose(got.coefficients, alpha, atol=1e-12)
    np.testing.assert_allclose(got.embedding, total * length / np.linalg.norm(total), atol=1e-10)
    assert min(alpha) >= 0


def test_gradients_are_those_of_finite_differences():
    vocabulary, weights = random(WORDS, WIDTH), random(WIDTH, seed=8)
    with jax.enable_x64(True):
        theta = network(dtype=jnp.float64)
        flat, unravel = ravel_pytree(theta)

        def value(x):
            token = concepts.attack_token(unravel(x), vocabulary, ZEROS)
            return jnp.dot(token.embedding, weights)

        got = jax.jit(jax.grad(value))(flat)
        moved = jax.jit(jax.vmap(value))
        step = 1e-5 * np.eye(len(flat))
        want = (moved(flat + step) - moved(flat - step)) / 2e-5
        np.testing.assert_allclose(got, want, atol=1e-7)


@pytest.mark.parametrize("form", tokens.FORMS)
def test_tokens_are_orthogonal_to_those_before(form):
    """In float32, also where most of a sum lies in what is taken away."""
    vocabulary = random(WORDS, WIDTH) + 30.0  # one direction that all words share
    basis, found = jnp.zeros((WIDTH, WIDTH - 1)), []
    make = jax.jit(functools.partial(concepts.attack_token, form=form))
    extend = jax.jit(concepts.extend)
    for place in range(WIDTH - 1):
        token = make(network(place), vocabulary, basis).embedding
        found.append(token / jnp.linalg.norm(token))
        basis = extend(basis, token, place)
    directions = np.array(found)
    np.testing.assert_allclose(directions @ directions.T, np.eye(WIDTH - 1), atol=1e-5)
    np.testing.assert_allclose(basis.T @ basis, np.eye(WIDTH - 1), atol=1e-6)
    np.testing.assert_allclose(np.abs(np.sum(basis.T * directions, axis=1)), 1, atol=1e-5)


def test_both_forms_are_one_where_the_coefficients_do_not_depend_on_the_row():
    theta = network()
    theta["output"]["kernel"] *= 0
    vocabulary, taken = random(WORDS, WIDTH), np.linalg.qr(random(WIDTH, 2, seed=3))[0]
    one, two = (concepts.attack_token(theta, vocabulary, taken, form=f) for f in tokens.FORMS)
    np.testing.assert_array_equal(one.coefficients, two.coefficients)
    np.testing.assert_allclose(one.embedding, two.embedding, atol=1e-5)


def test_the_order_of_the_vocabulary_does_not_matter():
    vocabulary, order = random(WORDS, WIDTH), np.random.default_rng(1).permutation(WORDS)
    with jax.enable_x64(True):
        theta = network(dtype=jnp.float64)
        one = concepts.attack_token(theta, vocabulary, ZEROS)
        two = concepts.attack_token(theta, vocabulary[order], ZEROS)
    np.testing.assert_allclose(one.embedding, two.embedding, atol=1e-12)
    np.testing.assert_allclose(one.coefficients[order], two.coefficients, atol=1e-12)


def test_length_and_the_token_of_no_word():
    vocabulary = random(WORDS, WIDTH)
    token = concepts.attack_token(network(), vocabulary, ZEROS, norm=2.5).embedding
    assert np.linalg.norm(token) == pytest.approx(2.5, rel=1e-6)
    none = network()
    none["output"] = {"kernel": none["output"]["kernel"] * 0, "bias": jnp.array([-1.0])}

    def length(theta):
        found = concepts.attack_token(theta, vocabulary, ZEROS, positive="relu")
        return jnp.sum(found.embedding), found.coefficients

    (value, alpha), gradient = jax.value_and_grad(length, has_aux=True)(none)
    assert value == 0
    assert not alpha.any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_linear_denoiser_is_attacked_to_its_least_squares():
    """The first token on the sphere, the second on what is orthogonal to the first.

    With 40 words in 6 dimensions the cone of their combinations is the whole space. The second
    sphere has two minima: the reference begins where the attack does.
    """
    vocabulary, mixing, target = random(WORDS, WIDTH), random(8, WIDTH, seed=1), random(8, seed=2)
    length = np.mean(np.linalg.norm(vocabulary, axis=1))
    optimizer = optax.adamw(2e-2)

    def loss(theta, basis):
        token = concepts.attack_token(theta, vocabulary, basis).embedding
        return jnp.sum((mixing @ token - target) ** 2), token

    @jax.jit
    def learn(theta, basis):
        def step(carry, _):
            theta, state = carry
            gradient = jax.grad(loss, has_aux=True)(theta, basis)[0]
            updates, state = optimizer.update(gradient, state, theta)
            return (optax.apply_updates(theta, updates), state), None

        (theta, _), _ = jax.lax.scan(step, (theta, optimizer.init(theta)), length=400)
        return loss(theta, basis)

    basis, theta = np.zeros((WIDTH, 2)), network(hidden=64)
    for place in range(2):
        rest = np.linalg.svd(basis[:, :place].T)[2][place:].T if place else np.eye(WIDTH)

        def least(x, rest=rest):
            v = rest @ x
            return np.sum((mixing @ (v * length / np.linalg.norm(v)) - target) ** 2)

        (before, start), (got, token) = loss(theta, basis), learn(theta, basis)
        want = scipy.optimize.minimize(least, rest.T @ np.asarray(start, float)).fun
        assert float(before) > 2 * want
        assert float(got) == pytest.approx(want, rel=1e-4)
        basis = np.array(concepts.extend(basis, token, place))


# The defence


def test_projection_is_one():
    basis = np.linalg.qr(random(WIDTH, 3))[0]
    rows = random(2, 5, WIDTH, seed=1)
    with jax.enable_x64(True):
        once = concepts.project(rows, basis)
        np.testing.assert_allclose(concepts.project(once, basis), once, atol=1e-12)
        np.testing.assert_allclose(once @ basis, 0, atol=1e-12)
        np.testing.assert_array_equal(concepts.project(rows, np.zeros((WIDTH, 0))), rows)
        spanned = random(4, 3, seed=2) @ basis.T
        np.testing.assert_allclose(concepts.project(spanned, basis), 0, atol=1e-12)
    assert concepts.project(jnp.ones(WIDTH, jnp.bfloat16), basis).dtype == jnp.bfloat16


def test_more_tokens_leave_less():
    basis = np.linalg.qr(random(WIDTH, WIDTH))[0]
    rows = random(5, WIDTH, seed=1)
    norms = [np.linalg.norm(concepts.project(rows, basis[:, :k]), axis=1) for k in range(WIDTH + 1)]
    assert (np.diff(norms, axis=0) <= 1e-6).all()
    np.testing.assert_allclose(norms[-1], 0, atol=1e-5)


@pytest.mark.parametrize(
    "rows, rank",
    [
        (random(3, WIDTH), 3),
        (np.vstack([random(2, WIDTH), 2 * random(2, WIDTH)]), 2),
        (np.zeros((2, WIDTH)), 0),
        (np.zeros((0, WIDTH)), 0),
    ],
)
def test_a_span_has_as_many_columns_as_dimensions(rows, rank):
    basis = concepts.span(rows)
    assert basis.shape == (WIDTH, rank)
    np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-6)
    np.testing.assert_allclose(concepts.project(rows, basis), 0, atol=1e-5)


def test_words_and_what_they_carry():
    names = [f"w{i}</w>" for i in range(WORDS)]
    alpha = np.abs(random(WORDS, seed=5))
    found = concepts.words_of(alpha, names, top=3)
    assert [name for name, _ in found] == [f"w{i}" for i in np.argsort(-alpha)[:3]]
    assert concepts.words_of([1, 2, 2, 0], "abcd", top=3) == [("b", 2), ("c", 2), ("a", 1)]
    vocabulary = random(WORDS, WIDTH)
    first = np.sum([alpha[i] * vocabulary[i] for i in np.argsort(-alpha)[:5]], axis=0)
    whole = alpha @ vocabulary
    want = first @ whole / np.linalg.norm(first) / np.linalg.norm(whole)
    assert concepts.share_of_top(alpha, vocabulary, ZEROS, 5) == pytest.approx(want, rel=1e-5)
    assert concepts.share_of_top(alpha, vocabulary, ZEROS, 99) == pytest.approx(1, rel=1e-6)
    assert concepts.share_of_top(0 * alpha, vocabulary, ZEROS) == 0
