"""Evaluate a model on a task: the metrics, logs, verdict and page that a run ends with.

python -m train.evaluate RUN_FOLDER             (judges its unlearned model again, from export/)
python -m train.evaluate HF_FOLDER_OR_GGUF --data.path DIR --output DIR
"""

from __future__ import annotations

import shlex
from pathlib import Path

from jaxlib_unlearn.errors import UserError
from train.jobs.evaluating_options import EvaluateRun
from train.options import cli, config_files
from train.options.config import RunConfig, replace
from train.options.roles import ROLES
from train.presets import tofu_smollm2

# The options that the TOFU preset shrinks, without its training.
SMOKE = {
    name: value
    for name, value in tofu_smollm2.SMOKE.items()
    if name.startswith(("data.", "evaluate."))
}


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        if argv:
            cli.parse(EvaluateRun, EvaluateRun(), ["--help"], "train.evaluate MODEL", "options")
        return
    run(read_arguments(argv), shlex.join(["python", "-m", "train.evaluate", *argv]))


def read_arguments(argv: list[str]) -> EvaluateRun:
    """The evaluation a command line asks for; a run folder brings its own task and settings."""
    target, smoke = Path(argv[0]), "--smoke" in argv
    default = EvaluateRun(model=argv[0])
    if (target / "summary.json").exists() and (target / "config.json").exists():
        config = config_files.read_config(RunConfig, target / "config.json")
        oracle = target / "evals" / f"{ROLES.reference}.json"
        fewer = smoke and not config.smoke
        default = EvaluateRun(
            model=str(target / "export"),
            seed=config.seed,
            smoke=config.smoke,
            output=target / ("evaluate-smoke" if fewer else "evaluate"),
            # The oracle answered all rows, of which a smoke run asks some.
            retain_log=config.retain_log or (oracle if oracle.exists() and not fewer else None),
            data=config.data,
            evaluate=config.evaluate,
            mesh=config.mesh,
            mask_all_pad_id_tokens=config.model.mask_all_pad_id_tokens,
        )
    elif argv[0].startswith("-"):
        raise UserError(f"the first argument is a run folder or a model, got {argv[0]!r}")
    if smoke and not default.smoke:  # a smoke run is judged as it was
        default = replace(default, smoke=True, **SMOKE)
    return cli.parse(EvaluateRun, default, argv[1:], "train.evaluate MODEL", "judge a model")


def run(config: EvaluateRun, command: str = "") -> Path:
    """Judge the model and return the folder of its logs, metrics and page."""
    from train.jobs import evaluating

    return evaluating.run(config, command)


if __name__ == "__main__":
    cli.main(main)
