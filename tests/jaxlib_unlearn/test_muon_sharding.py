"""Muon on eight devices: the single-device update, kept shardings, and few collectives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim import buckets, orthogonalize

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices"),
    pytest.mark.usefixtures("compiled_afresh"),
]

MESHES = {
    "8": ((8,), ("fsdp",)),
    "4x2": ((4, 2), ("fsdp", "tp")),
}
# Four layers on eight devices: stacks are padded, except where leaves share a bucket.
L, D, F = 4, 16, 32
SHAPES = {
    "embed": {"embedding": (24, D)},
    "layers": {
        "q": {"kernel": (L, D, D)},
        "o": {"kernel": (L, D, D)},
        "up": {"kernel": (L, D, F), "bias": (L, F)},
        "down": {"kernel": (L, F, D)},
        "norm": {"scale": (L, D)},
    },
    "single": {"kernel": (D, F)},
}
COLLECTIVE = re.compile(
    r"= (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
)


def make_mesh(name, kind):
    sizes, names = MESHES[name]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))


def specs(mesh):
    """Column-parallel kernels (fsdp, tp), row-parallel ones (tp, fsdp), as far as the mesh goes."""
    tp = "tp" if "tp" in mesh.axis_names else None
    column, row = P(None, "fsdp", tp), P(None, tp, "fsdp")
    return {
        "embed": {"embedding": P(tp, "fsdp")},
        "layers": {
            "q": {"kernel": column},
            "o": {"kernel": row},
            "up": {"kernel": column, "bias": P(None, tp)},
            "down": {"kernel": row},
            "norm": {"scale": P(None, None)},
        },
        "single": {"kernel": P(*column[1:])},
    }


def shardings(mesh):
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs(mesh), is_leaf=lambda x: isinstance(x, P)
    )


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: rng.standard_normal(s).astype(np.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


TX = optim.muon(0.1, weight_decay=0.1, adam_learning_rate=0.01)


@functools.cache
def on_one_device():
    params, update = random_tree(0), jax.jit(TX.update)
    state, out = TX.init(params), []
    for i in (1, 2):
        updates, state = update(random_tree(i), state, params)
        out.append(updates)
    return out


def init(mesh, params):
    """The state: momenta lie like the parameters, and the counts on every device."""

    def place(x):
        return x if len(x.devices()) > 1 else jax.device_put(x, NamedSharding(mesh, P()))

    return jax.tree.map(place, TX.init(params))


def momentum(state):
    return state.inner_states["muon"].inner_state[0].mu


@pytest.mark.parametrize("mesh_name, set_mesh", [("8", False), ("4x2", False), ("4x2", True)])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_update_equals_one_device(mesh_name, kind, set_mesh):
    mesh = make_mesh(mesh_name, kind)
    where = shardings(mesh)
    params = jax.device_put(random_tree(0), where)
    state = init(mesh, params)
    traces = 0

    @jax.jit
    def step(grads, state, params):
        nonlocal traces
        traces += 1
        return TX.update(grads, state, params)

    def run(state):
        for i, want in zip((1, 2), on_one_device(), strict=True):
            updates, state = step(jax.device_put(random_tree(i), where), state, params)
            for path, w in jax.tree_util.tree_leaves_with_path(want):
                u = functools.reduce(lambda t, k: t[k.key], path, updates)
                s = functools.reduce(lambda t, k: t[k.key], path, where)
                np.testing.assert_allclose(u, w, atol=1e-4)
                assert u.sharding.is_equivalent_to(s, u.ndim), (path, u.sharding)
        for path, m in jax.tree_util.tree_leaves_with_path(momentum(state)):
            s = functools.reduce(lambda t, k: t[k.key], path, where)
            assert m.sharding.is_equivalent_to(s, m.ndim), (path, m.sharding)

    if set_mesh:
        with jax.set_mesh(mesh):
            run(state)
    else:
        run(state)
    assert traces == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_recipe_compiles_once(kind):
    """The training loop's way: shardings given for parameters and state, three steps."""
    mesh = make_mesh("4x2", kind)
    where = shardings(mesh)
    params = jax.device_put(random_tree(0), where)
    state = init(mesh, params)
    state_where = jax.tree.map(lambda x: x.sharding, state)
    traces = 0

    @functools.partial(jax.jit, out_shardings=(where, state_where), donate_argnums=(1, 2))
    def step(grads, state, params):
        nonlocal traces
        traces += 1
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(3):
        params, state = step(jax.device_put(random_tree(i), where), state, params)
    assert traces == 1


def test_eager_update_keeps_shardings():
    mesh = make_mesh("4x2", AxisType.Auto)
    where = shardings(mesh)["single"]
    grads = jax.device_put(random_tree(0)["single"], where)
    tx = optim.scale_by_muon()
    updates, _ = tx.update(grads, tx.init(grads))
    assert updates["kernel"].sharding.is_equivalent_to(where["kernel"], 2)


def collectives(text):
    """Kind and bytes moved by every collective of a compiled program, with its computation."""
    found, computation = [], ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            computation = line.split("(")[0].strip()
        match = COLLECTIVE.search(line)
        if match:
            sizes = re.findall(r"f32\[([\d,]*)\]", match.group(1))
            count = sum(int(np.prod([int(n) for n in s.split(",") if n])) for s in sizes)
            found.append((match.group(2), 4 * count, computation))
    return found


def compiled(mesh, shapes, spec_tree):
    def abstract(spec, shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    args = jax.tree.map(abstract, spec_tree, shapes, is_leaf=lambda x: isinstance(x, P))
    tx = optim.scale_by_muon()
    # A state with the shardings of the parameters, as the training recipe makes it.
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    return jax.jit(tx.update).lower(args, optim.MuonState(count, args)).compile()


@pytest.mark.parametrize("layers", [16, 6])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("mesh_name", MESHES)
def test_collectives(capfd, mesh_name, kind, layers):
    """One bucket of up and down, one of q, one of o."""
    mesh = make_mesh(mesh_name, kind)
    shapes = {
        "up": {"kernel": (layers, 64, 256)},
        "down": {"kernel": (layers, 256, 64)},
        "q": {"kernel": (layers, 64, 64)},
        "o": {"kernel": (layers, 64, 64)},
    }
    tree = {n: {"kernel": specs(mesh)["layers"][n]["kernel"]} for n in shapes}
    text = compiled(mesh, shapes, tree).as_text()
    found = collectives(text)
    axes, bucket_count = len(mesh.axis_names), 3
    assert {kind for kind, _, _ in found} == {"all-to-all"}
    assert len(found) <= 2 * axes * bucket_count
    # All of it in the entry computation: nothing inside a loop or a branch.
    assert all(computation.startswith("ENTRY") for _, _, computation in found)
    # A device sends its shard once per axis and direction.
    padded = -(-2 * layers // 8) * 8 * 64 * 256 + 2 * -(-layers // 8) * 8 * 64 * 64
    assert sum(size for _, size, _ in found) <= 1.25 * 2 * axes * 4 * padded / 8
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "spec",
    [
        P(),
        P(None, None, ("fsdp", "tp")),
        P(None, None, "fsdp"),
        P(None, "tp"),
        P("fsdp", None, "tp"),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(8, 16, 32), (4, 32, 16)], ids=str)
def test_any_sharding(kind, spec, shape):
    mesh = make_mesh("4x2", kind)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    grads = {"a": x, "b": x + 1}
    tx = optim.scale_by_muon()
    want, _ = tx.update(grads, tx.init(grads))
    placed = jax.device_put(grads, NamedSharding(mesh, spec))
    got, _ = jax.jit(tx.update)(placed, tx.init(placed))
    for name in grads:
        np.testing.assert_allclose(got[name], want[name], atol=1e-4)
        assert got[name].sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_dense_general_sharded_by_heads(kind):
    mesh = make_mesh("4x2", kind)
    rng = np.random.default_rng(0)
    grads = {
        "attn": {
            "query": {"kernel": rng.standard_normal((16, 4, 8)).astype(np.float32)},
            "out": {"kernel": rng.standard_normal((4, 8, 16)).astype(np.float32)},
        }
    }
    where = {
        "attn": {
            "query": {"kernel": NamedSharding(mesh, P("fsdp", "tp", None))},
            "out": {"kernel": NamedSharding(mesh, P("tp", None, "fsdp"))},
        }
    }
    tx = optim.muon(1.0)
    want, _ = tx.update(grads, tx.init(grads), grads)
    placed = jax.device_put(grads, where)
    got, _ = jax.jit(tx.update)(placed, tx.init(placed), placed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), got, want)
    same = jax.tree.map(lambda g, w: g.sharding.is_equivalent_to(w, g.ndim), got, where)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "ortho", [orthogonalize.svd(), orthogonalize.gram_newton_schulz()], ids=["svd", "gram"]
)
def test_other_orthogonalisers(kind, ortho):
    mesh = make_mesh("4x2", kind)
    x = np.random.default_rng(0).standard_normal((8, 16, 32)).astype(np.float32)
    tx = optim.scale_by_muon(orthogonalize=ortho)
    want, _ = tx.update(x, tx.init(x))
    placed = jax.device_put(x, NamedSharding(mesh, P(None, "fsdp", "tp")))
    fn = jax.jit(tx.update)
    got, _ = fn(placed, tx.init(placed))
    np.testing.assert_allclose(got, want, atol=1e-4)
    found = collectives(fn.lower(placed, tx.init(placed)).compile().as_text())
    assert {kind for kind, _, _ in found} == {"all-to-all"}


def test_mixed_meshes_are_refused():
    kinds = (AxisType.Auto, AxisType.Explicit)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)
    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("a", "b")))
    with pytest.raises(ValueError, match="mixes Auto and Explicit"):
        buckets.map_matrices(lambda z: z, [x], [optim.matrices.MatrixAxes((), (0,), (1,))])
