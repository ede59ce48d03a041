"""`rowwise` in a run: how many parts, which rows share one, what is refused."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.optim.zeroth_order.parts import Part
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from train.data.examples import Example
from train.data.streams import make_stream
from train.engine import run as runs
from train.engine.run import Recipe, Run
from train.engine.step import Losses
from train.jobs import classification, job, own_rows, pretraining, unlearning
from train.jobs.classification_options import ClassifyRun
from train.jobs.finetuning_options import FinetuneRun
from train.jobs.pretraining_options import PretrainConfig
from train.options import optimizers
from train.options.config import TrainConfig, replace
from train.planning.pretraining_program import pretraining_program, pretraining_update
from train.presets import arguments
from train.runtime.sharding import MeshConfig, make_mesh

LEARNER = DecoderLearner(Decoder(DecoderConfig(32, 8, 12, 2, 2, 1, 4)))
ONE = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def stream():
    draw = np.random.default_rng(0)
    rows = [Example([3, 4, *draw.integers(5, 32, 3 + i % 4).tolist()], 3) for i in range(12)]
    return make_stream(rows, pad_id=0)


def test_a_query_for_every_row_unless_told():
    rowwise, mezo = (optimizers.options_of(name) for name in ("rowwise", "mezo"))
    assert optimizers.over_rows(rowwise, 6).queries == 6
    assert optimizers.over_rows(optimizers.options_of("rowwise", queries=2), 6).queries == 2
    assert optimizers.over_rows(mezo, 6) is mezo
    with pytest.raises(UserError, match="--optimizer.queries 4: the .* of 6 rows .* divisor of 6"):
        optimizers.over_rows(optimizers.options_of("rowwise", queries=4), 6, "the fine-tuning")
    with pytest.raises(ValueError, match="over_rows"):
        optimizers.build(rowwise, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--mesh.data 2", "--mesh.data 2: rowwise evaluates .* --mesh.query 2 --mesh.data 1"),
        ("--mesh.data 1 --mesh.fsdp 2", "--mesh.fsdp 2: rowwise"),
        ("--mesh.data 1 --mesh.query 2 --unlearn.batch-size 6", None),
        ("--mesh.data 1 --mesh.query 3 --unlearn.batch-size 4", "the 8 evaluation.* do not divide"),
        ("--mesh.data 1 --optimizer.queries 7", "--optimizer.queries 7: the unlearning batch of"),
        (
            "--mesh.data 1 --objective.name graddiff --objective.compat kl_all_positions",
            "takes the loss of every part .* graddiff with this compat form does not add up",
        ),
        ("--mesh.data 1 --optimizer.rank 0", "--optimizer.rank is 0; it must be at least 1"),
    ],
)
def test_what_is_refused_before_compute(options, words):
    argv = ["quickstart", "--smoke", "--optimizer.name", "rowwise", *options.split()]
    if words is None:
        job.check(unlearning.JOB, arguments.read_arguments(arguments.UNLEARN, argv))
        return
    with pytest.raises(UserError, match=words) as error:
        job.check(unlearning.JOB, arguments.read_arguments(arguments.UNLEARN, argv))
    assert "\n" not in str(error.value)


ROWWISE = optimizers.options_of("rowwise")
ALONE = MeshConfig(1, 1, 1)


def test_every_program_checks_a_query_for_every_row(tmp_path):
    """A past bug: two of them multiplied the None that stands for one a row."""
    job.check(
        unlearning.JOB,
        arguments.read_arguments(
            arguments.UNLEARN, "quickstart --mesh.data 1 --optimizer.name rowwise".split()
        ),
    )
    job.check(classification.JOB, ClassifyRun(optimizer=ROWWISE, mesh=ALONE))
    job.check(
        pretraining.JOB, PretrainConfig(optimizer=ROWWISE, mesh=ALONE, output=tmp_path / "run")
    )
    config = FinetuneRun(rows=str(tmp_path / "none"), output=tmp_path / "run", mesh=ALONE)
    with pytest.raises(UserError, match="rows file .* does not exist"):  # checked after it
        own_rows.run(replace(config, **{"train.optimizer": ROWWISE}))


def test_a_pretraining_plan_has_a_query_for_every_row():
    config = PretrainConfig(optimizer=ROWWISE, mesh=ALONE)
    decoder = LEARNER.decoder
    made = pretraining_program(config, decoder, ONE)
    state = made.args[0]
    assert state.opt_state.coeffs.shape == (16,)
    assert pretraining_update(config, decoder, ONE) is None


def test_micro_batches_are_fewer_parts_at_a_time():
    whole = optimizers.over_rows(ROWWISE, 12)
    at_once = [optimizers.in_micro_batches(whole, n).query_batch for n in (1, 4, 24)]
    assert at_once == [None, 3, 1]
    told = dataclasses.replace(whole, query_batch=5)
    assert optimizers.in_micro_batches(told, 4) is told
    mezo = optimizers.options_of("mezo")
    assert optimizers.in_micro_batches(mezo, 4) is mezo


@pytest.mark.parametrize(
    ("more", "most"), [({}, 1), ({"queries": 4}, 3), ({"queries": 2}, 6), ({"accumulate": 4}, 1)]
)
def test_examples_that_share_a_row_are_in_one_part(more, most, stream, tmp_path, monkeypatch):
    """At most batch / queries of them are packed together."""

    class Packed(Exception):
        pass

    def pack(streams, batch_size, divides, length, shapes):
        raise Packed(divides)

    monkeypatch.setattr(runs, "pack_streams", pack)
    accumulate = more.pop("accumulate", 1) if "accumulate" in more else 1
    options = optimizers.options_of("rowwise", **more)
    stage = TrainConfig(steps=1, batch_size=12, accumulate=accumulate, optimizer=options)
    start = types.SimpleNamespace(params=LEARNER.shapes(), learner=LEARNER, sha="sha")
    run = Run(tmp_path, ONE, 0, None, None)
    with pytest.raises(Packed) as found:
        runs.train(
            run, "x", start, objectives.resolve("nll"), {"train": stream}, Recipe(stage, options)
        )
    assert found.value.args == (most,)


def test_a_packed_row_is_a_part_with_the_losses_of_its_examples(stream):
    """Two rows of tokens with two examples each, against the same examples in rows of their own."""
    packed = stream.packed(2, 4)
    rows = packed.arranged(np.arange(4))
    data = {name: make.batch(rows) for name, make in (("packed", packed), ("alone", stream))}
    assert data["packed"]["tokens"].shape[0] == 2 and data["alone"]["tokens"].shape[0] == 4
    params = LEARNER.decoder.init(jax.random.key(0))

    @jax.jit
    def parts(params, data):
        found = {}
        for name, batch in data.items():
            losses = Losses(LEARNER, *objectives.resolve("nll"), params, None, {"train": batch})
            found[name] = jax.vmap(lambda i, f=losses.value: f(params, part=Part(i, 2)))(
                jnp.arange(2)
            )
        return found

    found = parts(params, data)
    np.testing.assert_allclose(found["packed"], found["alone"], rtol=1e-6)
    assert float(abs(found["alone"][0] - found["alone"][1])) > 1e-3


@pytest.mark.parametrize("how", ["ns", "svd", "normalize"])
def test_orthogonalize_reaches_the_optimizer(how):
    """The singular values of what a matrix moves by: about one, exactly one, or those of noise."""
    options = optimizers.options_of(
        "zo-muon", orthogonalize=how, rank=4, learning_rate=1.0, schedule="constant", warmup=0.0
    )
    tx, _, _ = optimizers.build(options, 2)
    params = {"w": jnp.zeros((6, 5))}
    coeffs = jnp.linspace(1.0, 2.0, 4)
    step = jax.jit(lambda p: tx.update(None, tx.init(p), p, coeffs=coeffs)[0]["w"])
    values = np.linalg.svd(np.asarray(step(params)), compute_uv=False)[:4]
    if how == "normalize":  # 0.72 sqrt(r) in norm
        assert np.linalg.norm(values) == pytest.approx(0.72 * 2, rel=1e-5)
        assert values.max() > 1.5 * values.min()
    elif how == "svd":
        np.testing.assert_allclose(values, 1, rtol=1e-4)
    else:
        assert 0.6 < values.min() < values.max() < 1.25 and np.abs(values - 1).max() > 0.01
