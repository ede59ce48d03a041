"""An exported folder as a repository on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from models.text.tokenizer import one_line
from train.runtime.tracking import say


def check_name(name: str) -> None:
    """Raise `UserError` unless this is a repository name (`owner/name`, or `name` alone).

    Raises:
        UserError: a name the Hub would refuse.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {name!r}: {one_line(error)}; give OWNER/NAME") from None


def push(folder: Path, name: str, *, public: bool = False, dry_run: bool = False) -> None:
    """Upload every file of a folder as one commit; a missing repository is created.

    Args:
        folder: the exported model.
        name: the repository.
        public: whether a new repository is public; an existing one is not changed.
        dry_run: print what would be sent, and send nothing.

    Raises:
        UserError: the upload failed (no token, no such owner, no network); the Hub's answer is part
            of the message.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    kind = "public" if public else "private"
    what = f"{len(files)} files ({size / 1e6:,.1f} MB) of {folder} to {name}"
    if dry_run:
        for path in files:
            say(f"  {path.relative_to(folder).as_posix()}  {path.stat().st_size:,} bytes")
        say(f"dry run: would send {what} ({kind} where it is new)")
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    say(f"sending {what}")
    try:
        repo = api.create_repo(name, private=not public, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Export of jaxlib-unlearn",
        )
    except LocalTokenNotFoundError:
        raise UserError(
            f"--push-to-hub {name}: not logged in; run `hf auth login` or set HF_TOKEN"
        ) from None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(
            f"--push-to-hub {name}: {without_token(one_line(error, 300))}; check the name, the "
            "token's rights and the network"
        ) from None
    say(f"on the Hub: https://huggingface.co/{repo}")


def without_token(text: Any) -> str:
    """A text with the Hub token in use, and everything that looks like one, masked.

    Example:
        >>> without_token("401 for hf_abcdefghijklmnopqrstuvwxyz")
        '401 for ***'
    """
    import re

    from huggingface_hub import get_token

    text, token = str(text), get_token()
    if token:
        text = text.replace(token, "***")
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "***", text)
