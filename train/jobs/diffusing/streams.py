"""Streams of images for an autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train.data.images import Pictures


@dataclass(frozen=True)
class Scaled(Pictures):
    """The same as `Pictures`, with values from -1 to 1 in place of pixels."""

    def identity(self) -> str:
        """The identity of the images."""
        return f"scaled {super().identity()}"

    def batch(
        self, rows: np.ndarray, shape: tuple[int, ...] = (), step: int = 0
    ) -> dict[str, np.ndarray]:
        """`image` float32 `(B, H, W, C)`, `gold` and `row_id` int32 `(B,)`."""
        found = super().batch(rows, shape, step)
        return {**found, "image": found["image"].astype(np.float32) / np.float32(127.5) - 1}
