"""Replay a zeroth-order fine-tune from its coefficients: a model from its base and kilobytes.

python -m train.replay RUN_FOLDER_OR_replay.zo --model.path BASE --output DIR
python -m train.replay RUN_FOLDER_OR_replay.zo --model.path BASE --check   (writes nothing)

BASE is the model that the run started from, whose sha256 is in the file. Every 500 steps and at the
end the parameters are compared with those of the run: bit by bit, or with --tolerance by norm.
--steps N makes the model that the run had after N steps, which it never stored.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import option
from models.files.weights import DTYPES
from train.options import cli
from train.runtime.distributed import DistributedConfig
from train.runtime.sharding import MeshConfig
from train.runtime.tracking import say

# The summary's words for a replay that ends before the first milestone.
UNCOMPARED = {"apart": None, "bitwise": None}


@dataclass(frozen=True)
class BaseConfig:
    """The model that the run started from."""

    path: str = option("", "an HF folder, a `.gguf` file, a Hub id or `smollm2`.")
    revision: str | None = option(None, "commit, branch or tag of a Hub id; None: the newest.")


@dataclass(frozen=True)
class ReplayRun:
    """One replay.

    Args:
        source: set by the first argument: a run folder, or its `replay.zo`.
        output: folder to work in; the model goes to `export/` in it.
        check: replay and compare, and write nothing.
        mesh: the devices, on which the result does not depend.
        distributed: the processes, where there are several.
    """

    source: str = ""
    model: BaseConfig = BaseConfig()
    output: Path | None = None
    check: bool = False
    steps: int | None = option(
        None, "steps to take; None: all of the run's, up to its trained model.", low=1
    )
    tolerance: float | None = option(
        None,
        "how far parameters may be from the run's, as a share of their norm (1e-6 for another "
        "platform or version of jax); None: not in a bit.",
        low=0,
        high=1,
    )
    export_dtype: str = option("float32", "dtype of the exported weights.", choices=tuple(DTYPES))
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        if argv:
            cli.parse(ReplayRun, ReplayRun(), ["--help"], "train.replay RUN", "options")
        return
    if argv[0].startswith("-"):
        raise UserError(f"the first argument is a run folder or its replay.zo, got {argv[0]!r}")
    default = ReplayRun(source=argv[0])
    run(cli.parse(ReplayRun, default, argv[1:], "train.replay RUN", "replay a fine-tune"))


def run(config: ReplayRun) -> dict[str, Any]:
    """Replay, compare and export; returns the content of `summary.json`."""
    with contextlib.ExitStack() as held:
        return _run(config, held)


def _run(config: ReplayRun, held: contextlib.ExitStack) -> dict[str, Any]:
    from train.engine.replays import bases, replaying, stored
    from train.engine.step import shaped
    from train.options import checks
    from train.runtime import compiling, distributed, files, folder, remote, sharding
    from train.runtime.checkpointing import params_sha256
    from train.runtime.stages import params_stage, write_atomic

    distributed.start(config.distributed)
    with distributed.together():
        checks.check_numbers(config)
        checks.check_dtype("--export-dtype", config.export_dtype)
        if not config.model.path:
            raise UserError("--model.path is missing; give the model that the run started from")
        if config.check == (config.output is not None):
            raise UserError("give either --output DIR, or --check, which writes nothing")
        path = file_of(config.source)
        made = stored.read(path)
        steps, whole = config.steps or made.header["steps"], made.header["steps"]
        if steps > whole:
            raise UserError(f"--steps {steps}: {path} has {whole}; give at most these")
        optimizer = replaying.optimizer_of(made, path)
        replaying.check_generator(made, path)
        mesh = sharding.make_mesh(config.mesh)
        identity = {
            "replay": files.sha256(path),
            "base": made.header["base_sha256"],
            "export_dtype": config.export_dtype,
            "tolerance": config.tolerance,
        } | ({} if steps == whole else {"steps": steps})
        place = None
        if config.output is not None:
            remote.check(config.output, "--output")
            place = folder.run_place(config.output, identity)
            folder.claim(place, held)
        source = bases.source_of(config.model.path)
        source.check(config.model.path, config.model.revision)
    distributed.check_same(identity)
    if made.header.get("compiled") == "quickly":  # a smoke run: its bits are those of that compiler
        compiling.compile_quickly()
    base = source.load(config.model, made, mesh).to_host()
    replaying.check_base(made, base, path, config.model.path)
    trained = replaying.trained_of(made, base, mesh)
    size = path.stat().st_size
    say(f"{path}: {whole} steps of {optimizer.name}, {size / 1000:.1f} kB, base {base.sha[:16]}…")
    since, checked = time.monotonic(), []

    def make(checkpoints: Path | None) -> Any:
        found, how = replaying.replay(
            made,
            optimizer,
            trained.start,
            base.learner.rules,
            mesh,
            config.tolerance,
            checkpoints,
            steps=steps,
        )
        checked.append(how)
        return trained.finish(found)

    root = None if place is None else folder.enter(place, held)
    if root is None:
        params = make(None)
        sha = params_sha256(params)
    else:
        like = shaped(base.params, sharding.param_shardings(base.params, mesh, base.learner.rules))
        params, sha = params_stage(root, "replayed", identity, like, make)
    seconds = time.monotonic() - since
    found: dict[str, Any] = {"params_sha256": sha, "steps": steps, "bytes": size}
    whose = "adapters " if "lora" in made.header else ""
    last = max((mark.step for mark in made.milestones if mark.step <= steps), default=0)
    for how in checked:
        equal = [compared(how, config.tolerance)] if last else []
        if last < steps:
            equal.append(f"not compared after step {last} (the next milestone is beyond --steps)")
        say(f"replayed in {seconds:.1f} s, {whose}{', '.join(equal)}")
        found |= {"seconds": round(seconds, 1)}
        found |= {"apart": how.apart, "bitwise": how.bitwise} if last else UNCOMPARED
    if root is not None and not checked:
        found = kept(remote.home(root) / "summary.json", sha) | found
    say(f"params_sha256 {sha}")
    if root is not None:
        source.export(base._replace(params=params, sha=sha), root / "export", config.export_dtype)
        text = json.dumps({"replayed": found}, indent=1)
        distributed.of_first(lambda: write_atomic(root / "summary.json", text))
        distributed.of_first(lambda: remote.send(root))
        say(f"model: {remote.home(root) / 'export'}")
    return found


def compared(how: Any, tolerance: float | None) -> str:
    """The words for a `replaying.Checked` of at least one milestone."""
    equal = "equal bit by bit"
    if not how.bitwise:
        far = f"to {how.apart:.1e}" if how.apart else "to the last digit"
        equal = f"equal by norm {far} (--tolerance {tolerance:g}), not bitwise"
    return f"{equal} at {how.milestones} milestone(s)"


def kept(path: Path, sha: str) -> dict[str, Any]:
    """The summary of a finished replay, if it is of these parameters."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["replayed"]
        return dict(found) if found["params_sha256"] == sha else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def file_of(source: str) -> Path:
    """The file of coefficients that an argument names: itself, or that of a run folder.

    Raises:
        UserError: the run wrote none, which names its optimizer.
    """
    from train.engine.replays import replaying, stored

    path = Path(source).expanduser()
    file = path / stored.NAME
    if not path.is_dir() or file.exists():
        return file if path.is_dir() else path
    others = sorted(x.name for x in path.glob(stored.named("*")))
    if others:
        raise UserError(
            f"{path} has no {stored.NAME}, but {', '.join(others)}: give the path of one of them"
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        stage = config if "optimizer" in config else config["train"]
        name = str(stage["optimizer"]["name"])
        replaying.refuse(name, str(path))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
    raise UserError(
        f"{path} has no {stored.NAME}: its stage has not begun, was found in a cache, or gave up "
        "a damaged file; give the folder of a run with a zeroth-order optimizer that has one"
    )


if __name__ == "__main__":
    cli.main(main)
