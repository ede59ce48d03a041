"""Plausibility checks of the sizes that a file or option claims, before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path

from jaxlib_unlearn.errors import UserError

LARGEST = 2**31 - 1
MOST_LAYERS = 10_000
LARGEST_FLOAT = 1e15
# Limits by the last part of the names used in files.
MOST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "block_count"), MOST_LAYERS),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon", "layer_norm_rms_epsilon"), 1.0),
}


def check_positions(learned: int | None, length: int, what: str) -> None:
    """Raise `UserError` for more tokens than a model has learned positions.

    JAX clamps an index that is out of range: all tokens behind the last row of the table would
    silently be at its position.

    Args:
        learned: the number of learned positions (`DecoderConfig.learned_positions`); None: they are
            rotary, which have no end.
        length: the number of tokens of a row, or the last position plus one.
        what: the name of the row, for the message.

    Example:
        >>> check_positions(256, 257, "prompt 3")
        Traceback (most recent call last):
        ...
        jaxlib_unlearn.errors.UserError: prompt 3: 257 tokens, more than the 256 positions that ...
    """
    if learned is not None and length > learned:
        raise UserError(
            f"{what}: {length} tokens, more than the {learned} positions that the model has "
            f"learned; use at most {learned}, or a model with rotary positions"
        )


def check_size(name: str, value: int | float, where: str) -> None:
    """Raise `UserError` for an implausible size of a model.

    Example:
        >>> check_size("num_hidden_layers", 10**6, "config.json")
        Traceback (most recent call last):
        ...
        jaxlib_unlearn.errors.UserError: config.json: num_hidden_layers is 1000000, more than ...
    """
    most = MOST.get(name.rpartition(".")[2], LARGEST if isinstance(value, int) else LARGEST_FLOAT)
    if value > most:
        raise UserError(
            f"{where}: {name} is {value}, more than the {most:.10g} that is read; use the files "
            "the model was published with"
        )


def host_memory() -> int | None:
    """Bytes of memory that this process may use; None if unknown.

    It is the machine's memory, or the limit of the control group where that is less.
    """
    found = []
    try:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        pass
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            found.append(int((Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            pass
    return min((size for size in found if size > 0), default=None)


def check_memory(needed: int, where: str, advice: str) -> None:
    """Raise `UserError` when `needed` bytes do not fit in this host's memory.

    Args:
        needed: the number of bytes.
        where: the model or option that asks for them.
        advice: the end of the message, which says what to do.
    """
    there = host_memory()
    if there is not None and needed > there:
        raise UserError(
            f"{where}: its parameters take {needed / 2**30:,.1f} GiB, this host has "
            f"{there / 2**30:,.1f} GiB of memory; {advice}"
        )
