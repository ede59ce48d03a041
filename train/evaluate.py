"""Evaluate a model on a task, with the metrics and logs of a run.

python -m train.evaluate RUN_FOLDER             (judges its unlearned model again, from export/)
python -m train.evaluate HF_FOLDER_OR_GGUF --data.path DIR --output DIR
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import MOST, option
from train.options import cli
from train.options.config import DataConfig, EvaluateConfig, RunConfig, replace, to_json
from train.options.roles import ROLES
from train.presets import tofu_smollm2
from train.reporting.verdict import SMOKE as SMOKE_RUN
from train.runtime.distributed import DistributedConfig
from train.runtime.plain import shown
from train.runtime.sharding import MeshConfig
from train.runtime.tracking import say
from train.tasks import fitting


@dataclass(frozen=True)
class EvaluateRun:
    """One evaluation.

    Args:
        model: set by the first argument.
        smoke: few rows and samples, for a first look.
        output: the folder of `summary.json` and `evals/`; None: `runs/evaluate-NAME`.
        retain_log: per-item log of a retain-only model, for forget quality and privleak.
        data: the questions.
        evaluate: the options of the evaluators.
        mesh: the devices.
        mask_all_pad_id_tokens: the same as `--model.mask-all-pad-id-tokens` of a run.
        distributed: the processes, where there are several.
    """

    model: str = ""
    seed: int = option(0, "of the sampled answers (and of generated data).", low=0, high=MOST)
    smoke: bool = False
    output: Path | None = None
    retain_log: Path | None = None
    data: DataConfig = DataConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    mesh: MeshConfig = MeshConfig()
    mask_all_pad_id_tokens: bool = False
    distributed: DistributedConfig = DistributedConfig()


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
    run(read_arguments(argv))


def read_arguments(argv: list[str]) -> EvaluateRun:
    """The evaluation a command line asks for; a run folder brings its own task and settings."""
    target = Path(argv[0])
    default = EvaluateRun(model=argv[0])
    if (target / "summary.json").exists() and (target / "config.json").exists():
        config = cli.read_config(RunConfig, target / "config.json")
        oracle = target / "evals" / f"{ROLES.reference}.json"
        default = EvaluateRun(
            model=str(target / "export"),
            seed=config.seed,
            smoke=config.smoke,
            output=target / "evaluate",
            retain_log=config.retain_log or (oracle if oracle.exists() else None),
            data=config.data,
            evaluate=config.evaluate,
            mesh=config.mesh,
            mask_all_pad_id_tokens=config.model.mask_all_pad_id_tokens,
        )
    elif argv[0].startswith("-"):
        raise UserError(f"the first argument is a run folder or a model, got {argv[0]!r}")
    if "--smoke" in argv:
        default = replace(default, smoke=True, **SMOKE)
    return cli.parse(EvaluateRun, default, argv[1:], "train.evaluate MODEL", "judge a model")


def run(config: EvaluateRun) -> dict[str, Any]:
    """Judge the model and write `summary.json` and the per-item log."""
    with contextlib.ExitStack() as held:
        return _run(config, held)


def _run(config: EvaluateRun, held: contextlib.ExitStack) -> dict[str, Any]:
    from jaxlib_unlearn.metrics import tofu
    from train.engine import base_models
    from train.evaluators import evaluation
    from train.evaluators.judging import compare_logs, evaluate_cached
    from train.options import checks
    from train.runtime import distributed, files, folder, remote, sharding
    from train.runtime.stages import digest, write_atomic
    from train.tasks import load_task
    from train.tasks.task import prompt_format

    distributed.start(config.distributed)
    distributed.check_same({k: v for k, v in to_json(config).items() if k != "distributed"})
    with distributed.together():
        checks.check_numbers(config)
        mesh = sharding.make_mesh(config.mesh)
        output = config.output or Path("runs") / f"evaluate-{Path(config.model).name}"
        remote.check(output, "--output")
        place = folder.Place(
            output, check_folder, lambda root: distributed.of_first(lambda: create(root))
        )
        folder.claim(place, held)
        if config.retain_log is not None:
            files.check_key(config.retain_log)
        retain = None if config.retain_log is None else tofu.load_log(config.retain_log)
        data = config.data
        layout = prompt_format(data)
        base_models.check_model(config.model)
        task = load_task(RunConfig(seed=config.seed, data=data))
    distributed.check_same({"data": task.digest(), "few_shot": digest(layout.shots)})
    model = base_models.load_model(config.model, "none", mesh)
    model = model._replace(tokenizer=model.tokenizer.formatted(layout))
    if config.mask_all_pad_id_tokens:
        model = base_models.masking_pad_ids(model)
    task = fitting.fit_task(task, model, config)
    root = folder.enter(place, held)
    log = evaluate_cached(config, model, task, None, root, mesh, "model")
    summary = evaluation.summarize(log, retain, model)
    distributed.of_first(lambda: compare_logs(root, {"model": log}, retain))

    def tell() -> None:
        write_atomic(root / "summary.json", json.dumps({"model": summary}, indent=1))
        remote.send(root)
        for name, value in summary.items():
            line = f"{name:34} {value:.6g}" if isinstance(value, float) else f"{name:34} {value}"
            print(shown(line))

    distributed.of_first(tell)
    say(f"summary: {remote.home(root) / 'summary.json'}")
    if config.smoke:
        say(SMOKE_RUN)
    return summary


def create(root: Path) -> None:
    """Make the folder of an evaluation."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {root}: {error.strerror}; give another --output") from None


def check_folder(root: Path) -> bool:
    """Whether the folder of an evaluation is there.

    Raises:
        UserError: a run, a model or somebody's own summary would be written over.
    """
    foreign = (root / "summary.json").exists() and not (root / "evals").is_dir()
    if foreign or (root / "config.json").exists() or (root.exists() and not root.is_dir()):
        raise UserError(
            f"--output {root} is a run, a model or no folder of an evaluation; give another "
            "--output"
        )
    return root.exists()


if __name__ == "__main__":
    cli.main(main)
