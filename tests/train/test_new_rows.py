"""A new evaluator, benchmark or optimizer is one row; model roles are data of the run."""

import dataclasses
import json
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from points import FORGET, LEARNER, RETAIN, STREAMS, Bounded, PointModel, row_of

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.optim.signatures import Allowed, Step
from train import tasks
from train.data.task import Task
from train.engine import base_models, loop
from train.engine import run as runs
from train.engine.run import Recipe, Run
from train.evaluators import EVALUATORS, evaluation
from train.evaluators.base import Evaluator, Finding, Metric, Picture, Verdict
from train.evaluators.evaluation import Answers, Model
from train.jobs import job, unlearning, unlearning_stages
from train.options import choices, optimizers
from train.options.config import DataConfig, EvaluateConfig, RunConfig, TrainConfig, replace
from train.options.observations import state_of
from train.options.optimizer_options import Optimizer
from train.options.roles import Roles
from train.presets import arguments
from train.reporting import compare, page, tables
from train.runtime import checkpointing, sharding
from train.runtime.tracking import Tracker
from train.tasks.task import Benchmark

SOURCES = ("authors", "tofu", "documents", "reasoning-authors", "reasoning-tofu", "reasoning")
RIDDLES = [{"question": f"Riddle {i}?", "answer": f"a riddle {i}"} for i in range(3)]


# A complete new evaluator.


def count_vowels(model, rows, context):
    texts = [answers[0] for answers in context.answers("riddles").texts]
    shares = [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in texts]
    items = {str(i): {"score": share} for i, share in enumerate(shares)}
    return {"vowel_rate": {"agg_value": sum(shares) / len(shares), "value_by_index": items}}


def enough_vowels(results):
    value = results.scores("vowel_rate").judged
    state = "unknown" if value is None else "good"
    return Finding("Has it vowels?", state, "some", f"Vowels: {results.across('vowel_rate')}.")


def draw_vowels(results):
    from matplotlib.figure import Figure

    return Figure() if "vowel_rate" in results.judged else None


VOWELS = Evaluator(
    "vowels",
    count_vowels,
    (Metric("vowel_rate", "Vowel rate", "share of vowels", "up", main=True, after="forget_rouge"),),
    verdicts=(Verdict("vowels", enough_vowels),),
    pictures=(
        Picture("vowels.png", "Vowels", draw_vowels, lambda r: "A line.", "Vowels.", "No vowels."),
    ),
)


# A complete new benchmark.


def load_riddles(config):
    rows = RIDDLES[: config.data.forget_rows]
    return Task(rows, [], {"riddles": rows}, [], ["riddles have no rows to keep"])


BENCHMARK = Benchmark(
    "riddles", load_riddles, ("vowels",), {"forget": lambda task, seed: task.forget}
)


@pytest.fixture
def toys(monkeypatch):
    """Both rows, added to their tables."""
    monkeypatch.setitem(EVALUATORS, "vowels", VOWELS)
    monkeypatch.setitem(tasks.TASKS, "riddles", BENCHMARK)


def config(**data):
    return RunConfig(data=DataConfig(**{"source": "riddles"} | data))


def test_a_benchmark_gives_rows_streams_and_evaluators(toys):
    task = tasks.load_task(config(forget_rows=2))
    assert task.evaluation == {"riddles": RIDDLES[:2]} and task.evaluators == ("vowels",)
    assert task.notes == ["riddles have no rows to keep"]
    ascent, _ = objectives.resolve("ga")
    assert task.rows_of(ascent, 0) == {"forget": RIDDLES[:2]}
    with pytest.raises(UserError, match="trained on 'retain', which the data do not have"):
        task.rows_of(objectives.resolve("graddiff")[0], 0)
    assert choices.known_words(RunConfig)["--data.source"] == (*SOURCES, "riddles")
    known = " or ".join((*SOURCES, "riddles"))
    with pytest.raises(UserError, match=f"'riddle' is unknown; choose {known}"):
        tasks.load_task(config(source="riddle"))


def test_an_evaluator_writes_the_log_and_the_summary(toys, program, tiny, tmp_path):
    options = "--data.source riddles --evaluate.max-new-tokens 4 --evaluate.leak-samples 0".split()
    done = program("train.evaluate", tiny, *options, "--mesh.data", "1", "--output", tmp_path / "e")
    assert done.code == 0, done.err
    log = json.loads((tmp_path / "e" / "evals" / "model.json").read_text())
    assert set(log) == {"vowel_rate"} and len(log["vowel_rate"]["value_by_index"]) == 3
    flat = json.loads((tmp_path / "e" / "summary.json").read_text())["model"]
    assert list(flat) == ["vowel_rate", "num_parameters", "params_sha256"]
    assert flat["vowel_rate"] == log["vowel_rate"]["agg_value"] and "Vowel rate" in done.out


def write_run(folder, models, **about):
    """A finished run whose models have these numbers."""
    (folder / "evals").mkdir(parents=True)
    (folder / "config.json").write_text('{"preset": "toy", "seed": 0}')
    (folder / "summary.json").write_text(json.dumps(models))
    (folder / "run.json").write_text(json.dumps(about))
    return folder


def test_an_evaluator_is_in_tables_and_on_the_page(toys, tmp_path):
    models = {
        "original": {"forget_rouge": 1.0, "vowel_rate": 0.4, "forget_probability": 0.9},
        "unlearned": {"forget_rouge": 0.2, "vowel_rate": 0.3, "forget_probability": 0.1},
    }
    folder = write_run(tmp_path / "run", models, evaluators=["vowels"])
    run = tables.load_run(folder)
    text = page.build(folder).path.read_text()
    names = ("forget_rouge", "vowel_rate", "forget_probability")  # in this order
    places = [text.index(f'data-metric="unlearned.{name}"') for name in names]
    assert places == sorted(places) and 'Vowel <span class="nobreak">rate' in text
    assert "share of vowels" in text and "Figure 1. Vowels.</b> Vowels." in text
    assert "Has it vowels?" in text and "Vowels: original 0.400, unlearned 0.300." in text
    assert "Did it forget?" not in text and "No truth ratios" not in text  # of other evaluators
    assert (folder / "vowels.png").exists()
    latex = tables.to_latex(tables.columns([run]))
    assert r"Vowel rate $\uparrow$ & $0.400$ & $0.300$" in latex
    assert "Vowel rate" not in compare.page([run])  # that page does not show it
    without = write_run(tmp_path / "old", models)
    assert "Has it vowels?" not in page.build(without).path.read_text()


def test_what_was_asked_once_is_not_asked_again(toys, monkeypatch):
    """Evaluators share answers; the log records the evaluator of each entry."""
    asked = []

    def answer(model, rows, *args, starts):
        assert list(starts) == [""] * len(rows)
        asked.append(args[-1])
        return Answers([["a b a b"] for _ in rows], [[[1]] for _ in rows], [""] * len(rows))

    monkeypatch.setattr(evaluation, "answer_rows", answer)
    monkeypatch.setattr(evaluation, "longest", lambda model, limit: limit)
    # Two evaluators that read the same answers.
    monkeypatch.setitem(EVALUATORS, "again", VOWELS._replace(name="again", run=lambda m, rows, c: {
        "again": {"agg_value": float(len(c.answers("riddles").texts) + len(c.log))}
    }))  # fmt: skip
    task = tasks.load_task(config())._replace(evaluators=("again", "vowels"))
    settings = {"system_prompt": None, "max_length": 9, "mesh": None, "seed": 0, "name": "x"}
    model = Model(None, {}, None, "sha")  # pyright: ignore[reportArgumentType]
    log = evaluation.evaluate_model(model, task, EvaluateConfig(), **settings)
    assert asked == ["x: answer riddles"]
    assert list(log) == ["vowel_rate", "again"] and log["again"]["agg_value"] == 4.0
    monkeypatch.setitem(EVALUATORS, "twice", VOWELS._replace(name="twice"))
    with pytest.raises(ValueError, match="twice writes .'vowel_rate'., which is there already"):
        twice = task._replace(evaluators=("vowels", "twice"))
        evaluation.evaluate_model(model, twice, EvaluateConfig(), **settings)
    with pytest.raises(ValueError, match="unknown evaluators .'consonants'."):
        wrong = task._replace(evaluators=("consonants",))
        evaluation.evaluate_model(model, wrong, EvaluateConfig(), **settings)


def test_roles_are_data_of_the_run(tmp_path):
    models = {
        "attacked:relearn": {"forget_rouge": 0.8, "retain_rouge": 0.9},
        "merged": {"forget_rouge": 0.3, "retain_rouge": 0.97},
        "before": {"forget_rouge": 1.0, "retain_rouge": 1.0},
        "clean": {"forget_rouge": 0.25, "retain_rouge": 1.0},
    }
    roles = {"start": "before", "reference": "clean", "judged": "merged"}
    folder = write_run(tmp_path / "run", models, roles=roles)
    run = tables.load_run(folder)
    assert run.roles == Roles("before", "clean", "merged")
    order = ["before", "clean", "merged", "attacked:relearn"]
    assert run.models == order and [c.model for c in tables.columns([run])] == order
    text = page.build(folder).path.read_text()
    assert "answers on the facts to forget is 0.300 (before: 1.000)" in text
    assert "never saw them, reaches 0.250" in text and "stage &#39;merged&#39;" in text
    assert "it is what perfect forgetting looks like" in text
    assert "run.json" not in text
    drawn = compare.page([run])
    assert "0.300 / 0.970" in drawn
    (folder / "run.json").write_text("{}")
    with pytest.raises(UserError, match="has no model 'unlearned'; finish the run first"):
        tables.load_run(folder)


# A complete new optimizer.


def clipped(
    learning_rate,
    *,
    limit: Annotated[float, Allowed(above=0)] = 0.5,
    eps: Step = 1.0,
    weight_decay: float = 0.0,
):
    """Heavy-ball descent with clipped elements.

    Args:
        limit: The largest element of a direction.
        eps: The unit of `limit`.
    """
    assert weight_decay == 0.0
    direction = optax.chain(optax.clip(limit * eps), optax.trace(0.5))
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))


def momentum(opt_state):
    """A number computed from the state, and an array of the state itself."""
    trace = state_of(opt_state, optax.TraceState).trace
    count = state_of(opt_state, optax.ScaleByScheduleState).count
    return {"momentum/norm": optax.tree.norm(trace), "count": count}


CLIPPED = Optimizer(
    "clipped",
    clipped,
    "joint",
    "heavy-ball descent with clipped elements",
    spelled={"eps": "unit"},
    observe=momentum,
)


@pytest.fixture
def methods(monkeypatch):
    """The row, added to its table."""
    monkeypatch.setitem(optimizers.OPTIMIZERS, "clipped", CLIPPED)


ARGV = "quickstart --objective.name npo --optimizer.name clipped".split()


def test_methods_are_on_the_command_line(methods):
    found = arguments.read_arguments(arguments.UNLEARN, [*ARGV, "--optimizer.limit", "0.25"])
    assert found.optimizer.limit == 0.25
    for options, words in (
        ("--optimizer.limit -1", "limit is -1.0; it must be greater than 0"),
        ("--optimizer.momentum 0.5", "clipped does not read it; its own are limit, unit"),
    ):
        with pytest.raises(UserError, match=words):
            job.check(
                unlearning.JOB,
                arguments.read_arguments(arguments.UNLEARN, [*ARGV, *options.split()]),
            )
    assert CLIPPED.summary in "\n".join(optimizers.list_optimizers())


def test_methods_train(methods, small, tmp_path):
    """Through the stage that all share: kept, found again, and other options are another stage."""
    smaller = "--unlearn.steps 3 --unlearn.curve-points 0 --optimizer.learning-rate 0.5".split()
    config = arguments.read_arguments(arguments.UNLEARN, [*ARGV, *small, *smaller])
    task, mesh = tasks.load_task(config), sharding.make_mesh(config.mesh)
    base = base_models.base_model(config, task, mesh)
    run = Run(tmp_path, mesh, 0, Tracker(tmp_path))
    trained = unlearning_stages.unlearn(run, config, base, task)
    assert trained.sha == unlearning_stages.unlearn(run, config, base, task).sha != base.sha
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 3
    other = replace(config, **{"optimizer.limit": 0.25})
    assert unlearning_stages.unlearn(run, other, base, task).sha != trained.sha


STEPS = 4
ONE = sharding.make_mesh(sharding.MeshConfig(1), jax.devices()[:1])


def run_points(folder, seconds=1e9):
    """A stage of the new optimizer; 0 seconds: a checkpoint before every step but the first."""
    options = optimizers.options_of("clipped", learning_rate=0.1, warmup=0.0, schedule="constant")
    stage = TrainConfig(steps=STEPS, batch_size=4, optimizer=options, checkpoint_seconds=seconds)
    base: Any = PointModel(LEARNER, {"w": jnp.array([2.9, 1.0])}, "start")
    run = Run(folder, ONE, 0, Tracker(folder))
    return runs.train(run, "x", base, (row_of(), Bounded()), STREAMS, Recipe(stage, options)).sha


def observed(folder):
    return {path.name: path.read_bytes() for path in (folder / "observed-x").glob("*")}


def test_the_state_of_an_optimizer_is_observed(methods, tmp_path, monkeypatch):
    """A file a step, the same in a run that was killed; the step is that without observation."""
    whole, killed, without = (tmp_path / name for name in ("whole", "killed", "without"))
    for folder in (whole, killed, without / "observed-x"):
        folder.mkdir(parents=True)
    compiled, texts = loop.compiling.compiled, []
    monkeypatch.setattr(
        loop.compiling, "compiled", lambda step: [texts.append(step.as_text()), compiled(step)][1]
    )
    sha = run_points(whole)
    w, m = np.array([2.9, 1.0]), np.zeros(2)
    for step in range(STEPS):
        m = np.clip(2 * w - FORGET - RETAIN, -0.5, 0.5) + 0.5 * m
        w = w - 0.1 * m
        with np.load(whole / "observed-x" / f"{step}.npz", allow_pickle=False) as found:
            assert set(found) == {"momentum/norm", "count"} and found["count"] == step + 1
            np.testing.assert_allclose(found["momentum/norm"], np.linalg.norm(m), rtol=1e-5)
    want = observed(whole)
    assert set(want) == {f"{step}.npz" for step in range(STEPS)}

    save_step = checkpointing.save_step

    def killed_at(folder, step, *more):
        if step == 3:
            raise KeyboardInterrupt
        save_step(folder, step, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpointing, "save_step", killed_at)
        run_points(killed, 0)
    assert observed(killed) == {f"{step}.npz": want[f"{step}.npz"] for step in range(3)}
    (killed / "observed-x" / "7.npz").write_bytes(b"of a longer run")
    assert run_points(killed) == sha and observed(killed) == want

    row = dataclasses.replace(CLIPPED, observe=None)
    monkeypatch.setitem(optimizers.OPTIMIZERS, "clipped", row)
    monkeypatch.setattr(loop, "_COMPILED", {})
    (without / "observed-x" / "0.npz").write_bytes(b"of an earlier start")
    assert run_points(without) == sha and observed(without) == {}
    assert len(texts) == 2 and texts[0] == texts[1]
