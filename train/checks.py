"""What is refused before compute: settings that cannot work, and rows that a model cannot read."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from models import lora
from models.bounds import LARGEST as LARGEST_SIZE
from models.bounds import MOST_LAYERS
from models.decoder import REMAT
from models.weights import DTYPES
from train import optimizers, suggest
from train.config import EvaluateConfig, LoraConfig, RunConfig, TrainConfig, UnlearnConfig
from train.data.examples import encode_prompt
from train.evaluators.evaluation import Model, longest
from train.optimizers import OptimizerConfig
from train.runtime import remote, reporters, sharding
from train.runtime.tracking import say
from train.tasks.task import Row, Task

# Lowest and highest value of a number, by the last part of its name.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "forget_rows": (1, math.inf),
    "retain_rows": (1, math.inf),
    "judged_retain_rows": (1, math.inf),
    "extra_rows": (0, math.inf),
    "holdout_rows": (0, math.inf),
    "num_authors": (1, math.inf),
    "max_length": (2, math.inf),
    "row_tokens": (0, math.inf),
    "vocab_size": (1, 2**20),
    "hidden_size": (1, math.inf),
    "intermediate_size": (1, math.inf),
    "num_layers": (1, MOST_LAYERS),
    "num_heads": (1, math.inf),
    "num_kv_heads": (1, math.inf),
    "epochs": (0, 1e9),
    "steps": (1, math.inf),
    "batch_size": (1, math.inf),
    "accumulate": (1, math.inf),
    "curve_points": (0, math.inf),
    "checkpoint_seconds": (0, math.inf),
    "warmup": (0, 1),
    "weight_decay": (0, math.inf),
    "eps": (1e-30, math.inf),  # Adam divides 0 by it where a gradient was never anything else
    "clip_norm": (0, math.inf),
    "rank": (1, math.inf),
    "threshold": (-math.inf, math.inf),
    "group_size": (1, math.inf),
    "alpha": (1e-30, math.inf),
    "queries": (1, math.inf),
    "perturbation": (1e-12, math.inf),
    "refresh": (1, math.inf),
    "vector_rate": (0, math.inf),
    "period": (1, math.inf),
    "max_new_tokens": (1, math.inf),
    "leak_samples": (0, math.inf),
    "leak_temperature": (0, 1e9),
    "leak_top_p": (1e-9, 1),
    "score_tokens": (1, math.inf),
    "generate_rows": (1, math.inf),
}
# Decays, up to 1 and without it: a mean with decay 1 never takes up a gradient, and dividing it by
# 1 - 1^t gives no number at all.
DECAYS = ("b1", "b2", "momentum")
LARGEST = float(np.finfo(np.float32).max)  # steps are float32: what is larger is infinite there
UNBOUNDED = ("checkpoint_seconds",)  # on the host alone: inf is never
JUDGES = ("oracle", "base")
COMPUTE = ("float32", "bfloat16")
QUESTIONS = ("question", "paraphrased_question")


def check_numbers(config: Any, prefix: str = "--") -> None:
    """Raise `UserError` for a number of a configuration (nested ones too) outside its range."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{prefix}{field.name}".replace("_", "-")
        if dataclasses.is_dataclass(value):
            check_numbers(value, name + ".")
            continue
        if field.name.endswith("learning_rate") and value is not None and not value > 0:
            raise UserError(f"{name} is {value}; it must be positive")
        if isinstance(value, float) and field.name not in UNBOUNDED and not abs(value) <= LARGEST:
            raise UserError(f"{name} is {value}; it must be a number that float32 holds")
        if type(value) is int and abs(value) >= 2**31:
            raise UserError(f"{name} is {str(value)[:24]}; it must be below 2^31")
        if isinstance(value, int | float) and field.name in DECAYS and not 0 <= value < 1:
            raise UserError(f"{name} is {value}; it must be at least 0 and below 1")
        if value is not None and field.name in RANGES:
            low, high = RANGES[field.name]
            most = min(high, LARGEST_SIZE) if isinstance(value, int) else high
            if not low <= value <= most:
                high = most if value > most else high
                wanted = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:.10g}"
                raise UserError(f"{name} is {value}; it must be {wanted}")


def check_stage(
    stage: TrainConfig | UnlearnConfig, optimizer: OptimizerConfig, mesh: Mesh, what: str
) -> None:
    """Raise `UserError` for an unknown optimizer or work that does not divide over the mesh."""
    optimizers.check(optimizer)
    if optimizers.OPTIMIZERS[optimizer.name].sides:
        optimizers.check_mesh(optimizer, mesh)
    sharding.check_batch(mesh, stage.batch_size, stage.accumulate, what)


def check_finetuning(stage: TrainConfig, mesh: Mesh) -> None:
    """As `check_stage`; raises for an optimizer that needs more than its one side, too."""
    check_stage(stage, stage.optimizer, mesh, "fine-tuning")
    nll = objectives.resolve(objectives.ObjectiveConfig("nll"))
    optimizers.check_pair(stage.optimizer, "sum", *nll)


def check_evaluate(config: EvaluateConfig) -> None:
    """Raise `UserError` for an unknown judge or question column."""
    suggest.check_choice("--evaluate.judge", config.judge, JUDGES)
    suggest.check_choice("--evaluate.leak-question", config.leak_question, QUESTIONS)


def check_dtype(option: str, value: str) -> None:
    """Raise `UserError` for a dtype that weights cannot be exported in."""
    suggest.check_choice(option, value, tuple(DTYPES))


def check_blocks(optimizer: OptimizerConfig, num_layers: int) -> None:
    """Raise `UserError` for a group of blocks that a model does not have."""
    size = optimizer.group_size
    if optimizer.name == "teon" and size > max(1, num_layers):
        raise UserError(
            f"--optimizer.group-size {size}: the model has {num_layers} block(s), so teon would "
            f"group none; use at most {num_layers}, or --optimizer.name muon"
        )


def check_lora(config: LoraConfig, optimizer: OptimizerConfig, params: Any = None) -> None:
    """Raise `UserError` for adapters that an optimizer or a model cannot have.

    `params` (arrays or shapes) are the model's; None: it is not read yet.
    """
    if config.rank is None:
        odd = [f for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
        if odd:
            raise UserError(
                f"--lora.{odd[0].name} {getattr(config, odd[0].name)}: no adapters without "
                "--lora.rank; give it, or leave this out"
            )
        return
    if optimizer.name == "teon":
        raise UserError(
            "--lora.rank does not go with optimizer teon, which orthogonalises one projection of "
            "neighbouring blocks together: the columns of two blocks' adapters have nothing in "
            "common; use --optimizer.name muon"
        )
    if optimizer.name == "sift" and config.rank < 2:
        raise UserError(
            "--lora.rank 1 does not go with optimizer sift, which keeps a direction of each of two "
            "momenta in a matrix; use --lora.rank 2 or more"
        )
    if not config.targets:
        raise UserError("--lora.targets is empty; leave it out for all projections of a block")
    if params is None:
        return
    known = lora.kernels(params)
    for name in config.targets:
        _, (fan_in, fan_out) = suggest.choose(name, known, "--lora.targets")
        if config.rank > min(fan_in, fan_out):
            raise UserError(
                f"--lora.rank {config.rank} is larger than {name}'s matrices of this model "
                f"({fan_in} in, {fan_out} out); use at most {min(fan_in, fan_out)}, or leave "
                f"{name} out of --lora.targets"
            )


def check_writable(option: str, folder: Path) -> None:
    """Raise `UserError` unless a local folder is there, or can be made, and takes files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{option} {folder} cannot be written: {error.strerror}; give another folder"
        ) from None


def check_run(config: RunConfig) -> Mesh:
    """Everything about a run that is known before data and model are read; returns its mesh.

    Raises:
        UserError: a number out of range, an unknown name, a mesh that does not fit.
    """
    check_numbers(config)
    objective, options = objectives.resolve(config.objective)
    objectives.check_accumulation(objective, config.unlearn.accumulate)
    optimizers.check_pair(config.optimizer, config.combine, objective, options)
    check_lora(config.lora, config.optimizer)
    check_evaluate(config.evaluate)
    check_dtype("--export-dtype", config.export_dtype)
    suggest.check_choice("--model.dtype", config.model.dtype, COMPUTE)
    suggest.check_choice("--model.remat", config.model.remat, tuple(REMAT))
    reporters.check(reporters.chosen(config.report_to, config.tensorboard))
    if config.profile is not None:
        check_writable("--profile", config.profile)
    cache = None if config.stage.cache is None else remote.located(config.stage.cache)
    remote.check(config.stage.cache, "--stage.cache")
    remote.check(config.output, "--output")
    if cache is not None and cache.exists() and not cache.is_dir():
        raise UserError(f"--stage.cache {cache} is not a folder; give a folder, or leave it out")
    mesh = sharding.make_mesh(config.mesh)
    check_finetuning(config.finetune, mesh)
    check_stage(config.unlearn, config.optimizer, mesh, "unlearning")
    optimizers.check_mesh(config.optimizer, mesh)
    return mesh


def fit_rows(
    rows: list[Row], model: Model, system_prompt: str | None, max_length: int, what: str
) -> list[Row]:
    """The rows whose prompt leaves room for a label; the others are counted in a line.

    Raises:
        UserError: no row is left.
    """
    limit = longest(model, max_length)
    sizes = [
        len(encode_prompt(model.tokenizer, row["question"], system_prompt=system_prompt))
        for row in rows
    ]
    kept = [row for row, size in zip(rows, sizes, strict=True) if size < limit]
    if rows and not kept:
        raise UserError(
            f"{what}: every prompt fills the {limit} tokens of the context (shortest: {min(sizes)})"
            ", so no label is left; shorten the questions or raise --data.max-length"
        )
    if len(kept) < len(rows):
        say(f"{what}: {len(rows) - len(kept)} row(s) left out, their prompt fills {limit} tokens")
    return kept


def fit_task(
    task: Task,
    model: Model,
    evaluate: EvaluateConfig,
    system_prompt: str | None,
    max_length: int,
) -> Task:
    """The task with the rows that the model can read; what is left out becomes a note.

    Raises:
        UserError: a split of which no row is left, or rows without the column that is asked.
    """
    column = evaluate.leak_question
    if evaluate.leak_samples and not all(column in r for r in task.evaluation.get("forget", ())):
        raise UserError(
            f"--evaluate.leak-question {column}: forget rows without that column; add it or use "
            "question"
        )

    def fit(rows: list[Row], what: str) -> list[Row]:
        return fit_rows(rows, model, system_prompt, max_length, what)

    forget = fit(task.forget, "forget")
    retain = fit(task.retain, "retain")
    done = [(task.forget, forget), (task.retain, retain)]
    judged = {}
    for name, rows in task.evaluation.items():
        same = [kept for given, kept in done if given == rows]
        judged[name] = same[0] if same else fit(rows, f"{name} (evaluation)")
    notes = list(task.notes)
    before = len(task.forget) + len(task.retain) + sum(map(len, task.evaluation.values()))
    left = before - len(forget) - len(retain) - sum(map(len, judged.values()))
    if left:
        notes.append(f"left out, their prompt fills the context: {left} rows of all splits")
    return task._replace(forget=forget, retain=retain, evaluation=judged, notes=notes)
