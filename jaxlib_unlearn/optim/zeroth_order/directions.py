"""Random directions over a whole parameter tree: perturbed copies, layer maps, weighted sums.

Stacked layers are visited one at a time, so a walk needs the memory of one layer beside its result.
The walk, the layer map that runs inside a decoder's scan, and the sum over queries draw the same
numbers: all three go through ``draw_core`` with the absolute index of the layer.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.optim.draws import drawn_once
from jaxlib_unlearn.optim.matrices import path_str
from jaxlib_unlearn.optim.zeroth_order.leaves import Layout, Stack
from jaxlib_unlearn.optim.zeroth_order.perturbations import (
    Basis,
    Factored,
    Family,
    Leaf,
    Moments,
    as_leaf,
    draw_basis,
    draw_core,
    is_low_rank,
    leaf_keys,
    perturb,
    wide,
)

LayerMap = Callable[[Any, jax.Array], Any]
AT_ONCE = 64  # queries whose factors are multiplied together


class Draws(NamedTuple):
    """The arrays from which every direction of one step is regenerated.

    Args:
        key: The key for the purpose QUERY and the step.
        mask_key: The key for the purpose MASK and the step.
        bases: The basis of every leaf (stacked leaves: with the layer axis in front).
        moments: The moments of every leaf, arrays like the leaf.
        scales: The factors of the directions, ``(q,)``, or None for one.
    """

    key: jax.Array
    mask_key: jax.Array
    bases: Sequence[Basis]
    moments: Sequence[Moments]
    scales: jax.Array | None = None


def draw_bases(family: Family, layout: Layout, key: jax.Array) -> list[Basis]:
    """The bases of all leaves, drawn with the key of a refresh.

    Leaves of equal matrices are drawn together: one decomposition in the program, not one each.
    """
    out: list[Basis] = [()] * len(layout.leaves)
    if family.basis is None:
        return out
    alike: dict[Any, list[tuple[int, jax.Array]]] = {}

    def note(members, keys):
        for i, own in zip(members, keys, strict=True):
            leaf = layout.leaves[i]
            alike.setdefault((leaf.axes, leaf.shape, leaf.dtype), []).append((i, own))

    outer, stacks = _trainable(layout)
    for members, stack in ((outer, None), *((members, stack) for stack, members in stacks)):
        low = [i for i in members if is_low_rank(family, layout.leaves[i])]
        if low:
            leaves = [layout.leaves[i] for i in low]
            draw = functools.partial(leaf_keys, key, leaves)
            note(low, draw(None) if stack is None else jax.vmap(draw, out_axes=1)(_indices(stack)))
    for members in alike.values():
        leaf, end = layout.leaves[members[0][0]], 0
        keys = jnp.concatenate([own.reshape(-1) for _, own in members])
        drawn = jax.vmap(functools.partial(draw_basis, family, leaf))(keys)
        for i, own in members:
            start, end = end, end + own.size
            out[i] = tuple(x[start:end].reshape(*own.shape, *x.shape[1:]) for x in drawn)
    return out


def norm_scales(family: Family, layout: Layout, draws: Draws, num_queries: int) -> jax.Array:
    """``sqrt(d) / norm`` of every query's draw over all d trainable parameters, ``(q,)``."""

    def one(query):
        keys = draw_keys(family, draws, jax.random.fold_in(draws.key, query))

        def squares(leaf, own, moments):
            return jnp.sum(jnp.square(draw_core(family, leaf, own[0], own[1], moments)))

        return sum(jnp.sum(x) for x in walk(squares, layout, keys, (draws.moments,)).values())

    total = jax.lax.map(one, jnp.arange(num_queries, dtype=jnp.int32))
    return jnp.sqrt(layout.size() / total)


def perturbed(
    family: Family,
    layout: Layout,
    draws: Draws,
    arrays: Sequence[jax.Array],
    query: jax.Array,
    offset: jax.Array,
) -> list[jax.Array]:
    """All leaves moved by ``offset`` along the direction of a query.

    Args:
        family: The family of random directions.
        layout: The layout of the parameters.
        draws: The draws of the step.
        arrays: The leaves.
        query: The number of the query, () int32.
        offset: The step along the direction, (); it is differentiable.

    Returns:
        The leaves of the perturbed tree; frozen ones are returned as they are.
    """
    key, scale = _query(draws, query, offset)

    def move(leaf, own, *entry):
        return _moved(family, leaf, own, draws.key, scale, *entry)

    keys = draw_keys(family, draws, key)
    moved = walk(move, layout, keys, (arrays, draws.bases, draws.moments))
    return [moved.get(i, x) for i, x in enumerate(arrays)]


def layered(
    family: Family,
    layout: Layout,
    draws: Draws,
    arrays: Sequence[jax.Array],
    query: jax.Array,
    offset: jax.Array,
    factored: type[Factored] | None,
    outer: Collection[str] = (),
) -> tuple[list[Any], LayerMap]:
    """Perturbs the leaves that are not stacked, as :func:`perturbed` does, and returns a layer map.

    Returns:
        The leaves, with stacked ones unperturbed, and ``layer_map(layer_params, index)``, which
        perturbs one layer. With ``factored`` the low-rank kernels of a layer are of that class, and
        so are the leaves outside the stacks whose paths are in ``outer``.

    Raises:
        ValueError: no stacked layers, or stacks under several names.
    """
    key, scale = _query(draws, query, offset)
    keys = draw_keys(family, draws, key)
    out: list[Any] = list(arrays)
    single = _trainable(layout)[0]
    for i, own in zip(single, _own([layout.leaves[i] for i in single], keys, None), strict=True):
        leaf, entry = layout.leaves[i], (arrays[i], draws.bases[i], draws.moments[i])
        low = factored if leaf.path in outer else None
        out[i] = _moved(family, leaf, own, draws.key, scale, *entry, low)
    prefixes = {stack.prefix for stack in layout.stacks}
    if len(prefixes) != 1:
        raise ValueError(
            f"layered_value_fn needs stacked layers under one name, found {sorted(prefixes)}"
        )
    (prefix,) = prefixes
    entries: dict[str, list[tuple[Stack, int]]] = {}
    for stack in layout.stacks:
        for i in stack.members:
            entries.setdefault(layout.leaves[i].name, []).append((stack, i))
    tables = {
        name: _LayerTable.of(layout, draws, found, sum(stack.count for stack in layout.stacks))
        for name, found in entries.items()
    }

    def layer_map(layer, index):
        flat, structure = jax.tree_util.tree_flatten_with_path(layer)
        found = []
        for path, _ in flat:
            name = f"{prefix}/{path_str(path)}"
            if name not in tables:
                raise ValueError(f"layer_map got {name!r}, which the parameters do not have")
            found.append(tables[name])
        moving = [i for i, table in enumerate(found) if table.active.any()]
        moved = [x for _, x in flat]
        owns = _own([found[i].leaf for i in moving], keys, index)
        for i, own in zip(moving, owns, strict=True):
            moved[i] = found[i].move(family, moved[i], index, own, draws.key, scale, factored)
        return jax.tree.unflatten(structure, moved)

    return out, layer_map


class _LayerTable(NamedTuple):
    """One name's leaves over all consecutive stacks, looked up by absolute layer index."""

    leaf: Leaf
    active: np.ndarray
    bases: Basis
    moments: Moments

    @classmethod
    def of(cls, layout: Layout, draws: Draws, found: list[tuple[Stack, int]], depth: int):
        active = np.zeros(depth, bool)
        moving = [(stack, i) for stack, i in found if layout.leaves[i].trainable]
        for stack, _ in moving:
            active[stack.first : stack.first + stack.count] = True

        def join(*parts):
            if len(parts) == 1 and active.all():
                return parts[0]
            whole = jnp.ones((depth, *parts[0].shape[1:]), parts[0].dtype)
            for (stack, _), part in zip(moving, parts, strict=True):
                whole = jax.lax.dynamic_update_slice_in_dim(whole, part, stack.first, 0)
            return whole

        kept = [(draws.bases[i], draws.moments[i]) for _, i in moving]
        bases, moments = jax.tree.map(join, *kept) if kept else ((), {})
        return cls(layout.leaves[(moving or found)[0][1]], active, bases, moments)

    def move(self, family, x, index, own, any_key, scale, factored):
        if not self.active.all():
            scale = scale * jnp.asarray(self.active)[index].astype(scale.dtype)
        basis, moments = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False),
            (self.bases, self.moments),
        )
        return _moved(family, self.leaf, own, any_key, scale, x, basis, moments, factored)


def weighted_sums(
    family: Family,
    leaf: Leaf,
    keys: jax.Array,
    mask_key: jax.Array | None,
    moments: Moments,
    weights: jax.Array,
    square_weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """``sum_i w_i core_i`` and ``sum_i s_i core_i^2`` of one layer, regenerating the draws.

    Args:
        family: The family of random directions.
        leaf: The parameter.
        keys: The leaf's own keys of all queries, ``(q,)``, from ``perturbations.leaf_keys``.
        mask_key: The leaf's own key for the purpose MASK, for families that weigh.
        moments: The moments of this layer.
        weights: The weights w of the draws, ``(q,)``, with the draws' scales included.
        square_weights: The weights s of the squares, ``(q,)``, or None.

    Returns:
        Two arrays like one core; the second is None without ``square_weights``.
    """
    dtype = wide(leaf.dtype)
    pairs = (weights.astype(dtype),)
    if square_weights is not None:
        pairs += (square_weights.astype(dtype),)

    def terms(key, pair):
        core = draw_core(family, leaf, key, mask_key, moments)
        return tuple(w * z for w, z in zip(pair, (core, jnp.square(core)), strict=False))

    if weights.shape[0] == 1:
        sums = terms(keys[0], tuple(w[0] for w in pairs))
    else:

        def body(total, inputs):
            return tuple(t + n for t, n in zip(total, terms(*inputs), strict=True)), None

        one = jax.eval_shape(terms, keys[0], tuple(w[0] for w in pairs))
        start = tuple(jnp.zeros(x.shape, x.dtype) for x in one)
        sums, _ = jax.lax.scan(body, start, (keys, pairs))
    return sums[0], (sums[1] if len(sums) > 1 else None)


def product_sum(
    family: Family,
    leaf: Leaf,
    keys: jax.Array,
    basis: Basis,
    weights: jax.Array,
) -> jax.Array:
    """``sum_i w_i Z_i`` of one layer, for low-rank directions that are not linear in their core.

    The factors of up to ``AT_ONCE`` queries are drawn together and multiplied as one product, so
    that the sum is written once for all of them.

    Args:
        family: The family of random directions.
        leaf: The parameter.
        keys: The leaf's own keys of all queries, ``(q,)``, from ``perturbations.leaf_keys``.
        basis: The basis of this layer.
        weights: The weights w of the directions, ``(q,)``.

    Returns:
        The sum, of the leaf's own shape.
    """
    assert leaf.axes is not None
    count, fan_in = weights.shape[0], leaf.axes.sizes(leaf.shape)[1]
    weights = weights.astype(wide(leaf.dtype))

    def factors(key):
        core = draw_core(family, leaf, key, None, {})
        return family.factors(core, basis, fan_in)  # pyright: ignore[reportOptionalCall]

    def some(keys, weights):
        left, right = jax.vmap(factors)(keys)
        return jnp.einsum("q,qnir,qnor->nio", weights, left, right, precision="highest")

    if count <= AT_ONCE:
        return as_leaf(leaf, some(keys, weights))
    chunks = -(-count // AT_ONCE)
    missing = chunks * AT_ONCE - count  # the first queries again, with weight 0
    keys = keys[jnp.arange(chunks * AT_ONCE) % count].reshape(chunks, AT_ONCE)
    weights = jnp.pad(weights, (0, missing)).reshape(chunks, AT_ONCE)
    start = jnp.zeros(leaf.axes.sizes(leaf.shape), weights.dtype)
    total, _ = jax.lax.scan(lambda sum_, some_: (sum_ + some(*some_), None), start, (keys, weights))
    return as_leaf(leaf, total)


def gain(family: Family, leaf: Leaf) -> float:
    """The factor of the estimate for a leaf."""
    if leaf.axes is None:
        return family.vector_gain
    return family.gain(*leaf.axes.sizes(leaf.shape)[1:])


def walk(
    fn: Callable[..., Any],
    layout: Layout,
    keys: Sequence[jax.Array | None],
    groups: Sequence[Sequence[Any]],
) -> dict[int, Any]:
    """Applies ``fn(leaf, own keys, *entries)`` to every trainable leaf, one layer at a time.

    Args:
        fn: A function ``(leaf, its own of the keys, one entry of each group) -> tree of arrays``.
        layout: The layout of the parameters.
        keys: The keys of the step, or None; ``perturbations.leaf_keys`` gives each leaf's own.
        groups: The groups, each with one tree of arrays for each leaf; stacked leaves have the
            layer axis in front.

    Returns:
        Leaf position -> result, the layers stacked again.
    """

    def visit(members, index, entries):
        leaves = [layout.leaves[i] for i in members]
        owns = _own(leaves, keys, index)
        return [fn(*one, *e) for *one, e in zip(leaves, owns, entries, strict=True)]

    outer, stacks = _trainable(layout)
    entries = [tuple(group[i] for group in groups) for i in outer]
    out = dict(zip(outer, visit(outer, None, entries), strict=True))
    for stack, members in stacks:
        entries = [tuple(group[i] for group in groups) for i in members]
        results = jax.lax.map(
            lambda inputs, members=members: visit(members, *inputs), (_indices(stack), entries)
        )
        out |= dict(zip(members, results, strict=True))
    return out


def draw_keys(family: Family, draws: Draws, key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The keys of a draw: the key of queries, and the key of the mask if the family weighs."""
    return key, None if family.weigh is None else draws.mask_key


def _own(
    leaves: Sequence[Leaf], keys: Sequence[jax.Array | None], index: jax.Array | None
) -> list[tuple[Any, ...]]:
    """The own keys of every leaf (of one layer of it)."""
    found = [None if key is None or not leaves else leaf_keys(key, leaves, index) for key in keys]
    return [tuple(k if k is None else k[i] for k in found) for i in range(len(leaves))]


def _trainable(layout: Layout) -> tuple[list[int], list[tuple[Stack, list[int]]]]:
    outer = [i for i in layout.outer if layout.leaves[i].trainable]
    stacks = [(s, [i for i in s.members if layout.leaves[i].trainable]) for s in layout.stacks]
    return outer, [(stack, members) for stack, members in stacks if members]


def _indices(stack: Stack) -> jax.Array:
    return jnp.arange(stack.first, stack.first + stack.count, dtype=jnp.int32)


def _query(draws: Draws, query: jax.Array, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale = offset if draws.scales is None else offset * draws.scales[query]
    return jax.random.fold_in(draws.key, query), scale


def _moved(family, leaf, own, any_key, scale, x, basis, moments, factored=None):
    draw = functools.partial(draw_core, family, leaf, own[0], own[1], moments)
    # A vector is broadcast over all tokens. Parts are evaluated together, and the draw of a part is
    # broadcast over the tokens of that part.
    core = drawn_once(draw, any_key) if family.parts or leaf.axes is None else draw()
    return perturb(family, leaf, x, core, basis, scale, factored)
