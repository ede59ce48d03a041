"""Splits samples of prompts into chunks for decoding: few sizes, shared prompts together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Plan(NamedTuple):
    """A plan of decoding: the sizes of its chunks.

    Args:
        rows: the number of rows of a chunk, which are decoded at once.
        beside: the number of adjacent rows that share a prompt; 1: rows are in any order.
        prefilled: the number of prompts read at once; their samples fill chunks.
    """

    rows: int
    beside: int
    prefilled: int


def bucket(length: int, buckets: Sequence[int] | None = None) -> int:
    """The smallest of `buckets` that holds `length`; by default 8, 16, 24, 32, 48, 64, 96, ...

    Example:
        >>> [bucket(n) for n in (1, 17, 33, 65, 100)]
        [8, 24, 48, 96, 128]
    """
    if buckets is not None:
        return min((b for b in buckets if b >= length), default=length)
    power = 8
    while 2 * power < length:
        power *= 2
    steps = (power, power * 3 // 2 if power > 8 else power, 2 * power)
    return next(size for size in steps if size >= length)


def _few(even: int) -> int:
    """A size of at least `even`, out of few sizes, since each size is compiled."""
    return bucket(even) if even > 8 else 1 << (even - 1).bit_length()


def _even(count: int, most: int) -> int:
    """The size of equal chunks, as few as possible."""
    return -(-count // -(-count // most))


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def make_plan(
    prompts: int, samples: int, most: int, slots: int, width: int, room: int, shards: int
) -> Plan:
    """The plan of decoding equally many samples of each prompt.

    Samples of a prompt share its keys and values where a chunk holds all of them, or many of one
    prompt; where they cannot be split evenly over the devices each row has a copy.

    Args:
        prompts: the number of prompts.
        samples: the number of samples of each prompt.
        most: the largest number of rows decoded at once.
        slots: the number of slots of the cache.
        width: the number of slots of a prompt.
        room: the number of slots of an answer.
        shards: the number of shards of the batch, a divisor of the number of rows.

    Returns:
        The plan; on a mesh each device has whole prompts, or all have the same one.

    Example:
        >>> make_plan(3, 4, most=8, slots=1000, width=20, room=10, shards=1)
        Plan(rows=8, beside=4, prefilled=2)
    """
    if samples > 1:
        here = min(most, (slots - width) // room) // shards * shards
        if 2 * samples > here > 1:  # one prompt at a time
            rows = _up(_even(samples, here), shards)
            return Plan(rows, rows, _up(min(prompts, 8), shards))
        # On a mesh the devices split the prompts.
        several = min(most // samples, slots // (width + samples * room)) // shards * shards
        if several > 0:
            several = min(several, _up(_few(_even(prompts, several)), shards))
            return Plan(several * samples, samples, several)
    jobs = prompts * samples
    most = max(min(most, slots // (width + room)) // shards, 1) * shards
    size = min(most, _up(_few(_even(jobs, most)), shards))
    # As many prompts as it takes to fill whole chunks with their samples.
    return Plan(size, 1, _up(min(size // math.gcd(size, samples), prompts), shards))


def chunks(count: int, samples: int, plan: Plan) -> Iterator[list[tuple[int, int] | None]]:
    """`(prompt, sample)` of the rows of every chunk, None in rows that are padding."""
    if plan.beside == 1:
        jobs = [(prompt, sample) for prompt in range(count) for sample in range(samples)]
        for start in range(0, len(jobs), plan.rows):
            mine = jobs[start : start + plan.rows]
            yield [*mine, *[None] * (plan.rows - len(mine))]
        return
    for first in range(0, count, plan.rows // plan.beside):
        for start in range(0, samples, plan.beside):
            places = [divmod(row, plan.beside) for row in range(plan.rows)]
            wanted = [(first + prompt, start + sample) for prompt, sample in places]
            yield [job if job[0] < count and job[1] < samples else None for job in wanted]
