"""A causal decoder as the trainer sees it: its answers, its shapes, its forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxlib_unlearn.objectives import Context, Questions
from jaxlib_unlearn.objectives.context import HIDDEN, LABELS, TokenFn
from models import layout
from models.decoder.asked import AskedDecoder, AskedReference
from models.decoder.labels import gather, head_copies, over_labels, spread
from models.decoder.model import Decoder
from models.learner import Batch, Frozen


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
        """The dtype of the computation."""
        return self.decoder.config.dtype

    def identity(self) -> Any:
        """The decoder's configuration."""
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
        """The context in which a loss asks these parameters, see `Learner.context`."""
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
        # A fork starts from the output of the block below it, which the same pass collects.
        entries = {train_from} if questions.forked else set()
        entries |= {min(train_from, first) for first in questions.differs_from.values()}
        blocks |= {entry - 1 for entry in entries if entry}
        model = AskedDecoder(decoder, params, options, blocks=tuple(sorted(blocks)))
        entered = questions.forked if train_from else ()
        for streams, labels, hidden in passes(questions, batches, entered):
            together = fuse and len({batches[s]["tokens"].shape for s in streams}) == 1
            for group in [streams] if together else [[s] for s in streams]:
                # The labels of one stream alone are asked for where the loss asks.
                if len(group) > 1 or hidden:
                    model.learn([batches[s] for s in group], labels=labels, hidden=hidden)
        model = replace(model, head=head_copies(params, dtype))
        reference = AskedReference(
            decoder,
            frozen,
            model,
            train_from,
            questions.blocks,
            {"layer_map": lambda layer, index: layout.constrain(layer, dtype)},
            [
                (batches[s], questions.differs_from.get(s, 0), own)
                for s, own in questions.forward.items()
            ],
        )

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
    """The forward passes of an objective: `(streams, for labels, for hidden states)` each.

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
