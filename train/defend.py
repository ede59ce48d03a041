"""Defend a model against attack tokens: their span is taken out of its token embeddings.

python -m train.defend RUN ATTACK                            (RUN: of train.erase; ATTACK: on it)
python -m train.defend RUN ATTACK --defend.where table       (in the vocabulary alone)
python -m train.defend RUN ATTACK --defend.tokens 1          (the first of its tokens alone)
python -m train.defend --config RUN/config.json --output DIR (reruns a configuration)
python -m train.defend RUN ATTACK --help                     (options)
"""

from __future__ import annotations

from pathlib import Path

from train.jobs.diffusing.config import DefendRun
from train.options import cli
from train.options.roles import NONE, Roles
from train.presets.diffusing_arguments import read_defend

ROLES = Roles("original", NONE, "defended")


def main(argv: list[str]) -> None:
    """The program."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    run(read_defend(argv))


def run(config: DefendRun) -> Path:
    """Run all stages of a configuration and return the run folder, which it holds meanwhile."""
    from train.jobs.diffusing import defending, pipeline

    check, load = defending.check, defending.load
    with pipeline.opened(config, "train.defend", ROLES, check, load) as opened:
        # 1. The model, and the tokens that bring the concept back.
        aim = opened.loaded

        # 2. Embeddings lose their part in the span of the tokens.
        model, table, basis = defending.defended(opened, aim)

        # 3. Judge the model without and with the defence, by the same prompts and tokens.
        known = [aim.attack.folder, aim.source.folder]
        models = defending.shown(aim, model)
        summary = pipeline.judge(opened, aim.judge, models, aim.concept, known)

        # 4. Hand it back, and show.
        defending.export(opened, table, basis, aim.judge)
        pipeline.report(opened, summary)
        return opened.run.folder


if __name__ == "__main__":
    cli.main(main)
