"""Noise schedules in files: the `scheduler_config.json` of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import check_spelling, number, one_line, reading
from models.diffusion.schedulers import Schedule
from models.files.families import positive
from models.files.hub import local
from models.text.tokenizer import read_json

FILE = "scheduler_config.json"
ADVICE = f"use the {FILE} the model was published with"


class Class(NamedTuple):
    """A class of diffusers, by the name of its sampler in `CLASSES`.

    Args:
        name: `_class_name` in the file.
        absent: the defaults of keys that the file leaves out, where classes differ.
        only: the one value that a key may have.
    """

    name: str
    absent: Mapping[str, Any]
    only: Mapping[str, Any]


CLASSES = {
    "ddim": Class(
        "DDIMScheduler",
        {"set_alpha_to_one": True, "clip_sample": True},
        {"timestep_spacing": "leading"},
    ),
    "pndm": Class(
        "PNDMScheduler",
        {"skip_prk_steps": False},
        {"timestep_spacing": "leading", "skip_prk_steps": True},
    ),
    "lms": Class("LMSDiscreteScheduler", {}, {"timestep_spacing": "linspace"}),
}
# For every class; other values would give other samples.
ONLY: dict[str, Any] = {
    "prediction_type": "epsilon",
    "trained_betas": None,
    "clip_sample": False,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "steps_offset": 0,
    "set_alpha_to_one": False,
}


def hf_config(raw: Mapping[str, Any], where: str) -> Schedule:
    """The schedule that a `scheduler_config.json` describes.

    Args:
        raw: its content.
        where: the file, as messages name it.

    Returns:
        The schedule; keys that are left out have diffusers' defaults.

    Raises:
        UserError: another class, a misspelt key, or a value that is not supported, such as
            predictions of anything but noise.

    Example:
        >>> hf_config({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, FILE).beta_end
        0.02
        >>> hf_config({"_class_name": "LMSDiscreteScheduler", "prediction_type": "sample"}, FILE)
        Traceback (most recent call last):
        ...
        jaxlib_unlearn.errors.UserError: scheduler_config.json: prediction_type is 'sample', and ...
    """
    kind = raw.get("_class_name")
    found = [name for name, row in CLASSES.items() if row.name == kind]
    if not found:
        names = ", ".join(row.name for row in CLASSES.values())
        raise UserError(
            f"{where}: _class_name {one_line(repr(kind), 60)} is no sampler that is read; "
            f"supported: {names}"
        )
    row = CLASSES[found[0]]
    only = {**ONLY, **row.only}
    check_spelling(raw, (*DEFAULTS, *only), where, f"correct it, or {ADVICE}")
    raw = {**DEFAULTS, **only, **row.absent, **raw}
    for key, value in only.items():
        if raw[key] != value:
            raise UserError(
                f"{where}: {key} is {one_line(repr(raw[key]), 60)}, and {value!r} alone is "
                f"supported with {kind}; use a model that has it"
            )
    with reading(where, ADVICE, "does not read"):
        if type(raw["set_alpha_to_one"]) is not bool or type(raw["steps_offset"]) is not int:
            raise TypeError("set_alpha_to_one is no truth value or steps_offset no whole number")
        return Schedule(
            num_train_timesteps=positive(raw, "num_train_timesteps", int, where),
            beta_start=number(raw["beta_start"]),
            beta_end=number(raw["beta_end"]),
            beta_schedule=raw["beta_schedule"],
            steps_offset=raw["steps_offset"],
            set_alpha_to_one=raw["set_alpha_to_one"],
            sampler=found[0],
        )


def from_folder(folder: str | Path) -> Schedule:
    """The schedule of a folder's `scheduler_config.json`, see `hf_config`.

    Raises:
        UserError: there is no such file, or its sampler is not supported.
    """
    path = local(str(folder)) / FILE
    return hf_config(read_json(path, "it says how noise is added"), str(path))


def to_hf(schedule: Schedule) -> dict[str, Any]:
    """The `scheduler_config.json` of a schedule; `hf_config` reads it as the same schedule.

    Example:
        >>> to_hf(Schedule())["_class_name"]
        'PNDMScheduler'
    """
    row = CLASSES[schedule.sampler]
    fields = {key: getattr(schedule, key) for key in DEFAULTS}
    same = {key: ONLY[key] for key in ("prediction_type", "trained_betas", "clip_sample")}
    return {"_class_name": row.name, **fields, **same, **row.only}
