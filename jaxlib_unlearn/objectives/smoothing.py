"""ASU: self-distillation from the frozen model with smoothed attention.

The teacher is the initial model with attention scores divided by ``temperature`` in the blocks
``layers``. Its final hidden states on the forget stream are cached once, as those of the plain
model are on the retain stream for ``retain=kl``: no second model stays in memory.

The student copies its teacher, and a smoothed teacher may still prefer the right fact: no
temperature forgets more than it does. Two additions of ours reach further. ``push`` adds SimNPO's
loss on the answers: the KL holds the sentence, the push moves the fact. ``contrast`` lowers the
teacher where smoothing already did.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn import losses
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.losses import Term
from jaxlib_unlearn.objectives.base import (
    Compat,
    Objective,
    Terms,
    forms,
    named,
    weight,
)
from jaxlib_unlearn.objectives.context import Batch, Context, Questions
from jaxlib_unlearn.objectives.gradient import QA
from jaxlib_unlearn.objectives.preference import Pushed, push_term
from jaxlib_unlearn.objectives.retain import (
    SHARED_COMPAT,
    Sided,
    nll_term,
    reference_kl,
    retain_terms,
)
from jaxlib_unlearn.options import is_zero, option

_COMPAT = {
    "token_mean": Compat("token mean instead of sequence mean (MUSE)", additive=True),
    **SHARED_COMPAT,
}


@dataclasses.dataclass(frozen=True)
class Smoothed(Sided):
    """Options of a row whose teacher is the frozen model with smoothed attention."""

    forget_weight: float = weight("forget", 0.1)
    temperature: float = option(
        2.3, "The forget teacher's attention scores are divided by it.", above=0
    )
    layers: tuple[int, ...] | None = option(
        None, "The indices of the blocks that are smoothed; None: all.", none="all"
    )

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))


@dataclasses.dataclass(frozen=True)
class ASU(Pushed, Smoothed):
    """Options of ``asu``."""

    name: str = named("asu")
    compat: str | None = forms(_COMPAT)
    contrast: float = option(
        0.0,
        "The teacher lowers the tokens that smoothing made less likely by this many times as much "
        "again.",
        low=0,
        wanted="0 or more",
    )


@dataclasses.dataclass(frozen=True)
class ASUIDK(Smoothed):
    """Options of ``asu_idk``."""

    name: str = named("asu_idk")
    compat: str | None = forms(_COMPAT)


def check_layers(options: Smoothed) -> None:
    """Raise ``UserError`` for an empty list of blocks, or one that holds no index."""
    if options.layers == ():
        raise UserError(
            f"objective {options.name!r}: layers is empty, so the teacher would be the original "
            "model; name blocks, or leave layers out for all"
        )
    for layer in options.layers or ():
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise UserError(
                f"objective {options.name!r}: layers holds {layer!r}; it takes block indices from 0"
            )


def _distil(context: Context, batch: Batch, compat: str | None, skip_first: bool) -> Term:
    mask = batch["target_mask"]
    if skip_first:
        mask = losses.skip_first_label(mask)
    values = context.compare(batch, reference_kl)
    reduce = losses.masked_sum if compat == "token_mean" else losses.sequence_mean
    return reduce(values, mask)


def _distil_and_push(context: Context, batch: Batch, options: ASU) -> Terms:
    """ASU's forget terms with ``push`` or ``contrast``: one vocabulary product for both."""
    amount, push = options.contrast, options.push
    plain, pushed = not is_zero(amount), not is_zero(push)
    mask = batch["target_mask"]

    def values(logits: jax.Array, *rest: jax.Array) -> dict[str, jax.Array]:
        *frozen, targets = rest
        teacher = losses.contrast(frozen[0], frozen[1], amount) if plain else frozen[0]
        found = {"kl": losses.token_kl(teacher, logits)}
        return found | ({"logp": losses.token_log_probs(logits, targets)} if pushed else {})

    found = context.compare(batch, values, plain=plain)
    reduce = losses.masked_sum if options.compat == "token_mean" else losses.sequence_mean
    terms: Terms = {"forget": reduce(found["kl"], mask)}
    if pushed:
        terms["forget_push"] = push_term(found["logp"], mask, options)
    return terms


def asu(context: Context, batches: Mapping[str, Batch], options: ASU) -> Terms:
    """``L = f [KL(smoothed teacher || model) + push SimNPO](forget) + r R(retain)``."""
    batch = batches["forget"]
    if not (is_zero(options.push) and is_zero(options.contrast)):
        forget = _distil_and_push(context, batch, options)
    else:
        forget = {"forget": _distil(context, batch, options.compat, skip_first=False)}
    return forget | retain_terms(context, batches, options)


def asu_idk(context: Context, batches: Mapping[str, Batch], options: ASUIDK) -> Terms:
    """ASU plus ``f NLL(refusal)``; the first answer token is left to the refusal."""
    forget = _distil(context, batches["forget"], options.compat, skip_first=True)
    terms = {"forget": forget, "forget_idk": nll_term(context, batches["idk"])}
    return terms | retain_terms(context, batches, options)


def attention_temperatures(options: Smoothed, num_layers: int) -> Any:
    """The teacher's attention temperature per block: ``temperature`` on ``layers``, 1 elsewhere.

    Args:
        options: resolved options of a smoothing objective.
        num_layers: blocks of the model, L.

    Returns:
        ``(L,)`` float32 for ``forward(attention_temperature=...)``; a JAX array where the
        temperature is one, else a NumPy array.

    Raises:
        UserError: an empty layer list (the teacher would be the original model), or a block the
            model does not have.

    Example:
        >>> attention_temperatures(ASU(temperature=2.0, layers=(1,)), 3).tolist()
        [1.0, 2.0, 1.0]
    """
    layers = tuple(range(num_layers)) if options.layers is None else tuple(options.layers)
    if not layers:
        raise UserError(
            "objective option layers is empty, so nothing would be smoothed; name blocks, or leave "
            "it out for all"
        )
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise UserError(
                f"objective option layers names block {layer}; the model has blocks 0 to "
                f"{num_layers - 1}"
            )
    if isinstance(options.temperature, jax.Array):
        smoothed = np.isin(np.arange(num_layers), layers)
        return jnp.where(smoothed, jnp.asarray(options.temperature, jnp.float32), 1)
    result = np.ones(num_layers, np.float32)
    result[list(layers)] = options.temperature
    return result


def reference_forward(
    objective: Objective, options: Any, num_layers: int
) -> dict[str, dict[str, Any]]:
    """Keyword arguments of ``forward`` for the frozen model's answers on each stream.

    Args:
        objective: a resolved row.
        options: its options.
        num_layers: blocks of the model.

    Returns:
        ``{stream: {keyword: value}}`` for every stream in ``objective.reference``; empty keywords
        mean the plain frozen model.

    Raises:
        UserError: see :func:`attention_temperatures`.
        ValueError: the row asks for a keyword that is not known here.
    """
    result: dict[str, dict[str, Any]] = {}
    for stream in objective.reference:
        result[stream] = {}
        for keyword in objective.forward.get(stream, ()):
            if keyword != "attention_temperature":
                raise ValueError(f"no value for forward option {keyword!r} of {objective.name!r}")
            result[stream][keyword] = attention_temperatures(options, num_layers)
    return result


def with_forward(questions: Questions, row: Objective, options: Any, num_layers: int) -> Questions:
    """The questions with the forward options of the streams that are forked.

    Args:
        questions: the questions of the row.
        row: the objective.
        options: its options, whose numbers may be traced.
        num_layers: blocks of the model.
    """
    if not any(row.forward.get(stream) for stream in questions.forked):
        return questions
    keywords = reference_forward(row, options, num_layers)
    forward = {s: keywords[s] for s in questions.forked if keywords[s]}
    first = 0 if options.layers is None else min(options.layers)
    return questions._replace(forward=forward, differs_from=dict.fromkeys(forward, first))


_PAPER = "Zare Zade et al. 2026, arXiv 2603.01285"

ROWS = (
    Objective(
        name="asu",
        loss=asu,
        streams=("forget", "retain"),
        columns={"forget": QA, "retain": QA},
        reference={"forget": "hidden"},
        forward={"forget": ("attention_temperature",)},
        additive=True,
        paper=_PAPER,
        options=ASU,
        summary="distil the frozen model with smoothed attention: fluent, fact-free answers",
        compat=_COMPAT,
        only_with=dict.fromkeys(("beta", "delta", "spare_end"), "push"),
        also_cached=lambda options: {"forget": "hidden_pair"} if options.contrast else {},
        check=check_layers,
    ),
    Objective(
        name="asu_idk",
        loss=asu_idk,
        streams=("forget", "idk", "retain"),
        columns={"forget": QA, "idk": ("question",), "retain": QA},
        reference={"forget": "hidden"},
        forward={"forget": ("attention_temperature",)},
        additive=True,
        paper=_PAPER,
        options=ASUIDK,
        summary="ASU and refusals, the first answer token left to the refusal",
        compat=_COMPAT,
        check=check_layers,
    ),
)
