"""Programs and machinery that train, unlearn, evaluate and report."""

import sys

from train import hugepages

if sys.argv[:1] == ["-m"]:  # `python -m train.…`: the program's module is not imported yet
    hugepages.ask()
