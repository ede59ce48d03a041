"""Random directions: what is drawn, how it is keyed, and which leaves get which kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

from jaxlib_unlearn.optim.matrices import MatrixAxes
from jaxlib_unlearn.optim.zeroth_order import perturbations as families
from jaxlib_unlearn.optim.zeroth_order.directions import (
    Draws,
    draw_bases,
    norm_scales,
    perturbed,
)
from jaxlib_unlearn.optim.zeroth_order.engine import _regenerates
from jaxlib_unlearn.optim.zeroth_order.leaves import Stack, layout_of

PARAMS = {
    "embed": {"embedding": jnp.zeros((9, 4))},
    "layers": {"up": {"kernel": jnp.zeros((3, 4, 6)), "bias": jnp.zeros((3, 6))}},
    "norm": jnp.zeros(4),
}


def key(*numbers):
    out = jax.random.key(0, impl="threefry2x32")
    for number in numbers:
        out = jax.random.fold_in(out, number)
    return out


def draws_of(family, params, step=0):
    layout = layout_of(params)
    moments = [{} for _ in layout.leaves]
    if family.name == "curvature":
        moments = [{"hessian": jnp.full_like(x, 4.0)} for x in jax.tree.leaves(params)]
    bases = draw_bases(family, layout, key(families.BASIS, 0))
    return layout, Draws(key(families.QUERY, step), key(families.MASK, step), bases, moments)


def directions(family, params, queries, step=0):
    layout, draws = draws_of(family, params, step)
    leaves, structure = jax.tree.flatten(params)
    if family.normalize:
        draws = draws._replace(scales=norm_scales(family, layout, draws, queries))

    def one(query):
        moved = perturbed(family, layout, draws, leaves, query, jnp.float32(1.0))
        return jax.tree.unflatten(structure, moved)

    return jax.jit(lambda: jax.lax.map(one, jnp.arange(queries, dtype=jnp.int32)))()


ROWS = {
    "dense": families.dense(),
    "sparse": families.sparse(0.5),
    "uvt": families.uvt(2),
    "uzv": families.uzv(2),
    "subspace": families.subspace(2),
    "curvature": families.curvature(),
    "signs": families.signs(),
    "rowwise": families.rowwise(2),
}


@pytest.mark.parametrize("name", ROWS)
def test_one_layer_at_a_time_draws_what_the_stack_draws(name):
    family = ROWS[name]
    stack = directions(family, PARAMS, 2)["layers"]["up"]
    layout, draws = draws_of(family, PARAMS)
    where = {leaf.path: i for i, leaf in enumerate(layout.leaves)}

    @jax.jit
    def layer(index, query):
        out = {}
        for part in ("kernel", "bias"):
            i = where[f"layers/up/{part}"]
            leaf = layout.leaves[i]
            basis, moments = jax.tree.map(lambda x: x[index], (draws.bases[i], draws.moments[i]))
            # Its key, fold by fold.
            keys = jax.random.fold_in(draws.key, query), draws.mask_key, key(families.BASIS, 0)
            own = [jax.random.fold_in(jax.random.fold_in(k, leaf.code), index) for k in keys]
            core = families.draw_core(family, leaf, *own[:2], moments)
            # The basis of one layer alone is the slice of the stack's, too.
            alone = families.draw_basis(family, leaf, own[2])
            out[part] = families.lift(family, leaf, core, basis)
            out[part + " alone"] = families.lift(family, leaf, core, alone)
        return out

    for index in range(3):
        got = layer(jnp.int32(index), jnp.int32(1))
        for part in ("kernel", "bias"):
            # A batched QR, product or root may differ in the last bit; random draws may not.
            exact = {"rtol": 1e-5 if family.factors or name == "curvature" else 0, "atol": 0}
            np.testing.assert_allclose(got[part], stack[part][1, index], **exact)
            np.testing.assert_allclose(got[part + " alone"], got[part], rtol=2e-5, atol=2e-6)


def test_layers_queries_leaves_and_steps_draw_different_numbers():
    params = {
        "layers": {"a": {"kernel": jnp.zeros((2, 3, 3))}, "b": {"kernel": jnp.zeros((2, 3, 3))}}
    }
    drawn = [directions(families.dense(), params, 2, step) for step in range(2)]
    blocks = np.concatenate([np.asarray(x).reshape(-1, 9) for x in jax.tree.leaves(drawn)])
    assert len(np.unique(blocks[:, 0])) == len(blocks) == 16


def test_low_rank_directions_have_their_rank_and_scale():
    for name, rank in (("uvt", 2), ("uzv", 2), ("subspace", 2), ("rowwise", 2)):
        z = np.asarray(directions(ROWS[name], {"w": jnp.zeros((6, 5))}, 1)["w"][0])
        values = np.linalg.svd(z, compute_uv=False)
        assert values[rank - 1] > 1e-3 and values[rank] < 1e-5, name


def test_orthonormal_equals_cholesky_qr_of_the_same_gaussian():
    with jax.enable_x64(True):
        got = np.asarray(families.orthonormal(key(1), 2, 7, 3, jnp.float64))
        gaussian = np.asarray(jax.random.normal(key(1), (2, 7, 3), jnp.float64))
        for p, a in zip(got, gaussian, strict=True):
            upper = np.linalg.cholesky(a.T @ a).T
            np.testing.assert_allclose(p, a @ np.linalg.inv(upper), atol=1e-13)
            np.testing.assert_allclose(p.T @ p, np.eye(3), atol=1e-14)


def test_masks_are_shared_by_the_queries_of_a_step():
    params = {"w": jnp.zeros((50, 40))}
    first, later = (directions(ROWS["sparse"], params, 2, step)["w"] != 0 for step in (0, 1))
    np.testing.assert_array_equal(first[0], first[1])
    assert bool(jnp.any(first[0] != later[0]))
    # 2000 coins: a standard error of 0.011.
    assert abs(float(first[0].mean()) - 0.5) < 0.05
    assert families.sparse(0.5, "static").static_mask and not families.sparse(0.5).static_mask


def test_sphere_normalises_over_the_whole_tree():
    z = directions(families.sphere(), PARAMS, 3)
    size = sum(x.size for x in jax.tree.leaves(PARAMS))
    squares = sum(np.square(x).reshape(3, -1).sum(1) for x in jax.tree.leaves(z))
    np.testing.assert_allclose(squares, size, rtol=1e-5)


def test_curvature_divides_by_the_root():
    plain, divided = (directions(f, PARAMS, 1)["norm"] for f in (ROWS["dense"], ROWS["curvature"]))
    np.testing.assert_allclose(divided, plain / 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["dense", "uvt", "uzv", "subspace", "sphere", "rowwise"])
def test_estimates_of_a_linear_loss_are_unbiased(name):
    family = ROWS.get(name, families.sphere())
    params = {"w": jnp.zeros((6, 5))}
    layout = layout_of(params)
    grad = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)

    def one(i):
        bases = draw_bases(family, layout, key(families.BASIS, i))
        draws = Draws(key(families.QUERY, i), key(families.MASK, i), bases, [{}])
        if family.normalize:
            draws = draws._replace(scales=norm_scales(family, layout, draws, 1))
        (z,) = perturbed(family, layout, draws, [params["w"]], jnp.int32(0), jnp.float32(1.0))
        gain = 0.5 if name == "uvt" else 1.0
        return gain * jnp.square(jnp.sum(grad * z)) / jnp.sum(jnp.square(grad))

    slopes = jax.jit(jax.vmap(one))(jnp.arange(20000))
    # Over P, the subspace keeps r / out of the gradient.
    want = 2 / 5 if name == "subspace" else 1.0
    standard_error = float(slopes.std()) / len(slopes) ** 0.5
    assert standard_error < 0.02
    assert abs(float(slopes.mean()) - want) < 3.5 * standard_error


def test_variance_of_a_projected_estimate():
    rank, queries, shape = 2, 4, (6, 5)
    family, grad = families.subspace(rank), np.random.default_rng(0).normal(size=shape)
    layout = layout_of({"w": jnp.zeros(shape)})
    basis = draw_bases(family, layout, key(families.BASIS, 0))[0][0][0]
    target = jnp.asarray(grad, jnp.float32) @ basis

    def one(i):
        cores = jax.vmap(
            lambda q: families.draw_core(
                family, layout.leaves[0], key(1, i, q, layout.leaves[0].code), None, {}
            )[0]
        )(jnp.arange(queries))
        mean = jnp.mean(jnp.sum(cores * target, (1, 2))[:, None, None] * cores, 0)
        return jnp.sum(jnp.square(mean - target)) / jnp.sum(jnp.square(target))

    errors = jax.jit(jax.vmap(one))(jnp.arange(200000))
    standard_error = float(errors.std()) / len(errors) ** 0.5
    assert standard_error < 0.01
    # (r n + 1) / q with n the input side.
    assert abs(float(errors.mean()) - (rank * shape[0] + 1) / queries) < 3.5 * standard_error


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_why_some_generators_are_refused(impl):
    keys = jax.random.split(jax.random.key(0, impl=impl), 3)
    together = jax.vmap(lambda k: jax.random.normal(k, (4,)))(keys)
    alone = jnp.stack([jax.random.normal(k, (4,)) for k in keys])
    assert bool(jnp.any(together != alone))
    assert not _regenerates(impl)


def test_the_generator_we_use_regenerates():
    assert _regenerates("threefry2x32")


EMBEDDING, PLAIN = MatrixAxes((), (1,), (0,)), MatrixAxes((), (0,), (1,))
LEAVES = {
    "vector": ("b", (4,), None),
    "scalar": ("t", (), None),
    "bare": ("w", (4, 3), PLAIN),
    "embedding": ("embed/embedding", (9, 4), EMBEDDING),
    "head": ("lm_head/kernel", (4, 9), PLAIN),
    "class token": ("cls", (1, 1, 8), None),
    "positions": ("pos_embed", (1, 7, 8), MatrixAxes((0,), (2,), (1,))),
    "convolution": ("conv/kernel", (3, 3, 2, 8), MatrixAxes((), (0, 1, 2), (3,))),
    "dense general": ("attn/query/kernel", (8, 2, 4), MatrixAxes((), (0,), (1, 2))),
    "unknown stack": ("what", (2, 3, 4), MatrixAxes((0,), (1,), (2,))),
}


def nested(path, leaf):
    for part in reversed(path.split("/")):
        leaf = {part: leaf}
    return leaf


@pytest.mark.parametrize("name", LEAVES)
def test_which_axes_a_leaf_has(name):
    path, shape, want = LEAVES[name]
    (leaf,) = layout_of(nested(path, jax.ShapeDtypeStruct(shape, jnp.float32))).leaves
    assert leaf.axes == want


def test_stacks_segments_and_lists_of_layers():
    def stack(n):
        return {"up": {"kernel": jnp.zeros((n, 4, 4)), "bias": jnp.zeros((n, 4))}}

    layer = {"up": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}}
    assert layout_of({"layers": stack(3)}).stacks == (Stack("layers", 0, 3, (0, 1)),)
    parts = layout_of({"layers": (stack(1), stack(2))})
    assert parts.stacks == (Stack("layers", 0, 1, (0, 1)), Stack("layers", 1, 2, (2, 3)))
    assert parts.leaves[0].code == parts.leaves[2].code  # a segment's number is not in the name
    whole = layout_of({"layers": stack(3)})
    assert whole.leaves[0].code == parts.leaves[0].code and whole.size() == parts.size() == 60
    for separate in ([layer, layer], {"up": layer["up"]}):
        found = layout_of({"layers": separate})
        assert found.stacks == () and [leaf.axes is None for leaf in found.leaves[:2]] == [
            True,
            False,
        ]
    assert len({leaf.code for leaf in layout_of({"layers": [layer, layer]}).leaves}) == 4
    experts = layout_of({"layers": {"experts": {"up": {"kernel": jnp.zeros((2, 5, 4, 6))}}}})
    assert experts.leaves[0].axes == MatrixAxes((0,), (1,), (2,))
    many = layout_of({"blocks": {str(i): stack(1) for i in range(11)}})
    assert [s.first for s in many.stacks] == list(range(11))


def test_dimension_numbers_layout_and_decay():
    params = {"layers": {"up": {"kernel": jnp.zeros((2, 4, 6))}}, "w": jnp.zeros((3, 5))}
    numbers = {"layers": MuonDimensionNumbers(2, 1), "w": None}
    found = layout_of(params, matrices=numbers)
    assert [leaf.axes for leaf in found.leaves] == [EMBEDDING, None]
    assert [leaf.axes for leaf in layout_of(params, layout="out_in").leaves] == [EMBEDDING] * 2
    with pytest.raises(ValueError, match="leading axis"):
        layout_of(params, matrices={"layers": MuonDimensionNumbers(0, 1), "w": None})
    named = {"proj": PARAMS["layers"]["up"]["kernel"][0], "norm": {"scale": jnp.zeros((2, 3))}}
    assert {leaf.path: leaf.decayed for leaf in layout_of(named).leaves} == {
        "proj": True,
        "norm/scale": False,
    }
    with pytest.raises(ValueError, match="complex"):
        layout_of({"w": jnp.zeros((2, 2), jnp.complex64)})
    counted = layout_of({"w": jnp.zeros(3), "steps": jnp.zeros((), jnp.int32)})
    assert [leaf.trainable for leaf in counted.leaves] == [False, True]
