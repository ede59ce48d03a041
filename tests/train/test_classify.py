"""`train.classify` from the command line: what it learns, writes, resumes, and refuses."""

import json
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import models
from jaxlib_unlearn.errors import UserError
from models.decoder.model import Decoder
from models.files.families import new_config
from train.evaluators import EVALUATORS, plots
from train.evaluators.evaluation import Answers
from train.jobs import classification, job
from train.jobs.classification_options import TASKS, ClassifyRun
from train.options.config import identity, replace
from train.options.optimizers import OPTIMIZERS, fitted, forwards, options_of, steps_within
from train.options.start import tuned
from train.presets import arguments
from train.presets.arguments import check_start
from train.presets.classify import PRESETS
from train.reporting import compare, tables
from train.reporting.page import steps_of
from train.runtime import distributed

ONE = ("--mesh.data", "1")
LEARN = (
    "--task rows --optimizer.name adamw --optimizer.learning-rate 1e-2 --train.forwards 95 "
    "--train.batch-size 8 --train.curve-points 2 --data.train-rows 24 --data.dev-rows 8"
).split()


def rows(count, draw):
    """Whether the last word is a fruit; the texts differ in length."""
    found = []
    for _ in range(count):
        gold = int(draw.integers(2))
        before = " ".join(draw.choice(["one", "two", "three"], int(draw.integers(1, 4))))
        noun = draw.choice([["hammer", "saw"], ["apple", "pear"]][gold])
        found.append({"prompt": f"{before} {noun} is", "options": ["tool", "fruit"], "gold": gold})
    return found


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def fruits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return write(folder / "fruits.jsonl", rows(48, np.random.default_rng(0)))


def started(program, model, data, output, *more, preset="sst2-tiny"):
    paths = ("--model.path", model, "--data.path", data, "--output", output)
    return program("train.classify", preset, *ONE, *paths, *more)


@pytest.fixture(scope="module")
def learned(program, tiny, fruits, tmp_path_factory):
    output = tmp_path_factory.mktemp("classify") / "run"
    done = started(program, tiny, fruits, output, *LEARN)
    assert done.code == 0, done.err
    return output, done


def summary_of(output):
    return json.loads((output / "summary.json").read_text())


def test_it_learns(learned):
    output, done = learned
    summary = summary_of(output)
    base, tuned = summary["base"], summary["finetuned"]
    assert tuned["accuracy"] > 0.9 > base["accuracy"] and tuned["nll"] < 0.3 < base["nll"]
    wanted = {"accuracy", "nll", "forwards", "seconds", "step_mib", "params_sha256"}
    assert wanted <= set(tuned) and tuned["params_sha256"] != base["params_sha256"]
    assert (tuned["forwards"], tuned["steps"]) == (93, 31)
    assert tuned["seconds"] > 0 and tuned["step_mib"] > 0
    assert set(base) >= {"accuracy", "accuracy_without_prior"}
    assert 0.4 < summary["majority_accuracy"] < 0.8
    assert "Accuracy" in done.out and "16 test rows (the rest of its rows)" in done.err
    assert (output / "export" / "model.safetensors").is_file()


def test_its_log_of_items_gives_its_numbers(learned):
    output, _ = learned
    for name, numbers in summary_of(output).items():
        if name == "majority_accuracy":
            continue
        log = json.loads((output / "evals" / f"{name}.json").read_text())
        items = list(log["accuracy"]["value_by_index"].values())
        assert len(items) == 16 and len(log["dev_accuracy"]["value_by_index"]) == 8
        scores = np.array([item["scores"] for item in items])
        golds = np.array([item["gold"] for item in items])
        assert np.mean(scores.argmax(1) == golds) == numbers["accuracy"]
        logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        assert np.mean(-logs[np.arange(16), golds]) == pytest.approx(numbers["nll"])
        dev = [item["scores"] for item in log["dev_accuracy"]["value_by_index"].values()]
        prior = np.mean(dev - np.log(np.exp(dev).sum(1, keepdims=True)), 0)
        assert np.mean((logs - prior).argmax(1) == golds) == numbers["accuracy_without_prior"]


def test_its_page_shows_accuracy_over_forward_passes(learned):
    output, done = learned
    assert "report: " in done.err and (output / "curves.png").read_bytes()[:4] == b"\x89PNG"
    text = (output / "report.html").read_text()
    accuracy = summary_of(output)["finetuned"]["accuracy"]
    assert f'data-metric="finetuned.accuracy" data-value="{accuracy}"' in text
    assert "Training report: sst2-tiny" in text and "Did it learn the task?" in text
    assert "While it learns" in text and "--task rows" in text and "--train.forwards 95" in text
    assert not any(word in text.lower() for word in ("forget", "unlearned", "no curve"))
    assert "not described" not in text


def test_it_looks_at_the_dev_rows_on_the_way(learned):
    output, _ = learned
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    looked = [line["step"] for line in lines if "dev_accuracy" in line]
    assert looked == [0, 16, 31] and lines[0]["dev_nll"] > lines[-1]["dev_nll"]


def test_runs_are_compared_by_what_they_learn_over_forward_passes(learned):
    output, _ = learned
    run = tables.load_run(output)
    text = compare.page([run])
    assert "Dev accuracy over forward passes" in text and "While they train" in text
    (row,), steps = EVALUATORS["choice"].overlays, steps_of(run)
    band = compare._band(row, "mine", [run], [steps])
    assert band is not None
    # From before the first step to the passes that the whole run took.
    assert band.places[0] == 0 and band.places[-1] == summary_of(output)["finetuned"]["forwards"]
    assert band.values.shape == (1, 3)
    # The best is listed first, which is the highest accuracy and the lowest loss.
    ends = [plots.Band(name, band.places, np.full((1, 3), y)) for name, y in (("a", 0.2), ("b", 1))]
    for rises, order in ((True, ["b", "a"]), (False, ["a", "b"])):
        (legend,) = plots.overlay(ends, "x", "y", rises).legends
        assert [name.get_text() for name in legend.get_texts()] == order


def test_a_second_start_finds_everything(learned, program, tiny, fruits, tmp_path, monkeypatch):
    output, _ = learned
    before = (output / "summary.json").read_text()
    monkeypatch.setattr(classification, "log_of", None)  # nothing is asked again
    done = started(program, tiny, fruits, output, *LEARN)
    assert done.code == 0 and "found, made from the same inputs" in done.err
    assert (output / "summary.json").read_text() == before
    done = program("train.report", output, "--csv", output / "table.csv")
    assert done.code == 0 and "Accuracy" in done.out and "report.html" in done.out
    page = tmp_path / "both.html"
    assert program("train.report", output, output, "--html", page).code == 0
    text = page.read_text().lower()
    assert "training comparison" in text and "forget" not in text and "no picture" not in text
    done = program("train.export", output, tmp_path / "out", "--dtype", "bfloat16")
    assert done.code == 0, done.err
    for folder in (output / "export", tmp_path / "out"):  # it chooses, and does not chat
        text = (folder / "README.md").read_text()
        assert 'tokenizer("PROMPT"' in text and "chat" not in text and "numpy" not in text
    assert "The model 'finetuned' of a run" in text


def test_a_stopped_run_continues(learned, program, tiny, fruits, tmp_path, monkeypatch):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 12

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "asked_to_stop", stop)
        done = started(program, tiny, fruits, tmp_path / "run", *LEARN)
    assert "stopped before step 11 of 31" in done.err and "resume with: python" in done.err
    assert not (tmp_path / "run" / "summary.json").exists()
    done = started(program, tiny, fruits, tmp_path / "run", *LEARN)
    assert done.code == 0 and "continuing at step 11 of 31" in done.err
    again, first = summary_of(tmp_path / "run"), summary_of(learned[0])
    timed = again["finetuned"].pop("seconds"), first["finetuned"].pop("seconds")
    assert min(timed) > 0 and again == first


def told(scores: Any = None, texts: Any = None) -> Any:
    """What evaluators ask, by split."""
    return types.SimpleNamespace(
        scores=lambda split: {"options": [np.array(one) for one in scores[split]]},
        answers=lambda split: Answers([[text] for text in texts[split]], []),
    )


def test_a_prior_of_labels_is_taken_out():
    """A model that says `no` to all, the less so where it is wrong."""
    same = [{"options": ["yes", "no"], "gold": gold} for gold in (0, 1, 0, 1)]
    scores = [[-2.0, -1.0], [-4.0, -1.0], [-2.0, -1.0], [-4.0, -1.0]]
    rows, context = {"dev": same, "test": same[::-1]}, told({"dev": scores, "test": scores[::-1]})
    log = EVALUATORS["choice"].run(None, rows, context)
    assert (log["accuracy"]["agg_value"], log["dev_accuracy"]["agg_value"]) == (0.5, 0.5)
    assert log["accuracy_without_prior"]["agg_value"] == 1.0
    assert [item["chosen"] for item in log["accuracy"]["value_by_index"].values()] == [1] * 4
    losses = np.log1p(np.exp([3.0, 1.0])), np.log1p(np.exp([-3.0, -1.0]))
    assert log["nll"]["agg_value"] == pytest.approx((losses[1][0] + losses[0][1]) / 2)
    # Options that differ have no prior, and without dev rows there is none to take.
    others = [row | {"options": [str(i), "no"]} for i, row in enumerate(same)]
    for rows in ({"dev": others, "test": others}, {"dev": same, "test": others}, {"test": same}):
        assert "accuracy_without_prior" not in EVALUATORS["choice"].run(None, rows, context)


def test_answers_are_judged_by_the_nearest_right_one():
    rows = {"test": [{"answers": ["round", "It is round."]}, {"answers": ["the Moon"]}]}
    log = EVALUATORS["answer"].run(None, rows, told(texts={"test": ["it is round", "a red moon"]}))
    assert log["f1"]["agg_value"] == pytest.approx((1 + 2 / 3) / 2)
    assert log["exact_match"]["agg_value"] == 0.5 and set(log) == {"f1", "exact_match"}
    assert log["f1"]["value_by_index"]["0"]["generation"] == "it is round"


@pytest.mark.slow
def test_an_opt_model_takes_the_published_preset(program, fruits, tiny, tmp_path):
    shape = new_config("opt", vocab_size=512, hidden_size=32, num_layers=2, num_heads=2,
                       context=2048)  # fmt: skip
    params = jax.jit(Decoder(shape).init)(jax.random.key(0))
    words = models.Tokenizer.from_folder(tiny)
    folder = models.export(models.Loaded(shape, params, words), tmp_path / "opt")
    options = ["--smoke", "--task", "rows", "--data.path", fruits, "--data.train-rows", "24"]
    options += [*ONE, "--model.path", folder, "--output", tmp_path / "run", "--lora.rank", "2"]
    options += "--lora.targets q k v o up down".split()
    done = program("train.classify", "sst2-opt-1.3b", *options)
    assert done.code == 0, done.err
    assert summary_of(tmp_path / "run")["finetuned"]["forwards"] == 15
    assert models.load(tmp_path / "run" / "export").decoder.config.family == "opt"
    kept = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.decoder.layers.") for name in kept)


@pytest.mark.slow
def test_two_devices_see_the_same(learned, program, tiny, fruits, tmp_path):
    done = started(program, tiny, fruits, tmp_path / "run", *LEARN, "--mesh.data", "2")
    assert done.code == 0, done.err
    found, want = summary_of(tmp_path / "run"), summary_of(learned[0])
    assert found["base"]["nll"] == pytest.approx(want["base"]["nll"], rel=1e-6)
    first = [
        json.loads((path / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for path in (tmp_path / "run", learned[0])
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


@pytest.mark.slow
def test_answers_with_adapters(program, tiny, tmp_path):
    record = {"title": "Moon", "context": "It is round.", "question": "What is it?"}
    records = [record | {"answers": ["round", f"it {i}"]} for i in range(12)]
    file, output = write(tmp_path / "squad.jsonl", records), tmp_path / "run"
    options = "--task squad --lora.rank 2 --optimizer.name adamw --train.forwards 6".split()
    options += "--train.curve-points 0 --data.train-rows 6 --data.dev-rows 2".split()
    done = started(program, tiny, file, output, *options, "--train.batch-size", "2")
    assert done.code == 0, done.err
    summary = summary_of(output)
    assert summary["majority_accuracy"] is None
    assert 0 <= summary["finetuned"]["f1"] <= 1 and summary["finetuned"]["steps"] == 2
    adapters = load_file(output / "adapter" / "adapter_model.safetensors")
    assert any(np.any(x) for name, x in adapters.items() if "lora_B" in name)
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny) and config["r"] == 2
    text = (output / "report.html").read_text()
    assert "Did it learn the task?" in text and "nearer to a right one than before" in text


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_every_optimizer_or_says_why_not(name, tmp_path, monkeypatch):
    preset = PRESETS[name]
    assert preset.PRESET.preset == name and preset.SUMMARY
    here = replace(preset.PRESET, **{"mesh.data": 1, "mesh.fsdp": 1})
    for optimizer, row in OPTIMIZERS.items():
        config = here
        if optimizer != here.optimizer.name:
            config = tuned(here, optimizer, preset)
        assert config.optimizer.name == optimizer
        if row.needs == "split":
            with pytest.raises(UserError, match="needs the gradients of forget and retain"):
                job.check(classification.JOB, config)
            continue
        for one in (config, replace(config, smoke=True, **preset.SMOKE)):
            one = replace(one, optimizer=fitted(one.optimizer, 4)) if one.smoke else one
            job.check(classification.JOB, one)
            steps = classification.steps_of(one)
            cost = forwards(one.optimizer, steps)
            assert cost <= one.train.forwards < cost + forwards(one.optimizer, 40)
    monkeypatch.chdir(tmp_path)
    if hasattr(preset, "MADE_BY"):
        with pytest.raises(UserError, match="export does not exist; run `python -m train.pretrain"):
            check_start(arguments.read_arguments(arguments.CLASSIFY, [name]))
        Path(preset.PRESET.model.path).mkdir(parents=True)
    config = arguments.read_arguments(
        arguments.CLASSIFY, [name, "--smoke", "--optimizer.name", "hybrid"]
    )
    check_start(config)
    assert getattr(config.optimizer, "period", 0) == config.train.forwards // 6
    config = arguments.read_arguments(
        arguments.CLASSIFY, [name, "--smoke", "--optimizer.name", "mezo"]
    )
    assert config.optimizer == preset.OPTIMIZERS["mezo"][0] and config.smoke
    assert config.data.train_rows == preset.SMOKE["data.train_rows"]


def test_published_budgets():
    for name, options, steps in (("mezo", {}, 20_000), ("zo-muon", {"queries": 4}, 8_000)):
        assert steps_within(options_of(name, **options), 40_000) == steps
    assert steps_within(options_of("adamw"), 2000) == 666
    hybrid = options_of("hybrid", period=2, queries=1)
    assert [forwards(hybrid, n) for n in range(6)] == [0, 3, 6, 8, 10, 13]
    assert steps_within(hybrid, 23) == 8 and steps_within(hybrid, 19) == 4
    with pytest.raises(UserError, match="fewest steps that hybrid .* are 4, which cost 10"):
        steps_within(hybrid, 9)


@pytest.mark.parametrize(
    ("preset", "model"),
    [
        ("sst2-tiny", "tiny"),
        ("sst2-smollm2", "tiny"),
        pytest.param("sst2-smollm2", "smollm2_path", marks=pytest.mark.slow),
    ],
)
def test_a_smoke_run(program, request, tmp_path, preset, model):
    """Of the presets on text that need no network."""
    model = request.getfixturevalue(model)
    for name, count in (("train", 60), ("dev", 20)):
        lines = [f"it is {'bad good'.split()[i % 2]}\t{i % 2}" for i in range(count)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    done = started(program, model, tmp_path, tmp_path / "run", "--smoke", preset=preset)
    assert done.code == 0, done.err
    summary = summary_of(tmp_path / "run")
    assert summary["finetuned"]["steps"] == 3 and summary["finetuned"]["forwards"] == 15
    assert summary["base"]["params_sha256"] != summary["finetuned"]["params_sha256"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    again = ["--config", str(tmp_path / "run" / "config.json"), "--seed", "1"]
    assert identity(arguments.read_arguments(arguments.CLASSIFY, again)) == config | {"seed": 1}


def test_every_number_of_the_configuration_has_a_word():
    from train.options import choices

    for option in choices.options(ClassifyRun, ClassifyRun()):
        assert option.text, option.name


ALIKE = [{"prompt": "a b", "options": ["x", " x"], "gold": 0}] * 4
OUTSIDE = [{"prompt": "a b", "options": ["x", "y"], "gold": 2}] * 4
FEW = ("--task", "rows", "--data.train-rows", "1", "--data.dev-rows", "1")
REFUSED = {
    "words alike": (ALIKE, FEW, ["train, row 1: the options 'x' and ' x' are the same tokens"]),
    "gold": (OUTSIDE, FEW, ["rows.jsonl, row 1: gold is 2, none of the 2 options ('x', 'y')"]),
    "columns": ([{"prompt": "a"}], FEW, ["row 1: column 'options' is missing"]),
    "rows": (ALIKE, FEW[:4], ["4 rows do not make 500 dev rows", "--data.dev-rows"]),
    "budget": (ALIKE, (*FEW, "--train.forwards", "4"), ["--train.forwards 4", "cost 5"]),
    "task": (ALIKE, ("--task", "sst3"), ["--task", "did you mean 'sst2'?"]),
    "option": (ALIKE, (*FEW, "--train.forward", "9"), ["did you mean --train.forwards?"]),
    "pair": (
        ALIKE,
        (*FEW, "--optimizer.name", "sift"),
        ["needs the gradients of forget and retain"],
    ),
    "model": (ALIKE, (*FEW, "--model.path", "./none"), ["none"]),
    "rank": (ALIKE, (*FEW, "--lora.alpha", "2"), ["no adapters without --lora.rank"]),
    "batch": (
        ALIKE,
        (*FEW, "--train.accumulate", "3"),
        ["batch size 16 does not divide", "3 micro-batch"],
    ),
    "preset": (ALIKE, None, ["preset 'sst2-tny' is unknown; did you mean 'sst2-tiny'?"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_compute(name, program, tiny, tmp_path):
    records, options, parts = REFUSED[name]
    file, output = write(tmp_path / "rows.jsonl", records), tmp_path / "run"
    if options is None:
        done = program("train.classify", "sst2-tny", "--data.path", file)
    else:
        done = started(program, tiny, file, output, *options)
    assert done.code == 2 and done.out == ""
    last = done.err.strip().splitlines()
    assert len(last) == 1 and last[0].startswith("error: ")
    assert all(part in last[0] for part in parts), last[0]
    assert not output.exists()


def test_what_it_says_of_itself(program):
    done = program("train.classify", "--list")
    assert done.code == 0 and all(name in done.out for name in (*TASKS, *OPTIMIZERS))
    done = program("train.classify")
    assert done.code == 0 and all(name in done.out for name in PRESETS)
