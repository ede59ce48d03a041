"""Fine-tune a model to classify, with or without gradients, for a budget of forward passes.

python -m train.classify sst2-smollm2 --data.path DIR
python -m train.classify sst2-smollm2 --task rte                     (another task, from the Hub)
python -m train.classify sst2-smollm2 --task rows --data.path FILE   (rows of your own)
python -m train.classify vit-fashion                                 (images)
python -m train.classify --config RUN/config.json --output DIR       (reruns a configuration)
python -m train.classify --help (presets)    PRESET --help (options)    --list (tasks, optimizers)
"""

from __future__ import annotations

from pathlib import Path

from train.jobs.classification_options import TASKS, ClassifyRun
from train.options import cli, optimizers, start
from train.presets import arguments
from train.presets.classify import PRESETS


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        start.show_presets(__doc__, PRESETS)
        return
    if argv[0] == "--list":
        lines = [f"  {row.name:8} {row.summary}" for row in TASKS.values()]
        methods = optimizers.list_optimizers()
        print("\n".join(["Tasks (--task):", *lines, "Optimizers (--optimizer.name):", *methods]))
        return
    config = arguments.read_arguments(arguments.CLASSIFY, argv)
    arguments.check_start(config)
    run(config, arguments.command(arguments.CLASSIFY, config))


def run(config: ClassifyRun, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder."""
    from train.jobs import classification

    return classification.run(config, command)


if __name__ == "__main__":
    cli.main(main)
