"""A model as a Hugging Face folder that transformers, vLLM and llama.cpp's converter read.

Everything is written into a sibling folder that is renamed at the end, so a folder with the
requested name is always complete.
"""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlib_unlearn.errors import UserError
from models.arrays import host as on_host
from models.files.families import FAMILIES, family_of, to_hf
from models.files.tensors import Slot, joined
from models.files.weights import DTYPES, INDEX, Loaded, flatten, shortened
from models.text.tokenizer import Tokenizer

EXPORTER = "jaxlib-unlearn"  # under "exporter" in config.json: the folder is ours to replace
SHARD_BYTES = 5 * 10**9
GENERATION, CARD = "generation_config.json", "README.md"
RESULTS = ".eval_results/jaxlib-unlearn.yaml"  # the Hub reads every YAML file of that folder
WRITTEN = (
    *("config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *(GENERATION, CARD, RESULTS),
)
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_KEYS = (
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout"),
    *("target_modules", "bias", "fan_in_fan_out", "inference_mode"),
)
PATTERNS = ("rank_pattern", "alpha_pattern")  # further keys, where kernels share a tensor


def export(
    loaded: Loaded,
    folder: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    max_new_tokens: int | None = None,
    card: Callable[[Path], str] | None = None,
    results: str | None = None,
) -> Path:
    """Write a model as config.json, generation_config.json, safetensors and tokenizer files.

    Where several processes share the parameters each must call it; the first one writes.

    Args:
        loaded: configuration, parameters (one stack or several) and tokenizer.
        folder: created; an earlier export there is replaced.
        dtype: the dtype of the tensors: float32, bfloat16 or float16; None: the parameters' own.
        shard_bytes: the largest size of a file, unless one tensor is larger.
        max_new_tokens: the default length limit of generation; None: not written.
        card: the text of README.md, given a folder with all other files; None: no such file.
        results: the text of `RESULTS`, the Hub's form of evaluation results; None: no such file.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something that is not an earlier export, or the family or dtype
            cannot be written.
    """
    folder = Path(folder).expanduser().absolute()
    flat = _leaves(loaded.params)
    if dtype is None:
        dtype = str(np.dtype(jax.numpy.result_type(*(leaf for _, leaf in flat))))
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} cannot be exported; use one of {', '.join(DTYPES)}")
    raw = to_hf(loaded.config)
    tensors = _tensors(loaded, DTYPES[dtype])

    def write() -> None:
        generation = _generation(loaded.tokenizer, max_new_tokens)
        _write(
            folder, raw, dtype, loaded.tokenizer, tensors, shard_bytes, generation, results, card
        )

    first_writes(tensors, write)
    return folder


def first_writes(tensors: Iterator[Any], write: Callable[[], None]) -> None:
    """Call `write`, which takes all tensors, on the first process; the others bring their parts."""
    if jax.process_index() != 0:
        collections.deque(tensors, 0)
        return
    try:
        write()
    except BaseException:
        if jax.process_count() > 1:
            collections.deque(tensors, 0)  # the others wait for our part of each
        raise


def _write(
    folder: Path,
    raw: dict[str, Any],
    dtype: str,
    tokenizer: Tokenizer,
    tensors: Iterator[tuple[str, np.ndarray]],
    shard_bytes: int,
    generation: dict[str, Any],
    results: str | None,
    card: Callable[[Path], str] | None,
) -> None:
    """The files, in a sibling folder that takes its place once it is complete."""
    check_replaceable(folder, exporter, WRITTEN)
    raw |= {"dtype": dtype, "torch_dtype": dtype, "exporter": EXPORTER}
    for key in ("bos", "eos", "pad"):
        raw[f"{key}_token_id"] = getattr(tokenizer, f"{key}_id")

    def fill(temporary: Path) -> None:
        write_tensors(tensors, temporary, shard_bytes)
        tokenizer.save(temporary)
        write_json(temporary / "config.json", raw)
        write_json(temporary / GENERATION, generation)
        if results is not None:
            (temporary / RESULTS).parent.mkdir()
            (temporary / RESULTS).write_text(results, encoding="utf-8")
        if card is not None:
            (temporary / CARD).write_text(card(temporary), encoding="utf-8")

    replace_folder(folder, fill)


def _generation(tokenizer: Tokenizer, max_new_tokens: int | None) -> dict[str, Any]:
    """generation_config.json: greedy, as in evaluation, and how an answer ends."""
    values = {f"{key}_token_id": getattr(tokenizer, f"{key}_id") for key in ("bos", "eos", "pad")}
    values |= {"do_sample": False, "max_new_tokens": max_new_tokens}
    return {key: value for key, value in values.items() if value is not None}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value as it lies in a model's folder."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """A folder that is complete or absent: filled under another name, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A short prefix keeps the name below the longest that file systems allow.
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name[:64]}.", dir=folder.parent))
    try:
        fill(temporary)
        # mkdtemp's folders and safetensors' files are private by default.
        umask = os.umask(0)
        os.umask(umask)
        for path in (temporary, *temporary.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        _swap(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def export_adapter(
    adapters: Mapping[str, Any],
    folder: str | Path,
    *,
    rank: int,
    alpha: float,
    base: str,
    family: str = "llama",
    card: str | None = None,
) -> Path:
    r"""Write adapters of `models.decoder.lora` as PEFT writes them.

    The folder holds adapter_config.json and adapter_model.safetensors.

    .. math::
        \mathrm{lora\_A} = A^T\,(r, \mathrm{in}), \qquad
        \mathrm{lora\_B} = B^T\,(\mathrm{out}, r), \qquad
        y = x W + \frac{\alpha}{r}\, (x A)\, B

    Adapters of n kernels that files hold in one tensor (q, k and v of GPT-2) become one of rank
    n r, with their factors beside each other and B block-diagonal.

    Where several processes share the adapters each must call it; the first one writes.

    Args:
        adapters: the trained tree of `lora.init`, one stack or several.
        folder: created; an earlier export of adapters there is replaced.
        rank: r.
        alpha: numerator of the term's scale.
        base: the model that they belong to: a folder or Hub id.
        family: the family of that model.
        card: the text of README.md; None: no such file.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something that is not an earlier export of adapters.

    Paper: Hu et al., arXiv:2106.09685, section 4.1.
    """
    folder = Path(folder).expanduser().absolute()
    slots = {slot.path: slot for slot in FAMILIES[family].table.slots if slot.layered}
    stacks = adapters["layers"]
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, int] = {}
    transposed = True
    index = 0
    for stack in stacks if isinstance(stacks, tuple) else (stacks,):
        flat = flatten(stack, "layers/")
        held: dict[str, list[Slot]] = {}  # layers/attn/q/lora_a/kernel is of layers/attn/q/kernel
        for kernel in dict.fromkeys(path.rsplit("/", 2)[0] for path in flat):
            slot = slots[f"{kernel}/kernel"]
            held.setdefault(slot.hf.removesuffix(".weight"), []).append(slot)
        for hf, parts in held.items():
            modules[_module(hf, slots.values())] = len(parts)
            transposed = parts[0].transpose
            for row, (a, b) in enumerate(_factors(flat, sorted(parts, key=lambda p: p.part))):
                key = f"base_model.model.{hf.format(index + row)}"
                tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(a.T)
                tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(b.T)
        index += len(next(iter(flat.values())))

    def number(value: float) -> float:
        return int(value) if float(value).is_integer() else value

    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": number(alpha),
        "lora_dropout": 0.0,
        "target_modules": list(modules),
        "bias": "none",
        "fan_in_fan_out": not transposed,
        "inference_mode": True,
    }
    several = {name: count for name, count in modules.items() if count > 1}
    if several:
        settings["rank_pattern"] = {name: rank * count for name, count in several.items()}
        settings["alpha_pattern"] = {name: number(alpha * n) for name, n in several.items()}

    def fill(temporary: Path) -> None:
        _save(tensors, temporary / ADAPTER_WEIGHTS)
        write_json(temporary / ADAPTER, settings)
        if card is not None:
            (temporary / CARD).write_text(card, encoding="utf-8")

    if jax.process_index() == 0:
        check_replaceable(folder, _adapter_exporter, (ADAPTER, CARD, RESULTS))
        replace_folder(folder, fill)
    return folder


def _module(hf: str, slots: Iterable[Slot]) -> str:
    """The name that PEFT gives a module: the shortest end of its name that no other module has."""
    short = hf.rsplit(".", 1)[1]
    names = {slot.hf.removesuffix(".weight") for slot in slots}
    alike = [name for name in names if name.rsplit(".", 1)[1] == short]
    return short if len(alike) == 1 else ".".join(hf.rsplit(".", 2)[1:])


def _factors(flat: Mapping[str, Any], slots: list[Slot]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`(A, B)` of one tensor, block by block, with the factors of all kernels that it holds."""
    pairs = [
        [on_host(flat[slot.path.replace("/kernel", f"/{name}/kernel")]) for slot in slots]
        for name in ("lora_a", "lora_b")
    ]
    for lefts, rights in zip(zip(*pairs[0], strict=True), zip(*pairs[1], strict=True), strict=True):
        count, width = slots[0].part[1], rights[0].shape[1]
        if count == 1:
            yield lefts[0], rights[0]
            continue
        wide = [np.zeros((len(right), count * width), right.dtype) for right in rights]
        for slot, right, row in zip(slots, rights, wide, strict=True):
            row[:, slot.part[0] * width : (slot.part[0] + 1) * width] = right
        yield np.concatenate(lefts, 1), np.concatenate(wide, 0)


def exporter(folder: Path) -> Any:
    """The name of the program that wrote the model in a folder: `EXPORTER` for ours."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["exporter"]


def _adapter_exporter(folder: Path) -> Any:
    # PEFT warns about unknown keys, so no marker can be written; PEFT itself writes three times as
    # many keys.
    found = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    return EXPORTER if set(found) - set(PATTERNS) == set(ADAPTER_KEYS) else None


def check_replaceable(
    folder: Path, exporter: Callable[[Path], Any], written: tuple[str, ...]
) -> None:
    """Raise `UserError` for a folder that holds anything but an earlier export.

    Args:
        folder: the folder to replace.
        exporter: the program that wrote the files in it; `EXPORTER`: they are ours.
        written: the names of the files of an export, `FOLDER/NAME` for one in a folder, except
            safetensors.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: a file is in the way of the export; give another folder")
    within = {name.rpartition("/")[0] for name in written}
    names = set()
    for item in folder.iterdir():
        inner = item.iterdir() if item.name in within and item.is_dir() else (item,)
        names |= {path.relative_to(folder).as_posix() for path in inner}
    if not names:
        return
    try:
        ours = exporter(folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = None
    foreign = sorted(
        name
        for name in names
        if name not in written and ("/" in name or not name.endswith(".safetensors"))
    )
    if ours != EXPORTER or foreign:
        what = shortened(foreign or sorted(names))
        raise UserError(
            f"{folder}: holds files that are no earlier export ({what}); give another folder or "
            "empty this one"
        )


def _swap(temporary: Path, folder: Path) -> None:
    """Put the finished folder in place; an earlier one is moved aside, and restored on failure."""
    if not folder.exists():
        temporary.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name[:64]}.old.", dir=folder.parent))
    folder.rename(aside)
    try:
        temporary.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside)


def _leaves(params: Any) -> list[tuple[str, Any]]:
    """All leaves with their paths; each stack of `params["layers"]` contributes its own."""
    stacks = params["layers"] if isinstance(params["layers"], tuple) else (params["layers"],)
    rest = {key: value for key, value in params.items() if key != "layers"}
    flat = list(flatten(rest).items())
    for stack in stacks:
        flat += flatten(stack, "layers/").items()
    return flat


def _tensors(loaded: Loaded, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Name and host array of every tensor, block by block, one at a time."""
    flat = _leaves(loaded.params)
    slots = family_of(loaded.config).table.slots
    extra = sorted({path for path, _ in flat} - {slot.path for slot in slots})
    if extra:
        raise UserError(f"parameters {shortened(extra)} have no name in a Hugging Face folder")

    def host(leaves: list[Any], transpose: bool) -> np.ndarray:
        arrays = [on_host(leaf).astype(dtype) for leaf in leaves]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, -1)
        return np.ascontiguousarray(array.T if transpose else array)

    stacks = loaded.params["layers"]
    stacks = stacks if isinstance(stacks, tuple) else (stacks,)
    outer = dict(flat[: len(flat) - sum(len(flatten(stack)) for stack in stacks)])
    for slot, paths in joined(slots, outer):
        yield slot.hf, host([outer[path] for path in paths], slot.transpose)
    index = 0
    for stack in stacks:
        leaves = flatten(stack, "layers/")
        for row in range(len(next(iter(leaves.values())))):
            for slot, paths in joined(slots, leaves):
                parts = [leaves[path][row] for path in paths]
                yield slot.hf.format(index), host(parts, slot.transpose)
            index += 1
    if index != loaded.config.num_layers:
        raise ValueError(f"{index} blocks of parameters, the config has {loaded.config.num_layers}")


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file; a full disk is an `OSError`, as it is for all other files."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def write_tensors(
    tensors: Iterator[tuple[str, np.ndarray]],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    stem: str = "model",
) -> None:
    """Write safetensors files of at most `shard_bytes` each, with their index if there are more.

    Their names begin with `stem`.
    """
    files: list[Path] = []
    table: dict[str, Path] = {}
    total = 0

    def write(shard: dict[str, np.ndarray]) -> None:
        # The number of shards is part of their names and not known yet.
        path = folder / f"shard-{len(files)}.safetensors"
        _save(shard, path)
        files.append(path)
        table.update(dict.fromkeys(shard, path))

    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            write(shard)
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
        total += array.nbytes
    write(shard)
    if len(files) == 1:
        files[0].rename(folder / f"{stem}.safetensors")
        return
    final = {
        path: f"{stem}-{number:05d}-of-{len(files):05d}.safetensors"
        for number, path in enumerate(files, 1)
    }
    for path, name in final.items():
        path.rename(folder / name)
    weight_map = {name: final[path] for name, path in sorted(table.items())}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
