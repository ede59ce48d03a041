"""Programs and machinery that train, unlearn, evaluate and report."""

import os
import signal
import sys


def _leave(number, frame):
    """Ctrl-C while modules are imported, before `train.options.cli.main` has its own handler."""
    os.write(2, b"stopped by Ctrl-C\n")
    os._exit(130)


if sys.argv[:1] == ["-m"]:  # `python -m train.X`: the program's module is not imported yet
    from train.runtime import environment

    environment.check()

    from train.runtime import hugepages

    hugepages.ask()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
