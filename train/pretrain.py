"""Train a language model from random weights: tokenised, trained, judged, exported, reported.

python -m train.pretrain pretrain-tiny                       (no download, minutes on a laptop)
python -m train.pretrain pretrain-tiny --data.source text --data.path FOLDER  (your own texts)
python -m train.pretrain pretrain-tiny --optimizer.name muon --seed 1
python -m train.pretrain --config RUN/config.json --output DIR     (reruns a configuration)
python -m train.report RUN RUN ... --html FILE                     (validation loss over tokens)
python -m train.pretrain --help (presets)    PRESET --help (options)
"""

from __future__ import annotations

from pathlib import Path

from train.jobs.pretraining_options import PretrainConfig
from train.options import cli, start
from train.presets import arguments
from train.presets.pretraining import PRESETS


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        start.show_presets(__doc__, PRESETS)
        return
    config = arguments.read_arguments(arguments.PRETRAIN, argv)
    run(config, arguments.command(arguments.PRETRAIN, config))


def run(config: PretrainConfig, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder."""
    from train.jobs import pretraining

    return pretraining.run(config, command)


if __name__ == "__main__":
    cli.main(main)
