"""Every optimizer on eight devices: the single-device update, kept shardings, few collectives.

A new optimizer is one row of `ROWS`.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import is_shape, random_tree

from jaxlib_unlearn.optim.combine import blur
from jaxlib_unlearn.optim.sign import sign_momentum
from jaxlib_unlearn.optim.sophia import sophia
from jaxlib_unlearn.optim.spectral.muon import muon
from jaxlib_unlearn.optim.spectral.sift import sift
from jaxlib_unlearn.optim.spectral.teon import teon
from train.costs.collectives import collectives
from train.runtime.sharding import path_str

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


class Row(NamedTuple):
    """An optimizer and the communication allowed in its update.

    Args:
        build: makes the transformation.
        constraint: whether `update` takes `constraint_grads`.
        sent: number of arrays of the gradients' size that are redistributed as whole matrices; the
            result comes back. 0 for element-wise optimizers, which communicate nothing.
        grouped: how many matrices of q are orthogonalised together.
        scalars: whether inner products or numbers per matrix cross devices as well.
    """

    build: Callable[[], optax.GradientTransformationExtraArgs]
    constraint: bool = False
    sent: int = 1
    grouped: int = 1
    scalars: bool = False


ADAM = {"adam_learning_rate": 0.01}
ROWS = {
    "muon": Row(lambda: muon(0.1, weight_decay=0.1, **ADAM)),
    "muon, narrow": Row(lambda: muon(0.1, comm_dtype="bfloat16", **ADAM)),
    "teon": Row(lambda: teon(0.1, group_size=2, nesterov=True, **ADAM), grouped=2),
    "sift": Row(lambda: sift(0.1, rank=4, **ADAM), constraint=True, sent=2, scalars=True),
    "blur muon": Row(lambda: optax.chain(blur(), muon(0.1, **ADAM)), constraint=True, scalars=True),
    "sophia": Row(lambda: sophia(0.1, weight_decay=0.1), sent=0),
    "sign": Row(lambda: sign_momentum(0.1, weight_decay=0.1), sent=0),
}
MESHES = {"8": ((8,), ("fsdp",)), "4x2": ((4, 2), ("fsdp", "tp"))}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}

D, F = 16, 48
# Leaves that share a bucket: one shape (transposed to rows <= columns) and one sharding role.
BUCKETS = (("up", "down"), ("q",), ("o",), ("single",))


def shapes(layers):
    """16 layers divide over eight devices; with 6, and a single matrix, stacks are padded."""
    tree = {
        "embed": {"embedding": (24, D)},
        "layers": {
            "q": {"kernel": (layers, D, D)},
            "o": {"kernel": (layers, D, D)},
            "up": {"kernel": (layers, D, F), "bias": (layers, F)},
            "down": {"kernel": (layers, F, D)},
            "norm": {"scale": (layers, D)},
        },
    }
    return tree if layers == 16 else tree | {"single": {"kernel": (D, 2 * D)}}


def shardings(mesh, layers):
    """Column-parallel kernels (fsdp, tp), row-parallel ones (tp, fsdp), where the axes exist."""
    tp = "tp" if "tp" in mesh.axis_names else None
    column, row = ("fsdp", tp), (tp, "fsdp")
    specs = {"embedding": row, "scale": (None,), "bias": (tp,), "o": row, "down": row}

    def one(path, shape):
        parts = path_str(path).split("/")
        spec = specs.get(parts[-1]) or specs.get(parts[-2], column)
        return NamedSharding(mesh, P(*(None,) * (len(shape) - len(spec)), *spec))

    return jax.tree_util.tree_map_with_path(one, shapes(layers), is_leaf=is_shape)


def tree_of(seed, layers):
    return random_tree(seed, shapes=shapes(layers))


STEPS = (1, 2)


def step_function(name):
    row, tx = ROWS[name], ROWS[name].build()

    def step(grads, other, state, params):
        extra = {"constraint_grads": other} if row.constraint else {}
        return tx.update(grads, state, params, **extra)

    return tx, step


@functools.cache
def on_one_device(name, layers):
    tx, step = step_function(name)
    params, out = tree_of(0, layers), []
    state, step = tx.init(params), jax.jit(step)
    for i in STEPS:
        updates, state = step(tree_of(i, layers), tree_of(10 + i, layers), state, params)
        out.append(updates)
    return out


def placed(tx, params, mesh):
    """The state: momenta sharded like the parameters, the rest replicated."""

    def place(x):
        return x if len(x.devices()) > 1 else jax.device_put(x, NamedSharding(mesh, P()))

    return jax.tree.map(place, tx.init(params))


def expected_state(state, where, params):
    """The sharding of each leaf of a state: that of the parameter it is named after."""
    known = {
        path_str(p): (s, x.shape)
        for (p, s), x in zip(
            jax.tree_util.tree_leaves_with_path(where), jax.tree.leaves(params), strict=True
        )
    }
    out, moments = [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        found = [s for n, (s, x) in known.items() if path_str(path).endswith(n) and x == leaf.shape]
        moments += bool(found)
        out.append((path_str(path), leaf, found[0] if found else None))
    assert moments >= len(known)  # at least one momentum a parameter
    return out


# Always run: Muon, which the others are built on, on every mesh, and each row on (4, 2).
QUICK = {
    *(("muon", mesh, kind, False, 16) for mesh in MESHES for kind in KINDS),
    *(("muon", "4x2", kind, True, 6) for kind in KINDS),
    *((name, "4x2", "auto", False, 16) for name in ROWS),
    *((name, "4x2", "explicit", True, 6) for name in ("teon", "sift")),
}
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
    for case in itertools.product(ROWS, MESHES, KINDS, (False, True), (16, 6))
]


@pytest.mark.parametrize("name, mesh_name, kind, set_mesh, layers", CASES)
def test_update(capfd, name, mesh_name, kind, set_mesh, layers):
    sizes, names = MESHES[mesh_name]
    mesh = jax.make_mesh(sizes, names, axis_types=(KINDS[kind],) * len(names))
    where = shardings(mesh, layers)
    tx, step = step_function(name)
    params = jax.device_put(tree_of(0, layers), where)
    state = placed(tx, params, mesh)

    def run(state):
        trees = [jax.device_put((tree_of(i, layers), tree_of(10 + i, layers)),
                                (where, where)) for i in STEPS]  # fmt: skip
        # Compiled once: a state that came back with another sharding would fail at the second step.
        compiled = jax.jit(step).lower(*trees[0], state, params).compile()
        for (grads, other), want in zip(trees, on_one_device(name, layers), strict=True):
            updates, state = compiled(grads, other, state, params)
            jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), updates, want)
            kept = jax.tree.map(lambda u, s: u.sharding.is_equivalent_to(s, u.ndim), updates, where)
            assert all(jax.tree.leaves(kept)), kept
        return compiled, state

    if set_mesh:
        with jax.set_mesh(mesh):
            compiled, state = run(state)
    else:
        compiled, state = run(state)
    for path, leaf, sharding in expected_state(state, where, params):
        assert len(leaf.devices()) == 8, path
        if sharding is not None:
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (path, leaf.sharding)
    assert "rematerialization" not in capfd.readouterr().err
    check_collectives(compiled, name, mesh, layers)


def check_collectives(compiled, name, mesh, layers):
    row, tree = ROWS[name], shapes(layers)
    found = collectives(compiled)
    assert not any(c.in_loop for c in found)
    moved = [c for c in found if c.kind == "all-to-all"]
    rest = [c for c in found if c.kind != "all-to-all"]
    # Three inner products a leaf (BLUR), or a number for each matrix of the largest (padded) bucket
    # (SIFT), 4 bytes each.
    numbers = max(3 * len(jax.tree.leaves(tree, is_leaf=is_shape)), -(-2 * layers // 8) * 8)
    assert all(row.scalars and c.bytes <= 4 * numbers for c in rest), rest
    if not row.sent:
        assert not moved
        return

    # The ideal: for each mesh axis (one at a time, or XLA gathers everything) and each array that
    # is redistributed as whole matrices or comes back, one all-to-all in which a device sends its
    # share of the bucket: every element once. Where the matrices do not divide among the devices,
    # the share is that of the padded stack.
    buckets = [
        [tree.get("layers", {}).get(n) or tree[n] for n in b] for b in BUCKETS
        if b[0] in tree or b[0] in tree["layers"]
    ]  # fmt: skip
    journeys, share = row.sent + 1, 0
    for names, leaves in zip(BUCKETS, buckets, strict=False):
        kernels = [leaf["kernel"] for leaf in leaves]
        count = sum(k[0] if len(k) == 3 else 1 for k in kernels)
        together = 8 * (row.grouped if names == ("q",) else 1)
        share += 4 * -(-count // together) * together * kernels[0][-1] * kernels[0][-2] // 8
    assert sum(c.bytes for c in moved) <= 1.25 * len(mesh.axis_names) * journeys * share
    # At most one per bucket, array and mesh axis; the axis follows from the groups.
    per_axis = Counter(c.groups for c in moved)
    assert len(per_axis) == len(mesh.axis_names)
    assert max(per_axis.values()) <= len(buckets) * journeys


@pytest.mark.parametrize("name, kind", [("muon", "auto"), ("muon", "explicit"), ("sift", "auto")])
def test_recipe_compiles_once(name, kind):
    """As in a training loop: shardings given for parameters and state, three donated steps."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(KINDS[kind],) * 2)
    where = shardings(mesh, 6)
    tx, update = step_function(name)
    params = jax.device_put(tree_of(0, 6), where)
    state = placed(tx, params, mesh)
    traces = 0

    @functools.partial(
        jax.jit,
        out_shardings=(where, jax.tree.map(lambda x: x.sharding, state)),
        donate_argnums=(2, 3),
    )
    def step(grads, other, state, params):
        nonlocal traces
        traces += 1
        updates, state = update(grads, other, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(3):
        grads, other = (jax.device_put(tree_of(s, 6), where) for s in (i, 10 + i))
        params, state = step(grads, other, state, params)
    assert traces == 1
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params))
