"""The key of a stage: every field of the configurations of model and run is in it, or why not.

Nothing is computed: stages and evaluations only return the digest of their inputs.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import pytest
from fields import another, leaves

from models import DecoderConfig
from models.decoder.layers import RopeScaling
from train.data import references, streams
from train.data.examples import Example
from train.engine import base_models, keys
from train.engine.keys import WHY_NOT
from train.engine.run import Run
from train.evaluators import judging
from train.jobs import unlearning_stages
from train.options import cli
from train.options.config import OBJECTIVE, RunConfig, replace
from train.options.optimizers import ROWS as OPTIMIZER
from train.presets import PRESETS
from train.runtime import sharding
from train.runtime.stages import digest
from train.tasks import load_task
from train.tasks.task import prompt_format

# Other values, for fields where adding one or taking the next choice will not do.
OTHER: dict[str, Any] = {
    "train.leaves": ("down",),
    "train.blocks": (1,),
    "objective.reference": "fork",
    "data.source": None,  # the other source needs files: its rows are in `streams`
    "data.path": None,
    "data.forget_split": None,  # generated authors have one; rows are in `streams`
    "data.retain_rows": None,  # of TOFU's files; rows are in `streams`
    "data.extra_rows": None,
    "data.retain_split": None,  # of TOFU's files, as the next three; rows are in `streams`
    "data.judged_retain_split": None,
    "data.judged_retain_rows": 3,
    "data.revision": None,
    "data.forget": None,  # the user's files; rows are in `streams`
    "data.retain": None,
    "data.holdout": None,
    "data.columns": None,  # of these files
    "data.few_shot": None,  # a file; its rows are in `streams` and in the evaluation's format
    "data.reasoning": None,  # a file of another source; its rows are in `streams`
    "data.reasoning_rows": None,
    # Of objectives that are trained on traces: these are in `streams`, and in a key of their own.
    "traces.segments": None,
    "traces.new_tokens": None,
    "traces.keep": None,
    "traces.trigger": None,
    "traces.tag": None,
    "traces.path": None,
    "evaluate.judge_model": Path("judge"),
    "data.alternates": None,  # of rows that bring none; rows and count are in `streams`
    "data.alternate_temperature": None,  # the answers are in `streams`
    "data.template": "question-answer",
    "data.template_date": None,  # of chat templates, which a tokenizer trained in the run has not
    "model.revision": None,  # of what is loaded, as `model.path`
    "objective.push": 0.7,
    "objective.contrast": 0.7,
    "objective.spare_end": 2,
    "data.seed": 7,
    "data.system_prompt": "Be brief.",
    "data.max_length": 40,
    "data.row_tokens": 320,
    "model.path": None,  # what is loaded: its parameters' digest is in `start`
    "model.hidden_size": 64,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.vocab_size": 400,
    "model.dtype": "bfloat16",
    "model.remat": "full",
    "stage.original": None,  # a model that is loaded, as `model.path`
    "objective.name": "npo",
    "objective.retain": "kl",
    "objective.layers": (0,),
    "objective.reflection_words": ("Hmm",),
    "objective.reflection_ids": (7,),
    "objective.topics": ("art", "law"),
    "objective.compat": None,
    "lora.alpha": 3.0,
    "lora.targets": ("q",),
    "evaluate.judge": "base",
    "evaluate.leak_question": "paraphrased_question",
    "evaluate.leak_top_p": 0.5,
    "combine": "blur",
    "output": Path("elsewhere"),
    "stage.cache": Path("cache"),
    "profile": Path("trace"),
    "retain_log": Path("log.json"),
    "export_dtype": "bfloat16",
    "family": "qwen2",
    "rope_scaling": RopeScaling("linear", 2.0),
    "sliding_window": 8,
    "dtype": "bfloat16",
    "norm": "layer",
    "positions": "learned",
    "mlp": "plain",
    "activation": "relu",
}


@functools.cache
def prepared(seed: int, data: Any, model: Any):
    """Task and base model."""
    config = replace(START, seed=seed, data=data, model=model)
    task = load_task(config)
    few = {name: rows if name == "holdout" else rows[:4] for name, rows in task.evaluation.items()}
    task = task._replace(forget=task.forget[:8], retain=task.retain[:8], evaluation=few)
    base = base_models.base_model(config, task, sharding.make_mesh(config.mesh))
    return task, base._replace(tokenizer=base.tokenizer.formatted(prompt_format(data)))


START: RunConfig


@pytest.fixture(scope="module", autouse=True)
def start(small):
    global START
    options = "--finetune.steps 4 --unlearn.steps 4 --lora.rank 2 --lora.alpha 2".split()
    options += ["--data.row-tokens", "0"]  # packing is tried out on hundreds of batches
    # ASU with its additions takes the most options.
    asu = replace(PRESETS["quickstart"].OTHER_DATA, push=0.5, contrast=0.5, beta=1.0, delta=0.0)
    preset = replace(PRESETS["quickstart"].PRESET, objective=asu)
    START = cli.parse(RunConfig, preset, [*small, *options], "tests", "")
    patch = pytest.MonkeyPatch()
    # Random weights would be compiled for each shape: here only their shapes and the seed count.
    patch.setattr(
        "models.decoder.model.Decoder.init",
        lambda self, key: jax.tree.map(lambda x: jax.numpy.zeros(x.shape), self.shapes()),
    )
    patch.setattr(
        base_models, "params_sha256", lambda tree: digest(jax.tree.map(lambda x: x.shape, tree))
    )
    yield START
    patch.undo()
    prepared.cache_clear()


def keys_of(config: RunConfig, monkeypatch, change=lambda decoder: decoder) -> dict[str, str]:
    """The key of every stage and evaluation of a run."""
    found: dict[str, str] = {}

    def params_stage(root, name, inputs, like, compute, cache=None):
        found[name] = digest(inputs)
        return like, found[name]

    monkeypatch.setattr("train.engine.run.params_stage", params_stage)
    task, base = prepared(config.seed, config.data, config.model)
    base = base._replace(decoder=change(base.decoder), sha=f"{base.sha} {config.seed}")
    mesh = sharding.make_mesh(config.mesh)
    run = Run(Path("run"), mesh, config.seed, None, config.stage.cache)
    original = unlearning_stages.finetune(run, config, "original", base, task.forget + task.retain)
    oracle = unlearning_stages.finetune(run, config, "oracle", base, task.retain)
    unlearned = unlearning_stages.unlearn(run, config, original, task)
    judge = {"oracle": oracle, "base": base}[config.evaluate.judge]
    for name, model in {"original": original, "unlearned": unlearned}.items():
        asked = (model, task, config.evaluate, config.data, judge, config.seed)
        found[f"evaluate {name}"] = digest(judging.evaluation_inputs(*asked))
    return found


def reason(name: str) -> str | None:
    """Why a field is in no key, if that is so."""
    return next((why for n, why in WHY_NOT.items() if f"{name}.".startswith(f"{n}.")), None)


def test_every_field_of_the_run_is_in_a_key(monkeypatch):
    known = keys_of(START, monkeypatch)
    assert len(known) == 5 and keys_of(START, monkeypatch) == known
    missing, wrong, unchanged = [], [], []
    for name, value in leaves(START):
        other = another(name, value, OTHER)
        if other is None:
            unchanged.append(name)
            continue
        assert other != value, name
        if reason(name) and name.partition(".")[0] in ("mesh", "distributed"):
            continue  # needs devices and processes: tests of the same numbers change these
        config = replace(START, **{name: other})
        base = known
        if name.endswith(".epochs"):  # of them the number of steps is made where none is given
            given = {name.replace("epochs", "steps"): None}
            config, base = replace(config, **given), keys_of(replace(START, **given), monkeypatch)
        if name in ("optimizer.name", "combine", "train.leaves", "train.blocks"):
            config = replace(config, **{"lora.rank": None, "lora.alpha": None})
            base = keys_of(replace(config, **{name: value}), monkeypatch)
        changed = keys_of(config, monkeypatch) != base
        missing += [name] if not changed and not reason(name) else []
        wrong += [name] if changed and reason(name) else []
    assert not missing, "in no key, and no reason given"
    assert not wrong, "a reason is given, and still it is in a key"
    assert set(unchanged) == {n for n, v in OTHER.items() if v is None}
    assert all(any(reason(n) == why for n, _ in leaves(START)) for why in WHY_NOT.values())


@pytest.mark.parametrize("rows", [OBJECTIVE, OPTIMIZER], ids=["objective", "optimizer"])
def test_every_option_of_every_row_is_in_the_key_of_training(rows):
    """Those of the rows in use are tried above; here each row's own, at the stage that reads it."""
    kind = "objective" if rows is OBJECTIVE else "optimizer"
    _, base = prepared(START.seed, START.data, START.model)
    rest = {
        "objective": START.objective, "optimizer": START.optimizer, "combine": "sum", "steps": 4,
        "batch_size": 8, "seed": 0, "adapters": START.lora,
    }  # fmt: skip

    def key(options):
        more = rest | {kind: options}
        return digest(keys.stage_inputs("sha", base.decoder.config, {}, **more))

    found = {}
    for name, row in rows.table.items():
        options = row.options()
        found[name] = key(options)
        for field in dataclasses.fields(options):
            if field.name in ("name", "compat"):
                continue
            other = another(f"{kind}.{field.name}", getattr(options, field.name), OTHER)
            changed = dataclasses.replace(options, **{field.name: other})
            assert key(changed) != found[name], f"{name} {field.name}"
    assert len(set(found.values())) == len(rows.table)


# A field of the model as the training stages see it: the same weights, other conventions.
@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(DecoderConfig)])
def test_every_field_of_the_model_is_in_the_keys_of_training(field, monkeypatch, start):
    config = START

    def change(decoder):
        value = another(field, getattr(decoder.config, field), OTHER)
        return dataclasses.replace(
            decoder, config=dataclasses.replace(decoder.config, **{field: value})
        )

    _, base = prepared(config.seed, config.data, config.model)
    ours, theirs = base.decoder.config, change(base.decoder).config
    assert ours != theirs
    options = {
        "objective": START.objective, "optimizer": START.optimizer, "combine": "sum", "steps": 4,
        "batch_size": 8, "seed": 0, "adapters": START.lora,
    }  # fmt: skip
    stage = [digest(keys.stage_inputs("sha", c, {}, **options)) for c in (ours, theirs)]
    stream = streams.make_stream([Example([1, 2, 3], 1)], 0)
    asked = ("hidden", {}, stream)
    cache = [digest(references.reference_inputs("sha", c, *asked)) for c in (ours, theirs)]
    assert stage[0] != stage[1] and cache[0] != cache[1]


def test_one_cache_does_not_mistake_a_dtype_or_a_rope_theta(monkeypatch):
    """A past bug: the second run reported "found, made from the same inputs"."""
    known = keys_of(START, monkeypatch)

    def with_theta(decoder):
        config = dataclasses.replace(decoder.config, rope_theta=5e5)
        return dataclasses.replace(decoder, config=config)

    for found in (
        keys_of(replace(START, **{"model.dtype": "bfloat16"}), monkeypatch),
        keys_of(START, monkeypatch, with_theta),
    ):
        assert all(found[name] != known[name] for name in known)
