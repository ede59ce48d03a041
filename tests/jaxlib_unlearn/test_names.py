"""Names in `optim`: names of orthogonalisers, Optax's spellings, bare forms, `dir`."""

import importlib
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim.orthogonalize import TABLES, by_name

PARAMS = {"layers": {"q": {"kernel": jnp.ones((2, 4, 3))}}, "bias": jnp.ones(3)}


def draw(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), PARAMS)


def value_fn(params):
    return sum(jnp.sum(jnp.square(x - 0.5)) for x in jax.tree.leaves(params))


# Names of orthogonalisers

PLAIN = {"spatial_mask": lambda path: False}  # SIFT is Muon there
ORTHOGONALIZING = {
    "muon": lambda **more: optim.muon(0.1, **more),
    "teon": lambda **more: optim.teon(0.1, **more),
    "sift": lambda **more: optim.sift(0.1, **PLAIN, **more),
    "zo_muon": lambda **more: optim.zo_muon(0.1, rank=2, **more),
    "scale_by_muon": optim.scale_by_muon,
    "scale_by_teon": optim.scale_by_teon,
    "scale_by_sift": lambda **more: optim.scale_by_sift(**PLAIN, **more),
    "scale_by_zo_muon": lambda **more: optim.scale_by_zo_muon(rank=2, **more),
}


def program(tx):
    """The program of an update as text; nothing is computed."""

    def update(params):
        grads, extra = params, {}
        return tx.update(
            grads, tx.init(params), params, value_fn=value_fn, constraint_grads=params, **extra
        )

    return str(jax.make_jaxpr(update)(PARAMS))


@pytest.mark.parametrize("name", ORTHOGONALIZING)
def test_orthogonalize_by_name(name):
    make = ORTHOGONALIZING[name]
    exact = program(make(orthogonalize="svd"))
    assert " svd[" in exact
    assert exact == program(make(orthogonalize=optim.orthogonalize.svd()))
    express = program(make(orthogonalize="polar_express"))
    assert " svd[" not in express
    assert express == program(make(orthogonalize=optim.orthogonalize.polar_express()))
    assert express != program(make(orthogonalize="newton_schulz"))
    for wrong in ("polar_expres", 5):
        with pytest.raises(ValueError, match=f"svd, .*jordan.*got {wrong!r}"):
            make(orthogonalize=wrong)


@pytest.mark.parametrize("name", ["newton_schulz", "gram_newton_schulz", "svd", *TABLES])
def test_every_name_is_an_orthogonaliser(name):
    function = by_name(name)
    assert function is by_name(name)  # otherwise eager steps compile again
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6)), jnp.float32)
    sizes = jnp.linalg.svd(function(x), compute_uv=False)
    assert float(abs(sizes - 1).max()) < 0.35


def test_zeroth_order_keeps_its_own_names():
    for name in ("normalize", "none"):
        optim.zo_muon(0.1, orthogonalize=name)
    with pytest.raises(ValueError, match="also 'normalize' and 'none'"):
        optim.zo_muon(0.1, orthogonalize="normalise")


# Spellings from Optax

WHOLE = {"muon": optim.muon, "teon": optim.teon, "sift": optim.sift}
OPTAX_ONLY = {
    "ns_coeffs": "orthogonalize=optim.orthogonalize.newton_schulz",
    "ns_steps": "orthogonalize=optim.orthogonalize.newton_schulz",
    "eps": "adam_eps=",
    "consistent_rms": "shape_scale='match_rms'",
    "adaptive": "orthogonalize=lambda",
    "preconditioning": "orthogonalize='aol4'",
    "adam_eps_root": "optax.partition",
    "muon_weight_dimension_numbers": "matrices=",
}
BARE = {
    "eps": "none is needed",
    "muon_weight_dimension_numbers": "without scale_by_",
    "weight_dimension_numbers": "without scale_by_",
    "weight_decay_mask": "without scale_by_",
}


@pytest.mark.parametrize("spelling", OPTAX_ONLY | BARE)
def test_spellings_of_optax_name_ours(spelling):
    for name, factory in WHOLE.items():
        if spelling in OPTAX_ONLY:
            with pytest.raises(TypeError, match=spelling) as caught:
                factory(0.1, **{spelling: 5})
            assert OPTAX_ONLY[spelling] in str(caught.value)
        bare = getattr(optim, f"scale_by_{name}")
        with pytest.raises(TypeError, match=f"scale_by_{name}.*{spelling}") as caught:
            bare(**{spelling: 5})
        assert (OPTAX_ONLY | BARE)[spelling] in str(caught.value)


def test_spellings_elsewhere():
    """ZO-Muon has an `eps` of its own, and no shape factor to suggest."""
    optim.zo_muon(0.1, eps=1e-2)
    with pytest.raises(TypeError, match="consistent_rms.*no counterpart"):
        optim.zo_muon(0.1, consistent_rms=0.2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="ns_steps.*orthogonalize="):
        optim.zo_muon(0.1, ns_steps=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'nesterof'"):
        optim.muon(0.1, nesterof=True)  # type: ignore[call-arg]


def test_adaptive_of_optax_is_an_orthogonaliser_here():
    """The replacement that the TypeError suggests gives Optax's update."""
    f = by_name("newton_schulz")
    ours = optim.scale_by_muon(
        orthogonalize=lambda z: (z * f(z)).sum((-2, -1), keepdims=True) * f(z)
    )
    dimensions = {"w": optax.contrib.MuonDimensionNumbers()}
    theirs = optax.contrib.scale_by_muon(adaptive=True, weight_dimension_numbers=dimensions)
    grads = {"w": draw(0)["layers"]["q"]["kernel"][0]}
    a, b = (jax.jit(tx.update)(grads, tx.init(grads))[0]["w"] for tx in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# Decay masks

DECAYED = {"layers": {"q": {"kernel": (2, 4, 4)}, "up": {"kernel": (2, 4, 4)}}}
DECAYED |= {"embed": {"embedding": (5, 4)}, "norm": {"scale": (4,)}}


def by_rank(params):
    # Reads every leaf: inside a partition some would be missing.
    return {
        "layers": {
            "q": {"kernel": params["layers"]["q"]["kernel"].ndim > 5},
            "up": {"kernel": params["layers"]["up"]["kernel"].ndim > 1},
        },
        "embed": params["embed"]["embedding"].ndim > 1,
        "norm": {"scale": params["norm"]["scale"].ndim > 1},
    }


EXPECTED = {"layers/q/kernel": 0.0, "layers/up/kernel": 0.5, "embed/embedding": 0.2}
EXPECTED |= {"norm/scale": 0.0}
MASKS = {
    "function": by_rank,
    "prefix": {"layers": {"q": False, "up": True}, "embed": True, "norm": False},
}


@pytest.mark.parametrize(
    ("name", "mask"),
    [(name, "function") for name in WHOLE] + [("muon", "prefix"), ("sift", "prefix")],
)
def test_weight_decay_mask(name, mask):
    """With no gradient a step is the decay alone, each part with its own rate and lambda."""
    params = jax.tree.map(
        lambda shape: jnp.full(shape, 2.0), DECAYED, is_leaf=lambda x: isinstance(x, tuple)
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    options = {
        "weight_decay": 0.25,
        "adam_weight_decay": 1.0,
        "adam_learning_rate": 0.1,
        "weight_decay_mask": MASKS[mask],
    }
    tx = WHOLE[name](1.0, **options)

    def step(params, zeros):
        return tx.update(zeros, tx.init(params), params, constraint_grads=zeros)[0]

    updates = jax.jit(step)(params, zeros)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        want = -EXPECTED[optim.matrices.path_str(path)]
        np.testing.assert_allclose(update, want, rtol=1e-6, err_msg=str(path))
    # As in Optax, when hyperparameters are injected.
    make = optax.inject_hyperparams(WHOLE[name], static_args=optim.STATIC_ARGS[name])
    injected = make(1.0, **options)
    jax.eval_shape(
        lambda p, z: injected.update(z, injected.init(p), p, constraint_grads=z), params, zeros
    )


def test_a_mask_of_another_tree_is_refused_and_none_changes_no_state():
    tx = optim.muon(0.1, weight_decay=0.1, weight_decay_mask={"elsewhere": True})
    with pytest.raises(ValueError):
        tx.init(PARAMS)
    plain, masked = (
        jax.tree.structure(optim.muon(0.1, weight_decay_mask=mask).init(PARAMS))
        for mask in (None, lambda params: True)
    )
    assert plain != masked and plain.num_leaves == masked.num_leaves


# Bare forms

METHODS = [name for name in optim.__all__ if f"scale_by_{name}" in optim.__all__]
BARE_FORMS = [name for name in optim.__all__ if name.startswith("scale_by_")]


def test_every_method_has_a_bare_form():
    whole = {
        name
        for name in optim.__all__
        if inspect.isfunction(getattr(optim, name))
        and "learning_rate" in inspect.signature(getattr(optim, name)).parameters
    }
    assert whole == set(METHODS) == {name.removeprefix("scale_by_") for name in BARE_FORMS}


@pytest.mark.parametrize("name", BARE_FORMS)
def test_bare_forms_take_injected_hyperparameters(name):
    factory = getattr(optim, name)
    static = optim.STATIC_ARGS[name]
    parameters = inspect.signature(factory).parameters
    assert set(static) <= set(parameters)
    assert not {"learning_rate", "aux_learning_rate", "weight_decay"} & set(parameters)
    assert factory.__name__ == name and factory.__doc__
    more = {"orthogonalize": "svd"} if "orthogonalize" in static else {}
    tx = optax.inject_hyperparams(factory, static_args=static)(**more)

    def update(params):
        extra = {"value_fn": value_fn, "constraint_grads": params}
        return tx.update(params, tx.init(params), params, **extra)

    shapes, _ = jax.eval_shape(update, PARAMS)
    assert jax.tree.structure(shapes) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("name", ["mezo", "rada_zo"])
def test_bare_zeroth_order_is_the_method_without_its_rate(name):
    whole, bare = getattr(optim, name)(0.5), getattr(optim, f"scale_by_{name}")()
    params = {"w": draw(0)["layers"]["q"]["kernel"][0]}

    @jax.jit
    def both(params):
        return [
            tx.update(None, tx.init(params), params, value_fn=value_fn)[0]["w"]
            for tx in (whole, bare)
        ]

    a, b = both(params)
    np.testing.assert_allclose(a, -0.5 * b, rtol=1e-6)
    assert float(abs(b).min()) > 0


ZEROTH = [  # ZO-Muon is one of them, and its bare form is a function of its own
    name
    for name in METHODS
    if "num_queries" in inspect.signature(getattr(optim, name)).parameters and name != "zo_muon"
]


@pytest.mark.parametrize("name", ZEROTH)
def test_bare_zeroth_order_of_every_method(name):
    options = {"rank": 2} if name in ("lozo", "subspace_mezo", "subzero") else {}
    rates = {"aux_learning_rate": None} if name == "subspace_mezo" else {}
    bare = getattr(optim, f"scale_by_{name}")
    direction = program(getattr(optim, name)(None, **options, **rates))
    assert program(bare(**options)) == direction
    assert program(getattr(optim, name)(0.5, **options, **rates)) != direction
    with pytest.raises(TypeError, match="learning_rate"):
        bare(learning_rate=0.5)


# dir


def test_dir_lists_public_names_and_no_modules():
    listed = dir(optim)
    assert not [name for name in listed if isinstance(getattr(optim, name), types.ModuleType)]
    assert not [name for name in listed if name.startswith("_")]
    assert set(listed) == set(optim.__all__) - {"matrices", "orthogonalize"}
    assert {"muon", "scale_by_mezo", "STATIC_ARGS"} <= set(listed)


def test_modules_stay_attributes():
    assert callable(optim.matrices.describe) and callable(optim.orthogonalize.newton_schulz)
    assert importlib.import_module("jaxlib_unlearn.optim.zeroth_order.perturbations").dense
    names: dict = {}
    exec("from jaxlib_unlearn.optim import *", names)
    assert names["matrices"] is optim.matrices and names["muon"] is optim.muon
