"""Damaged and hostile files of every class: refused in one line, or read as they were.

`ROWS` is the table; a class of files is a row. `make test` tries a few thousand cases with one
seed, `pytest -m slow tests/fuzz` an hour of others (FUZZ_SECONDS, FUZZ_SEED, FUZZ_ROWS). A case
that fails is printed with its seed and its bytes are kept in pytest's temporary folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import struct
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

import models
from jaxlib_unlearn.metrics import tofu as metrics
from models.decoder.model import Decoder, DecoderConfig
from models.files.weights import flatten
from train.data import tofu
from train.options import config_files
from train.options.config import RunConfig, to_json


def load(name: str):
    """A file beside this one as a module; `tests` is not a package."""
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", Path(__file__).with_name(name))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


damage = load("damage.py")
Row, NOISE = damage.Row, damage.NOISE

CONFIG = DecoderConfig(
    vocab_size=40, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=16, max_position_embeddings=64,
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "w1 w2"}]


def random_params(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = Decoder(CONFIG).shapes()
    return jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(size=x.shape), dtype), shapes)


def word_tokenizer() -> models.Tokenizer:
    vocab = {f"w{i}": i for i in range(39)} | {"<eos>": 39}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<eos>"])
    return models.Tokenizer(backend, TEMPLATE, eos_id=39)


def digest(value) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()


def of_tokenizer(tokenizer: models.Tokenizer):
    """The behaviour of a tokenizer, as far as a run uses it."""
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    text = tokenizer.chat(MESSAGES, True) if tokenizer.has_chat_template else None
    said = tokenizer.encode("w1 w2 <eos> w39") + tokenizer.encode(text or "")
    vocabulary = digest(sorted(tokenizer.backend.get_vocab().items()))
    return ids, text, said, tokenizer.decode(said), vocabulary


def of_model(source: Path):
    loaded = models.load(source)
    leaves = {k: np.asarray(v).tobytes() for k, v in flatten(loaded.params).items()}
    return dataclasses.astuple(loaded.config), digest(leaves), of_tokenizer(loaded.tokenizer)


# Models in folders.


def model_folder(name: str, **options):
    """Export a model and name the file in it that gets damaged."""

    def make(folder: Path) -> Path:
        params = options.get("params", random_params)()
        config = dataclasses.replace(CONFIG, dtype=str(jax.tree.leaves(params)[0].dtype))
        out = models.export(
            models.Loaded(config, params, word_tokenizer()), folder / "model",
            **({"shard_bytes": options["shard_bytes"]} if "shard_bytes" in options else {}),
        )  # fmt: skip
        return out / name

    return make


def folder_of(path: Path):
    return of_model(path.parent)


def on_header(change):
    """Damage to the header of a safetensors file; the tensor data stays."""

    def mutate(data, random):
        size = int.from_bytes(data[:8], "little")
        text = change(json.loads(data[8 : 8 + size]), random)
        text = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return mutate


def entry(change):
    """Damage to the entry of one tensor."""

    def mutate(header, random):
        name = random.choice([key for key in header if key != "__metadata__"])
        change(header, name, random)
        return json.dumps(header)

    return on_header(mutate)


def shift(header, name, random):
    by = random.choice((-4, 4, 128, 10**9, 2**63, -(10**6)))
    header[name]["data_offsets"] = [n + by for n in header[name]["data_offsets"]]


def overlap(header, name, random):
    others = [key for key in header if key not in (name, "__metadata__")]
    header[name] = dict(header[random.choice(others)])


def reshape(header, name, random):
    shape = header[name]["shape"]
    odd = ([*shape, 1], shape[1:], [s * 2 for s in shape], [-1, *shape], [2**62, 2**62], [0])
    header[name]["shape"] = random.choice([o for o in odd if o != shape])


def retype(header, name, random):
    kinds = ("F64", "I32", "F16", "BF16", "BOOL", "F8_E4M3", "", 5, None, ["F32"])
    header[name]["dtype"] = random.choice([k for k in kinds if k != header[name]["dtype"]])


def drop(header, name, random):
    del header[name]


def length(data, random):
    """A wrong length of the header."""
    size = random.choice((0, 1, 2**63, 2**64 - 1, len(data), 10**8, random.randrange(2**32)))
    return size.to_bytes(8, "little") + data[8:]


def not_a_number(data, random):
    """A weight that is NaN or infinite."""
    size = int.from_bytes(data[:8], "little")
    bad = random.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff"))
    at = 8 + size + 4 * random.randrange((len(data) - 8 - size) // 4)
    return data[:at] + bad + data[at + 4 :]


def longer(data, random):
    return data + random.randbytes(random.choice((1, 8, 4096)))


SAFETENSORS = {
    "cut": damage.cut, "longer": longer, "length": length, "nan": not_a_number,
    "shift": entry(shift), "overlap": entry(overlap), "reshape": entry(reshape),
    "retype": entry(retype), "drop": entry(drop),
    **{f"header {k}": on_header(lambda h, r, f=f: f(json.dumps(h).encode(), r))
       for k, f in damage.json_faults("minus").items()},
}  # fmt: skip


def one_half_float(data, random):
    """One tensor of a bfloat16 model declared as float16, of the same size."""
    return entry(lambda h, name, r: h[name].update(dtype="F16"))(data, random)


def elsewhere(tree, random):
    name = random.choice(list(tree["weight_map"]))
    tree["weight_map"][name] = random.choice((
        "../model-00001-of-00002.safetensors", "/etc/passwd", "/dev/zero", "..", "", "a" * 5000,
        "sub/x.safetensors", "config.json", "nul\0.safetensors", "~/x.safetensors", 7, None,
    ))  # fmt: skip
    return tree


def config_key(tree, random):
    """A size that no model has, or no value at all."""
    name = random.choice([k for k, v in tree.items() if type(v) in (int, float)])
    tree[name] = random.choice((0, -1, 2**31, 10**12, 10**39, 0.0, -0.5, "32", [1], {}))
    return tree


def lost_key(tree, random):
    needed = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    del tree[random.choice(needed)]
    return tree


# Tokenizers.


def odd_special(tree, random):
    tree["eos_token"] = random.choice((5, ["<eos>"], {}, {"content": 3}, "<no such>", True))
    return tree


def odd_template(tree, random):
    tree["chat_template"] = random.choice((
        5, True, {}, [1], [{"name": "rag", "template": "x"}], [{"name": "default"}],
        [{"name": "default", "template": 7}], "{{ ", "{% for %}", "{% if %}",
    ))  # fmt: skip
    return tree


def inside_configuration(folder: Path) -> Path:
    """The chat template in tokenizer_config.json, as older models have it."""
    path = model_folder("tokenizer_config.json")(folder)
    (path.parent / "chat_template.jinja").unlink()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return path


def of_folder_tokenizer(path: Path):
    return of_tokenizer(models.Tokenizer.from_folder(path.parent))


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = [
    LOOPS, "{% set r = range(99999)|list %}{% for a in r %}{% for b in r %}" + LOOPS[-24:],
    "{{ 10 ** (10 ** 8) }}", "{{ 'a' * 10 ** 10 }}", "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}", "{{ 'a'|center(10 ** 10) }}", "{{ lipsum(10 ** 6) }}",
    "{% set n = namespace(x='ab') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=3) %}{% for i in range(64) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ " + "(" * 9999 + ")" * 9999 + " }}",
    "{% for a in messages %}" * 60 + "{% endfor %}" * 60, "{{ messages.append(1) }}",
    "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception('x\n' * 99999) }}", "{{ 1 / 0 }}", "{{ {}['a'].b }}", "{% include 'x' %}",
    "{{ messages[0].content.encode().decode('utf-7').x.y }}", "{{ messages|tojson(indent=10**9) }}",
    "{% extends '/etc/passwd' %}", "{{ cycler.__init__.__globals__ }}", "\x00{{", "{{ '\\ud800' }}",
]  # fmt: skip


def hostile(data, random):
    return random.choice(HOSTILE).encode("utf-8", "surrogatepass")


def control(data, random):
    at = random.randrange(len(data) + 1)
    return data[:at] + random.choice((b"\0", b"\x07", b"\x1b", b"\x7f", b"\xc2\x85")) + data[at:]


def unprinted(data, random):
    """The user's message is gone, or has lost a letter of its name."""
    return data.replace(b"content", random.choice((b"conten", b"kontent", b"contents", b"role")))


# GGUF.


def gguf_file(folder: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    path = folder / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "context_length": 64, "embedding_length": 32, "feed_forward_length": 32, "block_count": 2,
        "attention.head_count": 2, "attention.head_count_kv": 1, "vocab_size": 40,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([chr(33 + i) for i in range(38)] + ["#$", "<eos>"])
    writer.add_token_types([1] * 39 + [3])
    writer.add_token_merges(["# $"])
    writer.add_eos_token_id(39)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    quant = gguf.GGMLQuantizationType.Q8_0
    shapes = {"attn_k": (16, 32), "attn_v": (16, 32)}
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors = {"token_embd": (40, 32)}
    for i in range(2):
        tensors |= {f"blk.{i}.{name}": shapes.get(name, (32, 32)) for name in names}
    for name, shape in tensors.items():
        matrix = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), quant)
        writer.add_tensor(f"{name}.weight", matrix, raw_dtype=quant)
    for name in ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(2) for n in ("attn", "ffn"))]:
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def set_number(data: bytes, at: int, form: str, value: int) -> bytes:
    patch = struct.pack(form, value)
    return data[:at] + patch + data[at + len(patch) :]


def counts(data, random):
    value = random.choice((0, 1, 10**6, 2**32, 2**62, 2**64 - 1))
    return set_number(data, random.choice((8, 16)), "<Q", value)


def version(data, random):
    return set_number(data, 4, "<I", random.choice((0, 1, 4, 3 << 24, 2**32 - 1)))


def in_gguf(change):
    """Damage at a position that the `gguf` package's reader finds in the sound file."""

    def mutate(data, random):
        return change(data, places(data), random)

    return mutate


@functools.cache
def places(data: bytes):
    import gguf

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        return gguf.GGUFReader(file.name)


def tensor_offset(data, reader, random):
    field = random.choice(reader.tensors).field
    at = field.offset + sum(part.nbytes for part in field.parts[:-1])
    old = int(field.parts[-1][0])
    new = random.choice((old + 32, old - 32, old + 1, 0, 10**9, 2**63, 2**64 - 32))
    return set_number(data, at, "<Q", new % 2**64)


def tensor_shape(data, reader, random):
    field = random.choice(reader.tensors).field
    at = field.offset + sum(part.nbytes for part in field.parts[:3])
    old = int(field.parts[3][0])
    return set_number(data, at, "<Q", random.choice((0, old * 2, old // 2, 2**62, 33)))


def tensor_kind(data, reader, random):
    field = random.choice(reader.tensors).field
    at = field.offset + sum(part.nbytes for part in field.parts[:4])
    return set_number(data, at, "<I", random.choice((2, 3, 4, 24, 30, 99, 2**31)))


def text_length(data, reader, random):
    names = [name for name in reader.fields if not name.startswith("GGUF.")]
    field = reader.fields[random.choice(names)]
    return set_number(data, field.offset, "<Q", random.choice((2**20, 2**40, 2**63, 2**64 - 1)))


def key(data, reader, random):
    """A key with another letter; every key of the sample is read."""
    names = [name for name in reader.fields if not name.startswith("GGUF.")]
    field = reader.fields[random.choice(names)]
    at = field.offset + 8 + random.randrange(field.parts[1].nbytes)
    return (
        data[:at]
        + bytes([random.choice([c for c in b"aqxyz_A" if c != data[at]])])
        + data[at + 1 :]
    )


def value_kind(data, reader, random):
    names = [n for n in reader.fields if n.startswith("llama.") and "epsilon" not in n]
    field = reader.fields[random.choice(names)]
    at = field.offset + sum(part.nbytes for part in field.parts[:2])
    return set_number(data, at, "<I", random.choice((6, 7, 8, 9, 10, 12, 13, 2**31)))


def value_size(data, reader, random):
    needed = ("block_count", "head_count", "embedding_length", "feed_forward_length", "vocab_size")
    names = [n for n in reader.fields if n.endswith(needed)]
    field = reader.fields[random.choice(names)]
    at = field.offset + sum(part.nbytes for part in field.parts[:3])
    return set_number(data, at, "<I", random.choice((0, 1, 3, 10**6, 2**31, 2**32 - 1)))


def list_length(data, reader, random):
    name = random.choice(("tokens", "merges", "token_type"))
    field = reader.fields[f"tokenizer.ggml.{name}"]
    at = field.offset + sum(part.nbytes for part in field.parts[:4])
    old = int(field.parts[4][0])
    return set_number(data, at, "<Q", random.choice((0, old + 1, 10**6, 2**40, 2**64 - 1)))


def scale(data, reader, random):
    """A scale of a Q8_0 block, or a norm's weight, that is not a number."""
    tensor = random.choice(reader.tensors)
    if tensor.tensor_type.name == "F32":
        at = tensor.data_offset + 4 * random.randrange(32)
        return data[:at] + b"\0\0\xc0\x7f" + data[at + 4 :]
    at = tensor.data_offset + 34 * random.randrange(tensor.n_bytes // 34)
    return data[:at] + random.choice((b"\0\x7e", b"\0\x7c")) + data[at + 2 :]


GGUF = {
    "cut": damage.cut, "longer": longer, "counts": counts, "version": version,
    **{f.__name__: in_gguf(f) for f in (
        tensor_offset, tensor_shape, tensor_kind, text_length, key, value_kind, value_size,
        list_length, scale,
    )},
}  # fmt: skip


# Data and logs.


def data_file(form: str):
    def make(folder: Path) -> Path:
        rows = [
            {"question": f"Who is {i}?", "answer": f"It is {i}.", "paraphrased_answer": f"So {i}.",
             "perturbed_answer": [f"no {i}", "not so"], "paraphrased_question": f"And {i}?"}
            for i in range(6)
        ]  # fmt: skip
        path = folder / "rows.json"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(lines if form == "lines" else json.dumps(rows, indent=1))
        return path

    return make


def of_rows(path: Path):
    columns = (*tofu.JUDGED, "paraphrased_question")
    return tofu.read_split(tofu.folder_source(path.parent), str(path), columns)


def cut_line(data, random):
    return data[: random.randrange(1, len(data))]


# Any text is valid; a negative number is not.
ROWS_FAULTS = damage.json_faults("text", "cut", "empty")
LINES = {name: damage.by_line(fault) for name, fault in ROWS_FAULTS.items()}


def retain_log(folder: Path) -> Path:
    rng = np.random.default_rng(0)

    def table(keys, shape=()):
        items = {str(i): {k: rng.uniform(0.1, 0.9, shape).tolist() for k in keys} for i in range(5)}
        return {"agg_value": 0.5, "value_by_index": items}

    log = {}
    for prefix in ("forget", "retain", "ra", "wf"):
        log[f"{prefix}_Q_A_Prob"] = table(("prob", "avg_loss"))
        log[f"{prefix}_Q_A_PARA_Prob"] = table(("prob", "avg_loss"))
        log[f"{prefix}_Q_A_PERT_Prob"] = table(("prob", "avg_loss"), 3)
        log[f"{prefix}_Q_A_ROUGE"] = table(("rougeL_recall",))
    log["extraction_strength"] = table(("score",))
    log["mia_min_k"] = {
        "forget": table(("score",)), "holdout": table(("score",)), "auc": 0.6, "agg_value": 0.6,
    }  # fmt: skip
    path = folder / "EVAL.json"
    path.write_text(json.dumps(log))
    return path


def of_log(path: Path):
    log = metrics.load_log(path)
    values = {name: value.tolist() for name, value in log.items.items()}
    return values, log.auc, metrics.summarize(log)


def negative(tree, random):
    """A probability, loss or score below zero; those of attacks may be negative."""
    name = random.choice([key for key in tree if not key.startswith("mia_")])
    item = random.choice(list(tree[name]["value_by_index"].values()))
    item[random.choice(list(item))] = -0.5
    return tree


def tofu_log(folder: Path) -> Path:
    rng = np.random.default_rng(1)

    def column(shape=()):
        return {str(i): rng.uniform(0.1, 3.0, shape).tolist() for i in range(5)}

    def block():
        return {
            "avg_gt_loss": column(), "average_perturb_loss": column(3),
            "avg_paraphrased_loss": column(), "rougeL_recall": {str(i): 0.5 for i in range(5)},
        }  # fmt: skip

    names = ("eval_log_forget", "eval_log", "eval_real_author_wo_options",
             "eval_real_world_wo_options")  # fmt: skip
    path = folder / "eval_log_aggregated.json"
    path.write_text(json.dumps({f"{name}.json": block() for name in names}))
    return path


def run_configuration(folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(to_json(RunConfig(preset="quickstart", output=Path("runs/x")))))
    return path


def of_configuration(path: Path):
    return config_files.read_config(RunConfig, path)


ANYWHERE = ("cut", "binary", "empty", "twice", "misspell", "digits", "deep")
WHOLE_JSON = {name: fault for name, fault in damage.json_faults().items() if name in ANYWHERE}
PAYLOAD = "values of weights that stay finite numbers, and tensors of one shape that change places"
VOCABULARY = "other words, merges and rules of tokenizer.json"
VALUES = "one legal value or text in place of another, a whole row or key that is lost"

ROWS = [
    Row("safetensors", model_folder("model.safetensors"), folder_of, SAFETENSORS, NOISE, PAYLOAD,
        240),
    Row("safetensors in bfloat16", model_folder("model.safetensors",
        params=lambda: random_params("bfloat16")), folder_of, {"half": one_half_float}, NOISE,
        PAYLOAD, 60),
    Row("shard index", model_folder("model.safetensors.index.json", shard_bytes=8000), folder_of,
        {"elsewhere": damage.on_json(elsewhere), **damage.json_faults()}, NOISE, VALUES, 200),
    Row("config", model_folder("config.json"), folder_of,
        {"size": damage.on_json(config_key), "lost": damage.on_json(lost_key),
         **damage.json_faults()}, NOISE, VALUES, 400),
    Row("tokenizer", model_folder("tokenizer.json"), of_folder_tokenizer,
        {"cut": damage.cut, "binary": damage.binary, "empty": damage.empty}, NOISE | {
            k: v for k, v in damage.json_faults().items() if k not in ("cut", "binary", "empty")},
        VOCABULARY, 300),
    Row("tokenizer configuration", inside_configuration, of_folder_tokenizer,
        {"special": damage.on_json(odd_special), "template": damage.on_json(odd_template),
         **damage.json_faults("text")}, NOISE, VALUES, 250),
    Row("chat template", model_folder("chat_template.jinja"), of_folder_tokenizer,
        {"binary": damage.binary, "control": control, "unprinted": unprinted},
        {**NOISE, "hostile": hostile}, "what the template prints beside the user's message", 50),
    Row("gguf", gguf_file, of_model, GGUF, NOISE, f"{PAYLOAD}; {VOCABULARY}", 280),
    Row("data in lines", data_file("lines"), of_rows,
        {**LINES, "cut": damage.by_line(cut_line), "empty": damage.empty}, NOISE, VALUES, 400),
    Row("data in a list", data_file("list"), of_rows,
        {**ROWS_FAULTS, "cut": damage.cut, "empty": damage.empty}, NOISE, VALUES, 400),
    Row("retain log", retain_log, of_log,
        {"negative": damage.on_json(negative), **damage.json_faults("object", "minus")},
        NOISE, VALUES, 400),
    Row("retain log of TOFU", tofu_log, of_log, damage.json_faults("object"), NOISE, VALUES, 400),
    Row("own configuration", run_configuration, of_configuration, WHOLE_JSON, NOISE, VALUES, 300),
    *load("run_folder.py").rows(damage),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_damaged_files(row, tmp_path):
    (tmp_path / "file").mkdir()
    tally, failures = damage.fuzz(row, tmp_path / "file", "0", row.cases)
    assert not failures, "\n".join(map(str, failures))
    assert sum(tally.values()) == row.cases and tally["refused"] > row.cases / 5, tally


@pytest.mark.slow
def test_an_hour_of_damaged_files(tmp_path, capsys):
    seconds = float(os.environ.get("FUZZ_SECONDS", 3600))
    seed = os.environ.get("FUZZ_SEED") or str(time.time_ns())
    rows = [row for row in ROWS if os.environ.get("FUZZ_ROWS", "") in row.name]
    failures = []
    for number, row in enumerate(rows):
        folder = tmp_path / str(number)
        folder.mkdir()
        tally, found = damage.fuzz(row, folder, seed, seconds=seconds / len(rows))
        failures += found
        with capsys.disabled():
            kinds = [f"{tally[kind]:6} {kind}" for kind in ("refused", "same", "changed")]
            total = sum(tally.values()) - tally["untouched"]
            print(f"{row.name:25} {total:7} mutations {' '.join(kinds)} {len(found):3} failures; "
                  f"blind: {row.blind}")  # fmt: skip
    assert not failures, f"FUZZ_SEED={seed}\n" + "\n".join(map(str, failures[:50]))
