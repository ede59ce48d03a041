"""The command on a run's page reads as that run's configuration again."""

import importlib
import json
import shlex

import pytest

from train.options.config import identity
from train.reporting import rerun

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
PLACES = dict.fromkeys(("unlearn", "diffuse", "classify", "finetune"), "stage.cache")
PLACES |= {"pretrain": "data.cache"}


def stored(line):
    """The program of a command line, and what its run stores as `config.json`."""
    program, *argv = shlex.split(line)
    config = importlib.import_module(rerun.READERS[f"train.{program}"]).read_arguments(argv)
    places = [PLACES[program]] if program in PLACES else []
    return f"train.{program}", json.loads(json.dumps(identity(config, *places)))


@pytest.mark.parametrize("name", RUNS)
def test_the_command_reads_as_the_configuration(name):
    program, config = stored(RUNS[name])
    command = rerun.command(config, program)
    assert command.startswith(f"python -m {program} {config['preset']}")
    again = command.replace("\\\n", "").replace("python -m train.", "")
    assert stored(again) == (program, config)
    assert len(command) < 40 + 2 * len(RUNS[name])  # what differs, not the whole


@pytest.mark.parametrize(
    "changes",
    [{"preset": "of another version"}, {"preset": ""}, {"later": 3}, {"seed": "x"}],
    ids=str,
)
def test_where_no_options_give_it_the_stored_file_is_named(changes):
    _, config = stored("unlearn quickstart")
    assert rerun.command(config | changes) == "python -m train.unlearn --config RUN/config.json"


def test_an_option_that_is_stored_by_its_absence():
    program, config = stored("classify vit-b16-cifar100 --data.no-resize")
    assert "resize" not in config["data"]
    assert rerun.command(config, program) == "python -m train.classify --config RUN/config.json"


def test_a_stored_command_is_repeated_as_it_is():
    assert rerun.command({"command": ["python", "-m", "x", "a b"]}) == "python -m x 'a b'"
