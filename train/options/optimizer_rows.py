"""The optimizer rows, their words, and rules about more than one option.

To add an optimizer, add its factory and a row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlib_unlearn import optim
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.optim.spectral.groups import ATTENTION
from models import layout
from train.options import observations
from train.options import optimizer_factories as factories
from train.options.optimizer_factories import decay_mask
from train.options.optimizer_options import Optimizer, Words

# "You" is published with 6 rows, of which code that takes 5 steps uses the first 5.
ORTHOGONALIZERS = Words(
    None,
    {"jordan": "jordan", "you": "you6", "polar_express": "polar_express", "svd": "svd"},
    "The way in which a momentum is orthogonalised: jordan (Newton-Schulz, 5 steps), you (6), "
    "polar_express (5) or svd (exact); None: polar_express in teon, jordan in the others.",
)


def _projections(*names: str) -> str:
    return rf"(^|[/.])({'|'.join(names)})([/.]|$)"


GROUPS = Words(
    "qkv",
    {
        "qkv": ATTENTION,  # in any spelling
        "qkvo": _projections("q", "k", "v", "o"),
        "all": _projections("q", "k", "v", "o", "gate", "up", "down"),
    },
    "The projections that are grouped: qkv, qkvo (attention) or all (attention and the MLP).",
)
CORES = Words(
    "ns",
    {"ns": None, "svd": "svd", "normalize": "normalize"},
    "The treatment of the mean estimate of a matrix in the subspace: ns (orthogonalised by "
    "Newton-Schulz iterations), svd (exactly), or normalize (only scaled to the same norm).",
)
PART_QUERIES = {
    "queries": "The number of equal parts of the batch with a direction each; None: one for every "
    "row.",
}


def _blocks_of_teon(c: Any, num_layers: int) -> None:
    if c.group_size > max(1, num_layers):
        raise UserError(
            f"--optimizer.group-size {c.group_size}: the model has {num_layers} block(s), so teon "
            f"would group none; use at most {num_layers}, or --optimizer.name muon"
        )


def _runs_of_teon(c: Any, runs: list[tuple[int, int]], num_layers: int) -> None:
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


def _steps_of_hybrid(c: Any, steps: int) -> None:
    if not optim.ends_on_zeroth_order(steps, c.period):
        near = optim.round_to_zeroth_order(steps, c.period)
        raise UserError(
            f"hybrid ends on its zeroth-order steps: {steps} steps are not blocks of 2 x "
            f"{c.period}; use {near} steps or another --optimizer.period"
        )


def _short_hybrid(c: Any, steps: int) -> Any:
    periods = range(min(c.period, max(1, steps // 2)), 0, -1)
    fits = (n for n in periods if optim.ends_on_zeroth_order(steps, n))
    return dataclasses.replace(c, period=next(fits, c.period))


def _forwards_of_hybrid(c: Any, steps: int) -> int:
    both, rest = divmod(steps, 2 * c.period)
    first = both * c.period + min(rest, c.period)
    return 3 * first + 2 * c.queries * (steps - first)


# Common to the rows of a family. Matrix updates have AdamW's typical RMS; AdamW trains the rest.
MATRICES: dict[str, Any] = {
    "spelled": {"beta": "momentum"},
    "words": {"orthogonalize": ORTHOGONALIZERS},
    "defaults": {"shape_scale": "match_rms"},
    "fixed": {"matrices": layout.matrices},
}
ZEROTH: dict[str, Any] = {
    "needs": "value",
    "sides": 2,
    "spelled": {"eps": "perturbation"},
    "defaults": {"learning_rate": 1e-7},
}


def _like(family: dict[str, Any], **other: Any) -> dict[str, Any]:
    return family | other


OPTIMIZERS: dict[str, Optimizer] = {
    row.name: row
    for row in (
        Optimizer("adamw", factories.adamw, "joint", "Adam with decoupled weight decay"),
        Optimizer(
            "muon",
            optim.muon,
            "joint",
            "orthogonalised momentum for matrices, AdamW for the rest",
            **MATRICES,
        ),
        Optimizer(
            "normuon",
            optim.muon,
            "joint",
            "Muon whose output neurons move alike",
            inner={"post": optim.normuon},
            **_like(MATRICES, spelled={"beta": "momentum", "beta2": "second_momentum"}),
        ),
        Optimizer(
            "optax-muon",
            factories.optax_muon,
            "joint",
            "optax.contrib.muon, leaf by leaf: what ours is measured against",
            spelled={"beta": "momentum"},
        ),
        Optimizer(
            "teon",
            optim.teon,
            "joint",
            "Muon with q, k and v of neighbouring blocks orthogonalised together",
            check_blocks=_blocks_of_teon,
            check_runs=_runs_of_teon,
            check_rank=_no_adapters_for_teon,
            **_like(MATRICES, words={"orthogonalize": ORTHOGONALIZERS, "groups": GROUPS}),
        ),
        Optimizer(
            "sift",
            optim.sift,
            "split",
            "Muon that fuses the subspaces of forget and retain where their momenta conflict",
            spelled={"beta": "momentum"},
            defaults={"bases": "subspace"},
            fixed={"matrices": layout.matrices, "shape_scale": "match_rms"},
            check_rank=_rank_for_sift,
            observe=observations.conflicts,
        ),
        Optimizer(
            "sophia",
            optim.sophia,
            "joint",
            "clipped diagonal second-order steps",
            defaults={"b2": 0.999},
            fixed={"mask": decay_mask},
        ),
        Optimizer(
            "sign",
            optim.sign_momentum,
            "joint",
            "sign of the momentum, one bit a parameter",
            spelled={"beta": "b1"},
            fixed={"mask": decay_mask},
        ),
        Optimizer(
            "mezo",
            optim.mezo,
            summary="zeroth order, dense perturbations",
            replays=True,
            **ZEROTH,
        ),
        Optimizer(
            "sparse-mezo",
            optim.sparse_mezo,
            summary="zeroth order, perturbations of a random share of the parameters",
            replays=True,
            **ZEROTH,
        ),
        Optimizer(
            "hizoo",
            optim.hizoo,
            summary="zeroth order, perturbations scaled by a diagonal curvature",
            forwards=lambda options, steps: (2 * options.queries + 1) * steps,
            observe=observations.coefficients,  # rows that replay write them to `replay.zo`
            **_like(ZEROTH, spelled={"eps": "perturbation", "smoothing": "curvature_rate"}),
        ),
        Optimizer(
            "lozo",
            optim.lozo,
            summary="zeroth order, low-rank perturbations with one factor kept",
            replays=True,
            **ZEROTH,
        ),
        Optimizer(
            "subzero",
            optim.subzero,
            summary="zeroth order, low-rank perturbations between two kept bases",
            replays=True,
            **ZEROTH,
        ),
        Optimizer(
            "subspace-mezo",
            optim.subspace_mezo,
            summary="zeroth order in a subspace: zo-muon without its orthogonalisation",
            replays=True,
            # Its subspace holds rank / width of a gradient: about width / rank of MeZO's rate.
            **_like(ZEROTH, defaults={"learning_rate": 1e-6}),
        ),
        Optimizer(
            "zo-muon",
            optim.zo_muon,
            summary="zeroth order in a subspace, orthogonalised",
            words={"orthogonalize": CORES},
            replays=True,
            **_like(ZEROTH, sides=1, defaults={"learning_rate": 1e-2}),
        ),
        Optimizer(
            "fzoo",
            optim.fzoo,
            summary="zeroth order, random signs, steps over the deviation of the losses",
            replays=True,
            **_like(ZEROTH, sides=1, defaults={"learning_rate": 1e-5}),
        ),
        Optimizer(
            "rowwise",
            optim.rowwise,
            summary="zeroth order, low-rank perturbations, another one for every row of the batch",
            docs=PART_QUERIES,
            parts=True,
            forwards=lambda options, steps: 2 * steps,
            replays=True,
            **_like(ZEROTH, defaults={"learning_rate": 1e-7, "queries": None}),
        ),
        Optimizer(
            "hybrid",
            factories.hybrid,
            "lazy",
            "AdamW and adaptive zeroth order in turn",
            spelled={"zo_eps": "perturbation"},
            sides=2,
            check_steps=_steps_of_hybrid,
            shortened=_short_hybrid,
            forwards=_forwards_of_hybrid,
            observe=observations.orders,
        ),
    )
}
