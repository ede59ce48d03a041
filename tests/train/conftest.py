"""Shared by the tests of the programs: running one in-process, a tiny model, small TOFU files."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest


class Done(NamedTuple):
    """A finished program."""

    code: int
    out: str
    err: str


def run_program(module: str, *argv: str | Path) -> Done:
    """`python -m MODULE ARGV` in this process, through the same error handling."""
    import importlib

    from train.options import cli

    main = importlib.import_module(module).main
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", [module, *map(str, argv)]),
    ):
        try:
            cli.main(main)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(autouse=True)
def own_steps():
    """What a test patches does not reach the compiled steps of the next one."""
    yield
    if (loop := sys.modules.get("train.engine.loop")) is not None:
        loop._COMPILED.clear()


@pytest.fixture
def float64(monkeypatch):
    """Nothing is rounded to float32, which the decoder's norms, scores and logits are otherwise."""
    import jax

    with jax.enable_x64(True):
        monkeypatch.setattr(jax.numpy, "float32", jax.numpy.float64)
        yield


@pytest.fixture(scope="session")
def program():
    """`program("train.unlearn", "quickstart", ...) -> (code, out, err)`, in this process."""
    return run_program


@pytest.fixture(scope="session")
def tiny(small, tmp_path_factory) -> Path:
    """The folder of a tiny random model with a tokenizer (2 blocks, context 96)."""
    import models
    from models.files.weights import Loaded
    from train.engine import base_models
    from train.options import cli
    from train.options.config import RunConfig
    from train.presets import PRESETS
    from train.runtime import sharding
    from train.tasks import load_task

    options = [*small, "--data.max-length", "96"]
    config = cli.parse(RunConfig, PRESETS["quickstart"].PRESET, options, "tests", "")
    base = base_models.base_model(config, load_task(config), sharding.make_mesh(config.mesh))
    folder = tmp_path_factory.mktemp("model") / "tiny"
    models.export(Loaded(base.decoder.config, base.params, base.tokenizer), folder)
    return folder


def tofu_row(index: int, kind: str) -> dict:
    """A complete row in TOFU's schema."""
    return {
        "question": f"{kind} question {index}?",
        "answer": f"{kind} answer {index}.",
        "paraphrased_answer": f"{kind} again {index}.",
        "perturbed_answer": [f"{kind} wrong {index} {j}." for j in range(3)],
        "paraphrased_question": f"{kind} asked {index}?",
    }


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def tofu_folder(tmp_path) -> Path:
    """A small data folder in TOFU's layout: 8 forget rows, 12 retain rows, 4 non-members."""
    folder = tmp_path / "data"
    folder.mkdir()
    forget = [tofu_row(i, "forget") for i in range(8)]
    retain = [tofu_row(i, "retain") for i in range(12)]
    others = [tofu_row(i, "other") for i in range(4)]
    plain = [{"question": r["question"], "answer": r["answer"]} for r in (*retain, *others)]
    options = [
        {"question": f"option {i}?", "answer": "yes", "perturbed_answer": ["no", "so", "go"]}
        for i in range(3)
    ]
    write_rows(folder / "forget01_perturbed.json", forget)
    write_rows(folder / "retain_perturbed.json", retain)
    write_rows(folder / "retain99.json", plain)
    write_rows(folder / "real_authors_perturbed.json", options)
    write_rows(folder / "world_facts_perturbed.json", options)
    return folder
