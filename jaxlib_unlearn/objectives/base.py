"""An unlearning method as a row of a table: it binds losses to named streams of batches.

A row (:class:`Objective`) says which streams it reads, which data columns and which quantities of
the frozen model it needs, and gives ``loss(context, batches, options) -> {term: (sum, weight)}``.
Data checks, caches, ``--list`` and error messages derive from the row. The options that a person
may set are the row's own dataclass, a subclass of :class:`Options`; ``objectives.resolve`` gives
both.

A *term* is named after its side, the part before the first underscore: ``forget``, ``forget_idk``,
``retain``, ``train``. Sides carry the coefficients, and split optimizers take one gradient a side.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.losses import Term
from jaxlib_unlearn.objectives.context import HIDDEN, LABELS, Batch, Context, Questions
from jaxlib_unlearn.options import defaults, option

Terms = dict[str, Term]
Reference = Literal["auto", "cache", "fork"]
SIDES = ("forget", "retain")


def named(name: str) -> Any:
    """The field ``name`` of a row's options."""
    return option(name, "The method; --list says what each of them does.")


def forms(compat: Mapping[str, "Compat"]) -> Any:
    """The field ``compat`` of a row's options."""
    return option(None, "A published variant of the loss, by name.", words=tuple(compat))


def weight(side: str, default: float) -> Any:
    """A field that holds the coefficient of a side."""
    doc = f"The loss of the {side} side is multiplied by this coefficient; 0 leaves it out."
    return option(default, doc, low=0, wanted="0 or more")


def asked_reference() -> Any:
    """The field ``reference`` of a row that may ask a frozen model."""
    return option(
        "auto",
        "The source of the frozen model's answers. `cache` computes them once and stores them; "
        "`fork` asks the frozen model in every step, from the first trained block on. `auto` forks "
        "where hidden states are asked for and the first trained block is not block 0, or where a "
        "stream or the size of its hidden states (above 4 GiB) cannot be cached; else it caches.",
        choices=typing.get_args(Reference),
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """The fields that the options of every objective have; a row's own class is a subclass.

    ``retain``, ``forget_weight``, ``retain_weight`` and ``reference`` mean the same in every row
    that has them (``retain.Sided``); the other fields are the row's alone.
    """

    name: str = named("")
    compat: str | None = option(None, "A published variant of the loss, by name.")


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


class Progress(NamedTuple):
    """The progress of a stage; see ``Objective.advance``.

    Args:
        step: the number of the step that was just taken, from 0 on; a traced int32.
        steps: the number of steps of the stage; traced.
        epoch_steps: the number of steps in which the first stream is read once, which need not be
            a whole number; traced.
    """

    step: Any
    steps: Any
    epoch_steps: Any

    @property
    def epoch(self) -> Any:
        """The number of passes over the first stream after this step."""
        return (self.step + 1) / self.epoch_steps

    @property
    def done(self) -> Any:
        """The fraction of the stage that is done after this step, from 0 to 1."""
        return (self.step + 1) / self.steps


class Estimate(NamedTuple):
    """The point at which the gradient of one side is estimated; see ``Objective.estimators``.

    Args:
        grad_fn: ``params -> tree``, the gradient of the side on the batch of this step.
        params: the trained parameters.
        gradient: ``grad_fn(params)``, which the step has computed anyway.
        seed: a uint32 of the stage's seed, for estimators that draw.
        step: the number of the step, for the same.
    """

    grad_fn: Callable[[Any], Any]
    params: Any
    gradient: Any
    seed: Any
    step: Any


Estimator = Callable[[Estimate], Any]


class Facts(NamedTuple):
    """The facts that a run knows of its tokenizer and its rows; see ``Objective.fit``.

    ``token_id(word)`` is the id of an entry of the vocabulary, None for a word that is none;
    ``topics`` are the topics of the rows to forget, sorted.
    """

    token_id: Callable[[str], int | None]
    topics: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """One unlearning method as a row of the table.

    Args:
        name: the name of the row in ``--objective.name``.
        loss: ``loss(context, {stream: batch}, options) -> {term: (sum, weight)}``. The weights are
            counts of labels or rows: they depend on the batches alone, never on the parameters.
        streams: the names of the streams that it reads; the first is the one that an epoch counts.
            ``idk`` holds the questions of ``forget`` with a refusal as the answer, ``alternate``
            with other answers, both in the row order of ``forget``.
        columns: per stream, the columns that the data must have.
        reference: per stream, the quantity of the frozen model that is cached: ``"logps"`` (batch
            column ``ref_log_probs (B, W)``), ``"hidden"`` (``ref_hidden (B, W, d)``),
            ``"hidden_pair"`` (``ref_hidden``, and ``ref_plain_hidden`` of a forward pass without
            options) or ``"hidden_all"`` (``ref_hidden (B, T, d)``, at every slot of the padded
            row). ``"fork"`` caches nothing: the frozen model shares every leaf that is not trained
            and is asked in the step, from the first trained block on. :meth:`forking` makes any
            but ``"hidden_all"`` a fork, with the same losses.
        forward: per stream, the keyword options of ``forward`` that make its *reference*.
        additive: whether terms of micro-batches sum to the term of the batch; False refuses
            accumulation.
        per_micro_batch: whether each micro-batch's terms are divided by its own weights and
            averaged, so that the value depends on the split; else the weights of the whole batch
            divide them.
        paper: the citation.
        options: the dataclass of the row's options, see ``jaxlib_unlearn.options``.
        summary: one line for ``--list``.
        compat: the published variants by name.
        only_with: ``{option: other}``: the option does nothing where the other one is 0.
        also_cached: ``also_cached(options) -> {stream: quantity}``: the quantities of the frozen
            model that these options need in place of ``reference``; None: ``reference`` holds.
        check: ``check(options)`` raises ``UserError`` for errors that no range of a field excludes.
        adapt: ``adapt(row, options) -> row``: the row without the streams that its options leave
            out, or with further questions; None: the options change nothing.
        fit: ``fit(options, facts) -> options``: the options with the values filled in that follow
            from the run's tokenizer and rows (:class:`Facts`); None: there are none.
        asks: per stream, the questions that its loss asks a model: ``"log_probs"`` (or
            ``reduce_logits``, ``compare``), ``"hidden"``, or those of other kinds of models; a
            stream that is not named is asked for ``"log_probs"``. They decide which streams share a
            forward pass.
        blocks: ``blocks(options)``: the blocks at which ``hidden`` is asked.
        sides: the row's own words for the two gradients that ``split`` optimizers take.
        init_state: ``init_state(key, options, sizes)`` gives the arrays of ``context.state`` before
            the first step, which are saved in every checkpoint; ``sizes`` are those of the model
            (``hidden``, ``blocks``, ..).
        advance: ``advance(state, means, options, progress)`` gives the state after a step.
            ``means`` holds the global mean of every term, without its coefficient; ``options`` are
            those of the row, whose numbers may be traced; ``progress`` is a :class:`Progress`.
            None leaves the state as it is.
        weigh: ``weigh(options, state)`` gives the options whose coefficients the step takes, for a
            row whose coefficients are part of its state: a dual variable is the coefficient of its
            constraint. The terms of ``loss``, and with them ``means``, stay without it.
        estimators: ``estimators(options) -> {side: estimator}``. For each side that it names,
            ``estimator(estimate)`` gives the gradient from an :class:`Estimate`, such as the
            gradient at the worst nearby point (``optim.sharpness.sam_gradient``); the other side
            keeps its own. Optimizers that see only values are refused.
        trains: False for a method without training (a task vector, a merge). It brings ``compute``,
            which an unlearning run calls once; its ``loss`` is :func:`no_loss`.
        compute: ``compute(work, *, options, original, base, ...)``, a function of a module that
            returns the parameters of the unlearned model.
        version: the version of ``compute``; raise it when the same inputs may give another result.
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
    sides: tuple[str, str] = SIDES
    init_state: Callable[[jax.Array, Any, Mapping[str, int]], Any] | None = None
    advance: Callable[[Any, Mapping[str, jax.Array], Any, Progress], Any] | None = None
    weigh: Callable[[Any, Any], Any] | None = None
    estimators: Callable[[Any], Mapping[str, Estimator]] | None = None
    trains: bool = True
    compute: Callable[..., Any] | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if self.trains == (self.compute is not None):
            raise ValueError(
                f"objective {self.name!r}: a row has a compute where it does not train, and only "
                "there"
            )

    def forking(self) -> "Objective":
        """The row with the frozen model asked in the step where its answers would be cached.

        Raises:
            UserError: the row needs hidden states at every slot, padding too.
        """
        if self.slots:
            raise UserError(
                f"objective {self.name!r}: --objective.reference fork does not go with a compat "
                "form over all positions, whose reference is cached; use cache, or drop compat"
            )
        return dataclasses.replace(self, reference=dict.fromkeys(self.reference, "fork"))

    def questions(self, options: Any) -> Questions:
        """The questions that its loss asks, of each stream that it reads."""
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


def no_loss(context: Context, batches: Mapping[str, Batch], options: Options) -> Terms:
    """The loss of a row that does not train.

    Raises:
        ValueError: always.
    """
    del context, batches
    raise ValueError(f"objective {options.name!r} is computed, not trained; it has no loss")


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
        >>> from jaxlib_unlearn.objectives import Sided
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
        >>> from jaxlib_unlearn.objectives import Sided
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
