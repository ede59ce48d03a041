"""A tensor in storage: in a safetensors file, a GGUF file, or several of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Stored(NamedTuple):
    """A tensor of a file: its shape (out, in) and how to read its rows `first` to `last - 1`.

    `kind` names its storage type, `order` is its place among the others.
    """

    shape: tuple[int, ...]
    kind: str
    read: Callable[[int, int], np.ndarray]
    order: tuple[Any, ...] = ()
