r"""Closed-form erasure: kernels that read text are edited so that one concept reads as another.

The kernels are those that turn the states of a text encoder into keys and values of a denoiser's
cross-attention. A kernel ``K`` is ``(d, out)``, so a state ``c`` (a row) becomes ``c K``; published
code writes the transpose. All kernels share one edit, a matrix ``(d, d)`` applied from the left.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jax.typing import ArrayLike

from jaxlib_unlearn.losses.likelihood import upcast
from jaxlib_unlearn.optim.arrays import matmul

Kernels = Any  # a pytree of matrices (d, out)


def uce(
    kernels: Kernels,
    erase: ArrayLike,
    guide: ArrayLike,
    preserve: ArrayLike | None = None,
    *,
    keep: ArrayLike = 0.5,
    erase_weight: ArrayLike = 1.0,
    preserve_weight: ArrayLike = 1.0,
) -> Kernels:
    r"""Unified concept editing: states to erase read as their guides, others as before.

    .. math::
        K' = \operatorname*{argmin}_{X}\; \lambda \|X - K\|^2
        + a_e \sum_e \|c_e X - c_g K\|^2 + a_p \sum_p \|c_p X - c_p K\|^2
        = K + A^{-1} a_e \sum_e c_e^T (c_g - c_e)\, K, \qquad
        A = \lambda I + a_e \sum_e c_e^T c_e + a_p \sum_p c_p^T c_p

    The second form, the change alone, leaves a kernel exactly as it is where nothing is erased.

    Args:
        kernels: a pytree of matrices ``(d, out)``.
        erase: ``(n, d)`` states to erase, one a row.
        guide: ``(n, d)``, the state that each of them shall read as.
        preserve: ``(m, d)`` states that shall read as before.
        keep: lambda, the weight of the kernels before the edit, above 0.
        erase_weight: a_e.
        preserve_weight: a_p.

    Returns:
        The edited kernels, in their dtypes; computed in float32, in float64 if the states are.

    Raises:
        ValueError: states of other widths than the kernels', or numbers of rows that differ.

    Example:
        >>> import jax.numpy as jnp
        >>> sneaker, clothes = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
        >>> uce({"k": jnp.eye(2)}, sneaker, clothes, keep=1e-6)["k"].round(3).tolist()
        [[0.0, 1.0], [0.0, 1.0]]

    References:
        Gandikota et al., "Unified Concept Editing in Diffusion Models" (WACV 2024). Published
        weights: keep 0.5, and the state of the last word of each prompt.
    """
    old, new = _states(kernels, erase, "erase"), _states(kernels, guide, "guide")
    if old.shape != new.shape:
        raise ValueError(f"a guide for each state to erase; got {old.shape} and {new.shape}")
    gram = erase_weight * matmul(old.T, old)
    if preserve is not None:
        kept = _states(kernels, preserve, "preserve")
        gram += preserve_weight * matmul(kept.T, kept)
    change = _solve(gram, keep, erase_weight * matmul(old.T, new - old))
    return jax.tree.map(lambda kernel: _changed(kernel, change), kernels)


def adversarial(
    original: Kernels, edited: Kernels, states: ArrayLike, *, keep: ArrayLike = 0.1
) -> jax.Array:
    r"""The states that edited kernels read most like the original ones read an erased concept.

    .. math::
        c_{adv} = \operatorname*{argmin}_{x}\; \sum_l \|x K'_l - c K_l\|^2 + \lambda \|x\|^2
        = c \sum_l K_l {K'_l}^T \Big(\lambda I + \sum_l K'_l {K'_l}^T\Big)^{-1}

    Args:
        original: a pytree of matrices ``(d, out)``.
        edited: the same after an edit.
        states: ``(n, d)``, the erased states c.
        keep: lambda, above 0: the smaller, the closer is the reading and the longer the state.

    Returns:
        ``(n, d)`` float32, float64 if the states are.

    Raises:
        ValueError: states of another width than the kernels'.

    Example:
        >>> import jax.numpy as jnp
        >>> edited = jnp.diag(jnp.array([0.5, 1.0]))  # half as loud
        >>> adversarial(jnp.eye(2), edited, jnp.array([[1.0, 0.0]]), keep=1e-6).round(3).tolist()
        [[2.0, 0.0]]

    References:
        Gong et al., "Reliable and Efficient Concept Erasure" (ECCV 2024), RECE.
    """
    rows = _states(original, states, "erased")
    pairs = [
        (upcast(a), upcast(b))
        for a, b in zip(jax.tree.leaves(original), jax.tree.leaves(edited), strict=True)
    ]
    nothing = jnp.zeros((rows.shape[-1],) * 2, rows.dtype)
    crossed = sum((matmul(after, before.T) for before, after in pairs), nothing)
    gram = sum((matmul(after, after.T) for _, after in pairs), nothing)
    return matmul(rows, _solve(gram, keep, crossed).T)


def rece(
    kernels: Kernels,
    erase: ArrayLike,
    guide: ArrayLike,
    preserve: ArrayLike | None = None,
    *,
    rounds: int = 3,
    keep: ArrayLike = 0.1,
    erase_weight: ArrayLike = 1.0,
    preserve_weight: ArrayLike = 0.1,
    adversarial_keep: ArrayLike = 0.1,
    again: bool = False,
) -> Kernels:
    """UCE, then rounds of it on the states that would undo the previous round.

        K_0 = uce(K, c, g);  K_i = uce(K_{i-1}, adversarial(K, K_{i-1}, c), g)

    With `again`, ``K_i = uce(K_{i-1}, [c, adversarial(K, K_{i-1}, c)], [g, g])``. A round as
    published also changes the reading of ``c``. Where states have few dimensions, many of which
    the erased states fill, it changes that reading back, and the concept returns without `again`.

    Args:
        kernels: a pytree of matrices ``(d, out)``.
        erase: ``(n, d)`` states to erase; the published code takes all positions of a prompt.
        guide: ``(n, d)``, the state that each of them shall read as.
        preserve: ``(m, d)`` states that shall read as before.
        rounds: the number of rounds after the first edit; 0 is UCE.
        keep: lambda of every edit, see `uce`.
        erase_weight: a_e, see `uce`.
        preserve_weight: a_p, see `uce`.
        adversarial_keep: lambda of `adversarial`; published are 0.1, and 1e-3 for hard objects.
        again: whether rounds erase ``c`` again beside the states that undo it; not so as published.

    Returns:
        The edited kernels.

    Raises:
        ValueError: see `uce`; or a negative number of rounds.

    Example:
        >>> import jax.numpy as jnp
        >>> erase, guide = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
        >>> edited = [rece(jnp.eye(2), erase, guide, guide, rounds=n) for n in (0, 1)]
        >>> back = [adversarial(jnp.eye(2), k, erase) @ k for k in edited]
        >>> [float(jnp.linalg.norm(b - erase).round(3)) for b in back]  # how far it stays away
        [0.956, 0.999]

    References:
        Gong et al., "Reliable and Efficient Concept Erasure" (ECCV 2024), RECE.
    """
    if rounds < 0:
        raise ValueError(f"rounds are 0 or more, got {rounds}")
    weights = {"keep": keep, "erase_weight": erase_weight, "preserve_weight": preserve_weight}
    edited = uce(kernels, erase, guide, preserve, **weights)
    for _ in range(rounds):
        found, led = adversarial(kernels, edited, erase, keep=adversarial_keep), upcast(guide)
        if again:
            found, led = jnp.concatenate([upcast(erase), found]), jnp.concatenate([led, led])
        edited = uce(edited, found, led, preserve, **weights)
    return edited


def _states(kernels: Kernels, states: ArrayLike, name: str) -> jax.Array:
    """Rows as wide as every kernel is deep."""
    rows = upcast(states)
    depths = {jnp.shape(kernel)[0] for kernel in jax.tree.leaves(kernels)}
    if rows.ndim != 2 or depths - {rows.shape[-1]}:
        raise ValueError(
            f"states to {name} are rows as wide as the kernels are deep; "
            f"got {rows.shape} for kernels of depth {sorted(depths)}"
        )
    return rows


def _solve(gram: ArrayLike, keep: ArrayLike, right: ArrayLike) -> jax.Array:
    """``(keep I + gram)^-1 right`` of a positive semi-definite matrix."""
    gram = jnp.asarray(gram)
    return cho_solve(cho_factor(gram + keep * jnp.eye(len(gram), dtype=gram.dtype)), right)


def _changed(kernel: jax.Array, change: jax.Array) -> jax.Array:
    """The kernel and its change, added before they are rounded to its dtype."""
    wide = upcast(kernel)
    return (wide + matmul(change, wide)).astype(kernel.dtype)
