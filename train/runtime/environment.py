"""Check that this Python can run the programs; if not, one line says what to do.

Any Python that a user may start must be able to read this file: nothing newer than Python 3.6.
"""

import glob
import os
import shlex
import sys
from importlib.util import find_spec

# Import names of the packages that the programs need; the extra `train` installs them.
NEEDED = (
    "jax flax optax chex numpy scipy orbax tokenizers safetensors tyro rich jinja2 matplotlib"
).split()


def complaint(version, missing, root, here):
    """One line about what is wrong with this Python, or None.

    Args:
        version: Python's version, three numbers.
        missing: packages that cannot be imported.
        root: folder of the clone.
        here: the working folder; paths are shown from there.

    Example:
        >>> complaint((3, 11, 7), [], "/clone", "/clone")
        >>> complaint((3, 9, 2), [], "/clone", "/clone")[:50]
        'this is Python 3.9.2, and 3.11 or later is needed;'
    """
    number = ".".join(map(str, version[:3]))
    if tuple(version[:2]) < (3, 11):
        what = f"this is Python {number}, and 3.11 or later is needed"
    elif number == "3.13.0":
        what = "this is Python 3.13.0, whose first release crashes in jaxlib; take a later one"
    elif missing:
        more = f" and {len(missing) - 2} more packages" if len(missing) > 2 else ""
        what = f"this Python ({sys.executable}) has no {', '.join(missing[:2])}{more}"
    else:
        return None
    activate = os.path.join(root, ".venv", "bin", "activate")
    others = os.path.join(glob.escape(root), ".venv-[0-9]*", "bin", "activate")  # PYTHON=python3.12
    there = [path for path in [activate] + sorted(glob.glob(others)) if os.path.exists(path)]
    activate = there[0] if there else activate
    shown = os.path.relpath(activate, here)
    shown = shlex.quote(activate if shown.startswith("..") else shown)
    if there:
        return f"{what}; run: source {shown}   (or: make unlearn ARGS=...)"
    make = "make quickstart" if root == here else f"make -C {shlex.quote(root)} quickstart"
    return f"{what}; run {make}, which makes an environment, then: source {shown}"


def check():
    """Exit with code 2 and a one-line message if this Python cannot run the programs."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    root = os.path.abspath(__file__)
    for _ in range(3):  # the clone, above train/runtime/
        root = os.path.dirname(root)
    wrong = complaint(sys.version_info, missing, root, os.getcwd())
    if wrong:
        sys.stderr.write(f"error: {wrong}\n")
        sys.exit(2)
