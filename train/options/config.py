"""The configuration of a run: frozen dataclasses, overridden on the command line by tyro.

The field of an option has its range or choices and its description in `--help`. The fields of the
objective and of the optimizers are those of the rows in use, see `rows`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlib_unlearn import objectives
from jaxlib_unlearn.options import MOST, option
from models.bounds import MOST_LAYERS
from models.decoder.model import REMAT
from models.files.weights import DTYPES
from models.text.prompts import DATE
from train.options import optimizers
from train.options.optimizer_options import AdamW
from train.options.roles import ROLES
from train.options.rows import Rows, chosen, rows_of
from train.runtime import reporters
from train.runtime.distributed import DistributedConfig
from train.runtime.sharding import MeshConfig

COMPUTE = ("float32", "bfloat16")
JUDGES = (ROLES.reference, "base")
QUESTIONS = ("question", "paraphrased_question")
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
OBJECTIVE = Rows(
    objectives.OBJECTIVES,
    objectives.options_of,
    # Options tuned for one objective mean nothing to another.
    lambda options, name: objectives.options_of(name),
    lambda row, option, value, prefix: objectives.not_used(row, option),
)


@dataclass(frozen=True)
class DataConfig:
    """What is forgotten, kept and asked."""

    source: str = option(
        "tofu", "the benchmark, such as `authors` (generated in the run), `tofu` or `documents`."
    )
    path: Path | None = option(
        None, "folder with TOFU's JSON files; None: the Hub id locuslab/TOFU."
    )
    revision: str | None = option(
        None,
        "commit, branch or tag of the Hub's data set; None: the newest. The run notes the commit.",
    )
    forget_split: str = option(
        "forget01", "name of the split to forget, or a JSON file with `question` and `answer`."
    )
    retain_rows: int | None = option(
        100, "how many rows of `retain_split` are kept and trained on; None: all.", low=1
    )
    extra_rows: int | None = option(
        50, "how many real-author and world-fact rows are evaluated; None: all.", low=0
    )
    holdout_rows: int = option(40, "how many untrained rows serve as non-members.", low=0)
    num_authors: int = option(40, "authors made by the generator (quickstart).", low=1)
    seed: int | None = option(
        None, "seed of the generator; None: the run's seed.", low=0, high=MOST
    )
    system_prompt: str | None = option(
        None, "system message of the chat template; None: the template's own default."
    )
    max_length: int = option(
        512, "longest tokenised example; longer ones are cut and counted.", low=2
    )
    row_tokens: int = option(
        320,
        "short training examples are packed into rows of about that many tokens, after the start "
        "that their prompts share; 0: one row each. The losses are the same.",
        low=0,
    )
    forget_rows: int | None = option(
        None, "how many rows of the forget split are used, from the first; None: all.", low=1
    )
    retain_split: str = option(
        "retain_perturbed",
        "name of the split that is kept and trained on (`retain90`), or a JSON file.",
    )
    judged_retain_split: str = option(
        "retain_perturbed", "name of the split, or a JSON file, on which retention is evaluated."
    )
    judged_retain_rows: int | None = option(
        None, "how many of its rows; None: as many as `retain_rows`.", low=1
    )
    template: str = option(
        "auto",
        'how questions are written: `auto` (the tokenizer\'s chat template, or "Question:" and '
        '"Answer:" where there is none), or tags of OpenUnlearning for models without one: '
        "`llama2` ([INST]) or `question-answer`.",
    )
    template_date: str = option(DATE, "today's date in chat templates that print one.")
    few_shot: Path | None = option(
        None, "JSON file of answered questions that precede every question in the prompt."
    )
    alternates: int = option(
        3,
        "alternate answers per forget question, sampled from the model before it learns the facts, "
        "for objectives that train on them, where the rows have no `alternate_answer`; 0: none.",
        low=0,
    )
    alternate_temperature: float = option(
        1.0,
        "sampling temperature of these alternates. A small model writes whole sentences only below "
        "1.",
        low=0.01,
        high=100,
        later=True,
    )
    forget: tuple[Path, ...] = option(
        (),
        "a file of your own rows to forget (JSON, JSONL, CSV or parquet; a question and an answer "
        "are enough), in place of `source`; with `source` documents one or more texts or folders "
        "of texts (.txt, .md, JSONL with a column `text`). It goes with `retain`.",
    )
    retain: tuple[Path, ...] = option(
        (),
        "your own rows or documents to keep, as `forget`: all are trained on, and the first "
        "`retain_rows` rows or chunks are evaluated.",
    )
    holdout: tuple[Path, ...] = option(
        (), "documents that no model is trained on, as `forget`; membership attacks need them."
    )
    reasoning: Path | None = option(
        None, "of source reasoning-tofu: a file of GSM8K rows, the reasoning to keep.", later=True
    )
    reasoning_rows: int = option(
        150, "how many of them are trained on; up to 40 more are asked.", low=1, later=True
    )


@dataclass(frozen=True)
class ModelConfig:
    """The model to start from."""

    path: str = option(
        "smollm2",
        "an HF folder, a `.gguf` file, a Hub id, `smollm2` (the installed package) or `scratch` "
        "(random weights). `owner/name` is a Hub id where no such path exists, `hub:owner/name` "
        "always.",
    )
    revision: str | None = option(
        None, "commit, branch or tag of a Hub id; None: the newest. The run notes the commit."
    )
    vocab_size: int = option(
        1024,
        "of the tokenizer trained in the run (from scratch only), as the sizes below.",
        low=1,
        high=2**20,
    )
    split_digits: bool = option(
        False, "that tokenizer has every digit as a token of its own.", later=True
    )
    hidden_size: int = option(128, "width of the residual stream.", low=1)
    intermediate_size: int = option(384, "width inside an MLP.", low=1)
    num_layers: int = option(4, "blocks.", low=1, high=MOST_LAYERS)
    num_heads: int = option(4, "attention heads.", low=1)
    num_kv_heads: int = option(
        2, "heads of keys and values, shared by groups of attention heads.", low=1
    )
    dtype: str = option(
        "float32",
        "dtype of the computation, `float32` or `bfloat16`; parameters stay float32.",
        choices=COMPUTE,
    )
    remat: str = option(
        "dots",
        "what the backward pass recomputes: `none`, `dots` (all but the projections: half of the "
        "temporaries for hardly more compute, and faster where memory bandwidth is the limit) or "
        "`full` (whole blocks: a quarter of the temporaries, for a quarter more compute).",
        choices=tuple(REMAT),
    )
    mask_all_pad_id_tokens: bool = option(
        False,
        "mask every token with the padding token's id from attention, as OpenUnlearning does; with "
        "Llama-3's templates these include the ends of turns. For comparison with its numbers; "
        "applies to training, scoring and generation.",
    )


@dataclass(frozen=True)
class TrainConfig:
    """One training stage."""

    epochs: float = option(
        10.0,
        "passes over the stage's main stream (ignored when `steps` is given).",
        low=0,
        high=1e9,
    )
    steps: int | None = option(None, "optimizer steps; None: from `epochs`.", low=1)
    batch_size: int = option(8, "global rows of each stream in a step.", low=1)
    accumulate: int = option(
        1, "micro-batches that a step is split into; results do not depend on it.", low=1
    )
    optimizer: optimizers.Options = chosen(optimizers.ROWS, AdamW())
    curve_points: int = option(
        0, "evaluations of forget and retain along the stage (0: none).", low=0
    )
    checkpoint_seconds: float = option(
        120.0, "least time between two checkpoints.", low=0, high=math.inf
    )


@dataclass(frozen=True)
class UnlearnConfig:
    """The unlearning stage; its optimizer is `--optimizer.*`, its objective `--objective.*`."""

    epochs: float = option(
        5.0, "passes over the rows to forget (ignored when `steps` is given).", low=0, high=1e9
    )
    steps: int | None = option(None, "optimizer steps; None: from `epochs`.", low=1)
    batch_size: int = option(8, "global rows of each stream in a step.", low=1)
    accumulate: int = option(
        1, "micro-batches that a step is split into; results do not depend on it.", low=1
    )
    curve_points: int = option(
        5, "evaluations of forget and retain along the stage (0: none).", low=0
    )
    checkpoint_seconds: float = option(
        120.0, "least time between two checkpoints.", low=0, high=math.inf
    )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, trained in the unlearning stage instead of the parameters.

    The model is frozen, only the adapters are optimised, and the model with the adapters merged
    into it is evaluated and exported.
    """

    rank: int | None = option(
        None, "r of the adapters; None: no adapters, every parameter is trained.", low=1
    )
    alpha: float | None = option(
        None,
        "the adapters' term is multiplied by alpha / rank; None: the rank, so by 1.",
        low=1e-30,
    )
    targets: tuple[str, ...] = option(TARGETS, "names of the kernels to adapt.", words=TARGETS)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class SelectConfig:
    """Which leaves the unlearning stage trains, where it does not train all.

    Optimizer state and gradients exist for these alone, and nothing below the first of them is
    differentiated.
    """

    leaves: tuple[str, ...] | None = option(
        None, "names of leaves, as parts of their paths (`mlp/down`, `q`, `embed`); None: all."
    )
    blocks: tuple[int, ...] | None = option(None, "numbers of blocks, from 0 on; None: all.")

    def __post_init__(self) -> None:
        if self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(sorted(set(self.blocks))))

    @property
    def given(self) -> bool:
        """Whether anything is chosen."""
        return self.leaves is not None or self.blocks is not None


@dataclass(frozen=True)
class CacheConfig:
    """Existing results."""

    cache: Path | None = option(
        None,
        "folder (or `gs://…`) that runs share: models that are trained before what they differ in, "
        "and evaluations of the model before, made from the same inputs, are taken from there, or "
        "put there for the next run.",
        later=True,
    )


@dataclass(frozen=True)
class StageConfig:
    """Start from existing results."""

    original: str | None = option(None, "a model (HF folder or GGUF) that already knows the facts.")
    cache: Path | None = option(
        None,
        "folder (or `gs://…`) that runs share: an original or oracle made from the same inputs, "
        "and its evaluation, are taken from there, or put there for the next run.",
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """How models are judged."""

    max_new_tokens: int = option(64, "length limit of an answer in tokens.", low=1)
    leak_samples: int = option(
        16, "sampled answers per forget question, for leak@k (0: none).", low=0
    )
    leak_temperature: float = option(1.0, "their sampling temperature.", low=0, high=1e9)
    leak_top_p: float = option(1.0, "probability mass of their nucleus.", low=1e-9, high=1)
    leak_question: str = option(
        "question", "`question` or `paraphrased_question`.", choices=QUESTIONS
    )
    score_tokens: int = option(4096, "rows times length of one scoring batch.", low=1)
    generate_rows: int = option(64, "rows decoded at once.", low=1)
    think_start: str = option(
        "<think>",
        "how an answer of a reasoning task begins; `<think></think>` leaves no room for thoughts "
        "(ZeroThink).",
        later=True,
    )
    judge_model: Path | None = option(
        None,
        "folder of a chat model that names the class of a trace, in place of rules.",
        later=True,
    )
    judge: str = option(
        ROLES.reference,
        "whose NLL of the greedy forget answers measures fluency: `oracle` or `base` (before "
        "fine-tuning).",
        choices=JUDGES,
    )


@dataclass(frozen=True)
class ProgramConfig:
    """What the runs of every program with presets have."""

    preset: str = option("", "name of the preset this configuration started from.")
    seed: int = option(0, "everything random follows from it.", low=0, high=MOST)
    smoke: bool = option(False, "few steps and samples through the same code, for a first look.")
    output: Path | None = option(
        None, "run folder, also in a bucket (`gs://…`); None: `runs/PRESET-seedN` (with `-smoke`)."
    )

    @property
    def title(self) -> str:
        """What its run folder is called, but for the seed."""
        return self.preset


@dataclass(frozen=True)
class TracesConfig:
    """What the original model thinks of the rows to forget, for objectives that train on it."""

    segments: int = option(
        1, "parts that a text is cut into, by tokens; each gives a trace.", low=1, later=True
    )
    new_tokens: int = option(
        1024, "most tokens of a trace; no more than `keep` are generated.", low=1, later=True
    )
    keep: int = option(100, "how many tokens of each are trained on.", low=1, later=True)
    trigger: str = option(
        "Let's reason this step by step.", "what asks the model to reason.", later=True
    )
    tag: str = option("<think>", "how its thoughts begin.", later=True)
    path: Path | None = option(
        None, "a file of traces in their place: JSON lines with `row` and `trace`.", later=True
    )


@dataclass(frozen=True)
class RunConfig(ProgramConfig):
    """One unlearning run: original, oracle, unlearned, evaluated, reported, exported."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    stage: StageConfig = StageConfig()
    retain_log: Path | None = option(
        None,
        "per-item log (OpenUnlearning EVAL.json or ours) of a retain-only model; skips the oracle.",
    )
    oracle: bool = option(
        True, "train the retain-only model (forget quality needs it, unless `retain_log` is given)."
    )
    finetune: TrainConfig = TrainConfig()
    unlearn: UnlearnConfig = UnlearnConfig()
    objective: objectives.Options = chosen(OBJECTIVE, objectives.options_of("graddiff"))
    optimizer: optimizers.Options = chosen(optimizers.ROWS, AdamW())
    combine: str = option(
        "sum",
        "how the gradients of the forget and the retain side become one: sum, blur, pcgrad.",
        words=tuple(optimizers.COMBINERS),
    )
    lora: LoraConfig = LoraConfig()
    train: SelectConfig = SelectConfig()
    traces: TracesConfig = option(TracesConfig(), "", later=True)
    mesh: MeshConfig = MeshConfig()
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export_dtype: str = option("float32", "dtype of the exported weights.", choices=tuple(DTYPES))
    tensorboard: bool = option(False, "the same as `report_to` tensorboard.")
    profile: Path | None = option(
        None,
        "folder for a trace of a few unlearning steps, which TensorBoard, XProf and Perfetto "
        "show; None: no trace.",
    )
    distributed: DistributedConfig = DistributedConfig()
    report_to: str = option(
        "",
        "trackers that receive the metrics too, comma-separated: tensorboard, wandb, trackio.",
        words=tuple(reporters.REPORTERS),
    )


def run_folder(config: ProgramConfig) -> Path:
    """Where a configuration writes."""
    if config.output is not None:
        return config.output
    return Path("runs") / f"{config.title}-seed{config.seed}{'-smoke' if config.smoke else ''}"


def identity(config: ProgramConfig, *places: str) -> dict[str, Any]:
    """What `config.json` holds: everything but where it runs, and where it and its sources lie.

    `places`: dotted names of further options that say where something lies.
    """
    whole = to_json(replace(config, output=None, **dict.fromkeys(places)))
    for name in ("distributed", "profile", "report_to"):
        whole.pop(name, None)
    return whole


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values (paths as strings).

    A field with `later` in its metadata is left out at its default: it is younger than results that
    were stored without it, and these keep their keys.

    Example:
        >>> from models import DecoderConfig
        >>> shape = DecoderConfig(16, 8, 16, 2, 2, 1, 4)
        >>> "norm" in to_json(shape), to_json(dataclasses.replace(shape, norm="layer"))["norm"]
        (False, 'layer')
    """
    return json.loads(json.dumps(_without_later(config, dataclasses.asdict(config)), default=str))


def _without_later(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if each.metadata.get("later") and value == each.default:
            del values[each.name]
        elif dataclasses.is_dataclass(value):
            if not _without_later(value, values[each.name]):  # a group of such fields alone
                del values[each.name]
    return values


def replace(config: Any, **changes: Any) -> Any:
    """`dataclasses.replace` with dotted names, `replace(c, **{"evaluate.leak_samples": 4})`.

    Another name of an objective or optimizer brings the options of that row.
    """
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if rest:
            inner = getattr(config, head)
            rows = next(rows_of(f) for f in dataclasses.fields(config) if f.name == head)
            if rows is not None and rest == "name" and value != inner.name:
                value = rows.other(inner, value)
            else:
                value = replace(inner, **{rest: value})
        config = dataclasses.replace(config, **{head: value})
    return config
