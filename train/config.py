"""The configuration of a run: frozen dataclasses, overridden on the command line by tyro."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlib_unlearn.objectives import ObjectiveConfig
from models.prompts import DATE
from train.optimizers import OptimizerConfig
from train.runtime.distributed import DistributedConfig
from train.runtime.sharding import MeshConfig


@dataclass(frozen=True)
class DataConfig:
    """What is forgotten, kept and asked.

    Args:
        source: `authors` (generated in the run) or `tofu`.
        path: folder with TOFU's JSON files; None: the Hub id locuslab/TOFU.
        revision: commit, branch or tag of the Hub's data set; None: the newest. The run notes the
            commit.
        forget_split: name of the split to forget, or a JSON file with `question` and `answer`.
        retain_rows: how many rows of `retain_split` are kept and trained on; None: all.
        extra_rows: how many real-author and world-fact rows are evaluated; None: all.
        holdout_rows: how many untrained rows serve as non-members.
        num_authors: authors made by the generator (quickstart).
        seed: seed of the generator; None: the run's seed.
        system_prompt: system message of the chat template; None: the template's own default.
        max_length: longest tokenised example; longer ones are cut and counted.
        row_tokens: short training examples share rows of about that many tokens, behind what their
            prompts begin with; 0: a row each. The losses are the same.
        forget_rows: how many rows of the forget split are used, from the first on; None: all.
        retain_split: name of the split that is kept and trained on (`retain90`), or a JSON file.
        judged_retain_split: name of the split, or a JSON file, on which keeping is judged.
        judged_retain_rows: how many of its rows; None: as many as `retain_rows`.
        template: how questions are written: `auto` (the tokenizer's chat template, or "Question:"
            and "Answer:" where there is none), or tags of OpenUnlearning for models without one:
            `llama2` ([INST]) or `question-answer`.
        template_date: today's date in chat templates that print one.
        few_shot: JSON file of answered questions that stand before every question.
        alternates: other answers a forget question that are sampled from the model before it learns
            the facts, for objectives that teach some, where the rows bring no `alternate_answer`;
            0: none.
        forget: file of your own rows to forget (JSON, JSONL, CSV or parquet; a question and an
            answer are enough), in place of `source`; goes with `retain`.
        retain: file of your own rows to keep: all are trained on, the first `retain_rows` judged.
    """

    source: str = "tofu"
    path: Path | None = None
    revision: str | None = None
    forget_split: str = "forget01"
    retain_rows: int | None = 100
    extra_rows: int | None = 50
    holdout_rows: int = 40
    num_authors: int = 40
    seed: int | None = None
    system_prompt: str | None = None
    max_length: int = 512
    row_tokens: int = 320
    forget_rows: int | None = None
    retain_split: str = "retain_perturbed"
    judged_retain_split: str = "retain_perturbed"
    judged_retain_rows: int | None = None
    template: str = "auto"
    template_date: str = DATE
    few_shot: Path | None = None
    alternates: int = 3
    forget: Path | None = None
    retain: Path | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The model to start from.

    Args:
        path: an HF folder, a `.gguf` file, a Hub id, `smollm2` (the installed package) or `scratch`
            (random weights). `owner/name` is a Hub id where no such path exists, `hub:owner/name`
            always.
        revision: commit, branch or tag of a Hub id; None: the newest. The run notes the commit.
        vocab_size: of the tokenizer trained in the run (from scratch only), as the sizes below.
        hidden_size: width of the residual stream.
        intermediate_size: width inside an MLP.
        num_layers: blocks.
        num_heads: attention heads.
        num_kv_heads: heads of keys and values, shared by groups of attention heads.
        dtype: what the model computes in, `float32` or `bfloat16`; its parameters stay float32.
        remat: what the backward pass recomputes: `none`, `dots` (all but the projections: half of
            the temporaries for hardly more work, which where memory is slow is less time) or `full`
            (whole blocks: a quarter, for a quarter more work).
        mask_all_pad_id_tokens: no token attends to one whose id is the padding token's, wherever it
            stands, as in OpenUnlearning: with Llama-3's templates to no end of a turn. For
            comparison with its numbers; training, scoring and generation alike.
    """

    path: str = "smollm2"
    revision: str | None = None
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    dtype: str = "float32"
    remat: str = "dots"
    mask_all_pad_id_tokens: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """One training stage.

    Args:
        epochs: passes over the stage's main stream (ignored when `steps` is given).
        steps: optimizer steps; None: from `epochs`.
        batch_size: global rows of each stream in a step.
        accumulate: micro-batches a step is split into; the numbers do not depend on it.
        optimizer: how a step is taken.
        curve_points: evaluations of forget and retain along the stage (0: none).
        checkpoint_seconds: least time between two checkpoints.
    """

    epochs: float = 10.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    curve_points: int = 0
    checkpoint_seconds: float = 120.0


@dataclass(frozen=True)
class UnlearnConfig:
    """The unlearning stage; its optimizer is `--optimizer.*`, its objective `--objective.*`.

    Args:
        epochs: passes over the rows to forget (ignored when `steps` is given).
        steps: optimizer steps; None: from `epochs`.
        batch_size: global rows of each stream in a step.
        accumulate: micro-batches a step is split into; the numbers do not depend on it.
        curve_points: evaluations of forget and retain along the stage (0: none).
        checkpoint_seconds: least time between two checkpoints.
    """

    epochs: float = 5.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    curve_points: int = 5
    checkpoint_seconds: float = 120.0


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of the parameters, in the unlearning stage.

    The model is frozen, the optimizer sees the adapters alone, and what is judged and exported is
    the model with the adapters merged into it.

    Args:
        rank: r of the adapters; None: no adapters, every parameter is trained.
        alpha: the adapters' term is multiplied by alpha / rank; None: the rank, so by 1.
        targets: kernels that get one, by name.
    """

    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class StageConfig:
    """Start from results that exist.

    Args:
        original: a model (HF folder or GGUF) that already knows the facts.
        cache: folder (or `gs://…`) that runs share: an original or oracle made from the same
            inputs, and its evaluation, are taken from there, or put there for the next run.
    """

    original: str | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class EvaluateConfig:
    """How models are judged.

    Args:
        max_new_tokens: greedy answers are cut there.
        leak_samples: sampled answers a forget question, for leak@k (0: none).
        leak_temperature: their sampling temperature.
        leak_top_p: their nucleus mass.
        leak_question: `question` or `paraphrased_question`.
        score_tokens: rows times length of one scoring batch.
        generate_rows: rows decoded at once.
        judge: whose NLL of the greedy forget answers measures fluency: `oracle` or `base` (before
            fine-tuning).
    """

    max_new_tokens: int = 64
    leak_samples: int = 16
    leak_temperature: float = 1.0
    leak_top_p: float = 1.0
    leak_question: str = "question"
    score_tokens: int = 4096
    generate_rows: int = 64
    judge: str = "oracle"


@dataclass(frozen=True)
class RunConfig:
    """One unlearning run: original, oracle, unlearned, evaluated, reported, exported.

    Args:
        preset: name of the preset this configuration started from.
        seed: everything random follows from it.
        smoke: few steps and samples through the same code, for a first look.
        output: run folder, also in a bucket (`gs://…`); None: `runs/PRESET-seedN` (with `-smoke`).
        combine: how the gradients of the forget and the retain side become one: sum, blur, pcgrad.
        retain_log: per-item log (OpenUnlearning EVAL.json or ours) of a retain-only model; skips
            the oracle.
        oracle: train the retain-only model (forget quality needs it, unless `retain_log` is given).
        export_dtype: dtype of the exported weights.
        tensorboard: the same as `report_to` tensorboard.
        profile: folder for a trace of a few unlearning steps, which TensorBoard, XProf and Perfetto
            show; None: no trace.
        distributed: the processes of the run, where it has several.
        report_to: logs that get the numbers too, with commas between them: tensorboard, wandb,
            trackio.
    """

    preset: str = ""
    seed: int = 0
    smoke: bool = False
    output: Path | None = None
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    stage: StageConfig = StageConfig()
    retain_log: Path | None = None
    oracle: bool = True
    finetune: TrainConfig = TrainConfig()
    unlearn: UnlearnConfig = UnlearnConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    combine: str = "sum"
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export_dtype: str = "float32"
    tensorboard: bool = False
    profile: Path | None = None
    distributed: DistributedConfig = DistributedConfig()
    report_to: str = ""


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values (paths as strings)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def replace(config: Any, **changes: Any) -> Any:
    """`dataclasses.replace` with dotted names, `replace(c, **{"evaluate.leak_samples": 4})`."""
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        value = replace(getattr(config, head), **{rest: value}) if rest else value
        config = dataclasses.replace(config, **{head: value})
    return config
