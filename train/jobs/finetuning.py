"""The fine-tuning job: a model learns from traces, condensed and packed, and is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn import cot, objectives
from train.data.bpe import train_bpe
from train.engine import base_models
from train.engine.exports import export_model
from train.engine.replays import stored
from train.engine.run import phase
from train.engine.run import train as train_stage
from train.evaluators import EVALUATORS, evaluation
from train.evaluators.evaluation import Model, num_parameters, score_items
from train.jobs import encoding, job, sources
from train.jobs.finetuning_options import ReasoningRun, recipe_of, stretched
from train.jobs.job import Fitted, Job, Judged, Started
from train.options import checks
from train.options.config import DataConfig, to_json
from train.options.recipe import num_steps
from train.options.roles import NONE, Roles
from train.runtime import cards
from train.runtime.stages import json_stage
from train.runtime.tracking import Timed
from train.tasks.task import prompt_format

STAGE = "finetuned"
EVALUATOR = EVALUATORS["final_answer"]


def run(config: ReasoningRun, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder, which is held meanwhile.

    Args:
        config: the configuration.
        command: the command line that repeats the run, for its page.
    """
    with job.start(JOB, config, command) as started:
        # 1. Learn from the traces, which were condensed and packed as they were read.
        finetuned = train(started)

        # 2. Judge the model before and after alike: it reasons, and its final answer counts.
        judged = judge(started, {"base": started.model, STAGE: finetuned})
        judged.summary[STAGE] |= cost(started, finetuned)

        # 3. Hand it back.
        job.export(started.run, lambda folder: export(config, finetuned, folder))
        return job.end(started.run, judged.summary)


class Packed(NamedTuple):
    """The rows of a run as its model reads them.

    Args:
        learned: the packed rows.
        test: the rows to judge by.
        steps: the number of steps of the training.
    """

    learned: encoding.Learned
    test: list[sources.Row]
    steps: int


def check(config: ReasoningRun, mesh: Any) -> None:
    """Raise `UserError` for errors that are known before rows and model are read."""
    encoding.check_packing(config.data)
    checks.check_recipe(recipe_of(config), objectives.resolve("nll"), mesh, "fine-tuning")


def layout_of(config: ReasoningRun) -> Any:
    """The prompt format."""
    data = config.data
    return prompt_format(DataConfig(template=data.template, template_date=data.template_date))


def load(config: ReasoningRun) -> sources.Rows:
    """The rows of a run."""
    layout_of(config)
    base_models.check_model(config.model.path, config.model.revision)
    return sources.load(config.data, config.seed)


def model(config: ReasoningRun, rows: sources.Rows, mesh: Any) -> Model:
    """The model before training: random and tiny (`scratch`), or loaded.

    Raises:
        UserError: nothing is found at the path.
    """
    m = config.model
    if m.path == "scratch":
        # Trained on whole traces: runs that shorten them differently share one tokenizer.
        tokenizer = train_bpe(encoding.texts(rows.train), m.vocab_size, m.split_digits)
        context = m.context or config.data.row_tokens
        made = base_models.scratch_model(m, tokenizer, context, config.seed, mesh)
    else:
        made = base_models.load_model(m.path, m.remat, mesh, m.dtype, m.revision, rows.notes)
    shape = stretched(made.decoder.config, m)
    made = made._replace(decoder=dataclasses.replace(made.decoder, config=shape))
    made = base_models.masking_pad_ids(made) if m.mask_all_pad_id_tokens else made
    return made._replace(tokenizer=made.tokenizer.formatted(layout_of(config)))


def fit(config: ReasoningRun, rows: sources.Rows, base: Model, mesh: Any) -> Fitted:
    """The rows as the model reads them; checks that it can be trained on them."""
    shape = base.decoder.config
    checks.check_model(recipe_of(config), objectives.resolve("nll"), base.learner)
    learned = encoding.learned(
        rows.train,
        base.tokenizer,
        config.condense,
        config.data,
        shape.max_position_embeddings,
        config.seed,
    )
    test = encoding.answerable(rows.test, base.tokenizer, config.data.system_prompt, shape)
    steps = num_steps(config.train, len(learned.stream), config.optimizer)
    notes = [*rows.notes, words(learned)]
    if len(test) < len(rows.test):
        notes.append(
            f"Judged by {len(test)} of the {len(rows.test)} rows drawn; the others fill the "
            "model's context."
        )
    size = f"{num_parameters(base.params) / 1e6:.1f} M parameters"
    return Fitted(Packed(learned, test, steps), size, notes, [EVALUATOR.name])


def words(learned: encoding.Learned) -> str:
    """The rows that are trained on, in a sentence."""
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


JOB = Job("train.finetune", Roles("base", NONE, STAGE), check, load, model, fit)


def train(started: Started) -> Model:
    """The training stage: the packed rows, epoch by epoch."""
    with phase(started.run, STAGE):
        return train_stage(
            started.run,
            STAGE,
            started.model,
            objectives.resolve("nll"),
            {"train": started.parts.learned.stream},
            recipe_of(started.config),
            record=stored.NAME,
        ).to_host()


def cost(started: Started, trained: Model) -> dict[str, Any]:
    """The cost of the training; its time is measured once, and kept with its result."""
    here, (learned, _, steps) = started.run, started.parts

    def seconds() -> float | None:
        spent = here.tracker.seconds(steps) if isinstance(here.tracker, Timed) else None
        return None if spent is None else round(spent, 2)

    epochs = steps * started.config.train.batch_size / len(learned.stream)
    path = here.folder / "computed" / "seconds.json"
    return {
        "train_tokens": round(epochs * learned.tokens),
        "token_ratio": learned.token_ratio,
        "thought_ratio": learned.thought_ratio,
        "packing_waste": learned.stream.waste,
        "train_steps": steps,
        "train_flops": epochs * encoding.flops(trained.decoder, learned.stream),
        "train_seconds": json_stage(path, {"params": trained.sha}, seconds, here.cache),
    }


class ReasoningContext(evaluation.ModelContext):
    """The evaluator's context: answers, and the likelihood of the right one behind its trace."""

    def scores(self, split: str) -> dict[str, list[Any]]:
        """The values at the labels of every row's final answer, under `answers`."""
        items = [
            encoding.answer_example(self.model.tokenizer, row["row"], self.system_prompt)
            for row in self.rows[split]
        ]
        tokens, label = self.config.score_tokens, f"{self.name}: score {split}"
        return {"answers": score_items(self.model, items, self.mesh, tokens, label)}


def judge(started: Started, models: Mapping[str, Model]) -> Judged:
    """Judge the models alike, by the final answers that they reason to."""
    config, test = started.config, started.parts.test
    digest = started.rows._replace(test=test).digest()
    asked = [
        {"question": cot.find_trace(row).question, "gold": sources.gold(row), "row": row}
        for row in test
    ]

    def inputs(trained: Model, name: str) -> dict[str, Any]:
        return {
            **trained.identity(),
            "rows": digest,
            "system_prompt": config.data.system_prompt,
            "evaluate": to_json(config.evaluate),
            "version": [evaluation.VERSION, EVALUATOR.version],
        }

    def log(trained: Model, name: str) -> Mapping[str, Any]:
        context = ReasoningContext(
            model=trained.to_device(),
            rows={"test": asked},
            config=config.evaluate,
            system_prompt=config.data.system_prompt,
            max_length=config.data.row_tokens,
            mesh=started.run.mesh,
            seed=config.seed,
            name=name,
        )
        return EVALUATOR.run(context.model, context.rows, context)

    return job.judge(started.run, models, inputs, log)


def export(config: ReasoningRun, trained: Model, folder: Path) -> None:
    """The trained model, with a card."""
    how = config.condense
    what = (
        f"A model that learned to reason from traces ({config.preset}, seed {config.seed}) with "
        f"jaxlib-unlearn; of each trace {how.tau:g} of the thoughts ({how.policy})."
    )
    text, tokens = cards.plain(what, trained.sha), config.evaluate.max_new_tokens
    export_model(trained, folder, config.export_dtype, text, tokens)
