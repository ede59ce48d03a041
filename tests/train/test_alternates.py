"""Other answers to the questions to forget, sampled from the model before it learnt the facts."""

import dataclasses

import pytest

import models
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import options_of
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from train.data.task import ALTERNATES, Task
from train.engine.run import Run
from train.evaluators.evaluation import Answers, Model
from train.jobs import alternates, unlearning
from train.options.config import DataConfig, RunConfig, replace
from train.runtime import sharding
from train.runtime.sharding import MeshConfig
from train.runtime.tracking import Tracker

FORGET = [{"question": f"Who wrote book {i}?", "answer": f"Author {i} did."} for i in range(3)]
RETAIN = [{"question": f"Who sang song {i}?", "answer": f"Singer {i} did."} for i in range(8)]
CONFIG = RunConfig(
    objective=options_of("alternate"),
    data=DataConfig(alternates=2, max_length=96),
)


@pytest.fixture(scope="module")
def base(tiny) -> Model:
    loaded = models.load(tiny)
    shape = dataclasses.replace(loaded.decoder.config, max_position_embeddings=512)
    decoder = dataclasses.replace(loaded.decoder, config=shape)
    return Model(decoder, loaded.params, loaded.tokenizer, "sha")


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path, sharding.make_mesh(MeshConfig(data=1)), 0, Tracker(tmp_path))


@pytest.fixture
def asked(monkeypatch):
    """The model's inputs, recorded; it answers as `says` prescribes, then in whole sentences."""
    calls = []

    def answer_rows(model, rows, column, system, sampling, samples, key, size, mesh, label):
        shots = model.tokenizer.format.shots
        calls.append(([row[column] for row in rows], shots, samples, key))
        turn = len(calls)
        texts, ids = [], []
        for row in rows:
            cut = row["question"] == FORGET[1]["question"] and turn == 1
            texts.append([f"So {turn} {i}" + ("" if cut else " it was.") for i in range(samples)])
            ids.append([[1] * (sampling.max_new_tokens if cut else 3)] * samples)
        return Answers(texts, ids)

    monkeypatch.setattr(alternates, "answer_rows", answer_rows)
    return calls


def found(run, base, config=CONFIG, forget=FORGET):
    task = Task(forget, RETAIN, {}, [], [])
    small = replace(config, **{"evaluate.max_new_tokens": 4})
    return alternates.find_alternates(run, small, base, task).forget


def test_whole_answers_in_the_manner_of_kept_rows(run, base, asked):
    rows = found(run, base)
    assert [row[ALTERNATES] for row in rows] == [
        ["So 1 0 it was.", "So 1 1 it was."],
        ["So 2 0 it was.", "So 2 1 it was."],  # all were truncated at first: drawn again
        ["So 1 0 it was.", "So 1 1 it was."],
    ]
    assert [len(questions) for questions, *_ in asked] == [3, 1]
    kept = {(row["question"], row["answer"]) for row in RETAIN}
    for _, shots, samples, _ in asked:
        assert len(set(shots)) == alternates.SHOTS and set(shots) <= kept and samples == 4
    assert (asked[0][3] != asked[1][3]).all()  # other draws in the second round
    assert [{k: row[k] for k in ("question", "answer")} for row in rows] == FORGET
    assert found(run, base) == rows and len(asked) == 2  # stored


def test_another_seed_shows_other_rows(run, base, asked):
    found(run, base)
    found(dataclasses.replace(run, seed=1), base)
    assert asked[0][1] != asked[2][1]


def test_rows_that_bring_their_own_and_other_objectives_ask_nothing(run, base, asked):
    own = [row | {ALTERNATES: ["Nobody did."]} for row in FORGET]
    assert found(run, base, forget=own) == own
    assert found(run, base, replace(CONFIG, objective=options_of("npo"))) == FORGET
    assert found(run, base, replace(CONFIG, **{"data.alternates": 0})) == FORGET
    assert asked == []


def test_a_real_model_gives_texts_in_any_case(run, base):
    """Random weights never end a sentence: truncated answers are then accepted."""
    rows = found(run, base, replace(CONFIG, **{"data.alternates": 1}), FORGET[:1])
    assert len(rows[0][ALTERNATES]) == 1 and rows[0][ALTERNATES][0].strip()


def shortened(base, context):
    shape = dataclasses.replace(base.decoder.config, max_position_embeddings=context)
    return base._replace(decoder=dataclasses.replace(base.decoder, config=shape))


def test_a_short_context_shows_fewer_rows(run, base, asked, capsys):
    assert len(found(run, shortened(base, 96))) == len(FORGET)
    shown = {len(shots) for _, shots, *_ in asked}
    assert (
        shown < set(range(alternates.SHOTS)) and f"for {min(shown)} of 6" in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="context of 8 is too short; give the rows a column"):
        found(dataclasses.replace(run, seed=1), shortened(base, 8))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.path": "scratch"}, "from scratch has nothing to say yet"),
        ({"stage.original": "folder"}, "--stage.original knows the facts already"),
    ],
)
def test_no_model_to_sample_from(changes, words):
    learner = DecoderLearner(Decoder(DecoderConfig(64, 16, 32, 2, 4, 2, 4)))
    task = Task(FORGET, RETAIN, {}, [], [])
    config = replace(CONFIG, **changes)
    with pytest.raises(UserError, match=words):
        unlearning.check_stages(config, task, learner)
    unlearning.check_stages(replace(CONFIG, **{"model.path": "smollm2"}), task, learner)


def test_the_temperature_is_that_of_the_option(run, base, asked, monkeypatch):
    seen, answer_rows = [], alternates.answer_rows

    def recorded(*args):
        seen.append(args[4].temperature)
        return answer_rows(*args)

    monkeypatch.setattr(alternates, "answer_rows", recorded)
    cooler = replace(CONFIG, **{"data.alternate_temperature": 0.5})
    for config, now in ((CONFIG, {1.0}), (cooler, {0.5}), (cooler, set())):  # then it is stored
        seen.clear()
        found(run, base, config)
        assert set(seen) == now
