"""Matrices of one shape in one batch, and each device works on its own share of them.

Leaves are read as stacks of matrices, turned so that rows <= columns, and stacked *across leaves*
into buckets of one (shape, dtype, sharding role). On a mesh the sharding then moves from the matrix
axes to the stack axis, one mesh axis at a time (two at once make XLA gather everything), a function
runs on whole matrices inside ``shard_map`` (so no collective can enter it), and the sharding moves
back the same way: one all-to-all per mesh axis, bucket and direction.

The mesh is read from the arrays' types, so this works in a bare ``jit``, with Auto and with
Explicit axes. Mesh axes that shard none of a bucket's matrices share the work as well: slicing the
stack along them is free, and the result is gathered once. Stacks that do not divide by the number
of devices run together: a device that gets one matrix less of one bucket gets one more of another.
Without a mesh a bucket goes through ``lax.map`` in blocks of about four MiB: on CPU this was 10 %
faster than one batch and took a quarter of its temporary memory, and a block is still enough work
for one kernel on an accelerator.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn.optim.matrices import MatrixAxes

StackFunction = Callable[..., Any]

_BLOCK = 2**20  # elements of a block of matrices without a mesh
_OPEN = P.UNCONSTRAINED


def map_matrices(
    fn: StackFunction,
    leaves: Sequence[jax.Array],
    axes: Sequence[MatrixAxes],
    roles: Sequence[str] | None = None,
) -> list[jax.Array]:
    """Apply a function of matrices to every matrix of every leaf, in buckets.

    Args:
        fn: A function ``(n, r, c) -> (n, r, c)`` with r <= c that treats each matrix on its own and
            is equivariant under the (conjugate) transpose. Pass the same object at every call, or
            eager calls recompile.
        leaves: Arrays of rank >= 2.
        axes: The axes of every leaf as a stack of matrices.
        roles: One word per leaf; leaves with different words never share a bucket. The words matter
            if types do not show shardings (Auto axes): see ``matrices.sharding_role``.

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
    return map_stacks([fn] * len(leaves), [(leaf,) for leaf in leaves], axes, roles)[0]


def map_stacks(
    fns: Sequence[StackFunction],
    streams: Sequence[Sequence[jax.Array]],
    axes: Sequence[MatrixAxes],
    roles: Sequence[str] | None = None,
    *,
    together: Sequence[int] | None = None,
    extras: Sequence[Any] | None = None,
) -> tuple[list[jax.Array], list[Any]]:
    """The general form of :func:`map_matrices`: several arrays per leaf, groups, extra arrays.

    Args:
        fns: One function per leaf; leaves with different functions never share a bucket. It is
            called as ``fn(*stacks)`` with one ``(n, r, c)`` per stream and returns ``(n, r, c)``;
            with ``extras`` it is called as ``fn(*stacks, extra)`` and returns ``((n, r, c), aux)``.
        streams: A tuple of arrays for every leaf, all of one shape, dtype and sharding (two
            gradients, for example); every leaf has the same number of them.
        axes: The axes of every leaf as a stack of matrices.
        roles: One word per leaf, as in :func:`map_matrices`.
        together: The number of consecutive matrices of a leaf's stack that must go into one call,
            for every leaf (the number of its matrices is a multiple); 1 if absent.
        extras: A tree of arrays ``(n, ...)`` for every leaf, one entry per matrix, replicated.

    Returns:
        The results, arrays like the first stream, and for every leaf the tree of ``aux`` arrays
        ``(n, ...)``, replicated (None without ``extras``).

    Example:
        >>> import jax.numpy as jnp
        >>> def add(a, b, extra):
        ...     return a + b, {"scale": 2 * extra}
        >>> pair = (jnp.ones((3, 2, 2)), jnp.ones((3, 2, 2)))
        >>> (sums,), (aux,) = map_stacks(
        ...     [add], [pair], [MatrixAxes((0,), (1,), (2,))], extras=[jnp.arange(3.0)]
        ... )
        >>> sums.shape, aux["scale"].tolist()
        ((3, 2, 2), [0.0, 2.0, 4.0])
    """
    count = len(streams)
    out, aux = _map(
        tuple(tuple(leaf) for leaf in streams),
        None if extras is None else tuple(extras),
        fns=tuple(fns),
        axes=tuple(axes),
        roles=("",) * count if roles is None else tuple(roles),
        together=(1,) * count if together is None else tuple(together),
    )
    return list(out), list(aux)


@functools.partial(jax.jit, static_argnames=("fns", "axes", "roles", "together"))
def _map(streams, extras, *, fns, axes, roles, together):
    buckets: dict[tuple, list[int]] = {}
    stacks = []
    for i, (leaves, leaf_axes, role) in enumerate(zip(streams, axes, roles, strict=True)):
        leaf = leaves[0]
        stack = tuple(_to_stack(x, leaf_axes) for x in leaves)
        stacks.append(stack)
        turned = _sizes(leaf, leaf_axes)[1]
        kind, spec = _sharding_kind(leaf), _spec(stack[0])
        key = (stack[0].shape[1:], stack[0].dtype, kind, fns[i], together[i])
        if kind == "explicit":
            # The type shows the role. Stacks sharded along themselves cannot be concatenated.
            key += (spec, jax.typeof(leaf).sharding.mesh, i if spec[0] else None)
        elif kind == "auto":
            key += ((role == "row") != turned, jax.typeof(leaf).sharding.mesh)
        buckets.setdefault(key, []).append(i)

    made = []
    for members in buckets.values():
        first = members[0]
        batch = _concatenate([stacks[i] for i in members])
        extra = None if extras is None else _concatenate([extras[i] for i in members])
        made.append(_Bucket(fns[first], batch, extra, together[first]))
    kinds = [_sharding_kind(streams[members[0]][0]) for members in buckets.values()]

    out: list[jax.Array] = [leaves[0] for leaves in streams]
    aux: list[Any] = [None] * len(streams)
    for members, (batch, beside) in zip(buckets.values(), _run(made, kinds), strict=True):
        start = 0
        for i in members:
            end = start + stacks[i][0].shape[0]
            whole = len(members) == 1
            out[i] = _from_stack(batch if whole else batch[start:end], streams[i][0], axes[i])
            aux[i] = beside if whole else jax.tree.map(lambda x, a=start, b=end: x[a:b], beside)
            start = end
    return out, aux


class _Bucket(NamedTuple):
    """Matrices of one kind: streams (n, r, c), extras (n, ...), units of `together` matrices."""

    fn: StackFunction
    batch: tuple[jax.Array, ...]
    extra: Any
    together: int

    @property
    def units(self) -> int:
        return self.batch[0].shape[0] // self.together

    @property
    def unit_cost(self) -> int:
        """The cost of a unit, up to a factor: products of r x r, r x c and c x r matrices."""
        _, rows, columns = self.batch[0].shape
        return self.together * rows * rows * (2 * columns + rows)


def _concatenate(trees: list[Any]) -> Any:
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *trees)


# Leaves and stacks of matrices


def _sizes(leaf: jax.Array, axes: MatrixAxes) -> tuple[tuple[int, int, int], bool]:
    """The numbers of matrices, inputs and outputs; and True if the bucket holds the transposes."""
    count, fan_in, fan_out = (math.prod(leaf.shape[a] for a in group) for group in axes)
    return (count, fan_in, fan_out), fan_in > fan_out


def _to_stack(leaf: jax.Array, axes: MatrixAxes) -> jax.Array:
    """(n, r, c) with r <= c."""
    x, (sizes, turned) = jnp.transpose(leaf, sum(axes, ())), _sizes(leaf, axes)
    if _sharding_kind(leaf) == "explicit":
        kept, merged = _merge_spec(_spec(x), [len(group) for group in axes])
        x = _reshape(_reshard(x, kept), sizes, merged)
    else:
        x = x.reshape(sizes)
    return jnp.conj(x.mT) if turned else x


def _from_stack(stack: jax.Array, leaf: jax.Array, axes: MatrixAxes) -> jax.Array:
    order = sum(axes, ())
    inverse = tuple(order.index(a) for a in range(leaf.ndim))
    x = jnp.conj(stack.mT) if _sizes(leaf, axes)[1] else stack
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
    """The sharding that survives a reshape that merges groups of axes, before and after it."""
    before, after, start = [], [], 0
    for size in groups:
        first = spec[start] if size else None
        before += [first] + [None] * (size - 1) if size else []
        after.append(first)
        start += size
    return P(*before), P(*after)


# Shardings


def _sharding_kind(x: jax.Array) -> str:
    """The kind of mesh in the array's type: "none", "auto" or "explicit"."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.size == 1:
        return "none"
    kinds = set(mesh.axis_types)
    if kinds == {AxisType.Auto}:
        return "auto"
    if kinds == {AxisType.Explicit}:
        return "explicit"
    if AxisType.Manual in kinds:
        return "none"  # inside a caller's shard_map: the array is already local
    raise ValueError(f"a mesh that mixes Auto and Explicit axes is not supported: {mesh}")


def _spec(x: jax.Array) -> P:
    spec = tuple(jax.typeof(x).sharding.spec)
    return P(*spec, *(None,) * (x.ndim - len(spec)))


def _reshard(x: jax.Array, spec: P, mesh: Any = None) -> jax.Array:
    """One hop; on Auto axes a constraint."""
    mesh = jax.typeof(x).sharding.mesh if mesh is None else mesh
    sharding = NamedSharding(mesh, spec)
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
    # Idle axes come first, so the way back gathers over them last, in the leaf's own shards.
    for axis in [name for name in names if name not in used]:
        stack.append(axis)
        specs.append(P(_entry(stack), _entry(rows), _entry(columns)))
    for dimension in (columns, rows):
        while dimension:
            stack.append(dimension.pop())
            specs.append(P(_entry(stack), _entry(rows), _entry(columns)))
    return specs


def _run(buckets: list[_Bucket], kinds: list[str]) -> list[tuple[jax.Array, Any]]:
    """The functions on whole buckets.

    Buckets that divide by the number of devices run one after the other. The others run together,
    so that devices with nothing to do in one bucket do more in another.
    """
    out: list[Any] = [None] * len(buckets)
    uneven: dict[Any, list[int]] = {}
    for i, (bucket, kind) in enumerate(zip(buckets, kinds, strict=True)):
        if kind == "none":
            out[i] = _in_blocks(*bucket)
            continue
        mesh = jax.typeof(bucket.batch[0]).sharding.mesh
        if bucket.units % mesh.size:
            uneven.setdefault((mesh, kind), []).append(i)
        else:
            (out[i],) = _run_on_mesh([bucket], kind, mesh)
    for (mesh, kind), members in uneven.items():
        found = _run_on_mesh([buckets[i] for i in members], kind, mesh)
        for i, result in zip(members, found, strict=True):
            out[i] = result
    return out


def share(units: Sequence[int], costs: Sequence[int], devices: int) -> list[list[int]]:
    """The number of units of every bucket that each device takes.

    Shares are equal, and the least loaded devices take the rest; expensive buckets go first.

    Example:
        >>> share([3, 2], [5, 2], 4)
        [[1, 1, 1, 0], [1, 0, 0, 1]]
    """
    load = [0] * devices
    out: list[list[int]] = [[] for _ in units]
    for b in sorted(range(len(units)), key=lambda b: -costs[b]):
        even, rest = divmod(units[b], devices)
        idle = set(sorted(range(devices), key=lambda d: load[d])[:rest])
        out[b] = [even + (d in idle) for d in range(devices)]
        load = [n + costs[b] * k for n, k in zip(load, out[b], strict=True)]
    return out


def _run_on_mesh(buckets: list[_Bucket], kind: str, mesh: Any) -> list[tuple[jax.Array, Any]]:
    hops = [_hops(b.batch[0], kind) for b in buckets]
    ends = [way[-1][0] for way in hops]
    shares = share([b.units for b in buckets], [b.unit_cost for b in buckets], mesh.size)
    layouts, stacks = [], []
    for bucket, way, end, mine in zip(buckets, hops, ends, shares, strict=True):
        # A device's place along the stack axis depends on the order in which mesh axes split it.
        order = [mesh.axis_names.index(name) for name in _names(end)]
        order += [a for a in range(len(mesh.axis_names)) if a not in order]
        devices = np.arange(mesh.size).reshape(mesh.axis_sizes).transpose(order).reshape(-1)
        layout = _Layout([mine[d] * bucket.together for d in devices])
        batch, extra = bucket.batch, bucket.extra
        if kind == "explicit" and not layout.even and _spec(batch[0])[0] is not None:
            batch = tuple(_reshard(x, P(None, *_spec(x)[1:])) for x in batch)
        batch, extra = jax.tree.map(layout.spread, (batch, extra))
        for spec in way:
            batch = tuple(_reshard(x, spec) for x in batch)
        if kind == "explicit":
            extra = jax.tree.map(
                lambda x, end=end: _reshard(x, P(end, *(None,) * (x.ndim - 1)), mesh), extra
            )
        layouts.append(layout)
        stacks.append((batch, extra))

    # Devices of one kind have the same numbers of units; each kind runs its own program.
    kinds = sorted(set(zip(*shares, strict=True)))
    which = np.array([kinds.index(counts) for counts in zip(*shares, strict=True)])

    def local(stacks):
        def branch(counts, stacks):
            mine = [
                b._replace(batch=batch, extra=extra)
                for b, (batch, extra) in zip(buckets, stacks, strict=True)
            ]
            return _run_here(mine, [n * b.together for n, b in zip(counts, mine, strict=True)])

        branches = [functools.partial(branch, counts) for counts in kinds]
        if len(branches) == 1:
            return branches[0](stacks)
        device = jax.lax.axis_index(mesh.axis_names)
        return jax.lax.switch(jnp.asarray(which)[device], branches, stacks)

    specs = [(way[-1], P(end)) for way, end in zip(hops, ends, strict=True)]
    # JAX's own svd for TPUs does not pass the check of values that vary over the mesh.
    found = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)(
        stacks
    )

    results = []
    for (out, aux), layout, way in zip(found, layouts, hops, strict=True):
        for spec in reversed(way):
            out = _reshard(out, spec)
        aux = jax.tree.map(lambda x: _reshard(x, P(*(None,) * x.ndim)), aux)
        results.append(jax.tree.map(layout.gather, (out, aux)))
    return results


class _Layout:
    """A stack laid out for devices that take different numbers of its entries.

    Each device gets as many slots as the one with most entries; unused ones hold zeros.
    """

    def __init__(self, counts: Sequence[int]):
        self.slots = max(counts)
        # Neighbours with equal numbers, as (devices, entries each).
        self.runs = [(len(list(run)), n) for n, run in itertools.groupby(counts)]
        self.even = len(self.runs) == 1

    def spread(self, x: jax.Array) -> jax.Array:
        """(entries, ...) to (devices * slots, ...)."""
        if self.even:
            return x
        parts, start, tail = [], 0, x.shape[1:]
        for devices, n in self.runs:
            part = _regroup(x[start : start + devices * n], (devices, n, *tail))
            part = jnp.pad(part, ((0, 0), (0, self.slots - n), *((0, 0),) * len(tail)))
            parts.append(_regroup(part, (devices * self.slots, *tail)))
            start += devices * n
        return jnp.concatenate(parts)

    def gather(self, x: jax.Array) -> jax.Array:
        """The inverse of `spread`."""
        if self.even:
            return x
        parts, start, tail = [], 0, x.shape[1:]
        for devices, n in self.runs:
            part = x[start : start + devices * self.slots]
            part = _regroup(part, (devices, self.slots, *tail))[:, :n]
            parts.append(_regroup(part, (devices * n, *tail)))
            start += devices * self.slots
        return jnp.concatenate(parts)


def _regroup(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A reshape that splits or merges the leading axes, which no mesh axis splits."""
    if _sharding_kind(x) != "explicit":
        return x.reshape(shape)
    kept = tuple(_spec(x))[x.ndim - min(len(shape), x.ndim) + 1 :]
    return _reshape(x, shape, P(*(None,) * (len(shape) - len(kept)), *kept))


def _run_here(buckets: list[_Bucket], counts: list[int]) -> list[tuple[jax.Array, Any]]:
    """The functions on the first entries of a device's slots, padded with zeros.

    Buckets that differ in their sharding alone are one batch here.
    """
    alike: dict[Any, list[int]] = {}
    for i, (bucket, count) in enumerate(zip(buckets, counts, strict=True)):
        first = bucket.batch[0]
        key = (bucket.fn, first.shape[1:], first.dtype, bucket.together)
        key += (jax.tree.structure(bucket.extra), count == 0)
        alike.setdefault(key, []).append(i)
    out: list[Any] = [None] * len(buckets)
    for members in alike.values():
        bucket = buckets[members[0]]
        parts = [
            jax.tree.map(lambda x, n=counts[i]: x[:n], (buckets[i].batch, buckets[i].extra))
            for i in members
        ]
        if counts[members[0]]:
            batch, extra = _concatenate(parts)
            found = _in_blocks(bucket.fn, batch, extra, bucket.together)
        else:
            found = _nothing(bucket)
        start = 0
        for i in members:
            end, slots = start + counts[i], buckets[i].batch[0].shape[0]
            here = (
                found
                if len(members) == 1
                else jax.tree.map(lambda x, a=start, b=end: x[a:b], found)
            )
            out[i] = jax.tree.map(
                lambda x, n=slots - counts[i]: jnp.pad(x, ((0, n), *((0, 0),) * (x.ndim - 1))), here
            )
            start = end
    return out


def _nothing(bucket: _Bucket) -> tuple[jax.Array, Any]:
    """The result of the function for no matrices: arrays of length 0."""
    one = jax.tree.map(lambda x: x[: bucket.together], (bucket.batch, bucket.extra))
    shapes = jax.eval_shape(
        lambda batch, extra: _in_blocks(bucket.fn, batch, extra, bucket.together), *one
    )
    return jax.tree.map(lambda x: jnp.zeros((0, *x.shape[1:]), x.dtype), shapes)


def _in_blocks(
    fn: StackFunction, batch: tuple[jax.Array, ...], extra: Any, together: int
) -> tuple[jax.Array, Any]:
    """The function on equal blocks, each with as many matrices as fit."""

    def call(batch, extra):
        return (fn(*batch), None) if extra is None else fn(*batch, extra)

    count = batch[0].shape[0] // together
    most = max(1, _BLOCK // (together * math.prod(batch[0].shape[1:])))
    if count <= most:
        return call(batch, extra)
    size = max(k for k in range(1, most + 1) if count % k == 0)

    def cut(x):
        return x.reshape(count // size, size * together, *x.shape[1:])

    out = jax.lax.map(lambda parts: call(*parts), jax.tree.map(cut, (batch, extra)))
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), out)
