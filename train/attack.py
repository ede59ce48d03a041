"""Attack a model from which a concept was erased: find tokens that make it draw the concept again.

python -m train.attack RUN --attack subattack                  (RUN: of train.erase or train.defend)
python -m train.attack RUN --attack.tokens 5 --attack.form project --attack.steps 300
python -m train.attack RUN --attack none|cce|words|random      (to compare with)
python -m train.attack RUN --attack.transfer RUN2              (the same tokens on another model)
python -m train.attack RUN2 --attack given --attack.source ATTACK   (tokens that ATTACK found)
python -m train.attack --config RUN/config.json --output DIR   (reruns a configuration)
python -m train.attack --list (attacks)    RUN --help (options)
"""

from __future__ import annotations

from pathlib import Path

from train.jobs.diffusing.config import AttackRun
from train.options import cli
from train.options.roles import NONE, Roles
from train.presets.diffusing_arguments import list_methods, read_attack
from train.tasks.erasure import ATTACKS

ROLES = Roles("original", NONE, "attacked")


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if argv[0] == "--list":
        print("\n".join(list_methods("--attack", ATTACKS)))
        return
    run(read_attack(argv))


def run(config: AttackRun) -> Path:
    """Run all stages of a configuration and return the run folder, which it holds meanwhile."""
    from train.jobs.diffusing import attack_files, attacking, pipeline

    check, load = attacking.check, attacking.load
    with pipeline.opened(config, "train.attack", ROLES, check, load) as opened:
        # 1. The model that is attacked, and the original, whose images show what to look for.
        aim = opened.loaded

        # 2. Tokens with which the model sees the noise in these images best.
        tokens = attacking.tokens(opened, aim)
        attack_files.write(opened, aim.source, aim.original, tokens)

        # 3. Judge: the same prompts without and with the tokens in the place of the name.
        models = attacking.shown(opened, aim, tokens)
        known = [aim.source.folder]
        summary = pipeline.judge(opened, aim.judge, models, aim.concept, known)

        # 4. Show.
        pipeline.report(opened, summary)
        return opened.run.folder


if __name__ == "__main__":
    cli.main(main)
