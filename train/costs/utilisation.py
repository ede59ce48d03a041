"""The share of an accelerator's peak that a training step uses."""

from __future__ import annotations

import math
from typing import Any

from models.decoder.model import Decoder
from train.costs.topology import GPUS, TPUS, Chip

# JAX's names of the chips (`device_kind`).
TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def chip_of(kind: str) -> Chip | None:
    """The chip of a `device_kind`; None: not known.

    Example:
        >>> chip_of("NVIDIA H100 80GB HBM3").name, chip_of("TPU v5 lite").name, chip_of("cpu")
        ('H100', 'v5e', None)
    """
    if kind in TPU_KINDS:
        return TPUS[TPU_KINDS[kind]]
    return next((chip for name, chip in GPUS.items() if name in kind), None)


def flops_per_token(decoder: Decoder, context: int) -> int:
    r"""Operations of the model's own products, forward and backward, for one trained token.

    .. math::
        6 N + 12 \, L \, h \, T

    with N the elements of all kernels and of the output's table, L blocks, h the width of all
    heads and T the context; recomputation and the optimizer are not counted.

    Args:
        decoder: the model.
        context: the number of tokens of a row.

    Example:
        >>> from models import DecoderConfig
        >>> flops_per_token(Decoder(DecoderConfig(16, 8, 16, 2, 2, 2, 4)), 4)
        9216

    References:
        Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B.
    """
    import jax

    c = decoder.config
    kernels = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(decoder.shapes()["layers"])
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("kernel")
    ]
    size = sum(math.prod(leaf.shape) for leaf in kernels) + c.vocab_size * c.hidden_size
    return 6 * size + 12 * c.num_layers * c.num_heads * c.head_dim * context


def utilisation(
    decoder: Decoder, context: int, tokens_per_second: float | None, mesh: Any
) -> float | None:
    """Model FLOP utilisation: the share of the mesh's bfloat16 peak at `tokens_per_second`.

    It is None if the speed or the chip is not known.
    """
    device = mesh.devices.flat[0]
    chip = chip_of(device.device_kind)
    if tokens_per_second is None or chip is None or chip.flops is None:
        return None
    peak = chip.flops / chip.devices * mesh.size
    return tokens_per_second * flops_per_token(decoder, context) / peak
