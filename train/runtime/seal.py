"""The seal of an exported model: the digest of its inputs, and the sha256 of its files.

An export is trusted, by the run that made it and by anyone who loads it, as long as its files are
the sealed ones. From its second line on the seal has the format that `sha256sum -c` reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from train.runtime import files

NAME = "params_sha256"


def put(folder: Path, made_from: str) -> None:
    """Seal a folder; call it last, since the seal covers every file that is there."""
    found = files.sums(folder, without=(NAME,))
    lines = [made_from, *(f"{digest}  {name}" for name, digest in found.items())]
    files.write(folder / NAME, "".join(line + "\n" for line in lines))


def read(folder: Path) -> tuple[str, dict[str, str]] | None:
    """The inputs of a sealed folder, and sha256 by file name; None without a readable seal.

    Seals of earlier versions list no files.
    """
    try:
        first, *rest = (folder / NAME).read_text(encoding="utf-8").splitlines()
        return first, {name: digest for digest, name in (line.split("  ", 1) for line in rest)}
    except (OSError, ValueError):
        return None


def damage(folder: Path, elsewhere: Any = None) -> list[str]:
    """Files of a sealed folder that are missing or changed; [] without a seal.

    Args:
        folder: a local folder.
        elsewhere: the bucket that it mirrors. Files that exist only there are not checked: buckets
            verify their files themselves.
    """
    wrong = []
    for name, digest in (read(folder) or ("", {}))[1].items():
        path = folder / name
        if not path.is_file():
            if elsewhere is None or not (elsewhere / name).exists():
                wrong.append(name)
        elif files.sha256(path) != digest:
            wrong.append(name)
    return wrong


def check(folder: Path) -> None:
    """Raise `UserError` for a model that changed after its export; unsealed ones pass.

    Raises:
        UserError: one of its files is damaged, edited or missing.
    """
    if not (folder / NAME).is_file():
        return
    if read(folder) is None:
        raise UserError(
            f"{folder / NAME} does not read: the model beside it may be damaged; export it again "
            "(the command of its run does so)"
        )
    if wrong := damage(folder):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"{folder / wrong[0]}{more} is not what was exported (sha256 in {NAME}); export it "
            f"again (the command of its run does so), or delete {NAME} if the change is meant"
        )
