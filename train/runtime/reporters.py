"""Optional loggers for a run's numbers: TensorBoard, Weights & Biases, Trackio.

Each is an optional package, imported only when it is named. They get a run's scalars and its
configuration, and nothing about the machine or the environment.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from train.runtime import suggest

PROJECT = "jaxlib-unlearn"
# Secrets that must not appear in a log: addresses with a password, tokens, keys.
_SECRETS = re.compile(
    r"(?<=://)[^/\s@]+@|\b(?:hf|ghp|gho|github_pat|sk)[_-]\w{16,}"
    r"|(?<=token=)[^&\s]+|(?<=key=)[^&\s]+",
    re.IGNORECASE,
)
_SECRET_NAMES = re.compile(r"(?:TOKEN|SECRET|PASSWORD|API_?KEY)", re.IGNORECASE)


class Reporter(NamedTuple):
    """An open log: `write(stage, step, scalars)`, and `close(summary)` with the final numbers."""

    name: str
    write: Callable[[str, int, Mapping[str, float]], None]
    close: Callable[[Mapping[str, float]], None]


def public(value: Any) -> Any:
    """JSON values with everything that looks like a secret replaced by three stars.

    Example:
        >>> public({"data": {"path": "https://me:word@host/x"}, "seed": 0})
        {'data': {'path': 'https://***host/x'}, 'seed': 0}
    """
    if isinstance(value, Mapping):
        return {str(name): public(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    held = [text for name, text in os.environ.items() if _SECRET_NAMES.search(name)]
    for text in held:
        value = value.replace(text, "***") if len(text) >= 8 else value
    return _SECRETS.sub("***", value)


def _tensorboard(folder: Path, config: Mapping[str, Any]) -> Reporter:
    writer = importlib.import_module("tensorboardX").SummaryWriter(str(folder / "tensorboard"))

    def write(stage: str, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            writer.add_scalar(f"{stage}/{name}", value, step)

    return Reporter("tensorboard", write, lambda summary: writer.close())


def _steps(
    log: Callable[[dict[str, float]], Any], begin: Callable[[str], Any] = lambda stage: None
) -> Callable[..., None]:
    """`write` for logs with a single step counter: each stage logs its own step as a metric.

    `begin(stage)` is called before the first numbers of a stage.
    """
    begun: set[str] = set()

    def write(stage: str, step: int, scalars: Mapping[str, float]) -> None:
        if stage not in begun:
            begin(stage)
            begun.add(stage)
        log({f"{stage}/step": step, **{f"{stage}/{k}": v for k, v in scalars.items()}})

    return write


def _wandb(folder: Path, config: Mapping[str, Any]) -> Reporter:
    wandb = importlib.import_module("wandb")
    settings = wandb.Settings(
        console="off",
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.name,
        dir=str(folder),
        config=dict(config),
        resume="auto",
        settings=settings,
    )

    def begin(stage: str) -> None:
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def close(summary: Mapping[str, float]) -> None:
        run.summary.update(dict(summary))
        run.finish()

    return Reporter("wandb", _steps(run.log, begin), close)


def _trackio(folder: Path, config: Mapping[str, Any]) -> Reporter:
    trackio = importlib.import_module("trackio")
    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=folder.name,
        config=dict(config),
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )

    def close(summary: Mapping[str, float]) -> None:
        if summary:
            run.log(dict(summary))
        run.finish()

    return Reporter("trackio", _steps(run.log), close)


# By name: the package, and the function that opens a log in a run folder.
REPORTERS: dict[str, tuple[str, Callable[[Path, Mapping[str, Any]], Reporter]]] = {
    "tensorboard": ("tensorboardX", _tensorboard),
    "wandb": ("wandb", _wandb),
    "trackio": ("trackio", _trackio),
}


def chosen(report_to: str, tensorboard: bool = False) -> tuple[str, ...]:
    """The reporters of `--report-to a,b` (and `--tensorboard`), each once.

    Raises:
        UserError: a name that is none of `REPORTERS`.

    Example:
        >>> chosen("wandb, tensorboard", tensorboard=True)
        ('wandb', 'tensorboard')
    """
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    for name in names:
        suggest.check_choice("--report-to", name, tuple(REPORTERS))
    return tuple(dict.fromkeys([*names, *["tensorboard"] * tensorboard]))


def check(names: tuple[str, ...]) -> None:
    """Raise `UserError` for a reporter whose package is missing, or that cannot log in."""
    for name in names:
        package = REPORTERS[name][0]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--report-to {name} needs {package}, which is not installed; pip install "
                f"{package}, or leave {name} out"
            )
    if "wandb" in names:
        with _one_line("wandb"):
            wandb = importlib.import_module("wandb")
            online = wandb.setup().settings.mode in ("online", "shared")
            if online and not wandb.login(prompt=False):
                raise UserError(
                    "--report-to wandb: nobody is logged in; wandb login, or WANDB_MODE=offline"
                )


def open_all(names: tuple[str, ...], folder: Path, config: Mapping[str, Any]) -> list[Reporter]:
    """Open the logs of a run.

    Args:
        names: the names that `chosen` returned.
        folder: the run folder; its name is the name of the run.
        config: the run's configuration as JSON values; secrets in it are replaced.

    Raises:
        UserError: one of them cannot be opened.
    """
    found = []
    for name in names:
        with _one_line(name):
            found.append(REPORTERS[name][1](folder, public(config)))
    return found


@contextlib.contextmanager
def _one_line(name: str):
    """Turn any error of a third-party package into a one-line `UserError`."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for a run's own table
            yield
    except UserError:
        raise
    except Exception as error:
        reason = public((str(error).strip().splitlines() or [""])[0][:160])
        raise UserError(
            f"--report-to {name}: {type(error).__name__}: {reason}; leave {name} out, or run it "
            "offline"
        ) from None
