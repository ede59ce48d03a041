"""The command line: options, presets, configuration files, and errors that name what is right."""

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import OBJECTIVES, ObjectiveConfig
from train import cli, suggest
from train.arguments import read_arguments
from train.choices import FIRST, options, words, words_of
from train.config import RunConfig, replace, to_json
from train.evaluate import EvaluateRun
from train.evaluate import read_arguments as evaluation_of
from train.finetune import FinetuneRun
from train.loop import TrainingError
from train.optimizers import COMBINERS, OPTIMIZERS, OptimizerConfig, make_schedule
from train.plan import PlanConfig
from train.presets import PRESETS

OPTION = re.compile(r"^  (--(?!no-)[\w.-]+)", re.MULTILINE)  # where help begins with one


def parse(*args, default=PRESETS["quickstart"].PRESET):
    return cli.parse(RunConfig, default, list(args), "train.unlearn", "summary")


def fails(call, *parts) -> str:
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and "Traceback" not in message
    for part in parts:
        assert part in message, message
    return message


def test_option_names():
    names = cli.option_names(RunConfig)
    for name in (
        "--data.path --data.forget-split --objective.name --optimizer.name --seed --smoke "
        "--mesh.data --mesh.fsdp --mesh.tp --output --stage.original --retain-log "
        "--finetune.optimizer.learning-rate --objective.layers"
    ).split():
        assert name in names
    assert len(names) == len(set(names))
    assert not any("_" in name for name in names)
    # A dataclass itself is no option.
    assert "--data" not in names and "--finetune.optimizer" not in names


@pytest.mark.parametrize(
    ("typo", "right"),
    [
        ("--data.pth", "--data.path"),
        ("--dta.path", "--data.path"),
        ("--objectiv.name", "--objective.name"),
        ("--optimizer.lerning-rate", "--optimizer.learning-rate"),
        ("--Seed", "--seed"),
        ("--mesh.fspd", "--mesh.fsdp"),
        ("--data.forget_splt=x", "--data.forget-split"),
        ("--retainlog", "--retain-log"),
        ("--optimizer.lr", "--optimizer.learning-rate"),
        ("--unlearn.bs=4", "--unlearn.batch-size"),
        # Names are looked for in every group, and what stands for a whole group is its main option.
        ("--batch-size", "--unlearn.batch-size"),
        ("--learning-rate", "--optimizer.learning-rate"),
        ("--lr", "--optimizer.learning-rate"),
        ("--epochs", "--unlearn.epochs"),
        ("--temperature", "--objective.temperature"),
        ("--tempera=3", "--objective.temperature"),
        ("--tp", "--mesh.tp"),
        ("--model", "--model.path"),
        ("--data", "--data.path"),
        ("--lora", "--lora.rank"),
        ("--stage", "--stage.original"),
        ("--mesh", "--mesh.data"),
    ],
)
def test_a_typo_names_the_nearest_option(typo, right):
    message = fails(lambda: cli.check_options(RunConfig, [typo, "x"]), "--help")
    assert f"did you mean {right}?" in message


@pytest.mark.parametrize(
    ("args", "right"),
    [
        ("--optimizer muon", "--optimizer.name muon"),
        ("--optimizer=muon", "--optimizer.name muon"),
        ("--optimizr muon", "--optimizer.name muon"),
        ("--optimizer svd", "--optimizer.bases svd"),
        ("--objective npo", "--objective.name npo"),
        ("--retain kl", "--objective.retain kl"),
        ("--dtype bfloat16", "--model.dtype bfloat16"),
        ("--judge base", "--evaluate.judge base"),
        ("--npo", "--objective.name npo"),
        ("--blur --seed 3", "--combine blur"),
        ("--wandb", "--report-to wandb"),
    ],
)
def test_a_word_finds_the_option_it_belongs_to(args, right):
    fails(lambda: cli.check_options(RunConfig, args.split()), f"did you mean {right}? (--help")
    cli.check_options(RunConfig, right.split())  # what is suggested is right


def test_right_options_pass():
    args = "--data.path=x --data.forget_split y --no-smoke --seed -3 --help".split()
    cli.check_options(RunConfig, args)
    cli.check_options(RunConfig, ["--no-tensorboard"])
    cli.check_options(RunConfig, [])


def test_nearest_and_choose():
    assert suggest.nearest("quickstrt", list(PRESETS)) == "quickstart"
    assert suggest.nearest("zzz", list(PRESETS)) in PRESETS
    assert suggest.choose("a", {"a": 1}, "thing") == 1
    fails(lambda: suggest.choose("tofu", PRESETS, "preset"), "preset 'tofu'", "'tofu-smollm2'?")


def test_option_value():
    args = ["--seed", "3", "--objective.name=npo", "--data.forget_split", "x", "--smoke"]
    assert cli.option_value(args, "--seed") == "3"
    assert cli.option_value(args, "--objective.name") == "npo"
    assert cli.option_value(args, "--data.forget-split") == "x"
    assert cli.option_value(args, "--smoke") is None
    assert cli.option_value(args, "--output") is None


def test_overrides():
    config = parse(
        *"--objective.layers 1 2 --seed 5 --output out/x --finetune.steps 7 --mesh.tp 2".split(),
        *"--finetune.optimizer.learning-rate 1e-3 --data.system-prompt".split(),
        "Be kind.",
        *"--no-oracle --tensorboard --model.remat dots --data.path=some/where".split(),
    )
    assert config.objective.layers == (1, 2) and config.seed == 5
    assert config.output == Path("out/x") and config.data.path == Path("some/where")
    assert config.finetune.steps == 7 and config.finetune.optimizer.learning_rate == 1e-3
    assert config.data.system_prompt == "Be kind."
    assert (config.oracle, config.tensorboard, config.mesh.tp) == (False, True, 2)
    assert config.model.remat == "dots"
    # What was not named stays.
    default = PRESETS["quickstart"].PRESET
    assert config.unlearn == default.unlearn and config.evaluate == default.evaluate
    again = parse("--finetune.steps", "None", "--objective.layers", "None", default=config)
    assert again.finetune.steps is None and again.objective.layers is None
    assert parse("--objective.layers").objective.layers == ()
    assert parse("--data.forget_split", "x").data.forget_split == "x"
    assert parse() == default
    own = parse("--data.forget", "a.csv", "--data.retain=b.jsonl", "--report-to", "wandb,trackio")
    assert (own.data.forget, own.data.retain) == (Path("a.csv"), Path("b.jsonl"))
    assert own.report_to == "wandb,trackio"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--seed", "abc"], ["--seed", "'abc'"]),
        (["--seed"], ["--seed", "Missing"]),
        (["--finetune.epochs", "many"], ["--finetune.epochs", "'many'"]),
        (["--objective.retain", "foo"], ["--objective.retain", "'foo'", "nll"]),
        (["--objective.layers", "1", "x"], ["--objective.layers"]),
        (["stray"], ["stray"]),
        (["-x"], ["-x"]),
        (["--smoke", "maybe"], ["maybe"]),
    ],
)
def test_bad_values_are_one_line(args, parts):
    message = fails(lambda: parse(*args), *parts)
    assert len(message) < 320 and "----" not in message


@pytest.mark.parametrize("name", PRESETS)
def test_configuration_survives_json(name):
    preset = PRESETS[name].PRESET
    config = replace(
        preset,
        output=Path("x"),
        **{"data.path": Path("a/b"), "objective.layers": (0, 3), "finetune.steps": 9, "seed": 4},
    )
    for one in (preset, config, RunConfig()):
        text = json.dumps(to_json(one))
        assert cli.from_json(RunConfig, json.loads(text)) == one
    for cls in (EvaluateRun, FinetuneRun):
        assert cli.from_json(cls, to_json(cls())) == cls()


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([], "as a whole"),
        (3, "as a whole"),
        ({"sed": 1}, "'sed'"),
        ({"seed": "abc"}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": None}, "seed"),
        ({"smoke": 1}, "smoke"),
        ({"data": 3}, "data"),
        ({"data": {"path": 3}}, "data.path"),
        ({"objective": {"layers": 3}}, "objective.layers"),
        ({"objective": {"layers": ["1"]}}, "objective.layers"),
        ({"objective": {"retain": "foo"}}, "objective.retain"),
        ({"finetune": {"optimizer": {"b2": "x"}}}, "finetune.optimizer.b2"),
    ],
)
def test_bad_configuration_files(tmp_path, value, part):
    fails(lambda: cli.from_json(RunConfig, value), "configuration", part)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(value))
    fails(lambda: cli.read_config(RunConfig, path), part)


def test_configuration_file_that_does_not_read(tmp_path):
    path = tmp_path / "config.json"
    fails(lambda: cli.read_config(RunConfig, path), str(path), "config.json of a run")
    path.write_text("{")
    fails(lambda: cli.read_config(RunConfig, path), str(path))
    path.write_bytes(b"\xff\xfe\xfa")
    fails(lambda: cli.read_config(RunConfig, path), str(path))
    fails(lambda: cli.read_config(RunConfig, tmp_path), str(tmp_path))
    fails(lambda: read_arguments(["--config"]), "--config")


def test_rerun_of_a_configuration(tmp_path):
    first = read_arguments(["quickstart", "--seed", "3", "--objective.layers", "0"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(first)))
    assert read_arguments(["--config", str(path)]) == first
    second = read_arguments(["--config", str(path), "--seed", "4", "--output", "elsewhere"])
    assert second == dataclasses.replace(first, seed=4, output=Path("elsewhere"))
    smoke = read_arguments(["--config", str(path), "--smoke"])
    assert smoke.smoke and smoke.finetune.steps == PRESETS["quickstart"].SMOKE["finetune.steps"]
    other = read_arguments(["--config", str(path), "--objective.name", "npo"])
    assert other.objective == ObjectiveConfig("npo")
    fails(lambda: read_arguments(["--config", str(path), "--sed", "4"]), "--seed")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_another_objective_drops_the_presets_tuning(preset, name):
    default = PRESETS[preset].PRESET
    config = read_arguments([preset, "--objective.name", name])
    if name == default.objective.name:
        assert config.objective == default.objective
    else:
        known = getattr(PRESETS[preset], "OBJECTIVES", {})
        assert config.objective == known.get(name, ObjectiveConfig(name))
        assert config.objective.temperature is None or "temperature" in OBJECTIVES[name].defaults
    assert config.optimizer == default.optimizer and config.data == default.data
    # Options on the command line win, in either order.
    weight = read_arguments([preset, f"--objective.name={name}"]).objective
    assert weight == config.objective


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_optimizer_brings_the_presets_options_for_it(preset, name):
    default = PRESETS[preset].PRESET
    config = read_arguments([preset, "--optimizer.name", name])
    assert config.optimizer.name == name and config.objective == default.objective
    known, changes = getattr(PRESETS[preset], "OPTIMIZERS", {}).get(name, (None, {}))
    if name == default.optimizer.name:
        assert config == default
    elif known is not None:
        assert config == replace(default, optimizer=known, **changes)
    elif OPTIMIZERS[name].learning_rate is not None:
        assert config.optimizer.learning_rate == OPTIMIZERS[name].learning_rate
    else:
        assert config.optimizer == replace(default.optimizer, name=name)
    # Options on the command line win.
    rate = read_arguments([preset, "--optimizer.name", name, "--optimizer.learning-rate", "0.5"])
    assert rate.optimizer == replace(config.optimizer, learning_rate=0.5)


@pytest.mark.parametrize("option", ["--model.path", "--stage.original"])
@pytest.mark.parametrize("more", [[], ["--objective.name", "asu"]])
def test_another_model_drops_the_presets_tuning(option, more):
    assert PRESETS["tofu-smollm2"].PRESET.objective.layers
    for name in PRESETS if more else ["tofu-smollm2"]:
        config = read_arguments([name, option, "folder", *more])
        assert config.objective == ObjectiveConfig("asu")


def test_options_beside_another_objective_count():
    config = read_arguments(["quickstart", "--objective.beta", "0.3", "--objective.name", "npo"])
    assert config.objective == ObjectiveConfig("npo", beta=0.3)
    fails(lambda: read_arguments(["quickstart", "--objective.name", "npoo"]), "'npo'")


@pytest.mark.parametrize("name", PRESETS)
def test_smoke_shrinks_and_overrides_win(name):
    preset = PRESETS[name]
    config = read_arguments([name, "--smoke", "--unlearn.steps", "17"])
    assert config.smoke and config.unlearn.steps == 17
    assert config == replace(preset.PRESET, smoke=True, **{**preset.SMOKE, "unlearn.steps": 17})
    assert not read_arguments([name]).smoke


def test_smoke_of_an_evaluation():
    config = evaluation_of(["some-model", "--smoke", "--evaluate.leak-samples", "3"])
    assert config.smoke and config.model == "some-model" and config.evaluate.leak_samples == 3
    assert config.data.retain_rows < EvaluateRun().data.retain_rows
    fails(lambda: evaluation_of(["some-model", "--evaluat.leak-samples", "3"]), "--evaluate.leak")
    fails(lambda: evaluation_of(["--smoke"]), "first argument")


def test_help_lists_presets_in_a_line_each(program):
    for argv in ([], ["--help"], ["-h"]):
        done = program("train.unlearn", *argv)
        assert done.code == 0 and done.err == ""
        for name, preset in PRESETS.items():
            lines = [line for line in done.out.splitlines() if line.split()[:1] == [name]]
            assert len(lines) == 1 and preset.SUMMARY in lines[0]


def test_list_of_methods(program):
    done = program("train.unlearn", "--list")
    assert done.code == 0
    heads, names = [], []
    for line in done.out.splitlines():
        (heads if line.endswith(":") else names).append(line.split()[0])
    assert heads == ["Objectives", "Optimizers", "Combiners"]
    assert names == [*OBJECTIVES, *OPTIMIZERS, *COMBINERS]
    assert all(len(line.split()) > 2 for line in done.out.splitlines())


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        ("train.unlearn quickstart --help", ["--data.path", "--objective.name", "--mesh.fsdp"]),
        ("train.unlearn tofu-smollm2 --help", ["--stage.original", "--retain-log", "--smoke"]),
        ("train.evaluate --help", ["--data.path", "--output", "--evaluate.leak-samples"]),
        ("train.finetune --help", ["--train.epochs", "--output", "--smoke"]),
        ("train.export --help", ["--dtype"]),
    ],
)
def test_help_of_every_program(program, argv, options):
    done = program(*argv.split())
    assert done.code == 0 and done.err == ""
    for option in options:
        assert option in done.out
    # The text of the configuration's docstrings, not the names alone.
    assert len(done.out.splitlines()) > 5


@pytest.fixture
def narrow(monkeypatch):
    """A terminal in which help has one column."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize(
    ("argv", "cls"),
    [
        ("train.unlearn quickstart", RunConfig),
        ("train.finetune", FinetuneRun),
        ("train.evaluate", EvaluateRun),
        ("train.plan quickstart", PlanConfig),
    ],
)
def test_help_names_every_option_once_and_says_something_about_it(program, narrow, argv, cls):
    done = program(*argv.split(), "--help")
    assert done.code == 0 and done.err == ""
    shown = OPTION.findall(done.out)
    assert sorted(shown) == sorted(cli.option_names(cls))
    silent = [o.name for o in options(cls, cls()) if not o.text]
    assert silent == []


def test_help_begins_with_the_options_used_first(program, narrow):
    text = program("train.unlearn", "quickstart", "--help").out
    panels = re.findall(r"^ (\w.*?) options +$", text, re.MULTILINE)
    assert panels[:4] == ["most used", "run", "data", "model"]
    assert len(FIRST) == 20 and set(FIRST) <= set(cli.option_names(RunConfig))
    first = text[text.index("most used options") : text.index("run options")]
    assert OPTION.findall(first) == FIRST
    assert "(default: 0.0005)" in first  # the preset's own values


def test_help_lists_the_words_of_an_option(program, narrow):
    flat = " ".join(program("train.unlearn", "quickstart", "--help").out.split())
    for name, known in words().items():
        for option in [o for o in cli.option_names(RunConfig) if o.endswith(name)]:
            assert f"{option} {{{','.join(known)}}}" in flat.replace(", ", ","), option
    assert "--objective.retain {nll,kl,none}|None" in flat


def test_words_belong_to_the_end_of_a_name():
    assert words_of("--finetune.optimizer.schedule") == words_of("--optimizer.schedule")
    assert words_of("--seed") == words_of("--data.path") == ()
    # Those that no table checks: each is accepted.
    for word in words_of("--optimizer.schedule"):
        make_schedule(OptimizerConfig(schedule=word), 3)
    for word in words_of("--objective.retain"):
        assert parse("--objective.retain", word).objective.retain == word


def test_help_explains_the_options(program):
    text = " ".join(program("train.unlearn", "quickstart", "--help").out.split())
    assert "retain-only model" in text  # --retain-log


def outcome(capsys, monkeypatch, error):
    def run(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["train.unlearn"])
    with pytest.raises(SystemExit) as stop:
        cli.main(run)
    return stop.value.code, capsys.readouterr().err


def test_main_turns_errors_into_a_line_and_a_code(capsys, monkeypatch):
    assert outcome(capsys, monkeypatch, UserError("no x\n  here")) == (2, "error: no x here\n")
    assert outcome(capsys, monkeypatch, TrainingError("loss")) == (1, "stopped: loss\n")
    code, err = outcome(capsys, monkeypatch, KeyboardInterrupt())
    assert code == 130 and "continues" in err
    full = OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")
    code, err = outcome(capsys, monkeypatch, full)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "runs/x/metrics.jsonl" in err and "No space left" in err
    # What is no mistake of the person's keeps its traceback.
    monkeypatch.setattr(sys, "argv", ["train.unlearn"])
    for bug in (ValueError("x"), OSError(errno.EPROTO, "x"), KeyError("x")):

        def run(argv, bug=bug):
            raise bug

        with pytest.raises(type(bug)):
            cli.main(run)


def test_a_real_process_says_it_in_one_line(repo):
    done = subprocess.run(
        [sys.executable, "-m", "train.unlearn", "quickstrat"],
        cwd=repo,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "'quickstart'" in done.stderr
