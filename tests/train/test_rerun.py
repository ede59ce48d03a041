"""The command on a run's page reads as that run's configuration again."""

import shlex
from pathlib import Path

import pytest

from train.options.config import replace
from train.presets import arguments
from train.reporting import provenance
from train.reporting.tables import Run

RUNS = {
    "as the preset is": "unlearn quickstart",
    "another seed": "unlearn quickstart --seed 7",
    "smoke": "unlearn tofu-smollm2 --smoke",
    "another optimizer, tuned": "unlearn quickstart --optimizer.name sift --optimizer.rank 3",
    "another objective": "unlearn quickstart --objective.name npo --objective.beta 0.3",
    "a given original": "unlearn tofu-smollm2 --stage.original /some/model --objective.push 2",
    "own rows": "unlearn quickstart --data.forget 'a b.csv' --data.retain keep.csv",
    "flags and lists": "unlearn quickstart --no-oracle --train.leaves mlp/down --train.blocks 1 2",
    "a stage's optimizer": "unlearn quickstart --finetune.optimizer.name muon",
    "nothing in a place": "unlearn quickstart --optimizer.clip-norm None",
    "corpus": "pretrain pretrain-tiny --data.packages scipy pandas --train.tokens 65536",
    "texts": "pretrain gpt-small --data.source text --data.path DIR --data.tokenizer train",
    "its optimizer": "pretrain pretrain-tiny --optimizer.name adamw --optimizer.learning-rate 1e-3",
    "labelled rows": "classify sst2-tiny --task rte --train.forwards 100 --data.path DIR",
    "images": "classify vit-fashion --task images --data.path DIR --start.steps 5 --data.resize",
    "labelled, smoke": "classify sst2-smollm2 --smoke --optimizer.name mezo",
    "a model of images": "diffuse fashion --data.source digits --original.steps 20 --smoke",
    "traces": "finetune epic-tiny --condense.tau 0.3 --condense.policy middle",
    "traces, other rows": "finetune epic-tiny --data.source rows --data.path rows.jsonl --smoke",
}


def config_of(line):
    """The program of a command line, and the configuration that it reads."""
    program, *argv = shlex.split(line)
    return f"train.{program}", arguments.read_arguments(f"train.{program}", argv)


@pytest.mark.parametrize("name", RUNS)
def test_the_command_reads_as_the_configuration(name):
    program, config = config_of(RUNS[name])
    command = arguments.command(program, config)
    assert command.startswith(f"python -m {program} {config.preset}")
    again = command.replace("\\\n", "").replace("python -m train.", "")
    assert tuple(map(str, config_of(again))) == (program, str(config))
    assert len(command) < 40 + 2 * len(RUNS[name])  # what differs, not the whole


@pytest.mark.parametrize("preset", ["of another version", ""])
def test_where_no_options_give_it_the_stored_file_is_named(preset):
    _, config = config_of("unlearn quickstart")
    assert arguments.command("train.unlearn", replace(config, preset=preset)) == ""
    run = Run(Path("run"), {"seed": 0}, {}, about={"program": "train.unlearn", "command": ""})
    assert provenance.command(run) == "python -m train.unlearn --config RUN/config.json"


def test_a_stored_command_is_repeated_as_it_is():
    given = Run(Path("run"), {"command": ["python", "-m", "x", "a b"]}, {})
    assert provenance.command(given) == "python -m x 'a b'"
    assert provenance.command(Run(Path("run"), {}, {}, about={"command": "y --z"})) == "y --z"
