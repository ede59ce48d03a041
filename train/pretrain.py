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

from train.jobs.pretraining.config import PretrainConfig
from train.options import cli, start
from train.presets.pretraining import PRESETS
from train.presets.pretraining_arguments import read_arguments


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        start.show_presets(__doc__, PRESETS)
        return
    run(read_arguments(argv))


def run(config: PretrainConfig) -> Path:
    """Run all stages of a configuration and return the run folder, which it holds meanwhile."""
    from train.jobs.pretraining import pipeline

    with pipeline.opened(config) as opened:
        # 1. Train: the corpus is tokenised, the model has random weights.
        trained = pipeline.train(opened)

        # 2. Judge, hand it back, and show.
        summary = pipeline.judge(opened, trained)
        pipeline.export(opened, trained, summary)
        pipeline.report(opened, summary)
        return opened.run.folder


if __name__ == "__main__":
    cli.main(main)
