"""The parts of a classification run, in the order in which `train/classify.py` calls them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from models.learner import check_questions
from train.engine.replays import stored
from train.engine.run import Recipe, Run, Watch, phase, started, train
from train.evaluators import EVALUATORS, evaluation
from train.evaluators.evaluation import Answers, num_parameters
from train.jobs.classification.config import TASKS, ClassifyRun
from train.options import checks, optimizers
from train.options import config as configs
from train.options.config import TrainConfig, run_folder, to_json
from train.reporting import ending
from train.runtime import distributed, folder, remote, reporters, sharding
from train.runtime.stages import json_stage
from train.runtime.steplog import read_steps
from train.runtime.tracking import Timed, say
from train.tasks import labelled
from train.tasks.kinds import Kind

ROLES = {"start": "base", "judged": "finetuned"}
STAGE = "finetuned"


class Opened(NamedTuple):
    """A run at its start.

    Args:
        run: its folder, which is held.
        kind: of the model and of the rows.
        rows: by split.
        encoded: the rows as the model reads them, by split.
        base: the model before training.
        steps: those that the budget allows.
    """

    run: Run
    kind: Kind
    rows: labelled.Rows
    encoded: Mapping[str, list[Any]]
    base: Any
    steps: int


@contextlib.contextmanager
def opened(config: ClassifyRun) -> Iterator[Opened]:
    """Find everything that can be wrong, then make or enter the run folder, and hold it.

    Raises:
        UserError: anything about the configuration, the data, the model or the folder.
    """
    since = time.monotonic()
    with contextlib.ExitStack() as held:
        distributed.start(config.distributed)
        distributed.check_same(identity(config))
        place = folder.run_place(run_folder(config), identity(config))
        with distributed.together():
            mesh, steps = check(config)
            task = TASKS[config.task]
            folder.claim(place, held)
            # The data may come from the Hub: a path with a typo in it need not wait for that.
            task.kind.check(config)
            rows = labelled.load(task, config.data, config.seed)
        distributed.check_same({"data": rows.digest()})
        base = task.kind.load(config, rows, mesh)
        with distributed.together():
            encoded = fit(config, task.kind, rows, base)
        base = base.to_host()
        root = folder.enter(place, held)
        tracker = Timed(root, reporters.chosen(config.report_to), identity(config))
        about = {"roles": ROLES, "evaluators": list(task.kind.evaluators)}
        about |= {"program": "train.classify"}
        run = Run(root, mesh, config.seed, tracker, config.stage.cache, rows.notes, about)
        size = num_parameters(base.params) / 1e6
        name = f"{config.preset or 'classify'}: {config.task}, {size:.1f} M parameters"
        say(f"{name}, seed {config.seed}, run folder {remote.home(root)}")
        for note in rows.notes:
            say(f"  {note}")
        yield Opened(started(run, since), task.kind, rows, encoded, base, steps)


def identity(config: ClassifyRun) -> dict[str, Any]:
    """What `config.json` holds."""
    return configs.identity(config, "stage.cache")


def begin(config: ClassifyRun, opened: Opened) -> Opened:
    """The run with the model that is fine-tuned, where the run trains that too."""
    if opened.kind.begin is None:
        return opened
    with phase(opened.run, "start"):
        base = opened.kind.begin(config, opened.run, opened.rows, opened.encoded, opened.base)
    return opened._replace(base=base.to_host())


def check(config: ClassifyRun) -> tuple[Any, int]:
    """Everything that is known before data and model are read; returns mesh and steps.

    Raises:
        UserError: a number out of range, an unknown name, a mesh that does not fit, a budget below
            one step.
    """
    checks.check_numbers(config)
    objective, settings = objective_of(config)
    objectives.check_accumulation(objective, config.train.accumulate)
    optimizers.check(config.optimizer)
    optimizers.check_pair(config.optimizer, "sum", objective, settings)
    checks.check_lora(config.lora, config.optimizer)
    reporters.check(reporters.chosen(config.report_to))
    checks.check_places(config)
    try:
        steps = optimizers.steps_within(config.optimizer, config.train.forwards)
    except UserError as error:
        raise UserError(f"--train.forwards {config.train.forwards}: {error}") from None
    mesh = sharding.make_mesh(config.mesh)
    checks.check_stage(stage_of(config, steps), config.optimizer, mesh, "training")
    optimizers.check_mesh(config.optimizer, mesh, config.train.batch_size, "the training")
    return mesh, steps


def objective_of(config: ClassifyRun) -> tuple[objectives.Objective, Any]:
    """What the rows of a run's task are learned by."""
    return objectives.resolve(TASKS[config.task].kind.objective, objectives.LEARNING)


def stage_of(config: ClassifyRun, steps: int) -> TrainConfig:
    """The training stage of so many steps."""
    t = config.train
    return TrainConfig(
        steps=steps,
        batch_size=t.batch_size,
        accumulate=t.accumulate,
        optimizer=config.optimizer,
        curve_points=t.curve_points,
        checkpoint_seconds=t.checkpoint_seconds,
    )


def fit(config: ClassifyRun, kind: Kind, rows: labelled.Rows, base: Any) -> dict[str, list[Any]]:
    """The rows as the model reads them, and whether it can be trained as the run says.

    Raises:
        UserError: rows, adapters or an optimizer that do not fit the model.
    """
    checks.check_lora(config.lora, config.optimizer, base.params)
    checks.check_blocks(config.optimizer, base.learner.sizes.get("blocks", 0))
    check_questions(base.learner, *objective_of(config))
    return {
        split: kind.encode(base, getattr(rows, split), config.data, split)
        for split in ("train", "dev", "test")
    }


@dataclass
class Context:
    """What the evaluators of one model share, each result computed once; see `evaluators.base`."""

    kind: Kind
    model: Any
    encoded: Mapping[str, list[Any]]
    config: Any
    mesh: Any
    name: str
    judge: Any = None
    log: dict[str, Any] = field(default_factory=dict)
    found: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make`, memoised under `key`."""
        if key not in self.found:
            self.found[key] = make()
        return self.found[key]

    def _ask(self, ask: Callable[..., Any] | None, what: str, split: str) -> Any:
        if ask is None:
            raise ValueError(f"rows of this kind have no {what}")
        label = f"{self.name}: {what} {split}"
        return self.once(
            (what, split),
            lambda: ask(self.model, self.encoded[split], self.mesh, self.config, label),
        )

    def scores(self, split: str) -> dict[str, list[Any]]:
        """`options`: the scores of every row's options."""
        return {"options": self._ask(self.kind.scores, "score", split)}

    def answers(
        self, split: str, column: str = "prompt", sampling: Any = None, num_samples: int = 1
    ) -> Answers:
        """The greedy answers to a split's prompts."""
        if (column, sampling, num_samples) != ("prompt", None, 1):
            raise ValueError("answers are greedy, and to the prompts alone")
        texts = self._ask(self.kind.answers, "answer", split)
        return Answers([[text] for text in texts], [])

    def judged(self, split: str) -> list[list[float]]:
        """There is no judge."""
        raise ValueError("no judge in this evaluation")


def log_of(
    opened: Opened, config: ClassifyRun, model: Any, splits: tuple[str, ...], name: str
) -> dict[str, Any]:
    """The per-item log of a model: the entries of the kind's evaluators."""
    context = Context(
        opened.kind,
        model,
        {split: opened.encoded[split] for split in splits},
        config.evaluate,
        opened.run.mesh,
        name,
    )
    rows = {split: getattr(opened.rows, split) for split in splits}
    for evaluator in opened.kind.evaluators:
        context.log |= EVALUATORS[evaluator].run(model, rows, context)
    return context.log


class Finetuned(NamedTuple):
    """The trained model, and what its training cost.

    Args:
        model: the model.
        cost: `forwards`, `steps`, `seconds` (without compilations and looks; None where a run was
            stopped right behind its last step) and `step_mib`, memory of a step on a device.
    """

    model: Any
    cost: dict[str, Any]


def finetune(config: ClassifyRun, opened: Opened) -> Finetuned:
    """Train the base model on the training rows, for as many forward passes as the budget has."""
    run, kind, base = opened.run, opened.kind, opened.base

    def look(model: Any) -> dict[str, float]:
        timed = (
            run.tracker.looking() if isinstance(run.tracker, Timed) else contextlib.nullcontext()
        )
        with timed:
            log = log_of(opened, config, model, ("dev",), "look")
        return {name: entry["agg_value"] for name, entry in log.items()}

    adapters = config.lora if config.lora.rank is not None else None

    def keep(trained: Any) -> None:
        if kind.export_adapter is not None:
            kind.export_adapter(trained, adapters, base, config.model, run.folder, config.task)

    with phase(run, STAGE):
        recipe = Recipe(
            stage_of(config, opened.steps),
            config.optimizer,
            adapters=adapters,
            row_tokens=config.data.row_tokens,
        )
        stream = kind.stream(base, opened.encoded["train"], config.train.batch_size)
        model = train(
            run,
            STAGE,
            base,
            objective_of(config),
            {"train": stream},
            recipe,
            record=stored.NAME,
            watch=(Watch(look, config.train.curve_points),),
            keep=None if adapters is None else keep,
        ).to_host()
    return Finetuned(model, cost_of(config, opened, model.sha))


def cost_of(config: ClassifyRun, opened: Opened, sha: str) -> dict[str, Any]:
    """What the training cost; measured once, and kept with the run."""
    run, steps = opened.run, opened.steps

    def measured() -> dict[str, Any]:
        lines = read_steps(run.folder / "metrics.jsonl", say)
        sizes = [
            line["step_mib"] for line in lines if line["stage"] == STAGE and "step_mib" in line
        ]
        seconds = run.tracker.seconds(steps) if isinstance(run.tracker, Timed) else None
        return {
            "forwards": optimizers.forwards(config.optimizer, steps),
            "steps": steps,
            "seconds": None if seconds is None else round(seconds, 2),
            "step_mib": max(sizes, default=None),
        }

    return json_stage(run.folder / "computed" / "cost.json", {"params": sha}, measured)


def judge(config: ClassifyRun, opened: Opened, found: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of every model, by its name; per-item logs go to `evals/`."""
    run, kind = opened.run, opened.kind
    summary = {}
    for name, model in found.items():
        inputs = {
            **model.identity(),
            "rows": opened.rows.digest(),
            "data": {"max_length": config.data.max_length},
            "evaluate": to_json(config.evaluate),
            "kind": [kind.objective, kind.cache_version],
            "evaluators": [[e, EVALUATORS[e].version] for e in kind.evaluators],
        }

        def compute(model: Any = model, name: str = name) -> Any:
            return log_of(opened, config, model.to_device(), ("dev", "test"), name)

        cache = run.cache if name == ROLES["start"] else None
        with phase(run, f"evaluate {name}"):
            log = json_stage(run.folder / "evals" / f"{name}.json", inputs, compute, cache)
        summary[name] = evaluation.summarize(log, None, model)
    return summary


def export(config: ClassifyRun, opened: Opened, finetuned: Finetuned) -> None:
    """`RUN/export`: the trained model."""
    run = opened.run
    what = f"A model that learned {config.task} with jaxlib-unlearn ({config.optimizer.name})."
    with phase(run, "export"):
        opened.kind.export(finetuned.model, run.folder / "export", config.export_dtype, what)


def report(opened: Opened, summary: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
    """`summary.json`, the page and its picture, and the numbers on the terminal."""
    whole = {**summary, STAGE: {**summary[STAGE], **cost}}
    majority, notes = opened.rows.majority_accuracy, []
    if majority is not None:
        notes = [f"always the commonest label of the training rows: accuracy {majority:.3f}"]
    ending.publish(opened.run, {**whole, "majority_accuracy": majority}, whole, notes)
