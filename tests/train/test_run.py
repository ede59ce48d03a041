"""The functions of a run: results computed once per digest of inputs; minutes that add up."""

import dataclasses
import functools
import hashlib
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlib_unlearn import objectives
from models import Decoder, DecoderConfig, Tokenizer
from train.data.batches import collate, shuffled
from train.data.examples import Example
from train.data.streams import make_stream
from train.data.task import Task
from train.engine import base_models
from train.engine import run as runs
from train.engine.run import Clock, Recipe, Run, Work, compute, identity, seed_of
from train.evaluators.evaluation import Model
from train.jobs import unlearning_stages
from train.options.config import RunConfig, TrainConfig, UnlearnConfig
from train.options.optimizers import options_of
from train.runtime import sharding
from train.runtime.checkpointing import params_sha256
from train.runtime.folder import read_minutes
from train.runtime.sharding import MeshConfig
from train.runtime.tracking import Tracker

CALLS: list[str] = []
SHAPE = DecoderConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=32,
)


@functools.cache
def words() -> Tokenizer:
    return base_models.train_tokenizer(Task([], [{"answer": "Ada."}], {}, [], []), 300)


def model(seed: int) -> Model:
    decoder = Decoder(SHAPE, "none")
    params = decoder.init(jax.random.key(seed))
    return Model(decoder, params, words(), params_sha256(params))


@pytest.fixture(scope="module")
def models() -> tuple[Model, Model]:
    return model(0), model(1)


@pytest.fixture
def run(tmp_path) -> Run:
    root = tmp_path / "run"
    root.mkdir()
    mesh = sharding.make_mesh(MeshConfig(data=1))
    return Run(root, mesh, 0, Tracker(root), tmp_path / "cache")


def halfway(work: Work, a: Model, b: Model, weight: float) -> Any:
    """Parameters between those of two models."""
    CALLS.append("halfway")
    work.folder.mkdir(parents=True)
    (work.folder / "half-done").write_text("x")
    return jax.tree.map(lambda x, y: (1 - weight) * x + weight * y, a.params, b.params)


def dice(work: Work, sides: int, rows: list[dict[str, str]]) -> list[int]:
    """A throw for each row."""
    CALLS.append("dice")
    work.stop()
    return jax.random.randint(work.key, (len(rows),), 1, sides + 1).tolist()


ROWS = [{"question": "Who?", "answer": "Ada."}, {"question": "When?", "answer": "In May."}]


def test_parameters_are_computed_once_and_are_a_model(run, models, capsys):
    a, b = models
    CALLS.clear()
    options = {"kind": "merge", "version": 1, "like": a, "a": a, "b": b}
    found = [compute(run, "merged", halfway, **options, weight=0.25) for _ in range(2)]
    assert CALLS == ["halfway"] and found[0].sha == found[1].sha
    wanted = jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, a.params, b.params)
    assert found[0].sha == params_sha256(wanted) and found[0].decoder is a.decoder
    jax.tree.map(np.testing.assert_array_equal, found[1].params, wanted)
    assert "merged: found, made from the same inputs" in capsys.readouterr().err
    assert not list(run.folder.rglob("half-done"))
    for change in ({"weight": 0.5}, {"version": 2}, {"kind": "other"}, {"b": a}):
        compute(run, "merged", halfway, **{**options, "weight": 0.25, **change})
    assert len(CALLS) == 5


def test_values_are_computed_once_a_purpose(run):
    CALLS.clear()
    options = {"kind": "dice", "version": 1, "sides": 1000, "rows": ROWS}
    first = compute(run, "throw", dice, **options)
    assert compute(run, "throw", dice, **options) == first and CALLS == ["dice"]
    assert compute(run, "again", dice, **options) != first  # another name, other randomness
    assert compute(run, "same", dice, **options, purpose="throw") == first
    other = dataclasses.replace(run, seed=1)
    assert compute(other, "throw", dice, **options) != first
    assert compute(run, "throw", dice, **{**options, "rows": ROWS[:1]}) != first
    assert len(CALLS) == 5


def test_what_is_shared_is_found_by_another_run(run, tmp_path):
    CALLS.clear()
    options = {"kind": "dice", "version": 1, "sides": 6, "rows": ROWS}
    compute(run, "throw", dice, **options)
    (tmp_path / "other").mkdir()
    other = dataclasses.replace(run, folder=tmp_path / "other")
    compute(other, "throw", dice, **options)
    assert CALLS == ["dice"]
    compute(dataclasses.replace(other, cache=None), "alone", dice, **options)
    assert CALLS == ["dice"] * 2


# A small result of each kind at its version: change both or neither.
PINNED = {("dice", 1): [834, 77]}


def test_a_version_stands_for_its_result(run):
    for (kind, version), wanted in PINNED.items():
        got = compute(run, "throw", dice, kind=kind, version=version, sides=1000, rows=ROWS)
        assert got == wanted, f"{kind} gives another result than version {version} did: raise it"


class Holder:
    def method(self, work):
        return 0


@pytest.mark.parametrize(
    "make",
    [lambda work: 0, functools.partial(dice, sides=6), Holder().method, "dice", int],
    ids=["lambda", "partial", "method", "text", "class"],
)
def test_what_has_hidden_inputs_is_refused(run, make):
    with pytest.raises(TypeError, match="throw: make must be a function of a module"):
        compute(run, "throw", make, kind="dice", version=1)
    assert list(run.folder.iterdir()) == []


@pytest.mark.parametrize("value", [object(), {1, 2}, np.zeros(3), Path("there"), b"bytes"])
def test_inputs_without_a_digest_are_refused(run, value):
    with pytest.raises(TypeError, match=r"throw: rows\[0\] is a .*, which has no digest"):
        compute(run, "throw", dice, kind="dice", version=1, sides=6, rows=[value])


def test_identities(models):
    a, b = models
    assert identity(a) != identity(b)
    other = a._replace(decoder=dataclasses.replace(a.decoder, remat="full"))
    assert identity(a) == identity(other)  # computing it twice gives the same result
    changed = dataclasses.replace(SHAPE, rope_theta=5.0)
    assert identity(a) != identity(a._replace(decoder=Decoder(changed, "none")))
    # Another date in its prompts, or rows shown before a question.
    for changes in ({"date": "1 Jan 2020"}, {"shots": (("Who?", "Ada."),)}):
        layout = words().format._replace(**changes)
        assert identity(a) != identity(a._replace(tokenizer=words().formatted(layout)))
    stream = [make_stream([Example([1, 2, t], 1), Example([4, 5], 1)], 0) for t in (3, 3, 6)]
    assert identity(stream[0]) == identity(stream[1]) != identity(stream[2])
    moved = make_stream([Example([1, 2], 1), Example([3, 4, 5], 1)], 0)  # the same tokens
    assert identity(moved) != identity(stream[0])
    assert identity(UnlearnConfig()) != identity(UnlearnConfig(steps=1))


def test_purpose_and_reference_of_a_stage(run, models):
    """Two stages of one purpose take the same steps; another frozen model is another stage."""
    a, b = models
    rng = np.random.default_rng(0)
    streams = {
        name: make_stream([Example(rng.integers(1, 64, 6).tolist(), 3) for _ in range(8)], 0)
        for name in ("forget", "retain")
    }
    row = objectives.resolve("npo")
    recipe = Recipe(UnlearnConfig(batch_size=2, steps=3), options_of("adamw", learning_rate=1e-2))

    def trained(name, **options):
        return runs.train(run, name, a, row, streams, recipe, **options).sha

    one = trained("one")
    assert trained("two") != one
    assert trained("three", purpose="one") == one == trained("one", reference=a)
    assert trained("one", reference=b) != one


class Blocks:
    """Tokens of equal length: a stream of which the trainer knows the protocol alone."""

    follows = None

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens)

    def identity(self):
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()

    def epoch_order(self, seed, name, epoch):
        return shuffled(seed, name, epoch, len(self))

    def shape(self, rows):
        return 16, 16

    def batch(self, rows, shape, step):
        return collate([Example(self.tokens[i].tolist(), 1) for i in rows], rows, *shape)


def test_a_stage_takes_any_stream(run, models):
    """The same batches from another kind of stream give the same parameters, under another key."""
    tokens = np.random.default_rng(0).integers(1, 64, (9, 8))
    kinds = {
        "blocks": Blocks(tokens),
        "rows": make_stream([Example(t, 1) for t in tokens.tolist()], 0),
    }
    recipe = Recipe(TrainConfig(batch_size=2, epochs=1), options_of("adamw", learning_rate=1e-2))
    packing = {"blocks": 99, "rows": 0}  # tokens of a row, where rows can be shared
    found = {
        name: runs.train(
            run,
            name,
            models[0],
            objectives.resolve("nll"),
            {"train": stream},
            dataclasses.replace(recipe, row_tokens=packing[name]),
            purpose="same",
        )
        for name, stream in kinds.items()
    }
    assert found["blocks"].sha == found["rows"].sha != models[0].sha
    assert identity(kinds["blocks"]) != identity(kinds["rows"])
    streams = {"forget": kinds["blocks"], "retain": kinds["rows"]}
    ahead = objectives.options_of("npo", reference="cache")
    with pytest.raises(TypeError, match="stream forget: .* cached for examples alone"):
        runs.train(run, "npo", models[0], objectives.resolve(ahead), streams, recipe)


def test_streams_of_other_answers_follow_their_questions(models):
    """Who follows whom comes from the table of the task's streams, whatever the objective."""
    rows = [
        {"question": f"Who {i}?", "answer": "Ada.", "alternate_answer": ["Bo", "Cy"]} for i in "ab"
    ]
    task = Task(rows, rows[:1], {}, ["I do not know."], [])
    shape = dataclasses.replace(SHAPE, max_position_embeddings=256)
    base = models[0]._replace(decoder=Decoder(shape, "none"))
    for name, wanted in (
        ("nll", {"train": None}),
        ("idk", {"idk": "forget", "retain": None}),
        ("dpo", {"forget": None, "idk": "forget", "retain": None}),
        ("alternate", {"forget": None, "alternate": "forget", "retain": None}),
    ):
        objective, _ = objectives.resolve(name)
        streams = unlearning_stages.unlearning_streams(RunConfig(), objective, base, task)
        assert {stream: made.follows for stream, made in streams.items()} == wanted
        if "alternate" in streams:
            assert len(streams["alternate"]) == 2 * len(streams["forget"]) == 4


def test_minutes_go_on_where_an_earlier_start_ended(run):
    earlier = Clock(read_minutes(run.folder), time.monotonic() - 60)
    run = dataclasses.replace(run, clock=earlier)
    with runs.phase(run, "original"):
        pass
    assert read_minutes(run.folder)["all"] == pytest.approx(1, abs=0.1)
    later = Clock(read_minutes(run.folder), time.monotonic() - 60)
    again = dataclasses.replace(run, clock=later)
    with runs.phase(again, "oracle"):
        pass
    minutes = read_minutes(run.folder)
    assert minutes["all"] == pytest.approx(2, abs=0.2) and set(minutes) == {
        "original",
        "oracle",
        "all",
    }
    with pytest.raises(ZeroDivisionError), runs.phase(again, "unlearned"):
        1 / 0  # noqa: B018
    assert "unlearned" not in read_minutes(run.folder)
    assert Clock({}, 0.0).earlier == 0.0
    assert seed_of(3, "oracle") - seed_of(2, "oracle") == 2**32
