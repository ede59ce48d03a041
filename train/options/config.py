"""The options that programs share: frozen dataclasses, overridden on the command line by tyro.

Each option stands once, with its range or choices and its text for `--help`. A program's own
dataclass inherits or nests the groups that it needs; `again` gives an inherited option another
default. The fields of the objective and of an optimizer depend on the chosen row (see `rows`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlib_unlearn import objectives
from jaxlib_unlearn.options import MOST, option
from models.bounds import MOST_LAYERS
from models.decoder.model import REMAT
from models.files.weights import DTYPES
from models.text.prompts import DATE
from train.options import optimizers
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


def again(group: type, name: str, default: Any, doc: str | None = None) -> Any:
    """An option of another group, with another default and, where `doc` is given, another text.

    Example:
        >>> @dataclass(frozen=True)
        ... class Longer(AnswersConfig):
        ...     max_new_tokens: int = again(AnswersConfig, "max_new_tokens", 512)
        >>> Longer().max_new_tokens, AnswersConfig().max_new_tokens
        (512, 64)
    """
    known = {field.name: field for field in dataclasses.fields(group)}[name].metadata
    text = {} if doc is None else {"doc": doc}
    return dataclasses.field(default=default, metadata={**known, **text})


# Groups of options that several programs have.


@dataclass(frozen=True)
class CacheConfig:
    """Existing results."""

    cache: Path | None = option(
        None,
        "Runs share this folder (or `gs://…`): whatever is made from the same inputs, models and "
        "their evaluations alike, is taken from it, or put there for the next run.",
    )


@dataclass(frozen=True)
class JobConfig:
    """Options of every job."""

    preset: str = option("", "The name of the preset that this configuration started from.")
    seed: int = option(0, "The seed from which every draw is derived.", low=0, high=MOST)
    smoke: bool = option(
        False, "Take few steps and samples through the same code, for a first look."
    )
    output: Path | None = option(
        None,
        "The run folder, which may be in a bucket (`gs://…`); None: `runs/PRESET-seedN`, with "
        "`-smoke` in a smoke run.",
    )
    mesh: MeshConfig = MeshConfig()
    stage: CacheConfig = CacheConfig()
    distributed: DistributedConfig = DistributedConfig()
    report_to: str = option(
        "",
        "These trackers receive the metrics too, comma-separated: tensorboard, wandb, trackio.",
        words=tuple(reporters.REPORTERS),
    )

    @property
    def title(self) -> str:
        """The name of the run folder without the seed."""
        return self.preset


@dataclass(frozen=True)
class ProgramConfig(JobConfig):
    """Options of every job that makes a model."""

    export_dtype: str = option(
        "float32", "The dtype of the exported weights.", choices=tuple(DTYPES)
    )


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of a few steps."""

    profile: Path | None = option(
        None,
        "A trace of a few steps is written to this folder; TensorBoard, XProf and Perfetto show "
        "it. None: no trace is made.",
    )


@dataclass(frozen=True)
class RevisionConfig:
    """The version of a data set."""

    revision: str | None = option(
        None,
        "The commit, branch or tag of the Hub's data set; None: the newest. The run records the "
        "commit.",
    )


@dataclass(frozen=True)
class RowTokensConfig:
    """The length of packed rows."""

    row_tokens: int = option(
        320,
        "Short training examples are packed into rows of about that many tokens, after the start "
        "that their prompts share; 0: every example has a row. The losses are the same.",
        low=0,
    )


@dataclass(frozen=True)
class PromptConfig:
    """The form of questions."""

    system_prompt: str | None = option(
        None, "The system message of the chat template; None: the template's own default."
    )
    template: str = option(
        "auto",
        'The form of questions: `auto` (the tokenizer\'s chat template, or "Question:" and '
        '"Answer:" where there is none), or tags of OpenUnlearning for models without one: '
        "`llama2` ([INST]) or `question-answer`.",
    )
    template_date: str = option(
        DATE, "Chat templates that print today's date print this one instead."
    )


@dataclass(frozen=True)
class ComputeConfig:
    """The precision and the memory of a model's computation."""

    dtype: str = option(
        "float32",
        "The dtype of the computation, `float32` or `bfloat16`; parameters stay float32.",
        choices=COMPUTE,
    )
    remat: str = option(
        "dots",
        "The backward pass recomputes `none`, `dots` (all but the projections: half of the "
        "temporaries for hardly more compute, and faster where memory bandwidth is the limit) or "
        "`full` (whole blocks: a quarter of the temporaries, for a quarter more compute).",
        choices=tuple(REMAT),
    )


@dataclass(frozen=True)
class SourceConfig(ComputeConfig):
    """The place of a model to start from."""

    path: str = option(
        "smollm2",
        "The model: an HF folder, a `.gguf` file, a Hub id, `smollm2` (the installed package) or "
        "`scratch` (random weights). `owner/name` is a Hub id where no such path exists, "
        "`hub:owner/name` always.",
    )
    revision: str | None = option(
        None,
        "The commit, branch or tag of a model's Hub id; None: the newest. The run records the "
        "commit.",
    )


@dataclass(frozen=True)
class SizesConfig:
    """The sizes of a transformer with random weights."""

    hidden_size: int = option(128, "The width of the residual stream.", low=1)
    intermediate_size: int = option(384, "The width inside an MLP.", low=1)
    num_layers: int = option(4, "The number of blocks.", low=1, high=MOST_LAYERS)
    num_heads: int = option(4, "The number of attention heads; they divide the width.", low=1)


@dataclass(frozen=True)
class CheckpointConfig:
    """The time between checkpoints of a stage."""

    checkpoint_seconds: float = option(
        120.0,
        "Two checkpoints are at least this many seconds apart.",
        low=0,
        high=math.inf,
    )


@dataclass(frozen=True)
class BatchConfig(CheckpointConfig):
    """The batches of a stage."""

    batch_size: int = option(8, "The global number of rows of each stream in a step.", low=1)
    accumulate: int = option(
        1, "A step is split into this many micro-batches; results do not depend on it.", low=1
    )


@dataclass(frozen=True)
class LengthConfig(BatchConfig):
    """The length and the batches of a stage."""

    epochs: float = option(
        1.0,
        "The number of passes over the stage's main stream; it is ignored when `steps` is given.",
        low=0,
        high=1e9,
    )
    steps: int | None = option(None, "The number of optimizer steps; None: from `epochs`.", low=1)


@dataclass(frozen=True)
class CurveConfig:
    """Looks at the model during a stage."""

    curve_points: int = option(
        0, "The model is evaluated this many times during the stage, on rows held out of it.", low=0
    )


@dataclass(frozen=True)
class TrainConfig(LengthConfig, CurveConfig):
    """One training stage."""

    epochs: float = again(LengthConfig, "epochs", 10.0)
    optimizer: optimizers.Options = chosen(optimizers.ROWS, optimizers.options_of("adamw"))


@dataclass(frozen=True)
class UnlearnConfig(LengthConfig, CurveConfig):
    """The unlearning stage; its optimizer is `--optimizer.*`, its objective `--objective.*`."""

    epochs: float = again(LengthConfig, "epochs", 5.0)
    curve_points: int = again(CurveConfig, "curve_points", 5)


@dataclass(frozen=True)
class CombineConfig:
    """Two gradients of a step."""

    combine: str = option(
        "sum",
        "The gradients of the forget and the retain side become one by `sum`, `blur` or `pcgrad`.",
        words=tuple(optimizers.COMBINERS),
    )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, trained in the stage instead of the parameters.

    The model is frozen, only the adapters are optimised, and the model with the adapters merged
    into it is evaluated and exported.
    """

    rank: int | None = option(
        None, "The rank r of the adapters; None: all parameters are trained, no adapters.", low=1
    )
    alpha: float | None = option(
        None,
        "The adapters' term is multiplied by alpha / rank; None: alpha is the rank.",
        low=1e-30,
    )
    targets: tuple[str, ...] = option(
        TARGETS, "The kernels of these names are adapted.", words=TARGETS
    )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class SelectConfig:
    """The leaves that a stage trains, if it does not train all of them.

    Optimizer state and gradients exist for these leaves alone, and no block below the first of them
    is differentiated.
    """

    leaves: tuple[str, ...] | None = option(
        None,
        "Only leaves of these names are trained, given as parts of their paths (`mlp/down`, `q`, "
        "`embed`); None: all.",
    )
    blocks: tuple[int, ...] | None = option(
        None, "Only these blocks are trained, numbered from 0; None: all."
    )

    def __post_init__(self) -> None:
        if self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(sorted(set(self.blocks))))

    @property
    def given(self) -> bool:
        """True if leaves or blocks are chosen."""
        return self.leaves is not None or self.blocks is not None


@dataclass(frozen=True)
class ScoringConfig:
    """The batches in which models are judged."""

    score_tokens: int = option(4096, "A scoring batch has rows times length tokens.", low=1)
    generate_rows: int = option(64, "This many rows are decoded at once.", low=1)


@dataclass(frozen=True)
class AnswersConfig(ScoringConfig):
    """The answers by which models are judged."""

    max_new_tokens: int = option(
        64, "An answer, with its thoughts, has at most this many tokens.", low=1
    )


# train.unlearn


@dataclass(frozen=True)
class DataConfig(RowTokensConfig, PromptConfig, RevisionConfig):
    """The rows to forget, to keep and to ask."""

    source: str = option(
        "tofu", "The benchmark, such as `authors` (generated in the run), `tofu` or `documents`."
    )
    path: Path | None = option(
        None, "The folder with TOFU's JSON files; None: the Hub id locuslab/TOFU."
    )
    forget_split: str = option(
        "forget01", "The split to forget, or a JSON file with the columns `question` and `answer`."
    )
    retain_rows: int | None = option(
        100, "This many rows of `retain_split` are kept and trained on; None: all.", low=1
    )
    extra_rows: int | None = option(
        50, "This many real-author and world-fact rows are evaluated; None: all.", low=0
    )
    holdout_rows: int = option(40, "This many untrained rows serve as non-members.", low=0)
    num_authors: int = option(40, "The generator makes this many authors (quickstart).", low=1)
    seed: int | None = option(
        None, "The seed of the generator; None: the run's seed.", low=0, high=MOST
    )
    max_length: int = option(
        512,
        "A tokenised example has at most this many tokens; longer ones are cut and counted.",
        low=2,
    )
    forget_rows: int | None = option(
        None, "This many rows from the start of the forget split are used; None: all.", low=1
    )
    retain_split: str = option(
        "retain_perturbed",
        "The split that is kept and trained on (such as `retain90`), or a JSON file.",
    )
    judged_retain_split: str = option(
        "retain_perturbed", "The split, or a JSON file, on which retention is evaluated."
    )
    judged_retain_rows: int | None = option(
        None,
        "This many rows of `judged_retain_split` are used; None: as many as `retain_rows`.",
        low=1,
    )
    few_shot: Path | None = option(
        None, "The answered questions of this JSON file precede every question in the prompt."
    )
    alternates: int = option(
        3,
        "Objectives that train on alternate answers get this many per forget question, sampled "
        "from the model before it learns the facts, if rows have no `alternate_answer`; 0: none.",
        low=0,
    )
    alternate_temperature: float = option(
        1.0,
        "The sampling temperature of the alternate answers. A small model writes whole sentences "
        "only below 1.",
        low=0.01,
        high=100,
    )
    forget: tuple[Path, ...] = option(
        (),
        "A file of your own rows to forget (JSON, JSONL, CSV or parquet; a question and an answer "
        "are enough), in place of `source`; with `source` documents one or more texts or folders "
        "of texts (.txt, .md, JSONL with a column `text`). It goes with `retain`.",
    )
    retain: tuple[Path, ...] = option(
        (),
        "Your own rows or documents to keep, as `forget`: all are trained on, and the first "
        "`retain_rows` rows or chunks are evaluated.",
    )
    holdout: tuple[Path, ...] = option(
        (),
        "Your own rows or documents that no model was trained on, as `forget`: membership attacks "
        "need them, and without an oracle they are the control.",
    )
    columns: str = option(
        "",
        "The names of the columns in your own files, where these are others: "
        "`question=q,answer=a`. Conversations (`messages`), `prompt` and `completion`, "
        "`instruction`, `input` and `output` are known without it.",
    )
    reasoning: Path | None = option(
        None, "A file of GSM8K rows for source reasoning-tofu: the reasoning to keep."
    )
    reasoning_rows: int = option(
        150, "This many rows of `reasoning` are trained on; up to 40 more are asked.", low=1
    )


@dataclass(frozen=True)
class ModelConfig(SourceConfig, SizesConfig):
    """The model to start from; the sizes hold for one with random weights."""

    vocab_size: int = option(
        1024, "The tokenizer that is trained in the run has this many ids.", low=1, high=2**20
    )
    split_digits: bool = option(False, "Every digit is a token of its own in that tokenizer.")
    num_kv_heads: int = option(
        2, "The number of heads of keys and values, shared by groups of attention heads.", low=1
    )
    mask_all_pad_id_tokens: bool = option(
        False,
        "Mask every token with the padding token's id from attention, as OpenUnlearning does; with "
        "Llama-3's templates these include the ends of turns. It serves to compare with its "
        "numbers, and applies to training, scoring and generation.",
    )


@dataclass(frozen=True)
class StageConfig(CacheConfig):
    """Existing results."""

    original: str | None = option(
        None, "A model (HF folder or GGUF) that already knows the facts takes the original's place."
    )


@dataclass(frozen=True)
class EvaluateConfig(AnswersConfig):
    """The evaluation of models."""

    leak_samples: int = option(
        16, "This many answers per forget question are sampled, for leak@k (0: none).", low=0
    )
    leak_temperature: float = option(
        1.0, "The sampling temperature of the leak@k answers.", low=0, high=1e9
    )
    leak_top_p: float = option(
        1.0, "The probability mass of the nucleus for the leak@k answers.", low=1e-9, high=1
    )
    leak_question: str = option(
        "question",
        "The leak@k answers are to the `question` or the `paraphrased_question` of a row.",
        choices=QUESTIONS,
    )
    think_start: str = option(
        "<think>",
        "An answer of a reasoning task begins with this; `<think></think>` leaves no room for "
        "thoughts (ZeroThink).",
    )
    judge_model: Path | None = option(
        None, "The chat model in this folder names the class of a trace, in place of rules."
    )
    judge: str = option(
        ROLES.reference,
        "The NLL of the greedy forget answers under this model measures fluency: `oracle` or "
        "`base` (before fine-tuning).",
        choices=JUDGES,
    )


@dataclass(frozen=True)
class TracesConfig:
    """The original model's thoughts on the rows to forget, for objectives that train on them."""

    segments: int = option(
        1, "A text is cut into this many parts, by tokens; each gives a trace.", low=1
    )
    new_tokens: int = option(
        1024, "A trace has at most this many tokens; no more than `keep` are generated.", low=1
    )
    keep: int = option(100, "This many tokens from the start of each trace are trained on.", low=1)
    trigger: str = option("Let's reason this step by step.", "These words ask the model to reason.")
    tag: str = option("<think>", "The model's thoughts begin with this tag.")
    path: Path | None = option(
        None, "A file of traces in place of generated ones: JSON lines with `row` and `trace`."
    )


@dataclass(frozen=True)
class RunConfig(ProgramConfig, ProfileConfig, CombineConfig):
    """One unlearning run: original, oracle, unlearned, evaluated, reported, exported."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    stage: StageConfig = StageConfig()
    retain_log: Path | None = option(
        None,
        "The per-item log (OpenUnlearning's EVAL.json or ours) of a retain-only model, which then "
        "takes the oracle's place.",
    )
    oracle: bool = option(
        True,
        "Train the retain-only model, which forget quality needs unless `retain_log` is given.",
    )
    finetune: TrainConfig = TrainConfig()
    unlearn: UnlearnConfig = UnlearnConfig()
    objective: objectives.Options = chosen(OBJECTIVE, objectives.options_of("graddiff"))
    optimizer: optimizers.Options = chosen(optimizers.ROWS, optimizers.options_of("adamw"))
    lora: LoraConfig = LoraConfig()
    train: SelectConfig = SelectConfig()
    traces: TracesConfig = TracesConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tensorboard: bool = option(False, "This is the same as `report_to` tensorboard.")


# Functions of configurations.


def run_folder(config: JobConfig) -> Path:
    """The folder that a configuration writes into."""
    if config.output is not None:
        return config.output
    return Path("runs") / f"{config.title}-seed{config.seed}{'-smoke' if config.smoke else ''}"


PLACES = ("stage.cache", "data.cache")


def identity(config: JobConfig) -> dict[str, Any]:
    """The content of `config.json`: the configuration without devices and places of folders."""
    places = {}
    for place in PLACES:
        group, _, name = place.partition(".")
        if hasattr(getattr(config, group, None), name):
            places[place] = None
    whole = to_json(replace(config, output=None, **places))
    for name in ("distributed", "profile", "report_to"):
        whole.pop(name, None)
    return whole


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values (paths as strings)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


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
