"""Two numbers that are drawn to points: a model, streams and an objective without a decoder."""

import dataclasses
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.objectives import Context, Objective
from jaxlib_unlearn.objectives.base import Options, named, weight
from jaxlib_unlearn.options import option

FORGET, RETAIN = np.array([3.0, 0.0]), np.array([0.0, 0.0])


class Asked(NamedTuple):
    """Half the squared distance of the parameters to the rows of a batch."""

    params: Any

    def distance(self, batch):
        return jnp.sum(jnp.square(self.params["w"] - batch["point"])) / 2


@dataclasses.dataclass(frozen=True)
class PointLearner:
    answers, rules = frozenset(("distance",)), ((r".", ()),)
    layered, dtype, sizes = False, "float32", types.MappingProxyType({})

    def identity(self):
        return "point"

    def shapes(self):
        return {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}

    def context(
        self, params, frozen, batches, questions, *, layer_map=None, fuse=True, train_from=0
    ):
        return Context(Asked(params))  # pyright: ignore[reportArgumentType]


class PointModel(NamedTuple):
    learner: PointLearner
    params: Any
    sha: str

    def identity(self):
        return {"sha": self.sha}


@dataclasses.dataclass(frozen=True)
class Points:
    point: np.ndarray
    follows: str | None = None

    def __len__(self):
        return 8

    def identity(self):
        return str(self.point.tolist())

    def epoch_order(self, seed, name, epoch):
        return np.arange(8)

    def shape(self, rows):
        return ()

    def batch(self, rows, shape, step):
        rows = np.asarray(rows, np.int32)
        return {"point": np.tile(self.point, (len(rows), 1)).astype(np.float32), "row_id": rows}


LEARNER = PointLearner()
STREAMS = {"forget": Points(FORGET), "retain": Points(RETAIN)}


@dataclasses.dataclass(frozen=True)
class Bounded(Options):
    name: str = named("bounded")
    budget: float = option(0.5, "mean retain loss that is held.", above=0)
    rate: float = option(0.1, "step of the dual variable.", above=0)
    forget_weight: float = weight("forget", 1.0)
    retain_weight: float = weight("retain", 1.0)


def loss(context, batches, options):
    return {
        name: (context.model.distance(batch), jnp.float32(len(batch["row_id"])))
        for name, batch in batches.items()
    }


def row_of(**more):
    return Objective(**{
        "name": "bounded", "loss": loss, "streams": ("forget", "retain"),
        "columns": {"forget": ("point",), "retain": ("point",)}, "reference": {}, "forward": {},
        "additive": True, "paper": "-", "options": Bounded,
        "asks": {"forget": ("distance",), "retain": ("distance",)},
    } | more)  # fmt: skip
