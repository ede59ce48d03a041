"""Row-wise directions through the decoder: the losses of rows, tables as factors, what it costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn import objectives, optim
from jaxlib_unlearn.optim.zeroth_order.parts import Part, take
from jaxlib_unlearn.optim.zeroth_order.perturbations import Factored
from models.decoder.asked import AskedDecoder
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from train.costs.flops import count
from train.engine.step import Losses

ROWS, LENGTH, WIDTH = 4, 6, 4
CONFIG = DecoderConfig(24, 8, 12, 2, 2, 1, 4)


def batch():
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    spread = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    mask = (draw.random((ROWS, WIDTH)) < 0.7).astype(np.float32)  # rows of unequal weight
    mask[:, 0] = 1.0
    return {
        "tokens": tokens,
        "positions": spread,
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "label_index": spread[:, :WIDTH],
        "targets": tokens[:, 1 : WIDTH + 1],
        "target_mask": mask,
        "row_id": np.arange(ROWS, dtype=np.int32),
    }


def losses_of(learner, params):
    data = jax.tree.map(jnp.asarray, {"train": batch()})
    return Losses(learner, *objectives.resolve("nll"), params, None, data)


TABLES = [
    {"tie_embeddings": False, "positions": "learned"},
    pytest.param({"tie_embeddings": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("more", TABLES, ids=["head and positions", "tied"])
def test_layers_and_tables_as_factors_equal_materialised_copies(more):
    learner = DecoderLearner(Decoder(dataclasses.replace(CONFIG, **more)))
    params = learner.decoder.init(jax.random.key(0))
    # Large enough that rounding is not magnified, and attention does not become a choice.
    tx = optim.rowwise(0.1, rank=2, num_queries=ROWS, eps=0.25)
    factored = {"factored_leaves": learner.factored}

    @jax.jit
    def both(params):
        losses, state = losses_of(learner, params), tx.init(params)
        inside = tx.update(None, state, params, layered_value_fn=losses.value, **factored)
        return inside[1].coeffs, tx.update(None, state, params, value_fn=losses.value)[1].coeffs

    inside, copies = both(params)
    np.testing.assert_allclose(inside, copies, rtol=1e-5, atol=1e-5)


def test_the_mean_of_the_rows_is_the_loss_of_the_batch():
    """Although they have unequally many labels."""
    learner = DecoderLearner(Decoder(CONFIG))
    params = learner.decoder.init(jax.random.key(0))

    @jax.jit
    def rows(params):
        losses = losses_of(learner, params)
        parts = jax.vmap(lambda i: losses.value(params, part=Part(i, ROWS)))(jnp.arange(ROWS))
        return losses.value(params), parts

    whole, parts = rows(params)
    np.testing.assert_allclose(jnp.mean(parts), whole, rtol=1e-6)
    assert float(jnp.std(parts)) > 0.01


def arrays_of(jaxpr, found=None):
    """Shapes of all results of a program, those of its loops included."""
    found = set() if found is None else found
    for equation in jaxpr.eqns:
        found |= {getattr(v.aval, "shape", ()) for v in equation.outvars}
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                arrays_of(getattr(inner, "jaxpr", inner), found)
    return found


def test_no_row_has_weights_of_its_own_and_the_products_are_shared():
    """FLOPs of the pass: those of two plain ones, and of the low-rank terms."""
    rank, rows, length = 1, 8, 32
    config = DecoderConfig(512, 64, 128, 3, 4, 2, 16)
    learner, c = DecoderLearner(Decoder(config)), config
    params = learner.decoder.shapes()
    ints = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    data = dict.fromkeys(("tokens", "positions", "segment_ids", "label_index", "targets"), ints) | {
        "target_mask": jax.ShapeDtypeStruct((rows, length), jnp.float32)
    }
    tx = optim.rowwise(0.1, rank=rank, num_queries=rows)
    state = jax.eval_shape(tx.init, params)

    def value(data, params, layer_map=None, part=None):
        data = data if part is None else take(data, part)
        asked = AskedDecoder(learner.decoder, params, options={"layer_map": layer_map})
        return -jnp.mean(asked.log_probs(data))

    def coefficients(data, params, state):
        extra = {"layered_value_fn": functools.partial(value, data)}
        extra["factored_leaves"] = learner.factored
        return tx.update(None, state, params, **extra)[1].coeffs

    plain = count(value, data, params).flops
    found = count(coefficients, data, params, state).flops
    layer = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    sides = c.num_layers * sum(a + b for a, b in layer)
    table = 64 + 512 + 64  # the head; the lookup gathers one factor and multiplies the other
    wanted = 2 * (plain + 2 * rank * rows * length * (sides + table))
    assert abs(found - wanted) < 1e-3 * wanted
    assert found < 1.06 * 2 * plain

    shapes = arrays_of(jax.make_jaxpr(coefficients)(data, params, state).jaxpr)
    own = {(rows, *s) for s in (*layer, (512, 64), (64, 512))}
    own |= {(rows, 1, *s) for s in (*layer, (512, 64), (64, 512))}
    assert not shapes & own
    # Per row and layer there are the factors, one above the other.
    assert (rows, 1, 64 + 128, rank) in shapes


def test_other_families_still_perturb_tables_as_they_did():
    """Only a family of parts asks for factors outside the stack."""
    learner = DecoderLearner(Decoder(CONFIG))
    params, seen = learner.decoder.shapes(), []

    def value(params, layer_map, part=None):
        seen.append(params["embed"]["embedding"])
        return jnp.zeros(())

    for tx in (optim.lozo(0.1, rank=2), optim.rowwise(0.1, num_queries=2)):
        state = jax.eval_shape(tx.init, params)
        extra = {"layered_value_fn": value, "factored_leaves": learner.factored}
        jax.eval_shape(functools.partial(tx.update, None, **extra), state, params)
    kinds = (
        {isinstance(x, Factored) for x in seen[:1]},
        {isinstance(x, Factored) for x in seen[-1:]},
    )
    assert kinds == ({False}, {True})
