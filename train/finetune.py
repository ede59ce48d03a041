"""Fine-tune a model: on traces that are condensed first (a preset), or on rows of your own.

python -m train.finetune epic-tiny                                 (no download, minutes)
python -m train.finetune epic-tiny --condense.tau 1                (whole traces)
python -m train.finetune epic-tiny --condense.policy middle --condense.cost-matched
python -m train.finetune epic-gsm8k-smollm2 --data.path DIR
python -m train.finetune --config RUN/config.json --output DIR     (reruns a preset's configuration)
python -m train.finetune HF_FOLDER_OR_GGUF ROWS.json --output DIR  (rows with question and answer)
python -m train.finetune PRESET --help (options)    MODEL ROWS --help (those of your own rows)
"""

from __future__ import annotations

import difflib
from pathlib import Path

from jaxlib_unlearn.errors import UserError
from train.jobs.finetuning_options import FinetuneRun, ReasoningRun
from train.options import cli, start
from train.options.config import replace
from train.presets import arguments
from train.presets.epic import PRESETS


def main(argv: list[str]) -> None:
    """The program: a known preset's name comes first, or a model and a file of rows."""
    if argv and (argv[0] in PRESETS or argv[0] == "--config"):
        config = arguments.read_arguments(arguments.FINETUNE, argv)
        run(config, arguments.command(arguments.FINETUNE, config))
        return
    asked = bool({"-h", "--help"} & {*argv[:2]})
    if asked or not argv:
        start.show_presets(__doc__, PRESETS)
        if asked:
            cli.parse(
                FinetuneRun, FinetuneRun(), ["--help"], "train.finetune MODEL ROWS", "options"
            )
            return
    if len(argv) < 2 or argv[1].startswith("--"):
        near = difflib.get_close_matches(argv[0], PRESETS, 1, 0.6) if argv else []
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            "two arguments are needed: a model and a JSON file of rows; or the name of a preset "
            f"({', '.join(PRESETS)}){meant}"
        )
    from train.jobs import own_rows

    default = FinetuneRun(model=argv[0], rows=argv[1])
    if "--smoke" in argv:
        default = replace(default, smoke=True, **{"train.steps": 3})
    config = cli.parse(
        FinetuneRun, default, argv[2:], "train.finetune MODEL ROWS", "fine-tune a model"
    )
    own_rows.run(config)


def run(config: ReasoningRun, command: str = "") -> Path:
    """Run all stages of a preset's configuration and return the run folder."""
    from train.jobs import finetuning

    return finetuning.run(config, command)


if __name__ == "__main__":
    cli.main(main)
