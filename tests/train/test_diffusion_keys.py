"""The keys of diffusion runs: every field of their configurations is in one, or why not.

Nothing is computed: stages only note the digest of their inputs, and return zeros.
"""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from fields import another, leaves

from train.engine.run import Run
from train.jobs import diffusion
from train.jobs.diffusing import defending, erasing, held, judging, token_search
from train.jobs.diffusing.config import AttackRun, DefendConfig, DiffuseRun, EraseRun
from train.jobs.diffusing.judging import Asked, Shown, Tokens
from train.jobs.job import Started
from train.options import optimizers
from train.options.config import identity, replace
from train.presets.arguments import read_arguments
from train.runtime import sharding
from train.runtime.stages import digest
from train.tasks import pictures
from train.tasks.erasure import ATTACKS, ERASING

_GIVEN = "what is found there is in the keys by its digest"
_SAME = "the numbers do not depend on it (losses to 1e-6)"
_NAME = "a name: the options it stands for are in the keys"
# A prefix covers all fields below it.
WHY_NOT = {
    "preset": _NAME,
    "smoke": _NAME,
    "output": "says where results go",
    "stage.cache": _GIVEN,
    "data.path": _GIVEN,
    "model.path": _GIVEN,
    "judge.path": _GIVEN,
    "run": _GIVEN,
    "attack.source": _GIVEN,
    "attack.transfer": _GIVEN,
    "judge.least": "stops the run, and changes nothing",
    "report_to": "further copies of the log",
    "mesh": _SAME,
    "distributed": _SAME,
    "model.remat": _SAME,
    "draw.rows": _SAME + "; noise is an image's own",
    "export_dtype": "of the export, whose seal names it",
    **{
        f"{stage}.{name}": why
        for stage in ("classifier", "vae", "original", "unlearn")
        for name, why in (
            ("accumulate", _SAME),
            ("curve_points", "evaluations during training change nothing"),
            ("checkpoint_seconds", "a run that continues takes the same steps"),
        )
    },
}
# Other values, for fields where adding one or taking the next choice will not do.
OTHER: dict[str, Any] = {
    "data.source": "digits",
    "data.train_rows": 300,
    "data.test_rows": 60,
    "model.path": None,
    "judge.path": None,
    "data.path": None,
    "attack.source": None,
    "attack.transfer": None,
    "run": None,
    "model.hidden_size": 32,
    "model.num_heads": 1,
    "model.length": 25,
    "model.unet_channels": (16, 16),
    "model.vae_channels": (8, 16),
    "model.norm_groups": 2,
    "model.dtype": "bfloat16",
    "model.remat": "full",
    "judge.channels": (8, 16),
    "draw.sampler": "pndm",
    "erase.concept": "bag",
    "erase.towards": "house",
    "erase.positions": "onward",
    "erase.retain": "none",
    "combine": "pcgrad",
    "train.leaves": ("unet",),
    "train.blocks": None,  # the denoiser has no stack of blocks
    "attack.form": "project",
    "attack.positive": "relu",
    "attack.prompt": "a picture of a <v_att>",
    "output": Path("elsewhere"),
    "stage.cache": Path("cache"),
    "export_dtype": "bfloat16",
}
STAGES = ("classifier", "vae", "latents", "original")


def shape_sha(tree: Any, more: Any = None) -> str:
    shapes = jax.tree.map(lambda x: [list(x.shape), str(x.dtype)], tree)
    return digest([str(jax.tree.leaves(shapes)), more])


def zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)


FOUND: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def noted():
    """Stages note their keys; weights are zeros, with digests of their shapes and the seed."""
    patch = pytest.MonkeyPatch()

    def params_stage(root, name, inputs, like, make, cache=None):
        FOUND[name] = digest(inputs)
        return zeros(like), FOUND[name]

    def json_stage(path, inputs, compute, cache=None):
        FOUND[path.stem] = digest(inputs)
        return 1.0

    shapes = {}  # by model: tracing one takes a fifth of a second

    def random(learner, mesh, seed):
        model = digest(learner.identity())
        if model not in shapes:
            shapes[model] = jax.eval_shape(learner.model.init, jax.random.key(0))
        params = zeros(shapes[model])
        return held.Held(learner, params, shape_sha(params, [learner.identity(), seed]))

    def encoded(vae, images, *rest):
        config = vae.model.config
        side = config.sample_size // config.factor
        return np.zeros((len(images), side, side, config.latent_channels), np.float32)

    def token(learner, params):
        width = params["basis"]["embedding"].shape[0]
        return SimpleNamespace(embedding=jax.numpy.ones(width), coefficients=jax.numpy.ones(4))

    patch.setattr("train.engine.run.params_stage", params_stage)
    patch.setattr("train.jobs.diffusing.training.json_stage", json_stage)
    patch.setattr("train.jobs.diffusing.judging.json_stage", json_stage)
    patch.setattr("train.jobs.diffusing.held.random", random)
    patch.setattr("train.jobs.diffusing.drawing.encoded", encoded)
    patch.setattr("train.jobs.diffusing.token_search.params_sha256", shape_sha)
    patch.setattr("train.jobs.diffusing.token_search.jax.jit", lambda function: function)
    patch.setattr("models.diffusion.denoiser.AttackLearner.token", token)
    patch.setattr("jaxlib_unlearn.concepts.words_of", lambda *args: [("word", 1.0)])
    patch.setattr("jaxlib_unlearn.concepts.share_of_top", lambda *args: 1.0)
    yield
    patch.undo()
    loaded.cache_clear()


@functools.cache
def loaded(data, multiple):
    return pictures.load(data, multiple)


def opened(config: Any, given: Any) -> Started:
    mesh = sharding.make_mesh(config.mesh)
    run = Run(Path("run"), mesh, config.seed, None, config.stage.cache)
    found = loaded(config.data, diffusion.multiple_of(config))
    return Started(run, config, found, given, None)


def note_judged(at: Started, judge: Any, model: Shown, concept: int | None, name: str) -> None:
    asked = Asked(at.run, judge, at.rows, concept, at.config.draw, at.config.seed)
    FOUND[name] = digest(judging.inputs_of(asked, model, ("explicit", "attacked", "kept")))


def diffuse_keys(config: Any) -> dict[str, str]:
    """The keys of a run of train.diffuse."""
    FOUND.clear()
    at = opened(config, diffusion.Loaded(None, None))
    judge, painter = diffusion.models(at)
    note_judged(at, judge, Shown(painter), None, "log")
    return dict(FOUND)


def erase_keys(config: Any) -> dict[str, str]:
    """Those of a run of train.erase that makes its models."""
    FOUND.clear()
    at = opened(config, diffusion.Loaded(None, None))
    judge, painter = erasing.models(at)
    model = erasing.erased(at, painter)
    concept = at.rows.class_of(config.erase.concept)
    note_judged(at, judge, Shown(model), concept, "log")
    return dict(FOUND)


@functools.cache
def models() -> tuple[Any, Any]:
    """The judge and the original of the configuration that all tests start from."""
    return diffusion.models(opened(START, diffusion.Loaded(None, None)))


def attack_keys(config: Any) -> dict[str, str]:
    """Those of a run of train.attack."""
    judge, painter = models()
    FOUND.clear()
    at = opened(config, None)
    aim: Any = SimpleNamespace(
        concept=7, shown=Shown(painter), original=painter, source=None, judge=judge, given=None
    )
    tokens = token_search.tokens(at, aim)
    note_judged(at, judge, Shown(painter, tokens), 7, "log")
    return dict(FOUND)


ONE = "--mesh.data 1 --data.train-rows 200 --data.test-rows 50 --original.steps 4".split()
START: DiffuseRun = read_arguments("train.diffuse", ["fashion", "--smoke", *ONE])


def as_run(cls: type, **more: Any) -> Any:
    shared = {f.name for f in dataclasses.fields(START)} & {f.name for f in dataclasses.fields(cls)}
    return cls(**{name: getattr(START, name) for name in shared} | more)


def reason(name: str) -> str | None:
    return next((why for n, why in WHY_NOT.items() if f"{name}.".startswith(f"{n}.")), None)


def compare(start: Any, keys_of: Any, fields: Any) -> set[str]:
    """Every field changes a key or has a reason not to; returns those that were not changed."""
    known = keys_of(start)
    assert keys_of(start) == known
    missing, wrong, unchanged = [], [], set()
    for name, value in fields:
        other = another(name, value, OTHER)
        if other is None:
            unchanged.add(name)
            continue
        assert other != value, name
        if name.partition(".")[0] in ("mesh", "distributed"):
            continue  # needs devices and processes
        config, base = replace(start, **{name: other}), known
        if name.endswith(".epochs") and value is not None:
            given = {name.replace("epochs", "steps"): None}
            config, base = replace(config, **given), keys_of(replace(start, **given))
        changed = keys_of(config) != base
        missing += [name] if not changed and not reason(name) else []
        wrong += [name] if changed and reason(name) else []
    assert not missing, "in no key, and no reason given"
    assert not wrong, "a reason is given, and still it is in a key"
    return unchanged


def test_every_field_of_a_text_to_image_model_is_in_a_key():
    assert {*STAGES, "log", "judge", "latents"} == set(diffuse_keys(START))
    unchanged = compare(START, diffuse_keys, list(leaves(START)))
    assert unchanged == {"data.path", "model.path", "judge.path"}


def test_folders_of_before_are_still_the_runs_that_they_were():
    """Their config.json names the place of the cache."""
    assert identity(START)["stage"] == {"cache": None}
    assert identity(replace(START, **{"stage.cache": Path("x")})) == identity(START)


@pytest.mark.parametrize("name", ERASING.table)
def test_every_field_of_an_erasure_is_in_a_key(name):
    row = ERASING.table[name]
    few = {"images": 6} if row.trains else {}
    adam = optimizers.options_of("adamw", learning_rate=1e-4, schedule="constant")
    start = as_run(EraseRun, erase=row.options(**few), optimizer=adam)
    start = replace(start, **{"unlearn.steps": 4, "unlearn.batch_size": 4})
    mine = ("erase.", *(("unlearn.", "train.", "combine") if row.trains else ()))
    fields = [(n, v) for n, v in leaves(start) if n.startswith(mine) and n != "erase.name"]
    fields += [("draw.steps", START.draw.steps)] if row.trains else []
    assert compare(start, erase_keys, fields) <= {"train.blocks"}
    # A stage's optimizer is in its key as a whole: one field stands for all.
    if row.trains:
        compare(start, erase_keys, [("optimizer.learning_rate", 1e-4)])


@pytest.mark.parametrize("name", sorted({*ATTACKS.table} - {"given"}))
def test_every_field_of_an_attack_is_in_a_key(name):
    row = ATTACKS.table[name]
    known = {f.name for f in dataclasses.fields(row.options)}
    few = {"images": 6, "steps": 3, "tokens": 2, "batch_size": 4, "hidden": 8}
    attack = row.options(**{k: v for k, v in few.items() if k in known})
    start = as_run(AttackRun, run=Path("erased"), attack=attack)
    fields = [(n, v) for n, v in leaves(start) if n.startswith("attack.") and n != "attack.name"]
    assert compare(start, attack_keys, fields) == {"attack.transfer"}
    compare(start, attack_keys, [("seed", 0), ("draw.guidance", START.draw.guidance)])
    if row.trains:
        compare(start, attack_keys, [("optimizer.learning_rate", 1e-3)])


def test_every_field_of_a_defence_is_in_a_key():
    judge, painter = models()
    width = painter.denoiser.model.text.config.hidden_size
    attack = SimpleNamespace(tokens=Tokens(np.eye(3, width, dtype=np.float32)))
    target = SimpleNamespace(attack=attack, model=painter)

    def keys(**options: Any) -> dict[str, str]:
        FOUND.clear()
        at = opened(SimpleNamespace(**vars(START), defend=DefendConfig(**options)), None)
        aim: Any = target
        shown, _, _ = defending.defended(at, aim)
        note_judged(at, judge, shown, 7, "log")
        return dict(FOUND)

    base = keys()
    changes = [{"where": "table"}, {"tokens": 2}, {"skip_special": True}]
    assert {field for change in changes for field in change} == {
        f.name for f in dataclasses.fields(DefendConfig)
    }
    assert len({str(keys(**change)) for change in changes} | {str(base)}) == len(changes) + 1


def test_measured_words_depend_on_the_images_that_were_trained_on():
    """With given models the borders of "dark" and "wide" alone tell these images apart."""
    judge, painter = models()
    at = opened(START, None)
    FOUND.clear()
    note_judged(at, judge, Shown(painter), None, "log")
    known = FOUND["log"]
    assert at.rows.borders is not None
    others = at.rows._replace(borders=at.rows.borders + 0.01)
    note_judged(at._replace(rows=others), judge, Shown(painter), None, "log")
    assert FOUND["log"] != known
