"""The optimizer rows: how each is built from its options, and what it needs from the step.

A row's `needs` is `joint`, one gradient of the weighted sum of the objective's terms; `split`, the
gradients of its forget and of its retain side; `value`, the loss as a function and no gradient;
`lazy`, both as functions. To add an optimizer, add a dataclass of options, a function and a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
import optax.contrib

from jaxlib_unlearn import optim
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.optim import matrices
from jaxlib_unlearn.optim.spectral.groups import ATTENTION
from models import layout
from train.options.optimizer_options import (
    FZOO,
    GROUPS,
    LOZO,
    ORTHOGONALIZERS,
    AdamW,
    HiZOO,
    Hybrid,
    MeZO,
    Muon,
    NorMuon,
    OptaxMuon,
    Options,
    Rowwise,
    Sent,
    Sift,
    Sign,
    Sophia,
    SparseMeZO,
    SubspaceMeZO,
    SubZero,
    Teon,
    ZOMuon,
)
from train.runtime.sharding import path_str


@dataclass(frozen=True)
class Optimizer:
    """A row: its options, `build(options, schedule) -> optax transformation`, and what it needs.

    Args:
        name: as given to `--optimizer.name`.
        options: the dataclass of its options.
        build: the transformation; a zeroth-order row's also takes the mesh axis that shares its
            evaluations.
        needs: what the step must pass to it.
        summary: a line for `--list`.
        sides: loss evaluations per query of a zeroth-order row; 0: it has none.
        parts: whether its queries are parts of the batch, see `zeroth_order.parts`.
        check_blocks: `check_blocks(options, num_layers)` raises `UserError` for a model that it
            cannot train with these options.
        check_runs: `check_runs(options, runs, num_layers)` raises `UserError` for runs of blocks,
            `(first, last)`, that it cannot train alone.
        check_rank: `check_rank(rank)` raises `UserError` for adapters that it cannot train.
        check_steps: `check_steps(options, steps)` raises `UserError` for a number of steps that it
            cannot take.
        shortened: `shortened(options, steps)`: the options for a shortened run.
        forwards: `forwards(options, steps)`: what so many steps cost in forward passes; None: each
            step costs the same (`optimizers.forwards`).
        replays: the update of a `value` row follows from the coefficients of a step alone
            (`train.engine.replays.coefficients`): a step is two programs, and a stage writes
            `replay.zo`.
    """

    name: str
    options: type[Options]
    build: Callable[..., optax.GradientTransformationExtraArgs]
    needs: str
    summary: str
    sides: int = 0
    parts: bool = False
    check_blocks: Callable[[Any, int], None] | None = None
    check_runs: Callable[[Any, list[tuple[int, int]], int], None] | None = None
    check_rank: Callable[[int], None] | None = None
    check_steps: Callable[[Any, int], None] | None = None
    shortened: Callable[[Any, int], Any] | None = None
    forwards: Callable[[Any, int], int] | None = None
    replays: bool = False

    @property
    def own(self) -> tuple[str, ...]:
        """The options that not every row has."""
        shared = {field.name for field in dataclasses.fields(Options)}
        names = [field.name for field in dataclasses.fields(self.options)]
        return tuple(name for name in names if name not in shared)

    @property
    def learning_rate(self) -> float | None:
        """The rate to start from when a preset gives none; None: AdamW's default."""
        default = self.options().learning_rate
        return None if default == AdamW().learning_rate else default


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: everything but norm scales and biases."""

    def decays(path, _):
        return not path_str(path).endswith(("scale", "bias"))

    return jax.tree_util.tree_map_with_path(decays, params)


def _plain_adamw(c: AdamW | Hybrid, schedule: optax.Schedule) -> optax.GradientTransformation:
    tx = optax.adamw(schedule, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decay_mask)
    return optim.keep_first_moments(tx, c.state_dtype)


def _adamw(c: AdamW, schedule: optax.Schedule):
    return optax.with_extra_args_support(_plain_adamw(c, schedule))


def _with_matrices(make: Callable[..., Any], **options: Any):
    """Muon, TEON or SIFT: matrix updates have AdamW's typical RMS, AdamW trains the rest."""

    def build(c: Any, schedule: optax.Schedule):
        more: dict[str, Any] = {"shape_scale": "match_rms", "matrices": layout.matrices}
        more |= {name: value(c) for name, value in options.items()}
        rate = getattr(c, "adam_learning_rate", None)
        if rate is not None:
            # Both follow the run's schedule, whose peak may be traced.
            more["adam_learning_rate"] = lambda count: schedule(count) * (rate / c.learning_rate)
        return make(
            schedule,
            beta=c.momentum,
            weight_decay=c.weight_decay,
            adam_b1=c.b1,
            adam_b2=c.b2,
            adam_eps=c.eps,
            mu_dtype=c.state_dtype,
            **more,
        )

    return build


def _orthogonalize(c: Muon | Teon) -> str | None:
    return None if c.orthogonalize is None else ORTHOGONALIZERS[c.orthogonalize]


def _groups(c: Teon) -> str:
    """The leaves that TEON groups, as a pattern on their paths; q, k and v in any spelling."""
    if c.groups == "qkv":
        return ATTENTION
    return rf"(^|[/.])({'|'.join(GROUPS[c.groups])})([/.]|$)"


def _comm_dtype(c: Sent) -> str | None:
    return None if c.comm_dtype == "float32" else c.comm_dtype


# Options of `optim.muon` and `optim.teon`, by the options of a row.
SCALED: dict[str, Callable[[Any], Any]] = {
    "comm_dtype": _comm_dtype,
    "shape_scale": lambda c: c.shape_scale,
    "orthogonalize": _orthogonalize,
    "nesterov": lambda c: c.nesterov,
}


def _optax_muon(c: OptaxMuon, schedule: optax.Schedule):
    """`optax.contrib.muon`, given the matrices: on its own it takes scanned ones for vectors."""

    def dimensions(params: Any) -> Any:
        leaves = [
            None if axes is None else optax.contrib.MuonDimensionNumbers(axes.fan_in, axes.fan_out)
            for axes in matrices.resolve(params, layout.matrices)
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


def _sophia(c: Sophia, schedule: optax.Schedule):
    more = {"weight_decay": c.weight_decay, "mask": decay_mask, "mu_dtype": c.state_dtype}
    return optim.sophia(schedule, b1=c.b1, b2=c.b2, **more)


def _sign(c: Sign, schedule: optax.Schedule):
    more = {"weight_decay": c.weight_decay, "mask": decay_mask, "mu_dtype": c.state_dtype}
    return optim.sign_momentum(schedule, beta=c.b1, **more)


def _zeroth_order(make: Callable[..., Any], **options: Any):
    """A zeroth-order method; `options` are its own arguments, each by its field or a function."""

    def build(c: Any, schedule: optax.Schedule, axis: str | None):
        own = {
            name: value(c) if callable(value) else getattr(c, value)
            for name, value in options.items()
        }
        return make(
            schedule,
            num_queries=c.queries,
            eps=c.perturbation,
            query_batch=c.query_batch,
            query_axis=axis,
            weight_decay=c.weight_decay,
            **own,
        )

    return build


def _reshaped_core(c: ZOMuon) -> str | None:
    return None if c.orthogonalize == "ns" else c.orthogonalize


def _rowwise(c: Rowwise, schedule: optax.Schedule, axis: str | None):
    if c.queries is None:
        raise ValueError("queries is None: `optimizers.over_rows` sets it to the rows of a batch")
    return _zeroth_order(optim.rowwise, rank="rank")(c, schedule, axis)


def _hybrid(c: Hybrid, schedule: optax.Schedule, axis: str | None):
    """Both halves follow the run's schedule, although each counts only its own steps."""
    ratio = 1.0 if c.zo_learning_rate is None else c.zo_learning_rate / c.learning_rate

    def at(phase: int, factor: float) -> optax.Schedule:
        def rate(count):
            step = (2 * (count // c.period) + phase) * c.period + count % c.period
            return factor * schedule(step)

        return rate

    first = _plain_adamw(c, at(0, 1.0))
    zeroth = optim.rada_zo(
        at(1, ratio),
        num_queries=c.queries,
        eps=c.perturbation,
        query_axis=axis,
        weight_decay=c.weight_decay,
    )
    return optim.alternate(first, zeroth, c.period)


def _blocks_of_teon(c: Teon, num_layers: int) -> None:
    if c.group_size > max(1, num_layers):
        raise UserError(
            f"--optimizer.group-size {c.group_size}: the model has {num_layers} block(s), so teon "
            f"would group none; use at most {num_layers}, or --optimizer.name muon"
        )


def _runs_of_teon(c: Teon, runs: list[tuple[int, int]], num_layers: int) -> None:
    for first, last in runs:
        # What is left over at the end of the model is never grouped.
        if first % c.group_size or (last % c.group_size and last < num_layers):
            raise UserError(
                f"--train.blocks {first} to {last - 1}: teon groups blocks by {c.group_size} from "
                "block 0 on, and this range cuts a group; choose whole groups, or "
                "--optimizer.group-size 1"
            )


def _no_adapters_for_teon(rank: int) -> None:
    raise UserError(
        "--lora.rank does not go with optimizer teon, which orthogonalises one projection of "
        "neighbouring blocks together: the columns of two blocks' adapters have nothing in "
        "common; use --optimizer.name muon"
    )


def _rank_for_sift(rank: int) -> None:
    if rank < 2:
        raise UserError(
            "--lora.rank 1 does not go with optimizer sift, which keeps a direction of each of two "
            "momenta in a matrix; use --lora.rank 2 or more"
        )


def _steps_of_hybrid(c: Hybrid, steps: int) -> None:
    if not optim.ends_on_zeroth_order(steps, c.period):
        near = optim.round_to_zeroth_order(steps, c.period)
        raise UserError(
            f"hybrid ends on its zeroth-order steps: {steps} steps are not blocks of 2 x "
            f"{c.period}; use {near} steps or another --optimizer.period"
        )


def _short_hybrid(c: Hybrid, steps: int) -> Hybrid:
    periods = range(min(c.period, max(1, steps // 2)), 0, -1)
    fits = (n for n in periods if optim.ends_on_zeroth_order(steps, n))
    return dataclasses.replace(c, period=next(fits, c.period))


def _forwards_of_hybrid(c: Hybrid, steps: int) -> int:
    both, rest = divmod(steps, 2 * c.period)
    first = both * c.period + min(rest, c.period)
    return 3 * first + 2 * c.queries * (steps - first)


OPTIMIZERS: dict[str, Optimizer] = {
    row.name: row
    for row in (
        Optimizer("adamw", AdamW, _adamw, "joint", "Adam with decoupled weight decay"),
        Optimizer(
            "muon",
            Muon,
            _with_matrices(optim.muon, **SCALED),
            "joint",
            "orthogonalised momentum for matrices, AdamW for the rest",
        ),
        Optimizer(
            "normuon",
            NorMuon,
            _with_matrices(optim.muon, **SCALED, post=lambda c: optim.normuon(c.second_momentum)),
            "joint",
            "Muon whose output neurons move alike",
        ),
        Optimizer(
            "optax-muon",
            OptaxMuon,
            _optax_muon,
            "joint",
            "optax.contrib.muon, leaf by leaf: what ours is measured against",
        ),
        Optimizer(
            "teon",
            Teon,
            _with_matrices(
                optim.teon,
                **SCALED,
                group_size=lambda c: c.group_size,
                axis=lambda c: c.axis,
                groups=_groups,
            ),
            "joint",
            "Muon with q, k and v of neighbouring blocks orthogonalised together",
            check_blocks=_blocks_of_teon,
            check_runs=_runs_of_teon,
            check_rank=_no_adapters_for_teon,
        ),
        Optimizer(
            "sift",
            Sift,
            _with_matrices(
                optim.sift,
                rank=lambda c: c.rank,
                bases=lambda c: c.bases,
                threshold=lambda c: c.threshold,
            ),
            "split",
            "Muon that fuses the two sides' subspaces where their momenta conflict",
            check_rank=_rank_for_sift,
        ),
        Optimizer("sophia", Sophia, _sophia, "joint", "clipped diagonal second-order steps"),
        Optimizer("sign", Sign, _sign, "joint", "sign of the momentum, one bit a parameter"),
        Optimizer(
            "mezo",
            MeZO,
            _zeroth_order(optim.mezo),
            "value",
            "zeroth order, dense perturbations",
            sides=2,
            replays=True,
        ),
        Optimizer(
            "sparse-mezo",
            SparseMeZO,
            _zeroth_order(optim.sparse_mezo, keep="keep", mask="mask"),
            "value",
            "zeroth order, perturbations of a random share of the parameters",
            sides=2,
            replays=True,
        ),
        Optimizer(
            "hizoo",
            HiZOO,
            _zeroth_order(optim.hizoo, smoothing="curvature_rate"),
            "value",
            "zeroth order, perturbations scaled by a diagonal curvature",
            sides=2,
            forwards=lambda options, steps: (2 * options.queries + 1) * steps,
        ),
        Optimizer(
            "lozo",
            LOZO,
            _zeroth_order(optim.lozo, rank="rank", refresh_every="refresh"),
            "value",
            "zeroth order, low-rank perturbations with one factor kept",
            sides=2,
            replays=True,
        ),
        Optimizer(
            "subzero",
            SubZero,
            _zeroth_order(optim.subzero, rank="rank", refresh_every="refresh"),
            "value",
            "zeroth order, low-rank perturbations between two kept bases",
            sides=2,
            replays=True,
        ),
        Optimizer(
            "subspace-mezo",
            SubspaceMeZO,
            _zeroth_order(
                optim.subspace_mezo,
                rank="rank",
                refresh_every="refresh",
                aux_learning_rate="vector_rate",
            ),
            "value",
            "zeroth order in a subspace: zo-muon without its orthogonalisation",
            sides=2,
            replays=True,
        ),
        Optimizer(
            "zo-muon",
            ZOMuon,
            _zeroth_order(
                optim.zo_muon,
                rank="rank",
                refresh_every="refresh",
                aux_learning_rate="vector_rate",
                orthogonalize=_reshaped_core,
            ),
            "value",
            "zeroth order in a subspace, orthogonalised",
            sides=1,
            replays=True,
        ),
        Optimizer(
            "fzoo",
            FZOO,
            _zeroth_order(optim.fzoo),
            "value",
            "zeroth order, random signs, steps over the deviation of the losses",
            sides=1,
            replays=True,
        ),
        Optimizer(
            "rowwise",
            Rowwise,
            _rowwise,
            "value",
            "zeroth order, low-rank perturbations, another one for every row of the batch",
            sides=2,
            replays=True,
            parts=True,
            forwards=lambda options, steps: 2 * steps,
        ),
        Optimizer(
            "hybrid",
            Hybrid,
            _hybrid,
            "lazy",
            "AdamW and adaptive zeroth order in turn",
            sides=2,
            check_steps=_steps_of_hybrid,
            shortened=_short_hybrid,
            forwards=_forwards_of_hybrid,
        ),
    )
}
