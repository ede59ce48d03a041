"""The parts of a run that learns from traces, in the order that `train/finetune.py` calls them."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxlib_unlearn import cot, objectives
from train.data.bpe import train_bpe
from train.engine import base_models
from train.engine.exports import export_model
from train.engine.replays import stored
from train.engine.run import Recipe, Run, num_steps, phase, started
from train.engine.run import train as train_stage
from train.evaluators import EVALUATORS, evaluation
from train.evaluators.evaluation import Model, num_parameters, score_items
from train.jobs.finetuning import encoding, sources
from train.jobs.finetuning.config import ReasoningRun, stage_of, stretched
from train.options import checks, optimizers
from train.options import config as configs
from train.options.config import DataConfig, run_folder, to_json
from train.reporting.ending import publish
from train.runtime import cards, distributed, folder, remote, reporters, sharding
from train.runtime.stages import json_stage
from train.runtime.tracking import Timed, say
from train.tasks.task import prompt_format

STAGE = "finetuned"
EVALUATOR = EVALUATORS["final_answer"]
ABOUT = {
    "roles": {"start": "base", "judged": STAGE},
    "evaluators": [EVALUATOR.name],
    "program": "train.finetune",
}


class Opened(NamedTuple):
    """A run at its start.

    Args:
        run: its folder, which is held.
        config: of the run.
        rows: to train on and to judge by.
        learned: the packed rows.
        base: the model before training.
        steps: of the training.
    """

    run: Run
    config: ReasoningRun
    rows: sources.Rows
    learned: encoding.Learned
    base: Model
    steps: int


@contextlib.contextmanager
def opened(config: ReasoningRun) -> Iterator[Opened]:
    """Find everything that can be wrong, then make or enter the run folder, and hold it.

    Raises:
        UserError: anything about the configuration, the rows, the model or the folder.
    """
    since = time.monotonic()
    with contextlib.ExitStack() as held:
        distributed.start(config.distributed)
        distributed.check_same(identity(config))
        place = folder.run_place(run_folder(config), identity(config))
        with distributed.together():
            mesh, layout = check(config)
            folder.claim(place, held)
            base_models.check_model(config.model.path, config.model.revision)
            rows = sources.load(config.data, config.seed)
        distributed.check_same({"data": rows.digest()})
        base = base_model(config, rows, mesh)
        base = base._replace(tokenizer=base.tokenizer.formatted(layout))
        with distributed.together():
            checks.check_blocks(config.optimizer, base.decoder.config.num_layers)
            learned = encoding.learned(
                rows.train,
                base.tokenizer,
                config.condense,
                config.data,
                base.decoder.config.max_position_embeddings,
                config.seed,
            )
            test = encoding.answerable(
                rows.test, base.tokenizer, config.data.system_prompt, base.decoder.config
            )
            steps = num_steps(stage_of(config), len(learned.stream), config.optimizer)
        notes = [*rows.notes, words(learned)]
        if len(test) < len(rows.test):
            notes.append(
                f"Judged by {len(test)} of the {len(rows.test)} rows drawn; the others fill the "
                "model's context."
            )
        rows = rows._replace(test=test)
        base = base.to_host()
        root = folder.enter(place, held)
        tracker = Timed(root, reporters.chosen(config.report_to), identity(config))
        run = Run(root, mesh, config.seed, tracker, config.stage.cache, notes, ABOUT)
        size, where = num_parameters(base.params) / 1e6, remote.home(root)
        say(f"{config.preset}: {size:.1f} M parameters, seed {config.seed}, run folder {where}")
        for note in notes:
            say(f"  {note}")
        yield Opened(started(run, since), config, rows, learned, base, steps)


def identity(config: ReasoningRun) -> dict[str, Any]:
    """What `config.json` holds."""
    return configs.identity(config, "stage.cache")


def check(config: ReasoningRun) -> tuple[Any, Any]:
    """Everything that is known before rows and model are read; returns mesh and prompt format.

    Raises:
        UserError: a number out of range, an unknown name, a mesh that does not fit.
    """
    checks.check_numbers(config)
    data = config.data
    encoding.check_packing(data)
    layout = prompt_format(DataConfig(template=data.template, template_date=data.template_date))
    reporters.check(reporters.chosen(config.report_to))
    checks.check_places(config)
    mesh = sharding.make_mesh(config.mesh)
    checks.check_finetuning(stage_of(config), mesh)
    optimizers.check_mesh(config.optimizer, mesh, config.train.batch_size)
    return mesh, layout


def base_model(config: ReasoningRun, rows: sources.Rows, mesh: Any) -> Model:
    """The model before training: random and tiny (`scratch`), or loaded.

    Raises:
        UserError: nothing is found at the path.
    """
    m = config.model
    if m.path == "scratch":
        # Of whole traces: runs that shorten them differently have the same tokens.
        tokenizer = train_bpe(encoding.texts(rows.train), m.vocab_size, m.split_digits)
        context = m.context or config.data.row_tokens
        model = base_models.scratch_model(m, tokenizer, context, config.seed, mesh)
    else:
        model = base_models.load_model(m.path, m.remat, mesh, m.dtype, m.revision, rows.notes)
    shape = stretched(model.decoder.config, m)
    model = model._replace(decoder=dataclasses.replace(model.decoder, config=shape))
    return base_models.masking_pad_ids(model) if m.mask_all_pad_id_tokens else model


def words(learned: encoding.Learned) -> str:
    """What is trained on, in a sentence."""
    stream = learned.stream
    text = (
        f"Trained on {learned.examples} examples of {learned.tokens:,} tokens "
        f"({learned.token_ratio:.0%} of all with whole traces), in {len(stream)} rows of "
        f"{stream.length} with {stream.waste:.1%} padding"
    )
    left = f"; {learned.too_long} longer than a row left out" if learned.too_long else ""
    if learned.missing:
        left += f"; {learned.missing:,} tokens fewer than shortened, as no other whole ones fit"
    return f"{text}{left}.".replace("%", " %")


def train(opened: Opened) -> Model:
    """The training stage: the packed rows, epoch by epoch."""
    run, config = opened.run, opened.config
    with phase(run, STAGE):
        return train_stage(
            run,
            STAGE,
            opened.base,
            objectives.resolve("nll"),
            {"train": opened.learned.stream},
            Recipe(stage_of(config), config.optimizer),
            record=stored.NAME,
        ).to_host()


def cost(opened: Opened, trained: Model) -> dict[str, Any]:
    """What the training took; its time is measured once, and kept with the run."""
    run, learned, steps = opened.run, opened.learned, opened.steps

    def seconds() -> float | None:
        spent = run.tracker.seconds(steps) if isinstance(run.tracker, Timed) else None
        return None if spent is None else round(spent, 2)

    epochs = steps * opened.config.train.batch_size / len(learned.stream)
    return {
        "train_tokens": round(epochs * learned.tokens),
        "token_ratio": learned.token_ratio,
        "thought_ratio": learned.thought_ratio,
        "packing_waste": learned.stream.waste,
        "train_steps": steps,
        "train_flops": epochs * encoding.flops(trained.decoder, learned.stream),
        "train_seconds": json_stage(
            run.folder / "computed" / "seconds.json", {"params": trained.sha}, seconds
        ),
    }


class Context(evaluation.ModelContext):
    """What the evaluator asks: answers, and the likelihood of the right one behind its trace."""

    def scores(self, split: str) -> dict[str, list[Any]]:
        """`answers`: values at the labels of every row's final answer."""
        items = [
            encoding.answer_example(self.model.tokenizer, row["row"], self.system_prompt)
            for row in self.rows[split]
        ]
        tokens, label = self.config.score_tokens, f"{self.name}: score {split}"
        return {"answers": score_items(self.model, items, self.mesh, tokens, label)}


def judge(opened: Opened, found: Mapping[str, Model]) -> dict[str, Any]:
    """The metrics of every model, by its name; per-item logs go to `evals/`."""
    run, config = opened.run, opened.config
    test = [
        {"question": cot.find_trace(row).question, "gold": sources.gold(row), "row": row}
        for row in opened.rows.test
    ]
    summary = {}
    for name, model in found.items():
        inputs = {
            **model.identity(),
            "rows": opened.rows.digest(),
            "system_prompt": config.data.system_prompt,
            "evaluate": to_json(config.evaluate),
            "version": [evaluation.VERSION, EVALUATOR.version],
        }

        def compute(model: Model = model, name: str = name) -> Any:
            context = Context(
                model=model.to_device(),
                rows={"test": test},
                config=config.evaluate,
                system_prompt=config.data.system_prompt,
                max_length=config.data.row_tokens,
                mesh=run.mesh,
                seed=config.seed,
                name=name,
            )
            return EVALUATOR.run(context.model, context.rows, context)

        cache = run.cache if name == "base" else None
        with phase(run, f"evaluate {name}"):
            log = json_stage(run.folder / "evals" / f"{name}.json", inputs, compute, cache)
        summary[name] = evaluation.summarize(log, None, model)
    summary[STAGE] |= cost(opened, found[STAGE])
    return summary


def export(opened: Opened, trained: Model) -> None:
    """`RUN/export`: the trained model, with a card."""
    run, config = opened.run, opened.config
    how = config.condense
    what = (
        f"A model that learned to reason from traces ({config.preset}, seed {config.seed}) with "
        f"jaxlib-unlearn; of each trace {how.tau:g} of the thoughts ({how.policy})."
    )
    with phase(run, "export"):
        text = cards.plain(what, trained.sha)
        tokens = config.evaluate.max_new_tokens
        export_model(trained, run.folder / "export", config.export_dtype, text, tokens)


def report(opened: Opened, summary: Mapping[str, Any]) -> None:
    """`summary.json`, the page, and its numbers on the terminal."""
    publish(opened.run, summary)
