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

from train.jobs.classification.config import TASKS, ClassifyRun
from train.options import cli, optimizers, start
from train.presets.classification_arguments import check_start, read_arguments
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
    config = read_arguments(argv)
    check_start(config)
    run(config)


def run(config: ClassifyRun) -> Path:
    """Run all stages of a configuration and return the run folder, which it holds meanwhile."""
    from train.jobs.classification import pipeline

    with pipeline.opened(config) as opened:
        # 1. Train the model to start from, where it is not a given one.
        opened = pipeline.begin(config, opened)

        # 2. Learn the task, for as many forward passes as the budget has.
        finetuned = pipeline.finetune(config, opened)

        # 3. Judge the model before and after alike.
        models = {"base": opened.base, "finetuned": finetuned.model}
        summary = pipeline.judge(config, opened, models)

        # 4. Hand it back.
        pipeline.export(config, opened, finetuned)
        pipeline.report(opened, summary, finetuned.cost)
        return opened.run.folder


if __name__ == "__main__":
    cli.main(main)
