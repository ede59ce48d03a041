"""What an unlearning method is: a row that binds losses to named streams of batches.

A row (:class:`Objective`) says which streams it reads, which data columns and which quantities of
the frozen model it needs, and gives ``loss(context, batches, options) -> {term: (sum, weight)}``.
Data checks, caches, ``--list`` and error messages derive from the row. What a person may set is the
row's own dataclass, a subclass of :class:`Options`; ``objectives.resolve`` gives both.

A *term* is named after its side, the part before the first underscore: ``forget``, ``forget_idk``,
``retain``, ``train``. Sides carry the coefficients, and split optimizers take one gradient a side.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_unlearn import losses
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.losses import Term
from jaxlib_unlearn.objectives.context import HIDDEN, LABELS, Batch, Context, Questions
from jaxlib_unlearn.options import defaults, option

Terms = dict[str, Term]

Retain = Literal["nll", "kl", "none"]


def named(name: str) -> Any:
    """The field ``name`` of a row's options."""
    return option(name, "the method; --list says what each of them does.")


def forms(compat: Mapping[str, "Compat"]) -> Any:
    """The field ``compat`` of a row's options."""
    return option(None, "a published variant of the loss, by name.", words=tuple(compat))


def weight(side: str, default: float) -> Any:
    """A field that holds the coefficient of a side."""
    doc = f"coefficient of the {side} side."
    return option(default, doc, low=0, wanted="0 or more")


@dataclasses.dataclass(frozen=True)
class Options:
    """What every objective's options have; a row's own are a subclass of it.

    ``retain``, ``forget_weight`` and ``retain_weight`` (see :class:`Sided`) mean the same in every
    row that has them; the other fields are the row's alone.
    """

    name: str = named("")
    compat: str | None = option(None, "a published variant of the loss, by name.")


@dataclasses.dataclass(frozen=True)
class Sided(Options):
    """Options of an objective with a forget and a retain side."""

    retain: Retain | None = option(
        None,
        "loss on the retain stream; None: nll, or the one that compat is a form of.",
        choices=typing.get_args(Retain),
        none="nll",
    )
    forget_weight: float = weight("forget", 1.0)
    retain_weight: float = weight("retain", 1.0)


class Compat(NamedTuple):
    """A published variant of an objective's loss.

    ``additive``: whether it adds up over micro-batches; ``reference``: caches it needs beyond the
    row's, or in place of them; ``drops``: options of the row that it does not use; ``sets``: those
    that it implies; ``per_micro_batch``: see :class:`Objective`.
    """

    note: str
    additive: bool
    reference: Mapping[str, str] | None = None
    drops: tuple[str, ...] = ()
    sets: Mapping[str, Any] | None = None
    per_micro_batch: bool = False


# Forms of what rows have in common. They are names of a row's `compat` like its own ones.
MEAN_OF_MEANS = {
    "mean_of_means": Compat(
        "mean over the micro-batches of each one's own mean (transformers up to 4.45); the value "
        "depends on the split",
        additive=True,
        per_micro_batch=True,
    )
}
RETAIN_KL = {
    "kl_all_positions": Compat(
        "retain KL over all positions, prompt and padding too (TOFU, OpenUnlearning)",
        additive=False,
        reference={"retain": "hidden_all"},
        sets={"retain": "kl"},
    ),
    "kl_sequence_mean": Compat(
        "retain KL as the mean over rows of each row's mean over labels (ASU's code)",
        additive=True,
        sets={"retain": "kl"},
    ),
}
SHARED_COMPAT = {**MEAN_OF_MEANS, **RETAIN_KL}


class Facts(NamedTuple):
    """What a run knows of its tokenizer and its rows; see ``Objective.fit``.

    ``token_id(word)`` is the id of an entry of the vocabulary, None for a word that is none;
    ``topics`` are the topics of the rows to forget, sorted.
    """

    token_id: Callable[[str], int | None]
    topics: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """One unlearning method as a row of the table.

    Args:
        name: as given to ``--objective.name``.
        loss: ``loss(context, {stream: batch}, options) -> {term: (sum, weight)}``. The weights are
            counts of labels or rows: they depend on the batches alone, never on the parameters.
        streams: batches it reads; the first is the one an epoch counts. ``idk`` holds the questions
            of ``forget`` with a refusal as the answer, ``alternate`` with other answers, both in
            the row order of ``forget``.
        columns: per stream, the columns the data must have.
        reference: per stream, what of the frozen model is cached: ``"logps"`` (batch column
            ``ref_log_probs (B, W)``), ``"hidden"`` (``ref_hidden (B, W, d)``), ``"hidden_pair"``
            (``ref_hidden``, and ``ref_plain_hidden`` of a forward pass without options) or
            ``"hidden_all"`` (``ref_hidden (B, T, d)``, at every slot of the padded row). ``"fork"``
            caches nothing: the frozen model shares what is not trained and is asked in the step,
            from the first trained block on.
        forward: per stream, the keyword options of ``forward`` its *reference* is made with.
        additive: terms of micro-batches sum to the term of the batch. False refuses accumulation.
        per_micro_batch: each micro-batch's terms are divided by its own weights and averaged, so
            that the value depends on the split; else by those of the whole batch.
        paper: citation.
        options: the dataclass of what a person may set, see ``jaxlib_unlearn.options``.
        summary: one line for ``--list``.
        compat: published variants by name.
        only_with: option -> the option without which (at 0) it does nothing.
        also_cached: ``also_cached(options) -> {stream: quantity}``: what the options given need of
            the frozen model in place of what ``reference`` says; None: nothing.
        check: ``check(options)`` raises ``UserError`` for what no field's range can say.
        adapt: ``adapt(row, options) -> row``: the row as its options make it, where they leave a
            stream out or ask more; None: they do not.
        fit: ``fit(options, facts) -> options``, with what follows from the run's tokenizer and rows
            (:class:`Facts`) filled in; None: nothing does.
        asks: per stream, the questions its loss asks a model: ``"log_probs"`` (or
            ``reduce_logits``, ``compare``), ``"hidden"``, or those of other kinds of models; what
            is not named is asked for ``"log_probs"``. It decides which streams share a pass.
        blocks: ``blocks(options)``: the blocks at which ``hidden`` is asked.
        sides: the row's own words for the two gradients that ``split`` optimizers take.
        init_state: ``init_state(key, options, sizes)``: arrays that go with the checkpoint, for
            ``context.state``; ``sizes`` are those of the model (``hidden``, ``blocks``, ..).
        advance: ``advance(state, means)``: the state after a step, given the global mean of every
            term; None: it stays.
    """

    name: str
    loss: Callable[[Context, Mapping[str, Batch], Any], Terms]
    streams: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    reference: Mapping[str, str]
    forward: Mapping[str, tuple[str, ...]]
    additive: bool
    paper: str
    options: type[Options]
    summary: str = ""
    compat: Mapping[str, Compat] = dataclasses.field(default_factory=dict)
    only_with: Mapping[str, str] = dataclasses.field(default_factory=dict)
    per_micro_batch: bool = False
    also_cached: Callable[[Any], Mapping[str, str | None]] | None = None
    check: Callable[[Any], None] | None = None
    adapt: Callable[["Objective", Any], "Objective"] | None = None
    fit: Callable[[Any, Facts], Any] | None = None
    asks: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    blocks: Callable[[Any], tuple[int, ...]] | None = None
    sides: tuple[str, str] = ("forget", "retain")
    init_state: Callable[[jax.Array, Any, Mapping[str, int]], Any] | None = None
    advance: Callable[[Any, Mapping[str, jax.Array]], Any] | None = None

    def questions(self, options: Any) -> Questions:
        """What its loss asks, of each stream that it reads."""
        every = self.slots
        asked = {s: self.asks.get(s, (LABELS,)) for s in self.streams if s not in every}
        blocks = () if self.blocks is None else tuple(sorted(set(self.blocks(options))))
        forked = tuple(s for s, kind in self.reference.items() if kind == "fork")
        return Questions(asked, blocks, forked)

    @property
    def slots(self) -> tuple[str, ...]:
        """Streams with labels at every slot: they are asked as another batch, with its own pass."""
        return tuple(s for s, kind in self.reference.items() if kind == "hidden_all")

    @property
    def defaults(self) -> dict[str, Any]:
        """The row's own options and their defaults: all but its name and its form."""
        own = defaults(self.options)
        return {name: own[name] for name in own if name not in ("name", "compat")}

    @property
    def packable(self) -> bool:
        """Whether its value stays the same when examples share rows of tokens."""
        hidden = any(HIDDEN in asked for asked in self.asks.values())
        return not (self.per_micro_batch or self.slots or hidden)


def side_of(term: str) -> str:
    """The side a term belongs to, the word before its first underscore.

    Example:
        >>> side_of("forget_idk")
        'forget'
    """
    return term.split("_", 1)[0]


def coefficient(term: str, options: Options) -> float:
    """The factor of a term in the total: its own weight, or its side's; 1 if there is neither.

    The own weight of ``forget_trace`` is the option ``forget_trace_weight`` or ``trace_weight``.

    Example:
        >>> coefficient("retain", Sided(retain_weight=2.0))
        2.0
    """
    side, _, rest = term.partition("_")
    for name in (term, rest, side):
        if hasattr(options, f"{name}_weight"):
            return getattr(options, f"{name}_weight")
    return 1.0


def combine(
    terms: Terms,
    weights: Mapping[str, Any] | None,
    options: Options,
    side: str | None = None,
) -> jax.Array:
    """The scalar to differentiate: ``sum_t coef_t * sum_t / weight_t``.

    With the weights of the *global* batch, the totals of its micro-batches (and their gradients)
    add up to the total of the whole, whatever their number and raggedness.

    Args:
        terms: ``{name: (sum, weight)}`` of the batch at hand.
        weights: ``{name: scalar}`` of the global batch; None takes the terms' own.
        options: resolved options, for the coefficients.
        side: only terms of this side; None for all.

    Returns:
        Scalar. A term whose weight is 0 (no label anywhere) adds 0.

    Raises:
        ValueError: no term to add.

    Example:
        >>> terms = {"forget": (jnp.array(-6.0), 3.0), "retain": (jnp.array(8.0), 2.0)}
        >>> combine(terms, None, Sided(retain_weight=0.5)).item()
        0.0
        >>> combine(terms, {"forget": 6.0, "retain": 2.0}, Sided(), side="forget").item()
        -1.0
    """
    chosen = [name for name in sorted(terms) if side in (None, side_of(name))]
    if not chosen:
        raise ValueError(f"no terms to combine for side {side!r} among {sorted(terms)}")
    parts = []
    for name in chosen:
        total, own = terms[name]
        weight = jnp.asarray(own if weights is None else weights[name])
        parts.append(coefficient(name, options) * total / jnp.where(weight > 0, weight, 1))
    return sum(parts[1:], parts[0])


def nll_term(context: Context, batch: Batch) -> Term:
    """Token-mean NLL of a stream's labels."""
    return losses.nll_from_log_probs(context.model.log_probs(batch), batch["target_mask"])


def reference_kl(logits: jax.Array, reference_logits: jax.Array, targets: jax.Array) -> jax.Array:
    """``KL(reference || model)`` per label, in the argument order of ``compare``."""
    del targets
    return losses.token_kl(reference_logits, logits)


def at_every_slot(batch: Batch) -> Batch:
    """A batch of unpacked, right-padded rows in which every slot, padding too, is a label.

    A padded slot reads its row at the position it lies at and is read by none: what a padding mask
    on the keys makes of it. It is marked by segment id -1.

    Args:
        batch: with ``tokens (B, T)``, ``positions``, ``segment_ids``.

    Returns:
        The batch with label columns ``(B, T)``; its targets mean nothing.

    Raises:
        ValueError: examples share rows of tokens.

    Example:
        >>> batch = {"tokens": jnp.array([[5, 6, 0]]), "positions": jnp.array([[0, 1, 0]]),
        ...          "segment_ids": jnp.array([[1, 1, 0]])}
        >>> every = at_every_slot(batch)
        >>> every["label_index"].tolist(), every["segment_ids"].tolist()
        ([[0, 1, 2]], [[1, 1, -1]])
    """
    if "label_source" in batch:
        raise ValueError("every slot of a row needs rows of one example each, not packed ones")
    tokens = jnp.asarray(batch["tokens"])
    slots = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    segment_ids = jnp.asarray(batch["segment_ids"])
    return {
        **batch,
        "positions": jnp.where(segment_ids == 0, slots, jnp.asarray(batch["positions"])),
        "segment_ids": jnp.where(segment_ids == 0, -1, segment_ids),
        "label_index": slots,
        "targets": tokens,
        "target_mask": jnp.ones(tokens.shape, jnp.float32),
    }


def retain_terms(context: Context, batches: Mapping[str, Batch], options: Any) -> Terms:
    """The retain side: NLL, KL to the frozen model, or nothing, by ``options.retain``.

    KL is a mean over labels; ``RETAIN_KL`` has the published other ones.
    """
    if options.retain == "none":
        return {}
    batch = batches["retain"]
    if options.retain == "kl":
        batch = at_every_slot(batch) if options.compat == "kl_all_positions" else batch
        values = context.compare(batch, reference_kl)
        by_row = options.compat == "kl_sequence_mean"
        reduce = losses.sequence_mean if by_row else losses.masked_sum
        return {"retain": reduce(values, batch["target_mask"])}
    return {"retain": nll_term(context, batch)}


def check_accumulation(objective: Objective, micro_batches: int) -> None:
    """Refuse to split a batch whose loss is not a sum over rows.

    Raises:
        UserError: more than one micro-batch for an objective that is not additive.
    """
    if micro_batches > 1 and not objective.additive:
        raise UserError(
            f"objective {objective.name!r} with this compat form does not add up over rows (a mean "
            "inside its log-sigmoid, or one over padding) and cannot be split into "
            f"{micro_batches} micro-batches; use 1, or drop compat"
        )
