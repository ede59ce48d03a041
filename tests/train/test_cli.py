"""The command line: options, presets, configuration files, and errors that name the right one."""

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
from jaxlib_unlearn.objectives import OBJECTIVES
from jaxlib_unlearn.objectives import options_of as objective_of
from train.evaluate import EvaluateRun
from train.evaluate import read_arguments as evaluation_of
from train.finetune import FinetuneRun
from train.options import cli, config_files
from train.options.choices import FIRST, known_words, options
from train.options.config import OBJECTIVE, RunConfig, replace, to_json
from train.options.optimizers import COMBINERS, OPTIMIZERS, build, other
from train.options.optimizers import ROWS as OPTIMIZER
from train.options.optimizers import options_of as optimizer_of
from train.planning.planned import PlanConfig
from train.presets import PRESETS, arguments
from train.runtime import suggest
from train.runtime.errors import TrainingError

OPTION = re.compile(r"^  (--(?!no-)[\w.-]+)", re.MULTILINE)  # how help prints an option


QUICKSTART = PRESETS["quickstart"].PRESET


def parse(*args, default=QUICKSTART):
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
    names = known_words(RunConfig)
    for name in (
        "--data.path --data.forget-split --objective.name --optimizer.name --seed --smoke "
        "--mesh.data --mesh.fsdp --mesh.tp --output --stage.original --retain-log "
        "--finetune.optimizer.learning-rate --objective.layers"
    ).split():
        assert name in names
    assert len(names) == len(set(names))
    assert not any("_" in name for name in names)
    # A dataclass itself is not an option.
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
        # Names are searched in every group, and the name of a whole group means its main option.
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
        ("--optimizer subspace", "--optimizer.bases subspace"),
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
    cli.check_options(RunConfig, right.split())  # the suggestion is right


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
    asu = replace(QUICKSTART, objective=objective_of("asu"))
    config = parse(
        *"--objective.push 0.5 --seed 5 --output out/x --finetune.steps 7 --mesh.tp 2".split(),
        *"--finetune.optimizer.learning-rate 1e-3 --data.system-prompt".split(),
        "Be kind.",
        *"--no-oracle --tensorboard --model.remat dots --data.path=some/where".split(),
    )
    assert config.objective.push == 0.5 and config.seed == 5
    assert config.output == Path("out/x") and config.data.path == Path("some/where")
    assert config.finetune.steps == 7 and config.finetune.optimizer.learning_rate == 1e-3
    assert config.data.system_prompt == "Be kind."
    assert (config.oracle, config.tensorboard, config.mesh.tp) == (False, True, 2)
    assert config.model.remat == "dots"
    # Fields that were not named keep their values.
    default = PRESETS["quickstart"].PRESET
    assert config.unlearn == default.unlearn and config.evaluate == default.evaluate
    again = parse("--finetune.steps", "None", "--objective.retain", "None", default=config)
    assert again.finetune.steps is None and again.objective.retain is None
    smooth = parse("--objective.layers", "1", "2", default=asu)
    assert smooth.objective.layers == (1, 2)
    assert parse("--objective.layers", "None", default=smooth).objective.layers is None
    assert parse("--objective.layers", default=asu).objective.layers == ()
    assert parse("--data.forget_split", "x").data.forget_split == "x"
    assert parse() == default
    own = parse("--data.forget", "a.csv", "--data.retain=b.jsonl", "--report-to", "wandb,trackio")
    assert (own.data.forget, own.data.retain) == ((Path("a.csv"),), (Path("b.jsonl"),))
    assert own.report_to == "wandb,trackio"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--seed", "abc"], ["--seed", "'abc'"]),
        (["--seed"], ["--seed", "Missing"]),
        (["--finetune.epochs", "many"], ["--finetune.epochs", "'many'"]),
        (["--objective.retain", "foo"], ["--objective.retain", "'foo'", "nll"]),
        (["--objective.name", "asu", "--objective.layers", "1", "x"], ["--objective.layers"]),
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
        **{"data.path": Path("a/b"), "objective.retain": "kl", "finetune.steps": 9, "seed": 4},
    )
    layers = replace(preset, objective=objective_of("asu", layers=(0, 3)))
    rows = [replace(preset, **{"objective.name": n}) for n in OBJECTIVES]
    rows += [replace(preset, **{"finetune.optimizer.name": n}) for n in OPTIMIZERS]
    for one in (preset, config, layers, *rows, RunConfig()):
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
        ({"seed": True}, "seed is True"),
        ({"finetune": {"epochs": True}}, "finetune.epochs"),
        ({"smoke": 1}, "smoke"),
        ({"data": 3}, "data"),
        ({"data": {"path": 3}}, "data.path"),
        ({"data": {"path": "a\0b"}}, "data.path"),
        ({"lora": {"targets": "qv"}}, "lora.targets"),
        ({"objective": {"name": "asu", "layers": 3}}, "objective.layers"),
        ({"objective": {"name": "asu", "layers": ["1"]}}, "objective.layers"),
        ({"objective": {"retain": "foo"}}, "objective.retain"),
        ({"objective": {"name": ["npo"]}}, "objective.name"),
        ({"objective": "npo"}, "objective must be a JSON object"),
        ({"optimizer": {"name": None}}, "optimizer.name"),
        ({"finetune": {"optimizer": {"b2": "x"}}}, "finetune.optimizer.b2"),
    ],
)
def test_bad_configuration_files(tmp_path, value, part):
    fails(lambda: cli.from_json(RunConfig, value), "configuration", part)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(value))
    fails(lambda: config_files.read_config(RunConfig, path), part)


def test_configuration_file_that_does_not_read(tmp_path):
    path = tmp_path / "config.json"
    fails(lambda: config_files.read_config(RunConfig, path), str(path), "config.json of a run")
    path.write_text("{")
    fails(lambda: config_files.read_config(RunConfig, path), str(path))
    path.write_bytes(b"\xff\xfe\xfa")
    fails(lambda: config_files.read_config(RunConfig, path), str(path))
    fails(lambda: config_files.read_config(RunConfig, tmp_path), str(tmp_path))
    fails(lambda: arguments.read_arguments(arguments.UNLEARN, ["--config"]), "--config")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed: 1\nseed: 2\n", "'seed' stands twice"),
        ("data: &d {path: x}\nmodel: *d\n", "references (*name) are not read"),
        ("data: &d {path: x}\nmodel: {<<: *d}\n", "references (*name) are not read"),
        ("1: x\n", "the key 1 is no name"),
        ("seed: [\n", "cannot be read as a configuration"),
        ("seed: ten\n", "seed is 'ten'"),
        ("smoke: 2026-01-01\n", "smoke is datetime.date(2026, 1, 1)"),
        ("sede: 1\n", "unknown entry 'sede'"),
        ("!!python/object/apply:os.system [ls]\n", "cannot be read as a configuration"),
        ("- 1\n", "as a whole must be a JSON object"),
        ("", "as a whole must be a JSON object"),
        (
            "preset: quickstrt\nseed: 1\n",
            "preset 'quickstrt' is unknown; did you mean 'quickstart'",
        ),
        ("seed: 1\n", "no preset to take it from"),
    ],
)
def test_yaml_that_does_not_fit_is_a_line(tmp_path, text, part):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    fails(lambda: arguments.read_arguments(arguments.UNLEARN, ["--config", str(path)]), part)


def test_a_short_file_is_filled_by_its_preset(tmp_path):
    """Another method keeps its own options; a number with an exponent is one."""
    path = tmp_path / "run.yml"
    lines = ("preset: quickstart", "seed: 3", "objective: {name: npo, beta: 2e-1}")
    path.write_text("\n".join([*lines, "unlearn: {steps: 7}", ""]))
    argv = ["quickstart", "--seed", "3", "--objective.name", "npo", "--objective.beta", ".2"]
    wanted = arguments.read_arguments(arguments.UNLEARN, [*argv, "--unlearn.steps", "7"])
    assert arguments.read_arguments(arguments.UNLEARN, ["--config", str(path)]) == wanted


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
@pytest.mark.parametrize(
    ("program", "argv"),
    [
        (arguments.UNLEARN, ["quickstart", "--optimizer.name", "sift", "--data.forget", "a", "b"]),
        (arguments.PRETRAIN, ["pretrain-tiny", "--seed", "4"]),
    ],
)
def test_a_configuration_is_saved_and_read_again(tmp_path, capsys, program, argv, name):
    path = tmp_path / "new" / name
    with pytest.raises(SystemExit) as stop:
        arguments.read_arguments(program, [*argv, "--save-config", str(path)])
    assert stop.value.code == 0 and f"--config {path}" in capsys.readouterr().out
    again = arguments.read_arguments(program, ["--config", str(path)])
    assert again == arguments.read_arguments(program, argv)
    fails(lambda: arguments.read_arguments(program, [*argv, f"--save_config={path}"]), "exists")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["quickstart", "--save-config"], "needs a file"),
        (["quickstart", "--save-config", "--seed"], "needs a file"),
        (["--save-config", "a.yaml"], "give a preset first"),
        (["quickstart", "--save-config", "a.txt"], "ends in .yaml or .json"),
    ],
)
def test_a_configuration_that_cannot_be_saved(argv, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(lambda: arguments.read_arguments(arguments.UNLEARN, argv), part)
    assert not [*tmp_path.iterdir()]


def test_rerun_of_a_configuration(tmp_path):
    first = arguments.read_arguments(
        arguments.UNLEARN, ["quickstart", "--seed", "3", "--objective.push", "0"]
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(first)))
    assert arguments.read_arguments(arguments.UNLEARN, ["--config", str(path)]) == first
    second = arguments.read_arguments(
        arguments.UNLEARN, ["--config", str(path), "--seed", "4", "--output", "elsewhere"]
    )
    assert second == dataclasses.replace(first, seed=4, output=Path("elsewhere"))
    smoke = arguments.read_arguments(arguments.UNLEARN, ["--config", str(path), "--smoke"])
    assert smoke.smoke and smoke.finetune.steps == PRESETS["quickstart"].SMOKE["finetune.steps"]
    other = arguments.read_arguments(
        arguments.UNLEARN, ["--config", str(path), "--objective.name", "npo"]
    )
    assert other.objective == objective_of("npo")
    fails(
        lambda: arguments.read_arguments(arguments.UNLEARN, ["--config", str(path), "--sed", "4"]),
        "--seed",
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_another_objective_drops_the_presets_tuning(preset, name):
    default = PRESETS[preset].PRESET
    config = arguments.read_arguments(arguments.UNLEARN, [preset, "--objective.name", name])
    if name == default.objective.name:
        assert config.objective == default.objective
    else:
        known = getattr(PRESETS[preset], "OBJECTIVES", {})
        assert config.objective == known.get(name, objective_of(name))
        assert type(config.objective) is OBJECTIVES[name].options
    assert config.optimizer == default.optimizer and config.data == default.data
    # Options on the command line win, in either order.
    weight = arguments.read_arguments(
        arguments.UNLEARN, [preset, f"--objective.name={name}"]
    ).objective
    assert weight == config.objective


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_optimizer_brings_the_presets_options_for_it(preset, name):
    default = PRESETS[preset].PRESET
    config = arguments.read_arguments(arguments.UNLEARN, [preset, "--optimizer.name", name])
    assert config.optimizer.name == name and config.objective == default.objective
    known, changes = getattr(PRESETS[preset], "OPTIMIZERS", {}).get(name, (None, {}))
    if name == default.optimizer.name:
        assert config == default
    elif known is not None:
        assert config == replace(default, optimizer=known, **changes)
    elif OPTIMIZERS[name].learning_rate is not None:
        assert config.optimizer.learning_rate == OPTIMIZERS[name].learning_rate
    else:
        assert config.optimizer == other(default.optimizer, name)
    # Options on the command line win.
    rate = arguments.read_arguments(
        arguments.UNLEARN, [preset, "--optimizer.name", name, "--optimizer.learning-rate", "0.5"]
    )
    assert rate.optimizer == replace(config.optimizer, learning_rate=0.5)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--seed ten", "--seed takes a whole number, got 'ten'"),
        ("--unlearn.steps 1.5", "--unlearn.steps takes a whole number or None, got '1.5'"),
        ("--optimizer.learning-rate fast", "--optimizer.learning-rate takes a number, got 'fast'"),
        ("--data.forget", "option --data.forget needs a value; give one or more, or leave it out"),
        ("--data.forget --smoke", "option --data.forget needs a value"),
    ],
)
def test_a_value_of_another_kind_is_said_in_words(program, argv, says):
    done = program("train.unlearn", "quickstart", *argv.split())
    assert done.code == 2 and done.err.startswith(f"error: {says}") and done.err.count("\n") == 1


@pytest.mark.parametrize("option", ["--model.path", "--stage.original"])
def test_another_model_drops_what_is_tuned_for_the_presets_blocks(option):
    assert PRESETS["tofu-smollm2"].OBJECTIVES["asu"].layers
    for name in PRESETS:
        config = arguments.read_arguments(
            arguments.UNLEARN, [name, option, "folder", "--objective.name", "asu"]
        )
        assert config.objective == objective_of("asu")


def test_a_given_original_is_asked_for_no_other_answers():
    preset = PRESETS["tofu-smollm2"].PRESET
    assert preset.objective.name == "alternate"
    assert (
        arguments.read_arguments(arguments.UNLEARN, ["tofu-smollm2", "--model.path", "x"]).objective
        == preset.objective
    )
    given = ["tofu-smollm2", "--stage.original", "x"]
    assert arguments.read_arguments(arguments.UNLEARN, given).objective == objective_of("asu")
    asked = arguments.read_arguments(arguments.UNLEARN, [*given, "--objective.name", "alternate"])
    assert asked.objective == preset.objective
    both = arguments.read_arguments(
        arguments.UNLEARN, ["quickstart", "--stage.original", "x", "--data.forget", "f.csv"]
    )
    assert both.objective == objective_of("asu")  # rows of one's own may bring no other answers


def test_options_beside_another_objective_count():
    config = arguments.read_arguments(
        arguments.UNLEARN, ["quickstart", "--objective.beta", "0.3", "--objective.name", "npo"]
    )
    assert config.objective == objective_of("npo", beta=0.3)
    fails(
        lambda: arguments.read_arguments(
            arguments.UNLEARN, ["quickstart", "--objective.name", "npoo"]
        ),
        "'npo'",
    )


@pytest.mark.parametrize("name", PRESETS)
def test_smoke_shrinks_and_overrides_win(name):
    preset = PRESETS[name]
    config = arguments.read_arguments(arguments.UNLEARN, [name, "--smoke", "--unlearn.steps", "17"])
    assert config.smoke and config.unlearn.steps == 17
    assert config == replace(preset.PRESET, smoke=True, **{**preset.SMOKE, "unlearn.steps": 17})
    assert not arguments.read_arguments(arguments.UNLEARN, [name]).smoke


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
    ("argv", "cls", "default"),
    [
        ("train.unlearn quickstart", RunConfig, QUICKSTART),
        (
            "train.unlearn quickstart --objective.name npo --optimizer.name zo-muon",
            RunConfig,
            replace(QUICKSTART, **{"objective.name": "npo", "optimizer.name": "zo-muon"}),
        ),
        ("train.finetune", FinetuneRun, FinetuneRun()),
        ("train.evaluate", EvaluateRun, EvaluateRun()),
        ("train.plan quickstart", PlanConfig, PlanConfig(**vars(QUICKSTART))),
    ],
)
def test_help_names_every_option_once_and_says_something_about_it(
    program, narrow, argv, cls, default
):
    done = program(*argv.split(), "--help")
    assert done.code == 0 and done.err == ""
    shown = OPTION.findall(done.out)
    assert sorted(shown) == sorted(o.name for o in options(cls, default))
    assert set(shown) <= set(known_words(cls))
    silent = [o.name for o in options(cls, default) if not o.text]
    assert silent == []


def test_every_row_says_something_about_every_option():
    for rows in (OBJECTIVE, OPTIMIZER):
        for row in rows.table.values():
            fields = dataclasses.fields(row.options)
            assert all(field.metadata["doc"] for field in fields), row.name


def test_help_begins_with_the_options_used_first(program, narrow):
    text = program("train.unlearn", "quickstart", "--help").out
    panels = re.findall(r"^ (\w.*?) options +$", text, re.MULTILINE)
    assert panels[:4] == ["most used", "run", "data", "model"]
    assert len(FIRST) == 20 and set(FIRST) <= set(known_words(RunConfig))
    first = text[text.index("most used options") : text.index("run options")]
    assert OPTION.findall(first) == FIRST
    assert "(default: 0.0005)" in first  # the preset's own values


def test_help_lists_the_words_of_an_option(program, narrow):
    flat = " ".join(program("train.unlearn", "quickstart", "--help").out.split())
    listed = {o.name: o.words for o in options(RunConfig, QUICKSTART) if o.words}
    for name, known in listed.items():
        assert f"{name} {{{','.join(known)}}}" in flat.replace(", ", ","), name
    assert "--objective.retain {nll,kl,none}|None" in flat
    assert set(listed) == set(
        "--data.source --model.dtype --model.remat --objective.name --objective.retain "
        "--objective.compat --objective.reference --optimizer.name --optimizer.schedule "
        "--optimizer.state-dtype --finetune.optimizer.name --finetune.optimizer.schedule "
        "--finetune.optimizer.state-dtype --combine --lora.targets --evaluate.judge "
        "--evaluate.leak-question --export-dtype --report-to".split()
    )
    for name, known in {
        "--objective.name": OBJECTIVES,
        "--optimizer.name": OPTIMIZERS,
        "--finetune.optimizer.name": OPTIMIZERS,
        "--combine": COMBINERS,
        "--objective.compat": OBJECTIVES[QUICKSTART.objective.name].compat,
    }.items():
        assert listed[name] == tuple(known)


def test_the_words_of_an_option_are_those_of_every_row():
    known = known_words(RunConfig)
    assert known["--finetune.optimizer.schedule"] == known["--optimizer.schedule"]
    assert known["--seed"] == known["--data.path"] == ()
    assert known["--optimizer.bases"] and known["--optimizer.comm-dtype"]
    forms = {form for row in OBJECTIVES.values() for form in row.compat}
    assert set(known["--objective.compat"]) == forms
    # Each is accepted.
    for word in known["--optimizer.schedule"]:
        build(optimizer_of("adamw", schedule=word), 3)
    for word in known["--objective.retain"]:
        name = "rmu" if word == "hidden" else "graddiff"
        found = parse("--objective.name", name, "--objective.retain", word)
        assert found.objective.retain == word


# The options of the rows in use.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--optimizer.rank 8", "--optimizer.rank 8: adamw does not read it; its own are b1, b2"),
        ("--optimizer.rank=8", "--optimizer.rank 8: adamw does not read it"),
        ("--finetune.optimizer.group_size 2", "--finetune.optimizer.group-size 2: adamw does not"),
        ("--optimizer.name muon --optimizer.rank 8", "muon does not read it; its own are"),
        ("--objective.temperature 3", "objective 'alternate' does not use temperature; it takes"),
        ("--objective.delta 1 --objective.name npo", "objective 'npo' does not use delta"),
        ("--objective.name nll --objective.beta 1", "'nll' does not use beta; it takes no options"),
        ("--optimizer.name muom", "optimizer 'muom' is unknown; did you mean 'muon'?"),
        ("--objective.name npo --objective.name asu", "--objective.name is npo and asu; give it"),
        ("--objective.name npoo", "unknown objective 'npoo'; did you mean 'npo'?"),
    ],
)
def test_an_option_of_another_row_is_refused(args, message):
    fails(lambda: parse(*args.split()), message)


def test_the_names_on_the_command_line_choose_the_options():
    config = parse(
        *"--optimizer.rank 8 --optimizer.name=sift --finetune.optimizer.name teon".split(),
        *"--finetune.optimizer.group-size 4 --objective.name asu --objective.layers 1".split(),
    )
    assert config.optimizer == replace(other(QUICKSTART.optimizer, "sift"), rank=8)
    assert config.finetune.optimizer.group_size == 4
    assert config.finetune.optimizer.learning_rate == QUICKSTART.finetune.optimizer.learning_rate
    assert config.objective == objective_of("asu", layers=(1,))


def test_files_name_the_rows_whose_options_they_have(tmp_path):
    path = tmp_path / "config.json"

    def read(objective, optimizer):
        whole = to_json(QUICKSTART) | {"objective": objective, "optimizer": optimizer}
        path.write_text(json.dumps(whole))
        return config_files.read_config(RunConfig, path)

    found = read({"name": "asu", "temperature": 3.0, "layers": [1]}, {"name": "sift", "rank": 9})
    assert found.objective == objective_of("asu", temperature=3.0, layers=(1,))
    assert found.optimizer == optimizer_of("sift", rank=9)
    assert cli.from_json(RunConfig, json.loads(json.dumps(to_json(found)))) == found
    fails(lambda: read({"name": "npo", "delta": 0.5}, {"name": "muon"}), "'npo' does not use delta")
    fails(lambda: read({"name": "npo"}, {"name": "muon", "rank": 8}), "muon does not read it")
    fails(lambda: read({"name": "npoo"}, {"name": "muon"}), "did you mean 'npo'")
    fails(lambda: read({"name": "npo", "gamma": 1.0}, {"name": "muon"}), "unknown entry 'gamma'")


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
    # Errors that are not the user's keep their traceback.
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


def test_the_last_value_of_a_python_shell_may_be_anything(repo):
    """`builtins._` looks hashable and is not, as in a shell after `([1],)`, and stays as it is."""
    code = (
        "import builtins; builtins._ = ([1],); "
        "from train.presets.arguments import read_arguments; "
        "config = read_arguments('train.unlearn', ['quickstart', '--seed', '3']); "
        "assert config.seed == 3; assert _ == ([1],)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], cwd=repo, env=environment, check=True)
