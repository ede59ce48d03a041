"""Defending a model: the span of attack tokens is taken out of its token embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.concepts import project, span
from jaxlib_unlearn.errors import UserError
from models.diffusion.denoiser import TEXT
from train.engine.run import Work, compute, phase
from train.jobs import diffusion, job
from train.jobs.diffusing import stored
from train.jobs.diffusing.attack_files import Stored, check_embeddings, read_for
from train.jobs.diffusing.config import DefendRun
from train.jobs.diffusing.drawing import Shield
from train.jobs.diffusing.held import Painter
from train.jobs.diffusing.judges import Judge
from train.jobs.diffusing.judging import Shown
from train.jobs.diffusing.stored import PROJECTION, Source
from train.jobs.job import Job, Started
from train.options.roles import NONE, Roles
from train.runtime import distributed, files, seal
from train.runtime.sharding import put_params
from train.tasks.pictures import Pictures


class Target(NamedTuple):
    """The model that is defended, and the models beside it.

    Args:
        source: the run of the defended model.
        original: the model before anything was erased.
        model: the model of that run.
        judge: the classifier.
        concept: the number of the class that was erased.
        attack: the tokens that were found for it.
    """

    source: Source
    original: Painter
    model: Painter
    judge: Judge
    concept: int
    attack: Stored

    def to_host(self) -> Target:
        """The same record with its models in host memory."""
        return self


def run(config: DefendRun, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder, which is held meanwhile.

    Args:
        config: the configuration.
        command: the command line that repeats the run, for its page.
    """
    with job.start(JOB, config, command) as started:
        # 1. The model, and the tokens that bring the concept back.
        aim = started.model

        # 2. Take the span of the tokens out of the embeddings.
        changed, table, basis = defended(started, aim)

        # 3. Judge the model without and with the defence, by the same prompts and tokens.
        known = [aim.attack.folder, aim.source.folder]
        summary = diffusion.judge(started, aim.judge, shown(aim, changed), aim.concept, known)

        # 4. Hand it back, and show.
        export(started, table, basis, aim.judge)
        return job.end(started.run, summary)


def check(config: DefendRun, mesh: Any) -> None:
    """Raise `UserError` for a run and an attack that do not go together."""
    source = stored.read_run(config.run, "RUN", ("train.erase",))
    attack = read_for(source, config.attack, "ATTACK")
    count, wanted = len(attack.tokens.embeddings), config.defend.tokens
    if wanted is not None and wanted > count:
        raise UserError(
            f"--defend.tokens {wanted}: ATTACK {attack.folder} has {count}; give at most these"
        )


def load(config: DefendRun) -> Pictures:
    """The images, which must contain the erased class."""
    found = diffusion.read(config)
    source = stored.read_run(config.run, "RUN", ("train.erase",))
    assert source.concept is not None
    found.class_of(source.concept)
    return found


def model(config: DefendRun, found: Pictures, mesh: Any) -> Target:
    """The model of the run that is defended, and the tokens that were found for it."""
    source = stored.read_run(config.run, "RUN", ("train.erase",))
    attack = read_for(source, config.attack, "ATTACK")
    assert source.concept is not None
    concept = found.class_of(source.concept)
    original = stored.original_of(source, mesh)
    what = f"ATTACK {attack.folder}"
    check_embeddings(attack.embeddings, original, what, f"RUN {source.folder}")
    painter = stored.painter_of(source, mesh)
    return Target(source, original, painter, stored.judge_of(source, mesh), concept, attack)


JOB = Job("train.defend", Roles("original", NONE, "defended"), check, load, model, diffusion.fit)


def basis_of(started: Started, aim: Target) -> np.ndarray:
    """Orthonormal columns `(d, K)` that span the tokens."""
    tokens = aim.attack.tokens.embeddings[: started.config.defend.tokens]
    return np.asarray(span(np.asarray(tokens, np.float64)), np.float32)


def project_table(work: Work, model: Any, basis: Any, spare: Any) -> Any:
    """The parameters of a model, its vocabulary projected to have no part in a span."""
    params = model.to_device().params
    text = params[TEXT]
    table = text["embed"]["embedding"]
    shut = jax.jit(project)(table, jnp.asarray(basis, jnp.float32))
    for token in spare:
        shut = shut.at[token].set(table[token])
    changed = {**params, TEXT: {**text, "embed": {"embedding": shut}}}
    return put_params(changed, work.mesh, model.learner.rules)


def defended(started: Started, aim: Target) -> tuple[Shown, Painter, np.ndarray]:
    """The defended model as it is used, the variant with a projected table, and the span."""
    config = started.config.defend
    basis = basis_of(started, aim)
    spare = stored.special_of(aim.model) if config.skip_special else ()
    with phase(started.run, "projected"):
        made: Any = compute(
            started.run,
            "projected",
            project_table,
            kind="project table",
            version=1,
            like=aim.model.denoiser,  # pyright: ignore[reportArgumentType]
            model=aim.model.denoiser,
            basis=basis.tolist(),
            spare=list(spare),
        )
    table = aim.model._replace(denoiser=made.to_host())
    if config.where == "table":
        return Shown(table), table, basis
    return Shown(aim.model, shield=Shield(basis, spare)), table, basis


def shown(aim: Target, changed: Shown) -> dict[str, tuple[Shown, Any]]:
    """The models to judge, before, without and with the defence, and the prompts of each."""
    kinds = ("explicit", "names", "attacked", "kept")
    before = ("explicit", "names", "kept")
    tokens = aim.attack.tokens
    return {
        "original": (Shown(aim.original), before),
        "erased": (Shown(aim.model, tokens), kinds),
        "defended": (changed._replace(tokens=tokens), kinds),
    }


def export(started: Started, table: Painter, basis: np.ndarray, judge: Judge) -> None:
    """Write `RUN/export`: the variant with a projected table, and `projection.safetensors`."""
    from safetensors.numpy import save

    what = (
        "A text-to-image model whose vocabulary has no part in the span of attack tokens. "
        f"{PROJECTION} holds that span, to be taken out of all embeddings that enter the text "
        "encoder: the projected vocabulary alone does not stop an embedding of no word."
    )
    diffusion.export(started, table, judge, what)
    target = started.run.folder / "export"
    data = save({"basis": np.ascontiguousarray(basis)})

    def put() -> None:
        made_from = (seal.read(target) or ("", {}))[0]
        if not (target / PROJECTION).is_file() or (target / PROJECTION).read_bytes() != data:
            files.write(target / PROJECTION, data)
            seal.put(target, made_from)

    with phase(started.run, "export"):
        distributed.of_first(put)
