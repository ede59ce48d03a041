r"""RMU: hidden states of forget texts are moved to a random direction, those of others are kept.

With :math:`h_l` the residual stream after block l, u a random unit vector with no negative entry,
which is drawn once, and :math:`h^0` the frozen model's:

.. math::
    L = f \, E \, \lVert h_l(x_f) - c u \rVert^2 / d
      + r \, E \, \lVert h_l(x_r) - h^0_l(x_r) \rVert^2 / d

Rows of several topics have one u each. Published runs train ``mlp/down`` of the blocks l - 2, l - 1
and l alone. Nothing above block l is computed, and the frozen model shares all blocks below the
first trained one. Where all parameters are trained, it is a second copy of the whole model.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlib_unlearn import losses
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.losses import Term
from jaxlib_unlearn.objectives.base import (
    Compat,
    Facts,
    Objective,
    Options,
    Reference,
    Terms,
    asked_reference,
    forms,
    named,
    weight,
)
from jaxlib_unlearn.objectives.context import HIDDEN, LABELS, Batch, Context, frozen
from jaxlib_unlearn.objectives.gradient import QA
from jaxlib_unlearn.objectives.retain import (
    SHARED_COMPAT,
    Retain,
    at_every_slot,
    retain_terms,
    retains,
)
from jaxlib_unlearn.options import is_zero, option

# Words by which a model takes up a thought again, as R2MU's code penalises them (RTP).
REFLECTION = tuple(
    "<think> Wait wait but Okay Hmm Albeit However But Yet Still Nevertheless Though Meanwhile "
    "Whereas".split()
)
PADDED = {
    "padded": Compat(
        "means over all positions, prompt and padding too (R2MU's and WMDP's code)",
        additive=False,
        drops=("positions",),
    )
}
_COMPAT = {
    "every_slot": Compat(
        "means over all positions, prompt and padding too (WMDP's code)",
        additive=False,
        drops=("positions",),
    ),
    **PADDED,
    "batch_lengths": Compat(
        "mean of the rows' sums times the mean of 1 / lengths (OpenUnlearning)", additive=False
    ),
    **SHARED_COMPAT,
}


def block_read(default: Any, doc: str, **more: Any) -> Any:
    """The field ``block`` of a row that reads hidden states."""
    return option(default, doc, low=0, **more)


@dataclasses.dataclass(frozen=True)
class Steered(Options):
    """Options of rows that move hidden states to a vector."""

    steering: float = option(6.5, "c, the length of the vector that the states move to.", above=0)
    positions: Literal["answer", "all"] = option(
        "answer",
        "The tokens whose states are moved: those of the answer, or all.",
        choices=("answer", "all"),
    )
    retain: Retain | Literal["hidden"] = retains(
        "hidden", hidden="the distance to the frozen model's hidden states"
    )
    forget_weight: float = weight("forget", 1.0)
    retain_weight: float = weight("retain", 1200.0)
    reference: Reference = asked_reference()
    reflection_penalty: float = option(
        0.0,
        "The mean probability of `reflection_words` on the forget texts (RTP) is added with this "
        "coefficient.",
        low=0,
        wanted="0 or more",
    )
    reflection_words: tuple[str, ...] = option(
        REFLECTION, "The words whose probability is penalised; they are entries of the vocabulary."
    )
    reflection_ids: tuple[int, ...] = option(
        (), "The token ids of these words; (): the run's tokenizer gives them."
    )
    topics: tuple[str, ...] = option(
        (),
        "The topics that have a vector each; (): the topics of the rows to forget, with one "
        "vector where there is one topic or none.",
    )


@dataclasses.dataclass(frozen=True)
class RMU(Steered):
    """Options of ``rmu``: layer, steering and retain weight as in the paper for Zephyr-7B."""

    name: str = named("rmu")
    compat: str | None = forms(_COMPAT)
    layer: int = option(7, "The states behind this block are moved.", low=0)
    block: int | None = block_read(
        None, "The same by its name in r2mu; it takes precedence over `layer`.", none="layer"
    )


def block_of(options: Any) -> int:
    """The block whose output is moved."""
    return options.layer if options.block is None else options.block


def direction(key: jax.Array, options: Steered, sizes: Mapping[str, int]) -> dict[str, jax.Array]:
    """The row's state: uniform draws from [0, 1) of norm 1, ``(d,)``, or ``(topics, d)``.

    The vector of a topic depends on its name, not on the other topics.

    Example:
        >>> u = direction(jax.random.key(0), RMU(), {"hidden": 8})["direction"]
        >>> bool(u.min() >= 0), round(float(jnp.linalg.norm(u)), 4)
        (True, 1.0)
        >>> two = RMU(topics=("art", "law"))
        >>> direction(jax.random.key(0), two, {"hidden": 8})["direction"].shape
        (2, 8)
    """
    keys = [jax.random.fold_in(key, zlib.crc32(topic.encode())) for topic in options.topics]
    draws = jnp.stack([jax.random.uniform(k, (sizes["hidden"],)) for k in keys or [key]])
    unit = draws / jnp.linalg.norm(draws, axis=1, keepdims=True)
    return {"direction": unit if keys else unit[0]}


def fit(options: Steered, facts: Facts) -> Any:
    """The options with the ids of the words and the topics of the rows.

    Raises:
        UserError: no word of the penalty is an entry of the vocabulary, or topics that are not
            those of the rows.
    """
    changes: dict[str, Any] = {}
    if options.topics and facts.topics and sorted(options.topics) != sorted(facts.topics):
        raise UserError(
            f"objective {options.name!r}: --objective.topics names {', '.join(options.topics)}, "
            f"and the rows to forget have {', '.join(facts.topics) or 'none'}; name each of these "
            "once, or leave it out"
        )
    if len(facts.topics) > 1 and not options.topics:
        changes["topics"] = facts.topics
    if not is_zero(options.reflection_penalty) and not options.reflection_ids:
        ids = map(facts.token_id, options.reflection_words)
        found = {found for found in ids if found is not None}
        if not found:
            raise UserError(
                f"objective {options.name!r}: none of the reflection words is an entry of the "
                "tokenizer's vocabulary; give others with --objective.reflection-words, or leave "
                "--objective.reflection-penalty out"
            )
        changes["reflection_ids"] = tuple(sorted(found))
    return dataclasses.replace(options, **changes)


def adapt(row: Objective, options: Steered) -> Objective:
    """The row, asked for log-probabilities of the forget texts too where there is a penalty."""
    if is_zero(options.reflection_penalty):
        return row
    return dataclasses.replace(row, asks={**row.asks, "forget": (HIDDEN, LABELS)})


def _distance(hidden: jax.Array, mask: jax.Array, target: Any, batch: Batch, options: Any) -> Term:
    values = losses.squared_error(hidden, target)
    if every_slot(options):
        return losses.masked_sum(values)
    if options.positions == "answer":
        mask = answer_mask(batch, mask)
    else:  # rows without a label are padding
        mask = mask * losses.labelled_rows(batch["target_mask"])[:, None]
    if options.compat == "batch_lengths":
        sums, lengths = losses.row_sums(values, mask), losses.row_lengths(mask, values.dtype)
        rows = losses.labelled_rows(mask)
        inverse = jnp.where(rows, 1 / jnp.maximum(lengths, 1), 0)
        count = jnp.sum(rows.astype(values.dtype))
        return jnp.sum(sums) * jnp.sum(inverse) / jnp.maximum(count, 1), count
    return losses.sequence_mean(values, mask)


def answer_mask(batch: Batch, mask: jax.Array) -> jax.Array:
    """The mask of the answer's tokens, ``(B, T)``: one behind the slots that predict them.

    Example:
        >>> batch = {"label_index": jnp.array([[1, 2, 0]]), "target_mask": jnp.array([[1, 1, 0]])}
        >>> answer_mask(batch, jnp.ones((1, 5))).tolist()
        [[0.0, 0.0, 1.0, 1.0, 0.0]]
    """
    labels = jnp.asarray(batch["target_mask"], jnp.float32)
    rows = jnp.arange(labels.shape[0])[:, None]
    found = jnp.zeros(mask.shape, jnp.float32)
    return found.at[rows, jnp.asarray(batch["label_index"]) + 1].max(labels, mode="drop")


def every_slot(options: Any) -> bool:
    """Whether padding counts as well."""
    return options.compat in ("every_slot", "padded")


def rmu(context: Context, batches: Mapping[str, Batch], options: Any) -> Terms:
    """``L = f |h_l(forget) - c u|^2 + r |h_l(retain) - h0_l(retain)|^2``, means over channels.

    With a penalty p on the words W: ``+ f p mean_w P(w)`` over the labels of the forget texts.
    """
    forget = batches["forget"]
    terms = {"forget": moved(context, forget, options)}
    if not is_zero(options.reflection_penalty):
        total, count = reflection(context, forget, options)
        terms["forget_reflection"] = options.reflection_penalty * total, count
    if options.retain != "hidden":
        return terms | retain_terms(context, batches, options)
    return terms | {"retain": kept(context, batches["retain"], options)}


def moved(context: Context, batch: Batch, options: Any) -> Term:
    """The distance of a stream's hidden states to ``c u``, u the vector of each row's topic."""
    u = context.state["direction"]
    if u.ndim == 2:  # (topics, d)
        u = u[jnp.asarray(batch["topic"])][:, None]
    return _apart(context, batch, options.steering * u, options)


def kept(context: Context, batch: Batch, options: Any) -> Term:
    """The distance of a stream's hidden states to the frozen model's."""
    return _apart(context, batch, None, options)


def _apart(context: Context, batch: Batch, target: Any, options: Any) -> Term:
    if every_slot(options):
        batch = at_every_slot(batch)
    block = block_of(options)
    hidden, mask = context.model.hidden(batch, block)
    if target is None:
        target, _ = frozen(context).hidden(batch, block)
    return _distance(hidden, mask, target, batch, options)


def reflection(context: Context, batch: Batch, options: Any) -> Term:
    """The mean probability of the reflection words at the labels of a stream (RTP).

    R2MU's code, ``unlearn_think.py`` (arXiv 2506.12963).
    """
    ids = jnp.asarray(options.reflection_ids, jnp.int32)

    def probability(logits: jax.Array, targets: jax.Array) -> jax.Array:
        del targets
        return jnp.mean(jax.nn.softmax(losses.upcast(logits))[..., ids], -1)

    if every_slot(options):
        batch = at_every_slot(batch)
    values = context.model.reduce_logits(batch, probability)
    reduce = losses.masked_sum if every_slot(options) else losses.sequence_mean
    return reduce(values, batch["target_mask"])


ROWS = (
    Objective(
        name="rmu",
        loss=rmu,
        streams=("forget", "retain"),
        columns={"forget": QA, "retain": QA},
        reference={"retain": "fork"},
        forward={},
        additive=True,
        paper="Li et al. 2024, arXiv 2403.03218",
        options=RMU,
        summary="move hidden states of the forget texts to a random direction",
        compat=_COMPAT,
        asks={"forget": (HIDDEN,), "retain": (HIDDEN,)},
        blocks=lambda options: (block_of(options),),
        adapt=adapt,
        fit=fit,
        init_state=direction,
    ),
)
