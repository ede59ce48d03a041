r"""TEON: one orthogonalisation for the same projection of several consecutive blocks.

Muon replaces each momentum by its own polar factor. TEON concatenates those of K blocks and takes
the polar factor of the whole, so the K layers share one inverse square root:

.. math::
    O^{(k)} = \Big(\sum_j U^{(j)} U^{(j)T}\Big)^{-1/2} U^{(k)}
    \qquad (U \text{ written (out, in), concatenated along in})

Kernels here are (in, out) and the blocks of a decoder are stacked ``(L, in, out)``, so the
concatenation along in is the view ``(L / K, K in, out)``: nothing is copied, and the Gram matrix of
that view is the shared one.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.matrices import (
    MatrixAxes,
    Specs,
    resolve,
    sharding_role,
)
from jaxlib_unlearn.optim.orthogonalize import Orthogonalizer, by_name
from jaxlib_unlearn.optim.spectral.buckets import is_tall, map_stacks
from jaxlib_unlearn.optim.spectral.direction import Meet, Part
from jaxlib_unlearn.optim.spectral.groups import ATTENTION, Groups, check_groups, picker, rows_of
from jaxlib_unlearn.optim.spectral.muon import every_matrix, scale_by_momentum
from jaxlib_unlearn.optim.spectral.post import Post
from jaxlib_unlearn.optim.spectral.rest import AdamWRest, DecayMask, with_adamw
from jaxlib_unlearn.optim.spectral.splitting import Splits
from jaxlib_unlearn.optim.spellings import with_optax_spellings

TEON_STATIC_ARGS = (
    "group_size",
    "axis",
    "groups",
    "nesterov",
    "momentum",
    "orthogonalize",
    "shape_scale",
    "matrices",
    "weight_decay_mask",
    "layout",
    "mu_dtype",
    "comm_dtype",
    "split",
    "post",
)
"""``static_args`` for ``optax.inject_hyperparams(teon, static_args=...)``."""


@with_optax_spellings
def scale_by_teon(
    group_size: int = 2,
    axis: str = "in",
    groups: Groups = None,
    nesterov: bool = False,
    orthogonalize: Orthogonalizer | str | None = None,
    *,
    beta: jax.typing.ArrayLike = 0.95,
    momentum: str = "ema",
    shape_scale: str = "unit",
    split: Splits | None = None,
    post: Post | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    comm_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of TEON, with the gradient's sign: no learning rate, no decay.

    .. math::
        Z = [U^{(1)} \,|\, \dots \,|\, U^{(K)}], \qquad [O^{(1)} | \dots | O^{(K)}] =
        \mathrm{orth}(Z)

    Blocks are grouped by their absolute index, K consecutive ones from 0 on, each projection
    separately. A stacked leaf has its blocks on its first axis; other leaves are grouped by path
    (``layers/0/q`` with ``layers/1/q``, ``Block_2/Dense_0`` with ``Block_3/Dense_0``: see
    ``optim.blocks``); a tuple of consecutive stacks is numbered through. Blocks left over, and
    leaves that ``groups`` leaves out, get Muon's step.

    A leaf that is frozen by ``optax.partition``, ``optax.masked`` or a smaller tree is not seen
    here: the others of its group get Muon's step instead of the shared one. Freeze whole groups, or
    look at the group column of ``optim.matrices.describe(params, tx)``.

    Args:
        group_size: K; 1 is Muon.
        axis: which axis of the matrices is concatenated, "in" (the paper's mode-1) or "out".
        groups: which leaves are grouped: a pattern (``re.search``) or predicate on the path; None
            for all.
        nesterov: look one step ahead; the paper does not.
        orthogonalize: ``(n, r, c) -> (n, r, c)``, or a name as in ``optim.scale_by_muon``; default
            Polar Express with 5 steps, the paper's.
        beta: decay of the momentum, in [0, 1).
        momentum: "ema" or "heavy_ball", as in ``optim.muon``.
        shape_scale: "unit", "width", "spectral", "match_rms", of one layer's matrix.
        split: leaves that hold several matrices each; every block is grouped with its counterparts.
        post: what follows, per layer (NorMuon).
        mu_dtype: dtype of the momentum; None for the parameters'.
        comm_dtype: what is sent between devices is rounded to it, as in ``optim.scale_by_muon``.

    Returns:
        A transformation whose state is a ``MuonState``: checkpoints of Muon and TEON are
        interchangeable.

    Raises:
        ValueError: a bad argument; at ``init``, a leaf of rank >= 2 named norm, bias, scale, embed,
            or no group at all though K > 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxlib_unlearn.optim.orthogonalize import svd
        >>> tx = scale_by_teon(group_size=2, orthogonalize=svd())
        >>> twice = {"w": jnp.stack([jnp.eye(3), jnp.eye(3)])}
        >>> updates, _ = tx.update(twice, tx.init(twice))
        >>> round(float(updates["w"][0, 0, 0]), 4)  # two equal layers: 1 / sqrt(2) of Muon's
        0.7071

    References:
        Zhang et al., "TEON", arXiv:2601.23261, algorithm 1.
    """
    return scale_by_momentum(
        every_matrix,
        beta=beta,
        nesterov=nesterov,
        orthogonalize=by_name(orthogonalize, "polar_express"),
        momentum=momentum,
        shape_scale=shape_scale,
        split=split,
        post=post,
        meet=_grouped(group_size, axis, groups),
        check=functools.partial(check_groups, size=group_size, groups=groups),
        mu_dtype=mu_dtype,
        comm_dtype=comm_dtype,
    )


@with_optax_spellings
def teon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    group_size: int = 2,
    axis: str = "in",
    groups: Groups = ATTENTION,
    beta: jax.typing.ArrayLike = 0.95,
    nesterov: bool = False,
    momentum: str = "ema",
    orthogonalize: Orthogonalizer | str | None = None,
    shape_scale: str = "spectral",
    weight_decay: float | jax.Array = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    adam_eps: jax.typing.ArrayLike = 1e-8,
    adam_weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: DecayMask = None,
    matrices: Specs = None,
    layout: str = "in_out",
    split: Splits | None = None,
    post: Post | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    comm_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""TEON for query, key and value projections, Muon for the other matrices, AdamW for the rest.

    .. math::
        W^{(k)} \leftarrow W^{(k)} - \eta \left( s\, O^{(k)} + \lambda W^{(k)} \right)

    with :math:`O^{(k)}` of :func:`scale_by_teon`. At one learning rate a group of K square matrices
    moves :math:`\sqrt K` less than under Muon (by Frobenius norm): compare the two over several.

    Args:
        learning_rate: eta of the matrices, a number or a schedule.
        group_size: K consecutive blocks; the paper finds 2 best.
        axis: "in" or "out", as in :func:`scale_by_teon`.
        groups: which leaves are grouped; default query, key and value projections. As in
            :func:`scale_by_teon`, a frozen leaf leaves the rest of its group ungrouped.
        beta: decay of the momentum.
        nesterov: look one step ahead.
        momentum: "ema" or "heavy_ball".
        orthogonalize: see :func:`scale_by_teon`; default Polar Express with 5 steps.
        shape_scale: the paper's "spectral" sqrt(out / in), "width", "match_rms" or "unit".
        weight_decay: decoupled, multiplied by eta but not by s.
        adam_learning_rate: of the other leaves; None for ``learning_rate``.
        adam_b1: decay of AdamW's first moment.
        adam_b2: decay of AdamW's second moment.
        adam_eps: AdamW's epsilon.
        adam_weight_decay: AdamW's decoupled decay.
        weight_decay_mask: what decays, of matrices and of AdamW's leaves: a tree of bools like the
            parameters (or a prefix of one) or a function of the parameters that returns it, as in
            ``optax.add_decayed_weights``; None for everything.
        matrices: which leaves are matrices, as in ``optim.muon``.
        layout: "in_out" or "out_in".
        split: leaves that hold several matrices each (a fused ``c_attn``: cut it into q, k, v).
        post: a step between orthogonalisation and scaling.
        mu_dtype: dtype of the momenta.
        comm_dtype: see :func:`scale_by_teon`.

    Returns:
        A transformation with the state of ``optim.muon``.

    Raises:
        ValueError: a bad argument; at ``init``, a leaf that the rules cannot place, or matrices
            without any group though K > 1.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = {"layers": {"q": {"kernel": jnp.ones((4, 8, 8))}}, "bias": jnp.zeros(8)}
        >>> tx = teon(0.02, adam_learning_rate=1e-3)
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates["layers"]["q"]["kernel"].shape
        (4, 8, 8)

    References:
        Zhang et al., "TEON", arXiv:2601.23261, algorithm 1 and section 5 (K = 2, q/k/v, mode-1).
    """
    direction = scale_by_momentum(
        lambda tree: resolve(tree, matrices, layout),
        beta=beta,
        nesterov=nesterov,
        orthogonalize=by_name(orthogonalize, "polar_express"),
        momentum=momentum,
        shape_scale=shape_scale,
        split=split,
        post=post,
        meet=_grouped(group_size, axis, groups),
        check=functools.partial(check_groups, size=group_size, groups=groups),
        mu_dtype=mu_dtype,
        comm_dtype=comm_dtype,
    )
    return with_adamw(
        direction,
        learning_rate,
        weight_decay,
        AdamWRest(adam_learning_rate, adam_b1, adam_b2, adam_eps, adam_weight_decay, mu_dtype),
        weight_decay_mask,
        matrices,
        layout,
    )


Run = list[tuple[int, Any]]
"""Parts that go to a bucket together, each with a slice of its first axis or an index there."""


# Every leaf is cut into runs of blocks; a run gets Muon's step or holds whole groups.


def _grouped(group_size: int, axis: str, groups: Groups) -> Meet:
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size is a positive integer, got {group_size!r}")
    if axis not in ("in", "out"):
        raise ValueError(f"axis is 'in' or 'out', got {axis!r}")
    picked = picker(groups)

    @functools.cache  # one object per orthogonaliser and side, or eager calls recompile
    def together(orthogonalize: Orthogonalizer, turned: bool):
        return functools.partial(
            _shared, orthogonalize=orthogonalize, size=group_size, turned=turned
        )

    def meet(orthogonalize: Orthogonalizer, parts: Sequence[Part]) -> list[jax.Array]:
        pieces: list[tuple[Part, int]] = []  # what goes to the buckets, and its group size
        whence: list[Run] = []  # part and where in its first axis
        for members, size in _runs(parts, group_size, picked):
            whence.append(members)
            pieces.append((_gather(parts, members), size))
        fns = []
        for part, size in pieces:
            # Inside a bucket a tall matrix is turned: its inputs are the columns there.
            turned = is_tall(part.array, part.axes) == (axis == "in")
            fns.append(orthogonalize if size == 1 else together(orthogonalize, turned))
        results, _ = map_stacks(
            fns,
            [(part.array,) for part, _ in pieces],
            [part.axes for part, _ in pieces],
            [sharding_role(part.path) for part, _ in pieces],
            together=[size for _, size in pieces],
        )
        return _scatter(parts, whence, results)

    return meet


def _shared(z: jax.Array, *, orthogonalize: Orthogonalizer, size: int, turned: bool) -> jax.Array:
    """Orthogonalises (g size, r, c) as g matrices, concatenated along the rows or the columns."""
    z = jnp.swapaxes(z, -1, -2) if turned else z
    shape = z.shape
    z = orthogonalize(z.reshape(shape[0] // size, size * shape[1], shape[2])).reshape(shape)
    return jnp.swapaxes(z, -1, -2) if turned else z


def _runs(
    parts: Sequence[Part], size: int, picked: Callable[[str], bool]
) -> Iterator[tuple[Run, int]]:
    """Yields the blocks of parts that go to a bucket together, and whether as groups.

    A run is a list of (part, slice of its first axis or index there or None for all of it).
    """
    rows, others = rows_of(parts, picked) if size > 1 else ({}, range(len(parts)))
    for i in others:
        yield [(i, slice(None))], 1
    for members in rows.values():
        found = {block: (i, k) for block, i, k in members}
        whole = {
            b // size for b in found if all(b // size * size + j in found for j in range(size))
        }
        pending: list[tuple[int, int, int, int]] = []  # part, start, stop, group size
        for block in sorted(found):
            i, k = found[block]
            group = (
                [found[block // size * size + j][0] for j in range(size)]
                if (block // size in whole)
                else []
            )
            if k is None or len(set(group)) > 1:  # per-layer leaves, or across two stacks
                if not group:
                    yield [(i, slice(None) if k is None else slice(k, k + 1))], 1
                elif block % size == 0:
                    yield [_at(found[block + j]) for j in range(size)], size
                continue
            kind = size if group else 1
            last = pending[-1] if pending else None
            if last and last[0] == i and last[2] == k and last[3] == kind:
                pending[-1] = (i, last[1], k + 1, kind)
            else:
                pending.append((i, k, k + 1, kind))
        for i, start, stop, kind in pending:
            yield [(i, slice(start, stop))], kind


def _at(where: tuple[int, int | None]) -> tuple[int, Any]:
    return (where[0], slice(None) if where[1] is None else where[1])


def _gather(parts: Sequence[Part], members: Run) -> Part:
    """The matrices of a run as one part; those of a group are neighbours in its stack."""
    first = parts[members[0][0]]
    if len(members) == 1:
        ((i, where),) = members
        lead = first.axes.stack[0] if first.axes.stack else None
        array = first.array
        if lead is not None and isinstance(where, slice) and where != slice(None):
            array = jax.lax.slice_in_dim(array, where.start, where.stop, axis=lead)
        # Blocks last in the stack, so that those of a group follow each other.
        stack = (*first.axes.stack[1:], *first.axes.stack[:1])
        return first._replace(array=array, axes=first.axes._replace(stack=stack))
    arrays, axes = [], first.axes
    for i, where in members:
        part = parts[i]
        array = part.array
        if isinstance(where, int):
            array = jax.lax.index_in_dim(array, where, axis=part.axes.stack[0], keepdims=False)
            axes = _without(part.axes, part.axes.stack[0])
        else:
            axes = part.axes
        arrays.append(array)
    moved = MatrixAxes(*(tuple(a + 1 for a in group) for group in axes))
    return first._replace(array=jnp.stack(arrays), axes=moved._replace(stack=(*moved.stack, 0)))


def _without(axes: MatrixAxes, lead: int) -> MatrixAxes:
    return MatrixAxes(*(tuple(a - (a > lead) for a in group if a != lead) for group in axes))


def _scatter(
    parts: Sequence[Part],
    whence: list[Run],
    results: list[jax.Array],
) -> list[jax.Array]:
    """Results of the runs, back in the layout of the parts."""
    found: list[list[tuple[int, jax.Array]]] = [[] for _ in parts]
    for members, result in zip(whence, results, strict=True):
        for j, (i, where) in enumerate(members):
            piece = result if len(members) == 1 else result[j]
            if isinstance(where, int):
                piece = jnp.expand_dims(piece, parts[i].axes.stack[0])
                found[i].append((where, piece))
            else:
                found[i].append((where.start or 0, piece))
    out = []
    for part, pieces in zip(parts, found, strict=True):
        pieces = [piece for _, piece in sorted(pieces, key=lambda p: p[0])]
        whole = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, part.axes.stack[0])
        out.append(whole)
    return out
