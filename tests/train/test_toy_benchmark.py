"""A toy benchmark and a toy evaluator, each in the files that CONTRIBUTING names, in a whole run.

`BENCHMARK` and `EVALUATOR` are what `train/tasks/riddles.py` and `train/evaluators/echo.py` would
hold; the fixture is the line in the table of each room.
"""

import json

import pytest

from train import tasks
from train.data.task import STREAMS, Task
from train.evaluators import EVALUATORS
from train.evaluators.base import REFERENCE, Evaluator, Finding, Metric, Verdict
from train.tasks.task import Benchmark

# train/tasks/riddles.py


def load(config):
    rows = [{"question": f"Riddle {i}?", "answer": f"a riddle {i}"} for i in range(12)]
    splits = {"forget": rows[:4], "retain": rows[4:8]}
    return Task(rows[:4], rows[4:], splits, [], [], places={"forget": "riddles.py"})


def fit(task, model, config):
    """Every row learns how many tokens its answer has; forget rows are read to 40 tokens."""

    def sized(rows):
        return [row | {"size": len(model.tokenizer.encode(row["answer"]))} for row in rows]

    splits = {name: sized(rows) for name, rows in task.evaluation.items()}
    return task._replace(
        forget=sized(task.forget),
        evaluation=splits,
        lengths={"forget": 40},
        notes=[f"riddles of {splits['forget'][0]['size']} tokens"],
    )


BENCHMARK = Benchmark(
    "riddles", load, ("echo",), {name: STREAMS[name] for name in ("forget", "retain")}, fit=fit
)

# train/evaluators/echo.py


def run(model, rows, context):
    """How the model goes on after a riddle, what it answers, and which answer it prefers."""
    texts = context.generated([row["question"] for row in rows["forget"]], 4)
    answers = context.answers("forget", starts=[row["answer"][:3] for row in rows["forget"]])
    asked = [{"prompt": r["question"], "options": [r["answer"], "nothing"]} for r in rows["forget"]]
    chosen = context.options(asked)
    items = {
        str(i): {"score": float(one.sums[0] > one.sums[1]), "size": row["size"], "text": text.text}
        for i, (row, one, text) in enumerate(zip(rows["forget"], chosen, texts, strict=True))
    }
    assert len(answers.texts) == len(items)
    mean = sum(item["score"] for item in items.values()) / len(items)
    return {"preferred": {"agg_value": mean, "value_by_index": items}}


def preferred(results):
    text = f"Preferred: {results.across('preferred')}."
    return Finding("Does it prefer the answer?", "mixed", "sometimes", text)


EVALUATOR = Evaluator(
    "echo",
    run,
    (Metric("preferred", "Preferred answers", "share of riddles", "near", REFERENCE, main=True),),
    verdicts=(Verdict("preferred", preferred),),
)


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, BENCHMARK.name, BENCHMARK)
    monkeypatch.setitem(EVALUATORS, EVALUATOR.name, EVALUATOR)


ARGV = (
    "--data.source riddles --data.max-length 96 --finetune.steps 2 --unlearn.steps 2 "
    "--unlearn.curve-points 0 --objective.name"
).split()


def test_from_the_table_to_the_report(toys, program, small, tmp_path):
    argv = ["quickstart", *small, *ARGV, "graddiff", "--output", tmp_path / "run"]
    done = program("train.unlearn", *argv)
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert all(0 <= summary[m]["preferred"] <= 1 for m in ("original", "oracle", "unlearned"))
    log = json.loads((tmp_path / "run" / "evals" / "unlearned.json").read_text())
    items = log["preferred"]["value_by_index"]
    assert set(log) == {"preferred"} and len(items) == 4
    assert "riddles of" in done.err and items["0"]["size"] > 0
    assert "Preferred answers" in done.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Does it prefer the answer?" in page and "Preferred: original" in page


@pytest.mark.parametrize(
    ("objective", "absent", "parts"),
    [
        ("idk", "", ["trained on 'idk'", "forget, retain"]),
        ("graddiff", "answer", ["riddles.py, row 3: no column 'answer'", "'graddiff' reads"]),
    ],
)
def test_columns_are_checked_before_compute(
    toys, program, small, tmp_path, monkeypatch, objective, absent, parts
):
    def broken(config):
        task = load(config)
        forget = [{k: v for k, v in row.items() if k != absent} for row in task.forget]
        return task._replace(forget=task.forget[:2] + forget[2:])

    monkeypatch.setattr("train.engine.loop.run", None)
    monkeypatch.setitem(tasks.TASKS, "riddles", BENCHMARK._replace(load=broken, fit=None))
    argv = ["quickstart", *small, *ARGV, objective, "--output", tmp_path / "run"]
    done = program("train.unlearn", *argv)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert all(part in done.err for part in parts) and not (tmp_path / "run").exists()
