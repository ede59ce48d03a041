"""How far a reader walks through the files of one optimizer update.

``python tests/bench/update_trace.py muon teon optax.muon``: for every name the files and functions
that a call of ``tx.update`` enters while it is traced, the moves from one file to another, the
calls that read names of leaves, and the calls of each file.
"""

import argparse
import collections
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn import optim

SHAPES = {
    "embed": {"embedding": (16, 9)},
    "layers": {
        "q": {"kernel": (2, 9, 9)},
        "up": {"kernel": (2, 9, 18), "bias": (2, 18)},
        "down": {"kernel": (2, 18, 9)},
    },
    "norm": {"scale": (9,)},
}
NAMES = ("optim/rules.py", "optim/blocks.py")  # what reads names of leaves


def make(name):
    """The optimizer of a name: of ``optim``, "normuon", or one of Optax's ("optax.muon")."""
    if name.startswith("optax."):
        return getattr(optax.contrib, name.removeprefix("optax."))(0.02)
    if name == "normuon":
        return optim.muon(0.02, post=optim.normuon())
    return getattr(optim, name)(0.02)


def count(name, times=1):
    """The Python calls of the last of several traced updates.

    Returns:
        ``files``, ``functions``, ``moves`` (calls in another file than the call before),
        ``calls``, ``names`` (calls that read names of leaves) and ``by_file``.
    """
    package = optax if name.startswith("optax.") else optim
    root = str(Path(package.__file__).parents[package is optim])
    tx = make(name)
    params = jax.tree.map(jnp.ones, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    state, visited = tx.init(params), []

    def watch(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root) and code.co_name[0] != "<":
            visited.append((code.co_filename[len(root) + 1 :], code.co_name, code.co_firstlineno))

    def update(grads, state, params):
        more = {"constraint_grads": grads} if "sift" in name else {}
        return tx.update(grads, state, params, **more)

    for _ in range(times):
        visited.clear()
        traced = jax.jit(lambda *args: update(*args))
        sys.setprofile(watch)
        try:
            traced.trace(params, state, params)
        finally:
            sys.setprofile(None)
    files = [file for file, *_ in visited]
    return {
        "files": len(set(files)),
        "functions": len(set(visited)),
        "moves": sum(a != b for a, b in zip(files, files[1:], strict=False)),
        "calls": len(files),
        "names": sum(file.endswith(NAMES) for file in files),
        "by_file": dict(collections.Counter(files).most_common()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["muon", "optax.muon"])
    parser.add_argument("--times", type=int, default=1, help="The update to count: 1 is the first.")
    options = parser.parse_args()
    for name in options.names:
        jax.clear_caches()  # or functions that are jitted inside are not entered again
        found = count(name, options.times)
        by_file = found.pop("by_file")
        print(f"{name}:", ", ".join(f"{n} {what}" for what, n in found.items()))
        for file, calls in by_file.items():
            print(f"    {calls:5d}  {file}")


if __name__ == "__main__":
    main()
