"""Programs and machinery that train, unlearn, evaluate and report."""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m train.X`: the program's module is not imported yet
    from train import environment

    environment.check()

    from train import hugepages

    hugepages.ask()
