"""Unlearn a language model: original, oracle, unlearned, evaluated, reported, exported.

python -m train.unlearn quickstart
python -m train.unlearn tofu-smollm2 --data.path DIR
python -m train.unlearn tofu-smollm2 --data.forget FILE --data.retain FILE  (your own rows)
python -m train.unlearn --example-data DIR                           (such files, to start from)
python -m train.unlearn --config RUN/config.json --output DIR        (reruns a configuration)
python -m train.unlearn --help (presets)    PRESET --help (options)    --list (methods)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import time
from pathlib import Path
from typing import Any

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from train import cli
from train.arguments import read_arguments
from train.config import RunConfig, to_json
from train.optimizers import list_combiners, list_optimizers
from train.presets import PRESETS
from train.runtime import distributed, files, remote, reporters
from train.runtime.folder import check_folder, enter_run, lock, locked, read_minutes, write_about
from train.runtime.stages import digest, write_atomic
from train.runtime.tracking import Tracker, say


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
    forget, retain = (shlex.quote(str(path)) for path in made if path.suffix == ".csv")
    print(f"python -m train.unlearn quickstart --data.forget {forget} --data.retain {retain}")


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
    with contextlib.ExitStack() as held:
        return _run(config, held)


def _run(config: RunConfig, held: contextlib.ExitStack) -> Path:
    from train import pipeline
    from train.evaluators import evaluation
    from train.evaluators.judging import compare_logs, evaluate_cached, summarize
    from train.exports import export_model
    from train.reporting import card, page, tables
    from train.reporting.tables import Run

    started = time.monotonic()
    distributed.start(config.distributed)
    task, base, mesh, retain_log = prepare(config, held)
    base = base.parked()  # as every model while it waits: a step has the device to itself
    held.enter_context(locked(run_folder(config)))
    root = open_run(config)
    logs_to = reporters.chosen(config.report_to, config.tensorboard)
    tracker = Tracker(root, logs_to, _identity(config))
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
    distributed.of_first(lambda: compare_logs(root, logs, retain_log))

    # 4. Hand it back.
    clock = time.monotonic()
    done = Run(root, _identity(config), summary, notes=tuple(task.notes))
    run_card = card.of_run(done, logs)
    tokens = config.evaluate.max_new_tokens
    export_model(unlearned, root / "export", config.export_dtype, run_card, tokens)
    timed("export", clock)

    def tell() -> None:
        text = json.dumps(summary, indent=1)
        write_atomic(root / "summary.json", text)
        write_atomic(root / "summary.key", files.key_text(text))
        page.build(root)
        tables.show(tables.columns([tables.load_run(root)]))
        remote.send(root)

    distributed.of_first(tell)
    tracker.close(summary)
    spent = f"{minutes['all']:.1f} minutes"
    say(f"report: {where / 'report.html'}   model: {where / 'export'}   {spent}")
    return root


def prepare(
    config: RunConfig, held: contextlib.ExitStack | None = None
) -> tuple[Any, Any, Any, Any]:
    """Everything that can be wrong, before the run folder exists: task, base model, mesh, log.

    With `held`, a run folder that exists is locked: another run in it is noticed first.

    Raises:
        UserError: anything about the configuration, the data or the model.
    """
    from jaxlib_unlearn.metrics import tofu
    from train import checks, pipeline
    from train.tasks.task import load_task, prompt_format

    distributed.check_same(_identity(config))
    with distributed.together():
        mesh = checks.check_run(config)
        layout = prompt_format(config.data)
        if config.retain_log is not None:
            files.check_key(config.retain_log)  # where it is that of a run
        retain_log = None if config.retain_log is None else tofu.load_log(config.retain_log)
        if distributed.is_first():
            folder = run_folder(config)
            exists = check_folder(remote.mirror(folder), _identity(config))
            if exists and held is not None and not remote.is_remote(folder):
                held.enter_context(lock(folder))
        # The data may come from the Hub: a path with a typo in it need not wait for that.
        if config.stage.original is not None and config.model.revision is not None:
            raise UserError(
                "--model.revision does not go with --stage.original, in whose place nothing else "
                "is loaded; write --stage.original owner/name@revision"
            )
        pipeline.check_model(config.stage.original or config.model.path, config.model.revision)
        task = load_task(config)
    distributed.check_same({"data": task.digest(), "few_shot": digest(layout.shots)})
    with distributed.together():
        return (*_fit(config, task, layout, mesh, retain_log), mesh, retain_log)


def _fit(config: RunConfig, task: Any, layout: Any, mesh: Any, retain_log: Any) -> tuple[Any, Any]:
    """The task as the base model can read it, and that model."""
    from train import checks, pipeline

    if config.stage.original is not None:
        base = pipeline.load_model(
            config.stage.original,
            config.model.remat,
            mesh,
            config.model.dtype,
            notes=task.notes,
        )
        if config.model.mask_all_pad_id_tokens:
            base = pipeline.masking_pad_ids(base)
        if "holdout" in task.evaluation:
            task.notes.append(
                "The model came from outside. Where it was trained on the rows taken as "
                "non-members, the membership metrics (privleak) mean nothing."
            )
    else:
        base = pipeline.base_model(config, task, mesh)
    base = base._replace(tokenizer=base.tokenizer.formatted(layout))
    checks.check_lora(config.lora, config.optimizer, base.params)
    checks.check_blocks(config.optimizer, base.decoder.config.num_layers)
    if config.stage.original is None:
        checks.check_blocks(config.finetune.optimizer, base.decoder.config.num_layers)
    data = config.data
    task = checks.fit_task(task, base, config.evaluate, data.system_prompt, data.max_length)
    check_stages(config, task, base.decoder.config.num_layers, retain_log)
    return task, base


def check_stages(config: RunConfig, task: Any, num_layers: int, retain_log: Any = None) -> None:
    """Raise `UserError` for stages without a step, or that objective or optimizer cannot take."""
    from train import pipeline

    objective, options = objectives.resolve(config.objective)
    objectives.reference_forward(objective, options, num_layers)
    pipeline.stream_rows(objective, task, config.seed)
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


def _identity(config: RunConfig) -> dict[str, Any]:
    """What `config.json` holds: everything but where it runs, and where it and its sources lie."""
    stage = dataclasses.replace(config.stage, cache=None)
    whole = to_json(dataclasses.replace(config, output=None, stage=stage))
    for name in ("distributed", "profile", "report_to"):
        del whole[name]
    return whole


if __name__ == "__main__":
    cli.main(main)
