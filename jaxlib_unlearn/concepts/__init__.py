"""Concepts of text-to-image models: erased in closed form, brought back by tokens, shut out again.

Everything here works on arrays: kernels of cross-attention and embeddings of a text encoder.
"""

from jaxlib_unlearn.concepts.editing import adversarial, rece, uce
from jaxlib_unlearn.concepts.tokens import (
    Token,
    attack_token,
    coefficients,
    extend,
    init_network,
    project,
    share_of_top,
    span,
    words_of,
)

__all__ = [
    "Token",
    "adversarial",
    "attack_token",
    "coefficients",
    "extend",
    "init_network",
    "project",
    "rece",
    "share_of_top",
    "span",
    "uce",
    "words_of",
]
