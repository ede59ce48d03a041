"""Losses on arrays; every loss returns ``(sum, weight)``.

The value of a loss is ``sum / weight``. Keeping the two apart lets a training step add both over
micro-batches and devices and divide once, so a value never depends on how the batch was split or
padded. All losses compute in float32 (float64 when given float64), ignore masked positions with
``jnp.where`` (a masked ``-inf`` or NaN reaches neither value nor gradient), and never send a
gradient into a teacher or reference argument.
"""

from jaxlib_unlearn.losses.choosing import choice, option_scores
from jaxlib_unlearn.losses.distillation import (
    asu_forget,
    contrast,
    kl,
    sequence_mean,
    skip_first_label,
    token_kl,
)
from jaxlib_unlearn.losses.likelihood import (
    Term,
    gradient_ascent,
    idk,
    labelled_rows,
    masked_sum,
    merge_terms,
    negate,
    nll,
    nll_from_log_probs,
    row_lengths,
    row_sums,
    token_log_probs,
    upcast,
    without_last,
)
from jaxlib_unlearn.losses.preference import (
    answer_preservation,
    dpo,
    npo,
    npo_raw_logits,
    simnpo,
    simnpo_raw_logits,
)
from jaxlib_unlearn.losses.representation import squared_error

__all__ = [
    "Term",
    "answer_preservation",
    "asu_forget",
    "choice",
    "contrast",
    "dpo",
    "gradient_ascent",
    "idk",
    "kl",
    "labelled_rows",
    "masked_sum",
    "merge_terms",
    "negate",
    "nll",
    "nll_from_log_probs",
    "npo",
    "npo_raw_logits",
    "option_scores",
    "row_lengths",
    "row_sums",
    "sequence_mean",
    "simnpo",
    "simnpo_raw_logits",
    "skip_first_label",
    "squared_error",
    "token_kl",
    "token_log_probs",
    "upcast",
    "without_last",
]
