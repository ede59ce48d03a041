"""Defend a model against attack tokens: their span is taken out of its token embeddings.

python -m train.defend RUN ATTACK                            (RUN: of train.erase; ATTACK: on it)
python -m train.defend RUN ATTACK --defend.where table       (in the vocabulary alone)
python -m train.defend RUN ATTACK --defend.tokens 1          (the first of its tokens alone)
python -m train.defend --config RUN/config.json --output DIR (reruns a configuration)
python -m train.defend RUN ATTACK --help                     (options)
"""

from __future__ import annotations

from pathlib import Path

from train.jobs.diffusing.config import DefendRun
from train.options import cli
from train.presets import arguments


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    config = arguments.read_arguments(arguments.DEFEND, argv)
    run(config, arguments.command(arguments.DEFEND, config))


def run(config: DefendRun, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder."""
    from train.jobs.diffusing import defending

    return defending.run(config, command)


if __name__ == "__main__":
    cli.main(main)
