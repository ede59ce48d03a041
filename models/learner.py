"""How a kind of model is trained: what it answers to an objective, its shapes, its layout.

The trainer knows a model as a `Learner` and nothing else: a vision model or a denoiser trains under
every optimizer once it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import Context, Objective, Questions
from jaxlib_unlearn.objectives.context import HIDDEN, LABELS, TokenFn
from models import layout
from models.decoder.asked import AskedDecoder, AskedReference, Frozen
from models.decoder.labels import Batch, gather, head_copies, over_labels, spread
from models.decoder.model import Decoder


class Learner(Protocol):
    """A kind of model, as the trainer sees it; a frozen dataclass.

    `answers` are the questions it can be asked, `rules` how its parameters lie on a mesh, `layered`
    whether it takes a `layer_map` (a function of one layer's parameters, applied where the layer is
    used), `sizes` numbers that a row's state may depend on, `dtype` what
    it computes in. It may have `factored`, the paths of leaves outside its layers that it takes as
    `Factored` as well: row-wise directions then need no copy of them for every row.
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
        """What its outputs depend on beside the parameters: a frozen dataclass or JSON values."""
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
        """What a loss may ask of these parameters.

        Args:
            params: of the model that is trained.
            frozen: of the reference.
            batches: by stream.
            questions: those that will be asked.
            layer_map: of one layer's parameters.
            fuse: streams that are asked the same share a forward pass.
            train_from: nothing below this block is trained.
        """
        ...


@dataclass(frozen=True)
class PlainLearner:
    """What learners of models without stacks of layers share; their own are a subclass of it.

    A subclass has `answers`, `rules` and `sizes`, and `ask`: what answers, given parameters.

    Args:
        model: with `config`, whose `dtype` it computes in, and `shapes`.
    """

    model: Any
    answers = frozenset[str]()
    rules = layout.DECODER
    layered = False

    @property
    def sizes(self) -> Mapping[str, int]:
        """Numbers that a row's state may depend on."""
        return {}

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return self.model.config.dtype

    def identity(self) -> Any:
        """The configuration."""
        return self.model.config

    def shapes(self) -> Any:
        """The parameter tree as float32 `jax.ShapeDtypeStruct`s."""
        return self.model.shapes()

    def ask(self, params: Any, together: Sequence[Batch] = ()) -> Any:
        """The model as objectives ask it; of batches in `together` it will be asked the same."""
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
        """What a loss may ask of these parameters, see `Learner.context`."""
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
        train_from: nothing below this block is trained.
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
class DecoderLearner:
    """A causal decoder as the trainer sees it.

    Args:
        decoder: the model.
    """

    decoder: Decoder
    answers = frozenset((LABELS, HIDDEN))
    rules = layout.DECODER
    layered = True
    factored = ("embed/embedding", "positions/embedding", "lm_head/kernel")

    @property
    def sizes(self) -> dict[str, int]:
        """Width of the residual stream, number of blocks, size of the vocabulary; and how many
        positions are learned, if they are."""
        c = self.decoder.config
        found = {"hidden": c.hidden_size, "blocks": c.num_layers, "vocab": c.vocab_size}
        if c.learned_positions is not None:
            found["positions"] = c.learned_positions
        return found

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return self.decoder.config.dtype

    def identity(self) -> Any:
        """The decoder's configuration: rotary positions, dtypes and all else."""
        return self.decoder.config

    def shapes(self) -> Any:
        """The parameter tree as float32 `jax.ShapeDtypeStruct`s."""
        return self.decoder.shapes()

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
        """What a loss may ask of these parameters, see `Learner.context`."""
        decoder, dtype = self.decoder, self.decoder.config.dtype
        outer = {name: x for name, x in params.items() if name != "layers"}
        # Not cast: label chunks and streams sum their parts of these gradients.
        params = layout.constrain(outer) | {"layers": params["layers"]}
        # With a layer map of values or of adapters no gradient flows back to the layer itself.
        layer_map = layer_map or (lambda layer, index: layout.constrain(layer, dtype))
        options: dict[str, Any] = {"layer_map": layer_map}
        if train_from:
            options["train_from"] = train_from
        blocks = set(questions.blocks)
        if train_from and questions.forked:
            blocks.add(train_from - 1)
        model = AskedDecoder(decoder, params, options, blocks=tuple(sorted(blocks)))
        # A fork starts from the output of the block below it, which the same pass collects.
        entered = questions.forked if train_from else ()
        for streams, labels, hidden in passes(questions, batches, entered):
            together = fuse and len({batches[s]["tokens"].shape for s in streams}) == 1
            for group in [streams] if together else [[s] for s in streams]:
                # The labels of one stream alone are asked for where the loss asks.
                if len(group) > 1 or hidden:
                    model.learn([batches[s] for s in group], labels=labels, hidden=hidden)
        model = replace(model, head=head_copies(params, dtype))
        reference = AskedReference(decoder, frozen, model, train_from, questions.blocks)

        def compare(batch: Batch, fn: TokenFn, plain: bool = False) -> Any:
            """`fn(logits, reference_logits, [plain_logits,] targets)` over label chunks."""
            states, targets = model.states(batch), gather(batch, batch["targets"])
            columns = ("ref_hidden", "ref_plain_hidden") if plain else ("ref_hidden",)
            teachers = [reference.states(batch, column) for column in columns]

            def both(states, targets, *teachers):
                others = [decoder.unembed(reference.head, teacher) for teacher in teachers]
                return fn(
                    decoder.unembed(model.head, states), *jax.lax.stop_gradient(others), targets
                )

            width = (1 + len(teachers)) * decoder.config.vocab_size
            found = over_labels(both, width, states, targets, *teachers)
            return jax.tree.map(lambda x: spread(batch, x), found)

        return Context(model, reference, compare)


def passes(
    questions: Questions, batches: Mapping[str, Batch], entered: Sequence[str] = ()
) -> list[tuple[list[str], bool, bool]]:
    """The forward passes that serve a row: streams, whether for labels, whether for hidden states.

    Streams that are asked for hidden states alone have a pass that ends below the others. Of those
    `entered`, the frozen model reads a hidden state of the model.

    Example:
        >>> passes(Questions({"forget": ("hidden",), "retain": ("hidden",)}), {"forget": {},
        ...        "retain": {}})
        [(['forget', 'retain'], False, True)]
    """
    hidden = [s for s in batches if s in (*questions.of(HIDDEN), *entered)]
    labels = [s for s in batches if s in questions.of(LABELS)]
    both = any(s in labels for s in hidden)
    found = [(labels, True, both)] if labels else []
    alone = [s for s in hidden if s not in labels]
    return found + ([(alone, False, True)] if alone else [])
