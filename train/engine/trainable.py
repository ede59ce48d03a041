"""The trained tree of a stage: all parameters, adapters beside them, or chosen leaves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxlib_unlearn.objectives import Objective
from models.decoder import lora, selection
from models.decoder.labels import head_of
from train.data.references import needs_head
from train.engine.step import ALL, Binding
from train.options.checks import refuse_both
from train.options.config import LoraConfig, SelectConfig
from train.runtime import residency, sharding


class Trainable(NamedTuple):
    """The trained tree of a stage, its frozen arrays, and the binding of the two.

    Args:
        start: the trained tree at the start; optimizers see nothing else.
        frozen: the arrays that a step reads and never writes: they are not donated.
        binding: the functions by which the two form models.
        view: `trainable -> params` for evaluation during training; needs no layer map.
        finish: `trainable -> params`, the plain parameters of the trained model.
    """

    start: Any
    frozen: Any
    binding: Binding
    view: Callable[[Any], Any]
    finish: Callable[[Any], Any]


def trainable_of(
    params: Any,
    row: Objective,
    adapters: LoraConfig | None = None,
    select: SelectConfig | None = None,
    *,
    seed: int = 0,
    dtype: Any = None,
    mesh: Any = None,
) -> Trainable:
    """The trained tree of a stage, made from a model.

    Of a model in host memory only what a step reads is brought to the device: the model and the
    copy that is trained are never there together. A fork needs both. Shapes in place of arrays give
    shapes.

    Args:
        params: the parameters of the model (arrays or shapes).
        row: the objective, whose references are kept beside what is trained.
        adapters: low-rank adapters in the place of the parameters.
        select: leaves chosen by name and by block.
        seed: the seed from which the adapters are drawn.
        dtype: the dtype of the computation.
        mesh: the devices, for what is cut out; None: left to the compiler.

    Raises:
        UserError: a name or a block that the model does not have; adapters and chosen leaves.
    """
    forked = "fork" in row.reference.values()
    if adapters is not None and adapters.rank is not None:
        refuse_both(adapters, select)
        return _adapters(params, adapters, forked, seed)
    if select is not None and select.given:
        return _selected(params, select, row, dtype, mesh)
    frozen = None
    if forked:
        frozen = residency.to_device(params)
    elif needs_head(row):
        frozen = residency.to_device(head_of(params))
    binding = Binding(fork=_itself, key="fork") if forked else ALL
    return Trainable(params, frozen, binding, _itself, _itself)


def _itself(tree: Any) -> Any:
    return tree


def _adapters(params: Any, adapters: LoraConfig, forked: bool, seed: int) -> Trainable:
    params = residency.to_device(params)
    scale = adapters.scale

    def draw() -> Any:
        return lora.init(params, adapters.rank or 1, adapters.targets, seed)

    shapes = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
    return Trainable(
        jax.eval_shape(draw) if shapes else draw(),
        params,
        Binding(functools.partial(lora.bind, scale=scale), _itself if forked else None),
        lambda trainable: lora.view(trainable, params, scale=scale),
        lambda trainable: lora.merge(trainable, params, scale=scale),
    )


def _selected(
    params: Any, select: SelectConfig, row: Objective, dtype: Any, mesh: Any
) -> Trainable:
    forked = "fork" in row.reference.values()
    chosen = selection.select(params, select.leaves, select.blocks)
    start, rest = selection.split(params, chosen, functools.partial(_cut, mesh=mesh))
    whole = functools.partial(selection.bind, chosen=chosen, dtype=dtype)
    head = None
    if needs_head(row):  # the frozen head unembeds cached hidden states
        head = {name: rest.get(name, {}) for name in head_of(params)}
        if any(path.split("/")[0] in head for path in chosen.outer):
            head = residency.to_device(head_of(params))
    binding = Binding(
        lambda trainable, frozen, layer_map=None: whole(trainable, frozen["rest"], layer_map),
        (lambda frozen: selection.view(frozen["start"], frozen["rest"], chosen=chosen))
        if forked
        else None,
        lambda frozen: frozen["head"],
        chosen.train_from,
        (chosen, str(dtype), forked),
    )
    if not forked:  # a copy of the frozen model is trained
        start = residency.to_host(start)
    frozen = {"rest": rest, "head": head, "start": start if forked else None}
    return Trainable(
        start,
        frozen,
        binding,
        lambda trainable: selection.view(trainable, rest, chosen=chosen),
        lambda trainable: residency.to_device(selection.finish(trainable, params, chosen=chosen)),
    )


def _cut(x: Any, path: str, first: int, last: int, mesh: Any = None) -> Any:
    """Layers `first` to `last - 1` of a leaf, on the device, where one leaf at a time is whole."""
    if (first, last) == (0, x.shape[0]):
        return residency.to_device(x)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda x: x[first:last], x)
    shape = (last - first, *x.shape[1:])
    where = None if mesh is None else sharding.sharding_of(path, shape, mesh)
    return jax.jit(lambda x: x[first:last], out_shardings=where)(residency.to_device(x))
