"""Latents of images with their captions, as a stream: noise is added as rows are read.

Noise, time and the dropping of a prompt are keyed by (seed, purpose, step, row): a row is the same
in every batch and process and on every mesh.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from scipy.special import ndtri

from models.diffusion.schedulers import Schedule
from train.data.batches import random_bits, shuffled


@dataclass(frozen=True, eq=False)
class NoisyLatents:
    r"""Rows `z` with token ids, as batches of

    .. math:: x = \sqrt{\bar\alpha_t}\, z + \sqrt{1 - \bar\alpha_t}\, e, \qquad
        t \sim U\{0, .., S - 1\},\ e \sim N(0, 1)

    Args:
        latents: float32 `(N, H, W, C)`.
        columns: other arrays `(N, ..)` by name, of integers: `tokens`, and `other_tokens` or
            `place` where an objective reads them.
        schedule: the schedule of the noise.
        seed: the seed of the draws.
        purpose: a word that separates the draws of this stream from others.
        empty: `(T,)` token ids of the empty prompt, for `dropout`.
        dropout: the share of rows whose `tokens` are replaced by `empty`, so that the model learns
            the unconditional prediction that guidance needs.
        follows: see `train.data.stream.Stream`.

    Raises:
        ValueError: columns of another length, or dropout without an empty prompt.

    Example:
        >>> stream = NoisyLatents(np.zeros((3, 2, 2, 1), np.float32),
        ...                       {"tokens": np.ones((3, 4), np.int32)}, Schedule())
        >>> batch = stream.batch(np.array([2, 0]), (), step=5)
        >>> {name: x.shape for name, x in batch.items()}["latents"]
        (2, 2, 2, 1)
    """

    latents: np.ndarray
    columns: dict[str, np.ndarray]
    schedule: Schedule
    seed: int = 0
    purpose: str = "noise"
    empty: np.ndarray | None = None
    dropout: float = 0.0
    follows: str | None = None
    _digest: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self):
        lengths = {name: len(x) for name, x in self.columns.items() if len(x) != len(self.latents)}
        if lengths:
            raise ValueError(f"{len(self.latents)} latents, but columns of {lengths}")
        if self.dropout and self.empty is None:
            raise ValueError("prompts are dropped for an empty one; give it")

    def __len__(self) -> int:
        return len(self.latents)

    def identity(self) -> str:
        """sha256 of the arrays, the schedule and the options of the draws."""
        if not self._digest:
            found = hashlib.sha256(repr((self.schedule, self.seed, self.purpose)).encode())
            arrays = {"latents": self.latents, **self.columns}
            if self.dropout and self.empty is not None:
                found.update(repr(self.dropout).encode())
                arrays["empty"] = self.empty
            for name, x in sorted(arrays.items()):
                found.update(f"{name} {x.dtype.str} {x.shape}".encode())
                found.update(np.ascontiguousarray(x).tobytes())
            self._digest.append(found.hexdigest())
        return self._digest[0]

    def epoch_order(self, seed: int, name: str, epoch: int) -> np.ndarray:
        """A permutation of the rows that belongs to (seed, name, epoch)."""
        return shuffled(seed, name, epoch, len(self))

    def shape(self, rows: np.ndarray) -> tuple[int, ...]:
        """Nothing is padded."""
        del rows
        return ()

    def batch(self, rows: np.ndarray, shape: tuple[int, ...], step: int) -> dict[str, np.ndarray]:
        """`latents` with noise, `noise`, `time`, `row_id`, and the other columns of these rows."""
        del shape
        rows = np.asarray(rows, np.int64)
        size = self.latents[0].size
        # Numbers for the time, for dropping the prompt, and for the noise.
        drawn = np.stack([self._uniform(step, row, 2 + size) for row in rows.tolist()])
        steps = self.schedule.num_train_timesteps
        time = np.minimum(drawn[:, 0] * steps, steps - 1).astype(np.int32)
        clean = self.latents[rows]
        noise = ndtri(drawn[:, 2:]).reshape(clean.shape).astype(np.float32)
        kept = self.schedule.abar[time].reshape(-1, *(1,) * (clean.ndim - 1))
        found = {name: x[rows] for name, x in self.columns.items()}
        if self.dropout and self.empty is not None:
            dropped = drawn[:, 1] < self.dropout
            found["tokens"] = np.where(dropped[:, None], self.empty, found["tokens"])
        return found | {
            "latents": (np.sqrt(kept) * clean + np.sqrt(1 - kept) * noise).astype(np.float32),
            "noise": noise,
            "time": time,
            "row_id": rows.astype(np.int32),
        }

    def _uniform(self, step: int, row: int, count: int) -> np.ndarray:
        """Float64 numbers inside (0, 1) of a row at a step.

        They are made from raw bits, which numpy never changes, unlike the results of `Generator`.
        """
        bits = random_bits(self.seed, f"{self.purpose}/{step}", row).random_raw(count)
        return ((bits >> np.uint64(11)) + 0.5) * 2.0**-53
