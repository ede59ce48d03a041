"""Muon and TEON as they are read on paper: the twin to which tests hold the fast update."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.matrices import Specs, paths_of, resolve
from jaxlib_unlearn.optim.orthogonalize import Orthogonalizer
from jaxlib_unlearn.optim.spectral.direction import SHAPE_SCALES
from jaxlib_unlearn.optim.spectral.groups import Groups, picker


def reference(
    params: Any,
    gradients: Sequence[Any],
    rate: float,
    orthogonalize: Orthogonalizer,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    momentum: str = "ema",
    shape_scale: str = "width",
    weight_decay: float = 0.0,
    adam_learning_rate: float = 1e-3,
    matrices: Specs = None,
    layout: str = "in_out",
    group_size: int = 1,
    groups: Groups = None,
) -> Iterator[Any]:
    r"""Take steps in plain loops over named leaves; the arguments are those of ``optim.teon``.

    .. math::
        W \leftarrow W - \eta \left( s \cdot \mathrm{orth}(u_t) + \lambda W \right)

    Blocks are grouped within a leaf; ``group_size=1`` is Muon.

    Yields:
        The parameters after each gradient.

    Example:
        >>> from jaxlib_unlearn.optim.orthogonalize import svd
        >>> w = {"w": jnp.eye(2)}
        >>> [step["w"].tolist() for step in reference(w, [w], 0.5, svd())]
        [[[0.5, 0.0], [0.0, 0.5]]]
    """
    structure = jax.tree.structure(params)
    names = paths_of(structure)
    weights = dict(zip(names, jax.tree.leaves(params), strict=True))
    axes = dict(zip(names, resolve(params, matrices, layout), strict=True))
    buffers = {name: jnp.zeros_like(w) for name, w in weights.items()}
    adamw = optax.adamw(adam_learning_rate, weight_decay=0.0)
    state = adamw.init({name: w for name, w in weights.items() if axes[name] is None})

    for t, gradient in enumerate(gradients, 1):
        grads = dict(zip(names, jax.tree.leaves(gradient), strict=True))
        rest = {name: g for name, g in grads.items() if axes[name] is None}
        moved, state = adamw.update(rest, state, {name: weights[name] for name in rest})
        steps: dict[str, Any] = dict(cast(dict, moved))
        for name, how in axes.items():
            if how is None:
                continue
            g, share = grads[name], 1.0 if momentum == "heavy_ball" else 1 - beta
            m = buffers[name] = beta * buffers[name] + share * g
            if momentum == "heavy_ball":
                u = g + beta * m if nesterov else m
            elif nesterov:
                u = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
            else:
                u = m / (1 - beta**t)

            order = how.stack + how.fan_in + how.fan_out
            turned = jnp.transpose(u, order)
            count, fan_in, fan_out = how.sizes(u.shape)
            blocks = list(turned.reshape(count, fan_in, fan_out))
            size = group_size if picker(groups)(name) else 1
            for first in range(0, count, size):
                group = blocks[first : first + size]
                if len(group) == size:  # one polar factor of matrices side by side
                    blocks[first : first + size] = jnp.split(
                        orthogonalize(jnp.concatenate(group)), size
                    )
                else:
                    blocks[first:] = [orthogonalize(block) for block in group]
            factor = SHAPE_SCALES[shape_scale](fan_in, fan_out)
            o = factor * jnp.transpose(
                jnp.stack(blocks).reshape(turned.shape), [order.index(a) for a in range(u.ndim)]
            )
            steps[name] = -rate * (o + weight_decay * weights[name])
        weights = {name: w + steps[name] for name, w in weights.items()}
        yield jax.tree.unflatten(structure, [weights[name] for name in names])
