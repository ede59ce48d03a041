"""Every row of OBJECTIVES against float64 loops, on a two-layer attention model.

A new objective is one `Case` with its loop.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import (
    OBJECTIVES,
    batch_from_labels,
    combine,
    misdirection,
    options_of,
)
from jaxlib_unlearn.options import option

V, D, LAYERS, T = 9, 4, 2, 7
# Labels per row. Row 2 is padding in forget and idk, row 3 has no refusal: DPO must skip both.
LENGTHS = {
    "forget": (3, 5, 0, 1, 2),
    "idk": (2, 1, 0, 0, 4),
    "alternate": (2, 1, 0, 0, 4),
    "retain": (4, 0, 2, 5, 1),
    "train": (1, 6, 3, 2, 0),
    "traces": (6, 6, 1, 0, 4),
    "cot": (6, 0, 6, 2, 5),
}
HIDDEN_ROWS = ("rmu", "r2mu")  # of 7 and more blocks unless told otherwise


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


# ---- a toy model -----------------------------------------------------------------------------


def init(key, vocab=V, dim=D, length=T):
    keys = jax.random.split(key, 7)
    shape = (LAYERS, dim, dim)
    params = {
        name: jax.random.normal(k, shape) / math.sqrt(dim)
        for name, k in zip("qkvo", keys[:4], strict=True)
    }
    params["embed"] = jax.random.normal(keys[4], (vocab, dim))
    params["position"] = jax.random.normal(keys[5], (length, dim))
    params["head"] = jax.random.normal(keys[6], (dim, vocab))
    return params


def residual(params, batch, temperature=None, blocks=LAYERS):
    """The residual stream after some blocks."""
    tokens = jnp.asarray(batch["tokens"])
    temperature = jnp.ones(LAYERS) if temperature is None else jnp.asarray(temperature)
    x = params["embed"][tokens] + params["position"][: tokens.shape[1]]
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    for i in range(blocks):
        q, k, v = (x @ params[name][i] for name in "qkv")
        scores = q @ k.mT / (temperature[i] * math.sqrt(x.shape[-1]))
        x = x + jnp.tanh(jax.nn.softmax(jnp.where(causal, scores, -1e30)) @ v @ params["o"][i])
    return x


def apply(params, batch, temperature=None):
    return residual(params, batch, temperature) @ params["head"]


def hidden(params, batch, block):
    return residual(params, batch, blocks=block + 1)


def make_batch(stream, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(V, size=(len(LENGTHS[stream]), T))
    labels = np.full_like(tokens, -100)
    for row, length in enumerate(LENGTHS[stream]):
        if length:
            labels[row, -length:] = tokens[row, -length:]
    return batch_from_labels(tokens, labels)


class World(NamedTuple):
    params: dict
    ref: dict
    batches: dict


@pytest.fixture(scope="module")
def world():
    with jax.enable_x64(True):
        batches = {stream: make_batch(stream, seed) for seed, stream in enumerate(LENGTHS)}
        return World(init(jax.random.key(0)), init(jax.random.key(1)), batches)


# ---- oracles: loops over labels --------------------------------------------------------------


class Label(NamedTuple):
    z: list  # logits of the model
    ref: list  # of the frozen model
    smooth: list  # of the frozen model with smoothed attention
    y: int
    h: list  # residual stream at the token itself, after the block that the options name
    h0: list  # of the frozen model


def log_softmax(z):
    log_total = max(z) + math.log(sum(math.exp(x - max(z)) for x in z))
    return [x - log_total for x in z]


def kl(teacher, z):
    pairs = zip(log_softmax(teacher), log_softmax(z), strict=True)
    return sum(math.exp(p) * (p - q) for p, q in pairs)


def pref(margin, beta):
    return 2 / beta * math.log1p(math.exp(-beta * margin))


def flat(rows):
    return [label for row in rows for label in row]


def mean_of(values):
    return sum(values), len(values)


def nll(rows, which="z"):
    return mean_of([-log_softmax(getattr(x, which))[x.y] for x in flat(rows)])


def ascent(rows):
    return -nll(rows)[0], nll(rows)[1]


def retain_kl(rows):
    return mean_of([kl(x.ref, x.z) for x in flat(rows)])


def retain_kl_by_row(rows):
    return mean_of([sum(kl(x.ref, x.z) for x in row) / len(row) for row in rows if row])


def row_nll(row, which="z"):
    return nll([row], which)[0]


def gaps(rows):
    """S - S_ref of the rows with labels."""
    return [row_nll(row) - row_nll(row, "ref") for row in rows if row]


def npo(rows, beta):
    return mean_of([pref(gap, beta) for gap in gaps(rows)])


def npo_batch_mean(rows, beta):
    n = len(gaps(rows))
    return pref(sum(gaps(rows)) / n, beta) * n, n


def npo_token_mean(rows, beta):
    n = len(gaps(rows))
    return pref(sum(gaps(rows)) / len(flat(rows)), beta) * n, n


def npo_raw(rows, beta):
    pairs = [zip(x.z, x.ref, strict=True) for x in flat(rows)]
    return mean_of([sum(pref(r - z, beta) for z, r in pair) / V for pair in pairs])


def simnpo(rows, beta, delta, spared=0):
    rows = [row[: max(0, len(row) - spared)] for row in rows]
    return mean_of([pref(row_nll(row) / len(row) - delta, beta) for row in rows if row])


def simnpo_token_mean(rows, beta, delta):
    n = len([row for row in rows if row])
    return pref(nll(rows)[0] / nll(rows)[1] - delta, beta) * n, n


def simnpo_raw(rows, beta, delta):
    return mean_of([sum(pref(-z - delta, beta) for z in x.z) / V for x in flat(rows)])


def dpo(s, beta, instead="idk"):
    margins = []
    for answer, refusal in zip(s["forget"], s[instead], strict=True):
        if answer and refusal:
            win, lose = gaps([refusal])[0], gaps([answer])[0]
            margins.append(pref(lose - win, beta))
    return mean_of(margins)


def asu(rows, skip=0):
    rows = [[kl(x.smooth, x.z) for x in row[skip:]] for row in rows]
    return mean_of([sum(row) / len(row) for row in rows if row])


def contrasted(x, amount):
    """The smoothed teacher, lowered where smoothing lowered it; unnormalised log-probabilities."""
    pairs = zip(log_softmax(x.smooth), log_softmax(x.ref), strict=True)
    return [t - amount * max(0.0, o - t) for t, o in pairs]


def asu_contrast(rows, amount):
    rows = [[kl(contrasted(x, amount), x.z) for x in row] for row in rows]
    return mean_of([sum(row) / len(row) for row in rows if row])


def times(factor, term):
    return factor * term[0], term[1]


def asu_tokens(rows):
    return mean_of([kl(x.smooth, x.z) for x in flat(rows)])


def steered(length):
    """The distance of a position to `length` u, over channels."""
    u = state_of("rmu")["direction"].tolist()
    return lambda x: sum((h - length * a) ** 2 for h, a in zip(x.h, u, strict=True)) / D


def drift(x):
    return sum((h - a) ** 2 for h, a in zip(x.h, x.h0, strict=True)) / D


def probability_of(*ids):
    """The mean probability of some words where a label is predicted."""
    return lambda x: sum(math.exp(log_softmax(x.z)[i]) for i in ids) / len(ids)


def by_row(rows, distance):
    return mean_of([sum(map(distance, row)) / len(row) for row in rows if row])


def batch_lengths(rows, distance):
    rows = [row for row in rows if row]
    total, inverse = sum(map(distance, flat(rows))), sum(1 / len(row) for row in rows)
    return total * inverse / len(rows), len(rows)


def labelled(s, stream):
    """All positions of the rows that have a label."""
    pairs = zip(s[f"{stream}, every slot"], LENGTHS[stream], strict=True)
    return [row for row, length in pairs if length]


class Case(NamedTuple):
    config: objectives.Options
    oracle: Callable  # {stream: rows of Labels} -> {term: (sum, weight)}


# Forms that several rows share: one row has the case, a test below covers the others.
SHARED = ("mean_of_means", "kl_all_positions", "kl_sequence_mean")


def case(oracle, name, **options):
    return Case(options_of(name, **options), oracle)


def with_nll(forget):
    return lambda s: {"forget": forget(s), "retain": nll(s["retain"])}


def with_kl(forget):
    return lambda s: {"forget": forget(s), "retain": retain_kl(s["retain"])}


CASES = {
    "nll": case(lambda s: {"train": nll(s["train"])}, "nll"),
    "ga": case(lambda s: {"forget": ascent(s["forget"])}, "ga"),
    "graddiff": case(with_nll(lambda s: ascent(s["forget"])), "graddiff", retain_weight=2.0),
    "graddiff kl": case(with_kl(lambda s: ascent(s["forget"])), "graddiff", retain="kl"),
    "graddiff kl_sequence_mean": case(
        lambda s: {"forget": ascent(s["forget"]), "retain": retain_kl_by_row(s["retain"])},
        "graddiff",
        compat="kl_sequence_mean",
    ),
    "graddiff kl_all_positions": case(
        lambda s: {"forget": ascent(s["forget"]), "retain": retain_kl(s["retain, every slot"])},
        "graddiff",
        compat="kl_all_positions",
    ),
    # The split it depends on is the step's: tests/train/test_same_numbers.py.
    "graddiff mean_of_means": case(
        with_nll(lambda s: ascent(s["forget"])), "graddiff", compat="mean_of_means"
    ),
    "graddiff alone": case(lambda s: {"forget": ascent(s["forget"])}, "graddiff", retain="none"),
    "npo": case(with_nll(lambda s: npo(s["forget"], 0.1)), "npo"),
    "npo kl": case(with_kl(lambda s: npo(s["forget"], 0.5)), "npo", retain="kl", beta=0.5),
    "npo batch_mean": case(
        with_nll(lambda s: npo_batch_mean(s["forget"], 0.1)), "npo", compat="batch_mean"
    ),
    "npo token_mean": case(
        with_nll(lambda s: npo_token_mean(s["forget"], 0.1)), "npo", compat="token_mean"
    ),
    "npo raw_logits": case(
        with_nll(lambda s: npo_raw(s["forget"], 0.1)), "npo", compat="raw_logits"
    ),
    "simnpo": case(with_nll(lambda s: simnpo(s["forget"], 4.5, 0.0)), "simnpo"),
    "simnpo token_mean": case(
        with_nll(lambda s: simnpo_token_mean(s["forget"], 2.0, 0.3)),
        "simnpo",
        beta=2.0,
        delta=0.3,
        compat="token_mean",
    ),
    "simnpo raw_logits": case(
        with_nll(lambda s: simnpo_raw(s["forget"], 4.5, 0.2)),
        "simnpo",
        delta=0.2,
        compat="raw_logits",
    ),
    "idk": case(with_nll(lambda s: nll(s["idk"])), "idk"),
    "idk tofu_concat": case(
        lambda s: {"forget": nll(s["idk"] + s["retain"])}, "idk", compat="tofu_concat"
    ),
    "dpo": case(with_nll(lambda s: dpo(s, 0.1)), "dpo"),
    "altpo": case(with_nll(lambda s: dpo(s, 0.1, "alternate")), "altpo"),
    "altpo no_factor": case(
        with_nll(lambda s: times(0.05, dpo(s, 0.1, "alternate"))), "altpo", compat="no_factor"
    ),
    "alternate": case(
        lambda s: {
            "forget_alternate": nll(s["alternate"]),
            "forget_push": times(0.4, simnpo(s["forget"], 8.0, 0.9)),
            "retain": nll(s["retain"]),
        },
        "alternate",
        push=0.4,
        beta=8.0,
        delta=0.9,
    ),
    "alternate spare_end": case(
        lambda s: {
            "forget_alternate": nll(s["alternate"]),
            "forget_push": times(0.4, simnpo(s["forget"], 8.0, 0.9, spared=2)),
            "retain": nll(s["retain"]),
        },
        "alternate",
        push=0.4,
        beta=8.0,
        delta=0.9,
        spare_end=2,
    ),
    "alternate alone": case(
        lambda s: {"forget_alternate": nll(s["alternate"])}, "alternate", push=0.0, retain="none"
    ),
    "dpo no_factor": case(
        with_nll(lambda s: (dpo(s, 0.1)[0] * 0.05, dpo(s, 0.1)[1])), "dpo", compat="no_factor"
    ),
    "asu": case(with_nll(lambda s: asu(s["forget"])), "asu"),
    "asu kl": case(with_kl(lambda s: asu(s["forget"])), "asu", retain="kl", layers=(1,)),
    "asu token_mean": case(with_nll(lambda s: asu_tokens(s["forget"])), "asu", compat="token_mean"),
    "asu push": case(
        lambda s: {
            "forget": asu(s["forget"]),
            "forget_push": times(1.5, simnpo(s["forget"], 1.0, -0.25)),
            "retain": nll(s["retain"]),
        },
        "asu",
        push=1.5,
    ),
    "asu contrast": case(
        with_nll(lambda s: asu_contrast(s["forget"], 2.0)), "asu", contrast=2.0, layers=(1,)
    ),
    "asu push contrast": case(
        lambda s: {
            "forget": asu_contrast(s["forget"], 0.7),
            "forget_push": times(0.5, simnpo(s["forget"], 2.0, 0.1)),
            "retain": retain_kl(s["retain"]),
        },
        "asu",
        push=0.5,
        contrast=0.7,
        beta=2.0,
        delta=0.1,
        retain="kl",
    ),
    "rmu": case(
        lambda s: {
            "forget": by_row(s["forget"], steered(2.0)),
            "retain": by_row(s["retain"], drift),
        },
        "rmu",
        layer=1,
        steering=2.0,
        retain_weight=3.0,
    ),
    "rmu all": case(
        lambda s: {
            "forget": by_row(labelled(s, "forget"), steered(6.5)),
            "retain": by_row(labelled(s, "retain"), drift),
        },
        "rmu",
        layer=0,
        positions="all",
    ),
    "rmu nll": case(
        with_nll(lambda s: by_row(s["forget"], steered(6.5))), "rmu", layer=0, retain="nll"
    ),
    "rmu every_slot": case(
        lambda s: {
            "forget": mean_of([steered(6.5)(x) for x in flat(s["forget, every slot"])]),
            "retain": mean_of([drift(x) for x in flat(s["retain, every slot"])]),
        },
        "rmu",
        layer=1,
        compat="every_slot",
    ),
    "rmu batch_lengths": case(
        lambda s: {
            "forget": batch_lengths(s["forget"], steered(6.5)),
            "retain": batch_lengths(s["retain"], drift),
        },
        "rmu",
        layer=1,
        compat="batch_lengths",
    ),
    "rmu padded": case(
        lambda s: {
            "forget": mean_of([steered(6.5)(x) for x in flat(s["forget, every slot"])]),
            "retain": mean_of([drift(x) for x in flat(s["retain, every slot"])]),
        },
        "rmu",
        block=1,
        compat="padded",
    ),
    "rmu reflection": case(
        lambda s: {
            "forget": by_row(s["forget"], steered(6.5)),
            "forget_reflection": times(0.4, by_row(s["forget"], probability_of(2, 7))),
            "retain": by_row(s["retain"], drift),
        },
        "rmu",
        layer=0,
        reflection_penalty=0.4,
        reflection_ids=(2, 7),
    ),
    "r2mu": case(
        lambda s: {
            "forget": by_row(labelled(s, "forget"), steered(2.0)),
            "forget_trace": by_row(labelled(s, "traces"), steered(2.0)),
            "retain": by_row(labelled(s, "retain"), drift),
            "retain_cot": by_row(labelled(s, "cot"), drift),
        },
        "r2mu",
        block=1,
        steering=2.0,
        retain_weight=3.0,
        trace_weight=0.5,
        cot_weight=7.0,
    ),
    "r2mu padded": case(
        lambda s: {
            "forget": mean_of([steered(6.5)(x) for x in flat(s["forget, every slot"])]),
            "forget_trace": mean_of([steered(6.5)(x) for x in flat(s["traces, every slot"])]),
            "retain": mean_of([drift(x) for x in flat(s["retain, every slot"])]),
            "retain_cot": mean_of([drift(x) for x in flat(s["cot, every slot"])]),
        },
        "r2mu",
        block=0,
        compat="padded",
    ),
    "r2mu v0 reflection": case(
        lambda s: {
            "forget": by_row(labelled(s, "forget"), steered(6.5)),
            "forget_reflection": times(2.0, by_row(s["forget"], probability_of(0, 1, 8))),
            "forget_trace": by_row(labelled(s, "traces"), steered(6.5)),
            "retain": nll(s["retain"]),
        },
        "r2mu",
        block=1,
        cot_weight=0.0,
        retain="nll",
        reflection_penalty=2.0,
        reflection_ids=(0, 1, 8),
    ),
    "asu_idk token_mean": case(
        lambda s: {
            "forget": asu_tokens([row[1:] for row in s["forget"]]),
            "forget_idk": nll(s["idk"]),
        },
        "asu_idk",
        compat="token_mean",
        retain="none",
    ),
    "asu_idk": case(
        lambda s: {
            "forget": asu(s["forget"], skip=1),
            "forget_idk": nll(s["idk"]),
            "retain": nll(s["retain"]),
        },
        "asu_idk",
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def prepare(world, config, batches=None):
    """The row, its options and batches with exactly the caches that the row asks for."""
    row, options = objectives.resolve(config)
    keywords = objectives.reference_forward(row, options, LAYERS)
    result = {}
    for stream in row.streams:
        batch = dict((world.batches if batches is None else batches)[stream])
        if row.reference.get(stream, "fork") != "fork":
            temperature = keywords[stream].get("attention_temperature")
            logits = apply(world.ref, batch, temperature)
            if row.reference[stream] == "logps":
                frozen = objectives.context_from_apply(apply, world.ref)
                batch["ref_log_probs"] = frozen.model.log_probs(batch)
            elif row.reference[stream] == "hidden_all":
                batch["ref_logits"] = logits
            else:
                index = batch["label_index"][..., None]
                batch["ref_logits"] = jnp.take_along_axis(logits, index, 1)
            if row.reference[stream] == "hidden_pair":
                plain = apply(world.ref, batch)
                batch["ref_plain_logits"] = jnp.take_along_axis(plain, index, 1)
        result[stream] = {k: jnp.asarray(v) for k, v in batch.items()}
    return row, options, result


def loops(world, config):
    _, options = objectives.resolve(config)
    temperature = None
    if hasattr(options, "temperature"):
        temperature = objectives.attention_temperatures(options, LAYERS)
    streams = {}
    for stream, batch in world.batches.items():
        z, ref = apply(world.params, batch), apply(world.ref, batch)
        block = misdirection.block_of(options) if options.name in HIDDEN_ROWS else 0
        h, h0 = (hidden(params, batch, block) for params in (world.params, world.ref))
        found = (z, ref, apply(world.ref, batch, temperature), h, h0)
        z, ref, smooth, h, h0 = (np.asarray(x).tolist() for x in found)
        rows = []
        for b in range(len(batch["tokens"])):
            slots = range(T - LENGTHS[stream][b], T)
            tokens = batch["tokens"][b]
            rows.append(
                [
                    Label(
                        *(x[b][t - 1] for x in (z, ref, smooth)), int(tokens[t]), h[b][t], h0[b][t]
                    )
                    for t in slots
                ]
            )
        streams[stream] = rows
        streams[f"{stream}, every slot"] = [
            [Label(z[b][t], ref[b][t], smooth[b][t], 0, h[b][t], h0[b][t]) for t in range(T)]
            for b in range(len(z))
        ]
    return streams


def state_of(name):
    row = OBJECTIVES[name]
    if row.init_state is None:
        return ()
    return row.init_state(jax.random.key(3), row.options(), {"hidden": D})


def terms_of(row, options, batches, params, ref_logits_fn=None):
    forks = "fork" in row.reference.values()
    context = objectives.context_from_apply(
        apply,
        params,
        ref_logits_fn,
        reference=init(jax.random.key(1)) if forks else None,
        hidden_fn=hidden,
        state=state_of(row.name),
    )
    return row.loss(context, batches, options)


class Compiled(NamedTuple):
    """A case compiled once: `run(params, batches=..., weights=...) -> total, terms, gradients`."""

    row: objectives.Objective
    options: objectives.Options
    batches: dict
    weights: dict
    weights_program: str
    run: Callable


def ref_columns(batches):
    return {
        stream: {k: v for k, v in batch.items() if k.startswith("ref_")}
        for stream, batch in batches.items()
    }


@pytest.fixture(scope="module")
def compiled(world):
    def make(name):
        row, options, batches = prepare(world, CASES[name].config)

        def total(params, refs, batches, weights):
            filled = {stream: {**b, **refs[stream]} for stream, b in batches.items()}
            terms = terms_of(row, options, filled, params)
            return combine(terms, weights, options), terms

        def weights_of(params):
            return {k: term[1] for k, term in terms_of(row, options, batches, params).items()}

        weights = jax.jit(weights_of).lower(world.params).compile()
        fn = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        global_weights = weights(world.params)

        def run(params, batches=batches, weights=global_weights):
            (value, terms), grads = fn(params, ref_columns(batches), batches, weights)
            return value, terms, grads

        return Compiled(row, options, batches, global_weights, weights.as_text(), run)

    made = {}

    def get(name):
        if name not in made:
            made[name] = make(name)
        return made[name]

    return get


def test_every_row_and_every_compat_form_has_a_case():
    assert {case.config.name for case in CASES.values()} == set(OBJECTIVES)
    have = {(case.config.name, case.config.compat) for case in CASES.values()}
    own = {(r.name, form) for r in OBJECTIVES.values() for form in r.compat if form not in SHARED}
    assert own <= have and {("graddiff", form) for form in SHARED} <= have
    assert all(name == row.name for name, row in OBJECTIVES.items())


@every_case
def test_terms_equal_the_loops(name, world, compiled):
    case = compiled(name)
    want = CASES[name].oracle(loops(world, CASES[name].config))
    total, terms, _ = case.run(world.params)
    assert set(terms) == set(want)
    expected = 0.0
    for term, (value, weight) in want.items():
        np.testing.assert_allclose(terms[term][0], value, rtol=1e-11, err_msg=term)
        assert float(terms[term][1]) == weight
        expected += objectives.coefficient(term, case.options) * value / weight
    np.testing.assert_allclose(total, expected, rtol=1e-11)
    # jit == eager, and the terms' own weights are those of the batch
    eager = terms_of(case.row, case.options, case.batches, world.params)
    np.testing.assert_allclose(total, combine(eager, None, case.options), rtol=1e-12)


@every_case
def test_gradient_equals_finite_differences(name, world, compiled):
    run = compiled(name).run
    leaves, tree = jax.tree.flatten(world.params)
    rng = np.random.default_rng(5)
    step = jax.tree.unflatten(tree, [rng.normal(size=x.shape) for x in leaves])

    def moved(eps):
        return run(jax.tree.map(lambda p, s: p + eps * s, world.params, step))

    grad, to_frozen = moved(0.0)[2]
    got = sum(jnp.vdot(g, s) for g, s in zip(*map(jax.tree.leaves, (grad, step)), strict=True))
    want = (moved(1e-5)[0] - moved(-1e-5)[0]) / 2e-5
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
    assert not any(np.any(g) for g in jax.tree.leaves(to_frozen))


@every_case
def test_weights_do_not_depend_on_the_parameters(name, world, compiled):
    case = compiled(name)
    # The step computes the weights of the global batch first: XLA must be able to drop the forward.
    assert "dot(" not in case.weights_program and "exponential(" not in case.weights_program
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), world.params)
    _, terms, _ = case.run(broken)
    assert {k: float(t[1]) for k, t in terms.items()} == {
        k: float(w) for k, w in case.weights.items()
    }


@every_case
def test_micro_batches_add_up(name, world, compiled):
    case = compiled(name)
    total, _, (grad, _) = case.run(world.params)
    totals, grads = 0.0, jax.tree.map(jnp.zeros_like, grad)
    for rows in ([1, 1, 0, 0, 0], [0, 0, 1, 1, 1]):  # a ragged cut, kept at one shape by masks
        part = {
            stream: {**b, "target_mask": b["target_mask"] * np.array(rows, np.float32)[:, None]}
            for stream, b in case.batches.items()
        }
        value, _, (g, _) = case.run(world.params, part)
        totals, grads = totals + value, jax.tree.map(jnp.add, grads, g)
    assert bool(np.isclose(totals, total, rtol=1e-12)) == case.row.additive
    if case.row.additive:
        for got, want in zip(*map(jax.tree.leaves, (grads, grad)), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13)
        objectives.check_accumulation(case.row, 4)
    else:
        objectives.check_accumulation(case.row, 1)
        with pytest.raises(UserError, match="micro-batches"):
            objectives.check_accumulation(case.row, 2)


@every_case
def test_padding_changes_nothing(name, world):
    wider = {}
    for stream, batch in world.batches.items():
        tokens = np.pad(batch["tokens"], [(0, 1), (0, 0)], constant_values=1)
        wider[stream] = {
            **batch,
            "tokens": tokens,
            "positions": np.pad(batch["positions"], [(0, 1), (0, 0)]),
            "segment_ids": np.pad(batch["segment_ids"], [(0, 1), (0, 0)]),
            "label_index": np.pad(batch["label_index"], [(0, 1), (0, 2)]),
            "targets": np.pad(batch["targets"], [(0, 1), (0, 2)]),
            "target_mask": np.pad(batch["target_mask"], [(0, 1), (0, 2)]),
        }
    row, options, batches = prepare(world, CASES[name].config)
    want = terms_of(row, options, batches, world.params)
    got = terms_of(*prepare(world, CASES[name].config, wider), world.params)
    every = {"kl_all_positions": ("retain",), "every_slot": tuple(want), "padded": tuple(want)}
    for term in every.get(options.compat, ()):  # padding is part of these means
        (before, count), (after, more) = want.pop(term), got.pop(term)
        assert more == count + T and before != after
    for term in want:
        np.testing.assert_allclose(got[term], want[term], rtol=1e-12)


@every_case
def test_finite_at_extreme_logits(name, world, compiled):
    total, _, grads = compiled(name).run({**world.params, "head": world.params["head"] * 1e5})
    assert np.isfinite(total)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


@every_case
def test_declared_caches_suffice(name, compiled):
    row, batches = compiled(name).row, compiled(name).batches
    kinds = {
        "logps": {"ref_log_probs"},
        "hidden": {"ref_logits"},
        "hidden_all": {"ref_logits"},
        "hidden_pair": {"ref_logits", "ref_plain_logits"},
    }
    have = {stream: set(columns) for stream, columns in ref_columns(batches).items() if columns}
    cached = {stream: kind for stream, kind in row.reference.items() if kind != "fork"}
    assert have == {stream: kinds[kind] for stream, kind in cached.items()}


@every_case
def test_rows_are_consistent(name):
    row, options = objectives.resolve(CASES[name].config)
    assert set(row.columns) == set(row.streams)
    assert set(row.reference) <= set(row.streams) and set(row.forward) <= set(row.reference)
    assert set(row.reference.values()) <= {"logps", "hidden", "hidden_all", "hidden_pair", "fork"}
    questions = row.questions(options)
    assert set(questions.asks) <= set(row.streams) and set(questions.forked) <= set(row.streams)
    assert bool(questions.blocks) == bool(questions.of("hidden"))
    assert hash(options) == hash(objectives.resolve(CASES[name].config)[1])  # a static jit argument
    assert objectives.resolve(options)[1] == options
    assert row.summary and row.paper


@pytest.mark.parametrize("form", SHARED)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_shared_forms_change_what_they_name_in_every_row(name, form, world):
    if form not in OBJECTIVES[name].compat:
        assert "retain" not in OBJECTIVES[name].streams and form != "mean_of_means"
        return
    block = {"block": 1} if name in HIDDEN_ROWS else {}
    config = options_of(name, compat=form, **block)
    row, options, batches = prepare(world, config)
    retain = "kl" if form.startswith("kl") else None
    plain = options_of(name, retain=retain, **block)
    same = terms_of(*prepare(world, plain), world.params)
    got = terms_of(row, options, batches, world.params)
    if form.startswith("kl"):
        assert options.retain == "kl" and row.additive == (form == "kl_sequence_mean")
        every = form == "kl_all_positions"
        oracle = retain_kl if every else retain_kl_by_row
        rows = loops(world, config)["retain, every slot" if every else "retain"]
        np.testing.assert_allclose(got.pop("retain"), oracle(rows), rtol=1e-11)
        del same["retain"]
    assert row.per_micro_batch == (form == "mean_of_means")
    assert row.packable == (form == "kl_sequence_mean" and name not in HIDDEN_ROWS)
    for term, value in same.items():
        np.testing.assert_allclose(got[term], value, rtol=1e-12, err_msg=term)


def test_float32_model_gives_float32_terms(world):
    with jax.enable_x64(False):
        for low in (jnp.float32, jnp.bfloat16):
            small = jax.tree.map(lambda x, d=low: jnp.asarray(x, d), world.params)
            terms = terms_of(*prepare(world, options_of("graddiff")), small)
            assert {x.dtype for term in terms.values() for x in term} == {jnp.dtype("float32")}


# ---- properties from the papers ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["asu", "graddiff"])
def test_at_the_reference_kl_terms_vanish(name, world):
    config = options_of(name, retain="kl", temperature=1.0 if name == "asu" else None)
    row, options, batches = prepare(world, config)
    side = "forget" if name == "asu" else "retain"

    def total(params):
        return combine(terms_of(row, options, batches, params), None, options, side=side)

    value, grad = jax.value_and_grad(total)(world.ref)
    assert abs(float(value)) < 1e-13
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grad)) < 1e-13


def test_r2mu_without_its_terms_is_rmu_bit_by_bit(world):
    """Both weights at 0: RMU's streams, value and gradient; the last at 0: R2MU-v0."""
    same = {"block": 1, "positions": "all", "retain_weight": 3.0, "steering": 2.0}
    found = []
    for options in (
        options_of("rmu", **same),
        options_of("r2mu", **same, trace_weight=0.0, cot_weight=0.0),
    ):
        row, options, batches = prepare(world, options)
        assert tuple(batches) == ("forget", "retain")
        loss = jax.jit(
            jax.value_and_grad(
                lambda p, row=row, o=options, b=batches: combine(terms_of(row, o, b, p), None, o)
            )
        )
        found.append(loss(world.params))
    jax.tree.map(np.testing.assert_array_equal, *found)
    v0, _, batches = prepare(world, options_of("r2mu", cot_weight=0.0))
    assert tuple(batches) == ("forget", "traces", "retain") and v0.reference == {"retain": "fork"}


def test_a_batch_given_twice_weighs_the_same(world):
    row, options, batches = prepare(world, CASES["r2mu"].config)
    twice = {s: {k: jnp.concatenate([x, x]) for k, x in b.items()} for s, b in batches.items()}
    once = combine(terms_of(row, options, batches, world.params), None, options)
    again = combine(terms_of(row, options, twice, world.params), None, options)
    np.testing.assert_allclose(again, once, rtol=1e-12)


def test_every_topic_has_a_vector_of_its_own(world):
    """Rows of a topic are steered as if there were no other; a name decides its vector."""
    _, _, batches = prepare(world, CASES["r2mu"].config)
    topics = np.array([0, 1, 1, 0, 1])
    mixed = {name: {**batch, "topic": jnp.asarray(topics)} for name, batch in batches.items()}
    row, options = objectives.resolve("r2mu", block=1, topics=("art", "law"))

    def terms(options, batches):
        state = row.init_state(jax.random.key(3), options, {"hidden": D})
        context = objectives.context_from_apply(
            apply, world.params, reference=world.ref, hidden_fn=hidden, state=state
        )
        return row.loss(context, batches, options), state["direction"]

    got, u = terms(options, mixed)
    np.testing.assert_allclose(jnp.linalg.norm(u, axis=1), 1, rtol=1e-6)
    assert u.shape == (2, D) and bool((u >= 0).all()) and not np.allclose(u[0], u[1])
    for index, topic in enumerate(options.topics):
        alone, v = terms(dataclasses.replace(options, topics=(topic,)), {
            name: {**b, "topic": jnp.zeros(5, int),
                   "target_mask": b["target_mask"] * (topics == index)[:, None]}
            for name, b in batches.items()
        })  # fmt: skip
        np.testing.assert_array_equal(v[0], u[index])
        for term in ("forget", "forget_trace"):
            total, count = got[term]
            got[term] = total - alone[term][0], count - alone[term][1]
    for term in ("forget", "forget_trace"):
        np.testing.assert_allclose(got[term], 0, atol=1e-12)


def test_what_a_run_fills_in():
    words = {"<think>": 4, "Wait": 9}
    facts = objectives.Facts(words.get, ("art", "law"))
    for name in HIDDEN_ROWS:
        row, options = objectives.resolve(name, reflection_penalty=1.0)
        found = row.fit(options, facts)
        assert found.reflection_ids == (4, 9) and found.topics == ("art", "law")
        assert row.fit(found, objectives.Facts(lambda word: 1)) == found
        assert set(row.questions(found).asks["forget"]) == {"hidden", "log_probs"}
        with pytest.raises(UserError, match="none of the reflection words is an entry"):
            row.fit(options, objectives.Facts(lambda word: None))
        plain = objectives.resolve(name)[1]
        assert row.fit(plain, objectives.Facts(words.get, ("art",))) == plain
        turned = objectives.resolve(name, topics=("law", "art"))[1]
        assert row.fit(turned, facts).topics == ("law", "art")
        for topics in (("art",), ("art", "law", "tax"), ("art", "art"), ("art", "tax")):
            odd = objectives.resolve(name, topics=topics)[1]
            with pytest.raises(UserError, match="the rows to forget have art, law; name each"):
                row.fit(odd, facts)


def test_the_penalty_lowers_the_words(world):
    row, options, batches = prepare(world, CASES["rmu reflection"].config)

    def penalty(logits):
        context = objectives.context_from_apply(lambda params, batch: logits, None)
        total, count = misdirection.reflection(context, batches["forget"], options)
        return total / count

    logits = apply(world.params, batches["forget"])
    value, grad = jax.value_and_grad(penalty)(logits)
    assert 0 < value < 1
    at = batches["forget"]["label_index"][0, 0]
    assert all(grad[0, at, i] > 0 for i in options.reflection_ids)
    assert float(jnp.abs(grad[0, 0]).max()) == 0  # no label there
    np.testing.assert_allclose(penalty(jnp.zeros_like(logits)), 1 / V, rtol=1e-12)


def test_graddiff_without_one_side_is_the_other_method(world, compiled):
    row, batches = compiled("graddiff").row, compiled("graddiff").batches
    train = {"train": batches["retain"]}
    for weights, other, streams in (
        ((0.0, 1.0), "nll", train),
        ((1.0, 0.0), "ga", {"forget": batches["forget"]}),
    ):
        options = options_of(
            "graddiff", retain="nll", forget_weight=weights[0], retain_weight=weights[1]
        )
        got = combine(terms_of(row, options, batches, world.params), None, options)
        alone, alone_options = objectives.resolve(other)
        want = combine(terms_of(alone, alone_options, streams, world.params), None, alone_options)
        np.testing.assert_allclose(got, want, rtol=1e-13)


def test_sides_add_up_to_the_total(world, compiled):
    options = compiled("asu_idk").options
    terms = compiled("asu_idk").run(world.params)[1]
    sides = [combine(terms, None, options, side=side) for side in ("forget", "retain")]
    np.testing.assert_allclose(sum(sides), combine(terms, None, options), rtol=1e-13)
    with pytest.raises(ValueError, match="no terms"):
        combine(terms, None, options, side="train")


@pytest.mark.parametrize("name", ["npo batch_mean", "asu", "simnpo token_mean", "dpo"])
def test_a_batch_without_labels_adds_nothing(name, compiled, world):
    empty = {
        stream: {**b, "target_mask": jnp.zeros_like(b["target_mask"])}
        for stream, b in compiled(name).batches.items()
    }
    weights = {term: w * 0 for term, w in compiled(name).weights.items()}
    total, _, grads = compiled(name).run(world.params, empty, weights)
    assert float(total) == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))


def test_npo_and_dpo_at_the_reference(world):
    for name, beta in (("npo", 0.1), ("npo", 1.3), ("dpo", 0.1), ("dpo", 1.3)):
        row, options, batches = prepare(world, options_of(name, retain="none", beta=beta))
        terms = terms_of(row, options, batches, world.ref)
        np.testing.assert_allclose(
            terms["forget"][0] / terms["forget"][1], 2 / beta * math.log(2), rtol=1e-12
        )


class Facts(NamedTuple):
    original: dict
    batch: dict

    def rows(self, rows, ref_temperature=None):
        """Some facts, with the original model's logits, smoothed or not, at their label."""
        batch = {k: v[rows] for k, v in self.batch.items()}
        logits = apply(self.original, batch, ref_temperature)
        return {**batch, "ref_logits": logits[:, 2:3]}


def mean_nll(params, batch, temperature=None):
    context = objectives.context_from_apply(lambda p, b: apply(p, b, temperature), params)
    return float(-jnp.mean(context.model.log_probs(batch)))


def fit(params, config, batches, steps, rate):
    row, options = objectives.resolve(config)
    tx = optax.adam(rate)

    def step(carry, _):
        params, state = carry
        loss, grad = jax.value_and_grad(
            lambda p: combine(terms_of(row, options, batches, p), None, options)
        )(params)
        updates, state = tx.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), loss

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps))
    (params, _), losses = run(params)
    return params, losses


@pytest.fixture(scope="module")
def facts():
    """Twelve memorised key -> value pairs: [key, filler, filler, value]."""
    with jax.enable_x64(False):
        keys = np.arange(12)
        values = 12 + np.random.default_rng(0).permutation(12)
        tokens = np.stack([keys, keys * 0 + 24, keys * 0 + 25, values], 1)
        labels = np.where(np.arange(4) == 3, tokens, -100)
        batch = {k: jnp.asarray(v) for k, v in batch_from_labels(tokens, labels).items()}
        start = init(jax.random.key(3), 26, 16, 4)
        original, _ = fit(start, options_of("nll"), {"train": batch}, 300, 1e-2)
        assert mean_nll(original, batch) < 0.05
        return Facts(original, batch)


@pytest.mark.parametrize("retain", ["nll", "kl"])
def test_asu_moves_a_memorising_model_to_its_smoothed_teacher(retain, facts):
    """Forget NLL rises to the teacher's level and stays; retain NLL stays where it was."""
    with jax.enable_x64(False):
        config = options_of("asu", retain=retain, temperature=8.0, forget_weight=1.0)
        row, options = objectives.resolve(config)
        hot = objectives.attention_temperatures(options, LAYERS)
        batches = {"forget": facts.rows(slice(0, 4), hot), "retain": facts.rows(slice(4, None))}
        teacher = mean_nll(facts.original, batches["forget"], hot)
        assert teacher > 0.5
        unlearned, losses = fit(facts.original, config, batches, 300, 3e-3)
        assert float(losses[-1]) < 0.1 * float(losses[0]) and float(losses.min()) > -1e-6
        assert abs(mean_nll(unlearned, batches["forget"]) - teacher) < 0.15 * teacher
        assert mean_nll(unlearned, batches["retain"]) < 0.1


def test_gradient_ascent_diverges_where_asu_does_not(facts):
    with jax.enable_x64(False):
        forget = facts.rows(slice(0, 4))
        _, losses = fit(facts.original, options_of("ga"), {"forget": forget}, 300, 3e-3)
        assert float(losses[-1]) < -10


# ---- options that a user may give --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("grad_diff", {}, "unknown objective 'grad_diff'; did you mean 'graddiff'?"),
        ("simpo", {}, "did you mean 'simnpo'?"),
        ("zzz", {}, "unknown objective 'zzz'; use one of nll, ga, graddiff"),
        ("asu", {"layers": ()}, "layers is empty"),
        ("asu", {"layers": (0, -1)}, "layers holds -1"),
        ("ga", {"beta": 0.1}, "objective 'ga' does not use beta; it takes forget_w"),
        ("ga", {"retain": "kl"}, "does not use retain; it takes forget_weight"),
        ("nll", {"forget_weight": 1.0}, "it takes no options"),
        ("npo", {"temperature": 2.0}, "does not use temperature"),
        ("npo", {"beta": 0.0}, "beta is 0.0; it must be greater than 0"),
        ("npo", {"beta": float("nan")}, "beta is nan"),
        ("asu", {"temperature": -1.0}, "temperature is -1.0"),
        ("asu", {"push": -1.0}, "push is -1.0; it must be 0 or more"),
        ("asu", {"contrast": -0.5}, "contrast is -0.5; it must be 0 or more"),
        ("asu", {"beta": 2.0}, "uses beta only with push; set push above 0"),
        ("asu_idk", {"push": 1.0}, "does not use push"),
        ("graddiff", {"retain_weight": -1.0}, "it must be 0 or more"),
        ("graddiff", {"retain": "kll"}, "did you mean 'kl'?"),
        ("npo", {"compat": "batchmean"}, "did you mean 'batch_mean'?"),
        ("ga", {"compat": "batch_mean"}, "did you mean 'mean_of_means'?"),
        (
            "npo",
            {"compat": "kl_sequence_mean", "retain": "nll"},
            "compat 'kl_sequence_mean' is a form of retain=kl, not of nll; leave retain out",
        ),
        ("idk", {"compat": "tofu_concat", "retain": "kl"}, "does not use retain"),
        ("rmu", {"steering": 0.0}, "steering is 0.0; it must be greater than 0"),
        ("rmu", {"retain": "nl"}, "did you mean 'nll'?"),
        ("rmu", {"compat": "every_slot", "positions": "all"}, "does not use positions"),
        ("r2mu", {"compat": "padded", "positions": "answer"}, "does not use positions"),
        ("r2mu", {"trace_weight": -1.0}, "trace_weight is -1.0; it must be 0 or more"),
        ("r2mu", {"layer": 3}, "does not use layer; it takes steering"),
    ],
)
def test_bad_options_end_in_one_line(name, given, message):
    with pytest.raises(UserError) as error:
        objectives.resolve(name, **given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_resolve_fills_in_and_specialises():
    row, options = objectives.resolve(options_of("asu", retain="kl", layers=[1, 0]))
    assert options == options_of(
        "asu",
        retain="kl",
        temperature=2.3,
        layers=(1, 0),
        push=0.0,
        contrast=0.0,
        forget_weight=0.1,
        retain_weight=1.0,
    )
    assert objectives.resolve(options)[1] == options
    pushed = objectives.resolve(options_of("asu", push=1.0, contrast=2.0))
    assert pushed[0].reference == {"forget": "hidden_pair"}
    assert (pushed[1].beta, pushed[1].delta) == (1.0, -0.25)
    assert row.reference == {"forget": "hidden", "retain": "hidden"}
    assert objectives.resolve(options_of("npo", retain="none"))[0].streams == ("forget",)
    raw, _ = objectives.resolve(options_of("npo", compat="raw_logits"))
    assert raw.reference == {"forget": "hidden"} and raw.additive
    assert not objectives.resolve(options_of("npo", compat="batch_mean"))[0].additive
    assert OBJECTIVES["asu"].reference == {"forget": "hidden"}  # the table itself is not changed


def test_reference_forward_smooths_the_forget_stream_only():
    row, options = objectives.resolve(options_of("asu", retain="kl", layers=(2,)))
    got = objectives.reference_forward(row, options, 4)
    assert got["retain"] == {}
    np.testing.assert_allclose(got["forget"]["attention_temperature"], [1, 1, 2.3, 1], rtol=1e-6)
    assert objectives.reference_forward(*objectives.resolve("npo"), 4) == {"forget": {}}
    with pytest.raises(UserError, match="block 2; the model has blocks 0 to 1"):
        objectives.attention_temperatures(options, 2)
    with pytest.raises(UserError, match="empty"):
        objectives.attention_temperatures(options_of("asu", layers=()), 2)


def test_a_row_of_your_own():
    def loss(context, batches, options):
        return {"forget": (jnp.sum(context.model.log_probs(batches["forget"])), jnp.array(1.0))}

    @dataclasses.dataclass(frozen=True)
    class Mine(objectives.Options):
        name: str = "mine"
        beta: float = option(0.2, "how much", above=0)

    mine = objectives.Objective(
        name="mine", loss=loss, streams=("forget",), columns={"forget": ("text",)}, reference={},
        forward={}, additive=True, paper="-", options=Mine, summary="mine",
    )  # fmt: skip
    table = {**OBJECTIVES, "mine": mine}
    row, options = objectives.resolve("mine", table)
    assert options.beta == 0.2 and row.streams == ("forget",)
    assert "mine" in objectives.list_objectives(table)[-1]
    assert "text" in objectives.describe(row) and "beta=0.2" in objectives.describe(row)
    with pytest.raises(UserError, match="objective 'mine': beta is -1; it must be greater than 0"):
        objectives.resolve("mine", table, beta=-1)
    with pytest.raises(UserError, match="does not use delta; it takes beta"):
        objectives.resolve("mine", table, delta=1.0)
    with pytest.raises(TypeError, match="takes Mine"):
        objectives.resolve(dataclasses.replace(options_of("npo"), name="mine"), table)
    with pytest.raises(TypeError, match="beside an instance"):
        objectives.resolve(Mine(), table, beta=0.3)


def test_the_list_names_every_row():
    lines = objectives.list_objectives()
    assert [line.split()[0] for line in lines] == list(OBJECTIVES)
    for name, row in OBJECTIVES.items():
        text = objectives.describe(name)
        assert all(word in text for word in (*row.streams, *row.compat, *row.defaults, row.paper))
    assert "hidden of forget with attention_temperature" in objectives.describe("asu")


# ---- a model of your own ---------------------------------------------------------------------


def test_context_reads_the_right_slots(world):
    batch = world.batches["forget"]
    context = objectives.context_from_apply(apply, world.params)
    got = np.asarray(context.model.log_probs(batch))
    log_probs = np.asarray(jax.nn.log_softmax(apply(world.params, batch)))
    for b, length in enumerate(LENGTHS["forget"]):
        slots = range(T - length, T)
        want = [log_probs[b, t - 1, batch["tokens"][b, t]] for t in slots]
        np.testing.assert_allclose(got[b, :length], want, rtol=1e-12)
        assert not got[b, length:].any()


def test_context_uses_a_reference_function_or_says_what_is_missing(world):
    row, options, batches = prepare(world, options_of("graddiff", retain="kl"))
    want = terms_of(row, options, batches, world.params)
    bare = {s: {k: v for k, v in b.items() if k != "ref_logits"} for s, b in batches.items()}
    got = terms_of(row, options, bare, world.params, lambda batch: apply(world.ref, batch))
    np.testing.assert_allclose(got["retain"], want["retain"], rtol=1e-12)
    with pytest.raises(ValueError, match="ref_logits_fn"):
        terms_of(row, options, bare, world.params)


def test_a_nan_at_a_padding_slot_stays_there(world):
    batch = world.batches["forget"]

    def spoiled(params, batch):
        logits = apply(params, batch)
        used = np.zeros(logits.shape[:2], bool)
        np.put_along_axis(used, batch["label_index"], batch["target_mask"] > 0, 1)
        return jnp.where(used[..., None], logits, jnp.nan)

    def total(params):
        context = objectives.context_from_apply(spoiled, params)
        row, options = objectives.resolve("ga")
        return combine(row.loss(context, {"forget": batch}, options), None, options)

    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(jax.grad(total)(world.params)))


def test_batch_from_labels():
    batch = batch_from_labels(
        [[0, 5, 6, 7], [5, 6, 7, 0]], [[-100, -100, 6, 7], [5, -100, 7, -100]],
        [[0, 1, 1, 1], [1, 1, 1, 0]], width=3,
    )  # fmt: skip
    assert batch["positions"].tolist() == [[0, 0, 1, 2], [0, 1, 2, 2]]
    assert batch["segment_ids"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["label_index"].tolist() == [[1, 2, 0], [1, 0, 0]]
    assert batch["targets"].tolist() == [[6, 7, 0], [7, 0, 0]]
    assert batch["target_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert batch_from_labels([[1, 2]], [[-100, -100]])["targets"].shape == (1, 1)
    with pytest.raises(ValueError, match="2 labels and width is 1"):
        batch_from_labels([[1, 2, 3]], [[-100, 2, 3]], width=1)
    with pytest.raises(ValueError, match="one shape"):
        batch_from_labels([[1, 2, 3]], [[1, 2]])
