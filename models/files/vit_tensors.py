"""Places and shapes of the tensors of vision transformers in files.

A view turns a stored tensor into the matrix or vector that a table of tensors
(`models.files.tensors`) knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from models.files.tensors import Slot, Table

Shape = tuple[int, ...]


class View(NamedTuple):
    """Another shape of the tensors whose names match a pattern.

    Args:
        names: the pattern.
        rank: the number of axes of the tensor in a file.
        shape: the shape of the view, given the shape in the file.
        order: the order of the axes before they are joined; (): unchanged.
    """

    names: str
    rank: int
    shape: Callable[[Shape], Shape]
    order: tuple[int, ...] = ()

    def of(self, x: np.ndarray) -> np.ndarray:
        """The view of a tensor."""
        return x.transpose(self.order or range(x.ndim)).reshape(self.shape(x.shape))

    def undone(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        """The tensor of a file, of that shape, from its view."""
        order = self.order or tuple(range(len(shape)))
        return x.reshape([shape[a] for a in order]).transpose(np.argsort(order))


HF_VIEWS = (
    # Channels of a pixel beside each other, as in an image of ours.
    View(r"projection\.weight$", 4, lambda s: (s[0], math.prod(s[1:])), (0, 2, 3, 1)),
    View(r"cls_token$", 3, lambda s: s[2:]),
    View(r"position_embeddings$", 3, lambda s: s[1:]),
)
NPZ_VIEWS = (
    View(r"^embedding/kernel$", 4, lambda s: (math.prod(s[:3]), s[3])),
    View(r"^cls$", 3, lambda s: s[2:]),
    View(r"pos_embedding$", 3, lambda s: s[1:]),
    View(r"/(query|key|value)/kernel$", 3, lambda s: (s[0], s[1] * s[2])),
    View(r"/(query|key|value)/bias$", 2, lambda s: (s[0] * s[1],)),
    View(r"/out/kernel$", 3, lambda s: (s[0] * s[1], s[2])),
)


def _table(
    outer: Mapping[str, str],
    block: str,
    norms: Mapping[str, str],
    linear: Mapping[str, str],
    words: tuple[str, str, str],
    transpose: bool,
    **more: Any,
) -> Table:
    """The tensors by the names of their modules; `words` join them, a scale and a kernel."""
    dot, scale, kernel = words

    def slots() -> Iterator[Slot]:
        yield Slot("cls/embedding", outer["cls"], "", False)
        yield Slot("positions/embedding", outer["positions"], "", False)
        outside = {name: outer[name] for name in ("patch_embed", "head")}
        inside = {f"layers/{path}": f"{block}{dot}{name}" for path, name in linear.items()}
        for path, name in (outside | inside).items():
            yield Slot(f"{path}/kernel", f"{name}{dot}{kernel}", "", transpose)
            yield Slot(f"{path}/bias", f"{name}{dot}bias", "", False)
        inside = {f"layers/{path}": f"{block}{dot}{name}" for path, name in norms.items()}
        for path, name in ({"final_norm": outer["final_norm"]} | inside).items():
            yield Slot(f"{path}/scale", f"{name}{dot}{scale}", "", False)
            yield Slot(f"{path}/bias", f"{name}{dot}bias", "", False)

    return Table(tuple(slots()), **more)


_EMBEDDINGS = "vit.embeddings"
HF = _table(
    {
        "cls": f"{_EMBEDDINGS}.cls_token",
        "positions": f"{_EMBEDDINGS}.position_embeddings",
        "patch_embed": f"{_EMBEDDINGS}.patch_embeddings.projection",
        "final_norm": "vit.layernorm",
        "head": "classifier",
    },
    "vit.encoder.layer.{}",
    {"attn_norm": "layernorm_before", "mlp_norm": "layernorm_after"},
    {
        "attn/q": "attention.attention.query",
        "attn/k": "attention.attention.key",
        "attn/v": "attention.attention.value",
        "attn/o": "attention.output.dense",
        "mlp/up": "intermediate.dense",
        "mlp/down": "output.dense",
    },
    (".", "weight", "weight"),
    transpose=True,
    optional_prefix="vit.",
    unused=r"^(vit\.)?pooler\.|^classifier\.",
)
ATTENTION = "MultiHeadDotProductAttention_1"
NPZ = _table(
    {
        "cls": "cls",
        "positions": "Transformer/posembed_input/pos_embedding",
        "patch_embed": "embedding",
        "final_norm": "Transformer/encoder_norm",
        "head": "head",
    },
    "Transformer/encoderblock_{}",
    {"attn_norm": "LayerNorm_0", "mlp_norm": "LayerNorm_2"},
    {
        "attn/q": f"{ATTENTION}/query",
        "attn/k": f"{ATTENTION}/key",
        "attn/v": f"{ATTENTION}/value",
        "attn/o": f"{ATTENTION}/out",
        "mlp/up": "MlpBlock_3/Dense_0",
        "mlp/down": "MlpBlock_3/Dense_1",
    },
    ("/", "scale", "kernel"),
    transpose=False,
    # A layer between class token and head that fine-tuning leaves out, as published code does.
    unused=r"^pre_logits/|^head/",
)
