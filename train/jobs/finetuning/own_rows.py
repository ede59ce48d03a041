"""Fine-tuning on questions and answers of a file: the rows of `train.finetune MODEL ROWS`."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import MOST, option
from models.text.prompts import DATE
from train.options.config import ModelConfig, RunConfig, TrainConfig, replace, to_json
from train.options.optimizer_options import AdamW
from train.runtime.distributed import DistributedConfig
from train.runtime.sharding import MeshConfig
from train.runtime.tracking import Tracker, say


@dataclass(frozen=True)
class FinetuneRun:
    """One fine-tuning.

    Args:
        model: set by the first argument: HF folder, `.gguf` file, Hub id or `smollm2`.
        rows: set by the second: JSON lines or a JSON list with `question` and `answer`.
        smoke: a few steps, for a first look.
        output: run folder; the model goes to `export/` in it.
        system_prompt: system message of the chat template.
        template: how questions are written, as `--data.template` of train.unlearn.
        template_date: today's date in chat templates that print one.
        export_dtype: dtype of the exported weights.
        train: the stage.
        mesh: devices.
        distributed: the processes, where there are several.
    """

    model: str = ""
    rows: str = ""
    seed: int = option(0, "order of the rows.", low=0, high=MOST)
    smoke: bool = False
    output: Path = Path("runs/finetune")
    system_prompt: str | None = None
    template: str = "auto"
    template_date: str = DATE
    max_length: int = option(512, "longest example in tokens.", low=2)
    export_dtype: str = "float32"
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(epochs=5, optimizer=AdamW(learning_rate=1e-5))
    )
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()


def run(config: FinetuneRun) -> Path:
    """Fine-tune and export; resumes like every stage."""
    with contextlib.ExitStack() as held:
        return _run(config, held)


def _run(config: FinetuneRun, held: contextlib.ExitStack) -> Path:
    from train.data.tofu import check_rows, read_json
    from train.engine import base_models
    from train.engine.exports import export_model
    from train.engine.replays import stored
    from train.engine.run import Run, num_steps
    from train.jobs.unlearning import pipeline
    from train.options import checks, optimizers
    from train.runtime import distributed, folder, remote, sharding
    from train.runtime.stages import digest, write_atomic
    from train.tasks import fitting
    from train.tasks.task import prompt_format

    distributed.start(config.distributed)
    identity = {**to_json(config), "output": None}
    del identity["distributed"]
    place = folder.run_place(config.output, identity)
    distributed.check_same(identity)
    settings = RunConfig(seed=config.seed, finetune=config.train)
    names = ("system_prompt", "max_length", "template", "template_date")
    settings = replace(settings, **{f"data.{name}": getattr(config, name) for name in names})
    with distributed.together():
        checks.check_numbers(config)
        layout = prompt_format(settings.data, "--")
        checks.check_dtype("--export-dtype", config.export_dtype)
        remote.check(config.output, "--output")
        mesh = sharding.make_mesh(config.mesh)
        checks.check_finetuning(config.train, mesh)
        optimizers.check_mesh(config.train.optimizer, mesh, config.train.batch_size)
        folder.claim(place, held)
        path = Path(config.rows)
        if not path.is_file():
            raise UserError(
                f"rows file {path} does not exist; give a JSON file with question and answer"
            )
        rows = check_rows(read_json(path), ("question", "answer"), str(path))
    distributed.check_same({"rows": digest(rows)})
    base = base_models.load_model(config.model, ModelConfig().remat, mesh).to_host()
    checks.check_blocks(config.train.optimizer, base.decoder.config.num_layers)
    base = base._replace(tokenizer=base.tokenizer.formatted(layout))
    rows = fitting.fit_rows(rows, base, config.system_prompt, config.max_length, "rows")
    num_steps(config.train, len(rows), config.train.optimizer)
    root = folder.enter(place, held)
    run = Run(root, mesh, config.seed, Tracker(root))
    tuned = pipeline.finetune(run, settings, "original", base, rows, record=stored.NAME)
    export_model(tuned, root / "export", config.export_dtype)
    summary = {"original": {"params_sha256": tuned.sha}}

    def tell() -> None:
        write_atomic(root / "summary.json", json.dumps(summary, indent=1))
        remote.send(root)

    distributed.of_first(tell)
    say(f"model: {remote.home(root) / 'export'}")
    return root
