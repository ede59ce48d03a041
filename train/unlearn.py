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
import shutil
import time
from pathlib import Path
from typing import Any

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from train import cli, optimizers, suggest
from train.config import RunConfig, replace, to_json
from train.optimizers import OPTIMIZERS, list_combiners, list_optimizers
from train.presets import PRESETS
from train.runtime import distributed, files, remote, reporters, seal
from train.runtime.folder import check_folder, enter_run, lock, locked
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


OTHER_DATA = ("--data.forget", "--data.retain", "--data.path", "--data.source")


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
        preset = suggest.choose(argv[0], PRESETS, "preset")
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
    elif name is None and any(cli.option_value(rest, option) for option in OTHER_DATA):
        # The preset's objective may need what its own data alone have.
        default = replace(default, objective=getattr(preset, "OTHER_DATA", default.objective))
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
    row = suggest.choose(name, OPTIMIZERS, "optimizer")
    optimizer, changes = getattr(preset, "OPTIMIZERS", {}).get(row.name, (None, {}))
    if optimizer is None:
        optimizer = replace(config.optimizer, name=row.name)
        if row.learning_rate is not None:
            optimizer = replace(optimizer, learning_rate=row.learning_rate)
    return replace(config, optimizer=optimizer, **changes)


def run(config: RunConfig) -> Path:
    """Run all stages of a configuration and return the run folder, which it holds meanwhile."""
    with contextlib.ExitStack() as held:
        return _run(config, held)


def _run(config: RunConfig, held: contextlib.ExitStack) -> Path:
    from train import pipeline
    from train.evaluators import evaluation
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
    """What `config.json` holds: everything but where it runs, and where it and its sources lie.

    Of the optimizer, what its row reads: the report and the tables of runs show no more.
    """
    stage = dataclasses.replace(config.stage, cache=None)
    whole = to_json(dataclasses.replace(config, output=None, stage=stage))
    for name in ("distributed", "profile", "report_to"):
        del whole[name]
    return whole | {"optimizer": OPTIMIZERS[config.optimizer.name].options(config.optimizer)}


def evaluation_inputs(
    model: Any, task: Any, evaluate: Any, data: Any, judge: Any, seed: int
) -> dict[str, Any]:
    """Everything an evaluation depends on."""
    from train.evaluators import evaluation

    words = model.tokenizer
    return {
        "params": model.sha,
        "model": to_json(model.decoder.config),
        "tokenizer": digest([words.backend.to_str(), words.chat_template, words.eos_id]),
        "format": words.format,
        "task": task.digest(),
        "evaluate": to_json(evaluate),
        "judge": None if judge is None else [judge.sha, to_json(judge.decoder.config)],
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
    from train.evaluators import evaluation
    from train.runtime.stages import json_stage

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
    from train.evaluators import evaluation

    reference = retain_log if retain_log is not None else logs.get("oracle")
    return {name: evaluation.summarize(log, reference, people[name]) for name, log in logs.items()}


def compare_logs(root: Path, logs: dict[str, Any], retain_log: Any) -> None:
    """`privleak` in `evals/NAME.json` as in `summary.json`: against the oracle, judged later."""
    from jaxlib_unlearn.metrics import tofu
    from train.runtime.stages import amend_json

    reference = retain_log if retain_log is not None else logs.get("oracle")
    for name, log in logs.items():
        amend_json(root / "evals" / f"{name}.json", tofu.with_reference(log, reference))


def read_minutes(root: Path) -> dict[str, float]:
    """Minutes a phase that earlier starts of the same run have spent."""
    broken = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
    with contextlib.suppress(*broken, OverflowError):
        about = json.loads((root / "run.json").read_text())
        found = {str(name): float(spent) for name, spent in about["minutes"].items()}
        return {name: spent for name, spent in found.items() if 0 <= spent < 1e9}
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


def speaking(tokenizer: Any) -> Any:
    """A tokenizer with its model's prompts as the chat template, where those are not its own."""
    from train.data.examples import encode_qa, written_chat_template

    if tokenizer.has_chat_template and tokenizer.format.tags is None:
        return tokenizer
    found = tokenizer.with_template(written_chat_template(tokenizer))
    alone = tokenizer.formatted(tokenizer.format._replace(shots=()))
    probe = {"question": "Who wrote it?", "answer": "Nobody did.", "max_length": 10**6}
    same = all(
        encode_qa(found, **probe, system_prompt=system)
        == encode_qa(alone, **probe, system_prompt=system)
        for system in (None, "Be brief.")
    )
    # A tokenizer may read the same text in another way behind a written-out special token.
    return found if same else tokenizer


def export_model(
    model: Any, folder: Path, dtype: str, text: str | None = None, max_new_tokens: int | None = None
) -> None:
    """Export a model as an HF folder, unless the folder already holds it with the same card.

    `text` is the card, None one that says where the model comes from; `max_new_tokens` is where
    its answers end unless asked otherwise.
    """
    import models
    from models.weights import Loaded
    from train.reporting import card
    from train.runtime.stages import digest

    text = (
        card.plain("A model fine-tuned with jaxlib-unlearn.", model.sha) if text is None else text
    )
    made_from = f"{model.sha} {dtype} {digest([text, max_new_tokens])[:16]}"

    home = remote.home(folder.parent)

    def there() -> bool:
        found = seal.read(folder)
        if found is not None and found[0] == made_from and found[1]:
            wrong = seal.damage(folder, None if home == folder.parent else home / folder.name)
            if not wrong:
                return True
            say(f"{folder / wrong[0]} is damaged; exporting it again")
        for stale in (folder, *folder.parent.glob(f".{folder.name}.*")):  # of a killed export
            shutil.rmtree(stale, ignore_errors=True)
        return False

    if distributed.of_first(there):
        return
    loaded = Loaded(model.decoder.config, model.at_hand().params, speaking(model.tokenizer))
    with distributed.together():
        models.export(
            loaded,
            folder,
            dtype=dtype,
            max_new_tokens=max_new_tokens,
            card=lambda written: card.with_digests(text, written),
        )
    distributed.of_first(lambda: seal.put(folder, made_from))


if __name__ == "__main__":
    cli.main(main)
