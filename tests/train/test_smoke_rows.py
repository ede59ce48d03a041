"""`--smoke` of every preset accepts every optimizer and every objective, or says why not."""

import json
import math
from pathlib import Path

import jax
import pytest

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from models.decoder.model import Decoder, DecoderConfig
from train.data.authors import draw
from train.jobs import job, unlearning
from train.options import cli
from train.options.config import replace
from train.options.optimizers import OPTIMIZERS, build, check_steps, over_rows, two_sided
from train.presets import PRESETS, arguments

SHAPES = Decoder(DecoderConfig(32, 8, 12, 4, 2, 1, 4)).shapes()
TOFU = [name for name in PRESETS if name.startswith("tofu-")]
QA = ["quickstart", *TOFU]  # those of reasoning have tests of their own
SIZES = {"forget": 14, "retain": 20, "holdout": 6}


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A small folder with the published splits, which have more rows than a smoke run uses."""
    folder = tmp_path_factory.mktemp("tofu")

    def rows(kind: str, judged: bool) -> list[dict]:
        found = []
        for i in range(SIZES[kind]):
            row = {"question": f"{kind} question {i}?", "answer": f"{kind} {draw(9, 0, kind, i)}."}
            if judged:
                row["paraphrased_answer"] = f"Again {row['answer']}"
                row["perturbed_answer"] = [f"wrong {j}." for j in range(3)]
            found.append(row)
        return found

    options = [
        {"question": f"option {i}?", "answer": "yes", "perturbed_answer": ["no", "so", "go"]}
        for i in range(6)
    ]
    splits = {
        "forget01_perturbed": rows("forget", True),
        "forget10_perturbed": rows("forget", True),
        "retain_perturbed": rows("retain", True)[:16],
        "retain90": rows("retain", False),
        "holdout01": rows("holdout", False),
        "holdout10": rows("holdout", False),
        "real_authors_perturbed": options,
        "world_facts_perturbed": options,
    }
    for name, part in splits.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def words_of(name: str, official: Path, tiny: Path) -> list[str]:
    """A preset's smoke run on a local model and local data, on one device."""
    here = ["--data.path", str(official), "--model.path", str(tiny)] if name in TOFU else []
    return [name, "--smoke", "--mesh.data", "1", "--mesh.fsdp", "1", *here]


@pytest.fixture(scope="module", params=QA)
def prepared(request, official, tiny):
    """A preset's name, its prepared task and how its model is trained."""
    argv = words_of(request.param, official, tiny)
    prepared = job.prepare(unlearning.JOB, arguments.read_arguments(arguments.UNLEARN, argv))
    task, base = prepared.fitted.parts, prepared.model
    return request.param, argv, task, base.learner


def test_every_pair_of_optimizer_and_objective_is_taken_or_refused(prepared, monkeypatch):
    name, argv, task, learner = prepared
    whole = [*argv, "--optimizer.name", "hybrid", "--objective.name", "npo"]
    parsed = arguments.read_arguments(arguments.UNLEARN, whole)
    # The names are in the default that is parsed on: without the parser it is hundreds a second.
    more = {"mesh.data": 1, "mesh.fsdp": 1, "data.path": parsed.data.path}
    more["model.path"] = parsed.model.path
    monkeypatch.setattr(cli, "parse", lambda cls, default, *_: replace(default, **more))
    assert arguments.read_arguments(arguments.UNLEARN, whole) == parsed
    refused = 0
    for optimizer, row in OPTIMIZERS.items():
        for objective in objectives.OBJECTIVES:
            names = ["--optimizer.name", optimizer, "--objective.name", objective]
            config = arguments.read_arguments(arguments.UNLEARN, [*argv, *names])
            if objective == "rmu":  # of the two blocks of the local model
                config = replace(config, **{"objective.layer": 1})
            if objective == "r2mu":
                config = replace(config, **{"objective.block": 1})
            resolved = objectives.resolve(config.objective)
            if row.needs == "split" and not two_sided(*resolved):
                with pytest.raises(UserError) as error:
                    job.check(unlearning.JOB, config)
                line = str(error.value)
                assert "\n" not in line and optimizer in line and objective in line
                assert "needs the gradients of forget and retain" in line
                refused += 1
                continue
            job.check(unlearning.JOB, config)
            if "traces" in resolved[0].streams:
                with pytest.raises(UserError, match="on 'traces', which the data do not have"):
                    unlearning.check_stages(config, task, learner)
                continue
            if "alternate" in resolved[0].streams and "alternate_answer" not in task.forget[0]:
                with pytest.raises(
                    UserError, match="has none; give the rows a column 'alternate_a"
                ):
                    unlearning.check_stages(
                        replace(config, **{"data.alternates": 0}), task, learner
                    )
            unlearning.check_stages(config, task, learner)
            assert (config.optimizer.name, config.objective.name) == (optimizer, objective)
        steps, optimizer = config.unlearn.steps, config.optimizer
        whole = over_rows(optimizer, config.unlearn.batch_size)
        jax.eval_shape(build(whole, steps)[0].init, SHAPES)
    assert 0 < refused < len(objectives.OBJECTIVES)


def test_a_smoke_run_on_files_judges_few_rows(prepared):
    name, _, task, _ = prepared
    if name in TOFU:
        sizes = {split: len(rows) for split, rows in task.evaluation.items()}
        # SmolLM2's also samples other answers and trains on a processor: two minutes are little.
        kept = 2 if name == "tofu-smollm2" else 4
        wanted = {"forget": 4, "retain": kept, "holdout": kept, "real_authors": 2, "world_facts": 2}
        assert sizes == wanted and (len(task.forget), len(task.retain)) == (4, 4)


@pytest.mark.parametrize("name", [name for name in TOFU if "llama" in name])
def test_the_llama_presets_have_the_official_sizes(name, official, tiny):
    argv = [a for a in words_of(name, official, tiny) if a != "--smoke"]
    # The 70B preset's batches are larger than these splits.
    steps = ["--finetune.steps", "1", "--unlearn.steps", "1"]
    config = arguments.read_arguments(arguments.UNLEARN, [*argv, *steps])
    assert config.evaluate.max_new_tokens == 200
    data = config.data
    # All of retain90 is trained on; None means all there are: 100 real authors, 117 world facts.
    assert (data.forget_split, data.retain_split) == ("forget10", "retain90")
    assert data.retain_rows is None
    assert (data.judged_retain_split, data.judged_retain_rows) == ("retain_perturbed", 400)
    assert (data.extra_rows, data.holdout_rows, data.forget_rows) == (None, 400, None)
    task = job.prepare(unlearning.JOB, config).fitted.parts
    assert (len(task.forget), len(task.retain)) == (14, 20)
    sizes = {split: len(rows) for split, rows in task.evaluation.items()}
    assert sizes == {
        "forget": 14, "retain": 16, "holdout": 6, "real_authors": 6, "world_facts": 6,
    }  # fmt: skip
    assert "judged on 16 rows of retain_perturbed, 16 of which are trained on" in task.notes[1]


def finished(done, root: Path) -> None:
    """A run ended well, with finite numbers of all three models."""
    assert done.code == 0, done.err
    summary = json.loads((root / "summary.json").read_text())
    assert list(summary) == ["original", "oracle", "unlearned"]
    assert all(math.isfinite(s["forget_probability"]) for s in summary.values())


def test_hybrids_blocks_shrink_with_a_smoke_run():
    """Six steps are less than a block of 2 x 20; an explicit length or period is kept."""

    def of(name: str, *more: str):
        return arguments.read_arguments(
            arguments.UNLEARN, [name, "--smoke", "--optimizer.name", "hybrid", *more]
        )

    assert [of(name).optimizer.period for name in QA] == [3, 1, 1, 1]
    for more, steps, period in (
        (["--unlearn.steps", "13"], 13, 3),
        (["--optimizer.period", "20"], 6, 20),
    ):
        config = of("quickstart", *more)
        assert (config.unlearn.steps, config.optimizer.period) == (steps, period)
        with pytest.raises(UserError, match="hybrid ends on its zeroth-order steps"):
            check_steps(config.optimizer, steps)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        *(f"optimizer {o}" for o in OPTIMIZERS),
        *(f"objective {o}" for o in objectives.OBJECTIVES if o != "r2mu"),  # needs thoughts
    ],
)
def test_every_row_runs(program, small, cache, tmp_path, row):
    option, name = row.split()
    # Originals and oracles are the same for all rows, so each is trained once.
    options = ["--finetune.steps", "4", "--stage.cache", cache, f"--{option}.name", name]
    root = tmp_path / "run"
    done = program("train.unlearn", "quickstart", "--smoke", *small, *options, "--output", root)
    finished(done, root)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOFU)
def test_every_preset_runs(program, official, tiny, tmp_path, name):
    root = tmp_path / "run"
    done = program("train.unlearn", *words_of(name, official, tiny), "--output", root)
    finished(done, root)
