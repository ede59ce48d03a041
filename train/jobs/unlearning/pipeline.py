"""The parts of an unlearning run, in the order in which `train/unlearn.py` calls them."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.metrics import tofu
from jaxlib_unlearn.objectives import Objective
from models.decoder.learner import DecoderLearner
from models.learner import check_questions
from train.data.examples import Encoded, encode_rows
from train.data.streams import Examples, make_stream
from train.data.task import ALTERNATES, TRACES, Row, Task
from train.engine import base_models, exports
from train.engine.replays import stored
from train.engine.run import Recipe, Run, Watch, num_steps, phase, started, train
from train.engine.trainable import train_from
from train.evaluators import trace_judge
from train.evaluators.evaluation import Model, curve, longest, num_parameters
from train.evaluators.judging import compare_logs, evaluate_cached, summarize
from train.jobs.unlearning.alternates import with_alternates
from train.jobs.unlearning.traces import check_room, read_traces, with_traces
from train.options import checks, optimizers
from train.options import config as configs
from train.options.config import LoraConfig, RunConfig, run_folder
from train.options.roles import ROLES
from train.reporting import card, ending, tables
from train.runtime import cards, distributed, files, folder, remote, reporters, sharding
from train.runtime.stages import digest
from train.runtime.tracking import Tracker, say
from train.tasks import fitting, load_task
from train.tasks.task import prompt_format

CURVE_ROWS = 40


class Opened(NamedTuple):
    """An unlearning run at its start.

    Args:
        run: its folder, which is held.
        task: the rows that are forgotten, kept and asked.
        base: the model before any training.
        retain_log: the log of a retain-only model, in the place of an oracle.
    """

    run: Run
    task: Task
    base: Model
    retain_log: Any


@contextlib.contextmanager
def opened(config: RunConfig) -> Iterator[Opened]:
    """Find everything that can be wrong, then make or enter the run folder, and hold it.

    Raises:
        UserError: anything about the configuration, the data, the model or the folder.
    """
    since = time.monotonic()
    with contextlib.ExitStack() as held:
        distributed.start(config.distributed)
        task, base, mesh, retain_log = prepare(config, held)
        base = base.to_host()  # as every model while it waits: a step has the device to itself
        root = enter(config, held)
        logs_to = reporters.chosen(config.report_to, config.tensorboard)
        run = Run(
            root,
            mesh,
            config.seed,
            Tracker(root, logs_to, identity(config)),
            config.stage.cache,
            task.notes,
            about={"roles": ROLES._asdict(), "evaluators": list(task.evaluators)},
        )
        size, where = num_parameters(base.params) / 1e6, remote.home(root)
        say(f"{config.preset}: {size:.1f} M parameters, seed {config.seed}, run folder {where}")
        for note in task.notes:
            say(f"  {note}")
        yield Opened(started(run, since), task, base, retain_log)


def prepare(
    config: RunConfig, held: contextlib.ExitStack | None = None
) -> tuple[Any, Any, Any, Any]:
    """Everything that can be wrong, before the run folder exists: task, base model, mesh, log.

    With `held`, a run folder that exists is locked: another run in it is noticed first.

    Raises:
        UserError: anything about the configuration, the data or the model.
    """
    distributed.check_same(identity(config))
    with distributed.together():
        mesh = check_run(config)
        layout = prompt_format(config.data)
        if config.retain_log is not None:
            files.check_key(config.retain_log)  # where it is that of a run
        retain_log = None if config.retain_log is None else tofu.load_log(config.retain_log)
        folder.claim(place_of(config), held)
        # The data may come from the Hub: a path with a typo in it need not wait for that.
        if config.stage.original is not None and config.model.revision is not None:
            raise UserError(
                "--model.revision does not go with --stage.original, in whose place nothing else "
                "is loaded; write --stage.original owner/name@revision"
            )
        base_models.check_model(config.stage.original or config.model.path, config.model.revision)
        task = load_task(config)
    distributed.check_same({"data": task.digest(), "few_shot": digest(layout.shots)})
    with distributed.together():
        return (*_fit(config, task, layout, mesh, retain_log), mesh, retain_log)


def _fit(config: RunConfig, task: Any, layout: Any, mesh: Any, retain_log: Any) -> tuple[Any, Any]:
    """The task as the base model can read it, and that model."""
    if config.stage.original is not None:
        base = base_models.load_model(
            config.stage.original,
            config.model.remat,
            mesh,
            config.model.dtype,
            notes=task.notes,
        )
        if config.model.mask_all_pad_id_tokens:
            base = base_models.masking_pad_ids(base)
        if "holdout" in task.evaluation:
            task.notes.append(
                "The model came from outside. Where it was trained on the rows taken as "
                "non-members, the membership metrics (privleak) mean nothing."
            )
    else:
        base = base_models.base_model(config, task, mesh)
    base = base._replace(tokenizer=base.tokenizer.formatted(layout))
    checks.check_lora(config.lora, config.optimizer, base.params)
    checks.check_selection(config.train, config.optimizer, base.params)
    checks.check_blocks(config.optimizer, base.decoder.config.num_layers)
    if config.stage.original is None:
        checks.check_blocks(config.finetune.optimizer, base.decoder.config.num_layers)
    data = config.data
    task = fitting.fit_task(task, base, config)
    check_stages(config, task, base.learner, retain_log)
    if config.traces.path is None and lacks_traces(objectives.resolve(config.objective)[0], task):
        where = {"system_prompt": data.system_prompt, "max_length": data.max_length}
        check_room(base, task.forget, config.traces, **where)
    resolved(config, base, task)
    return task, base


def check_stages(
    config: RunConfig, task: Any, learner: DecoderLearner, retain_log: Any = None
) -> None:
    """Raise `UserError` for stages without a step, or that objective or optimizer cannot take."""
    objective, options = objectives.resolve(config.objective)
    objectives.reference_forward(objective, options, learner.decoder.config.num_layers)
    check_questions(learner, objective, options, train_from(learner.shapes(), config.train))
    if config.data.alternates and lacks_alternates(objective, task):
        check_alternates(config)
    elif lacks_traces(objective, task):
        check_traces(config, objective, task)
    else:
        stream_rows(objective, task, config.seed)
    both = len(task.forget) + len(task.retain)
    if config.stage.original is None:
        num_steps(config.finetune, both, config.finetune.optimizer)
        if config.oracle and retain_log is None:
            num_steps(config.finetune, len(task.retain), config.finetune.optimizer)
    rows = both if "train" in objective.streams else len(task.forget)
    num_steps(config.unlearn, rows, config.optimizer)


def place_of(config: RunConfig) -> folder.Place:
    """The run folder of a configuration, to be claimed and entered."""
    return folder.run_place(run_folder(config), identity(config))


def enter(config: RunConfig, held: contextlib.ExitStack | None = None) -> Path:
    """Create the run folder with its resolved configuration, or enter that of the same one."""
    return folder.enter(place_of(config), held)


def identity(config: RunConfig) -> dict[str, Any]:
    """What `config.json` holds."""
    return configs.identity(config, "stage.cache")


def encode(
    model: Model, rows: list[Row], config: RunConfig, what: str, length: int | None = None
) -> Encoded:
    """Tokenise a stream; cut and dropped rows are said. `length`: its longest, where it has one."""
    limit = longest(model, length or config.data.max_length)
    encoded = encode_all(model, rows, config, length)
    if encoded.num_cut or encoded.num_dropped:
        say(
            f"{what}: {encoded.num_cut} example(s) cut at {limit} tokens, {encoded.num_dropped} "
            "left out (prompt too long)"
        )
    return encoded


def encode_all(
    model: Model, rows: list[Row], config: RunConfig, length: int | None = None
) -> Encoded:
    """Tokenise rows as the model reads them."""
    return encode_rows(
        model.tokenizer,
        rows,
        system_prompt=config.data.system_prompt,
        max_length=longest(model, length or config.data.max_length),
    )


def stream_of(
    model: Model,
    encoded: Encoded,
    batch_size: int,
    follows: str | None = None,
    sized_by: Encoded | None = None,
) -> Examples:
    """A training stream of encoded examples; `follows`: the stream that it is paired with."""
    return make_stream(
        encoded.examples,
        model.tokenizer.pad_id or 0,
        batch_size=batch_size,
        follows=follows,
        sized_by=None if sized_by is None else sized_by.examples,
    )


def finetune(
    run: Run,
    config: RunConfig,
    name: str,
    base: Model,
    rows: list[Row],
    among: list[Row] | None = None,
    record: str | None = None,
) -> Model:
    """Plain fine-tuning of `base`: the original (forget + retain) or the oracle (retain alone).

    `among`: rows for whose sizes the steps are compiled, where others are trained on as well.
    `record`: file of a zeroth-order optimizer's coefficients; None: `replay-NAME.zo`.
    """
    with phase(run, name):
        encoded = encode(base, rows, config, name)
        sizes = None if among is None else encode_all(base, among, config)
        return train(
            run,
            name,
            base,
            objectives.resolve("nll"),
            {"train": stream_of(base, encoded, config.finetune.batch_size, sized_by=sizes)},
            Recipe(config.finetune, config.finetune.optimizer, row_tokens=config.data.row_tokens),
            shared=True,
            record=record,
        )


def lacks_alternates(objective: Objective, task: Task) -> bool:
    """Whether an objective teaches other answers that the rows to forget do not bring."""
    return "alternate" in objective.streams and not any(ALTERNATES in row for row in task.forget)


def check_alternates(config: RunConfig) -> None:
    """Raise `UserError` where there is no model to sample other answers from."""
    outside = config.stage.original is not None
    if outside or config.model.path == "scratch":
        why = (
            "the model of --stage.original knows the facts already"
            if outside
            else "a model from scratch has nothing to say yet"
        )
        raise UserError(
            f"objective {config.objective.name!r} teaches other answers, which the forget rows do "
            f"not bring, and {why}; give the rows a column {ALTERNATES!r} (a text, or a list of "
            "texts), or choose another --objective.name"
        )


def find_alternates(run: Run, config: RunConfig, base: Model, task: Task) -> Task:
    """The task, its forget rows with other answers where the objective needs them and has none."""
    objective, _ = objectives.resolve(config.objective)
    if not (config.data.alternates and lacks_alternates(objective, task)):
        return task
    with phase(run, "alternates"):
        forget = with_alternates(
            run,
            base,
            task.forget,
            task.retain,
            system_prompt=config.data.system_prompt,
            count=config.data.alternates,
            max_new_tokens=config.evaluate.max_new_tokens,
            generate_rows=config.evaluate.generate_rows,
            temperature=config.data.alternate_temperature,
        )
    return task._replace(forget=forget)


def lacks_traces(objective: Objective, task: Task) -> bool:
    """Whether an objective is trained on what the original thinks, which is not known yet."""
    return "traces" in objective.streams and not any(TRACES in row for row in task.forget)


def check_traces(config: RunConfig, objective: Objective, task: Task) -> None:
    """Raise `UserError` for other streams that lack something, and for an unusable file."""
    known = task._replace(forget=[row | {TRACES: [""]} for row in task.forget])
    stream_rows(objective, known, config.seed)
    if config.traces.path is not None:
        read_traces(config.traces.path, len(task.forget))


def find_traces(run: Run, config: RunConfig, original: Model, task: Task) -> Task:
    """The task, its forget rows with the original's traces where the objective needs them."""
    objective, _ = objectives.resolve(config.objective)
    if not lacks_traces(objective, task):
        return task
    with phase(run, "traces"):
        forget = with_traces(
            run,
            original,
            task.forget,
            config.traces,
            system_prompt=config.data.system_prompt,
            max_length=config.data.max_length,
            generate_rows=config.evaluate.generate_rows,
        )
    return task._replace(forget=forget)


def topics_of(rows: list[Row]) -> tuple[str, ...]:
    """The topics of rows, sorted; a row without one is of the topic "".

    Raises:
        UserError: a topic that is no text.
    """
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("topic", ""), str):
            raise UserError(
                f"forget row {number}: column 'topic' must hold a text, by which this objective "
                "moves rows to different vectors; correct it, or leave the column out"
            )
    return tuple(sorted({row.get("topic", "") for row in rows}))


def resolved(config: RunConfig, model: Model, task: Task) -> tuple[Objective, Any]:
    """The objective and its options, with what follows from tokenizer and rows filled in."""
    objective, options = objectives.resolve(config.objective)
    if objective.fit is None:
        return objective, options
    facts = objectives.Facts(model.tokenizer.backend.token_to_id, topics_of(task.forget))
    return objectives.resolve(objective.fit(options, facts))


def stream_rows(objective: Objective, task: Task, seed: int) -> dict[str, list[Row]]:
    """The rows of every stream that an objective reads, with its columns (`Task.rows_of`)."""
    return task.rows_of(objective, seed)


def unlearning_streams(
    config: RunConfig,
    objective: Objective,
    original: Model,
    task: Task,
    topics: tuple[str, ...] = (),
) -> dict[str, Examples]:
    """The streams that an objective reads, as the model reads them.

    `topics`: those that have vectors; rows of them alone bring their numbers, the column `topic`.
    """
    size = config.unlearn.batch_size
    found = {}
    for name, rows in stream_rows(objective, task, config.seed).items():
        encoded = encode(original, rows, config, name, task.lengths.get(name))
        stream = stream_of(original, encoded, size, task.follows(name))
        mine = [rows[i].get("topic", "") for i in encoded.row_ids]
        if topics and all(topic in topics for topic in mine):
            numbers = np.array([topics.index(topic) for topic in mine], np.int32)
            stream = dataclasses.replace(stream, columns={"topic": numbers})
        found[name] = stream
    return found


def unlearn(run: Run, config: RunConfig, original: Model, task: Task) -> Model:
    """The unlearning stage: the objective's streams, its caches, its optimizer."""
    objective, options = resolved(config, original, task)
    # Objectives without topics of their own ignore the column, whatever it holds.
    topics = getattr(options, "topics", ())
    streams = unlearning_streams(config, objective, original, task, topics)

    def look(model: Model) -> dict[str, float]:
        data, tokens = config.data, config.evaluate.score_tokens
        return curve(model, task, data.system_prompt, data.max_length, run.mesh, tokens, CURVE_ROWS)

    adapters = config.lora if config.lora.rank is not None else None
    with phase(run, "unlearned"):
        return train(
            run,
            "unlearned",
            original,
            (objective, options),
            streams,
            Recipe(
                config.unlearn,
                config.optimizer,
                config.combine,
                adapters,
                config.data.row_tokens,
                config.profile,
                config.train,
            ),
            record=stored.NAME,
            watch=(Watch(look, config.unlearn.curve_points),),
            keep=None
            if adapters is None
            else lambda trained: export_adapter(
                trained, adapters, config, run.folder, original.decoder.config.family
            ),
        )


def export_adapter(
    trained: Any, adapters: LoraConfig, config: RunConfig, root: Path, family: str
) -> None:
    """Write `RUN/adapter`: what was trained beside the original, in PEFT's format.

    It belongs to the original as the run has it: the given one, or that trained in the run, which
    `train.export RUN RUN/original --model original` writes where the adapter looks for it.
    """

    home = remote.home(root)
    given = config.stage.original
    known = None if given is None else exports.base_of(given)
    base = str(home / "original") if known is None else known
    rank = adapters.rank or 1
    what = f"LoRA adapters of rank {rank} in PEFT's format, trained by jaxlib-unlearn to forget."
    command = f"python -m train.export {home} {home / 'original'} --model original"
    text = cards.of_adapter(what, base, None if known else command)
    exports.export_adapter(trained, adapters, family, root / "adapter", base, text)


class Judged(NamedTuple):
    """What was found out about the models of a run: per-item logs, and numbers."""

    logs: dict[str, Any]
    summary: dict[str, Any]


def judge(run: Run, config: RunConfig, opened: Opened, found: Mapping[str, Model]) -> Judged:
    """Judge all models alike; the oracle, or the log in its place, is what others are held to.

    Args:
        run: where the logs go.
        config: how models are judged.
        opened: the task, and the model before training.
        found: models by their role; what is made after the start and the reference is this run's
            alone.
    """
    judge = config.evaluate.judge
    fluent = opened.base if judge == "base" else found.get(judge)
    logs = {}
    for name, model in found.items():
        cache = config.stage.cache if name in (ROLES.start, ROLES.reference) else None
        with phase(run, f"evaluate {name}"):
            logs[name] = evaluate_cached(
                config, model, opened.task, fluent, run.folder, run.mesh, name, cache
            )
    summary = summarize(logs, dict(found), opened.retain_log)
    distributed.of_first(lambda: compare_logs(run.folder, logs, opened.retain_log))
    return Judged(logs, summary)


def export(run: Run, config: RunConfig, unlearned: Model, judged: Judged) -> None:
    """`RUN/export`: the unlearned model, with a card that says how it was judged."""
    done = tables.Run(
        run.folder,
        identity(config),
        judged.summary,
        notes=tuple(run.notes),
        evaluators=tuple(run.about["evaluators"]),
    )
    text, tokens = card.of_run(done, judged.logs), config.evaluate.max_new_tokens
    with phase(run, "export"):
        exports.export_model(unlearned, run.folder / "export", config.export_dtype, text, tokens)


def report(run: Run, judged: Judged) -> None:
    """`summary.json`, the page and its pictures, and the table on the terminal."""
    ending.publish(run, judged.summary)


def check_run(config: RunConfig) -> Mesh:
    """Everything about a run that is known before data and model are read; returns its mesh.

    Raises:
        UserError: a number out of range, an unknown name, a mesh that does not fit.
    """
    checks.check_numbers(config)
    objective, settings = objectives.resolve(config.objective)
    objectives.check_accumulation(objective, config.unlearn.accumulate)
    optimizers.check_pair(config.optimizer, config.combine, objective, settings)
    checks.check_lora(config.lora, config.optimizer)
    checks.check_selection(config.train, config.optimizer)
    checks.refuse_both(config.lora, config.train)
    reporters.check(reporters.chosen(config.report_to, config.tensorboard))
    trace_judge.check(config.evaluate.judge_model)
    if config.profile is not None:
        checks.check_writable("--profile", config.profile)
    checks.check_places(config)
    mesh = sharding.make_mesh(config.mesh)
    checks.check_finetuning(config.finetune, mesh)
    checks.check_stage(config.unlearn, config.optimizer, mesh, "unlearning")
    optimizers.check_mesh(config.optimizer, mesh, config.unlearn.batch_size)
    return mesh
