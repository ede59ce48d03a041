"""Tables over runs: grouping by seed, mean and spread, CSV and LaTeX."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from train.evaluators.tofu import LOG10_P
from train.reporting import metrics_table, tables


def run(objective="asu", seed=0, output="a", p=0.01, rouge=0.3, digest=None, **config):
    """A run in memory."""
    config = {
        "preset": "quickstart",
        "seed": seed,
        "output": output,
        "data": {"seed": seed, "forget_split": "forget10"},
        "objective": {"name": objective, "temperature": 20.0 if objective == "asu" else None},
    } | config
    first = {"forget_rouge": 1.0, "params_sha256": digest or f"d{seed}"}
    last = {"forget_rouge": rouge, "forget_quality": p, "leak_at_1": 0.2, "leak_at_8": 0.4}
    return tables.Run(Path(output), config, {"original": first, "unlearned": last})


def test_runs_that_differ_by_seed_are_aggregated():
    rng = np.random.default_rng(0)
    values, ps = rng.uniform(size=5), 10.0 ** rng.uniform(-9, 0, size=5)
    runs = [
        run(seed=i, output=f"r{i}", rouge=float(v), p=float(p))
        for i, (v, p) in enumerate(zip(values, ps, strict=True))
    ]
    (original, unlearned) = tables.columns(runs)
    assert (original.model, unlearned.model) == ("original", "unlearned")
    assert unlearned.n == 5 and unlearned.seeds == (0, 1, 2, 3, 4)
    cell = unlearned.cells["forget_rouge"]
    assert cell.mean == pytest.approx(np.mean(values), rel=1e-14)
    assert cell.sd == pytest.approx(np.std(values, ddof=1), rel=1e-14)
    decades = unlearned.cells[LOG10_P]
    assert decades.mean == pytest.approx(np.mean(np.log10(ps)), rel=1e-14)
    assert decades.sd == pytest.approx(np.std(np.log10(ps), ddof=1), rel=1e-14)


def test_other_differences_make_groups_with_telling_labels():
    runs = [run("asu", 0, "a"), run("asu", 1, "b"), run("npo", 0, "c"), run("npo", 1, "d")]
    found = tables.groups(runs)
    assert [(label, len(members)) for label, members in found] == [("asu", 2), ("npo", 2)]
    hot = run(output="e", objective_note=1)
    hot.config["objective"]["temperature"] = 30.0
    labels = [label for label, _ in tables.groups([run(), hot])]
    assert labels == ["temperature=20.0 objective_note=None", "temperature=30.0 objective_note=1"]


def tuned(name, rate, **options):
    one = run(output="-".join(map(str, (name, rate, *options.values()))))
    usual = {"axis": "in", "steps": 5, "momentum": 0.95, "nesterov": name == "muon", "size": 2}
    one.config["optimizer"] = {"name": name, "learning_rate": rate, **usual, **options}
    return one


def test_labels_tell_apart_and_say_only_what_is_uncommon():
    runs = [tuned("muon", rate) for rate in (0.1, 0.2, 0.3)]
    runs += [tuned("teon", rate) for rate in (0.1, 0.2)]
    runs += [
        tuned("teon", 0.1, size=4),
        tuned("teon", 0.1, axis="out"),
        tuned("teon", 0.1, steps=6),
    ]
    labels = [label for label, _ in tables.groups(runs)]
    assert labels == [
        *("muon lr=0.1", "muon lr=0.2", "muon lr=0.3", "teon lr=0.1", "teon lr=0.2"),
        *("teon lr=0.1 size=4", "teon lr=0.1 axis=out", "teon lr=0.1 steps=6"),
    ]


def test_labels_are_distinct_whatever_the_options():
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 2, (40, 8))
    runs = [
        tuned("teon", int(row[0]), **{f"o{i}": int(x) for i, x in enumerate(row[1:])})
        for row in drawn
    ]
    labels = [label for label, _ in tables.groups(runs)]
    assert len(labels) == len({tuple(row) for row in drawn.tolist()}) == len(set(labels))
    alike = [tuned("teon", 0.1, size=size)._replace(folder=Path(repr(size))) for size in (1, "1")]
    labels = [label for label, _ in tables.groups(alike)]
    assert labels == ["size=1 (1)", "size=1 (2)"]
    same_end = [tuned("teon", 0.1), tuned("teon", 0.2)]
    same_end[1].config["base"] = {"learning_rate": 3}
    labels = [label for label, _ in tables.groups(same_end)]
    assert labels[1] == "optimizer.learning_rate=0.2 base.learning_rate=3"


def test_an_option_without_a_value_is_as_none_at_all():
    """Of a run of before, whose program did not have it."""
    old, new = tuned("teon", 0.1), tuned("teon", 0.1)._replace(folder=Path("new"))
    new.config.update(smoke=False, later=None)
    assert [len(members) for _, members in tables.groups([old, new])] == [2]
    new.config["later"] = 1
    labels = [label for label, _ in tables.groups([old, new])]
    assert labels == ["later=None", "later=1"]


def test_smoke_runs_are_labelled():
    smoke, real = run(output="s", smoke=True), run(output="r", smoke=False)
    assert {c.label for c in tables.columns([smoke])} == {"SMOKE"}
    labels = [label for label, _ in tables.groups([smoke, real])]
    assert labels[0].startswith("SMOKE") and "SMOKE" not in labels[1] and labels[1]


def test_the_same_folder_twice_counts_once():
    assert tables.columns([run(), run()])[0].n == 1


def test_a_model_that_groups_share_appears_once():
    cols = tables.columns([run("asu", output="a"), run("npo", output="b")])
    names = [(c.label, c.model) for c in cols]
    assert names == [("", "original"), ("asu", "unlearned"), ("npo", "unlearned")]
    other = tables.columns([run("asu", output="a"), run("npo", output="b", digest="x")])
    assert len(other) == 4


def test_missing_and_nan_values_are_left_out():
    a, b = run(seed=0, output="a"), run(seed=1, output="b", rouge=math.nan)
    cell = tables.columns([a, b])[1].cells["forget_rouge"]
    assert (cell.n, cell.sd) == (1, None)
    assert "forget_quality" not in tables.columns([a])[0].cells


def test_csv_keeps_every_digit():
    cols = tables.columns([run(seed=i, output=str(i), rouge=0.1 + i / 3) for i in range(3)])
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(cols))))
    row = next(r for r in rows if r["model"] == "unlearned" and r["metric"] == "forget_rouge")
    expected = [0.1 + i / 3 for i in range(3)]
    assert float(row["mean"]) == pytest.approx(np.mean(expected), rel=1e-15)
    assert float(row["sd"]) == pytest.approx(np.std(expected, ddof=1), rel=1e-15)
    assert (row["n"], row["seeds"]) == ("3", "0 1 2")


def test_latex():
    cols = tables.columns([run("a_b&c%", seed=i, output=str(i), p=4e-22) for i in (0, 1)])
    text = tables.to_latex([c._replace(label="a_b&c% {x}") for c in cols])
    assert r"a\_b\&c\% \{x\}" in text and "a_b" not in text
    assert r"original ($n=2$)" in text and r"$0.300 \pm 0.000$" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert all(line.count(" & ") == 2 for line in body)
    single = tables.to_latex(tables.columns([run(p=4e-22)]))
    assert r"$4.0\times 10^{-22}$" in single and r"\approx" in single and "–" not in single


def test_escape_tex_covers_every_special():
    text = tables.escape_tex(r"\ & % $ # _ { } ~ ^")
    assert text == (r"\textbackslash{} \& \% \$ \# \_ \{ \} \textasciitilde{} \textasciicircum{}")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_terminal_fits_the_width(width):
    names = ("asu", "npo", "simnpo", "graddiff")
    runs = [run(name, s, f"{name}{s}") for name in names for s in (0, 1)]
    out = io.StringIO()
    console = Console(file=out, width=width)
    for table in tables.terminal(tables.columns(runs), width):
        console.print(table)
    text = out.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    for name in names:
        assert name in text
    assert "…" not in text and "0.300 ± 0.000" in text and "(n=2)" in text
    assert "Leak@1 " in text and "Leak@8 " in text


def test_labels_are_not_markup():
    cols = [c._replace(label="[red]x[/red]") for c in tables.columns([run()])]
    out = io.StringIO()
    for table in tables.terminal(cols, 120):
        Console(file=out, width=120).print(table)
    assert "[red]x[/red]" in out.getvalue()


@pytest.mark.parametrize(
    "value, text",
    [
        (0.1234567, "0.123"), (1.0, "1.000"), (0.0, "0"), (-0.0001234, "-1.2e-04"), (1, "1"),
        (-99.464, "-99.5"), (999.94, "999.9"), (999.96, "1,000"), (12345.6, "12,346"),
        (float("nan"), "–"), (None, "–"), (float("inf"), "inf"), ("x", "–"), (True, "–"),
    ],
)  # fmt: skip
def test_format_number(value, text):
    assert metrics_table.format_number(value) == text


def test_spread_has_the_decimals_of_the_mean():
    pairs = ((0.0, 0.01), (5.0, 0.01), (55.0, 5), (999.96, 2), (5555.0, 1500))
    cells = [tables.Cell(mean, sd, 3) for mean, sd in pairs]
    texts = [cell.text() for cell in cells]
    assert texts == ["0 ± 0.010", "5.000 ± 0.010", "55.0 ± 5.0", "1,000 ± 2", "5,555 ± 1,500"]


def test_metric_table_is_complete_and_ordered():
    known = metrics_table.metrics()
    assert len({m.name for m in known}) == len(known) > 30
    assert all(m.words and m.better in metrics_table.ARROWS for m in known)
    names = metrics_table.ordered(
        ["zzz", "leak_at_16", "leak_at_2", "retain_rouge", "forget_rouge"]
    )
    assert names == ["forget_rouge", "retain_rouge", "leak_at_2", "leak_at_16", "zzz"]


def test_load_run_reads_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "summary.json").write_text(json.dumps({"unlearned": {"x": 1.5}, "notes": ["n"]}))
    assert tables.load_run(tmp_path).summary == {"unlearned": {"x": 1.5}}
    assert tables.load_run(tmp_path).notes == ("n",)
    (tmp_path / "summary.json").write_text('{"original": {}}')
    with pytest.raises(tables.UserError, match="no model 'unlearned'"):
        tables.load_run(tmp_path)
