"""Erase a concept from a text-to-image model, and judge the model before and after.

python -m train.erase fashion --erase.concept sneaker --erase.method uce  (trains the model first)
python -m train.erase runs/fashion-seed0 --erase.concept sneaker          (RUN: of train.diffuse)
python -m train.erase RUN --erase.method rece|esd|finetune
python -m train.erase RUN --erase.method esd --optimizer.name muon --combine blur
python -m train.erase --config RUN/config.json --output DIR               (reruns a configuration)
python -m train.erase --list (methods)    --help (presets)    PRESET --help (options)
"""

from __future__ import annotations

from pathlib import Path

from train.jobs.diffusing.config import EraseRun
from train.options import cli, start
from train.options.roles import NONE, Roles
from train.presets.diffuse import PRESETS
from train.presets.diffusing_arguments import list_methods, read_erase
from train.tasks.erasure import ERASING

ROLES = Roles("original", NONE, "erased")


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        start.show_presets(__doc__, PRESETS)
        return
    if argv[0] == "--list":
        print("\n".join(list_methods("--erase.method", ERASING)))
        return
    run(read_erase(argv))


def run(config: EraseRun) -> Path:
    """Run all stages of a configuration and return the run folder, which it holds meanwhile."""
    from train.jobs.diffusing import erasing, pipeline
    from train.jobs.diffusing.judging import Shown

    check, load = erasing.check, erasing.load
    with pipeline.opened(config, "train.erase", ROLES, check, load) as opened:
        # 1. The judge and the model that draws the concept.
        judge, original = erasing.models(opened)

        # 2. The concept's prompts shall read as another one's.
        erased = erasing.erased(opened, original)

        # 3. Judge the model before and after alike: the concept by its name and by others, and the
        #    other classes.
        kinds = ("explicit", "names", "kept")
        shown = {"original": (Shown(original), kinds), "erased": (Shown(erased), kinds)}
        concept = opened.pictures.class_of(config.erase.concept)
        summary = pipeline.judge(opened, judge, shown, concept)

        # 4. Hand it back, and show.
        erasing.export(opened, original, erased, judge)
        pipeline.report(opened, summary)
        return opened.run.folder


if __name__ == "__main__":
    cli.main(main)
