"""Places of a parameter tree's leaves in files: one table of tensors a family, as data.

A row of a table is a leaf with its names in safetensors and GGUF files, and with the operation on
the stored tensor: none, a transposition, or the choice of a part.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Slot(NamedTuple):
    """A leaf of the parameter tree and its names in files; `{}` stands for the block index.

    Args:
        path: the path of the leaf.
        hf: its name in safetensors files.
        gguf: its name in GGUF files; "": GGUF files of the family are not read.
        transpose: whether the file holds it as `(out, in)`.
        part: `(index, count)` where one tensor holds several leaves of equal shape, one after the
            other along its last axis.
    """

    path: str
    hf: str
    gguf: str
    transpose: bool
    part: tuple[int, int] = (0, 1)

    @property
    def layered(self) -> bool:
        """Whether there is one for each block."""
        return self.path.startswith("layers/")

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor, given that of the leaf (of one block).

        Example:
            >>> Slot("layers/attn/q/kernel", "h.{}.attn.c_attn.weight", "", False, (0, 3)
            ...      ).stored_shape((8, 8))
            (8, 24)
        """
        shape = shape[::-1] if self.transpose else shape
        return (*shape[:-1], shape[-1] * self.part[1])


class Table(NamedTuple):
    """The tensors of a family.

    Args:
        slots: all leaves that its models may have; leaves of one tensor are adjacent.
        optional_prefix: a prefix of names in safetensors files that published files may leave out.
        unused: a pattern of names in files that add nothing to a model.
    """

    slots: tuple[Slot, ...]
    optional_prefix: str = ""
    unused: str = "(?!)"

    def hf(self, path: str) -> str:
        """The name of a leaf in safetensors files.

        Raises:
            KeyError: the family has no such leaf.
        """
        return {slot.path: slot.hf for slot in self.slots}[path]


def joined(slots: Iterable[Slot], paths: Iterable[str]) -> Iterator[tuple[Slot, list[str]]]:
    """Each tensor of some leaves: its first row, and the paths of the leaves that it holds.

    Example:
        >>> rows = [Slot(f"attn/{name}/bias", "c_attn.bias", "", False, (i, 3))
        ...         for i, name in enumerate("qkv")]
        >>> [(slot.hf, held) for slot, held in joined(rows, {row.path for row in rows})]
        [('c_attn.bias', ['attn/q/bias', 'attn/k/bias', 'attn/v/bias'])]
    """
    paths = set(paths)
    present = (slot for slot in slots if slot.path in paths)
    for _, group in itertools.groupby(present, key=lambda slot: slot.hf):
        rows = list(group)
        yield rows[0], [row.path for row in rows]


def _llama() -> Iterator[Slot]:
    yield Slot("embed/embedding", "model.embed_tokens.weight", "token_embd.weight", False)
    yield Slot("final_norm/scale", "model.norm.weight", "output_norm.weight", False)
    yield Slot("lm_head/kernel", "lm_head.weight", "output.weight", True)

    def block(path: str, hf: str, gguf: str, transpose: bool) -> Slot:
        return Slot(f"layers/{path}", f"model.layers.{{}}.{hf}", f"blk.{{}}.{gguf}", transpose)

    yield block("attn_norm/scale", "input_layernorm.weight", "attn_norm.weight", False)
    yield block("mlp_norm/scale", "post_attention_layernorm.weight", "ffn_norm.weight", False)
    for ours, theirs, ggml in (
        ("attn/q", "self_attn.q_proj", "attn_q"),
        ("attn/k", "self_attn.k_proj", "attn_k"),
        ("attn/v", "self_attn.v_proj", "attn_v"),
        ("attn/o", "self_attn.o_proj", "attn_output"),
        ("mlp/gate", "mlp.gate_proj", "ffn_gate"),
        ("mlp/up", "mlp.up_proj", "ffn_up"),
        ("mlp/down", "mlp.down_proj", "ffn_down"),
    ):
        yield block(f"{ours}/kernel", f"{theirs}.weight", f"{ggml}.weight", True)
        yield block(f"{ours}/bias", f"{theirs}.bias", f"{ggml}.bias", False)
    yield block("attn/q_norm/scale", "self_attn.q_norm.weight", "attn_q_norm.weight", False)
    yield block("attn/k_norm/scale", "self_attn.k_norm.weight", "attn_k_norm.weight", False)


def _plain(
    outer: Iterable[tuple[str, str]],
    block: str,
    norms: Iterable[tuple[str, str]],
    linear: Iterable[tuple[str, str, tuple[int, int]]],
    transpose: bool,
) -> Iterator[Slot]:
    """Models with learned positions and layer norm, from the names of their modules in files."""
    for path, name in outer:
        yield Slot(path, name, "", path.startswith("lm_head"))
    for path, name in norms:
        yield Slot(f"{path}/scale", f"{name}.weight", "", False)
        yield Slot(f"{path}/bias", f"{name}.bias", "", False)
    for leaf, flip in (("kernel", transpose), ("bias", False)):
        suffix = {"kernel": "weight", "bias": "bias"}[leaf]
        for path, name, part in linear:
            yield Slot(f"layers/{path}/{leaf}", f"{block}.{name}.{suffix}", "", flip, part)


LLAMA = Table(tuple(_llama()), unused=r"rotary_emb\.inv_freq$|^rope_freqs\.weight$")

# Conv1D: kernels are (in, out) in the file too, with q, k and v side by side in one tensor.
GPT2 = Table(
    tuple(
        _plain(
            (
                ("embed/embedding", "transformer.wte.weight"),
                ("positions/embedding", "transformer.wpe.weight"),
                ("lm_head/kernel", "lm_head.weight"),
            ),
            "transformer.h.{}",
            (
                ("final_norm", "transformer.ln_f"),
                ("layers/attn_norm", "transformer.h.{}.ln_1"),
                ("layers/mlp_norm", "transformer.h.{}.ln_2"),
            ),
            (
                *((f"attn/{name}", "attn.c_attn", (i, 3)) for i, name in enumerate("qkv")),
                ("attn/o", "attn.c_proj", (0, 1)),
                ("mlp/up", "mlp.c_fc", (0, 1)),
                ("mlp/down", "mlp.c_proj", (0, 1)),
            ),
            transpose=False,
        )
    ),
    optional_prefix="transformer.",
    unused=r"^(transformer\.)?h\.\d+\.attn\.(masked_)?bias$",  # the causal mask, in old files
)

OPT = Table(
    tuple(
        _plain(
            (
                ("embed/embedding", "model.decoder.embed_tokens.weight"),
                ("positions/embedding", "model.decoder.embed_positions.weight"),
                ("lm_head/kernel", "lm_head.weight"),
            ),
            "model.decoder.layers.{}",
            (
                ("final_norm", "model.decoder.final_layer_norm"),
                ("layers/attn_norm", "model.decoder.layers.{}.self_attn_layer_norm"),
                ("layers/mlp_norm", "model.decoder.layers.{}.final_layer_norm"),
            ),
            (
                ("attn/q", "self_attn.q_proj", (0, 1)),
                ("attn/k", "self_attn.k_proj", (0, 1)),
                ("attn/v", "self_attn.v_proj", (0, 1)),
                ("attn/o", "self_attn.out_proj", (0, 1)),
                ("mlp/up", "fc1", (0, 1)),
                ("mlp/down", "fc2", (0, 1)),
            ),
            transpose=True,
        )
    ),
    optional_prefix="model.",
)
