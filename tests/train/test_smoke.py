"""A whole small run: what it leaves behind, and every other program on its results."""

import contextlib
import json
import math
import re
import resource
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from train.options.config import RunConfig
from train.options.config_files import read_config
from train.runtime.checkpointing import load_tree, params_sha256

MODELS = ("original", "oracle", "unlearned")
STEPS = {"original": 12, "oracle": 12, "unlearned": 4}
METRICS = (
    "forget_quality forget_ks forget_truth_ratio forget_probability forget_rouge "
    "retain_probability retain_rouge retain_truth_ratio forget_paraphrased_probability "
    "forget_perturbed_probability model_utility_of_3 extraction_strength exact_memorization "
    "mia_loss_auc mia_zlib_auc mia_min_k_auc mia_min_k_plus_plus_auc privleak leak_at_1 leak_at_2 "
    "forget_oracle_nll repeated_bigram_rate forget_unreadable forget_fact_recall retain_fact_recall"
).split()


class Run(NamedTuple):
    """The shared run."""

    argv: list
    root: object
    done: object
    summary: dict


@pytest.fixture(scope="module")
def run(program, small, tmp_path_factory):
    root = tmp_path_factory.mktemp("smoke") / "run"
    steps = "--finetune.steps 12 --unlearn.steps 4".split()
    argv = ["quickstart", "--smoke", *small, *steps, "--output", root]
    done = program("train.unlearn", *argv)
    assert done.code == 0, done.err

    def never(word):
        raise AssertionError(f"{word} in summary.json")

    summary = json.loads((root / "summary.json").read_text(), parse_constant=never)
    return Run(argv, root, done, summary)


@pytest.fixture
def no_compute(monkeypatch):
    """Training, scoring and generating fail the test."""

    def reached(*args, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr("train.engine.loop.run", reached)
    monkeypatch.setattr("train.evaluators.evaluation.generate", reached)
    monkeypatch.setattr("train.evaluators.evaluation.score_items", reached)


def test_files_of_the_run_folder(run):
    for name in "config.json metrics.jsonl report.html summary.json run.json".split():
        assert (run.root / name).stat().st_size > 0, name
    pictures = sorted(p.name for p in run.root.glob("*.png"))
    assert pictures == ["curves.png", "facts.png", "leak.png", "truth_ratio.png"]
    for name in pictures:
        assert (run.root / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for name in MODELS:
        log = json.loads((run.root / "evals" / f"{name}.json").read_text())
        assert log["forget_Q_A_ROUGE"]["value_by_index"]
    for name in "config.json model.safetensors tokenizer.json tokenizer_config.json".split():
        assert (run.root / "export" / name).is_file(), name
    # Nothing half-written, and no checkpoint left that nothing reads again.
    assert not [p for p in run.root.rglob("*") if p.name.endswith(".part") or p.name[0] == "."]
    assert not list((run.root / "checkpoints").glob("*"))


def test_the_configuration_is_resolved(run):
    config = read_config(RunConfig, run.root / "config.json")
    assert config.smoke and config.preset == "quickstart" and config.output is None
    assert config.finetune.steps == 12 and config.model.hidden_size == 32


def test_terminal(run):
    heads = [line.split() for line in run.done.out.splitlines() if "unlearned" in line]
    assert heads and heads[0][-3:] == list(MODELS)
    assert "Retain ROUGE-L" in run.done.out and "SMOKE run:" in run.done.out
    assert f"run folder {run.root}" in run.done.err and "report:" in run.done.err


def test_summary(run):
    assert list(run.summary) == list(MODELS)
    for name in MODELS:
        flat = run.summary[name]
        assert re.fullmatch("[0-9a-f]{64}", flat["params_sha256"])
        for metric in METRICS:
            assert math.isfinite(flat[metric]), (name, metric)
    assert len({run.summary[name]["params_sha256"] for name in MODELS}) == 3
    assert run.summary["oracle"]["forget_quality"] == 1.0
    assert 0 <= run.summary["unlearned"]["leak_at_1"] <= run.summary["unlearned"]["leak_at_2"] <= 1


def test_the_logs_privleak_is_that_of_the_summary(run):
    for name in MODELS:
        log = json.loads((run.root / "evals" / f"{name}.json").read_text())
        assert log["privleak"]["agg_value"] == run.summary[name]["privleak"], name
    assert run.summary["oracle"]["privleak"] == 0  # against itself; against 0.5 it would not be


def test_metrics_have_every_step_once(run):
    rows = [json.loads(line) for line in (run.root / "metrics.jsonl").read_text().splitlines()]
    keys = [(row["stage"], row["step"]) for row in rows]
    assert len(keys) == len(set(keys))
    for stage, steps in STEPS.items():
        mine = {row["step"]: row for row in rows if row["stage"] == stage}
        assert list(mine)[:steps] == list(range(steps))
        for step in range(steps):
            assert {"loss", "grad_norm", "update_norm", "lr"} <= set(mine[step])
            assert all(math.isfinite(v) for k, v in mine[step].items() if k != "stage")
        drawn = [step for step, row in mine.items() if "forget_probability" in row]
        assert drawn == ([0, 2, 4] if stage == "unlearned" else [])
    assert {"forget_alternate_loss", "forget_push_loss", "retain_loss"} <= set(rows[-2])


def test_report_page(run):
    page = (run.root / "report.html").read_text()
    assert "<title>SMOKE" in page and "Did it forget?" not in page
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_minutes_add_up(run):
    minutes = json.loads((run.root / "run.json").read_text())["minutes"]
    phases = [v for k, v in minutes.items() if k != "all"]
    assert {*STEPS, *(f"evaluate {name}" for name in MODELS), "export"} < set(minutes)
    assert sum(phases) <= minutes["all"] + 0.05


def test_the_export_is_the_unlearned_model(run):
    loaded = models.load(run.root / "export")
    assert params_sha256(loaded.params) == run.summary["unlearned"]["params_sha256"]
    (stage,) = (run.root / "stages").glob("unlearned-*")
    params = load_tree(stage, loaded.params)
    tokens = jnp.asarray([loaded.tokenizer.encode("Question: Who is it?\nAnswer:")])

    def logits(params):
        return loaded.unembed(params, loaded.forward(params, tokens)[0])

    ours, theirs = logits(params), logits(loaded.params)
    assert ours.shape[-1] == loaded.config.vocab_size
    np.testing.assert_array_equal(ours, theirs)


def test_the_same_command_recomputes_nothing(run, program, no_compute):
    def contents():
        names = ("summary.json", "metrics.jsonl", "config.json", "evals/oracle.json")
        return [(run.root / name).read_bytes() for name in names]

    before = contents()
    minutes = json.loads((run.root / "run.json").read_text())["minutes"]
    weights = (run.root / "export" / "model.safetensors").stat().st_mtime_ns
    done = program("train.unlearn", *run.argv)
    assert done.code == 0, done.err
    assert contents() == before
    assert (run.root / "export" / "model.safetensors").stat().st_mtime_ns == weights
    assert done.err.count("found, made from the same inputs") == 3
    # The minutes of the first time are not overwritten with those of reading the results.
    after = json.loads((run.root / "run.json").read_text())["minutes"]
    assert all(after[name] >= minutes[name] for name in minutes)


def test_config_of_a_run_reruns_it(run, program, no_compute):
    done = program("train.unlearn", "--config", run.root / "config.json", "--output", run.root)
    assert done.code == 0, done.err


def test_evaluate_the_run(run, program):
    done = program("train.evaluate", run.root, "--smoke")  # of a smoke run: it changes nothing
    assert done.code == 0, done.err
    summary = json.loads((run.root / "evaluate" / "summary.json").read_text())
    assert list(summary) == ["original", "oracle", "model"] and "SMOKE run:" in done.out
    assert all(summary[name] == run.summary[name] for name in ("original", "oracle"))
    again, first = summary["model"], run.summary["unlearned"]
    # Only the run itself has a judge of fluency.
    assert set(first) - set(again) == {"forget_oracle_nll"}
    for name, value in again.items():
        if isinstance(value, float):
            assert value == pytest.approx(first[name], abs=1e-6), name
        else:
            assert value == first[name], name
    assert "Forget ROUGE-L" in done.out and "model" in done.out
    page = (run.root / "evaluate" / "report.html").read_text(encoding="utf-8")
    assert "<h1>" in page and 'data-metric="model.forget_rouge"' in page
    assert "No answers were stored" not in page
    assert json.loads((run.root / "summary.json").read_text()) == run.summary
    # Other settings: the run's numbers are no comparison, and its folder is not written over.
    more = ("--evaluate.max-new-tokens", "4", "--retain-log", "None")
    assert program("train.evaluate", run.root, *more).code == 2
    done = program("train.evaluate", run.root, *more, "--output", run.root / "shorter")
    assert done.code == 0, done.err
    assert list(json.loads((run.root / "shorter" / "summary.json").read_text())) == ["model"]


def test_a_log_of_other_rows_is_refused_before_compute(run, program, no_compute):
    oracle = run.root / "evals" / "oracle.json"
    argv = ["--data.forget-rows", "2", "--output", run.root / "other", "--retain-log", oracle]
    done = program("train.evaluate", run.root, *argv)
    assert done.code == 2 and done.err.count("\n") == 1
    assert "is about" in done.err and "2 are asked here" in done.err
    assert not (run.root / "other").exists()
    argv = ["quickstart", "--smoke", "--output", run.root / "again", "--retain-log", oracle]
    done = program("train.unlearn", *argv, "--data.forget-rows", "2")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "2 are asked here" in done.err and not (run.root / "again").exists()


def test_evaluate_a_folder_on_files(program, tiny, tofu_folder, tmp_path):
    options = "--mesh.data 1 --evaluate.leak-samples 0 --evaluate.max-new-tokens 4".split()
    argv = [tiny, "--data.path", tofu_folder, *options, "--output", tmp_path / "out"]
    done = program("train.evaluate", *argv)
    assert done.code == 0, done.err
    flat = json.loads((tmp_path / "out" / "summary.json").read_text())["model"]
    for split in ("forget", "retain", "real_authors", "world_facts"):
        assert 0 <= flat[f"{split}_probability"] <= 1 and 0 <= flat[f"{split}_rouge"] <= 1
    assert "model_utility" in flat and not [name for name in flat if name.startswith("leak_at")]
    assert params_sha256(models.load(tiny).params) == flat["params_sha256"]


def test_report_again(run, program):
    (run.root / "curves.png").unlink()
    done = program("train.report", run.root)
    assert done.code == 0 and done.err == ""
    assert str(run.root / "report.html") in done.out and (run.root / "curves.png").exists()
    csv = run.root.parent / "all.csv"
    done = program("train.report", run.root, "--csv", csv)
    assert done.err == "" and "forget_rouge" in csv.read_text()


def test_export_in_another_dtype(run, program, tmp_path):
    done = program("train.export", run.root, tmp_path / "half", "--dtype", "bfloat16")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    whole = models.load(run.root / "export").params
    half = models.load(tmp_path / "half", dtype="bfloat16").params
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole)
    jax.tree.map(np.testing.assert_array_equal, half, rounded)


def test_finetune_the_export(run, program, tofu_folder, tmp_path, monkeypatch):
    options = "--mesh.data 1 --train.steps 3 --train.batch-size 4 --max-length 96".split()
    root = tmp_path / "tuned"
    rows = tofu_folder / "retain99.json"
    argv = [run.root / "export", rows, *options, "--output", root]
    done = program("train.finetune", *argv)
    assert done.code == 0, done.err
    steps = [json.loads(line)["step"] for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]
    summary = json.loads((root / "summary.json").read_text())
    sha = params_sha256(models.load(root / "export").params)
    assert summary == {"original": {"params_sha256": sha}}
    assert sha != run.summary["unlearned"]["params_sha256"]
    monkeypatch.setattr("train.engine.loop.run", None)
    assert program("train.finetune", *argv).code == 0


@pytest.mark.slow
def test_tofu_files_from_end_to_end(program, tiny, tofu_folder, tmp_path):
    """The other preset with the tiny model: the Llama is random, the path is the real one."""
    options = (
        "--smoke --mesh.data 1 --finetune.batch-size 4 --unlearn.batch-size 4 "
        "--evaluate.max-new-tokens 4"
    ).split()
    argv = ["tofu-smollm2", *options, "--data.path", tofu_folder, "--model.path", tiny]
    root = tmp_path / "run"
    done = program("train.unlearn", *argv, "--output", root)
    assert done.code == 0, done.err
    summary = json.loads((root / "summary.json").read_text())
    assert list(summary) == list(MODELS)
    assert all(math.isfinite(s["world_facts_rouge"]) for s in summary.values())
    assert all(math.isfinite(s["forget_base_nll"]) for s in summary.values())
    # Two ways to skip training: a model that knows the facts, a log in place of the oracle.
    log = root / "evals" / "oracle.json"
    known = ["--stage.original", root / "export", "--retain-log", log]
    done = program("train.unlearn", *argv, *known, "--output", tmp_path / "second")
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "second" / "summary.json").read_text())
    assert list(summary) == ["original", "unlearned"]
    assert "came from outside" in (tmp_path / "second" / "report.html").read_text()
    assert 0 <= summary["unlearned"]["forget_quality"] <= 1


@contextlib.contextmanager
def files_of_at_most(size):
    """The system refuses longer files, with the errors of a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("stages/unlearned*", "stages/unlearned"),
        ("evals/unlearned.*", "evals/unlearned.json"),
        ("export", "safetensors"),
        ("truth_ratio.png", ".png"),
        ("report.html", "report.html"),
        ("summary.*", "summary.json"),
        ("run.json", "run.json"),
    ],
)
def test_a_full_disk_is_a_line_and_the_next_run_finishes(run, program, tmp_path, missing, named):
    root = tmp_path / "run"
    shutil.copytree(run.root, root)
    argv = [*run.argv[:-1], root]
    gone = sorted(root.glob(missing))
    parts = [p for p in gone for p in ([p] if p.is_file() else p.rglob("*")) if p.is_file()]
    largest = max(path.stat().st_size for path in parts)
    for path in gone:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = {p: p.read_bytes() for p in root.glob("stages/**/*") if p.is_file()}
    with files_of_at_most(largest * 2 // 3):
        done = program("train.unlearn", *argv)
    assert done.code == 2, done.err
    line = done.err.splitlines()[-1]
    assert line.startswith("error: cannot write") and named in line, line
    assert "free space or choose another" in line
    assert not [*root.rglob("*.part"), *root.glob(".export*")]
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert program("train.unlearn", *argv).code == 0
    assert json.loads((root / "summary.json").read_text()) == run.summary
    assert (root / "report.html").exists() and (root / "export" / "config.json").exists()
