"""README's Python runs unchanged; its commands and those of RESULTS refer to what exists."""

import re

import pytest

from train.jobs.diffusing.config import AttackRun, DefendRun, EraseRun
from train.jobs.evaluating_options import EvaluateRun
from train.options.choices import known_words
from train.planning.planned import PLANNERS
from train.presets import PRESETS
from train.replay import ReplayRun


def blocks(repo, language):
    return re.findall(rf"```{language}\n(.*?)```", (repo / "README.md").read_text(), re.S)


def test_python_blocks_run(repo):
    found = blocks(repo, "python")
    assert found
    for block in found:
        exec(compile(block, "README.md", "exec"), {})


def test_readme_is_a_page(repo):
    assert len((repo / "README.md").read_text().split()) <= 900


GUIDES = ("recipes", "smaller_memory", "openunlearning", "pod")


@pytest.mark.parametrize(
    "page", ["README.md", "RESULTS.md", *(f"colab/site/{name}.md" for name in GUIDES)]
)
def test_commands_exist(repo, page):
    text = (repo / page).read_text()
    programs = set(re.findall(r"python -m (train\.\w+)", text))
    assert programs and all((repo / f"{p.replace('.', '/')}.py").exists() for p in programs)
    presets = set(re.findall(r"train\.unlearn ([a-z][\w-]*)", text))
    assert presets and presets <= set(PRESETS)
    known = {"--list", "--help", "--config", "--save-config", "--push-to-hub", "--only"}
    configs = [
        *(row.config for row in PLANNERS.values()),
        EraseRun,
        AttackRun,
        DefendRun,
        ReplayRun,
        EvaluateRun,
    ]
    known = known.union(*map(known_words, configs))
    known |= (
        {"--example-data", "--html", "--csv", "--attack"}
        | {"--model", "--dtype", "--dry-run", "--topology"}
        | {"--eval", "--config-name"}  # of OpenUnlearning
        | {"--repeats", "--huge-pages-for-both", "--worker", "--command"}
        | {
            "--data",
            "--text",
            "--seeds",
            "--concepts",
            "--methods",
            "--tune",
            "--factors",
            "--shape",
        }  # of benchmarks
        | {"--no-oracle", "--no-erase.again"}  # switched off
        | {
            "--nodes",
            "--ntasks-per-node",
            "--gpus-per-task",
        }
    )
    assert set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", text)) <= known
