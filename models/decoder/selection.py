"""Training of a part of a model: leaves chosen by name and by block.

Chosen leaves are cut out of the stacks of layers once, before training: the trained tree holds only
the layers of the chosen blocks, so only these have gradients and optimizer state, and below the
first of them nothing is differentiated (`Selection.train_from`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxlib_unlearn.errors import UserError
from models import layout
from models.decoder.model import LayerMap

BELOW_BLOCKS = ("embed", "positions", "patch_embed", "cls")  # leaves that the first block reads
TRAINED = "trained"  # the key under which a layer holds its trained leaves


class Run(NamedTuple):
    """Consecutive blocks `first` to `last - 1`, and whether leaves of them are trained."""

    first: int
    last: int
    trained: bool


class Selection(NamedTuple):
    """A choice of the leaves of a model that are trained.

    Args:
        inner: paths below one layer, `mlp/down/kernel`.
        outer: paths of leaves outside the layers, `embed/embedding`.
        runs: all blocks, in runs of trained and of frozen ones; empty for a model without stacks.
    """

    inner: tuple[str, ...]
    outer: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def train_from(self) -> int:
        """The first block that a gradient has to reach."""
        if any(path.startswith(BELOW_BLOCKS) for path in self.outer):
            return 0
        depth = self.runs[-1].last if self.runs else 0
        return next((run.first for run in self.runs if run.trained), depth)


def select(
    params: Any, leaves: Sequence[str] | None = None, blocks: Sequence[int] | None = None
) -> Selection:
    """Choose leaves by name and by block.

    Args:
        params: parameters of a model with one stack of layers or none (arrays or shapes).
        leaves: parts of paths, `mlp/down` or `q`; None: all. A leaf outside the layers is chosen by
            its name alone.
        blocks: the indices of the blocks; None: all blocks.

    Returns:
        The selection.

    Raises:
        UserError: a name or a block that the model does not have, or nothing is left.

    Example:
        >>> from models.decoder.model import Decoder, DecoderConfig
        >>> shapes = Decoder(DecoderConfig(16, 8, 24, 4, 2, 1, 4)).shapes()
        >>> found = select(shapes, ["mlp/down"], [1, 2])
        >>> found.inner, found.outer, found.train_from
        (('mlp/down/kernel',), (), 1)
        >>> [(run.first, run.last) for run in found.runs if run.trained]
        [(1, 3)]
    """
    outside = {name: part for name, part in params.items() if name != "layers"}
    layers = params.get("layers", {})
    inner, outer = _paths(layers), _paths(outside)
    depth = jax.tree.leaves(layers)[0].shape[0] if inner else 0
    if leaves is not None:
        for name in leaves:
            if not any(_matches(path, name) for path in inner + outer):
                names = sorted({path.removesuffix("/kernel") for path in inner + outer})
                raise UserError(
                    f"--train.leaves {name}: no leaf of the model has that name; they are "
                    f"{', '.join(names)}"
                )
        inner = [path for path in inner if any(_matches(path, name) for name in leaves)]
        outer = [path for path in outer if any(_matches(path, name) for name in leaves)]
    elif blocks is not None:
        outer = []
    for block in blocks or ():
        if not 0 <= block < depth:
            there = f"blocks 0 to {depth - 1}" if depth else "no stack of blocks; leave it out"
            raise UserError(f"--train.blocks {block}: the model has {there}")
    chosen = set(range(depth) if blocks is None else blocks) if inner else set()
    if blocks is not None and not chosen:
        raise UserError(
            "--train.blocks goes with leaves of blocks; name some with --train.leaves, or leave it "
            "out"
        )
    runs: list[Run] = []
    for block in range(depth):
        if runs and runs[-1].trained == (block in chosen):
            runs[-1] = runs[-1]._replace(last=block + 1)
        else:
            runs.append(Run(block, block + 1, block in chosen))
    return Selection(tuple(inner), tuple(outer), tuple(runs))


def split(
    params: Any, chosen: Selection, cut: Callable[[Any, str, int, int], Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split parameters into the trained tree and the frozen rest.

    Args:
        params: parameters of a model with one stack of layers or none.
        chosen: the selection, see `select`.
        cut: `(leaf, path, first, last) ->` these layers of a stacked leaf; None: a slice. A leaf
            outside the layers is given as one layer of its own, from 0 to its first axis.

    Returns:
        `(trainable, frozen)`. Under `layers` the first has one stack, or as many as there are runs
        of trained blocks; the second a tuple of stacks, one a run.

    Example:
        >>> import jax
        >>> from models.decoder.model import Decoder, DecoderConfig
        >>> params = Decoder(DecoderConfig(16, 8, 24, 4, 2, 1, 4)).init(jax.random.key(0))
        >>> trainable, frozen = split(params, select(params, ["down"], [1, 2]))
        >>> trainable["layers"]["mlp"]["down"]["kernel"].shape
        (2, 24, 8)
        >>> [sorted(stack["mlp"]) for stack in frozen["layers"]]
        [['down', 'gate', 'up'], ['gate', 'up'], ['down', 'gate', 'up']]
    """
    cut = cut or (lambda x, path, first, last: x[first:last])
    stacks, rest = [], []

    def whole(path: Any, x: Any) -> Any:
        return cut(x, layout.path_str(path), 0, x.shape[0])

    for run in chosen.runs:

        def layers(path: Any, x: Any, run: Run = run) -> Any:
            return cut(x, f"layers/{layout.path_str(path)}", run.first, run.last)

        part = jax.tree_util.tree_map_with_path(layers, params["layers"])
        if run.trained:
            stacks.append(_pick(part, lambda path: path in chosen.inner))
            part = _pick(part, lambda path: path not in chosen.inner)
        rest.append(part)
    outside = {name: part for name, part in params.items() if name != "layers"}
    outside = jax.tree_util.tree_map_with_path(whole, outside)
    trainable = _pick(outside, lambda path: path in chosen.outer)
    if stacks:
        trainable["layers"] = stacks[0] if len(stacks) == 1 else tuple(stacks)
    frozen = _pick(outside, lambda path: path not in chosen.outer)
    return trainable, frozen | ({"layers": tuple(rest)} if rest else {})


def bind(
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    layer_map: LayerMap | None = None,
    *,
    chosen: Selection,
    dtype: Any = None,
) -> tuple[dict[str, Any], LayerMap]:
    """Both parts in the form that `Decoder.forward` takes.

    Args:
        trainable: the trained tree of `split`, which is differentiated or perturbed.
        frozen: the frozen tree of `split`.
        layer_map: a function of one layer of the *trained* leaves, e.g. a zeroth-order
            perturbation; its index counts the trained blocks from 0.
        chosen: the selection.
        dtype: the dtype of the computation.

    Returns:
        `(params, layer_map)` for `forward`.
    """
    runs = [run for run in chosen.runs if run.trained]
    before = [sum(r.last - r.first for r in runs[:i]) for i in range(len(runs))]

    def apply(layer, index):
        name = next((name for name in layer if name.startswith(TRAINED)), None)
        if name is None:
            return layer
        i = int(name.removeprefix(TRAINED))
        mine, rest = layer[name], {k: part for k, part in layer.items() if k != name}
        if layer_map is None:
            mine = layout.constrain(mine, dtype)
        else:
            mine = layer_map(mine, index - runs[i].first + before[i])
        return _join(rest, mine)

    def beside(i, stack, mine):
        return {**stack, f"{TRAINED}{i}": mine}

    return _whole(trainable, frozen, chosen, beside), apply


def view(
    trainable: Mapping[str, Any], frozen: Mapping[str, Any], *, chosen: Selection
) -> dict[str, Any]:
    """The model for scoring and generating, in several stacks, without a copy."""
    return _whole(trainable, frozen, chosen, lambda i, stack, mine: _join(stack, mine))


def finish(trainable: Mapping[str, Any], params: Any, *, chosen: Selection) -> Any:
    """The plain parameters of the trained model, with one stack of layers.

    Args:
        trainable: the tree after training.
        params: the model before; not consumed.
        chosen: the selection.

    Returns:
        A tree like `params`; leaves that were not trained are the same arrays.
    """
    flat = {path: dict(_walk(stack)) for path, stack in enumerate(_stacks(trainable))}
    outer = dict(_walk({k: part for k, part in trainable.items() if k != "layers"}))
    runs = [run for run in chosen.runs if run.trained]

    def one(path, x):
        name = layout.path_str(path)
        if name in outer:
            return outer[name]
        inner = name.removeprefix("layers/")
        if not name.startswith("layers/") or inner not in chosen.inner:
            return x
        parts = tuple(flat[i][inner] for i in range(len(runs)))
        firsts = tuple(run.first for run in runs)
        where = getattr(x, "sharding", None)  # a traced one has none
        if where is not None:
            where = where.with_memory_kind("device")
            x = jax.device_put(x, where)
        return jax.jit(_filled, static_argnums=2, out_shardings=where)(x, parts, firsts)

    return jax.tree_util.tree_map_with_path(one, params)


def _filled(x: jax.Array, parts: tuple[jax.Array, ...], firsts: tuple[int, ...]) -> jax.Array:
    for part, first in zip(parts, firsts, strict=True):
        x = jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), first, 0)
    return x


def _stacks(trainable: Mapping[str, Any]) -> tuple[Any, ...]:
    layers = trainable.get("layers", ())
    return layers if isinstance(layers, tuple) else (layers,)


def _whole(
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    chosen: Selection,
    fn: Callable[[int, Any, Any], Any],
) -> dict[str, Any]:
    """The model with `fn(i, frozen stack, trained stack)` in the i-th trained run."""
    mine, layers, i = _stacks(trainable), [], 0
    for run, stack in zip(chosen.runs, frozen.get("layers", ()), strict=True):
        layers.append(fn(i, stack, mine[i]) if run.trained else stack)
        i += run.trained
    outside = _join(
        {name: part for name, part in frozen.items() if name != "layers"},
        {name: part for name, part in trainable.items() if name != "layers"},
    )
    return outside | ({"layers": tuple(layers)} if layers else {})


def _walk(tree: Any, above: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        return [(above, tree)]
    return [
        pair
        for name, part in tree.items()
        for pair in _walk(part, f"{above}/{name}" if above else name)
    ]


def _paths(tree: Any) -> list[str]:
    return [path for path, _ in _walk(tree)]


def _pick(tree: Any, keep: Callable[[str], bool], above: str = "") -> dict[str, Any]:
    """The leaves whose path is kept; parts without any are left out."""
    found = {}
    for name, part in tree.items():
        path = f"{above}/{name}" if above else name
        if isinstance(part, Mapping):
            if inner := _pick(part, keep, path):
                found[name] = inner
        elif keep(path):
            found[name] = part
    return found


def _join(first: Any, second: Any) -> Any:
    """Two nested dicts as one; they have no leaf in common."""
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        raise ValueError("a leaf is both trained and frozen")
    shared = {k: _join(first[k], second[k]) for k in first if k in second}
    return {**first, **second, **shared}


def _matches(path: str, name: str) -> bool:
    """Whether the components of `name` stand side by side in a path.

    Example:
        >>> _matches("mlp/down/kernel", "mlp/down"), _matches("mlp/down/kernel", "own")
        (True, False)
    """
    return f"/{name.strip('/')}/" in f"/{path}/"
