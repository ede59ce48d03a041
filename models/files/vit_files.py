"""Vision transformers in files: Hugging Face folders, and ImageNet-21k's `.npz` checkpoints.

Both hold the same tensors under other names and in other shapes
(`models.files.vit_tensors`). No file is unpickled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import check_spelling, one_line, reading
from models.arrays import host
from models.files import hub
from models.files.export import (
    CARD,
    EXPORTER,
    check_replaceable,
    exporter,
    first_writes,
    replace_folder,
    write_json,
    write_tensors,
)
from models.files.families import positive
from models.files.stored import Stored
from models.files.vit_tensors import ATTENTION, HF, HF_VIEWS, NPZ, NPZ_VIEWS, View
from models.files.weights import DTYPES, INDEX, Shardings, filled, flatten, insert, safetensors_of
from models.text.tokenizer import read_json
from models.vision.vit import ViT, ViTConfig

PREPROCESSOR = "preprocessor_config.json"
WRITTEN = ("config.json", PREPROCESSOR, INDEX, CARD)
# Words for the activation in `config.json`.
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new"}
ACTIVATIONS |= {"relu": "relu"}
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
KEYS = ("model_type", "id2label", "quantization_config", *DEFAULTS)


class LoadedViT(NamedTuple):
    """A vision transformer with its parameters.

    Args:
        config: shape and conventions.
        params: the parameter tree.
        names: the names of the classes.
        note: a sentence about the head if it is not that of the files; empty otherwise.
    """

    config: ViTConfig
    params: Any
    names: tuple[str, ...]
    note: str = ""


def is_vit(source: str | Path) -> bool:
    """Whether a path is that of a vision transformer: a `.npz` file, or a folder that says so."""
    try:
        path = hub.local(str(source))
        if path.suffix == ".npz":
            return True
        return read_json(path / "config.json", "").get("model_type") == "vit"
    except UserError:
        return False


def load(
    source: str | Path,
    names: Sequence[str] | int | None = None,
    *,
    shardings: Shardings | None = None,
) -> LoadedViT:
    """Load a vision transformer from a Hugging Face folder or an ImageNet-21k `.npz` file.

    Args:
        source: a folder with config.json and safetensors, or the file.
        names: the names of the classes to tell apart, or their number. The files' head is kept if
            it has these classes (in their order), or as many where names or files have none; any
            other head is replaced by zeros. None: the classes of the folder.
        shardings: `(path, shape) -> sharding` of every leaf; default: JAX's default device.

    Returns:
        Configuration, float32 parameters and the names of the classes.

    Raises:
        UserError: no such model, files damaged or of an unsupported kind, any tensor missing, of a
            wrong shape or without a place (all of them in one message), or a file of Python
            objects.

    Example:
        >>> load("none.npz")
        Traceback (most recent call last):
        jaxlib_unlearn.errors.UserError: none.npz: no such file; give an ImageNet-21k .npz file, ...
    """
    path = hub.local(str(source))
    if path.suffix == ".npz":
        stored = _npz_stored(path)
        config, known, table = _npz_config(stored, path), None, NPZ
        stored = _viewed(stored, NPZ_VIEWS)
    else:
        raw = read_json(path / "config.json", "a Hugging Face model folder has one")
        stored = _viewed(safetensors_of(path), HF_VIEWS)
        config, known = hf_config(raw, path)
        table = HF
    head = stored.get(table.hf("head/bias"))
    if names is None:
        if head is None or known is None or head.shape != (len(known),):
            raise UserError(
                f"{path}: has no head for classes with names; fine-tune it first (train.classify)"
            )
        names = known
    elif isinstance(names, int):
        as_many = known is not None and len(known) == names
        known = names = known if as_many else tuple(map(str, range(names)))
    assert names is not None
    names = tuple(names)
    config = dataclasses.replace(config, num_classes=len(names))
    shapes = flatten(ViT(config).shapes())
    order = None
    if head is not None and head.shape == (len(names),):
        order = _order(names if known is None else known, names)
    kept, note = order is not None, ""
    if order is None and head is not None:
        note = f"{path}: its head is of other classes; zeros take its place"
    elif order is not None and order != list(range(len(names))):
        note = f"{path}: its head has the classes in another order, and is brought to theirs"
        for name in {table.hf("head/kernel"), table.hf("head/bias")} & stored.keys():
            stored[name] = _in_order(stored[name], order)
    read = {name: shape for name, shape in shapes.items() if kept or not name.startswith("head/")}

    def ignored(name: str) -> bool:
        return re.search(table.unused, name) is not None

    params = filled(
        read, table, stored, "hf", DTYPES["float32"], shardings, str(path), "vit", ignored
    )
    for name in shapes.keys() - read.keys():
        where = None if shardings is None else shardings(name, shapes[name].shape)
        insert(params, name, jnp.zeros(shapes[name].shape, jnp.float32, device=where))
    return LoadedViT(config, params, names, note)


def _order(known: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """The index of each name in `known`; None if the two do not have the same names."""
    if tuple(known) == tuple(names):
        return list(range(len(names)))
    places = {name: i for i, name in enumerate(known)}
    same = len(places) == len(known) == len(names) and places.keys() == set(names)
    return [places[name] for name in names] if same else None


def _in_order(tensor: Stored, order: Sequence[int]) -> Stored:
    """A tensor with its rows in another order."""

    def read(first: int, last: int) -> np.ndarray:
        return tensor.read(0, tensor.shape[0])[np.asarray(order)][first:last]

    return tensor._replace(read=read)


def hf_config(raw: Mapping[str, Any], folder: Path) -> tuple[ViTConfig, tuple[str, ...]]:
    """The configuration of a folder, and the names of its classes."""
    where = f"{folder / 'config.json'}"
    advice = "use the config.json the model was published with"
    if raw.get("model_type") != "vit":
        raise UserError(
            f"{where}: model_type {one_line(repr(raw.get('model_type')), 60)} is no vision "
            "transformer that is read; supported: vit"
        )
    check_spelling(raw, KEYS, where, f"correct it, or {advice}")
    if raw.get("quantization_config"):
        raise UserError(f"{where}: quantization_config is not supported; use unquantised weights")
    raw = {**DEFAULTS, **raw}
    with reading(where, advice, "does not read"):
        sizes = {}
        for name in ("image_size", "patch_size"):
            sides = raw[name] if isinstance(raw[name], list) else [raw[name]]
            if len(set(map(str, sides))) != 1:
                raise UserError(f"{where}: {name} {sides} is no square, which alone is supported")
            sizes[name] = positive({name: sides[0]}, name, int, where)
        activation = raw["hidden_act"]
        if activation not in ACTIVATIONS:
            raise UserError(
                f"{where}: hidden_act {one_line(repr(activation), 60)} is not supported; "
                f"supported: {', '.join(ACTIVATIONS)}"
            )
        if not isinstance(raw["qkv_bias"], bool):
            raise UserError(f"{where}: qkv_bias is neither true nor false; {advice}")
        labels = raw.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # as transformers has it
        names = tuple(str(labels[str(i)]) for i in range(len(labels)))
        channels = positive(raw, "num_channels", int, where)
        mean, std = _normalisation(folder / PREPROCESSOR, channels)
        found = ViTConfig(
            **sizes,
            channels=channels,
            hidden_size=positive(raw, "hidden_size", int, where),
            intermediate_size=positive(raw, "intermediate_size", int, where),
            num_layers=positive(raw, "num_hidden_layers", int, where),
            num_heads=positive(raw, "num_attention_heads", int, where),
            num_classes=len(names),
            norm_eps=positive(raw, "layer_norm_eps", float, where),
            activation=ACTIVATIONS[activation],
            qkv_bias=raw["qkv_bias"],
            mean=mean,
            std=std,
        )
        ViT(found)
    return found, names


def _normalisation(path: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, for pixels from 0 to 1."""
    if not path.is_file():
        return (0.5,) * channels, (0.5,) * channels
    raw = read_json(path, "it says how pixels are normalised")
    with reading(path, "use the one the model was published with", "does not read"):
        scaled = raw.get("do_rescale", True), raw.get("rescale_factor", 1 / 255)
        if scaled[0] is not True or abs(scaled[1] * 255 - 1) > 1e-3:
            raise ValueError("pixels are not scaled to 0 .. 1")
        if raw.get("do_normalize", True) is False:
            return (0.0,) * channels, (1.0,) * channels
        found = []
        for name in ("image_mean", "image_std"):
            values = raw.get(name, 0.5)
            values = values if isinstance(values, list) else [values] * channels
            if len(values) == 3 and channels == 1 and len(set(values)) == 1:
                values = values[:1]
            if len(values) != channels:
                raise ValueError(f"{name} has {len(values)} values for {channels} channel(s)")
            found.append(tuple(float(value) for value in values))
        if min(found[1]) <= 0:
            raise ValueError("image_std is not positive")
        return found[0], found[1]


def _viewed(stored: Mapping[str, Stored], views: Iterable[View]) -> dict[str, Stored]:
    """Tensors in the shapes of the tables; tensors without a view are unchanged."""

    def one(name: str, tensor: Stored) -> Stored:
        view = next((v for v in views if re.search(v.names, name)), None)
        if view is None or len(tensor.shape) != view.rank:
            return tensor

        def read(first: int, last: int) -> np.ndarray:
            return view.of(tensor.read(0, tensor.shape[0]))[first:last]

        return tensor._replace(shape=view.shape(tensor.shape), read=read)

    views = tuple(views)
    return {name: one(name, tensor) for name, tensor in stored.items()}


def _npz_stored(path: Path) -> dict[str, Stored]:
    """The headers of a `.npz` file's arrays.

    Raises:
        UserError: there is no such file, or it is damaged or holds Python objects.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; give an ImageNet-21k .npz file, or a Hugging Face folder"
        )
    found = {}
    with reading(path, "download it again", "cannot be read, truncated or damaged"):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                with archive.open(entry) as file:
                    version = np.lib.format.read_magic(file)
                    header = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = header(file)
                name = entry.removesuffix(".npy")
                if dtype.hasobject:
                    raise UserError(
                        f"{path}: {one_line(name, 60)} holds Python objects, which are never "
                        "unpickled; save the weights as arrays of numbers"
                    )
                kind = {"<f4": "F32", "<f2": "F16"}.get(dtype.str, dtype.name)
                read = functools.partial(_npz_rows, path, name)
                found[name] = Stored(tuple(shape), kind, read, (entry,))
    return found


def _npz_rows(path: Path, name: str, first: int, last: int) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        return archive[name][first:last]


def _npz_config(stored: Mapping[str, Stored], path: Path) -> ViTConfig:
    """The configuration that follows from the shapes of a published checkpoint.

    Norms have an epsilon of 1e-6, and GELU is the approximation by tanh, as in the code that the
    checkpoints were trained with.
    """
    with reading(path, "give an ImageNet-21k .npz file", "is no vision transformer"):
        blocks = {
            int(found[1])
            for name in stored
            if (found := re.match(r"Transformer/encoderblock_(\d+)/", name))
        }
        patch, _, channels, width = stored["embedding/kernel"].shape
        _, positions, _ = stored["Transformer/posembed_input/pos_embedding"].shape
        first = "Transformer/encoderblock_0"
        _, heads, _ = stored[f"{first}/{ATTENTION}/query/kernel"].shape
        side = math.isqrt(positions - 1)
        if side**2 != positions - 1 or blocks != set(range(len(blocks))):
            raise ValueError("its positions are no square, or a block is missing")
        found = ViTConfig(
            image_size=side * patch,
            patch_size=patch,
            channels=channels,
            hidden_size=width,
            intermediate_size=stored[f"{first}/MlpBlock_3/Dense_0/kernel"].shape[1],
            num_layers=len(blocks),
            num_heads=heads,
            num_classes=1,
            norm_eps=1e-6,
            activation="gelu_new",
            mean=(0.5,) * channels,
            std=(0.5,) * channels,
        )
        ViT(found)
    return found


def export(
    loaded: LoadedViT,
    folder: str | Path,
    *,
    dtype: str = "float32",
    card: Callable[[Path], str] | None = None,
) -> Path:
    """Write a vision transformer as a Hugging Face folder that transformers reads.

    Where several processes share the parameters each must call it; the first one writes.

    Args:
        loaded: configuration, parameters (one stack) and names.
        folder: created; an earlier export there is replaced.
        dtype: the dtype of the tensors: float32, bfloat16 or float16.
        card: the text of README.md, given a folder with all other files; None: no such file.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something that is not an earlier export, or an unknown dtype.
    """
    folder = Path(folder).expanduser().absolute()
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} cannot be exported; use one of {', '.join(DTYPES)}")
    config, preprocessor = to_hf(loaded.config, loaded.names)
    config |= {"dtype": dtype, "torch_dtype": dtype, "exporter": EXPORTER}
    tensors = _tensors(loaded, DTYPES[dtype])

    def fill(temporary: Path) -> None:
        write_tensors(tensors, temporary)
        write_json(temporary / "config.json", config)
        write_json(temporary / PREPROCESSOR, preprocessor)
        if card is not None:
            (temporary / CARD).write_text(card(temporary), encoding="utf-8")

    def write() -> None:
        check_replaceable(folder, exporter, WRITTEN)
        replace_folder(folder, fill)

    first_writes(tensors, write)
    return folder


def to_hf(c: ViTConfig, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`config.json` and `preprocessor_config.json`; `load` reads them as the same configuration."""
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "num_channels": c.channels,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "layer_norm_eps": c.norm_eps,
        "hidden_act": c.activation,
        "qkv_bias": c.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": c.image_size, "width": c.image_size},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(c.mean),
        "image_std": list(c.std),
    }
    return config, preprocessor


def _tensors(loaded: LoadedViT, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Name and host array of every tensor, one at a time."""
    c, flat = loaded.config, flatten(loaded.params)
    shapes = {
        "cls/embedding": (1, 1, c.hidden_size),
        "positions/embedding": (1, c.num_tokens, c.hidden_size),
        "patch_embed/kernel": (c.hidden_size, c.channels, c.patch_size, c.patch_size),
    }
    for slot in HF.slots:
        if slot.path not in flat:
            continue
        stack = flat[slot.path]
        for layer in range(stack.shape[0]) if slot.layered else (None,):
            leaf = host(stack if layer is None else stack[layer]).astype(dtype)
            value = leaf.T if slot.transpose else leaf
            if slot.path in shapes:
                view = next(v for v in HF_VIEWS if re.search(v.names, slot.hf))
                value = view.undone(value, shapes[slot.path])
            yield slot.hf.format(layer), np.ascontiguousarray(value)
