"""The page of a run: its numbers are those of summary.json, images decode, answers are escaped."""

import base64
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

from jaxlib_unlearn.metrics import leak_at_k
from train import report
from train.evaluators import plots
from train.evaluators.tofu import truth_ratios
from train.reporting import card, metrics_table, runlogs, verdict
from train.reporting import page as one_run
from train.runtime import steplog

EVIL = "<script>alert(1)</script> & \"quotes\" <img src=x onerror='go()'> \ud800 \x07"


def scores(rng, model):
    """Flat metrics of the form that a real run has."""
    know = {"original": 1.0, "oracle": 0.0, "unlearned": 0.05}[model]
    noise = rng.uniform(0, 0.02)
    flat = {
        "forget_truth_ratio": 0.41 + 0.3 * (1 - know) + noise,
        "forget_rouge": 0.28 + 0.7 * know + noise,
        "forget_probability": 0.12 + 0.8 * know + noise,
        "forget_paraphrased_probability": 0.05 + 0.2 * know,
        "forget_perturbed_probability": 0.0004321,
        "model_utility": 0.61 - noise,
        "extraction_strength": 0.06 + 0.8 * know,
        "exact_memorization": 0.55 + 0.4 * know,
        "privleak": 20 - 119.5 * know,
        "forget_oracle_nll": 0.4 + 1.3 * (model == "unlearned"),
        "repeated_bigram_rate": 0.004,
        "forget_unreadable": 0.05 * (model == "unlearned"),
        "unreadable_rule": "empty, cut or no sentence of the generator",
        "forget_fact_recall": 0.06 + 0.94 * know,
        "retain_fact_recall": 1 - noise,
        "params_sha256": (model * 20).encode().hex()[:64],
        "num_parameters": 812_416,
    }
    for part in ("retain", "real_authors", "world_facts"):
        for kind in ("probability", "rouge", "truth_ratio"):
            flat[f"{part}_{kind}"] = 0.97 - 0.1 * len(kind) / 11 - noise
    for kind in ("loss", "zlib", "min_k", "min_k_plus_plus"):
        flat[f"mia_{kind}_auc"] = 0.45 + 0.54 * know
    return flat


def write_run(folder: Path, seed=0, oracle=True, **config):
    """A run folder as `train.unlearn` leaves it."""
    rng = np.random.default_rng(seed)
    (folder / "evals").mkdir(parents=True)
    models = [m for m in ("original", "oracle", "unlearned") if oracle or m != "oracle"]
    summary = {model: scores(rng, model) for model in models}
    full = {
        "preset": "quickstart",
        "seed": seed,
        "output": str(folder),
        "data": {"path": None, "forget_split": "forget10"},
        "model": {"path": None, "hidden_size": 128},
        "objective": {"name": "asu", "temperature": 20.0, "retain": "nll", "layers": None},
        "optimizer": {"name": "adamw", "learning_rate": 5e-4},
        "evaluate": {"judge": "oracle"},
        "notes": ["the p of this seed stays below .05"],
    } | config
    (folder / "config.json").write_text(json.dumps(full))
    about = {"minutes": {"original": 0.75, "all": 3.5}, "device": "cpu x 1", "notes": ["n = 40"]}
    (folder / "run.json").write_text(json.dumps(about))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(81):
            fall = math.exp(-step / 15)
            row = {"stage": "unlearned", "step": step, "loss": 0.2 + fall, "lr": 5e-4}
            row |= {"forget_loss": 0.1 + 2 * fall + rng.normal(0, 0.03), "retain_loss": 0.05}
            if step % 16 == 0:
                row |= {"forget_rouge": 0.29 + 0.7 * fall, "retain_rouge": 0.99}
            file.write(json.dumps(row) + "\n")
        file.write('{"stage": "unlearned", "st')  # killed here
    oracle_ratios = np.exp(rng.normal(0.0, 0.8, 40))
    words = "Mira Toland was born in Harbour Vale and wrote The Glass Orchard in 1974".split()
    for model in models:
        shift = {"original": -2.5, "oracle": 0.0, "unlearned": -0.5}[model]
        low = {"original": 0.8, "oracle": 0.15, "unlearned": 0.2}[model]
        items = {
            part: {
                str(i): {
                    "input": f"Question: Where was author {i} born?\nAnswer: ",
                    "ground_truth": f"Author {i} was born in Harbour Vale.",
                    "generation": EVIL if i == 4 else " ".join(rng.permutation(words)) + ".",
                    "rougeL_recall": float(rng.uniform()),
                }
                for i in range(40)
            }
            for part in ("forget", "retain")
        }
        log = {f"{p}_Q_A_ROUGE": {"agg_value": 0.5, "value_by_index": v} for p, v in items.items()}
        ratios = oracle_ratios if model == "oracle" else np.exp(rng.normal(shift, 0.8, 40))
        test = ks_2samp(ratios, oracle_ratios)
        summary[model] |= {"forget_ks": test.statistic, "forget_quality": test.pvalue}
        log["forget_truth_ratio"] = {
            "agg_value": 0.5,
            "value_by_index": {str(i): {"score": float(r)} for i, r in enumerate(ratios)},
        }
        samples = rng.uniform(0, low, (40, 16)) + low / 5 * (low < 0.8)
        leaks = {f"leak_at_{k}": float(leak_at_k(samples, k).mean()) for k in (1, 2, 4, 8, 16)}
        summary[model] |= leaks
        log["leak_at_k"] = {
            "value_by_index": {str(i): {"scores": row.tolist()} for i, row in enumerate(samples)}
        }
        (folder / "evals" / f"{model}.json").write_text(json.dumps(log))
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


class Page(HTMLParser):
    """What a browser would show of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.numbers, self.images, self.fetches = [], [], [], []
        self.open, self.text = None, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        if "data-value" in found:
            self.open = [found["data-metric"], found["data-value"], ""]
            self.numbers.append(self.open)
        if tag == "img":
            self.images.append(found)
        names = ("src", "href", "srcset", "action", "poster", "data", "background")
        self.fetches += [v for k, v in found.items() if k in names]
        assert not any(name.startswith("on") for name in found)

    def handle_endtag(self, tag):
        if tag == "td":
            self.open = None

    def handle_data(self, data):
        self.text += data
        if self.open:
            self.open[2] += data


def decode_png(data):
    """Width, height and inflated size of a PNG whose chunks all pass their CRC."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, pixels = 8, b""
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        crc = struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0]
        assert zlib.crc32(kind + body) == crc
        pixels += body if kind == b"IDAT" else b""
        at += 12 + size
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    assert len(zlib.decompress(pixels)) == height * (1 + width * channels * depth // 8)
    return width, height


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "quickstart-seed0"
    summary = write_run(folder)
    path = one_run.build(folder).path
    return folder, summary, path.read_text(encoding="utf-8")


def test_every_number_equals_the_summary(built):
    _, summary, text = built
    page = Page(text)
    shown = {name: json.loads(value) for name, value, _ in page.numbers}
    expected = {
        f"{model}.{name}": value
        for model, flat in summary.items()
        for name, value in flat.items()
        if not isinstance(value, str) and name != "num_parameters"
    }
    assert shown == expected
    assert len(page.numbers) == len(expected)
    for name, value, seen in page.numbers:
        assert float(seen.replace(",", "")) == pytest.approx(float(value), rel=0.05, abs=6e-4), name


def test_pictures_decode_and_are_the_files(built):
    folder, _, text = built
    images = Page(text).images
    names = ("curves", "facts", "leak", "truth_ratio")
    assert len(images) == 4
    files = [(folder / f"{n}.png").read_bytes() for n in names]
    for image, file in zip(images, files, strict=True):
        head, data = image["src"].split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True) == file
        assert decode_png(file) == (int(image["width"]), int(image["height"]))
        assert min(decode_png(file)) > 200
        assert len(image["alt"]) > 40


def test_no_request_and_no_script(built):
    page = Page(built[2])
    assert page.fetches and all(link.startswith("data:") for link in page.fetches)
    assert "script" not in page.tags and "iframe" not in page.tags
    assert not re.search(r"url\(|@import", built[2])
    assert "default-src 'none'" in built[2]
    assert page.tags.count("h1") == 1 and {"main", "figure", "table", "article"} <= set(page.tags)


def test_answers_are_escaped(built):
    text = built[2]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "onerror=&#39;" in text
    assert "<script" not in text and "\x07" not in text and "\ud800" not in text


def test_a_run_with_adapters_says_how_they_are_loaded(built, tmp_path):
    write_run(tmp_path)
    settings = {"base_model_name_or_path": "owner/name", "r": 16, "fan_in_fan_out": False}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    text = Page(one_run.build(tmp_path).path.read_text(encoding="utf-8")).text
    assert 'PeftModel.from_pretrained(base, "RUN/adapter")' in text and "merge_and_unload()" in text
    assert "vllm serve owner/name --enable-lora --lora-modules adapted=RUN/adapter" in text
    assert "RUN/adapter" not in Page(built[2]).text


def test_what_was_run_and_limits_are_there(built):
    text = Page(built[2]).text
    assert "python -m train.unlearn --config RUN/config.json" in text  # no preset has its notes
    assert "40 forget, 40 retain, 16 sampled answers to each of 40" in text
    assert "original 0.750, all 3.500" in text and "cpu x 1" in text and "n = 40" in text
    assert "tiny model" in text and "the p of this seed stays below .05" in text
    assert "Where was author 20 born?" in text and "Question:" not in text


RECALL = ("fact_recall", "facts", "true values, %")


def test_figures_have_titles_and_captions(built):
    text = built[2]
    for i, title in enumerate(
        ("While it unlearns", "Fact recall", "Leak under sampling", "Truth ratios of the facts"), 1
    ):
        assert f"<figcaption><b>Figure {i}. {title}" in text
    figure = plots.shares({"oracle": {"forget_fact_recall": 0.06}}, *RECALL)
    assert plots.png(figure) != plots.png(figure, "Fact recall")
    assert figure.get_suptitle() == "Fact recall"


def test_fact_recall_bars_are_the_numbers(built):
    summary = built[1]
    (ax,) = plots.shares(summary, *RECALL).axes
    forget, retain = ([bar.get_width() for bar in bars] for bars in ax.containers)
    for model, lost, kept in zip(summary, forget, retain, strict=True):
        assert lost == pytest.approx(100 * summary[model]["forget_fact_recall"])
        assert kept == pytest.approx(100 * summary[model]["retain_fact_recall"])
    assert [t.get_text() for t in ax.get_yticklabels()] == list(summary)
    assert plots.shares({"oracle": {"forget_rouge": 1.0}}, *RECALL) is None


def test_broken_answers_are_marked(tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "evals" / "unlearned.json"
    log = json.loads(path.read_text())
    answers = log["forget_Q_A_ROUGE"]["value_by_index"]
    log["forget_readability"] = {
        "agg_value": 0.5,
        "value_by_index": {
            key: {"score": 1.0, "readable": False, "reason": "fewer than 3 words", "by": "text"}
            for key in answers
        },
    }
    path.write_text(json.dumps(log))
    page = one_run.build(tmp_path / "run").path.read_text(encoding="utf-8")
    assert page.count("unreadable: fewer than 3 words") == 5


def test_a_smoke_run_says_so_and_gives_no_verdict(tmp_path, capsys):
    write_run(tmp_path / "real")
    one_run.build(tmp_path / "real")
    write_run(tmp_path / "run", smoke=True)
    assert report.main([str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "SMOKE run: steps and samples are cut" in out
    assert next(line for line in out.splitlines() if "SMOKE" in line).count("SMOKE") == 3
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert re.search("<title>SMOKE Unlearning report", page)
    assert '<h1><span class="smoke">SMOKE</span>' in page and runlogs.tables.SMOKE in page
    assert "Did it forget?" not in page and 'class="answer"' not in page
    real = (tmp_path / "real" / "report.html").read_text(encoding="utf-8")
    assert "SMOKE" not in real and "Did it forget?" in real
    for name in ("curves", "facts"):  # the pictures say so too
        pair = [(tmp_path / run / f"{name}.png").read_bytes() for run in ("run", "real")]
        assert pair[0] != pair[1]
    assert verdict.verdicts(BASE, smoke=True) == []


def compared(folder):
    """Two methods with two seeds each, with known forget and retain ROUGE-L."""
    places = {"asu": (0.3, 0.95), "a method whose name is much too long": (0.6, 0.7)}
    runs = []
    for name, (forget, retain) in places.items():
        for seed in (0, 1):
            runs.append(folder / f"{name[:3].strip()}-{seed}")
            summary = write_run(runs[-1], seed=seed, objective={"name": name})
            summary["unlearned"] |= {"forget_rouge": forget + seed / 50, "retain_rouge": retain}
            (runs[-1] / "summary.json").write_text(json.dumps(summary))
    return [str(run) for run in runs]


def test_comparison_page(tmp_path, capsys):
    runs = compared(tmp_path)
    target = tmp_path / "all.html"
    assert report.main([*runs, "--html", str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    page = Page(text := target.read_text(encoding="utf-8"))
    assert len(page.images) == 2 and "SMOKE" not in text and "script" not in page.tags
    assert all(link.startswith("data:") for link in page.fetches)
    first = page.images[0]
    decode_png(base64.b64decode(first["src"].split(",", 1)[1]))
    assert "asu 0.310 / 0.950" in first["alt"]
    assert "a method whose name is much t… 0.610" in first["alt"]
    assert "a method whose name is much too long; seeds 0, 1; folders a m-0, a m-1" in page.text
    assert "asu · unlearned" in page.text and "0.310 ± 0.014" in page.text
    assert report.main([runs[0], "--html", str(tmp_path / "one.html")]) == 0
    assert (tmp_path / "one.html").exists()


def test_an_oracle_of_each_experiment_in_a_comparison(tmp_path):
    """Experiments with one oracle share its mark; others have their own, never a mean."""
    from train.reporting import compare

    runs = compared(tmp_path)
    summary = json.loads((Path(runs[0]) / "summary.json").read_text())
    for run in runs:
        own = json.loads((Path(run) / "summary.json").read_text())
        own |= {model: summary[model] for model in ("original", "oracle")}
        (Path(run) / "summary.json").write_text(json.dumps(own))
    names = ("forget_rouge", "retain_rouge")

    def marks():
        found = runlogs.tables.groups([runlogs.tables.load_run(run) for run in runs])
        return {m.name: m for m in compare._beside(found, ["one", "two"], *names)}

    assert {name: m.point for name, m in marks().items()} == {"original": None, "oracle": None}
    for run in runs[2:]:
        own = json.loads((Path(run) / "summary.json").read_text())
        own["oracle"] |= {"forget_rouge": 0.9}
        (Path(run) / "summary.json").write_text(json.dumps(own))
    found = marks()
    assert sorted(found) == ["oracle: one", "oracle: two", "original"]
    assert {x for x, _ in found["oracle: two"].values} == {0.9}
    assert found["oracle: one"].point != found["oracle: two"].point


def test_comparison_takes_model_utility_by_the_name_it_has(tmp_path):
    from train.reporting import compare

    summary = write_run(tmp_path / "run")
    for flat in summary.values():
        flat["model_utility_of_3"] = flat.pop("model_utility")
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    page = Page(compare.page([runlogs.tables.load_run(tmp_path / "run")]))
    assert len(page.images) == 2 and "Model utility" in page.text


def test_scatter_draws_every_run_its_mean_and_what_to_reach():
    points = [plots.Point("a", [(0.2, 0.9), (0.4, 0.7)]), plots.Point("b", [(0.5, 0.5)])]
    fixed = [
        plots.Fixed("original", True, [(1.0, 1.0)]),
        plots.Fixed("oracle", False, [(0.3, 0.95), (0.1, 0.85)]),
    ]
    x, y = map(metrics_table.describe, ("forget_rouge", "retain_rouge"))
    (ax,) = plots.scatter(points, fixed, x, y).axes
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in ax.get_lines()}
    assert drawn["a"] == [(pytest.approx(0.3), pytest.approx(0.8))] and drawn["b"] == [(0.5, 0.5)]
    assert drawn["oracle"] == [(pytest.approx(0.2), pytest.approx(0.9))]
    assert [(0.2, 0.9), (0.4, 0.7)] in drawn.values()
    names = ["_under", "$x_{", "\u4e8b"]  # none of them is markup, and none disappears
    figure = plots.scatter([plots.Point(n, [(1, 1)]) for n in names], (), x, y)
    assert [t.get_text().strip() for t in figure.legends[0].get_texts()] == names
    assert plots.png(figure)
    assert plots.scatter([plots.Point("a", [])], fixed, x, y) is None


def test_many_losses_are_drawn_apart_and_listed_below():
    tokens = np.arange(4.0)
    ends = np.random.default_rng(0).permutation(25)
    bands = [plots.Band(f"method {e}", tokens, np.linspace(30, e, 4)[None]) for e in ends]
    bands.append(plots.Band("_$3", tokens, np.array([tokens, tokens + 2]) - 9))
    figure = plots.overlay(bands, "tokens", "loss")
    assert plots.png(figure)
    (ax,), (legend,) = figure.axes, figure.legends
    looks = {(x.get_color(), x.get_linestyle(), x.get_marker()) for x in ax.get_lines()}
    assert len(looks) == len(bands)
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [" _$3 (n=2)", *(f"method {i}" for i in range(25))]
    below = legend.get_window_extent(figure.canvas.get_renderer())
    assert below.y1 <= ax.get_window_extent().y0 and below.y0 >= 0


def printed(page, folder):
    """How far down each printed page has ink, as a fraction of its height."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"]
    target = f"--print-to-pdf={folder / 'page.pdf'}"
    for command in (
        ["chromium", *options, target, page.resolve().as_uri()],
        ["pdftoppm", "-gray", "-r", "20", str(folder / "page.pdf"), str(folder / page.stem)],
    ):
        subprocess.run(command, check=True, capture_output=True)
    ends = []
    for file in sorted(folder.glob(f"{page.stem}-*.pgm")):
        _, size, _, pixels = file.read_bytes().split(b"\n", 3)
        width, height = map(int, size.split())
        rows = np.frombuffer(pixels, np.uint8).reshape(height, width).min(axis=1) < 200
        ends.append(rows.nonzero()[0].max(initial=0) / height)
        file.unlink()
    return ends


@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("pdftoppm")),
    reason="needs chromium and pdftoppm (poppler) on the PATH",
)
def test_no_printed_page_is_blank(built, tmp_path):
    report.main([*compared(tmp_path), "--html", str(tmp_path / "all.html")])
    for page in (built[0] / "report.html", tmp_path / "all.html"):
        *whole, last = printed(page, tmp_path)
        assert min(whole, default=1.0) > 0.6 and last > 0.1, (page, whole, last)


def test_rebuild_gives_the_same_bytes_and_leaves_nothing(built):
    folder, _, text = built
    assert one_run.build(folder).path.read_text(encoding="utf-8") == text
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("gone", ["evals", "metrics.jsonl"])
def test_missing_pieces_are_named(tmp_path, gone):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / gone
    for file in path.glob("*") if path.is_dir() else [path]:
        file.unlink()
    text = Page(one_run.build(tmp_path / "run").path.read_text(encoding="utf-8")).text
    assert ("No curves" if gone == "metrics.jsonl" else "No truth ratios") in text


def test_retain_log_in_place_of_the_oracle(tmp_path):
    write_run(tmp_path / "other", seed=1)
    log = tmp_path / "other" / "evals" / "oracle.json"
    write_run(tmp_path / "run", oracle=False, retain_log=str(log))
    text = Page(one_run.build(tmp_path / "run").path.read_text(encoding="utf-8")).text
    assert "no oracle of its own; the retain log takes its place" in text
    run = runlogs.tables.load_run(tmp_path / "run")
    assert set(runlogs.read_evals(run)) == {"original", "oracle", "unlearned"}


def test_a_retain_log_of_the_older_form(tmp_path, shared):
    write_run(tmp_path / "run", oracle=False)
    path = tmp_path / "run" / "config.json"
    log = shared / "data" / "tofu_eval_logs" / "llama2-7b_retain90.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"retain_log": str(log)}))
    logs = runlogs.read_evals(runlogs.tables.load_run(tmp_path / "run"))
    assert len(truth_ratios(logs["oracle"])) == 300
    text = Page(one_run.build(tmp_path / "run").path.read_text(encoding="utf-8")).text
    assert "oracle · ROUGE-L" not in text


def test_steps_of_a_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [("original", 0, 3.0), ("original", 1, 2.0), ("original", 1, 2.5)]
    path.write_text(
        "".join(json.dumps({"stage": s, "step": i, "loss": v}) + "\n" for s, i, v in rows)
    )
    assert [r["loss"] for r in steplog.read_steps(path)] == [3.0, 2.5]
    path.write_text('{"stage": "original"}\n' + path.read_text())
    said: list[str] = []
    assert [r["loss"] for r in steplog.read_steps(path, said.append)] == [3.0, 2.5]
    assert len(said) == 1 and str(path) in said[0] and "first is line 1" in said[0]
    assert steplog.read_steps(tmp_path / "absent") == []


@pytest.mark.parametrize(
    "prompt",
    [
        "Who is it?",
        "[INST] Who is it? [/INST]",
        "Question: Old?\nAnswer: yes\n\nQuestion: Who is it?\nAnswer: ",
        "<|im_start|>system\nhelp<|im_end|>\n<|im_start|>user\nWho is it?<|im_end|>\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho is it?<|eot_id|>",
        "system\n\nYou are a helpful assistant.user\n\nWho is it?assistant\n\n",
    ],
)
def test_question_of(prompt):
    assert runlogs.question_of(prompt) == "Who is it?"


def test_ks_gap_of_the_picture_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=40), rng.normal(0.7, size=55)
    x = np.sort(np.concatenate([a, b]))
    gap = np.abs(plots.ecdf(a, x) - plots.ecdf(b, x)).max()
    assert gap == pytest.approx(ks_2samp(a, b).statistic, abs=1e-12)


def test_leak_curve_ends():
    scores = np.random.default_rng(0).uniform(size=(7, 20))
    ks, values = plots.leak_curve(scores)
    assert ks[0] == 1 and ks[-1] == 20 and (np.diff(values) > 0).all()
    assert values[0] == pytest.approx(scores.mean())
    assert values[-1] == pytest.approx(scores.max(1).mean())


BASE = {
    "original": {
        "forget_rouge": 1.0, "retain_rouge": 1.0, "forget_quality": 1e-6, "model_utility": 0.3,
        "privleak": -99.0, "mia_min_k_auc": 0.99, "retain_fact_recall": 1.0,
    },
    "oracle": {
        "forget_rouge": 0.3, "forget_oracle_nll": 0.5, "forget_base_nll": 0.5,
        "model_utility": 0.24, "retain_probability": 1.0,
    },
    "unlearned": {
        "forget_rouge": 0.3, "retain_rouge": 0.99, "forget_quality": 0.2,
        "repeated_bigram_rate": 0.0, "forget_oracle_nll": 1.5, "forget_unreadable": 0.05,
        "privleak": -20.0, "mia_min_k_auc": 0.6,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "index, change, state",
    [
        (0, {}, "good"),
        (0, {"forget_rouge": 0.46}, "mixed"),
        (0, {"forget_rouge": 0.9}, "bad"),
        (1, {}, "good"),
        (1, {"retain_rouge": 0.9}, "mixed"),
        (1, {"retain_rouge": 0.2}, "bad"),
        (1, {"model_utility": 0.23}, "good"),  # the oracle has 0.24, the original 0.3
        (1, {"model_utility": 0.21}, "mixed"),
        (1, {"model_utility": 0.2}, "bad"),
        (1, {"retain_probability": 0.9}, "mixed"),  # the oracle has 1.0
        (1, {"retain_fact_recall": 0.7}, "bad"),  # the original has 1.0, the oracle no value
        (1, {"retain_rouge": None, "model_utility": None}, "unknown"),
        (2, {}, "good"),
        (2, {"repeated_bigram_rate": 0.06}, "mixed"),
        (2, {"repeated_bigram_rate": 0.06, "forget_oracle_nll": 3.0}, "bad"),
        (2, {"forget_oracle_nll": None, "forget_base_nll": 1.8}, "mixed"),
        (2, {"forget_unreadable": 0.1}, "mixed"),
        (2, {"forget_unreadable": 0.375}, "bad"),
        (2, {"forget_unreadable": 1.0, "forget_oracle_nll": None}, "bad"),
        (2, {"forget_unreadable": None}, "unknown"),
        (3, {}, "good"),
        (3, {"forget_quality": 0.01}, "mixed"),
        (3, {"forget_quality": 2e-6}, "bad"),
        (3, {"forget_quality": float("nan")}, "unknown"),
        (4, {}, "good"),
        (4, {"privleak": -40.0}, "mixed"),
        (4, {"privleak": -95.0}, "bad"),
        (4, {"privleak": 60.0}, "mixed"),
        (4, {"privleak": None}, "unknown"),
    ],
)
def test_verdict(index, change, state):
    summary = BASE | {"unlearned": BASE["unlearned"] | change}
    assert verdict.verdicts(summary)[index].state == state


GOOD = "Forgotten, kept, readable, not told apart from the oracle, no longer a member"
OTHERS = GOOD.replace("kept, ", "").lower()


@pytest.mark.parametrize(
    "change, says",
    [
        ({}, f"{GOOD}: 5 of 5 limits met."),
        ({"model_utility": 0.2}, f"Damaged; {OTHERS}: 4 of 5 limits met."),
        ({"forget_rouge": 0.9, "privleak": None}, "Not forgotten; kept, readable, not told apart "
         "from the oracle: 3 of 4 limits met. Not measured: 1 of 5 limits."),
    ],
)  # fmt: skip
def test_one_line_above_all(tmp_path, capsys, change, says):
    summary = write_run(tmp_path / "run")
    for model, flat in BASE.items():
        kept = {name: summary[model][name] for name in ("params_sha256", "num_parameters")}
        summary[model] = kept | flat
    summary["unlearned"] = {
        k: v for k, v in (summary["unlearned"] | change).items() if v is not None
    }
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    says += " Not tested: relearning, quantisation."
    assert report.main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == says
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    places = [text.index(part) for part in (says, 'id="verdict"', 'id="answers"', 'id="numbers"')]
    assert places == sorted(places)
    run = runlogs.tables.load_run(tmp_path / "run")
    assert f"**{says}**" in card.of_run(run, runlogs.read_evals(run))


def test_an_attack_that_was_made_is_not_called_untested(tmp_path):
    summary = write_run(tmp_path / "run")
    summary["relearned"] = summary["unlearned"]
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert one_run.build(tmp_path / "run").verdict.line.endswith("Not tested: quantisation.")


def test_the_title_says_what_was_forgotten_from_what(tmp_path):
    write_run(tmp_path / "run", model={"path": "models/llama-small", "hidden_size": 128})
    assert "<h1>quickstart, asu, seed 0</h1>" in one_run.build(tmp_path / "run").path.read_text()
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    about["subject"] = "the rows of facts.jsonl"
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    text = one_run.build(tmp_path / "run").path.read_text()
    assert "<h1>The rows of facts.jsonl, forgotten by llama-small</h1>" in text
    assert '<p class="soft">quickstart, asu, seed 0</p>' in text


@pytest.mark.parametrize("utility, state", [(0.23, "good"), (0.21, "mixed")])
def test_utility_of_fewer_parts_is_judged_and_shown_as_what_it_is(utility, state):
    summary = BASE | {"unlearned": BASE["unlearned"] | {"model_utility": utility}}
    summary = {
        model: {k.replace("model_utility", "model_utility_of_3"): v for k, v in flat.items()}
        for model, flat in summary.items()
    }
    assert verdict.verdicts(summary)[1].state == state
    metric = metrics_table.describe("model_utility_of_3")
    assert metric.main and metric.better == "up" and metric.label == "Model utility, 3 parts"
    names = ["privleak", "model_utility_of_3", "world_facts_rouge"]
    assert metrics_table.ordered(names) == names[::-1]


def test_verdict_says_when_the_test_has_no_power():
    summary = BASE | {"original": BASE["original"] | {"forget_quality": 0.3}}
    finding = verdict.verdicts(summary)[3]
    assert (finding.state, finding.answer) == ("unknown", "the test has no power")


@pytest.mark.parametrize(
    "leak, original, says",
    [
        (-40.0, -99.0, "still a member"),
        (-95.0, -99.0, "still a member"),
        (60.0, -99.0, "over-forgotten"),
        (-5.0, -10.0, "the attack has no power"),
    ],
)
def test_membership_says_so(leak, original, says):
    summary = BASE | {
        "original": BASE["original"] | {"privleak": original},
        "unlearned": BASE["unlearned"] | {"privleak": leak},
    }
    finding = verdict.verdicts(summary)[4]
    assert finding.answer == says and "AUC 0.600 (original 0.990)" in finding.text


def test_the_test_of_truth_ratios_in_words(built):
    text = Page(built[2]).text
    assert "compares its truth ratios with the oracle's on 40 questions: p = " in text
    assert "decades" not in verdict.verdicts(BASE)[3].text


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda d: [str(d / "rum")], "did you mean"),
        (lambda d: [str(d)], "not a finished run: no config.json"),
        (lambda d: [], "required: RUN"),
        (lambda d: [str(d / "run"), "--cvs", "x"], "did you mean --csv"),
        (lambda d: [str(d / "run"), "--csv", str(d / "none" / "x.csv")], "cannot write"),
        (lambda d: [str(d / "run"), "--csv", str(d / "run/config.json/x.csv")], "cannot write"),
        (lambda d: [str(d / "broken")], "is not valid JSON"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, make, says):
    write_run(tmp_path / "run")
    write_run(tmp_path / "broken")
    (tmp_path / "broken" / "summary.json").write_text('{"original": {')
    assert report.main(make(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_program_starts_without_the_heavy_imports():
    code = (
        "import sys, train.report; train.report.main(['r', '--cvs']); "
        "print([m for m in ('jax', 'matplotlib', 'jinja2', 'rich', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "argv, wanted",
    [
        ("r --html", {"html": "comparison.html"}),
        ("r --html --all", {"html": "comparison.html", "all": "True"}),
        ("--html x.html r", {"html": "x.html"}),
        ("r --csv None", {"csv": "None"}),
        ("r --csv=x --latex y", {"csv": "x", "latex": "y"}),
        ("-- r", {}),
        ("--html r", "error: the following arguments are required: RUN; see python -m "),
        ("r --cvs x", "error: unknown option --cvs; did you mean --csv?\n"),
        ("r --al", "error: unknown option --al; did you mean --all?\n"),
        ("r --no-all", "error: unknown option --no-all; did you mean --all?\n"),
        ("r --zzz", "error: unknown option --zzz; known: --help, --html, --csv, --latex, --all\n"),
        ("r --csv", "error: argument --csv: expected one argument; see python -m "),
    ],
)
def test_arguments(capsys, argv, wanted):
    if isinstance(wanted, str):
        assert report.main(argv.split()) == 2
        assert capsys.readouterr().err.startswith(wanted)
    else:
        found = vars(report._parse(argv.split()))
        assert [*map(str, found.pop("runs"))] == ["r"]
        assert {name: str(value) for name, value in found.items() if value} == wanted


def test_program(tmp_path, capsys):
    write_run(tmp_path / "run")
    assert report.main([str(tmp_path / "run"), "--latex", str(tmp_path / "t.tex")]) == 0
    out = capsys.readouterr().out
    assert "Forget ROUGE-L ≈" in out and "unlearned" in out and "report.html" in out
    assert (tmp_path / "run" / "report.html").exists()
    assert r"\begin{tabular}{lrrr}" in (tmp_path / "t.tex").read_text()
