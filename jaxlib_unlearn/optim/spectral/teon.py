r"""TEON: one orthogonalisation for the same projection of several consecutive blocks.

Muon replaces each momentum by its own polar factor. TEON concatenates the momenta of K blocks and
takes the polar factor of the whole, so the K layers share one inverse square root:

.. math::
    O^{(k)} = \Big(\sum_j U^{(j)} U^{(j)T}\Big)^{-1/2} U^{(k)}
    \qquad (U \text{ written (out, in), concatenated along in})

Kernels here are (in, out) and the blocks of a decoder are stacked ``(L, in, out)``, so the
concatenation along in is the view ``(L / K, K in, out)``: nothing is copied, and the layers share
the Gram matrix of that view.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.matrices import Specs, every_matrix, resolve
from jaxlib_unlearn.optim.orthogonalize import Orthogonalizer, by_name
from jaxlib_unlearn.optim.passing import passing_by
from jaxlib_unlearn.optim.signatures import POSITIVE, Allowed, Count, Decay, Dtype, Epsilon
from jaxlib_unlearn.optim.spectral.buckets import map_stacks
from jaxlib_unlearn.optim.spectral.direction import Meet
from jaxlib_unlearn.optim.spectral.groups import (
    ATTENTION,
    Groups,
    Member,
    Run,
    check_groups,
    runs_of,
)
from jaxlib_unlearn.optim.spectral.muon import SHAPES, scale_by_momentum
from jaxlib_unlearn.optim.spectral.plan import Part
from jaxlib_unlearn.optim.spectral.post import Post
from jaxlib_unlearn.optim.spectral.rest import AdamWRest, DecayMask, with_adamw
from jaxlib_unlearn.optim.spectral.splitting import Splits
from jaxlib_unlearn.optim.spellings import with_optax_spellings


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

    TEON does not see a leaf that is frozen by ``optax.partition``, ``optax.masked`` or a smaller
    tree: the others of its group get Muon's step instead of the shared one. Freeze whole groups, or
    look at the group column of ``optim.matrices.describe(params, tx)``.

    Args:
        group_size: The number K of consecutive blocks in a group; 1 is Muon.
        axis: The axis along which the matrices of a group are concatenated, "in" (the paper's
            mode-1) or "out".
        groups: The leaves that are grouped: a pattern (``re.search``) or predicate on the path;
            None for all.
        nesterov: The direction looks one step ahead of the momentum, unlike in the paper.
        orthogonalize: The orthogonaliser: a function ``(n, r, c) -> (n, r, c)``, or a name as in
            ``optim.scale_by_muon``. The default is Polar Express with 5 steps, as in the paper.
        beta: The decay of the momentum, in [0, 1).
        momentum: The form of the momentum, "ema" or "heavy_ball", as in ``optim.muon``.
        shape_scale: The factor s of one layer's matrix: "unit", "width", "spectral" or "match_rms".
        split: The leaves that hold several matrices each; every block is grouped with its
            counterparts.
        post: A step that follows, applied to every layer by itself (NorMuon).
        mu_dtype: The dtype of the momentum; None for the parameters'.
        comm_dtype: The dtype to which matrices are rounded when they are sent between devices, as
            in ``optim.scale_by_muon``.

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
    direction = scale_by_momentum(
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
    return passing_by(direction)


@with_optax_spellings
def teon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    group_size: Count = 2,
    axis: Annotated[str, Allowed(choices=("in", "out"))] = "in",
    groups: Annotated[Groups, Allowed()] = ATTENTION,
    beta: Decay = 0.95,
    nesterov: Annotated[bool, Allowed()] = False,
    momentum: str = "ema",
    orthogonalize: Annotated[Orthogonalizer | str | None, Allowed()] = None,
    shape_scale: Annotated[str, SHAPES] = "spectral",
    weight_decay: float | jax.Array = 0.0,
    adam_learning_rate: Annotated[optax.ScalarOrSchedule | None, POSITIVE] = None,
    adam_b1: Decay = 0.9,
    adam_b2: Decay = 0.999,
    adam_eps: Epsilon = 1e-8,
    adam_weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: DecayMask = None,
    matrices: Specs = None,
    layout: str = "in_out",
    split: Splits | None = None,
    post: Post | None = None,
    mu_dtype: Dtype = None,
    comm_dtype: Dtype = None,
) -> optax.GradientTransformationExtraArgs:
    r"""TEON for query, key and value projections, Muon for the other matrices, AdamW for the rest.

    .. math::
        W^{(k)} \leftarrow W^{(k)} - \eta \left( s\, O^{(k)} + \lambda W^{(k)} \right)

    with :math:`O^{(k)}` of :func:`scale_by_teon`. At one learning rate a group of K square matrices
    moves :math:`\sqrt K` less than under Muon (by Frobenius norm): compare the two over several.

    Args:
        learning_rate: The learning rate eta of the matrices, a number or a schedule.
        group_size: The number K of consecutive blocks in a group; the paper finds 2 best.
        axis: The axis along which the matrices of a group are concatenated, "in" (the paper's
            mode-1) or "out".
        groups: The leaves that are grouped; the default is query, key and value projections. As in
            :func:`scale_by_teon`, a frozen leaf leaves the rest of its group ungrouped.
        beta: The decay of the momentum.
        nesterov: The direction looks one step ahead of the momentum (Nesterov).
        momentum: The form of the momentum, "ema" or "heavy_ball".
        orthogonalize: see :func:`scale_by_teon`; default Polar Express with 5 steps.
        shape_scale: The factor s of one layer's matrix: the paper's "spectral" sqrt(out / in),
            "width", "match_rms" or "unit".
        weight_decay: The decoupled weight decay lambda of the matrices, multiplied by eta but not
            by s.
        adam_learning_rate: The learning rate of the other leaves; None for ``learning_rate``.
        adam_b1: The decay of AdamW's first moment.
        adam_b2: The decay of AdamW's second moment.
        adam_eps: The epsilon of AdamW.
        adam_weight_decay: The decoupled weight decay of AdamW.
        weight_decay_mask: The leaves that decay, matrices and others: a tree of bools like the
            parameters (or a prefix of one) or a function of the parameters that returns it, as in
            ``optax.add_decayed_weights``; None for everything.
        matrices: The choice of matrices, as in ``optim.muon``.
        layout: The order of a kernel's axes, "in_out" or "out_in", for the rules.
        split: The leaves that hold several matrices each (a fused ``c_attn`` is cut into q, k, v).
        post: A step between orthogonalisation and scaling, e.g. ``optim.normuon()``.
        mu_dtype: The dtype of the momenta; None for the parameters'.
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


# Every leaf is cut into runs of blocks; a run gets Muon's step or holds whole groups.


def _grouped(group_size: int, axis: str, groups: Groups) -> Meet:
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size is a positive integer, got {group_size!r}")
    if axis not in ("in", "out"):
        raise ValueError(f"axis is 'in' or 'out', got {axis!r}")

    def meet(
        orthogonalize: Orthogonalizer, parts: Sequence[Part], arrays: Sequence[jax.Array]
    ) -> list[jax.Array]:
        runs = runs_of(parts, group_size, groups)
        fns = []
        for run in runs:
            # Inside a bucket a tall matrix is turned: its inputs are the columns there.
            turned = run.tall == (axis == "in")
            alone = run.together == 1
            fns.append(orthogonalize if alone else _together(orthogonalize, group_size, turned))
        results, _ = map_stacks(
            fns,
            [(_gather(arrays, parts, run.members),) for run in runs],
            [run.axes for run in runs],
            [parts[run.members[0].part].role for run in runs],
            together=[run.together for run in runs],
        )
        return _scatter(parts, runs, results)

    return meet


@functools.lru_cache(maxsize=64)  # one object for the same arguments, or eager calls recompile
def _together(orthogonalize: Orthogonalizer, size: int, turned: bool) -> Callable[..., jax.Array]:
    return functools.partial(_shared, orthogonalize=orthogonalize, size=size, turned=turned)


def _shared(z: jax.Array, *, orthogonalize: Orthogonalizer, size: int, turned: bool) -> jax.Array:
    """Orthogonalise (g size, r, c) as g matrices, concatenated along the rows or the columns."""
    z = jnp.swapaxes(z, -1, -2) if turned else z
    shape = z.shape
    z = orthogonalize(z.reshape(shape[0] // size, size * shape[1], shape[2])).reshape(shape)
    return jnp.swapaxes(z, -1, -2) if turned else z


def _gather(
    arrays: Sequence[jax.Array], parts: Sequence[Part], members: Sequence[Member]
) -> jax.Array:
    """The matrices of a run in one array; several members are stacked along a new first axis."""
    if len(members) == 1:
        ((i, start, stop),) = members
        if start is None:
            return arrays[i]
        return jax.lax.slice_in_dim(arrays[i], start, stop, axis=parts[i].axes.stack[0])
    return jnp.stack(
        [
            arrays[i]
            if start is None
            else jax.lax.index_in_dim(arrays[i], start, parts[i].axes.stack[0], keepdims=False)
            for i, start, _ in members
        ]
    )


def _scatter(
    parts: Sequence[Part], runs: Sequence[Run], results: Sequence[jax.Array]
) -> list[jax.Array]:
    """The results of the runs, back in the layout of the parts."""
    found: list[list[tuple[int, jax.Array]]] = [[] for _ in parts]
    for run, result in zip(runs, results, strict=True):
        for j, (i, start, _) in enumerate(run.members):
            piece = result
            if len(run.members) > 1:
                piece = result[j]
                if start is not None:
                    piece = jnp.expand_dims(piece, parts[i].axes.stack[0])
            found[i].append((start or 0, piece))
    out = []
    for part, pieces in zip(parts, found, strict=True):
        pieces = [piece for _, piece in sorted(pieces, key=lambda p: p[0])]
        whole = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, part.axes.stack[0])
        out.append(whole)
    return out
