"""Matrices of one shape in one batch, each device working on its own share of them.

Leaves are read as stacks of matrices, turned so that rows <= columns, and stacked *across leaves*
into buckets of one (shape, dtype, sharding role). On a mesh the sharding then moves from the matrix
axes to the stack axis, one mesh axis at a time (two at once make XLA gather everything), a function
runs on whole matrices inside ``shard_map`` (so no collective can enter it), and the sharding moves
back the same way: one all-to-all per mesh axis, bucket and direction.

The mesh is read from the arrays' types, so this works in a bare ``jit``, with Auto and with
Explicit axes. Mesh axes that shard none of a bucket's matrices share the work as well: slicing the
stack along them is free, and the result is gathered once. Stacks that do not divide by the number
of devices are padded with zeros. Off a mesh a bucket goes through ``lax.map`` in blocks of about
four MiB: measured on CPU 10 % faster than one batch, with a quarter of its temporary memory, and
still enough work for one kernel on an accelerator.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn.optim.matrices import MatrixAxes

StackFunction = Callable[[jax.Array], jax.Array]

_BLOCK = 2**20  # elements of a block of matrices off a mesh
_OPEN = P.UNCONSTRAINED


def map_matrices(
    fn: StackFunction,
    leaves: Sequence[jax.Array],
    axes: Sequence[MatrixAxes],
    roles: Sequence[str] | None = None,
) -> list[jax.Array]:
    """Applies a function of matrices to every matrix of every leaf, in buckets.

    Args:
        fn: ``(n, r, c) -> (n, r, c)`` with r <= c, each matrix on its own and equivariant under
            the (conjugate) transpose. The same object at every call, or eager calls recompile.
        leaves: arrays of rank >= 2.
        axes: how each leaf is a stack of matrices.
        roles: one word a leaf; leaves with different words never share a bucket. It matters where
            types do not show shardings (Auto axes): see ``matrices.sharding_role``.

    Returns:
        Arrays like ``leaves``: same shapes, dtypes and shardings.

    Example:
        >>> import jax.numpy as jnp
        >>> axes = MatrixAxes((), (0,), (1,))
        >>> leaves = [jnp.ones((2, 3)), jnp.ones((3, 2))]
        >>> wide, tall = map_matrices(lambda z: 2 * z, leaves, [axes, axes])
        >>> wide.shape, tall.shape, float(tall.sum())
        ((2, 3), (3, 2), 12.0)
    """
    roles = ("",) * len(leaves) if roles is None else roles
    return _map(tuple(leaves), fn=fn, axes=tuple(axes), roles=tuple(roles))


@functools.partial(jax.jit, static_argnames=("fn", "axes", "roles"))
def _map(leaves, *, fn, axes, roles) -> list[jax.Array]:
    buckets: dict[tuple, list[int]] = {}
    stacks = []
    for i, (leaf, leaf_axes, role) in enumerate(zip(leaves, axes, roles, strict=True)):
        stack = _to_stack(leaf, leaf_axes)
        stacks.append(stack)
        turned = _is_tall(leaf, leaf_axes)
        kind, spec = _sharding_kind(leaf), _spec(stack)
        key = (stack.shape[1:], stack.dtype, kind)
        if kind == "explicit":
            # The type shows the role. Stacks sharded along themselves cannot be concatenated.
            key += (spec, jax.typeof(leaf).sharding.mesh, i if spec[0] else None)
        elif kind == "auto":
            key += ((role == "row") != turned, jax.typeof(leaf).sharding.mesh)
        buckets.setdefault(key, []).append(i)

    out: list[jax.Array] = list(leaves)
    for members in buckets.values():
        sizes = [stacks[i].shape[0] for i in members]
        batch = stacks[members[0]]
        if len(members) > 1:
            batch = jnp.concatenate([stacks[i] for i in members])
        batch = _run(fn, batch, _sharding_kind(leaves[members[0]]))
        start = 0
        for i, size in zip(members, sizes, strict=True):
            part = batch if len(members) == 1 else batch[start : start + size]
            out[i] = _from_stack(part, leaves[i], axes[i])
            start += size
    return out


# Leaves and stacks of matrices


def _is_tall(leaf: jax.Array, axes: MatrixAxes) -> bool:
    _, fan_in, fan_out = axes.sizes(leaf.shape)
    return fan_in > fan_out


def _order(axes: MatrixAxes) -> tuple[int, ...]:
    return axes.stack + axes.fan_in + axes.fan_out


def _to_stack(leaf: jax.Array, axes: MatrixAxes) -> jax.Array:
    """(n, r, c) with r <= c."""
    x = jnp.transpose(leaf, _order(axes))
    if _sharding_kind(leaf) == "explicit":
        groups = [len(group) for group in axes]
        kept, merged = _merge_spec(_spec(x), groups)
        x = _reshape(_reshard(x, kept), axes.sizes(leaf.shape), merged)
    else:
        x = x.reshape(axes.sizes(leaf.shape))
    return _adjoint(x) if _is_tall(leaf, axes) else x


def _from_stack(stack: jax.Array, leaf: jax.Array, axes: MatrixAxes) -> jax.Array:
    order = _order(axes)
    inverse = tuple(order.index(a) for a in range(leaf.ndim))
    x = _adjoint(stack) if _is_tall(leaf, axes) else stack
    shape = tuple(leaf.shape[a] for a in order)
    kind = _sharding_kind(leaf)
    if kind == "explicit":
        spec = _spec(leaf)
        kept, merged = _merge_spec(P(*(spec[a] for a in order)), [len(group) for group in axes])
        x = _reshape(_reshard(x, merged), shape, kept)
        return _reshard(jnp.transpose(x, inverse), spec)
    x = jnp.transpose(x.reshape(shape), inverse)
    if kind == "auto":
        # Changes no value (NaN in, NaN out already) but ties the result to the leaf's sharding,
        # which the types do not show: without it a jit without out_shardings may replicate.
        x = jnp.where(leaf == leaf, x, leaf)
    return x


def _reshape(x: jax.Array, shape: tuple[int, ...], spec: P) -> jax.Array:
    sharding = NamedSharding(jax.typeof(x).sharding.mesh, spec)
    return x if x.shape == shape else jax.lax.reshape(x, shape, out_sharding=sharding)


def _merge_spec(spec: P, groups: Sequence[int]) -> tuple[P, P]:
    """For a reshape that merges groups of axes: the sharding that survives, before and after."""
    before, after, start = [], [], 0
    for size in groups:
        first = spec[start] if size else None
        before += [first] + [None] * (size - 1) if size else []
        after.append(first)
        start += size
    return P(*before), P(*after)


def _adjoint(x: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(x, -1, -2))


# Shardings


def _sharding_kind(x: jax.Array) -> str:
    """ "none", "auto" or "explicit": what the array's type says about its mesh."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.size == 1:
        return "none"
    kinds = set(mesh.axis_types)
    if kinds == {AxisType.Auto}:
        return "auto"
    if kinds == {AxisType.Explicit}:
        return "explicit"
    if AxisType.Manual in kinds:
        return "none"  # inside somebody's shard_map: the array is already local
    raise ValueError(f"a mesh that mixes Auto and Explicit axes is not supported: {mesh}")


def _spec(x: jax.Array) -> P:
    spec = tuple(jax.typeof(x).sharding.spec)
    return P(*spec, *(None,) * (x.ndim - len(spec)))


def _reshard(x: jax.Array, spec: P) -> jax.Array:
    """One hop; on Auto axes a constraint."""
    sharding = NamedSharding(jax.typeof(x).sharding.mesh, spec)
    if _sharding_kind(x) == "auto":
        return jax.lax.with_sharding_constraint(x, sharding)
    return x if _spec(x) == spec else jax.sharding.reshard(x, sharding)


def _entry(names: Sequence[str]):
    return None if not names else names[0] if len(names) == 1 else tuple(names)


def _names(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _hops(batch: jax.Array, kind: str) -> list[P]:
    """Shardings on the way from the matrix axes to the stack axis, the first one included.

    An axis that shards a dimension together with others leaves as the minor one and joins the
    stack as the minor one; only then does each device exchange with its peers along it alone.
    """
    mesh = jax.typeof(batch).sharding.mesh
    names = [name for name, size in mesh.shape.items() if size > 1]
    if kind == "auto":
        # The specs are hidden; the last mesh axis is the minor one by convention.
        moved = [_entry(names[::-1][: i + 1]) for i in range(len(names))]
        specs = [P(None, _OPEN, _OPEN), *(P(entry, _OPEN, _OPEN) for entry in moved)]
        return [*specs[:-1], P(moved[-1], None, None)]
    stack, rows, columns = (list(_names(entry)) for entry in _spec(batch))
    specs = [P(_entry(stack), _entry(rows), _entry(columns))]
    used = {*stack, *rows, *columns}
    # Idle axes first: the way back then gathers over them last, in the leaf's own shards.
    for axis in [name for name in names if name not in used]:
        stack.append(axis)
        specs.append(P(_entry(stack), _entry(rows), _entry(columns)))
    for dimension in (columns, rows):
        while dimension:
            stack.append(dimension.pop())
            specs.append(P(_entry(stack), _entry(rows), _entry(columns)))
    return specs


def _run(fn: StackFunction, batch: jax.Array, kind: str) -> jax.Array:
    """The function on a whole bucket (n, r, c)."""
    if kind == "none":
        return _in_blocks(fn, batch)
    count, mesh = batch.shape[0], jax.typeof(batch).sharding.mesh
    extra = -count % mesh.size
    if kind == "explicit" and extra and _spec(batch)[0] is not None:
        batch = _reshard(batch, P(None, *_spec(batch)[1:]))
    if extra:
        batch = jnp.pad(batch, ((0, extra), (0, 0), (0, 0)))
    hops = _hops(batch, kind)
    for spec in hops:
        batch = _reshard(batch, spec)
    local = functools.partial(_in_blocks, fn)
    batch = jax.shard_map(local, mesh=mesh, in_specs=hops[-1], out_specs=hops[-1])(batch)
    for spec in reversed(hops):
        batch = _reshard(batch, spec)
    return batch[:count] if extra else batch


def _in_blocks(fn: StackFunction, batch: jax.Array) -> jax.Array:
    """As many matrices at a time as fit a block, in equal blocks."""
    count = batch.shape[0]
    most = max(1, _BLOCK // math.prod(batch.shape[1:]))
    if count <= most:
        return fn(batch)
    size = max(k for k in range(1, most + 1) if count % k == 0)
    blocks = batch.reshape(count // size, size, *batch.shape[1:])
    return jax.lax.map(fn, blocks).reshape(batch.shape)
