"""The options of the optimizers, one dataclass per row of `optimizer_rows`.

A field means the same in every row that has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxlib_unlearn.optim.spectral.fusion import BASES
from jaxlib_unlearn.options import option

DTYPES = ("float32", "bfloat16")
SCHEDULES = ("constant", "linear", "cosine", "hold")
SHAPE_SCALES = ("match_rms", "spectral", "width", "unit")
# By the word of `--optimizer.orthogonalize`: the argument of `optim.muon`. "You" is published with
# 6 rows, of which code that takes 5 steps uses the first 5.
ORTHOGONALIZERS = {
    "jordan": "jordan",
    "you": "you6",
    "polar_express": "polar_express",
    "svd": "svd",
}
# By the word of `--optimizer.groups`: the last parts of the names of a decoder's projections.
GROUPS = {
    "qkv": ("q", "k", "v"),
    "qkvo": ("q", "k", "v", "o"),
    "all": ("q", "k", "v", "o", "gate", "up", "down"),
}


def named(name: str) -> Any:
    """The field `name` of a row's options."""
    return option(name, "the optimizer; --list says what each of them does.")


def rate(default: float) -> Any:
    """The field `learning_rate` of a row's options: where it starts when a preset says nothing."""
    doc = (
        "peak, also of the leaves that AdamW trains beside muon, normuon and teon, unless "
        "`adam_learning_rate` is given."
    )
    return option(default, doc, above=0, wanted="positive")


def decay(default: float, doc: str) -> Any:
    """A field for a decay rate in [0, 1).

    With decay 1 a mean never takes up a gradient, and its bias correction divides by 0.
    """
    return option(default, doc, low=0, below=1)


def state_dtype() -> Any:
    """The field `state_dtype` of a row's options.

    A step changes a first moment by 5 to 10 %, and bfloat16 resolves 0.4 % (with a decay of 0.99 it
    would stay up to a fifth below a steady gradient). Second moments stay float32: with b2 0.999
    one in bfloat16 would never fall, as a change of 0.1 % is rounded away.
    """
    doc = "of first moments and momenta: float32, or bfloat16 for half their memory."
    return option("float32", doc, choices=DTYPES)


@dataclass(frozen=True)
class Options:
    """The options that all optimizers share; those of a row are a subclass."""

    name: str = named("")
    learning_rate: float = rate(1e-5)
    schedule: str = option(
        "linear",
        "of the learning rate; linear and cosine decay to 0, hold is constant for a share of the "
        "steps and then falls in a line to a floor.",
        choices=SCHEDULES,
    )
    warmup: float = option(0.1, "fraction of the steps of linear warm-up.", low=0, high=1)
    weight_decay: float = option(
        0.0,
        "decoupled; not on norms and biases (muon, normuon, teon, sift: on matrices alone).",
        low=0,
    )
    clip_norm: float | None = option(
        None, "clip the global gradient norm; None: no clipping.", low=0
    )
    hold: float = option(
        0.4,
        "of schedule hold: share of the steps after the warm-up before the rate falls.",
        low=0,
        below=1,
    )
    floor: float = option(0.1, "of schedule hold: share of the peak where it ends.", low=0, high=1)


@dataclass(frozen=True)
class Adam:
    """Options of the rows that use AdamW for all parameters or for some."""

    b1: float = decay(0.9, "first-moment decay of AdamW.")
    b2: float = decay(0.999, "second-moment decay of AdamW.")
    # Adam divides 0 by it where a gradient has always been 0.
    eps: float = option(1e-8, "AdamW's epsilon.", low=1e-30)
    state_dtype: str = state_dtype()


@dataclass(frozen=True)
class Momentum:
    """Options of the rows that orthogonalise a momentum."""

    momentum: float = decay(0.95, "momentum of the matrices.")


@dataclass(frozen=True)
class Scaled:
    """Options of Muon and its kin: how a direction is made and scaled."""

    adam_learning_rate: float | None = option(
        None,
        "peak for AdamW's leaves; None: `learning_rate`.",
        above=0,
        wanted="positive",
    )
    shape_scale: str = option(
        "match_rms",
        "factor of a matrix: match_rms, 0.2 sqrt(max(in, out)) (a rate for both parts), spectral, "
        "sqrt(out / in), width, sqrt(max(1, out / in)), or unit, 1.",
        choices=SHAPE_SCALES,
    )
    orthogonalize: str | None = option(
        None,
        "how a momentum is orthogonalised: jordan (Newton-Schulz, 5 steps), you (6), polar_express "
        "(5) or svd (exact); None: polar_express in teon, jordan in the others.",
        choices=tuple(ORTHOGONALIZERS),
    )


@dataclass(frozen=True)
class Sent:
    """Options of the rows that send matrices to the devices that orthogonalise them."""

    comm_dtype: str = option(
        "float32",
        "dtype to which matrices are rounded when they are sent to the devices that orthogonalise "
        "them, and directions on the way back: float32, or bfloat16 for half the bytes and "
        "temporary memory of those collectives. It applies on one device too, so that results do "
        "not depend on the number of devices.",
        choices=DTYPES,
    )


def queries(default: int) -> Any:
    """The field `queries` of a zeroth-order row's options."""
    return option(default, "perturbations of a zeroth-order step.", low=1)


def perturbation() -> Any:
    """The field `perturbation` of a zeroth-order row's options."""
    return option(1e-3, "size of a perturbation.", low=1e-12)


def vector_rate() -> Any:
    """The field `vector_rate` of a zeroth-order row's options."""
    return option(1e-7, "learning rate of norms and biases, constant.", low=0)


def query_batch() -> Any:
    """The field `query_batch` of a zeroth-order row's options."""
    doc = (
        "evaluations at a time: activations grow with it, and low-rank directions share the "
        "products with the weights; None: one."
    )
    return option(None, doc, low=1)


@dataclass(frozen=True)
class AdamW(Adam, Options):
    """Options of `adamw`."""

    name: str = named("adamw")


@dataclass(frozen=True)
class Muon(Adam, Sent, Momentum, Scaled, Options):
    """Options of `muon`."""

    name: str = named("muon")
    nesterov: bool = option(True, "look one step ahead.")


@dataclass(frozen=True)
class NorMuon(Muon):
    """Options of `normuon`."""

    name: str = named("normuon")
    second_momentum: float = decay(0.95, "decay of the mean square of every output neuron.")


@dataclass(frozen=True)
class OptaxMuon(Momentum, Options):
    """Options of `optax-muon`."""

    name: str = named("optax-muon")
    b1: float = decay(0.9, "first-moment decay of AdamW.")
    b2: float = decay(0.999, "second-moment decay of AdamW.")
    eps: float = option(1e-8, "AdamW's epsilon.", low=1e-30)


@dataclass(frozen=True)
class Teon(Adam, Sent, Momentum, Scaled, Options):
    """Options of `teon`."""

    name: str = named("teon")
    group_size: int = option(2, "consecutive blocks that are orthogonalised together.", low=1)
    nesterov: bool = option(False, "look one step ahead.")
    axis: str = option(
        "in",
        "axis along which the matrices of a group are joined: in (the paper's mode-1) or out.",
        choices=("in", "out"),
    )
    groups: str = option(
        "qkv",
        "projections that are grouped: qkv, qkvo (those of attention) or all (the MLP's too).",
        choices=tuple(GROUPS),
    )


@dataclass(frozen=True)
class Sift(Adam, Momentum, Options):
    """Options of `sift`."""

    name: str = named("sift")
    rank: int = option(256, "rank of the bases; at most half the matrix.", low=1)
    bases: str = option(
        "subspace",
        "how the bases are found: by iteration from the last step's, or exactly.",
        choices=BASES,
    )
    threshold: float = option(
        0.0, "a matrix takes the fused step where the cosine of its momenta is lower."
    )


@dataclass(frozen=True)
class Sophia(Options):
    """Options of `sophia`."""

    name: str = named("sophia")
    b1: float = decay(0.9, "first-moment decay.")
    b2: float = decay(0.999, "second-moment decay.")
    state_dtype: str = state_dtype()


@dataclass(frozen=True)
class Sign(Options):
    """Options of `sign`."""

    name: str = named("sign")
    b1: float = decay(0.9, "momentum.")
    state_dtype: str = state_dtype()


@dataclass(frozen=True)
class MeZO(Options):
    """Options of `mezo`."""

    name: str = named("mezo")
    learning_rate: float = rate(1e-7)
    queries: int = queries(1)
    perturbation: float = perturbation()
    query_batch: int | None = query_batch()


@dataclass(frozen=True)
class SparseMeZO(MeZO):
    """Options of `sparse-mezo`."""

    name: str = named("sparse-mezo")
    keep: float = option(
        0.8, "share of the parameters that a step perturbs.", above=0, high=1, wanted="in (0, 1]"
    )
    mask: str = option(
        "step",
        "which ones: drawn anew at every step, or once (static).",
        choices=("step", "static"),
    )


@dataclass(frozen=True)
class HiZOO(MeZO):
    """Options of `hizoo`."""

    name: str = named("hizoo")
    curvature_rate: float = option(
        1e-8, "share of a step's curvature in the estimate of it.", low=0, high=1
    )


@dataclass(frozen=True)
class LowRank(MeZO):
    """Options of the rows whose directions lie in subspaces that are kept for some steps."""

    rank: int = option(4, "rank of the subspace.", low=1)
    refresh: int = option(100, "steps for which a subspace is kept.", low=1)


@dataclass(frozen=True)
class LOZO(LowRank):
    """Options of `lozo`."""

    name: str = named("lozo")


@dataclass(frozen=True)
class SubZero(LowRank):
    """Options of `subzero`."""

    name: str = named("subzero")
    rank: int = option(48, "rank of the subspace.", low=1)
    refresh: int = option(1000, "steps for which a subspace is kept.", low=1)


@dataclass(frozen=True)
class SubspaceMeZO(LowRank):
    """Options of `subspace-mezo`."""

    name: str = named("subspace-mezo")
    # Its subspace holds rank / width of a gradient: about width / rank of MeZO's rate.
    learning_rate: float = rate(1e-6)
    rank: int = option(64, "rank of the subspace.", low=1)
    vector_rate: float = vector_rate()


@dataclass(frozen=True)
class FZOO(MeZO):
    """Options of `fzoo`."""

    name: str = named("fzoo")
    learning_rate: float = rate(1e-5)
    queries: int = option(8, "perturbations of a zeroth-order step.", low=2)


@dataclass(frozen=True)
class Rowwise(Options):
    """Options of `rowwise`."""

    name: str = named("rowwise")
    learning_rate: float = rate(1e-7)
    rank: int = option(1, "rank of a direction.", low=1)
    queries: int | None = option(
        None,
        "equal parts of the batch with a direction each; None: one for every row.",
        low=1,
    )
    perturbation: float = perturbation()
    query_batch: int | None = option(
        None, "evaluations of a part at a time; None: as many as there are parts.", low=1
    )


@dataclass(frozen=True)
class ZOMuon(Options):
    """Options of `zo-muon`."""

    name: str = named("zo-muon")
    learning_rate: float = rate(1e-2)
    rank: int = option(64, "rank of the subspace.", low=1)
    refresh: int = option(100, "steps for which a subspace is kept.", low=1)
    vector_rate: float = vector_rate()
    queries: int = queries(4)
    perturbation: float = perturbation()
    orthogonalize: str = option(
        "ns",
        "what becomes of the mean estimate of a matrix in the subspace: ns (orthogonalised by "
        "Newton-Schulz iterations), svd (exactly), or normalize (only scaled to the same norm).",
        choices=("ns", "svd", "normalize"),
    )
    query_batch: int | None = query_batch()


@dataclass(frozen=True)
class Hybrid(Adam, Options):
    """Options of `hybrid`."""

    name: str = named("hybrid")
    period: int = option(20, "AdamW steps before as many zeroth-order ones, in turn.", low=1)
    zo_learning_rate: float | None = option(
        None,
        "peak of the zeroth-order steps; None: `learning_rate`.",
        above=0,
        wanted="positive",
    )
    queries: int = queries(1)
    perturbation: float = perturbation()
