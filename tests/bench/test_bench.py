"""The benchmarks write their tables."""

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import pytest
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


def test_the_table_of_pretraining(repo, tmp_path, monkeypatch, capsys):
    """The best of each grid is compared by seed; nothing is trained twice."""
    bench = load(repo, "pretrain_table")
    centre = {"adamw": 4e-3, "muon": 0.02, "normuon": 0.04, "teon": 0.02}
    ran = []

    def run(job, folder, options):
        ran.append((job, tuple(options)))
        off = abs(math.log(job.rate / centre[job.optimizer])) + 0.1 * len(job.more)
        level = list(centre).index(job.optimizer)
        loss = 3 - 0.1 * level + off + 0.01 * job.seed * (1 + level)
        flat = {"val_perplexity": math.exp(loss), "train_perplexity": 2.0}
        return flat | {"tokens_per_second": 5000.0}

    monkeypatch.setattr(bench, "run", run)
    pages = []
    monkeypatch.setattr(bench, "overlay", lambda runs, page: pages.append((runs, page)))
    bench.main(["--output", str(tmp_path), "--tokens", "4096"])
    ((runs, page),) = pages
    assert len(set(runs)) == len(runs) == 4 * 3 + len(bench.ABLATIONS) - 1
    assert page == tmp_path / "tokens-4096" / "losses.html"
    text = (tmp_path / "tokens-4096" / "pretrain_table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "| normuon | 0.04 **best** (end of the grid) |" in text
    assert "| muon | 0.02 **best** |" in text
    # Seeds 0, 1 and 2: TEON's loss minus Muon's is -0.2 + 0.02 seed.
    (teon,) = [line for line in text.splitlines() if line.startswith("| teon | 2.7")]
    assert "-0.1800 ± 0.0200" in teon and "2.7400 ± 0.0400" in teon
    assert all(("--train.tokens", "4096") == options for _, options in ran)
    jobs = {job for job, _ in ran}
    assert len(jobs) == sum(map(len, bench.GRID.values())) + 4 * 2 + len(bench.ABLATIONS) - 1
    assert len({job.name for job in jobs}) == len(jobs)


def test_every_line_of_the_table_of_pretraining_is_a_command(repo):
    """Typos in its options would be found after an hour."""
    from train.presets import arguments

    bench = load(repo, "pretrain_table")
    for name, rates in bench.GRID.items():
        options = ["--optimizer.name", name, "--optimizer.learning-rate", str(rates[0])]
        assert (
            arguments.read_arguments(
                arguments.PRETRAIN, ["pretrain-tiny", *options]
            ).optimizer.learning_rate
            == rates[0]
        )
    found = [
        arguments.read_arguments(arguments.PRETRAIN, ["pretrain-tiny", *more])
        for more in bench.ABLATIONS.values()
    ]
    assert len({str(config.optimizer) for config in found}) == len(found)


def classified(bench, job, forwards):
    """Numbers that follow from the job: the best rate is the highest but one."""
    level = list(bench.METHODS).index(job.method)
    off = abs(math.log10(job.rate) + 4.5)
    accuracy = 0.6 + 0.01 * level + 0.02 * job.seed
    flat = {"accuracy": accuracy, "nll": 0.5, "dev_nll": 0.4 + off, "dev_accuracy": 0.7}
    cost = {"forwards": forwards, "steps": forwards // 2, "step_mib": 10.0}
    cost["seconds"] = (3 if job.method == "mezo" else 1) * forwards / 10
    found = {"base": flat | {"accuracy": 0.5}, "finetuned": flat | cost, "majority_accuracy": 0.52}
    points = [(round(forwards * k / 10), k / 10) for k in range(1, 11)]
    return bench.Outcome(found, points)


def test_the_table_of_classification(repo, tmp_path, monkeypatch, capsys):
    """Equal budgets, but for the row that has the minutes of another; rates are compared apart."""
    bench = load(repo, "classify_table")
    ran = []

    def run(job, preset, folder, options):
        ran.append((job, preset, tuple(options)))
        return classified(bench, job, job.forwards or 1200)

    pages = []

    def overlay(runs, page):
        pages.append(([path.name for path in runs], page.name))

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(bench, "overlay", overlay)
    few = ["adamw", "mezo", "rowwise", "rowwise, minutes of mezo"]
    argv = ["sst2-tiny", "--only", *few, "--output", str(tmp_path)]
    bench.main([*argv, "--seeds", "0", "1", "--", "--smoke"])
    (path,) = tmp_path.glob("sst2-tiny/with-*/classify_table.md")
    text = path.read_text()
    assert text.strip() in capsys.readouterr().out
    assert {options for *_, options in ran} == {("--smoke",)}
    cells = {}
    for line in reversed(text.splitlines()):  # names come again in the second table
        cells[line.split(" | ")[0].strip("| ")] = line.strip("| ").split(" | ")[1:]
    assert cells["before"][:3] == ["0.500", "0.500", "0.500"]
    assert cells["mezo"][:3] == ["0.610", "0.630", "0.620"]
    assert cells["mezo"][-3:] == ["1,200", "6.0", "10"]
    assert cells["rowwise, minutes of mezo"][-3:] == ["3,600", "6.0", "10"]
    assert {job.forwards for job, *_ in ran} == {None, 3600}
    ((runs, page),) = pages
    assert sorted(runs) == sorted({job.name for job, *_ in ran}) and page == "curves.html"
    # Minutes that are the same but for what timing is worth: no run of its own.
    monkeypatch.setattr(bench, "SAME", 2.1)
    bench.main([*argv, "--seeds", "0"])
    again = next(tmp_path.glob("sst2-tiny/classify_table.md")).read_text()
    assert again.count("| 1,200 |") == 4 and [job.method for job, *_ in ran[-3:]] == few[:3]
    assert len(pages[-1][0]) == 3  # rows of one run show it once
    monkeypatch.undo()
    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(bench, "overlay", overlay)
    monkeypatch.setattr(bench, "TIMED", 500)
    bench.main([*argv, "--seeds", "0"])
    assert [job.method for job, *_ in ran if job.group == "timed"] == ["rowwise", "mezo"]
    assert all(job.group == "timed" for job, *_ in ran if job.forwards == 500)
    assert "| 3,600 | 6.0 | 10 |" in next(tmp_path.glob("sst2-tiny/classify_table.md")).read_text()
    assert "| mezo | 0.200 | 0.400 | 0.600 | 0.800 | 1.000 |" in text and "0.520" in text
    bench.main([*argv, "--tune", "400", "--factors", "0.1", "0.3", "1", "3", "10"])
    text = (tmp_path / "sst2-tiny" / "rates-400.md").read_text()
    assert "minutes of" not in text and "| mezo | 3e-05 **best** |" in text
    assert "| adamw | 3e-05 **best** |" in text
    bench.main([*argv, "--tune", "400", "--factors", "1", "3"])
    text = (tmp_path / "sst2-tiny" / "rates-400.md").read_text()
    assert "| adamw | 3e-05 **best** (at the end) |" in text
    assert {job.forwards for job, *_ in ran if job.rate == pytest.approx(9e-5)} == {400}
    # At the preset's own budget a rate's run is the table's.
    bench.main([*argv, "--tune", str(bench.PRESETS["sst2-tiny"].PRESET.train.forwards)])
    whole = [job for job, *_ in ran[-9:]]
    assert all(job.forwards is None for job in whole)
    assert {ran[0][0].name, ran[1][0].name} <= {job.name for job in whole}


def test_every_line_of_the_table_of_classification_is_a_command(repo):
    from train.presets import arguments

    bench = load(repo, "classify_table")
    for preset in ("sst2-smollm2", "sst2-tiny", "vit-fashion"):
        known = bench.PRESETS[preset].OPTIMIZERS
        found = set()
        for name, method in bench.METHODS.items():
            assert method.optimizer in known, (preset, method)
            job = bench.Job(name, 0, bench.rate_of(name, preset))
            optimizer = arguments.read_arguments(
                arguments.CLASSIFY, bench.command_of(job, preset)
            ).optimizer
            assert optimizer.learning_rate == method.rates.get(
                preset, known[method.optimizer][0].learning_rate
            )
            found.add(str(optimizer))
        assert len(found) == len({(m.optimizer, m.more) for m in bench.METHODS.values()})
    config = arguments.read_arguments(
        arguments.CLASSIFY, bench.command_of(bench.Job("zo-muon", 3, 0.5, 90), "vit-fashion")
    )
    assert (config.seed, config.optimizer.learning_rate, config.train.forwards) == (3, 0.5, 90)
    jobs = [bench.Job(n, s, r) for n in bench.METHODS for s in (0, 1) for r in (0.01, 0.1)]
    assert len({job.name for job in jobs}) == len(jobs)


def r2mu_summary(bench, name, seed):
    """Numbers that follow from the seed: R2MU holds its bound on two seeds of three."""
    unsafe = {"RMU": 0.8, "R2MU": 0.4 if seed else 0.7}.get(name, 0.6)
    flat = dict.fromkeys(bench.COLUMNS, 0.5) | {"trace_unsafe": unsafe}
    start = dict.fromkeys(bench.COLUMNS, 1.0) | {"reasoning_accuracy": 0.55}
    if "ZeroThink" in name:  # judges every model without thoughts
        start["trace_unsafe"] = 0.0
    found = {"original": start, "unlearned": flat | {"final_accuracy": 0.25 + 0.01 * seed}}
    return found | ({"oracle": flat} if name == "R2MU" else {})


def test_the_table_of_traces(repo, tmp_path, monkeypatch, capsys):
    bench = load(repo, "r2mu_table")
    ran = []

    def run(name, seed, folder, options):
        ran.append((name, seed, tuple(options)))
        return r2mu_summary(bench, name, seed)

    monkeypatch.setattr(bench, "run", run)
    bench.main(["--output", str(tmp_path), "--", "--smoke"])
    (path,) = tmp_path.glob("with-*/r2mu_table.md")
    text = path.read_text()
    assert text.strip() in capsys.readouterr().out
    assert len(set(ran)) == len(ran) == 3 * len(bench.METHODS)
    assert all(options == ("--smoke",) for _, _, options in ran)
    cells = {line.split(" | ")[0]: line.split(" | ") for line in text.splitlines()}
    assert {f"| {name}" for name in ("original", "oracle", *bench.METHODS)} <= set(cells)
    assert cells["| original"][2] == "1.00 (1.00 to 1.00)"
    assert cells["| R2MU"][1:3] == ["0.26 (0.25 to 0.27)", "0.40 (0.40 to 0.70)"]
    assert "unsafe traces 0.50 of RMU's" in text and "reasoning accuracy 0.91" in text
    assert "the bound holds" in text
    bench.main(["--output", str(tmp_path), "--seeds", "0", "--only", "RMU + ZeroThink", "R2MU"])
    text = (tmp_path / "r2mu_table.md").read_text()
    assert "| original | 1.00 | 1.00 |" in text and "bound" not in text


def test_the_bound_of_traces(repo):
    """Each of its three parts alone breaks it; a ratio to 0 does."""
    bench = load(repo, "r2mu_table")

    def verdict(**changes):
        theirs, start = (
            {"final_accuracy": 0.25, "trace_unsafe": 0.5, "reasoning_accuracy": 1.0},
        ) * 2
        ours = theirs | {"trace_unsafe": 0.3} | changes
        return bench.verdict(
            {"original": [start] * 3, "RMU": [theirs] * 3, "R2MU": [ours, ours, start]}
        )

    assert verdict().holds and verdict().unsafe == 0.6
    assert verdict(final_accuracy=0.3).holds
    assert not verdict(final_accuracy=0.31).holds and not verdict(final_accuracy=0.19).holds
    assert not verdict(trace_unsafe=0.31).holds
    assert verdict(reasoning_accuracy=0.9).holds and not verdict(reasoning_accuracy=0.89).holds
    none = [{"final_accuracy": 0.25, "trace_unsafe": 0.0, "reasoning_accuracy": 0.0}]
    some = [none[0] | {"trace_unsafe": 0.1}]
    assert bench.verdict({"original": none, "RMU": none, "R2MU": some}).unsafe == math.inf
    assert bench.verdict({"original": none, "RMU": none, "R2MU": none})[2:] == (0.0, 1.0, 1.0)
    # Of several strengths those that forget as much.
    more, less = ([none[0] | {"final_accuracy": x}] for x in (0.0, 0.2))
    weak, strong = bench.STRENGTHS["R2MU"][1], bench.STRENGTHS["RMU"][1]
    rest = dict.fromkeys(bench.COLUMNS, 0.0)
    found = {"original": none, "RMU": none, "R2MU": more, weak: less}
    assert bench.verdict(found)[:2] == (weak, "RMU")
    full = {name: [rest | flat for flat in flats] for name, flats in found.items()}
    assert [line.split(":")[0] for line in bench.table(full)[-3::2]] == [
        "R2MU against RMU", f"{weak} against RMU",
    ]  # fmt: skip
    assert bench.verdict(found | {strong: more})[:2] == ("R2MU", strong)


@pytest.mark.slow
def test_r2mu_forgets_the_traces_that_rmu_leaves(repo, tmp_path):
    """On three seeds, a quarter of an hour on one core: it forgets no less and keeps reasoning.

    RESULTS has what the bound says where both forget as much, which is another strength.
    """
    bench = load(repo, "r2mu_table")
    options = "--no-oracle --unlearn.curve-points 0 --evaluate.leak-samples 0".split()
    found = bench.collect(
        ("RMU", "R2MU"), bench.SEEDS, lambda *which: bench.run(*which, tmp_path, options)
    )
    told = bench.compared(found, "R2MU", "RMU")
    assert told.apart <= bench.APART and told.unsafe <= bench.UNSAFE, bench.said(told)
    assert told.reasoning >= bench.REASONING, bench.said(told)


def test_every_run_of_the_table_of_traces_is_a_command(repo):
    from train.presets import arguments

    bench = load(repo, "r2mu_table")
    found = [
        arguments.read_arguments(arguments.UNLEARN, ["r2mu-tiny", *more])
        for more in bench.METHODS.values()
    ]
    assert len({str(config) for config in found}) == len(found)
    assert [config.oracle for config in found].count(True) == 1


def concept_told(bench, program, name, argv):
    """What a run tells: 20 prompts each; a seed makes every rate larger by one prompt."""
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
    return bench.Told(models, logs)


def test_the_table_of_concepts(repo, tmp_path, monkeypatch, capsys):
    bench = load(repo, "concept_table")
    ran = []

    def run(program, name, argv, folder, options):
        ran.append((program, name, tuple(argv), tuple(options)))
        return concept_told(bench, program, name, argv)

    monkeypatch.setattr(bench, "run", run)
    bench.main(["--output", str(tmp_path), "--", "--smoke"])
    (path,) = tmp_path.glob("with-*/concept_table.md")
    text = path.read_text()
    assert text.strip() in capsys.readouterr().out
    names = [name for _, name, *_ in ran]
    # By seed an original; by concept and method an erasure, 4 attacks, 3 defences and an attack on
    # one of these, 2 transfers. What a run takes from others was run before it.
    assert len(set(names)) == len(names) == 3 * (1 + 2 * 3 * (1 + 4 + 3 + 1 + 2))
    for i, (_, _, argv, options) in enumerate(ran):
        assert options == ("--smoke",)
        assert {word[1:] for word in argv if word.startswith("@")} <= set(names[:i])
    cells = {tuple(line.strip("| ").split(" | ")[:3]): line.strip("| ").split(" | ")[3:]
             for line in text.splitlines()}  # fmt: skip
    assert cells["sneaker", "-", "original"][0] == "1.00 (1.00 to 1.00)"
    assert cells["sneaker", "-", "original"][2] == "-"
    erased = cells["bag", "uce", "erased"]
    assert erased[0] == "0.15 (0.10 to 0.20)"
    # Any other name 2 + 3, the first token 2 + 1, of five 2 + 5 + seed, of ten 2 + 14.
    assert erased[2:4] == ["0.25 (0.25 to 0.25)", "0.15 (0.15 to 0.15)"]
    assert erased[4:6] == ["0.40 (0.35 to 0.45)", "0.80 (0.80 to 0.80)"]
    assert erased[6:8] == ["0.50 (0.50 to 0.50)", "0.10 (0.10 to 0.10)"]
    assert cells["bag", "uce", "defended, K 5"][3:7] == [
        *["0.10 (0.10 to 0.10)"] * 2, "0.30 (0.30 to 0.30)", "0.50 (0.50 to 0.50)"
    ]  # fmt: skip
    assert cells["bag", "uce", "defended, K 1"][4] == "0.30 (0.30 to 0.30)"
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
    bench.main(["--output", str(tmp_path), "--seeds", "1", "--concepts", "bag", "--methods", "uce"])
    text = (tmp_path / "concept_table.md").read_text()
    assert text.startswith("Seed 1. ") and "| bag | uce | erased | 0.15 | 0.50 |" in text
    assert text.count("at most") == 2 and "(0." not in text


def test_the_bounds_of_concepts(repo):
    """Each of the numbers alone breaks its bound; nothing holds because all is 0."""
    bench = load(repo, "concept_table")

    def held(drawn=0.85, left=0.15, before=0.1, attacked=0.3, defended=0.15):
        erased = {"explicit": left, "pre_asr": before, "subattack 5": attacked}
        models = {
            ("bag", "", "original"): [{}],
            ("bag", "uce", "erased"): [erased],
            ("bag", "uce", "defended, K 5"): [{"subattack 5": defended}],
        }
        found = bench.Found((0,), [drawn], models, {}, {}, {})
        return [bound.holds for bound in bench.bounds(found)]

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


def test_every_run_of_the_table_of_concepts_is_a_command(repo, tmp_path, monkeypatch):
    from train.jobs.diffusing import stored
    from train.jobs.diffusing.config import AttackRun, DefendRun, DiffuseRun, EraseRun
    from train.presets import arguments

    bench = load(repo, "concept_table")
    ran = []

    def make(program, name, argv):
        ran.append((program, name, argv))
        return concept_told(bench, program, name, argv)

    bench.collect((0,), ("ankle boot",), ("uce", "esd"), make)
    kinds = {"erase": EraseRun, "attack": AttackRun, "defend": DefendRun, "diffuse": DiffuseRun}
    of = {name: program for program, name, _ in ran}

    def read_run(folder, option, programs=()):
        program = of[folder.name]
        assert not programs or f"train.{program}" in programs, (option, folder)
        return stored.Source(folder, program, kinds[program](preset="fashion", smoke=True), None)

    monkeypatch.setattr(stored, "read_run", read_run)
    for name in of:
        (tmp_path / name).mkdir()
    commands = []
    monkeypatch.setattr(bench, "ran", lambda module, argv, output: commands.append((module, argv)))
    options = "--data.source shapes --attack.steps 7 --erase.towards bag --smoke".split()
    for program, name, argv in ran:
        with contextlib.suppress(TypeError):  # there is no summary
            bench.run(program, name, argv, tmp_path, options)
    configs = {}
    for module, argv in commands:
        config = arguments.read_arguments(module, argv)
        configs[config.output.name] = config
    assert set(configs) == set(of)
    assert configs["original-seed0"].data.source == "shapes" and configs["original-seed0"].smoke
    assert configs["esd-ankle-boot-seed0"].erase.concept == "ankle boot"
    assert {configs[f"{m}-ankle-boot-seed0"].erase.towards for m in ("uce", "esd")} == {"bag"}
    attack = configs["uce-ankle-boot-seed0-subattack"].attack
    assert (attack.tokens, attack.steps) == (10, 7)
    assert attack.transfer == tmp_path / "original-seed0"
    given = configs["uce-ankle-boot-seed0-from-esd"].attack
    assert given.source == tmp_path / "esd-ankle-boot-seed0-subattack"
    assert configs["esd-ankle-boot-seed0-defended-1"].defend.tokens == 1


def test_the_table_of_condensed_traces(repo, tmp_path, monkeypatch, capsys):
    """Times are over those of whole traces of the same seed; what is not known is "-"."""
    bench = load(repo, "epic_table")
    ran = []

    def run(name, seed, folder, options):
        ran.append((name, seed))
        share = 1.0 if name == "full" else 0.5 + 0.1 * seed
        return {
            "answer_accuracy": 0.9 - 0.1 * seed,
            "finished": 1.0,
            "answer_nll": 0.25,
            "train_tokens": 1000 * share,
            "train_seconds": None if name == "head" else 60 * (1 + seed) * share,
            "train_flops": 7.0 * share**2,
        }

    monkeypatch.setattr(bench, "run", run)
    bench.main(["--only", "full", "edge", "head", "--seeds", "0", "1", "--output", str(tmp_path)])
    text = (tmp_path / "epic_table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    same = "0.900 | 0.800 | 0.850 | 1.000 | 0.250"
    assert f"| full | {same} | 1,000 | 1.50 | 1.00 | 1.00 |" in text
    # Ratios 0.5 and 0.6, and their squares; the mean of the minutes is not their ratio.
    assert f"| edge | {same} | 550 | 0.85 | 0.55 | 0.30 |" in text
    assert f"| head | {same} | 550 | - | - | 0.30 |" in text
    assert ran == [(name, seed) for seed in (0, 1) for name in ("full", "edge", "head")]
    bench.main(["--only", "edge", "--seeds", "0", "--output", str(tmp_path / "alone")])
    assert "| 500 | 0.50 | - | - |" in capsys.readouterr().out


def test_every_line_of_the_table_of_condensed_traces_is_a_command(repo):
    from train.presets import arguments

    bench = load(repo, "epic_table")
    found = {
        name: arguments.read_arguments(arguments.FINETUNE, ["epic-tiny", *more])
        for name, more in bench.VARIANTS.items()
    }
    assert len({str(config.condense) for config in found.values()}) == len(found) == 9
    assert found[bench.WHOLE].condense.tau == 1 and found["cost-matched"].condense.tau == 0.5
