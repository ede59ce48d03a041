"""A kind of model as it is trained: its answers to an objective, its shapes, its layout.

The trainer knows a model as a `Learner` and nothing else: a vision model or a denoiser trains under
every optimizer once it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import Context, Objective, Questions
from jaxlib_unlearn.objectives.context import HIDDEN, LABELS
from models import layout

Batch = Mapping[str, jax.Array]

CLASSES = "classes"  # the question that a classifier answers


class Frozen(NamedTuple):
    """The parameters of the frozen model that a step has.

    Args:
        head: the parameters that unembed its cached hidden states.
        params: all of its parameters, for objectives that fork; None otherwise.
    """

    head: Any = None
    params: Any = None


class Learner(Protocol):
    """A kind of model, as the trainer sees it; a frozen dataclass.

    `answers` are the questions it can be asked, `rules` the layout of its parameters on a mesh,
    `sizes` the numbers that an objective's state may depend on, and `dtype` is the dtype of its
    computation. `layered` says whether it takes a `layer_map`, a function of one layer's parameters
    that is applied where the layer is used. It may have `factored`, the paths of leaves outside its
    layers that may be `Factored` too: row-wise directions then need no copy of them for every row.
    """

    @property
    def answers(self) -> frozenset[str]: ...
    @property
    def rules(self) -> layout.Rules: ...
    @property
    def layered(self) -> bool: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def dtype(self) -> str: ...

    def identity(self) -> Any:
        """The model's identity besides its parameters: a frozen dataclass or JSON values."""
        ...

    def shapes(self) -> Any:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""
        ...

    def context(
        self,
        params: Any,
        frozen: Frozen,
        batches: Mapping[str, Batch],
        questions: Questions,
        *,
        layer_map: Any = None,
        fuse: bool = True,
        train_from: int = 0,
    ) -> Context:
        """The context in which a loss asks these parameters.

        Args:
            params: the parameters of the model that is trained.
            frozen: the parameters of the reference.
            batches: a batch by the name of each stream.
            questions: the questions that the loss will ask.
            layer_map: a function of one layer's parameters.
            fuse: whether streams that are asked the same share a forward pass.
            train_from: the first trained block.
        """
        ...


@dataclass(frozen=True)
class PlainLearner:
    """The base class of learners of models without stacks of layers.

    A subclass has `answers`, `rules` and `sizes`, and `ask`, which returns the object that answers.

    Args:
        model: a model with `shapes` and a `config` with the `dtype` of the computation.
    """

    model: Any
    answers = frozenset[str]()
    rules = layout.DECODER
    layered = False

    @property
    def sizes(self) -> Mapping[str, int]:
        """The numbers that an objective's state may depend on."""
        return {}

    @property
    def dtype(self) -> str:
        """The dtype of the computation."""
        return self.model.config.dtype

    def identity(self) -> Any:
        """The configuration."""
        return self.model.config

    def shapes(self) -> Any:
        """The parameter tree as float32 `jax.ShapeDtypeStruct`s."""
        return self.model.shapes()

    def ask(self, params: Any, together: Sequence[Batch] = ()) -> Any:
        """The model as objectives ask it; all batches in `together` will be asked the same."""
        raise NotImplementedError

    def context(
        self,
        params: Any,
        frozen: Frozen,
        batches: Mapping[str, Batch],
        questions: Questions,
        *,
        layer_map: Any = None,
        fuse: bool = True,
        train_from: int = 0,
    ) -> Context:
        """The context in which a loss asks these parameters, see `Learner.context`."""
        del layer_map, train_from
        together = [batches[stream] for stream in questions.asks if stream in batches]
        constrained = layout.constrain(params, rules=self.rules)
        model = self.ask(constrained, together if fuse else ())
        if frozen.params is None:
            return Context(model)
        return Context(model, self.ask(jax.lax.stop_gradient(frozen.params)))


def check_questions(learner: Learner, row: Objective, options: Any, train_from: int = 0) -> None:
    """Raise `UserError` for an objective that asks what a model does not answer.

    Args:
        learner: the kind of model.
        row: the objective.
        options: its options.
        train_from: the first trained block.
    """
    questions = row.questions(options)
    asked = {question for some in questions.asks.values() for question in some}
    if row.slots:
        asked.add(LABELS)
    for question in sorted(asked - learner.answers):
        raise UserError(
            f"objective {row.name!r} asks a model for {question}, which this kind of model does "
            f"not answer; it answers {', '.join(sorted(learner.answers))}"
        )
    depth = learner.sizes.get("blocks", 0)
    for block in questions.blocks:
        if not 0 <= block < depth:
            there = f"blocks 0 to {depth - 1}; choose one of them" if depth else "no blocks"
            raise UserError(
                f"objective {row.name!r} reads the output of block {block}; the model has {there}"
            )
    if asked == {HIDDEN} and train_from > max(questions.blocks):
        raise UserError(
            f"objective {row.name!r} reads the output of block {max(questions.blocks)} and nothing "
            f"above it, and block {train_from} is the first that is trained; choose lower "
            "--train.blocks, or a higher block to read"
        )


@dataclass(frozen=True)
class AskedClassifier:
    """A classifier of images, as objectives ask it.

    Args:
        logits: `images -> logits`, with its parameters.
        known: answers so far; they are added as they are asked for.
    """

    logits: Callable[[Any], jax.Array]
    known: list[tuple[Batch, jax.Array]] = field(default_factory=list)

    def classes(self, batch: Batch) -> jax.Array:
        """Logits of the classes of `batch["image"]`, float32 `(B, C)`."""
        for other, found in self.known:
            if other is batch:
                return found
        self.known.append((batch, self.logits(batch["image"])))
        return self.known[-1][1]
