"""Stable Diffusion folders as diffusers writes and reads them, in and out.

`unet/`, `vae/`, `text_encoder/` with `config.json` and safetensors, `tokenizer/`, `scheduler/` and
`model_index.json`. The small files and the headers of the tensors show everything that is wrong
with a folder, so errors come before any tensor is read; tensors are then read one at a time, and
each process reads only the rows that its devices need (`models.files.weights`). Nothing is
unpickled.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import exists, one_line
from models.arrays import host
from models.diffusion.schedulers import Schedule
from models.files import clip_tokenizer, hub, scheduler_files
from models.files.clip_tokenizer import LENGTH
from models.files.diffusers_configs import VERSION
from models.files.diffusers_parts import PARTS, Part, swapped, viewed, with_dtype
from models.files.export import (
    CARD,
    EXPORTER,
    check_replaceable,
    first_writes,
    replace_folder,
    write_json,
    write_tensors,
)
from models.files.stored import Stored
from models.files.tensors import Slot
from models.files.weights import (
    DTYPES,
    Shardings,
    filled,
    flatten,
    insert,
    safetensors_of,
    shortened,
    stored_in,
)
from models.text.tokenizer import Tokenizer, read_json

MODEL_INDEX, CONFIG = "model_index.json", "config.json"
SCHEDULER, TOKENIZER, TEXT = "scheduler", "tokenizer", "text_encoder"
PIPELINE = "StableDiffusionPipeline"
VARIANT = "fp16"
HOW = "in diffusers, pipe.save_pretrained(FOLDER) does"
# Sizes that two parts must agree on.
AGREE = (
    (("unet", "cross_attention_dim"), ("text_encoder", "hidden_size")),
    (("unet", "in_channels"), ("vae", "latent_channels")),
    (("unet", "out_channels"), ("vae", "latent_channels")),
)


@dataclass(frozen=True)
class Pipeline:
    """The parts of a Stable Diffusion folder.

    Args:
        configs: configurations by the name of the part, a row of
            `models.files.diffusers_parts.PARTS`.
        params: parameter trees by the name of the part.
        scheduler: the noise schedule and its sampler.
        tokenizer: the text encoder's tokenizer, if there is one.
    """

    configs: Mapping[str, Any]
    params: Mapping[str, Any]
    scheduler: Schedule
    tokenizer: Tokenizer | None = None


def load(
    source: str | Path,
    *,
    dtype: str = "float32",
    parts: Sequence[str] = tuple(PARTS),
    variant: str | None = None,
    shardings: Shardings | None = None,
) -> Pipeline:
    """Load a Stable Diffusion folder.

    Args:
        source: the folder.
        dtype: the dtype of the parameters and of the computation: float32, bfloat16 or float16.
        parts: the names of the parts to load; the others need not be there.
        variant: the kind of weight files: "" for plain ones, or "fp16"; None: plain ones, else
            fp16.
        shardings: `("part/path", shape) -> sharding` of every leaf; default: uncommitted, on JAX's
            default device.

    Returns:
        Configurations, parameters and scheduler.

    Raises:
        UserError: no such folder, a part or file of it is missing, pickled, damaged or of an
            unsupported kind; parts that do not fit each other; any tensor missing, of a wrong shape
            or without a place (all of a part in one message).

    Example:
        >>> load("no-such-folder")
        Traceback (most recent call last):
        jaxlib_unlearn.errors.UserError: no-such-folder: no such folder; give one with ...
    """
    configs = read_configs(source, dtype=dtype, parts=parts)
    folder, rows = _folder(source), {name: PARTS[name] for name in parts}
    scheduler = scheduler_files.from_folder(folder / SCHEDULER)
    tokenizer = _tokenizer(folder, configs[TEXT]) if TEXT in configs else None
    stored = {name: _stored(part, folder / name, variant) for name, part in rows.items()}
    params = {
        name: _filled(
            name, configs[name], stored[name], DTYPES[dtype], shardings, str(folder / name)
        )
        for name in rows
    }
    return Pipeline(configs, params, scheduler, tokenizer)


def read_configs(
    source: str | Path, *, dtype: str = "float32", parts: Sequence[str] = tuple(PARTS)
) -> dict[str, Any]:
    """The configurations of a folder's parts, by name; no tensor of them need be there.

    Args:
        source: the folder.
        dtype: the dtype of the computation: float32, bfloat16 or float16.
        parts: the names of the parts to read.

    Raises:
        UserError: no such folder, a part of it is missing or of an unsupported kind, or parts that
            do not fit each other.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    folder = _folder(source)
    index = read_json(folder / MODEL_INDEX, "a folder of diffusers has one")
    _check_index(index, parts, folder)
    configs = {}
    for name in parts:
        path = folder / name / CONFIG
        raw = read_json(path, "each part has one")
        configs[name] = with_dtype(PARTS[name].read(raw, str(path)), dtype)
    _check_agreement(configs, str(folder))
    return configs


def overlay(
    pipeline: Pipeline,
    source: str | Path,
    part: str = "unet",
    *,
    shardings: Shardings | None = None,
) -> Pipeline:
    """Lay some tensors of a part over those of a pipeline, as erased models are published.

    Args:
        pipeline: the base; it is not changed.
        source: a safetensors file whose tensors have the names of the part's, some of them or all;
            or a folder with such a file as diffusers names it.
        part: the name of the part that they belong to.
        shardings: the shardings of the replaced leaves, as in `load`; default: those they have now.

    Returns:
        A pipeline that shares the leaves that the file does not hold.

    Raises:
        UserError: no such file, a pickled one, or a tensor of a wrong shape or of another model.
    """
    path = hub.local(str(source))
    row, config, base = PARTS[part], pipeline.configs[part], pipeline.params[part]
    if exists(path) and path.is_dir():
        stored = _stored(row, path, None)
    elif path.suffix != ".safetensors":
        raise UserError(
            f"{path}: not a .safetensors file or a folder with one, which alone are read (.bin, "
            ".pt and .ckpt files are pickled); save its tensors with safetensors.torch.save_file"
        )
    elif not path.is_file():
        raise UserError(f"{path}: no such file; give a .safetensors file of a {part}")
    else:
        stored = stored_in(path)
    if not stored:
        raise UserError(f"{path}: holds no tensors; give a .safetensors file of a {part}")
    flat = flatten(base)
    first = next(iter(flat.values()))

    def as_before(path: str, shape: tuple[int, ...]) -> Any:
        return flat[path.removeprefix(f"{part}/")].sharding

    if shardings is None and isinstance(getattr(first, "sharding", None), NamedSharding):
        shardings = as_before
    dtype = np.dtype(first.dtype)
    found = _filled(part, config, stored, dtype, shardings, str(path), partial=True)
    tree: dict[str, Any] = {}
    for name, leaf in (flat | flatten(found)).items():
        insert(tree, name, leaf)
    return replace(pipeline, params={**pipeline.params, part: tree})


def _folder(source: str | Path) -> Path:
    folder = hub.local(str(source))
    if not exists(folder):
        raise UserError(f"{folder}: no such folder; give one with {MODEL_INDEX}")
    if not folder.is_dir():
        raise UserError(
            f"{folder}: a file, not a folder with {MODEL_INDEX}; convert it to one ({HOW})"
        )
    return folder


def _check_index(index: Mapping[str, Any], parts: Sequence[str], folder: Path) -> None:
    """Raise `UserError` for a folder of another pipeline, or one without a part."""
    kind = index.get("_class_name")
    if kind != PIPELINE:
        raise UserError(
            f"{folder / MODEL_INDEX}: _class_name {one_line(repr(kind), 60)} is not supported; "
            f"give a folder of {PIPELINE}"
        )
    for name in parts:
        want = [PARTS[name].library, PARTS[name].kind]
        if index.get(name) != want:
            raise UserError(
                f"{folder / MODEL_INDEX}: {name} is {one_line(repr(index.get(name)), 80)}, and "
                f"{want} alone is read; give a folder of {PIPELINE}"
            )
    wanted = (*parts, SCHEDULER, *[TOKENIZER] * (TEXT in parts))
    missing = [name for name in wanted if not (folder / name).is_dir()]
    if missing:
        raise UserError(f"{folder}: no folder {shortened(missing)} in it; download it again")


def _check_agreement(configs: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` for parts of different models."""
    for pair in AGREE:
        if any(name not in configs for name, _ in pair):
            continue
        (one, key), (other, other_key) = pair
        found = getattr(configs[one], key), getattr(configs[other], other_key)
        if found[0] != found[1]:
            raise UserError(
                f"{where}: {one}/{CONFIG} says {key} {found[0]}, {other}/{CONFIG} {other_key} "
                f"{found[1]}; use the parts of one model"
            )


def _tokenizer(folder: Path, config: Any) -> Tokenizer:
    """The tokenizer, which must not know more tokens than the text encoder."""
    found = clip_tokenizer.from_folder(folder / TOKENIZER)
    if found.largest_id >= config.vocab_size:
        raise UserError(
            f"{folder}: {TOKENIZER} has token id {found.largest_id}, {TEXT}/{CONFIG} says "
            f"vocab_size {config.vocab_size}; use the parts of one model"
        )
    return found


def _stored(part: Part, folder: Path, variant: str | None) -> dict[str, Stored]:
    """The headers of a part's tensors, under the names of its files."""
    if variant is not None:
        return safetensors_of(folder, part.stem, variant)
    half = f"{part.stem}.{VARIANT}.safetensors", f"{part.stem}.safetensors.index.{VARIANT}.json"
    plain = f"{part.stem}.safetensors", f"{part.stem}.safetensors.index.json"
    if not any((folder / name).is_file() for name in plain):
        if any((folder / name).is_file() for name in half):
            return safetensors_of(folder, part.stem, VARIANT)
    return safetensors_of(folder, part.stem)


def _filled(
    name: str,
    config: Any,
    stored: Mapping[str, Stored],
    dtype: np.dtype,
    shardings: Shardings | None,
    where: str,
    partial: bool = False,
) -> dict[str, Any]:
    """The parameter tree of a part; `partial`: the leaves that are there."""
    part = PARTS[name]
    table, shapes = part.table(config), part.shapes(config)
    stored = viewed(part, config, stored)

    def ignored(tensor: str) -> bool:
        return re.search(table.unused, tensor) is not None

    def placed(path: str, shape: tuple[int, ...]) -> Any:
        assert shardings is not None
        return shardings(f"{name}/{path}", shape)

    if partial:
        full = {f"{table.optional_prefix}{tensor}" for tensor in stored} | stored.keys()

        def there(slot: Slot) -> bool:
            layers = range(shapes[slot.path].shape[0]) if slot.layered else (None,)
            return any(slot.hf.format(layer) in full for layer in layers)

        shapes = {slot.path: shapes[slot.path] for slot in table.slots if there(slot)}
    own = None if shardings is None else placed
    return filled(shapes, table, stored, "hf", dtype, own, where, name, ignored)


def export(
    pipeline: Pipeline,
    folder: str | Path,
    *,
    dtype: str = "float32",
    card: Callable[[Path], str] | None = None,
) -> Path:
    """Write a pipeline as a folder that diffusers reads.

    Where several processes share the parameters each must call it; the first one writes.

    Args:
        pipeline: the parts.
        folder: created; an earlier export there is replaced.
        dtype: the dtype of the tensors: float32, bfloat16 or float16.
        card: the text of README.md, given a folder with all other files; None: no such file.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something that is not an earlier export, parts that do not fit
            each other, or an unknown dtype.
    """
    folder = Path(folder).expanduser().absolute()
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} cannot be exported; use one of {', '.join(DTYPES)}")
    _check_agreement(pipeline.configs, str(folder))
    tensors = {
        name: _tensors(PARTS[name], pipeline.configs[name], params, DTYPES[dtype])
        for name, params in pipeline.params.items()
    }

    def fill(temporary: Path) -> None:
        for name, own in tensors.items():
            (temporary / name).mkdir()
            write_tensors(own, temporary / name, stem=PARTS[name].stem)
            more = _special(pipeline.tokenizer) if name == TEXT else {}
            write_json(temporary / name / CONFIG, PARTS[name].write(pipeline.configs[name]) | more)
        (temporary / SCHEDULER).mkdir()
        schedule = scheduler_files.to_hf(pipeline.scheduler)
        write_json(temporary / SCHEDULER / scheduler_files.FILE, schedule)
        if pipeline.tokenizer is not None:
            (temporary / TOKENIZER).mkdir()
            length = pipeline.configs[TEXT].num_positions if TEXT in pipeline.configs else LENGTH
            clip_tokenizer.save(pipeline.tokenizer, temporary / TOKENIZER, length)
        write_json(temporary / MODEL_INDEX, _index(pipeline))
        if card is not None:
            (temporary / CARD).write_text(card(temporary), encoding="utf-8")

    def write() -> None:
        _check_replaceable(folder)
        replace_folder(folder, fill)

    first_writes(itertools.chain.from_iterable(tensors.values()), write)
    return folder


def _special(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Ids of the special tokens: transformers' text encoder finds the end of a text by its id.

    It takes those of CLIP's own vocabulary where they are left out.
    """
    if tokenizer is None:
        return {}
    names = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return names | {"pad_token_id": tokenizer.pad_id}


def _index(pipeline: Pipeline) -> dict[str, Any]:
    """`model_index.json`; keys that begin with an underscore are not read by diffusers."""
    tokenizer = {} if pipeline.tokenizer is None else {TOKENIZER: ["transformers", "CLIPTokenizer"]}
    return {
        "_class_name": PIPELINE,
        "_diffusers_version": VERSION,
        "_exporter": EXPORTER,
        **tokenizer,
        **{name: [PARTS[name].library, PARTS[name].kind] for name in pipeline.configs},
        SCHEDULER: ["diffusers", scheduler_files.to_hf(pipeline.scheduler)["_class_name"]],
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }


def _exporter(folder: Path) -> Any:
    return json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))["_exporter"]


def _check_replaceable(folder: Path) -> None:
    """As `models.files.export.check_replaceable`, in the folders of the parts as well."""
    inside: dict[str, tuple[str, ...]] = {
        SCHEDULER: (scheduler_files.FILE,),
        TOKENIZER: (clip_tokenizer.VOCAB, clip_tokenizer.MERGES, *clip_tokenizer.SPECIAL),
    }
    for name, part in PARTS.items():
        inside[name] = (CONFIG, f"{part.stem}.safetensors.index.json")
    check_replaceable(folder, _exporter, (*inside, MODEL_INDEX, CARD))
    for name, files in inside.items():
        check_replaceable(folder / name, lambda _: EXPORTER, files)


def _tensors(
    part: Part, config: Any, params: Any, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and host array of every tensor, one at a time."""
    flat, slots = flatten(params), part.table(config).slots
    extra = sorted(flat.keys() - {slot.path for slot in slots})
    if extra:
        raise UserError(f"parameters {shortened(extra)} have no name in a folder of diffusers")
    for slot in slots:
        stack = flat[slot.path]
        for layer in range(stack.shape[0]) if slot.layered else (None,):
            leaf = host(stack if layer is None else stack[layer]).astype(dtype)
            value = leaf.T if slot.transpose else leaf
            value = swapped(value) if value.ndim == 4 else value
            yield slot.hf.format(layer), np.ascontiguousarray(value)
