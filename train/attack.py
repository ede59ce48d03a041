"""Attack a model from which a concept was erased: find tokens that make it draw the concept again.

python -m train.attack RUN --attack subattack                  (RUN: of train.erase or train.defend)
python -m train.attack RUN --attack.tokens 5 --attack.form project --attack.steps 300
python -m train.attack RUN --attack none|cce|words|random      (to compare with)
python -m train.attack RUN --attack.transfer RUN2              (the same tokens on another model)
python -m train.attack RUN2 --attack given --attack.source ATTACK   (tokens that ATTACK found)
python -m train.attack --config RUN/config.json --output DIR   (reruns a configuration)
python -m train.attack --list (attacks)    RUN --help (options)
"""

from __future__ import annotations

from pathlib import Path

from train.jobs.diffusing.config import AttackRun
from train.options import cli
from train.presets import arguments
from train.presets.run_arguments import list_methods
from train.tasks.erasure import ATTACKS


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if argv[0] == "--list":
        print("\n".join(list_methods("--attack", ATTACKS)))
        return
    config = arguments.read_arguments(arguments.ATTACK, argv)
    run(config, arguments.command(arguments.ATTACK, config))


def run(config: AttackRun, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder."""
    from train.jobs.diffusing import attacking

    return attacking.run(config, command)


if __name__ == "__main__":
    cli.main(main)
