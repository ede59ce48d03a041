"""The questions an objective may ask of the trained model, of the frozen one, and of the step.

``loss(context, batches, options)`` asks its questions here and nowhere else, so that one loss runs
on any model, on any mesh, and in any trainer. Answers are memoised a batch: asked twice, or of two
streams that share a forward pass, a question costs one pass. Ask outside ``scan`` and ``vmap``: an
answer that is remembered there would leave its transformation.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Batch = Mapping[str, Any]
TokenFn = Callable[..., Any]

LABELS = "log_probs"  # the question that `log_probs`, `reduce_logits` and `compare` ask
HIDDEN = "hidden"


class Asked(Protocol):
    """A model, for the batches of one step.

    A batch of text has ``target_mask (B, W)`` (1 = a label), ``targets (B, W)``, ``label_index
    (B, W)`` and whatever the model reads; see ``context_from_apply`` and ``batch_from_labels``. Of
    a frozen model no gradient flows back.
    """

    def log_probs(self, batch: Batch) -> jax.Array:
        """Log-probabilities of the targets, ``(B, W)`` float32; 0 where there is no label."""
        ...

    def reduce_logits(self, batch: Batch, fn: TokenFn) -> Any:
        """``fn(logits (..., V), targets (...)) -> (...)`` on every label, ``(B, W)``, or a tree.

        A tree gives several values for one vocabulary product. ``fn`` may be called chunk by chunk,
        so that no array of ``(batch, length, vocabulary)`` exists.
        """
        ...

    def hidden(self, batch: Batch, block: int) -> tuple[jax.Array, jax.Array]:
        """The residual stream after a block: ``(R, T, d)``, and ``(R, T)``: 1 where a token is."""
        ...


class Context(NamedTuple):
    """The argument of a loss beside its batches and options.

    Args:
        model: the model that is trained.
        reference: the frozen model, as far as the row's ``reference`` asks for it; asked for more,
            it raises ``ValueError``.
        compare: ``compare(batch, fn)`` is ``fn(logits, reference_logits, targets)`` on every label,
            both logits in one chunk. With ``plain=True`` it is ``fn(logits, reference_logits,
            plain_logits, targets)``, for rows whose reference is ``hidden_pair``.
        row_keys: ``row_keys(batch, purpose)``: a key of ``jax.random`` for each row, ``(B,)``, of
            seed, purpose, step and ``row_id``; a row draws the same whatever stands beside it.
        state: the row's state (``Objective.init_state``), read only.
    """

    model: Asked
    reference: Asked | None = None
    compare: Callable[..., Any] = lambda *args, **more: _missing("compare", "a frozen model")
    row_keys: Callable[[Batch, str], jax.Array] = lambda *args: _missing("row_keys", "a key")
    state: Any = ()


class Questions(NamedTuple):
    """The questions that a row asks in one step; a learner plans its forward passes by them.

    Args:
        asks: the questions by stream.
        blocks: the blocks at which ``hidden`` is asked.
        forked: streams of which the frozen model is asked by a forward pass of its own.
        forward: the keyword options of that pass by forked stream; a stream that is not named has
            none.
        differs_from: the first block at which these options make a difference, by forked stream.
    """

    asks: Mapping[str, tuple[str, ...]]
    blocks: tuple[int, ...] = ()
    forked: tuple[str, ...] = ()
    forward: Mapping[str, Mapping[str, Any]] = {}
    differs_from: Mapping[str, int] = {}

    def of(self, question: str) -> tuple[str, ...]:
        """The streams of which a question is asked.

        Example:
            >>> Questions({"forget": ("hidden",), "retain": ("log_probs",)}).of("hidden")
            ('forget',)
        """
        return tuple(stream for stream, asked in self.asks.items() if question in asked)


def frozen(context: Context) -> Asked:
    """The frozen model of a context.

    Raises:
        ValueError: it has none.
    """
    return (
        _missing("the loss", "a frozen model") if context.reference is None else context.reference
    )


def _missing(what: str, needs: str) -> Any:
    raise ValueError(f"{what} needs {needs}, which this context was not given")


def row_keys(key: jax.Array, step: Any = 0) -> Callable[[Batch, str], jax.Array]:
    """``Context.row_keys`` of one step.

    Args:
        key: the key of the seed.
        step: the number of the step.

    Returns:
        ``(batch, purpose) -> (B,)`` keys, by ``batch["row_id"]``.

    Example:
        >>> keys = row_keys(jax.random.key(0), 3)({"row_id": jnp.array([7, 8])}, "noise")
        >>> alone = row_keys(jax.random.key(0), 3)({"row_id": jnp.array([8])}, "noise")
        >>> bool((jax.random.key_data(keys[1]) == jax.random.key_data(alone[0])).all())
        True
    """

    def keys(batch: Batch, purpose: str) -> jax.Array:
        mine = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(purpose.encode())), step)
        return jax.vmap(lambda row: jax.random.fold_in(mine, row))(jnp.asarray(batch["row_id"]))

    return keys
