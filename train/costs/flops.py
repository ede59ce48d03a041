"""Floating-point operations of a function, counted on its jaxpr without running it.

`compiled.cost_analysis()` counts the body of a `lax.scan` once, as if a model of 32 scanned layers
had one. Here every matrix product is counted as often as it runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import partial_eval

Branches = Literal["max", "min"]

# Work whose number of operations has no closed form, or none we know: listed instead of counted.
_DECOMPOSITIONS = {
    "cholesky",
    "eig",
    "eigh",
    "hessenberg",
    "householder_product",
    "lu",
    "qr",
    "schur",
    "svd",
    "triangular_solve",
    "tridiagonal",
    "tridiagonal_solve",
}
_OPAQUE = {"ffi_call", "fft", "pallas_call", "pure_callback", "ragged_dot_general", "scaled_dot"}


class Count(NamedTuple):
    """The cost of a function.

    Args:
        flops: multiplications and additions of all matrix products and convolutions; inside a
            `shard_map`, of all devices together.
        unknown_loops: loops with such work whose trip count depends on the data; counted as one
            trip.
        uncounted: runs of work that is not counted (`svd`: matrices, `fft`: calls).
    """

    flops: int
    unknown_loops: int
    uncounted: dict[str, int]


def flops(fn: Callable, *args: Any, branches: Branches = "max", **kwargs: Any) -> int:
    r"""Floating-point operations of one call.

    .. math::
        2 \cdot B M N K \text{ for each product } (B, M, K) \times (B, K, N)

    times the lengths of the scans around it. Element-wise work is not counted, nor are
    decompositions: see :func:`count`, which names them.

    Args:
        fn: any function that JAX can trace.
        args: arrays, or `jax.ShapeDtypeStruct`s in their place; nothing is computed.
        branches: a `lax.cond` counts as its most expensive branch ("max") or its cheapest ("min").
        kwargs: passed on to `fn`, arrays or shapes as well.

    Returns:
        The number of operations.

    Raises:
        ValueError: `branches` is neither "max" nor "min".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((3, 3), jnp.float32)
        >>> flops(lambda x: jax.lax.fori_loop(0, 10, lambda i, y: y @ x, x), x)
        540
    """
    return count(fn, *args, branches=branches, **kwargs).flops


def count(
    fn: Callable,
    *args: Any,
    branches: Branches = "max",
    platform: str | None = None,
    **kwargs: Any,
) -> Count:
    """Like :func:`flops`, together with the work that the number leaves out.

    Args:
        fn: any function that JAX can trace.
        args: arrays or shapes.
        branches: "max" or "min".
        platform: a device's `platform`, by which `lax.platform_dependent` chooses; None: the
            platform of the devices here.
        kwargs: passed on to `fn`.

    Returns:
        A :class:`Count`.

    Raises:
        ValueError: `branches` is neither "max" nor "min".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> count(jnp.linalg.eigh, jax.ShapeDtypeStruct((5, 4, 4), jnp.float32)).uncounted
        {'eigh': 5}
    """
    return count_jaxpr(jax.make_jaxpr(fn)(*args, **kwargs), branches, platform)


def count_jaxpr(closed: Any, branches: Branches = "max", platform: str | None = None) -> Count:
    """:func:`count` of a function that is traced already, without its dead code.

    Args:
        closed: a `jax.extend.core.ClosedJaxpr`, as of `jax.make_jaxpr` or `jax.jit(f).trace(...)`.
        branches: "max" or "min".
        platform: the platform of the device, see :func:`count`.

    Returns:
        A :class:`Count`.

    Raises:
        ValueError: `branches` is neither "max" nor "min".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def first(x):
        ...     return x @ x, (x @ x) @ x
        >>> count_jaxpr(jax.make_jaxpr(lambda x: first(x)[0])(jnp.ones((3, 3)))).flops
        54
    """
    if branches not in ("max", "min"):
        raise ValueError(f"branches is 'max' or 'min', got {branches!r}")
    used, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    total = _Walk(branches, platform or jax.default_backend()).jaxpr(used)
    return Count(total.flops, total.loops, dict(sorted(total.uncounted.items())))


class _Work(NamedTuple):
    flops: int = 0
    loops: int = 0
    uncounted: Counter = Counter()

    def plus(self, other: _Work) -> _Work:
        return _Work(
            self.flops + other.flops,
            self.loops + other.loops,
            Counter({k: self.uncounted[k] + other.uncounted[k]
                     for k in self.uncounted.keys() | other.uncounted.keys()}),
        )  # fmt: skip

    def times(self, n: int) -> _Work:
        # A loop inside a loop is one loop: the number of entries is known, its length is not.
        uncounted = Counter({k: n * v for k, v in self.uncounted.items()})
        return _Work(n * self.flops, self.loops, uncounted)

    def any(self) -> bool:
        return bool(self.flops or self.uncounted)


class _Walk:
    """Adds up equations, each as often as it runs."""

    def __init__(self, branches: Branches, platform: str):
        self.choose = max if branches == "max" else min
        self.platforms = {"gpu": ("cuda", "rocm")}.get(platform, (platform,))

    def jaxpr(self, jaxpr: Any) -> _Work:
        total = _Work()
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            total = total.plus(self.equation(eqn))
        return total

    def equation(self, eqn: Any) -> _Work:
        name, params = eqn.primitive.name, eqn.params
        if name in _PRODUCTS:
            work = _PRODUCTS[name](eqn)
            # (a + ib)(c + id): four real products.
            return _Work(4 * work if jnp.iscomplexobj(eqn.outvars[0].aval) else work)
        if name in _DECOMPOSITIONS:
            matrices = math.prod(eqn.invars[0].aval.shape[:-2])
            return _Work(uncounted=Counter({name: matrices}))
        if name in _OPAQUE:
            return _Work(uncounted=Counter({name: 1}))
        if name == "cond" and (named := params.get("branches_platforms")):
            mine = (i for i, n in enumerate(named) if n is None or set(n) & set(self.platforms))
            return self.jaxpr(params["branches"][next(mine)])
        if name == "cond":
            found = [self.jaxpr(branch) for branch in params["branches"]]
            # Of two branches without products, the one with an svd is the more expensive.
            return self.choose(found, key=lambda w: (w.flops, sum(w.uncounted.values())))
        if name == "custom_linear_solve":
            return self.jaxpr(params["jaxprs"].solve)
        inner = _Work()
        for sub in _jaxprs(tuple(params.values())):
            inner = inner.plus(self.jaxpr(sub))
        if name == "scan":
            return inner.times(params["length"])
        if name == "while" and inner.any():
            return inner._replace(loops=inner.loops + 1)
        if name == "shard_map":
            shape = params["mesh"].shape
            return inner.times(math.prod(shape[a] for a in params["newly_manual_axes"]))
        return inner


def _jaxprs(value: Any) -> Iterator[Any]:
    """Jaxprs among an equation's parameters (jit, remat, custom_jvp, custom_vjp, while, ..)."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)
    elif isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr):
        yield value


def _dot_general(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[a] for a in contracted)


def _convolution(eqn: Any) -> int:
    """Every tap of every output, taps in the padding included."""
    kernel = eqn.invars[1].aval.shape
    features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * (math.prod(kernel) // features)


_PRODUCTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
}
