"""Unlearn a language model: original, oracle, unlearned, evaluated, reported, exported.

python -m train.unlearn quickstart
python -m train.unlearn tofu-smollm2 --data.path DIR
python -m train.unlearn --config RUN/config.json --output DIR        (reruns a configuration)
python -m train.unlearn --help (presets)    PRESET --help (options)    --list (methods)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from train import cli, distributed, optimizers, remote
from train.config import RunConfig, replace, to_json
from train.optimizers import OPTIMIZERS, list_combiners, list_optimizers
from train.presets import PRESETS
from train.stages import digest, write_atomic
from train.tracking import Tracker, say


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        print("Presets:")
        for name, preset in PRESETS.items():
            print(f"  {name:14} {preset.SUMMARY}")
        return
    if argv[0] == "--list":
        print("\n".join(list_methods()))
        return
    run(read_arguments(argv))


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


def read_arguments(
    argv: list[str], cls: type[RunConfig] = RunConfig, program: str = "train.unlearn"
) -> Any:
    """The configuration of a command line: a preset, or `--config FILE`, with overrides.

    `cls` may be a configuration with more options, those of another `program`.
    """
    if argv[0] == "--config":
        if len(argv) < 2:
            raise UserError("--config needs the config.json of a run")
        default = cli.read_config(RunConfig, Path(argv[1]))
        preset, rest = PRESETS.get(default.preset), argv[2:]
        prog, summary = f"{program} --config FILE", f"rerun the configuration {argv[1]}"
    elif argv[0].startswith("-"):
        raise UserError(f"the first argument is a preset ({', '.join(PRESETS)}), got {argv[0]!r}")
    else:
        preset = cli.choose(argv[0], PRESETS, "preset")
        default, rest = preset.PRESET, argv[1:]
        prog, summary = f"{program} {argv[0]}", preset.SUMMARY
    name = cli.option_value(rest, "--objective.name")
    if name is not None and name != default.objective.name:
        # Options tuned for the objective at hand mean nothing to another one.
        objective, _ = objectives.resolve(name)
        suited = preset.OBJECTIVES if preset is not None else {}
        default = replace(
            default,
            objective=suited.get(objective.name, objectives.ObjectiveConfig(objective.name)),
        )
    name = cli.option_value(rest, "--optimizer.name")
    if name is not None and name != default.optimizer.name:
        default = with_optimizer(default, name, preset)
    other = any(cli.option_value(rest, m) for m in ("--model.path", "--stage.original"))
    if other and preset is not None and default.objective in preset.OBJECTIVES.values():
        # Blocks and temperatures tuned for the preset's model mean nothing to another one.
        default = replace(default, objective=objectives.ObjectiveConfig(default.objective.name))
    if "--smoke" in rest and preset is not None:
        default = replace(default, smoke=True, **preset.SMOKE)
        fitted = optimizers.fitted(default.optimizer, default.unlearn.steps or 1)
        default = replace(default, optimizer=fitted)
    fields = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
    return cli.parse(cls, cls(**fields), rest, prog, summary)


def with_optimizer(config: RunConfig, name: str, preset: Any) -> RunConfig:
    """The configuration with another optimizer: as the preset suits it, else its row's own rate."""
    row = cli.choose(name, OPTIMIZERS, "optimizer")
    optimizer, changes = getattr(preset, "OPTIMIZERS", {}).get(row.name, (None, {}))
    if optimizer is None:
        optimizer = replace(config.optimizer, name=row.name)
        if row.learning_rate is not None:
            optimizer = replace(optimizer, learning_rate=row.learning_rate)
    return replace(config, optimizer=optimizer, **changes)


def run(config: RunConfig) -> Path:
    """Run all stages of a configuration and return the run folder."""
    from train import evaluation, pipeline, report

    started = time.monotonic()
    distributed.start(config.distributed)
    task, base, mesh, retain_log = prepare(config)
    base = base.parked()  # as every model while it waits: a step has the device to itself
    root = open_run(config)
    tracker = Tracker(root, config.tensorboard)
    size = evaluation.num_parameters(base.params) / 1e6
    where = remote.home(root)
    say(f"{config.preset}: {size:.1f} M parameters, seed {config.seed}, run folder {where}")
    for note in task.notes:
        say(f"  {note}")
    minutes = read_minutes(root)  # of the same run before it was stopped, or run again
    earlier = minutes.get("all", 0.0)

    def timed(name: str, since: float) -> None:
        now = time.monotonic()
        minutes[name] = minutes.get(name, 0.0) + (now - since) / 60
        minutes["all"] = earlier + (now - started) / 60
        distributed.of_first(lambda: write_about(root, minutes, task.notes))
        distributed.stop_point()

    # 1. The model that knows, and the model that never knew.
    clock = time.monotonic()
    original = base
    if config.stage.original is None:
        original = pipeline.finetune(
            config, base, task.forget + task.retain, "original", root, mesh, tracker
        ).parked()
    timed("original", clock)
    oracle = None
    if config.oracle and retain_log is None:
        if config.stage.original is not None:
            say(
                "oracle: trained from the same start is not possible with --stage.original; give "
                "--retain-log to compare"
            )
        else:
            clock = time.monotonic()
            oracle = pipeline.finetune(
                config, base, task.retain, "oracle", root, mesh, tracker
            ).parked()
            timed("oracle", clock)

    # 2. Forget.
    clock = time.monotonic()
    unlearned = pipeline.unlearn(config, original, task, root, mesh, tracker).parked()
    timed("unlearned", clock)

    # 3. Judge all of them alike.
    judge = {"oracle": oracle, "base": base}.get(config.evaluate.judge)
    people = {"original": original, "oracle": oracle, "unlearned": unlearned}
    logs = {}
    for name, model in people.items():
        if model is not None:
            clock = time.monotonic()
            cache = None if name == "unlearned" else config.stage.cache
            logs[name] = evaluate_cached(config, model, task, judge, root, mesh, name, cache)
            timed(f"evaluate {name}", clock)
    summary = summarize(logs, people, retain_log)

    # 4. Hand it back.
    clock = time.monotonic()
    export_model(unlearned, root / "export", config.export_dtype)
    timed("export", clock)

    def tell() -> None:
        write_atomic(root / "summary.json", json.dumps(summary, indent=1))
        report.build(root)
        report.show(root)
        remote.send(root)

    distributed.of_first(tell)
    spent = f"{minutes['all']:.1f} minutes"
    say(f"report: {where / 'report.html'}   model: {where / 'export'}   {spent}")
    return root


def prepare(config: RunConfig) -> tuple[Any, Any, Any, Any]:
    """Everything that can be wrong, before the run folder exists: task, base model, mesh, log.

    Raises:
        UserError: anything about the configuration, the data or the model.
    """
    from jaxlib_unlearn.metrics import tofu
    from train import checks, pipeline
    from train.task import load_task, prompt_format

    distributed.check_same(_identity(config))
    with distributed.together():
        mesh = checks.check_run(config)
        layout = prompt_format(config.data)
        retain_log = None if config.retain_log is None else tofu.load_log(config.retain_log)
        if distributed.is_first():
            check_folder(remote.mirror(run_folder(config)), _identity(config))
        # The data may come from the Hub: a path with a typo in it need not wait for that.
        pipeline.check_model(config.stage.original or config.model.path)
        task = load_task(config)
    distributed.check_same({"data": task.digest(), "few_shot": digest(layout.shots)})
    with distributed.together():
        return (*_fit(config, task, layout, mesh, retain_log), mesh, retain_log)


def _fit(config: RunConfig, task: Any, layout: Any, mesh: Any, retain_log: Any) -> tuple[Any, Any]:
    """The task as the base model can read it, and that model."""
    from train import checks, pipeline

    if config.stage.original is not None:
        base = pipeline.load_model(
            config.stage.original, config.model.remat, mesh, config.model.dtype
        )
        if "holdout" in task.evaluation:
            task.notes.append(
                "The model came from outside. Where it was trained on the rows taken as "
                "non-members, the membership metrics (privleak) mean nothing."
            )
    else:
        base = pipeline.base_model(config, task, mesh)
    base = base._replace(tokenizer=base.tokenizer.formatted(layout))
    checks.check_lora(config.lora, config.optimizer, base.params)
    data = config.data
    task = checks.fit_task(task, base, config.evaluate, data.system_prompt, data.max_length)
    check_stages(config, task, base.decoder.config.num_layers, retain_log)
    return task, base


def check_stages(config: RunConfig, task: Any, num_layers: int, retain_log: Any = None) -> None:
    """Raise `UserError` for stages without a step, or that objective or optimizer cannot take."""
    from train import pipeline

    objective, options = objectives.resolve(config.objective)
    objectives.reference_forward(objective, options, num_layers)
    both = len(task.forget) + len(task.retain)
    if config.stage.original is None:
        pipeline.num_steps(config.finetune, both, config.finetune.optimizer)
        if config.oracle and retain_log is None:
            pipeline.num_steps(config.finetune, len(task.retain), config.finetune.optimizer)
    rows = both if "train" in objective.streams else len(task.forget)
    pipeline.num_steps(config.unlearn, rows, config.optimizer)


def run_folder(config: RunConfig) -> Path:
    """Where a configuration writes."""
    if config.output is not None:
        return config.output
    return Path("runs") / f"{config.preset}-seed{config.seed}{'-smoke' if config.smoke else ''}"


def open_run(config: RunConfig) -> Path:
    """Create the run folder with its resolved configuration, or enter that of the same one."""
    return enter_run(run_folder(config), _identity(config))


def enter_run(folder: Path, identity: dict[str, Any]) -> Path:
    """Create or enter a run folder, local or in a bucket, that all processes see.

    Returns:
        Where the first process keeps its files: the folder, or its local mirror.
    """
    root = remote.mirror(folder)
    distributed.of_first(lambda: str(enter_folder(root, identity)))
    distributed.check_shared(remote.home(root))
    distributed.of_first(lambda: remote.send(root))
    return root


def _identity(config: RunConfig) -> dict[str, Any]:
    """What `config.json` holds: everything but where it runs, and where it and its sources lie.

    Of the optimizer, what its row reads: the report and the tables of runs show no more.
    """
    stage = dataclasses.replace(config.stage, cache=None)
    whole = to_json(dataclasses.replace(config, output=None, stage=stage))
    for name in ("distributed", "profile"):
        del whole[name]
    return whole | {"optimizer": OPTIMIZERS[config.optimizer.name].options(config.optimizer)}


def check_folder(root: Path, wanted: dict[str, Any]) -> bool:
    """Whether `root` is there with `wanted` as its `config.json`; False when it can be created.

    Raises:
        UserError: the folder holds another run's configuration, or other files.
    """
    path = root / "config.json"
    if path.exists():
        try:
            there = json.loads(path.read_text())
        except (OSError, ValueError):
            raise UserError(
                f"{path} does not read; give another --output or delete the folder"
            ) from None
        # The numbers do not depend on the mesh: a run goes on where there are other devices.
        if isinstance(there, dict):
            there = there | {"mesh": wanted.get("mesh")}
        if difference := distributed.first_difference(there, wanted):
            raise UserError(
                f"{remote.home(root)} holds another run's config ({difference}); give another "
                "--output"
            )
        return True
    # A run killed while it wrote its first file leaves `config.json.part` behind.
    if root.exists() and (
        not root.is_dir() or any(item.name != "config.json.part" for item in root.iterdir())
    ):
        raise UserError(
            f"--output {remote.home(root)} exists and is not a run folder; give another --output"
        )
    return False


def enter_folder(root: Path, wanted: dict[str, Any]) -> Path:
    """Create `root` with `wanted` as its `config.json`, or enter it when it holds the same.

    Raises:
        UserError: see `check_folder`; or the folder cannot be written.
    """
    if check_folder(root, wanted):
        return root
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {root}: {error.strerror}; give another --output") from None
    write_atomic(root / "config.json", json.dumps(wanted, indent=1))
    return root


def evaluation_inputs(
    model: Any, task: Any, evaluate: Any, data: Any, judge: Any, seed: int
) -> dict[str, Any]:
    """Everything an evaluation depends on."""
    from train import evaluation

    words = model.tokenizer
    return {
        "params": model.sha,
        "model": to_json(model.decoder.config),
        "tokenizer": digest([words.backend.to_str(), words.chat_template, words.eos_id]),
        "format": words.format,
        "task": task.digest(),
        "evaluate": to_json(evaluate),
        "judge": None if judge is None else judge.sha,
        "system_prompt": data.system_prompt,
        "max_length": data.max_length,
        "seed": seed,
        "version": evaluation.VERSION,
    }


def evaluate_cached(
    config: Any,
    model: Any,
    task: Any,
    judge: Any,
    root: Path,
    mesh: Any,
    name: str,
    cache: Path | None = None,
) -> Any:
    """The per-item log of a model, from `evals/NAME.json` when that was made from the same.

    `config` has `data`, `evaluate` and `seed`: that of a run, or of `train.evaluate`.
    """
    from train import evaluation
    from train.stages import json_stage

    inputs = evaluation_inputs(model, task, config.evaluate, config.data, judge, config.seed)

    def compute() -> Any:
        return evaluation.evaluate_model(
            model.at_hand(),
            task,
            config.evaluate,
            system_prompt=config.data.system_prompt,
            max_length=config.data.max_length,
            mesh=mesh,
            seed=config.seed,
            name=name,
            judge=None if judge is None else judge.at_hand(),
        )

    return json_stage(root / "evals" / f"{name}.json", inputs, compute, cache)


def summarize(logs: dict[str, Any], people: dict[str, Any], retain_log: Any) -> dict[str, Any]:
    """Flat metrics of every model, compared with the oracle's log or the one given."""
    from train import evaluation

    reference = retain_log if retain_log is not None else logs.get("oracle")
    return {name: evaluation.summarize(log, reference, people[name]) for name, log in logs.items()}


def read_minutes(root: Path) -> dict[str, float]:
    """Minutes a phase that earlier starts of the same run have spent."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        about = json.loads((root / "run.json").read_text())
        return {str(name): float(spent) for name, spent in about["minutes"].items()}
    return {}


def write_about(root: Path, minutes: dict[str, float], notes: list[str]) -> None:
    """`run.json`: minutes a phase, notes, where it ran."""
    import platform

    import jax

    about = {
        "minutes": {k: round(v, 3) for k, v in minutes.items()},
        "notes": notes,
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    write_atomic(root / "run.json", json.dumps(about, indent=1))
    remote.send(root)


def export_model(model: Any, folder: Path, dtype: str) -> None:
    """Export a model as an HF folder, unless the folder already holds these parameters."""
    import models
    from models.weights import Loaded

    mark = folder / "params_sha256"

    def there() -> bool:
        if mark.exists() and mark.read_text() == f"{model.sha} {dtype}":
            return True
        for stale in (folder, *folder.parent.glob(f".{folder.name}.*")):  # of a killed export
            shutil.rmtree(stale, ignore_errors=True)
        return False

    if distributed.of_first(there):
        return
    loaded = Loaded(model.decoder.config, model.at_hand().params, model.tokenizer)
    with distributed.together():
        models.export(loaded, folder, dtype=dtype)
    distributed.of_first(lambda: write_atomic(mark, f"{model.sha} {dtype}"))


if __name__ == "__main__":
    cli.main(main)
