"""Unlearn a language model: original, oracle, unlearned, evaluated, reported, exported.

python -m train.unlearn quickstart
python -m train.unlearn tofu-smollm2 --data.path DIR
python -m train.unlearn tofu-smollm2 --data.forget FILE --data.retain FILE  (your own rows)
python -m train.unlearn quickstart-documents --data.forget FILES --data.retain FILES     (texts)
python -m train.unlearn --example-data DIR                           (such files, to start from)
python -m train.unlearn --config RUN/config.json --output DIR        (reruns a configuration)
python -m train.unlearn --help (presets)    PRESET --help (options)    --list (methods)
"""

from __future__ import annotations

import shlex
from pathlib import Path

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from train.options import cli, start
from train.options.config import RunConfig
from train.options.optimizers import list_combiners, list_optimizers
from train.presets import PRESETS
from train.presets.unlearning_arguments import read_arguments
from train.runtime.tracking import say


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        start.show_presets(__doc__, PRESETS)
        return
    if argv[0] == "--list":
        print("\n".join(list_methods()))
        return
    if argv[0].partition("=")[0] == "--example-data":
        show_examples(argv)
        return
    run(read_arguments(argv))


def show_examples(argv: list[str]) -> None:
    """Write example files, and say what to do with them."""
    from train.data.files import write_examples

    folder = cli.option_value(argv, "--example-data")
    if not folder or len(argv) != 2 - ("=" in argv[0]):
        raise UserError("--example-data takes one folder, to write example files to")
    made = write_examples(Path(folder).expanduser())
    for path in made:
        print(path)
    for preset, suffix in (("quickstart", ".csv"), ("quickstart-documents", ".txt")):
        forget, retain = (shlex.quote(str(path)) for path in made if path.suffix == suffix)
        print(f"python -m train.unlearn {preset} --data.forget {forget} --data.retain {retain}")


def list_methods() -> list[str]:
    """Lines that name every objective, optimizer and combiner."""
    return [
        "Objectives (--objective.name), the data they take, what they ask a frozen model:",
        *objectives.list_objectives(),
        "Optimizers (--optimizer.name), and what a step sees of the loss:",
        *list_optimizers(),
        "Combiners of the forget and the retain gradient (--combine), for optimizers that see one:",
        *list_combiners(),
    ]


def run(config: RunConfig) -> Path:
    """Run all stages of a configuration and return the run folder, which it holds meanwhile."""
    from train.jobs.unlearning import pipeline

    with pipeline.opened(config) as opened:
        run, task, base, retain_log = opened
        found = {}

        # 1. The model that knows, and the model that never knew. Models wait in host memory.
        knows = task.forget + task.retain
        found["original"] = base
        if config.stage.original is None:
            found["original"] = pipeline.finetune(run, config, "original", base, knows).to_host()
        if config.oracle and retain_log is None and config.stage.original is None:
            oracle = pipeline.finetune(run, config, "oracle", base, task.retain, knows)
            found["oracle"] = oracle.to_host()
        elif config.oracle and retain_log is None:
            say(
                "oracle: trained from the same start is not possible with --stage.original; give "
                "--retain-log to compare"
            )

        # 2. Forget.
        forgets = pipeline.find_alternates(run, config, base, task)
        forgets = pipeline.find_traces(run, config, found["original"], forgets)
        found["unlearned"] = pipeline.unlearn(run, config, found["original"], forgets).to_host()

        # 3. Judge all of them alike.
        judged = pipeline.judge(run, config, opened, found)

        # 4. Hand it back.
        pipeline.export(run, config, found["unlearned"], judged)
        pipeline.report(run, judged)
        return run.folder


if __name__ == "__main__":
    cli.main(main)
