"""The parts of a run that a plan compiles: a row for each program that runs one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import option
from models.bounds import check_positions
from models.decoder.model import REMAT, Decoder
from train.costs import PROGRAMS
from train.jobs.classification_options import ClassifyRun
from train.jobs.finetuning_options import ReasoningRun
from train.jobs.new_models import decoder_of
from train.jobs.pretraining_options import PretrainConfig
from train.options import checks
from train.options.config import RunConfig
from train.options.optimizers import OPTIMIZERS
from train.planning import diffusion_programs, pretraining_program, programs, stream_programs
from train.planning.diffusion_programs import DiffusionPlanConfig
from train.presets import arguments
from train.runtime import sharding, suggest


class Planned(NamedTuple):
    """The planned parts of a run.

    Args:
        model: the name or path of the model.
        programs: the programs to compile.
        update: `update()`: the optimizer's update and its shapes, or None.
        knobs: `knobs(programs) -> options` to change if something does not fit.
        forward: `forward()`: the operations of one row's forward pass through parts of the model
            (`flops`) and, where it is known, an independent count of them (`counted`).
    """

    model: str
    programs: list[Any]
    update: Any
    knobs: Any
    forward: Callable[[], dict[str, Any]] = dict


class Planner(NamedTuple):
    """The runs of a program.

    Args:
        presets: the presets, by name.
        config: the class of the options of a run and of its plan.
        read: `read(argv, config, program)`: reads a command line.
        check: `check(config)`: raises `UserError` before any device is looked for.
        planned: `planned(config, devices)`: the planned parts, and the mesh.
    """

    presets: Mapping[str, Any]
    config: type
    read: Callable[..., Any]
    check: Callable[[Any], None]
    planned: Callable[[Any, list[Any]], tuple[Planned, Any]]


def mesh_of(config: Any, decoder: Decoder, devices: list[Any]) -> Any:
    """The mesh of a run, which can split the decoder's heads.

    Raises:
        UserError: the devices or the heads do not divide as the options say.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_heads(mesh, decoder.config.num_heads)
    return mesh


def more_room(config: Any, mesh: Any, smaller: Sequence[str]) -> list[str]:
    """Options to change if a step does not fit, the cheapest first; `smaller` shrink its batch."""
    words, out = list(REMAT), []
    if OPTIMIZERS[config.optimizer.name].needs != "value":  # else there is no backward pass
        out += [f"--model.remat {word}" for word in words[words.index(config.model.remat) + 1 :]]
    out += smaller
    if mesh.shape["data"] > 1:
        out.append(f"--mesh.data 1 --mesh.fsdp {sharding.batch_ways(mesh)}")
    if config.model.dtype == "float32":
        out.append("--model.dtype bfloat16")
    if getattr(config.optimizer, "state_dtype", None) == "float32":
        out.append("--optimizer.state-dtype bfloat16")
    return out


def accumulated(config: Any, group: str, mesh: Any) -> list[str]:
    """The option that halves the number of rows on the devices at once, where it can be halved."""
    parts = 2 * getattr(config, group).accumulate
    rows = getattr(config, group).batch_size
    fits = rows % (sharding.batch_ways(mesh) * parts) == 0
    return [f"--{group}.accumulate {parts}"] if fits else []


LARGER = "a larger --topology"


# train.unlearn


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """A run, and the devices to plan it for.

    Args:
        topology: a TPU slice `v5e:8x8`, `cpu:8`, or `gpu:8`.
        length: the number of padded tokens per row; None: `data.max_length`.
        labels: the number of padded labels per row; None: `length`.
        json: whether to print one JSON object and nothing else.
    """

    topology: str = ""
    length: int | None = None
    labels: int | None = None
    programs: tuple[str, ...] = option(
        PROGRAMS, "which programs to compile: train, score, generate.", words=PROGRAMS
    )
    json: bool = False


def check_run(config: PlanConfig) -> None:
    """Raise `UserError` for programs that do not exist, or sizes that do not go together."""
    for name in config.programs:
        suggest.check_choice("--programs", name, PROGRAMS)
    for name, size in (("--length", config.length), ("--labels", config.labels)):
        if size is not None and size < 1:
            raise UserError(f"{name} {size} must be at least 1")
    if (config.labels or 1) > (config.length or config.data.max_length):
        raise UserError(f"--labels {config.labels} are more than the tokens of a row")


def planned_run(config: PlanConfig, devices: list[Any]) -> tuple[Planned, Any]:
    """The programs of an unlearning run, and its mesh.

    Raises:
        UserError: the slice cannot hold the run.
    """
    decoder = programs.decoder_of(config)
    mesh = mesh_of(config, decoder, devices)
    length = config.length or config.data.max_length
    check_positions(decoder.config.learned_positions, length, "--length or --data.max-length")
    labels = config.labels or length
    wanted = []
    if "train" in config.programs:
        wanted.append(programs.train_program(config, decoder, mesh, length, labels))
    if "score" in config.programs:
        wanted.append(programs.score_program(config, decoder, mesh, length, labels))
    if "generate" in config.programs:
        wanted += programs.generate_programs(config, decoder, mesh, length)
    return Planned(
        config.stage.original or config.model.path,
        wanted,
        lambda: programs.update_program(config, decoder, mesh),
        lambda done: run_knobs(config, done, mesh),
    ), mesh


def run_knobs(config: PlanConfig, done: dict[str, Any], mesh: Any) -> list[str]:
    """Options to change if something of an unlearning run does not fit."""
    out = []
    if "train" in done and not done["train"]["fits"]:
        out += more_room(config, mesh, accumulated(config, "unlearn", mesh))
        if config.lora.rank is None and not config.train.given:
            out.append("--lora.rank 16")
        out.append(LARGER)
    if not all(p["fits"] for name, p in done.items() if name != "train"):
        out.append("--evaluate.score-tokens, --evaluate.generate-rows: smaller")
    return out


# train.pretrain


@dataclass(frozen=True)
class PretrainPlanConfig(PretrainConfig):
    """A pre-training run, and the devices to plan it for.

    Args:
        topology: a TPU slice `v5e:8x8`, `cpu:8`, or `gpu:8`.
        json: whether to print one JSON object and nothing else.
    """

    topology: str = ""
    json: bool = False


def planned_pretraining(config: PretrainPlanConfig, devices: list[Any]) -> tuple[Planned, Any]:
    """The step of a pre-training run, and its mesh.

    Raises:
        UserError: the slice cannot hold the run.
    """
    decoder = decoder_of(config)
    mesh = mesh_of(config, decoder, devices)
    tokens = config.train.micro_tokens
    smaller = [f"--train.micro-tokens {tokens // 2}"] if tokens >= 2 * config.data.context else []
    return Planned(
        f"{config.model.family} from random weights",
        [pretraining_program.pretraining_program(config, decoder, mesh)],
        lambda: pretraining_program.pretraining_update(config, decoder, mesh),
        lambda done: step_knobs(config, done, mesh, smaller),
    ), mesh


def step_knobs(
    config: Any, done: dict[str, Any], mesh: Any, smaller: Sequence[str], *more: str
) -> list[str]:
    """Options to change if a run's step does not fit."""
    return [] if done["train"]["fits"] else [*more_room(config, mesh, smaller), *more, LARGER]


# train.finetune


@dataclass(frozen=True)
class FinetunePlanConfig(ReasoningRun):
    """A fine-tuning run on traces, and the devices to plan it for.

    Args:
        topology: a TPU slice `v5e:8x8`, `cpu:8`, or `gpu:8`.
        json: whether to print one JSON object and nothing else.
    """

    topology: str = ""
    json: bool = False


def planned_finetuning(config: FinetunePlanConfig, devices: list[Any]) -> tuple[Planned, Any]:
    """The step of a fine-tuning run, and its mesh.

    Raises:
        UserError: the slice cannot hold the run.
    """
    decoder = stream_programs.finetuned_decoder(config)
    mesh = mesh_of(config, decoder, devices)
    return Planned(
        config.model.path,
        [stream_programs.finetuning_program(config, decoder, mesh)],
        lambda: stream_programs.finetuning_update(config, decoder, mesh),
        lambda done: step_knobs(config, done, mesh, accumulated(config, "train", mesh)),
    ), mesh


# train.classify


@dataclass(frozen=True)
class ClassifyPlanConfig(ClassifyRun):
    """A classification run, and the devices to plan it for.

    Args:
        topology: a TPU slice `v5e:8x8`, `cpu:8`, or `gpu:8`.
        length: the number of padded tokens of a prompt with one of its options.
        options: the number of options of a row.
        json: whether to print one JSON object and nothing else.
    """

    topology: str = ""
    length: int = option(256, "padded tokens of a prompt with one of its options.", low=2)
    options: int = option(2, "options of a row.", low=2)
    json: bool = False


def check_classification(config: ClassifyPlanConfig) -> None:
    """Raise `UserError` for numbers out of range, or a task that is not planned."""
    checks.check_numbers(config)
    stream_programs.check_planned(config)


def planned_classification(config: ClassifyPlanConfig, devices: list[Any]) -> tuple[Planned, Any]:
    """The step of a classification run, and its mesh.

    Raises:
        UserError: the slice cannot hold the run.
    """
    decoder = stream_programs.classified_decoder(config)
    mesh = mesh_of(config, decoder, devices)
    check_positions(decoder.config.learned_positions, config.length, "--length")
    adapters = ["--lora.rank 16"] if config.lora.rank is None else []
    smaller = accumulated(config, "train", mesh)
    return Planned(
        config.model.path,
        [
            stream_programs.classification_program(
                config, decoder, mesh, config.length, config.options
            )
        ],
        lambda: stream_programs.classification_update(config, decoder, mesh),
        lambda done: step_knobs(config, done, mesh, smaller, *adapters),
    ), mesh


# train.diffuse


def planned_diffusion(config: DiffusionPlanConfig, devices: list[Any]) -> tuple[Planned, Any]:
    """The programs of a text-to-image model, and its mesh.

    Raises:
        UserError: the slice cannot hold them.
    """
    models = diffusion_programs.models_of(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_heads(mesh, models.heads)
    wanted = [n for n in diffusion_programs.PROGRAMS if n in config.programs]
    return Planned(
        diffusion_programs.name_of(config),
        [diffusion_programs.MAKE[name](config, models, mesh) for name in wanted],
        lambda: diffusion_programs.erasing_update(config, models, mesh),
        lambda done: diffusion_knobs(config, done, mesh),
        lambda: diffusion_programs.forward_work(models),
    ), mesh


def diffusion_knobs(config: DiffusionPlanConfig, done: dict[str, Any], mesh: Any) -> list[str]:
    """Options to change if something of a text-to-image model does not fit."""
    large = [name for name, p in done.items() if not p["fits"]]
    groups = [group for name, group in (("train", "erase"), ("attack", "attack")) if name in large]
    halved = [option for group in groups for option in accumulated(config, group, mesh)]
    out = more_room(config, mesh, halved) if groups else []
    if {"sample", "decode"} & {*large}:
        out.append("--sample.images: fewer")
    return [*out, LARGER] if large else []


def _planner(
    program: str,
    config: type,
    check: Callable[[Any], None],
    planned: Callable[[Any, list[Any]], tuple[Planned, Any]],
) -> Planner:
    """The row of a program, whose command lines are read as its own."""

    def read(argv: list[str], cls: type, name: str) -> Any:
        return arguments.read_arguments(program, argv, cls, name)

    return Planner(arguments.READERS[program].presets, config, read, check, planned)


PLANNERS: dict[str, Planner] = {
    name: _planner(name, config, check, planned)
    for name, config, check, planned in (
        (arguments.UNLEARN, PlanConfig, check_run, planned_run),
        (arguments.PRETRAIN, PretrainPlanConfig, checks.check_numbers, planned_pretraining),
        (arguments.FINETUNE, FinetunePlanConfig, checks.check_numbers, planned_finetuning),
        (arguments.CLASSIFY, ClassifyPlanConfig, check_classification, planned_classification),
    )
}
PLANNERS["train.diffuse"] = Planner(
    diffusion_programs.PRESETS,
    DiffusionPlanConfig,
    diffusion_programs.read_arguments,
    diffusion_programs.check,
    planned_diffusion,
)


def planner_of(config: Any) -> Planner:
    """The row of a configuration."""
    return next(row for row in PLANNERS.values() if isinstance(config, row.config))
