"""The benchmarks write their tables."""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
import table
import table_of_concepts
import table_of_programs
import table_of_rates
import table_of_runs
import tables
import tokenizers

import models
from models.decoder.model import Decoder, DecoderConfig
from train.options.config import replace


def load(repo, name):
    """A benchmark as a module; `tests` is not a package."""
    spec = importlib.util.spec_from_file_location(
        f"bench_{name}", repo / "tests" / "bench" / f"{name}.py"
    )
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    return bench


def test_bench_writes_its_table(repo, tmp_path, capsys, monkeypatch):
    """The benchmark on a tiny tree: the contents of its table, not the timings."""
    bench = load(repo, "optimizers")
    few = ("muon", "optax.contrib.muon", "sophia", "optax.adamw")  # the others take long to compile
    monkeypatch.setattr(bench, "CONTENDERS", {n: bench.CONTENDERS[n] for n in few})
    bench.main(["--tree", "tiny", "--repeats", "1", "--output", str(tmp_path), "--no-torch"])
    told = json.loads((tmp_path / "optimizers.json").read_text())
    assert set(told) == {"device", "rows"}
    works = [row["work"] for row in told["rows"]]
    assert works == ["tiny: muon, s", "tiny: sophia, s", "tiny: muon, FLOPs"]
    for row in told["rows"]:
        assert set(row) == {"work", "peer", "ours", "theirs", "ratio", "goal"}, row
        assert row["ours"] > 0 and row["theirs"] > 0
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
    table = (tmp_path / "optimizers.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert all(row["work"] in table for row in told["rows"])


@pytest.mark.fused
def test_memory_of_a_step(repo, tmp_path, monkeypatch):
    """On a tiny model: Adam's two moments are counted, and a step without gradients is smaller."""
    bench = load(repo, "memory")
    tiny = DecoderConfig(64, 32, 64, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=16)
    rows = bench.rows
    monkeypatch.setattr(bench, "SMOLLM2", tiny)
    monkeypatch.setattr(bench, "rows", lambda *args: rows(*args, names=("adamw", "mezo")))
    bench.main(["--rows", "2", "--length", "8", "--only", "optimizers", "--output", str(tmp_path)])
    lines = (tmp_path / "memory.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [row[0] for row in cells[2:]] == ["adamw", "mezo"]
    adamw, mezo = (float(row[3]) for row in cells[2:])
    assert adamw > 4 and 1 < mezo < adamw  # parameters, two moments, a gradient; none


@pytest.mark.fused
def test_memory_of_what_saves_it(repo, tmp_path, monkeypatch):
    """On a tiny model: the columns are there, and every option lowers the number it is for."""
    bench = load(repo, "memory")
    tiny = DecoderConfig(64, 32, 64, num_layers=6, num_heads=2, num_kv_heads=1, head_dim=16)
    knobs = (bench.Knobs(), bench.Knobs(remat="full", state_dtype="bfloat16", rank=2))
    table = bench.knob_rows
    monkeypatch.setattr(bench, "SMOLLM2", tiny)
    monkeypatch.setattr(bench, "knob_rows", lambda *args: table(*args, knobs=knobs))
    monkeypatch.setattr(bench, "MIB", 1)
    bench.main(["--rows", "2", "--length", "64", "--only", "knobs", "--output", str(tmp_path)])
    assert not (tmp_path / "memory.md").exists()
    lines = (tmp_path / "memory_knobs.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [row[:4] for row in cells[2:]] == [
        ["adamw", "all", "none", "float32"],
        ["adamw", "LoRA, rank 2", "full", "bfloat16"],
    ]
    plain, saving = ([int(x) for x in row[4:8]] for row in cells[2:])
    assert all(a > 2 * b for a, b in zip(plain, saving, strict=True))
    parameters = bench.bytes_of(bench.Decoder(tiny).shapes())
    assert 2 * parameters <= plain[0] < 2.01 * parameters


@pytest.mark.parametrize(
    ("shape", "only", "count"),
    [
        ("smollm2", "query-batch", 1),
        pytest.param("smollm2", "rowwise", 3, marks=pytest.mark.slow),
        pytest.param("smollm2", "step", 8, marks=pytest.mark.slow),
        ("vit-fashion", "query-batch", 1),
        pytest.param("vit-fashion", "rowwise", 3, marks=pytest.mark.slow),
        pytest.param("vit-fashion", "step", 8, marks=pytest.mark.slow),
    ],
)
def test_zeroth_order_against_forward_passes(
    repo, tmp_path, monkeypatch, capsys, shape, only, count
):
    """On a tiny model: the contents of the table, not the timings."""
    bench = load(repo, "zeroth_order")
    tiny = DecoderConfig(64, 32, 64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)
    monkeypatch.setattr(bench, "SMOLLM2", tiny)
    sizes = "--rows 2 --length 8 --labels 4 --layers 2 --repeats 1".split()
    bench.main(["--shape", shape, *sizes, "--only", only, "--output", str(tmp_path)])
    told = json.loads((tmp_path / "zeroth_order.json").read_text())
    assert set(told) == {"device", "shape", "model", "rows"} and len(told["rows"]) == count
    inputs = {"smollm2": "2 x 8 tokens", "vit-fashion": "2 images of 50 tokens"}
    assert told["model"] == f"2 blocks, {inputs[shape]}" and told["shape"] == shape
    for row in told["rows"]:
        assert row["ours"] > 0 and row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
    table = (tmp_path / "zeroth_order.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert all(row["work"] in table for row in told["rows"])


@pytest.mark.parametrize(
    ("only", "bounds"),
    [
        (("loader",), [20]),
        pytest.param(("muon", "teon"), [1.1, 1.15], marks=pytest.mark.slow),
        pytest.param(("r2mu",), [0.35], marks=pytest.mark.slow),
    ],
)
def test_steps_of_presets(repo, tmp_path, monkeypatch, capsys, only, bounds):
    """On tiny models: the contents of the table, not the timings."""
    bench = load(repo, "steps")
    tiny = bench.pretraining.PRESETS["pretrain-tiny"]
    small = {"data.context": 16, "train.batch_tokens": 64, "model.hidden_size": 32}
    smaller = tiny._replace(PRESET=bench.replace(tiny.PRESET, **small))
    monkeypatch.setitem(bench.pretraining.PRESETS, "pretrain-tiny", smaller)
    config = DecoderConfig(64, 32, 64, num_layers=9, num_heads=2, num_kv_heads=1, head_dim=16)
    monkeypatch.setattr(bench.programs, "decoder_of", lambda _: Decoder(config))
    monkeypatch.setattr(bench, "LENGTH", 8)
    monkeypatch.setattr(bench, "CORPUS", 4096)
    bench.main(["--only", *only, "--repeats", "1", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "steps.json").read_text())
    assert [row["work"].split(":")[0] for row in rows] == list(only)
    assert [row["bound"] for row in rows] == bounds
    for row in rows:
        assert row["ours"] > 0 and row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    text = (tmp_path / "steps.md").read_text()
    assert text in capsys.readouterr().out and all(row["work"] in text for row in rows)


@pytest.mark.slow
def test_packed_rows_save_padding(repo, tmp_path, monkeypatch, capsys):
    """On a tiny model and made-up solutions: the contents of the table, not the timings."""
    bench = load(repo, "packed_rows")
    tiny = DecoderConfig(320, 32, 64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)
    monkeypatch.setattr(bench, "MODEL", tiny)
    rows = [{"question": f"{i}?", "answer": f"{'so ' * i}\n#### {i}"} for i in range(1, 30)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = "--examples 8 --row-tokens 128 --repeats 1".split()
    bench.main([*sizes, "--data", str(tmp_path), "--output", str(tmp_path)])
    told = json.loads((tmp_path / "packed_rows.json").read_text())
    assert 0 < told["padding"] < 0.2 and told["time"] > 0
    assert (tmp_path / "packed_rows.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("only", "bounds"),
    [
        (("attack",), ["<= 0.75"]),
        pytest.param(("train", "sample"), [">= 1", ">= 1.2"], marks=pytest.mark.torch_parity),
    ],
)
def test_diffusion_on_a_tiny_model(repo, tmp_path, monkeypatch, capsys, only, bounds):
    """The contents of the table, not the timings; the benchmark itself compares the results."""
    bench = load(repo, "diffusion")
    if "train" in only:
        for name in bench.PEERS:
            pytest.importorskip(name)
    tiny = bench.fashion.SMOKE
    sizes = {name: value for name, value in tiny.items() if name.split(".")[0] in ("model", "draw")}
    sizes |= {"draw.rows": 2, "original.batch_size": bench.AttackRun().attack.batch_size}
    monkeypatch.setattr(bench.fashion, "PRESET", replace(bench.fashion.PRESET, **sizes))
    monkeypatch.setattr(bench, "SHAPE", (16, 16, 1))
    bench.main(["--only", *only, "--repeats", "1", "--output", str(tmp_path)])
    told = json.loads((tmp_path / "diffusion.json").read_text())
    assert [row["work"].split(":")[0] for row in told["rows"]] == list(only)
    assert [row["bound"] for row in told["rows"]] == bounds
    for row in told["rows"]:
        assert row["ours"] > 0 and row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    text = (tmp_path / "diffusion.md").read_text()
    assert text in capsys.readouterr().out and all(row["work"] in text for row in told["rows"])


def test_diffusion_says_what_is_missing(repo, monkeypatch, tmp_path, capsys):
    bench = load(repo, "diffusion")
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--output", str(tmp_path / "bench")])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.count("\n") == 1
    assert "torch is not installed" in told and "--only attack" in told
    assert not (tmp_path / "bench").exists()


def test_traces_are_condensed(repo, tmp_path, capsys):
    """The contents of the table, not the timings."""
    bench = load(repo, "condense")
    bench.main(["--rows", "2", "--output", str(tmp_path)])
    told = json.loads((tmp_path / "condense.json").read_text())
    assert set(told) == set(bench.cot.MODES) and min(told.values()) > 0
    assert (tmp_path / "condense.md").read_text() in capsys.readouterr().out


@pytest.fixture
def tiny_llama(tmp_path):
    """A folder with a random byte-level Llama of two layers."""
    kinds, pre = tokenizers.models, tokenizers.pre_tokenizers
    alphabet = sorted(pre.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(kinds.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<eos>"])
    eos, pad = backend.token_to_id("<eos>"), backend.token_to_id("<pad>")
    config = DecoderConfig(320, 32, 64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
    # Larger than usual: the model must prefer some tokens for the checks to be meaningful.
    params = jax.tree.map(lambda x: 5 * x, Decoder(config).init(jax.random.key(0)))
    loaded = models.Loaded(config, params, models.Tokenizer(backend, eos_id=eos, pad_id=pad))
    return models.export(loaded, tmp_path / "tiny")


@pytest.fixture
def small_tofu(tmp_path):
    """A folder with TOFU's files, a few rows each, of several lengths."""
    folder = tmp_path / "tofu"
    folder.mkdir()
    for name, count in (("forget10", 16), ("retain90", 24), ("forget10_perturbed", 4)):
        rows: list[dict] = [
            {"question": f"Who wrote {name} {i}?", "answer": f"It was author {'x' * i}."}
            for i in range(count)
        ]
        if name.endswith("perturbed"):
            for i, row in enumerate(rows):
                row["paraphrased_answer"] = f"The author was {'x' * i}."
                row["perturbed_answer"] = [f"It was {n}." for n in ("Ann", "Robert", "nobody")]
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_peers_says_what_is_missing(repo, small_tofu, capsys):
    bench = load(repo, "peers")
    (small_tofu / "retain90.json").unlink()
    for folder, name in ((small_tofu, "retain90.json"), (small_tofu / "none", "forget10.json")):
        with pytest.raises(SystemExit) as stopped:
            bench.main(["--data", str(folder)])
        told = capsys.readouterr().err
        assert stopped.value.code == 2 and told.count("\n") == 1
        assert name in told and "--data" in told


@pytest.mark.torch_parity
def test_peers_on_a_tiny_model(repo, tiny_llama, small_tofu, tmp_path):
    """Every benchmark on both sides; the benchmark itself compares their results."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    command = [sys.executable, repo / "tests" / "bench" / "peers.py", "--repeats", "1"]
    command += ["--model", tiny_llama, "--data", small_tofu, "--output", tmp_path / "bench"]
    env = os.environ | {"PYTHONPATH": str(repo)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "bench" / "peers.json").read_text())
    assert set(told) == {"device", "rows"}
    table = (tmp_path / "bench" / "peers.md").read_text()
    starts = [
        "NPO",
        "NPO",
        "fine",
        "pre-training",
        "64 samples",
        *["likelihood"] * 2,
        "MeZO",
        "ZO-Muon",
        "cold",
    ]
    for row, start in zip(told["rows"], starts, strict=True):
        assert set(row) == {"work", "peer", "ours", "theirs", "ratio", "goal"}, row
        assert row["work"].startswith(start) and row["work"] in table
        assert row["ours"] > 0 and row["theirs"] > 0
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])


def given(run, flag, default=None):
    """The value of an option of a run."""
    return run.argv[run.argv.index(flag) + 1] if flag in run.argv else default


def pretrained(run):
    """A loss that grows with the distance from a rate, with changes and with the seed."""
    centre = {"adamw": 4e-3, "muon": 0.02, "normuon": 0.04, "teon": 0.02}
    name, seed = given(run, "--optimizer.name"), int(given(run, "--seed"))
    rate = float(given(run, "--optimizer.learning-rate"))
    level, changes = list(centre).index(name), run.argv[7:-2]
    off = abs(math.log(rate / centre[name])) + 0.1 * len(changes)
    loss = 3 - 0.1 * level + off + 0.01 * seed * (1 + level)
    told = {"val_perplexity": math.exp(loss), "train_perplexity": 2.0}
    return {"pretrained": told | {"tokens_per_second": 5000.0}}


def classified(run):
    """Numbers that follow from the run: the best rate is the highest but one."""
    name, seed = given(run, "--optimizer.name"), int(given(run, "--seed"))
    forwards = int(given(run, "--train.forwards", 1200))
    off = abs(math.log10(float(given(run, "--optimizer.learning-rate"))) + 4.5)
    level = list(table_of_rates.METHODS).index(name)
    accuracy = 0.6 + 0.01 * level + 0.02 * seed
    flat = {"accuracy": accuracy, "nll": 0.5, "dev_nll": 0.4 + off, "dev_accuracy": 0.7}
    cost = {"forwards": forwards, "steps": forwards // 2, "step_mib": 10.0}
    cost["seconds"] = (3 if name == "mezo" else 1) * forwards / 10
    found = {"base": flat | {"accuracy": 0.5}, "finetuned": flat | cost, "majority_accuracy": 0.52}
    points = [(round(forwards * k / 10), k / 10) for k in range(1, 11)]
    return table_of_rates.Outcome(found, points)


def forgotten(run):
    """Numbers that follow from the seed: R2MU holds its bound on two seeds of three."""
    seed, rmu = int(given(run, "--seed")), run.name.startswith("rmu-seed")
    ours = run.name.startswith("r2mu-seed")
    flat = dict.fromkeys(table_of_runs.COLUMNS, 0.5)
    flat["trace_unsafe"] = 0.8 if rmu else (0.4 if seed else 0.7) if ours else 0.6
    start = dict.fromkeys(table_of_runs.COLUMNS, 1.0) | {"reasoning_accuracy": 0.55}
    if "zerothink" in run.name:  # judges every model without thoughts
        start["trace_unsafe"] = 0.0
    found = {"original": start, "unlearned": flat | {"final_accuracy": 0.25 + 0.01 * seed}}
    return found | ({"oracle": flat} if ours else {})


def condensed(run):
    """Shares of the tokens, seconds and FLOPs of whole traces."""
    seed, whole = int(given(run, "--seed")), given(run, "--condense.tau") == "1"
    share = 1.0 if whole else 0.5 + 0.1 * seed
    return {
        "finetuned": {
            "answer_accuracy": 0.9 - 0.1 * seed,
            "finished": 1.0,
            "answer_nll": 0.25,
            "train_tokens": 1000 * share,
            "train_seconds": None if "head" in run.name else 60 * (1 + seed) * share,
            "train_flops": 7.0 * share**2,
        }
    }


def plan_told(run):
    """A plan of which one is not compiled."""
    step = dict.fromkeys(("argument_bytes", "temp_bytes", "peak_bytes"), 2**30)
    step |= {"flops_per_chip": 3e12, "optimizer_flops_per_chip": 1e12, "compile_seconds": 7.0}
    step |= {"compiled": "sift" not in run.argv, "fits": "sift" not in run.argv}
    step |= {"collectives": {"all-gather": {"bytes": 2**29}}}
    step |= {"roofline_seconds": {"compute": 0.5, "hbm": 0.25}}
    name, topology = given(run, "--optimizer.name"), given(run, "--topology")
    found = {"topology": topology, "optimizer": name, "hbm_bytes_per_chip": 2**34}
    return found | {"programs": {"train": step}}


def concept_told(run):
    """What a run tells: 20 prompts each; a seed makes every rate larger by one prompt."""
    program, name, argv = run.program.removeprefix("train."), run.name, run.argv
    seed = int(name.partition("seed")[2].partition("-")[0])
    rest = name.partition(f"seed{seed}")[2]
    before = 2 if "uce" in name else 4  # prompts that show the concept by its name
    keys = ("concept_rate_explicit", "concept_rate_names", "kept_accuracy", "kept_frechet")
    flat = dict.fromkeys(keys, 0.5) | {"pre_asr": before / 20}
    flat["concept_rate_explicit"] = (before + seed) / 20
    original = flat | {"kept_accuracy": 0.8 + 0.05 * seed, "concept_rate_explicit": 1.0}

    def log(*broken):  # by token: so many prompts more than by name
        numbers = range(100, 120)
        shown = [
            {"number": n, "tokens": [
                {"token": k, "shown": float(before <= i < before + more)}
                for k, more in enumerate(broken)
            ]}
            for i, n in enumerate(numbers)
        ]  # fmt: skip
        alone = [{"number": n, "before": float(i < before)} for i, n in enumerate(numbers)]
        words = [
            {"word": f"word{k}{i}", "token": k, "fits": float(i == k), "coefficient": 0.1}
            for k in range(10)
            for i in range(10)
        ]
        found = {"concept_rate_attacked": shown, "pre_asr": alone, "interpretable_at_10": words}
        return {
            key: {"agg_value": 0.1, "value_by_index": dict(enumerate(items))}
            for key, items in found.items()
        }

    models, logs = {"original": original}, {}
    if program == "erase":
        models["erased"] = flat
    if program == "defend":
        k = int(argv[argv.index("--defend.tokens") + 1])
        models["defended"] = flat
        logs["defended"] = log(*[0] * k, *[4] * (10 - k))
    if program == "attack":
        counts = {"cce": [8], "random": [0] * 5, "words": [3] * 3}.get(rest.rpartition("-")[2])
        models["attacked"] = flat
        logs["attacked"] = log(*(counts or [1, 2, 3, 4, 5 + seed, 6, 7, 8, 9, 14]))
        logs["transferred"] = log(*[15] * 10)
    return table_of_concepts.Told(models, logs)


def controlled(run):
    """The original is known, the oracle is not; seed 1's unlearned model is by one control."""
    if run.program == "train.evaluate":
        return {"model": {"unseen_p": 1e-9 if run.name.endswith("original") else 0.5}}
    flat = {"unseen_p": 0.5, "forget_quality": 0.25}
    unlearned = flat | {"unseen_p": 0.02 if run.name.endswith("1") else 0.5}
    return {"original": flat | {"unseen_p": 1e-9}, "oracle": flat, "unlearned": unlearned}


TELL = {
    "controls": controlled,
    "epic": condensed,
    "r2mu": forgotten,
    "pretrain": pretrained,
    "concept": concept_told,
    "plan": plan_told,
    **dict.fromkeys(table_of_rates.PRESETS, classified),
}


class Filled(NamedTuple):
    """A table over invented runs.

    Args:
        text: its lines.
        runs: the runs that it asked for, in their order.
        curves: the names of the folders whose curves are overlaid.
        options: the options behind `--` that the runs were given.
    """

    text: str
    runs: list
    curves: list
    options: list


@pytest.fixture
def fill(tmp_path, monkeypatch, capsys):
    """A function that fills a table with invented results; no run is made twice."""

    def filled(name, *argv):
        found = Filled("", [], [], [])

        def maker(row, folder, options):
            def make(run):
                found.runs.append(run)
                found.options.extend(row.passed(run, options))
                return TELL[name](run)

            return functools.cache(make)

        def overlay(runs, page):
            assert page.name == "curves.html"
            found.curves.extend(path.name for path in runs)

        monkeypatch.setattr(table, "maker", maker)
        monkeypatch.setattr(table, "overlay", overlay)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        table.main([name, "--output", str(folder), *argv])
        (path,) = folder.rglob("*.md")
        assert path.parent.name.startswith("with-") == ("--" in argv)
        names = [run.name for run in found.runs]
        assert len(set(names)) == len(names) and len(set(found.curves)) == len(found.curves)
        return found._replace(text=capsys.readouterr().out.strip())

    return filled


def cells(text, columns=1):
    """The cells of a table by those of its first columns; the first table wins."""
    lines = [line.strip("| ").split(" | ") for line in reversed(text.splitlines())]
    keys = [tuple(line[:columns]) if columns > 1 else line[0] for line in lines]
    return dict(zip(keys, (line[columns:] for line in lines), strict=True))


@pytest.mark.parametrize("name", TELL)
def test_every_run_of_a_table_is_a_command(fill, tmp_path, monkeypatch, name):
    """Typos in its options would be found after an hour."""
    from train import evaluate
    from train.jobs.diffusing import stored
    from train.planning.planned import PLANNERS
    from train.presets import arguments

    few = ["--concepts", "ankle boot"] if name == "concept" else []
    runs = fill(name, *few, *(["--seeds", "3"] if table.TABLES[name].seeds else [])).runs
    of = {run.name: run.program for run in runs}

    def read_run(folder, option, programs=()):
        program = of[folder.name]
        assert not programs or program in programs, (option, folder)
        config = arguments.READERS[program].config(preset="fashion", smoke=True)
        return stored.Source(folder, program.removeprefix("train."), config, None)

    monkeypatch.setattr(stored, "read_run", read_run)
    found = {}
    for run in runs:
        (tmp_path / run.name).mkdir(parents=True)
        argv = tables.command(run, tmp_path, ())
        if name == "plan":
            row = next(row for row in PLANNERS.values() if argv[0] in row.presets)
            config = row.read(argv[:-2], row.config, "train.plan")
        else:
            if run.program == "train.evaluate":
                config = evaluate.read_arguments(argv)
            else:
                config = arguments.read_arguments(run.program, argv)
            assert config.output == tmp_path / run.name
        for flag, of_config in {
            "--seed": lambda config: config.seed,
            "--optimizer.learning-rate": lambda config: config.optimizer.learning_rate,
            "--train.forwards": lambda config: config.train.forwards,
            "--erase.concept": lambda config: config.erase.concept,
            "--attack.tokens": lambda config: config.attack.tokens,
            "--defend.tokens": lambda config: config.defend.tokens,
        }.items():
            if flag in run.argv:
                assert str(of_config(config)) == given(run, flag), (run, flag)
        if hasattr(config, "output"):
            config = replace(config, output=None)
        found[run.name] = str(config)
    assert len(set(found.values())) == len(found)


def test_the_table_of_pretraining(fill):
    """The best of each grid is compared by seed; nothing is trained twice."""
    text, runs, curves, options = fill("pretrain", "--", "--train.tokens", "4096")
    changes = len(table_of_rates.ABLATIONS) - 1
    assert len(curves) == 4 * 3 + changes
    assert "| normuon | 0.04 **best** (at the end) |" in text
    assert "| muon | 0.02 **best** |" in text
    # Seeds 0, 1 and 2: TEON's loss minus Muon's is -0.2 + 0.02 seed.
    (teon,) = [line for line in text.splitlines() if line.startswith("| teon | 2.7")]
    assert "-0.1800 ± 0.0200" in teon and "2.7400 ± 0.0400" in teon
    assert options == ["--train.tokens", "4096"] * len(runs)
    assert len(runs) == sum(map(len, table_of_rates.GRID.values())) + 4 * 2 + changes
    few = fill("pretrain", "--only", "ablations")
    assert len(few.runs) == len(table_of_rates.GRID["teon"]) + changes
    assert text.endswith(few.text) and set(few.curves) <= set(curves)


def test_the_table_of_controls(fill):
    """Both controls are held to the oracle's verdict, seed by seed."""
    text = fill("controls", "--seeds", "0", "1").text
    assert cells(text.partition("\n\n")[0])["1"] == [
        *("1e-09", "0.5", "0.02"), *("1e-09", "0.5", "0.5"), "0.25",
    ]  # fmt: skip
    assert text.endswith("unseen rows: 1 of 2 seeds, exchanged names: 2 of 2 seeds.")


FEW = ("--only", "adamw", "mezo", "rowwise", "rowwise, minutes of mezo")


def test_the_table_of_classification(fill, monkeypatch):
    """Equal budgets, but for the row that has the minutes of another."""
    found = fill("sst2-tiny", *FEW, "--seeds", "0", "1", "--", "--smoke")
    of = cells(found.text)
    assert set(found.options) == {"--smoke"}
    assert of["before"][:3] == ["0.500", "0.500", "0.500"]
    assert of["mezo"][:3] == ["0.610", "0.630", "0.620"]
    assert of["mezo"][-3:] == ["1,200", "6.0", "10"]
    assert of["rowwise, minutes of mezo"][-3:] == ["3,600", "6.0", "10"]
    assert {given(run, "--train.forwards") for run in found.runs} == {None, "3600"}
    assert sorted(found.curves) == sorted(run.name for run in found.runs)
    assert "| mezo | 0.200 | 0.400 | 0.600 | 0.800 | 1.000 |" in found.text
    assert "0.520" in found.text
    # Minutes that are the same but for what timing is worth: no run of its own.
    monkeypatch.setattr(table_of_rates, "SAME", 2.1)
    again = fill("sst2-tiny", *FEW)
    assert again.text.count("| 1,200 |") == 4
    assert [given(run, "--optimizer.name") for run in again.runs] == ["adamw", "mezo", "rowwise"]
    assert len(again.curves) == 3  # rows of one run show it once
    monkeypatch.setattr(table_of_rates, "SAME", 0.05)
    monkeypatch.setattr(table_of_rates, "TIMED", 500)
    found = fill("sst2-tiny", *FEW)
    timed = [run for run in found.runs if given(run, "--train.forwards") == "500"]
    assert [given(run, "--optimizer.name") for run in timed] == ["rowwise", "mezo"]
    assert all(run.name.startswith("timed/") == (run in timed) for run in found.runs)
    assert "| 3,600 | 6.0 | 10 |" in found.text


def test_rates_are_compared_at_a_budget(fill):
    wide = fill("sst2-tiny", *FEW, "--tune", "400", "--factors", *"0.1 0.3 1 3 10".split())
    assert "minutes of" not in wide.text and "| mezo | 3e-05 **best** |" in wide.text
    assert "| adamw | 3e-05 **best** |" in wide.text
    assert {given(run, "--train.forwards") for run in wide.runs} == {"400"}
    narrow = fill("sst2-tiny", *FEW, "--tune", "400", "--factors", "1", "3")
    assert "| adamw | 3e-05 **best** (at the end) |" in narrow.text
    # At the preset's own budget a rate's run is the table's.
    budget = table_of_rates.PRESETS["sst2-tiny"].PRESET.train.forwards
    whole = fill("sst2-tiny", *FEW, "--tune", str(budget)).runs
    assert len(whole) == 9 and all(given(run, "--train.forwards") is None for run in whole)
    assert set(fill("sst2-tiny", "--only", "adamw", "mezo").runs) <= set(whole)


def test_the_table_of_traces(fill):
    text, runs, _, options = fill("r2mu", "--", "--smoke")
    assert len(runs) == 3 * len(table_of_runs.R2MU) == len(options)
    assert ["--no-oracle" in run.argv for run in runs].count(False) == 3
    of = cells(text)
    assert {"original", "oracle", *table_of_runs.R2MU} <= set(of)
    assert of["original"][1] == "1.00 (1.00 to 1.00)"
    assert of["R2MU"][:2] == ["0.26 (0.25 to 0.27)", "0.40 (0.40 to 0.70)"]
    assert "unsafe traces 0.50 of RMU's" in text and "reasoning accuracy 0.91" in text
    assert "the bound holds" in text
    text = fill("r2mu", "--seeds", "0", "--only", "RMU + ZeroThink", "R2MU").text
    assert "| original | 1.00 | 1.00 |" in text and "bound" not in text


def test_the_bound_of_traces():
    """Each of its three parts alone breaks it; a ratio to 0 does."""

    def verdict(**changes):
        theirs, start = (
            {"final_accuracy": 0.25, "trace_unsafe": 0.5, "reasoning_accuracy": 1.0},
        ) * 2
        ours = theirs | {"trace_unsafe": 0.3} | changes
        return table_of_runs.verdict(
            {"original": [start] * 3, "RMU": [theirs] * 3, "R2MU": [ours, ours, start]}
        )

    assert verdict().holds and verdict().unsafe == 0.6
    assert verdict(final_accuracy=0.3).holds
    assert not verdict(final_accuracy=0.31).holds and not verdict(final_accuracy=0.19).holds
    assert not verdict(trace_unsafe=0.31).holds
    assert verdict(reasoning_accuracy=0.9).holds and not verdict(reasoning_accuracy=0.89).holds
    none = [{"final_accuracy": 0.25, "trace_unsafe": 0.0, "reasoning_accuracy": 0.0}]
    some = [none[0] | {"trace_unsafe": 0.1}]
    assert table_of_runs.verdict({"original": none, "RMU": none, "R2MU": some}).unsafe == math.inf
    assert table_of_runs.verdict({"original": none, "RMU": none, "R2MU": none})[2:] == (
        0.0,
        1.0,
        1.0,
    )
    # Of several strengths those that forget as much.
    more, less = ([none[0] | {"final_accuracy": x}] for x in (0.0, 0.2))
    weak, strong = table_of_runs.STRENGTHS["R2MU"][1], table_of_runs.STRENGTHS["RMU"][1]
    rest = dict.fromkeys(table_of_runs.COLUMNS, 0.0)
    found = {"original": none, "RMU": none, "R2MU": more, weak: less}
    assert table_of_runs.verdict(found)[:2] == (weak, "RMU")
    full = {name: [rest | flat for flat in flats] for name, flats in found.items()}
    assert [line.split(":")[0] for line in table_of_runs.thoughts(full)[-3::2]] == [
        "R2MU against RMU", f"{weak} against RMU",
    ]  # fmt: skip
    assert table_of_runs.verdict(found | {strong: more})[:2] == ("R2MU", strong)


@pytest.mark.slow
def test_r2mu_forgets_the_traces_that_rmu_leaves(tmp_path):
    """On three seeds, a quarter of an hour on one core: it forgets no less and keeps reasoning.

    RESULTS has what the bound says where both forget as much, which is another strength.
    """
    options = "--no-oracle --unlearn.curve-points 0 --evaluate.leak-samples 0".split()
    make = tables.maker(table.TABLES["r2mu"], tmp_path, options)
    found = table_of_runs.collect(make, ("RMU", "R2MU"), table_of_runs.SEEDS)
    told = table_of_runs.compared(found, "R2MU", "RMU")
    assert told.apart <= table_of_runs.APART and told.unsafe <= table_of_runs.UNSAFE, str(told)
    assert told.reasoning >= table_of_runs.REASONING, str(told)


def test_the_table_of_concepts(fill):
    text, runs, _, options = fill("concept", "--", "--smoke")
    # By seed an original; by concept and method an erasure, 4 attacks, 3 defences and an attack on
    # one of these, 2 transfers. What a run takes from others was run before it.
    names = [run.name for run in runs]
    assert len(names) == 3 * (1 + 2 * 3 * (1 + 4 + 3 + 1 + 2)) and options == ["--smoke"] * 3
    for i, run in enumerate(runs):
        assert {word[1:] for word in run.argv if word.startswith("@")} <= set(names[:i])
    of = cells(text, 3)
    assert of["sneaker", "-", "original"][0] == "1.00 (1.00 to 1.00)"
    assert of["sneaker", "-", "original"][2] == "-"
    erased = of["bag", "uce", "erased"]
    assert erased[0] == "0.15 (0.10 to 0.20)"
    # Any other name 2 + 3, the first token 2 + 1, of five 2 + 5 + seed, of ten 2 + 14.
    assert erased[2:4] == ["0.25 (0.25 to 0.25)", "0.15 (0.15 to 0.15)"]
    assert erased[4:6] == ["0.40 (0.35 to 0.45)", "0.80 (0.80 to 0.80)"]
    assert erased[6:8] == ["0.50 (0.50 to 0.50)", "0.10 (0.10 to 0.10)"]
    assert of["bag", "uce", "defended, K 5"][3:7] == [
        *["0.10 (0.10 to 0.10)"] * 2, "0.30 (0.30 to 0.30)", "0.50 (0.50 to 0.50)"
    ]  # fmt: skip
    assert of["bag", "uce", "defended, K 1"][4] == "0.30 (0.30 to 0.30)"
    assert "| on uce | on rece | on esd | on original |" in text
    # By the tokens alone: what the name itself draws, all on the original, does not count.
    transfer = [*["0.30 (0.25 to 0.35)"] * 3, "0.75 (0.75 to 0.75)"]
    assert f"| bag | esd | {' | '.join(transfer)} |" in text
    assert "| bag | uce | 2 | word10 **word11** word12" in text
    bounds = [line for line in text.splitlines() if "at least" in line or "at most" in line]
    assert len(bounds) == 1 + 2 * 3 * 3
    assert bounds[0].endswith("at least 0.85 | 0.80 | 0.85 | 0.90 | 0.85 | yes |")
    assert "| sneaker, uce: under its name at most 0.15 | 0.10 | 0.15 | 0.20 | 0.15 | yes |" in text
    assert "| sneaker, esd: under its name at most 0.15 | 0.20 | 0.25 | 0.30 | 0.25 | no |" in text
    told = "| 0.35 of 0.10 | 0.40 of 0.10 | 0.45 of 0.10 | 0.40, 4.00 times | yes |"
    assert f"| sneaker, uce: SubAttack, at least 3 times pre_asr, or 0.5 {told}" in text
    text = fill("concept", "--seeds", "1", "--concepts", "bag", "--only", "uce").text
    assert text.startswith("Seed 1. ") and "| bag | uce | erased | 0.15 | 0.50 |" in text
    assert text.count("at most") == 2 and "(0." not in text


def test_options_of_the_runs_of_the_table_of_concepts(fill):
    """Each goes to the programs that have it."""
    more = "--data.source shapes --attack.steps 7 --erase.towards bag --smoke".split()
    found = fill("concept", "--concepts", "ankle boot", "--seeds", "0", "--", *more)
    passed = {run.name: table_of_concepts.passed(run, more) for run in found.runs}
    assert passed["original-seed0"] == [*more[:2], "--smoke"]
    assert passed["uce-ankle-boot-seed0"] == passed["esd-ankle-boot-seed0"] == more[4:6]
    assert passed["uce-ankle-boot-seed0-subattack"] == more[2:4]
    assert (
        passed["uce-ankle-boot-seed0-from-esd"] == passed["esd-ankle-boot-seed0-defended-1"] == []
    )


def test_the_bounds_of_concepts():
    """Each of the numbers alone breaks its bound; nothing holds because all is 0."""

    def held(drawn=0.85, left=0.15, before=0.1, attacked=0.3, defended=0.15):
        erased = {"explicit": left, "pre_asr": before, "subattack 5": attacked}
        models = {
            ("bag", "", "original"): [{}],
            ("bag", "uce", "erased"): [erased],
            ("bag", "uce", "defended, K 5"): [{"subattack 5": defended}],
        }
        found = table_of_concepts.Found((0,), [drawn], models, {}, {}, {})
        return [bound.holds for bound in table_of_concepts.bounds(found)]

    assert held() == [True] * 4
    assert held(drawn=0.84) == [False, True, True, True]
    assert held(left=0.16) == [True, False, True, True]
    assert held(attacked=0.29) == [True, True, False, True]
    assert held(attacked=0.5, before=0.4)[2]
    assert held(defended=0.16) == [True, True, True, False]
    assert held(before=0.0, attacked=0.0, defended=0.0)[2:] == [False, False]
    assert held(before=0.3, attacked=0.5, defended=0.3)[2:] == [True, True]
    assert held(before=0.4, attacked=0.5, defended=0.4)[2:] == [True, False]
    assert held(before=0.0, attacked=0.05, defended=0.05)[2:] == [True, False]


def test_the_table_of_condensed_traces(fill):
    """Times are over those of whole traces of the same seed; what is not known is "-"."""
    found = fill("epic", "--only", "full", "edge", "head", "--seeds", "0", "1")
    same = "0.900 | 0.800 | 0.850 | 1.000 | 0.250"
    assert f"| full | {same} | 1,000 | 1.50 | 1.00 | 1.00 |" in found.text
    # Ratios 0.5 and 0.6, and their squares; the mean of the minutes is not their ratio.
    assert f"| edge | {same} | 550 | 0.85 | 0.55 | 0.30 |" in found.text
    assert f"| head | {same} | 550 | - | - | 0.30 |" in found.text
    assert [run.name for run in found.runs] == [
        f"{name}-seed{seed}" for seed in (0, 1) for name in ("full", "edge", "head")
    ]
    assert "| 500 | 0.50 | - | - |" in fill("epic", "--only", "edge", "--seeds", "0").text


def test_the_table_of_plans(fill):
    of = cells(fill("plan").text)
    assert list(of)[-1] == "run" and len(of) == 2 + len(table_of_programs.PLANS)
    assert of["8B, v5e, Muon"] == [
        *("v5e:8x8", "muon", "1.00", "1.00", "1.00 of 16.00", "yes", "2.0", "1.00", "1.500"),
        *("0.5", "0.50 / 0.25", "7"),
    ]
    assert of["8B, v5e, SIFT"][5:10] == ["**no**", "2.0", "at least 1.00", "-", "-"]


def test_a_run_is_started_and_read(tmp_path, monkeypatch):
    """A run's folder, its options and those of the folders beside it."""
    started = []

    def run(words, **_):
        started.append(words[1:])
        folder = Path(words[words.index("--output") + 1])
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text('{"finetuned": {"nll": 1.0}}')

    monkeypatch.setattr(tables.subprocess, "run", run)
    make = tables.maker(table.TABLES["epic"], tmp_path, ["--smoke"])
    argv = ("epic-tiny", "--stage.cache", "@cache")
    one = tables.Run("train.finetune", "edge", argv)
    assert make(one) == make(one) == {"finetuned": {"nll": 1.0}}
    folders = [f"{tmp_path}/{name}" for name in ("cache", "edge")]
    words = ["-m", "train.finetune", *argv[:2], folders[0], "--smoke", "--output", folders[1]]
    assert started == [words]
