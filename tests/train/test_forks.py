"""The frozen model of a row: cached or asked in the step, with equal losses."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from train.costs.hlo_flops import device_flops
from train.data import references
from train.data.examples import Example
from train.data.references import settled, with_references
from train.data.streams import make_stream
from train.engine.step import Losses, objective_state
from train.engine.trainable import trainable_of
from train.options.config import SelectConfig
from train.runtime import residency, sharding

# Token 3 is hidden from attention, and what is computed twice is the same twice.
SHAPE = DecoderConfig(32, 8, 16, 3, 2, 1, 4, unattended=3)
LEARNER = DecoderLearner(Decoder(SHAPE, remat="full"))
TOP = SelectConfig(blocks=(1, 2))
# Every row that has a reference, and the options with which it needs most of it.
CASES = {
    "npo": {"retain": "kl"},
    "npo raw": {"compat": "raw_logits"},
    "dpo": {},
    "altpo": {},
    "graddiff": {"compat": "kl_sequence_mean"},
    "asu": {"push": 1.0, "contrast": 1.0, "retain": "kl"},
    "asu layers": {"layers": (2,)},
    "asu_idk": {},
}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshConfig(1), jax.devices()[:1])


@pytest.fixture(scope="module")
def params(mesh):
    return sharding.put_params(LEARNER.decoder.init(jax.random.key(0)), mesh)


def stream(seed, count=4):
    draw = np.random.default_rng(seed)
    rows = [Example([5, 3, *draw.integers(4, 32, 7 - i % 2).tolist()], 3) for i in range(count)]
    return make_stream(rows, 0, buckets=1)


STREAMS = {n: stream(i) for i, n in enumerate(("forget", "idk", "alternate", "retain"))}


def test_every_row_with_a_reference_is_here():
    named = {case.split()[0] for case in CASES}
    rows = {n for n, r in objectives.OBJECTIVES.items() if set(r.reference.values()) - {"fork"}}
    assert rows <= named


@pytest.mark.parametrize("select", [None, TOP], ids=["all", "top"])
@pytest.mark.parametrize("case", CASES)
def test_cache_and_fork_have_equal_losses(case, select, mesh, params, tmp_path):
    found = []
    for where in ("cache", "fork"):
        row, options = objectives.resolve(case.split()[0], reference=where, **CASES[case])
        row = settled(row, options, 1 if select else 0, 8, STREAMS)
        assert ("fork" in row.reference.values()) == (where == "fork")
        streams = {n: STREAMS[n] for n in row.streams}
        ready = with_references(streams, row, options, LEARNER.decoder, params, "x", mesh, tmp_path)
        batches = {n: s.batch(range(4)) for n, s in ready.items()}
        made = trainable_of(params, row, select=select, dtype="float32", mesh=mesh)
        start = jax.tree.map(lambda x: x * 1.05, residency.to_device(made.start))

        @jax.jit
        def look(start, frozen, batches, row=row, options=options, binding=made.binding):
            return Losses(
                LEARNER, row, options, start, frozen, batches, binding=binding,
                state=objective_state(LEARNER, row, options, 0),
            ).look(start)  # fmt: skip

        found.append(look(start, made.frozen, batches))
    cached, forked = found
    assert cached.keys() == forked.keys()
    for name in cached:
        np.testing.assert_allclose(forked[name], cached[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_when_auto_forks(monkeypatch):
    def kinds(name, first=0, **options):
        row, given = objectives.resolve(name, **options)
        return set(settled(row, given, first, 8, STREAMS).reference.values())

    assert kinds("npo") == kinds("npo", 1) == {"logps"}
    assert kinds("asu") == {"hidden"} and kinds("asu", 1) == {"fork"}
    assert kinds("asu", 1, reference="cache") == {"hidden"}
    assert kinds("graddiff", 1, compat="kl_all_positions") == {"hidden_all"}
    monkeypatch.setattr(references, "CACHE_BYTES", 8)
    assert kinds("asu") == {"fork"} and kinds("npo") == {"logps"}
    row, given = objectives.resolve("npo")
    corpus = {"forget": object()}
    assert settled(row, given, 0, 8, corpus).reference == {"forget": "fork"}  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rmu", {"reference": "cache"}, "reference cache does not go with hidden states"),
        ("graddiff", {"compat": "kl_all_positions", "reference": "fork"}, "drop compat"),
        ("npo", {"reference": "frok"}, "did you mean 'fork'"),
        ("ga", {"reference": "fork"}, "does not use reference"),
    ],
)
def test_what_cannot_be_forked_or_cached(name, options, message):
    with pytest.raises(UserError, match=message):
        objectives.resolve(name, **options)


def test_a_retain_kind_is_one_row(monkeypatch):
    """A kind with a stream of its own gives the row its streams, columns and references."""
    kind = objectives.RetainKind(
        lambda context, batches, options: {
            "retain_idk": (batches["retain_idk"]["row_id"].sum() * 1.0, 1.0)
        },
        "a toy",
        streams=("retain", "retain_idk"),
        reference={"retain_idk": "logps"},
        columns={"retain_idk": ("question",)},
    )
    monkeypatch.setitem(objectives.RETAIN, "toy", kind)
    from jaxlib_unlearn.objectives.retain import retain_terms, retains

    @dataclasses.dataclass(frozen=True)
    class Toy(objectives.Sided):
        name: str = "toy"
        retain: str | None = retains()

    row = dataclasses.replace(objectives.OBJECTIVES["graddiff"], name="toy", options=Toy)
    row, options = objectives.resolve(Toy(retain="toy"), {"toy": row})
    assert row.streams == ("forget", "retain", "retain_idk")
    assert row.columns["retain_idk"] == ("question",)
    assert row.reference == {"retain_idk": "logps"}
    terms = retain_terms(None, {"retain_idk": {"row_id": np.arange(3)}}, options)  # pyright: ignore
    assert terms["retain_idk"][0] == 3.0
    assert "toy (a toy)" in Toy.__dataclass_fields__["retain"].metadata["doc"]


@pytest.mark.fused
@pytest.mark.parametrize(
    ("accumulate", "remat"), [(1, "none"), (2, "none"), (1, "full"), (2, "full")]
)
def test_two_sides_of_one_stream_share_their_forward_pass(accumulate, remat, params):
    """XLA merges the passes of the sides: at most 1.7 of a joint step; nothing is executed."""
    learner = DecoderLearner(Decoder(dataclasses.replace(SHAPE, unattended=None), remat=remat))
    row, options = objectives.resolve("graddiff")

    def one_stream(context, batches, options):
        return row.loss(
            context, {"forget": batches["forget"], "retain": batches["forget"]}, options
        )

    single = dataclasses.replace(row, loss=one_stream, streams=("forget",))
    batches = {"forget": STREAMS["forget"].batch(range(4))}

    def cost(*sides):
        def gradients(params, batches):
            return Losses(learner, single, options, params, None, batches, accumulate).gradients(
                params, sides
            )

        return device_flops(jax.jit(gradients).lower(params, batches).compile()).flops

    assert cost("forget", "retain") <= 1.7 * cost(None)
