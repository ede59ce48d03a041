"""Export a model as an HF folder that `transformers` and other tools load.

python -m train.export RUN_FOLDER_OR_MODEL OUTPUT_FOLDER [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxlib_unlearn.errors import UserError
from train import cli, seal
from train.tracking import say


def main(argv: list[str]) -> None:
    """The program."""
    import models
    from train import checks, pipeline

    parser = argparse.ArgumentParser("train.export", description="export a model as an HF folder")
    parser.add_argument("source", help="run folder, HF folder, .gguf file, Hub id or smollm2")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument(
        "--dtype", default=None, help="float32, bfloat16 or float16 (default: as stored)"
    )
    parser.error = _error  # type: ignore[method-assign]
    args = parser.parse_args(argv)
    if args.dtype is not None:
        checks.check_dtype("--dtype", args.dtype)
    source = Path(args.source)
    if (source / "summary.json").exists() and (source / "export").is_dir():
        source = source / "export"
    seal.check(source)
    target = str(source) if source.exists() else args.source
    models.export(models.load(pipeline.model_source(target)), args.output, dtype=args.dtype)
    say(f"model: {args.output}")


def _error(message: str) -> None:
    raise UserError(f"{message}; see --help")


if __name__ == "__main__":
    cli.main(main)
