"""The optimizer table: how each row is built and what it needs from the step.

A row's `needs` is `joint`: one gradient of the weighted sum of the objective's terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax

from jaxlib_unlearn import optim
from jaxlib_unlearn.errors import UserError
from train import cli
from train.sharding import path_str


@dataclass(frozen=True)
class OptimizerConfig:
    """How a step is taken.

    Args:
        name: a row of the table (adamw, muon).
        learning_rate: peak; Muon's matrices move with AdamW's typical RMS: one value serves both.
        schedule: `constant`, `linear` or `cosine` (the last two decay to 0).
        warmup: fraction of the steps of linear warm-up.
        weight_decay: decoupled; not on norms and biases (Muon: on its matrices alone).
        b1: first-moment decay of AdamW.
        b2: second-moment decay of AdamW.
        eps: AdamW's epsilon.
        momentum: Muon's momentum.
        clip_norm: clip the global gradient norm; None: no clipping.
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


@dataclass(frozen=True)
class Optimizer:
    """A row: `build(config, schedule) -> optax transformation`, and what the step must hand it."""

    name: str
    build: Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformationExtraArgs]
    needs: str
    summary: str


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: everything but norm scales and biases."""

    def decays(path, _):
        return not path_str(path).endswith(("scale", "bias"))

    return jax.tree_util.tree_map_with_path(decays, params)


def _adamw(c: OptimizerConfig, schedule: optax.Schedule):
    tx = optax.adamw(schedule, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decay_mask)
    return optax.with_extra_args_support(tx)


def _muon(c: OptimizerConfig, schedule: optax.Schedule):
    return optim.muon(
        schedule,
        beta=c.momentum,
        shape_scale="match_rms",
        weight_decay=c.weight_decay,
        adam_b1=c.b1,
        adam_b2=c.b2,
        adam_eps=c.eps,
    )


OPTIMIZERS: dict[str, Optimizer] = {
    row.name: row
    for row in (
        Optimizer("adamw", _adamw, "joint", "Adam with decoupled weight decay"),
        Optimizer(
            "muon", _muon, "joint", "orthogonalised momentum for matrices, AdamW for the rest"
        ),
    )
}


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate over `steps`: linear warm-up, then constant, linear or cosine decay to 0."""
    warm = min(steps - 1, round(config.warmup * steps)) if steps > 1 else 0
    peak, rest = config.learning_rate, max(1, steps - warm)
    after = cli.choose(
        config.schedule,
        {
            "constant": optax.constant_schedule(peak),
            "linear": optax.linear_schedule(peak, 0.0, rest),
            "cosine": optax.cosine_decay_schedule(peak, rest),
        },
        "schedule",
    )
    if warm == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warm, peak, warm), after], [warm])


def check(config: OptimizerConfig) -> None:
    """Raise `UserError` for an unknown name or schedule, or numbers out of range."""
    cli.choose(config.name, OPTIMIZERS, "optimizer")
    if not config.learning_rate > 0:
        raise UserError(f"--optimizer.learning-rate {config.learning_rate} must be positive")
    if not 0 <= config.warmup <= 1:
        raise UserError(f"--optimizer.warmup {config.warmup} is a share of the steps, 0 to 1")
    make_schedule(config, 1)


def build(
    config: OptimizerConfig, steps: int
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """The transformation of `config` over `steps` and its learning-rate schedule."""
    check(config)
    schedule = make_schedule(config, steps)
    tx = OPTIMIZERS[config.name].build(config, schedule)
    if config.clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    return optax.with_extra_args_support(tx), schedule
