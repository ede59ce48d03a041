"""Every optimizer with every combiner on the quickstart model: one table (slow).

make test ARGS="-m slow tests/train/test_grid.py -s -n 0"
"""

import json
import math
from pathlib import Path

import pytest

from jaxlib_unlearn.errors import UserError
from train import unlearn
from train.options import start
from train.options.config import replace
from train.options.optimizers import COMBINERS, OPTIMIZERS
from train.presets import PRESETS

COLUMNS = ("forget_quality", "forget_rouge", "retain_rouge", "model_utility_of_3", "leak_at_32")
PRESET = PRESETS["quickstart"]


def judge(name: str, combine: str, folder: Path) -> dict | str:
    """The numbers of one pair, or the line that refuses it."""
    config = start.tuned(PRESET.PRESET, name, PRESET)
    changes = {"mesh.data": 1, "unlearn.curve_points": 0, "stage.cache": folder / "cache"}
    # ASU, with which the learning rates of the optimizers were chosen.
    config = replace(config, objective=PRESET.OTHER_DATA, combine=combine)
    config = replace(config, output=folder / f"{name}-{combine}", **changes)
    try:
        root = unlearn.run(config)
    except UserError as error:
        assert not (folder / f"{name}-{combine}").exists() and "\n" not in str(error)
        return str(error)
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    mine = [line for line in lines if line["stage"] == "unlearned"]
    minutes = json.loads((root / "run.json").read_text())["minutes"]
    summary = json.loads((root / "summary.json").read_text())
    assert (root / "report.html").exists() and len(mine) == config.unlearn.steps
    return {
        **{key: summary["unlearned"][key] for key in COLUMNS},
        "steps": len(mine),
        "seconds": 60 * minutes["unlearned"],
        "step MiB": max(line.get("step_mib", 0.0) for line in mine),
    }


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    return {(n, c): judge(n, c, folder) for n in OPTIMIZERS for c in COMBINERS}


def table(grid: dict) -> str:
    """Markdown, one row per pair; a dash where the two do not go together."""
    names = (*COLUMNS, "steps", "seconds", "step MiB")
    lines = ["| optimizer | combine | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for (name, combine), found in grid.items():
        cells = ["–"] * len(names)
        if isinstance(found, dict):
            cells = [f"{found[key]:.3g}" for key in names]
        lines.append(f"| {name} | {combine} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@pytest.mark.slow
def test_every_pair_runs_or_says_why(grid):
    print("\n" + table(grid))
    for (name, combine), found in grid.items():
        if OPTIMIZERS[name].needs == "joint" or combine == "sum":
            assert isinstance(found, dict), found
            assert all(math.isfinite(value) for value in found.values()), (name, combine)
        else:
            assert isinstance(found, str) and f"--combine {combine}" in found and name in found


@pytest.mark.slow
def test_gradients_forget_and_keep(grid):
    """Every optimizer that sees gradients forgets most of it and keeps the rest."""
    for (name, combine), found in grid.items():
        if isinstance(found, dict) and OPTIMIZERS[name].needs in ("joint", "split"):
            assert found["forget_rouge"] < 0.6 and found["retain_rouge"] > 0.9, (name, combine)


@pytest.mark.slow
def test_zeroth_order_needs_less_memory(grid):
    for name in ("mezo", "zo-muon"):
        assert grid[name, "sum"]["step MiB"] < 0.8 * grid["adamw", "sum"]["step MiB"]
