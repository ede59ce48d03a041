"""The optimizer table: how each row is built and what it needs from the step.

A row's `needs` is `joint`, one gradient of the weighted sum of the objective's terms; `split`, the
gradients of its forget and of its retain side; `value`, the loss as a function and no gradient;
`lazy`, both as functions. A combiner turns two gradients into one and fits `joint` rows only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import optax
import optax.contrib

from jaxlib_unlearn import optim
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import Objective, ObjectiveConfig
from jaxlib_unlearn.optim import matrices
from jaxlib_unlearn.optim.spectral.fusion import BASES
from train import suggest
from train.runtime.sharding import path_str


@dataclass(frozen=True)
class OptimizerConfig:
    """How a step is taken.

    Args:
        name: a row of the table: adamw, muon, optax-muon, teon, sift, sophia, sign, mezo, zo-muon,
            hybrid.
        learning_rate: peak; one value serves the matrices of muon, teon and sift and AdamW's rest.
        schedule: `constant`, `linear` or `cosine` (the last two decay to 0).
        warmup: fraction of the steps of linear warm-up.
        weight_decay: decoupled; not on norms and biases (muon, teon, sift: on matrices alone).
        b1: first-moment decay of AdamW and Sophia, momentum of sign.
        b2: second-moment decay of AdamW and Sophia.
        eps: AdamW's epsilon.
        momentum: of muon, teon and sift.
        clip_norm: clip the global gradient norm; None: no clipping.
        rank: of SIFT's bases (None: 256, at most half the matrix) or ZO-Muon's subspace (None: 64).
        bases: how SIFT finds them: `subspace` (iterated from the last step's) or `svd` (exact).
        threshold: SIFT fuses a matrix where the cosine of its two momenta lies below.
        group_size: consecutive blocks that TEON orthogonalises together.
        queries: perturbations of a zeroth-order step (None: mezo and hybrid 1, zo-muon 4).
        perturbation: their size.
        refresh: steps that ZO-Muon keeps a subspace for.
        vector_rate: ZO-Muon's learning rate of norms and biases, constant.
        period: steps of one kind before hybrid turns to the other kind.
        state_dtype: of first moments and momenta (AdamW's, hybrid's AdamW's, Sophia's, sign's, and
            those of muon, teon and sift): float32 or bfloat16, half their bytes. A step changes
            them by 5 to 10 %, and bfloat16 tells 0.4 % apart (decays of 0.99 would leave them up to
            a fifth short of a steady gradient). Second moments stay float32: with b2 0.999 one of
            bfloat16 would never fall, as 0.1 % of it rounds to nothing.
        comm_dtype: of muon and teon: what matrices are rounded to on the way to the devices that
            orthogonalise them, and directions on the way back: float32 or bfloat16, half the bytes
            and the temporary memory of those collectives. On one device, too, so that a run does
            not depend on how many there are.
        zo_learning_rate: peak of hybrid's zeroth-order steps; None: `learning_rate`.
    """

    name: str = "adamw"
    learning_rate: float = 1e-5
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.95
    clip_norm: float | None = None
    rank: int | None = None
    bases: str = "subspace"
    threshold: float = 0.0
    group_size: int = 2
    queries: int | None = None
    perturbation: float = 1e-3
    refresh: int = 100
    vector_rate: float = 1e-7
    period: int = 20
    zo_learning_rate: float | None = None
    state_dtype: str = "float32"
    comm_dtype: str = "float32"


@dataclass(frozen=True)
class Optimizer:
    """A row: `build(config, schedule) -> optax transformation`, and what the step must hand it.

    `uses` names the options it reads, beside the learning rate's. `learning_rate` is where to start
    when a preset says nothing; None: AdamW's will do. A zeroth-order row makes `queries` a step
    where none are given, of `sides` evaluations each, and its `build` also takes the mesh axis that
    shares them.
    """

    name: str
    build: Callable[..., optax.GradientTransformationExtraArgs]
    needs: str
    uses: tuple[str, ...]
    summary: str
    learning_rate: float | None = None
    queries: int = 0
    sides: int = 0

    def options(self, config: OptimizerConfig) -> dict[str, Any]:
        """What of `config` this row reads, in the order of the fields."""
        shared = ("name", "learning_rate", "schedule", "warmup", "weight_decay", "clip_norm")
        names = [f.name for f in fields(config)]
        return {n: getattr(config, n) for n in names if n in shared + self.uses}


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: everything but norm scales and biases."""

    def decays(path, _):
        return not path_str(path).endswith(("scale", "bias"))

    return jax.tree_util.tree_map_with_path(decays, params)


def _plain_adamw(c: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    tx = optax.adamw(schedule, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decay_mask)
    return optim.keep_first_moments(tx, c.state_dtype)


def _adamw(c: OptimizerConfig, schedule: optax.Schedule):
    return optax.with_extra_args_support(_plain_adamw(c, schedule))


def _with_matrices(make: Callable[..., Any], **options: Any):
    """Muon, TEON or SIFT: matrices move with AdamW's typical RMS, the rest is AdamW's."""

    def build(c: OptimizerConfig, schedule: optax.Schedule):
        more = {name: value(c) for name, value in options.items()}
        return make(
            schedule,
            beta=c.momentum,
            shape_scale="match_rms",
            weight_decay=c.weight_decay,
            adam_b1=c.b1,
            adam_b2=c.b2,
            adam_eps=c.eps,
            mu_dtype=c.state_dtype,
            **more,
        )

    return build


def _comm_dtype(c: OptimizerConfig) -> str | None:
    return None if c.comm_dtype == "float32" else c.comm_dtype


def _optax_muon(c: OptimizerConfig, schedule: optax.Schedule):
    """The peer, told which leaves are matrices: left alone it takes scanned ones for vectors."""

    def dimensions(params: Any) -> Any:
        leaves = [
            None if axes is None else optax.contrib.MuonDimensionNumbers(axes.fan_in, axes.fan_out)
            for axes in matrices.resolve(params)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    tx = optax.contrib.muon(
        schedule,
        beta=c.momentum,
        weight_decay=c.weight_decay,
        adam_b1=c.b1,
        adam_b2=c.b2,
        eps=c.eps,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dimensions,
    )
    return optax.with_extra_args_support(tx)


def _sophia(c: OptimizerConfig, schedule: optax.Schedule):
    more = {"weight_decay": c.weight_decay, "mask": decay_mask, "mu_dtype": c.state_dtype}
    return optim.sophia(schedule, b1=c.b1, b2=c.b2, **more)


def _sign(c: OptimizerConfig, schedule: optax.Schedule):
    more = {"weight_decay": c.weight_decay, "mask": decay_mask, "mu_dtype": c.state_dtype}
    return optim.sign_momentum(schedule, beta=c.b1, **more)


def _mezo(c: OptimizerConfig, schedule: optax.Schedule, axis: str | None):
    return optim.mezo(
        schedule,
        num_queries=c.queries or OPTIMIZERS[c.name].queries,
        eps=c.perturbation,
        query_axis=axis,
        weight_decay=c.weight_decay,
    )


def _zo_muon(c: OptimizerConfig, schedule: optax.Schedule, axis: str | None):
    return optim.zo_muon(
        schedule,
        num_queries=c.queries or OPTIMIZERS[c.name].queries,
        query_axis=axis,
        rank=c.rank or 64,
        eps=c.perturbation,
        refresh_every=c.refresh,
        aux_learning_rate=c.vector_rate,
        weight_decay=c.weight_decay,
    )


def _hybrid(c: OptimizerConfig, schedule: optax.Schedule, axis: str | None):
    """Both halves follow the run's schedule, although each counts its own steps alone."""
    ratio = 1.0 if c.zo_learning_rate is None else c.zo_learning_rate / c.learning_rate

    def at(phase: int, factor: float) -> optax.Schedule:
        def rate(count):
            step = (2 * (count // c.period) + phase) * c.period + count % c.period
            return factor * schedule(step)

        return rate

    first = _plain_adamw(c, at(0, 1.0))
    zeroth = optim.rada_zo(
        at(1, ratio),
        num_queries=c.queries or OPTIMIZERS[c.name].queries,
        eps=c.perturbation,
        query_axis=axis,
        weight_decay=c.weight_decay,
    )
    return optim.alternate(first, zeroth, c.period)


_ADAM = ("b1", "b2", "eps", "state_dtype")
DTYPES = ("float32", "bfloat16")
SCHEDULES = ("constant", "linear", "cosine")
_ZEROTH = ("queries", "perturbation")

OPTIMIZERS: dict[str, Optimizer] = {
    row.name: row
    for row in (
        Optimizer("adamw", _adamw, "joint", _ADAM, "Adam with decoupled weight decay"),
        Optimizer(
            "muon",
            _with_matrices(optim.muon, comm_dtype=_comm_dtype),
            "joint",
            ("momentum", "comm_dtype", *_ADAM),
            "orthogonalised momentum for matrices, AdamW for the rest",
        ),
        Optimizer(
            "optax-muon",
            _optax_muon,
            "joint",
            ("momentum", "b1", "b2", "eps"),
            "optax.contrib.muon, leaf by leaf: what ours is measured against",
        ),
        Optimizer(
            "teon",
            _with_matrices(optim.teon, group_size=lambda c: c.group_size, comm_dtype=_comm_dtype),
            "joint",
            ("momentum", "group_size", "comm_dtype", *_ADAM),
            "Muon with q, k and v of neighbouring blocks orthogonalised together",
        ),
        Optimizer(
            "sift",
            _with_matrices(
                optim.sift,
                rank=lambda c: c.rank or 256,
                bases=lambda c: c.bases,
                threshold=lambda c: c.threshold,
            ),
            "split",
            ("momentum", "rank", "bases", "threshold", *_ADAM),
            "Muon that fuses the two sides' subspaces where their momenta conflict",
        ),
        Optimizer(
            "sophia",
            _sophia,
            "joint",
            ("b1", "b2", "state_dtype"),
            "clipped diagonal second-order steps",
        ),
        Optimizer(
            "sign",
            _sign,
            "joint",
            ("b1", "state_dtype"),
            "sign of the momentum, one bit a parameter",
        ),
        Optimizer("mezo", _mezo, "value", _ZEROTH, "zeroth order, dense perturbations", 1e-7, 1, 2),
        Optimizer(
            "zo-muon",
            _zo_muon,
            "value",
            ("rank", "refresh", "vector_rate", *_ZEROTH),
            "zeroth order in a subspace, orthogonalised",
            1e-2,
            queries=4,
            sides=1,
        ),
        Optimizer(
            "hybrid",
            _hybrid,
            "lazy",
            ("period", "zo_learning_rate", *_ZEROTH, *_ADAM),
            "AdamW and adaptive zeroth order in turn",
            queries=1,
            sides=2,
        ),
    )
}

COMBINERS: dict[str, Callable[[], optax.GradientTransformationExtraArgs] | None] = {
    "sum": None,
    "blur": optim.blur,
    "pcgrad": optim.pcgrad,
}


SEES = {
    "joint": "one gradient",
    "split": "two gradients",
    "value": "values only",
    "lazy": "both in turn",
}


def list_optimizers() -> list[str]:
    """One line a row: name, what a step sees, summary."""
    return [f"{row.name:10}  {SEES[row.needs]:13}  {row.summary}" for row in OPTIMIZERS.values()]


def list_combiners() -> list[str]:
    """One line a combiner, from the first line of its documentation."""
    told = {
        name: "the gradient of the weighted sum" if make is None else _summary(make)
        for name, make in COMBINERS.items()
    }
    return [f"{name:10}  {text}" for name, text in told.items()]


def _summary(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").splitlines()[0].partition(": ")[2].rstrip(".")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate over `steps`: linear warm-up, then constant, linear or cosine decay to 0."""
    warm = min(steps - 1, round(config.warmup * steps)) if steps > 1 else 0
    peak, rest = config.learning_rate, max(1, steps - warm)
    forms = (
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, 0.0, rest),
        optax.cosine_decay_schedule(peak, rest),
    )
    after = suggest.choose(config.schedule, dict(zip(SCHEDULES, forms, strict=True)), "schedule")
    if warm == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warm, peak, warm), after], [warm])


def check(config: OptimizerConfig) -> None:
    """Raise `UserError` for an unknown name or schedule, or numbers out of range."""
    row = suggest.choose(config.name, OPTIMIZERS, "optimizer")
    read = row.options(config)
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in read and value != field.default:
            raise UserError(
                f"--optimizer.{field.name.replace('_', '-')} {value}: {row.name} does not read it; "
                f"its own are {', '.join(n.replace('_', '-') for n in row.uses)}"
            )
    if not config.learning_rate > 0:
        raise UserError(f"--optimizer.learning-rate {config.learning_rate} must be positive")
    if not 0 <= config.warmup <= 1:
        raise UserError(f"--optimizer.warmup {config.warmup} is a share of the steps, 0 to 1")
    if config.clip_norm is not None and row.needs in ("value", "lazy"):
        raise UserError(
            f"--optimizer.clip-norm {config.clip_norm}: {config.name} has steps without a gradient "
            "to clip; leave it out"
        )
    suggest.check_choice("--optimizer.bases", config.bases, BASES)
    suggest.check_choice("--optimizer.state-dtype", config.state_dtype, DTYPES)
    suggest.check_choice("--optimizer.comm-dtype", config.comm_dtype, DTYPES)
    make_schedule(config, 1)


def check_mesh(config: OptimizerConfig, mesh: Any) -> None:
    """Raise `UserError` for a query axis that the optimizer's evaluations do not divide over."""
    ways = mesh.shape.get("query", 1)
    row = suggest.choose(config.name, OPTIMIZERS, "optimizer")
    jobs = row.sides * (config.queries or row.queries)
    if ways > 1 and not jobs:
        raise UserError(
            f"--mesh.query {ways}: {row.name} has no zeroth-order evaluations to share out; use "
            "--mesh.data or --mesh.fsdp"
        )
    if jobs % ways:
        raise UserError(
            f"--mesh.query {ways}: the {jobs} evaluation(s) of a step of {row.name} do not divide; "
            f"give --optimizer.queries a multiple of {ways // math.gcd(ways, row.sides)}"
        )


def check_pair(
    config: OptimizerConfig, combine: str, objective: Objective, options: ObjectiveConfig
) -> None:
    """Raise `UserError` for an optimizer, a combiner and an objective that do not go together."""
    needs = suggest.choose(config.name, OPTIMIZERS, "optimizer").needs
    suggest.choose(combine, COMBINERS, "--combine")
    if combine != "sum" and needs != "joint":
        why = {
            "split": "takes the two gradients itself",
            "value": "sees values of the loss alone and has no gradients to combine",
            "lazy": "has steps without a gradient, in which there is nothing to combine",
        }[needs]
        raise UserError(
            f"--combine {combine} does not go with optimizer {config.name}, which {why}; use "
            "--combine sum"
        )
    if (combine != "sum" or needs == "split") and not two_sided(objective, options):
        what = f"--combine {combine}" if combine != "sum" else f"optimizer {config.name}"
        raise UserError(
            f"{what} needs a forget and a retain side; objective {objective.name} here has one: "
            "set --objective.retain nll or choose another objective"
        )


def two_sided(objective: Objective, options: ObjectiveConfig) -> bool:
    """Whether the objective's terms have a forget and a retain side."""
    retain = options.retain not in (None, "none")
    return retain and "retain" in objective.streams and len(objective.streams) > 1


def check_steps(config: OptimizerConfig, steps: int) -> None:
    """Raise `UserError` for a hybrid run that would not end on a zeroth-order block."""
    if config.name == "hybrid" and not optim.ends_on_zeroth_order(steps, config.period):
        near = optim.round_to_zeroth_order(steps, config.period)
        raise UserError(
            f"hybrid ends on its zeroth-order steps: {steps} steps are not blocks of 2 x "
            f"{config.period}; use {near} steps or another --optimizer.period"
        )


def fitted(config: OptimizerConfig, steps: int) -> OptimizerConfig:
    """The options with which a shortened run of `steps` is taken: hybrid's blocks shrink with it.

    Example:
        >>> fitted(OptimizerConfig(name="hybrid", period=20), 10).period
        5
    """
    if config.name != "hybrid":
        return config
    periods = range(min(config.period, max(1, steps // 2)), 0, -1)
    fits = (n for n in periods if optim.ends_on_zeroth_order(steps, n))
    return replace(config, period=next(fits, config.period))


def build(
    config: OptimizerConfig, steps: int, combine: str = "sum", axis: str | None = None
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule, str]:
    """The transformation of `config` over `steps`, its schedule, and what the step must hand it.

    `axis` is the mesh axis over which zeroth-order steps share their evaluations out.
    """
    check(config)
    row, schedule = OPTIMIZERS[config.name], make_schedule(config, steps)
    more = (axis,) if row.sides else ()
    tx, needs = row.build(config, schedule, *more), row.needs
    make_combiner = suggest.choose(combine, COMBINERS, "--combine")
    if make_combiner is not None:
        tx, needs = optax.chain(make_combiner(), tx), "split"
    if config.clip_norm is not None and needs == "split":
        tx = optim.clip_streams(config.clip_norm, tx)
    elif config.clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    return optax.with_extra_args_support(tx), schedule, needs
