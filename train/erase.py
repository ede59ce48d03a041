"""Erase a concept from a text-to-image model, and judge the model before and after.

python -m train.erase fashion --erase.concept sneaker --erase.method uce  (trains the model first)
python -m train.erase runs/fashion-seed0 --erase.concept sneaker          (RUN: of train.diffuse)
python -m train.erase RUN --erase.method rece|esd|finetune
python -m train.erase RUN --erase.method esd --optimizer.name muon --combine blur
python -m train.erase --config RUN/config.json --output DIR               (reruns a configuration)
python -m train.erase --list (methods)    --help (presets)    PRESET --help (options)
"""

from __future__ import annotations

from pathlib import Path

from train.jobs.diffusing.config import EraseRun
from train.options import cli, start
from train.presets import arguments
from train.presets.diffuse import PRESETS
from train.presets.run_arguments import list_methods
from train.tasks.erasure import ERASING


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        start.show_presets(__doc__, PRESETS)
        return
    if argv[0] == "--list":
        print("\n".join(list_methods("--erase.method", ERASING)))
        return
    config = arguments.read_arguments(arguments.ERASE, argv)
    run(config, arguments.command(arguments.ERASE, config))


def run(config: EraseRun, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder."""
    from train.jobs.diffusing import erasing

    return erasing.run(config, command)


if __name__ == "__main__":
    cli.main(main)
