r"""LoRA: a low-rank term beside frozen kernels, as a trainable tree of its own.

.. math::
    y = x W + \frac{\alpha}{r}\, (x A)\, B, \qquad A\,(\mathrm{in}, r),\; B\,(r, \mathrm{out})

The adapters of a stack are `{"layers": {"attn": {"q": {"lora_a": {"kernel": (L, in, r)}, "lora_b":
{"kernel": (L, r, out)}}}}}`: kernels by name, so that every optimizer sees matrices. `bind` passes
them to the decoder's scan beside the frozen layers and lets a layer map apply them to one layer at
a time, factor by factor: neither `W + A B` nor a gradient of `W` ever exists. B starts at zero, so
the model with its initial adapters is the frozen model: a reference needs no second model.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_unlearn.optim.zeroth_order.perturbations import Factored
from models.decoder.model import LayerMap

LORA = "lora"  # where a bound layer holds its adapters
PURPOSE = zlib.crc32(b"lora")  # the purpose of the draws, folded into the seed


def kernels(params: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, int]]]:
    """The kernels of a block that can have an adapter.

    Args:
        params: parameters of a decoder (arrays or shapes), one stack or several.

    Returns:
        Name, e.g. `q`, to path inside the block and `(in, out)`.

    Example:
        >>> from models.decoder.model import Decoder, DecoderConfig
        >>> found = kernels(Decoder(DecoderConfig(16, 8, 24, 2, 2, 1, 4)).shapes())
        >>> list(found), found["down"]
        (['k', 'o', 'q', 'v', 'down', 'gate', 'up'], ('mlp/down', (24, 8)))
    """
    layers = params["layers"]
    stack = layers[0] if isinstance(layers, tuple) else layers
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(stack):
        *parents, last = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if last == "kernel" and len(leaf.shape) == 3:
            found[parents[-1]] = "/".join(parents), tuple(leaf.shape[1:])
    return found


def init(
    params: Mapping[str, Any], rank: int, targets: Sequence[str], seed: int | jax.Array = 0
) -> dict[str, Any]:
    r"""Adapters for a model: `A ~ N(0, 1 / in)`, keyed by (seed, purpose, path), and `B = 0`.

    Args:
        params: parameters of a decoder (arrays or shapes), one stack or several.
        rank: r.
        targets: names of `kernels`.
        seed: the seed of the draws.

    Returns:
        The adapters, float32, in a tree with as many stacks.

    Raises:
        ValueError: no target, an unknown one, or a rank that a matrix does not have.

    Example:
        >>> from models.decoder.model import Decoder, DecoderConfig
        >>> adapters = init(Decoder(DecoderConfig(16, 8, 24, 2, 2, 1, 4)).shapes(), 4, ["down"])
        >>> down = adapters["layers"]["mlp"]["down"]
        >>> down["lora_a"]["kernel"].shape, down["lora_b"]["kernel"].shape
        ((2, 24, 4), (2, 4, 8))

    Paper: Hu et al., arXiv:2106.09685, section 4.1.
    """
    known = kernels(params)
    if not targets or not set(targets) <= set(known):
        raise ValueError(f"targets are some of {', '.join(known)}, got {list(targets)}")
    for name in targets:
        if not 1 <= rank <= min(known[name][1]):
            raise ValueError(f"rank {rank} does not fit {name}'s matrices {known[name][1]}")
    key = jax.random.fold_in(jax.random.key(seed), PURPOSE)

    def adapters(stack: Any, first: int) -> dict[str, Any]:
        depth = jax.tree.leaves(stack)[0].shape[0]
        tree: dict[str, Any] = {}
        for name in dict.fromkeys(targets):
            path, (fan_in, fan_out) = known[name]
            mine = jax.random.fold_in(key, zlib.crc32(path.encode()))
            draw = jax.vmap(
                lambda i, key=mine, n=fan_in: jax.random.normal(
                    jax.random.fold_in(key, i), (n, rank)
                )
            )
            node = tree
            for part in path.split("/"):
                node = node.setdefault(part, {})
            node["lora_a"] = {"kernel": draw(jnp.arange(first, first + depth)) * fan_in**-0.5}
            node["lora_b"] = {"kernel": jnp.zeros((depth, rank, fan_out))}
        return tree

    layers = params["layers"]
    if not isinstance(layers, tuple):
        return {"layers": adapters(layers, 0)}
    made, first = [], 0
    for stack in layers:
        made.append(adapters(stack, first))
        first += jax.tree.leaves(stack)[0].shape[0]
    return {"layers": tuple(made)}


def adapt(layer: Any, adapters: Any, scale: float) -> Any:
    """A layer (or a stack of layers) whose kernels carry their adapters as `Factored` ones.

    Args:
        layer: parameters of one block, or of all with a leading layer axis.
        adapters: its adapters; a perturbed one may be `Factored` itself.
        scale: alpha / r.

    Returns:
        The layer; its arrays are not copied.
    """
    if set(adapters) == {"lora_a", "lora_b"}:
        a, b = (_dense(adapters[name]["kernel"]) for name in ("lora_a", "lora_b"))
        return {**layer, "kernel": Factored(layer["kernel"], a, scale * jnp.swapaxes(b, -1, -2))}
    return {
        name: adapt(part, adapters[name], scale) if name in adapters else part
        for name, part in layer.items()
    }


def bind(
    adapters: Mapping[str, Any],
    params: Mapping[str, Any],
    layer_map: LayerMap | None = None,
    *,
    scale: float,
) -> tuple[dict[str, Any], LayerMap]:
    """Frozen parameters and adapters in the form that `Decoder.forward` takes.

    Args:
        adapters: the tree of `init`, which is differentiated or perturbed.
        params: the frozen model.
        layer_map: a function of one layer of *adapters*, e.g. a zeroth-order perturbation.
        scale: alpha / r.

    Returns:
        `(params, layer_map)` for `forward`: the layers with their adapters beside them, and the map
        that applies them to one layer inside the scan.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from models.decoder.model import Decoder, DecoderConfig
        >>> decoder = Decoder(DecoderConfig(16, 8, 24, 2, 2, 1, 4))
        >>> frozen = decoder.init(jax.random.key(0))
        >>> adapters, tokens = init(frozen, 4, ["q", "up"]), jnp.zeros((1, 3), jnp.int32)
        >>> params, layer_map = bind(adapters, frozen, scale=1.0)
        >>> hidden, _ = decoder.forward(params, tokens, layer_map=layer_map)
        >>> bool(jnp.all(hidden == decoder.forward(frozen, tokens)[0]))  # B is zero
        True
    """

    def beside(stack, mine):
        return {**stack, LORA: mine}

    def apply(layer, index):
        rest = {name: part for name, part in layer.items() if name != LORA}
        mine = layer[LORA] if layer_map is None else layer_map(layer[LORA], index)
        return adapt(rest, mine, scale)

    return {**params, "layers": _stacks(beside, params, adapters)}, apply


def view(adapters: Mapping[str, Any], params: Mapping[str, Any], *, scale: float) -> dict[str, Any]:
    """The adapted model for scoring and generating, without a layer map and without a copy.

    Args:
        adapters: the trained tree of `init`.
        params: the frozen model.
        scale: alpha / r.

    Returns:
        `params` with stacked `Factored` kernels, which the decoder's scan takes apart.
    """

    def adapted(stack, mine):
        return adapt(stack, mine, scale)

    return {**params, "layers": _stacks(adapted, params, adapters)}


def merge(
    adapters: Mapping[str, Any], params: Mapping[str, Any], *, scale: float
) -> dict[str, Any]:
    r"""The plain parameters of the adapted model.

    .. math::
        W' = \mathrm{round}\left( W + \frac{\alpha}{r} A B \right)

    computed in float32 (at least) and rounded once, to the kernel's own dtype.

    Args:
        adapters: the trained tree of `init`.
        params: the frozen model; not consumed.
        scale: alpha / r.

    Returns:
        A tree like `params`; leaves without an adapter are the same arrays.
    """

    def merged(kernel):
        if not isinstance(kernel, Factored):
            return kernel
        where = getattr(kernel.kernel, "sharding", None)  # a traced one has none
        return jax.jit(_merge, out_shardings=where)(*kernel)

    tree = view(adapters, params, scale=scale)
    return jax.tree.map(merged, tree, is_leaf=lambda x: isinstance(x, Factored))


def _merge(kernel: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    term = jnp.einsum("...ir,...or->...io", left.astype(wide), right, precision="highest")
    return (kernel.astype(wide) + term).astype(kernel.dtype)


def _dense(kernel: Any) -> jax.Array:
    """A factor that a low-rank perturbation moved, as one array: it is thin."""
    if not isinstance(kernel, Factored):
        return kernel
    term = jnp.matmul(kernel.left, kernel.right.T, precision="highest")
    return (kernel.kernel.astype(term.dtype) + term).astype(kernel.kernel.dtype)


def _stacks(fn: Any, params: Mapping[str, Any], adapters: Mapping[str, Any]) -> Any:
    """`fn(stack, its adapters)` of each stack of layers."""
    layers, mine = params["layers"], adapters["layers"]
    if isinstance(layers, tuple):
        return tuple(fn(stack, part) for stack, part in zip(layers, mine, strict=True))
    return fn(layers, mine)
