"""Export a model as an HF folder that `transformers` and other tools load, or to the Hub.

python -m train.export RUN_FOLDER_OR_MODEL OUTPUT_FOLDER [--dtype bfloat16]
python -m train.export RUN_FOLDER OUTPUT_FOLDER --model original   (the base of a LoRA adapter)
python -m train.export RUN_FOLDER --push-to-hub OWNER/NAME [--dry-run]
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from train.options import cli
from train.options.roles import ROLES
from train.reporting import tables
from train.runtime import cards, hub, seal
from train.runtime.tracking import say

WRITTEN = "A model written by the exporter of jaxlib-unlearn."


def main(argv: list[str]) -> None:
    """The program."""
    import models
    from models.files import vit_files
    from train.options import checks

    args = parse(argv)
    if args.dtype is not None:
        checks.check_dtype("--dtype", args.dtype)
    if args.push_to_hub is not None:
        hub.check_name(args.push_to_hub)
    source, run = Path(args.source), None
    if (source / "summary.json").exists() and (source / "export").is_dir():
        run = source
    if run is None and args.model not in (None, ROLES.judged):
        raise UserError(f"--model {args.model} needs a run folder; {args.source} is not one")
    other = None if run is None or args.model is None else other_model(run, args.model)
    seal.check(source if run is None else run / "export")
    with contextlib.ExitStack() as held:
        folder = args.output
        if folder is None and run is not None and args.dtype is None and other is None:
            folder = run / "export"
        else:
            if folder is None:
                folder = Path(held.enter_context(tempfile.TemporaryDirectory())) / "model"
            loaded, text, tokens, results = read(args.source, run, other)

            def described(written: Path) -> str:
                return cards.with_digests(text, written)

            if isinstance(loaded, vit_files.LoadedViT):
                dtype = args.dtype or "float32"
                vit_files.export(loaded, folder, dtype=dtype, card=described)
            else:
                models.export(
                    loaded,
                    folder,
                    dtype=args.dtype,
                    max_new_tokens=tokens,
                    card=described,
                    results=results,
                )
        if args.output is not None:
            say(f"model: {args.output}")
        if args.push_to_hub is not None:
            hub.push(folder, args.push_to_hub, public=args.public, dry_run=args.dry_run)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: options that do not go together, or are unknown.
    """
    parser = argparse.ArgumentParser(
        "train.export", description="export a model as an HF folder or to the Hub"
    )
    parser.add_argument("source", help="run folder, HF folder, .gguf file, Hub id or smollm2")
    parser.add_argument("output", type=Path, nargs="?", help="folder to write")
    parser.add_argument(
        "--dtype", default=None, help="float32, bfloat16 or float16 (default: as stored)"
    )
    names = ", ".join(ROLES.models)
    parser.add_argument(
        "--model",
        metavar="ROLE",
        help=f"which model of a run: {names} or another that it has (default: {ROLES.judged})",
    )
    parser.add_argument("--push-to-hub", metavar="NAME", help="upload to this repository")
    parser.add_argument("--public", action="store_true", help="a new repository is public")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded")
    parser.error = _error  # type: ignore[method-assign]
    args = parser.parse_args(argv)
    if args.output is None and args.push_to_hub is None:
        raise UserError("give a folder to write, or --push-to-hub NAME; see --help")
    if args.push_to_hub is None and (args.public or args.dry_run):
        raise UserError("--public and --dry-run go with --push-to-hub NAME")
    return args


def other_model(run: Path, name: str) -> str | None:
    """The model `name` of a run; None: it is the judged one, which the run has exported.

    Raises:
        UserError: the run has none of that name.
    """
    found = tables.load_run(run)
    if name not in found.models:
        known = ", ".join(map(repr, found.models))
        _error(f"argument --model: invalid choice: {name!r} (choose from {known})")
    return None if name == found.roles.judged else name


def read(
    source: str, run: Path | None, other: str | None
) -> tuple[Any, str, int | None, str | None]:
    """A model with its tokenizer, its card, the maximum length of its answers, and its results.

    Of a run it is the judged model, or the `other` one. The results are those of `card.results`.
    """
    import models
    from models.files import vit_files
    from train.engine.base_models import model_source
    from train.reporting import card
    from train.reporting.runlogs import read_evals
    from train.runtime.digests import params_sha256

    if run is None:
        target, what = str(Path(source)) if Path(source).exists() else source, WRITTEN
        if vit_files.is_vit(target):
            image_model = vit_files.load(target)
            text = cards.of_images(what, params_sha256(image_model.params))
            return image_model, text, None, None
        return models.load(model_source(target)), cards.plain(what), None, None
    found = tables.load_run(run)
    if vit_files.is_vit(run / "export"):
        role = found.roles.judged if other is None else other
        folder = run / ("export" if other is None else "start")
        if other not in (None, found.roles.start) or not folder.is_dir():
            raise UserError(f"{run}: holds no {other} model; its --model.path is that of the base")
        seal.check(folder)
        sha = str(found.summary[role].get("params_sha256"))
        text = cards.of_images(f"The model '{role}' of a run of jaxlib-unlearn.", sha)
        return vit_files.load(folder), text, None, None
    evaluate = found.config.get("evaluate")
    tokens = evaluate.get("max_new_tokens") if isinstance(evaluate, dict) else None
    tokens = tokens if isinstance(tokens, int) else None
    unlearns = found.about.get("program", "train.unlearn") == "train.unlearn"
    if other is None and not unlearns:
        what = f"The model '{found.roles.judged}' of a run of jaxlib-unlearn."
        text = cards.plain(what, found.judged["params_sha256"], chat=False)
        return models.load(run / "export"), text, tokens, None
    if other is None:
        text = card.of_run(found, read_evals(found))
        return models.load(run / "export"), text, tokens, card.results(found)
    sha = found.summary[other].get("params_sha256")
    text = f"The model '{other}' of a run of jaxlib-unlearn."
    return of_stage(found, other, sha), cards.plain(text, sha, chat=unlearns), tokens, None


def of_stage(run: tables.Run, which: str, sha: str | None) -> Any:
    """A model of a run other than the exported one, from the stage that made it.

    A stage need not be named as the model: it is found by the digest of its parameters.

    Raises:
        UserError: the run folder does not hold it.
    """
    import dataclasses

    import jax
    import jax.numpy as jnp

    import models
    from train.engine.base_models import model_source
    from train.runtime import checkpointing

    stage = run.config.get("stage")
    given = stage.get("original") if isinstance(stage, dict) else None
    if which == run.roles.start and given:
        return models.load(model_source(given))
    alike = models.load(run.folder / "export")
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), alike.params
    )
    for folder in sorted((run.folder / "stages").glob("*")):
        manifest = checkpointing.read_manifest(folder)
        if manifest and checkpointing.combined(manifest["digests"]) == sha:
            return dataclasses.replace(alike, params=checkpointing.load_tree(folder, like))
    raise UserError(
        f"{run.folder}: no {which} model in its stages; --stage.cache keeps it elsewhere: run the "
        "command again without"
    )


def _error(message: str) -> None:
    raise UserError(f"{message}; see --help")


if __name__ == "__main__":
    cli.main(main)
