"""Unlearn a language model: original, oracle, unlearned, evaluated, reported, exported.

python -m train.unlearn quickstart
python -m train.unlearn tofu-smollm2 --data.path DIR
python -m train.unlearn tofu-smollm2 --data.forget FILE --data.retain FILE  (your own rows)
python -m train.unlearn quickstart-documents --data.forget FILES --data.retain FILES     (texts)
python -m train.unlearn --example-data DIR                           (such files, to start from)
python -m train.unlearn --config RUN/config.json --output DIR        (reruns a configuration)
python -m train.unlearn PRESET [OPTIONS] --save-config FILE.yaml     (writes it, and runs nothing)
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
from train.presets import PRESETS, arguments


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
    config = arguments.read_arguments(arguments.UNLEARN, argv)
    run(config, arguments.command(arguments.UNLEARN, config))


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
        of_kind = [shlex.quote(str(path)) for path in made if path.suffix == suffix]
        forget, retain = of_kind[:2]
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


def run(config: RunConfig, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder."""
    from train.jobs import unlearning

    return unlearning.run(config, command)


if __name__ == "__main__":
    cli.main(main)
