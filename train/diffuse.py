"""Train a small Stable Diffusion: a judge, an autoencoder, and the text-to-image model.

python -m train.diffuse fashion                               (Fashion-MNIST)
python -m train.diffuse fashion --smoke                       (drawn shapes, no file)
python -m train.diffuse fashion --data.path DIR               (IDX files that lie elsewhere)
python -m train.diffuse fashion --data.source digits          (scikit-learn's digits)
python -m train.diffuse sd14 --model.path DIR --data.path DIR (a given model is judged)
python -m train.diffuse --config RUN/config.json --output DIR (reruns a configuration)
python -m train.diffuse --help (presets)    PRESET --help (options)
"""

from __future__ import annotations

from pathlib import Path

from train.jobs.diffusing.config import DiffuseRun
from train.options import cli, start
from train.presets import arguments
from train.presets.diffuse import PRESETS


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        start.show_presets(__doc__, PRESETS)
        return
    config = arguments.read_arguments(arguments.DIFFUSE, argv)
    run(config, arguments.command(arguments.DIFFUSE, config))


def run(config: DiffuseRun, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder."""
    from train.jobs import diffusion

    return diffusion.run(config, command)


if __name__ == "__main__":
    cli.main(main)
