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
from train.options.roles import NONE, Roles
from train.presets.diffuse import PRESETS
from train.presets.diffusing_arguments import read_arguments

ROLES = Roles("original", NONE, "original")


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        start.show_presets(__doc__, PRESETS)
        return
    run(read_arguments(argv))


def run(config: DiffuseRun) -> Path:
    """Run all stages of a configuration and return the run folder, which it holds meanwhile."""
    from train.jobs.diffusing import pipeline
    from train.jobs.diffusing.judging import Shown

    check, load = pipeline.check, pipeline.load
    with pipeline.opened(config, "train.diffuse", ROLES, check, load) as opened:
        # 1. A judge of images, then autoencoder, text encoder and denoiser.
        judge, original = pipeline.models(opened)

        # 2. Does it draw what it is asked for?
        shown = {"original": (Shown(original), ("kept",))}
        summary = pipeline.judge(opened, judge, shown, concept=None)

        # 3. Hand it back, and show.
        pipeline.export(opened, original, judge, "A text-to-image model of jaxlib-unlearn.")
        pipeline.report(opened, summary)
        return opened.run.folder


if __name__ == "__main__":
    cli.main(main)
