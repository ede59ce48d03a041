r"""Zeroth order: gradients from values of the loss alone, no backward pass.

.. math::
    \hat g = \frac1q \sum_{i<q} c_i Z_i, \qquad
    c_i = \frac{f(\theta + \epsilon Z_i) - f(\theta - \epsilon Z_i)}{2 \epsilon}
    \;\text{or}\; \frac{f(\theta + \epsilon Z_i) - f(\theta)}{\epsilon}
    \;\text{or}\; \langle \nabla f, Z_i \rangle

One engine runs every method: a family (``zeroth_order.perturbations``) draws Z, and a :class:`Rule`
turns the estimate into a direction. Z is regenerated, never stored, and the loss is evaluated at
one perturbed model at a time unless ``query_batch`` asks for more.

Three things to know. The difference of two losses is small: compute the loss in float32 (a bfloat16
loss of 0.7 is rounded by 0.004, which is 4 in the coefficient at eps 1e-3). Nothing is perturbed in
place, so parameters do not drift. A step is often below the spacing of bfloat16 parameters (31 % of
the entries of a 2048 x 2048 matrix change at all): keep float32 master weights.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.arrays import concrete
from jaxlib_unlearn.optim.matrices import Specs
from jaxlib_unlearn.optim.orthogonalize import Orthogonalizer
from jaxlib_unlearn.optim.signatures import AT_LEAST_ONE, Count, Step
from jaxlib_unlearn.optim.zeroth_order import perturbations
from jaxlib_unlearn.optim.zeroth_order.directions import (
    Draws,
    draw_bases,
    layered,
    norm_scales,
    perturbed,
)
from jaxlib_unlearn.optim.zeroth_order.estimate import ESTIMATORS, estimate
from jaxlib_unlearn.optim.zeroth_order.leaves import Layout, Trainable, layout_of
from jaxlib_unlearn.optim.zeroth_order.parts import Part
from jaxlib_unlearn.optim.zeroth_order.perturbations import Factored, Family, Perturbed, wide
from jaxlib_unlearn.optim.zeroth_order.steps import Rule, steps
from jaxlib_unlearn.optim.zeroth_order.whole import whole


class ZOState(NamedTuple):
    """State of every zeroth-order optimizer.

    Args:
        count: The number of steps taken, () int32.
        seed: The seed, () uint32; with ``count`` it determines every draw.
        proj: The arrays that a family keeps for some steps: number -> tree like the parameters,
            None for a leaf without arrays.
        value: The loss of the last step, ().
        coeffs: The coefficients of the last step, ``(q,)``; the seed and the coefficients of all
            steps replay a run.
        moments: The moments: name -> tree like the parameters; empty for most methods.
    """

    count: jax.Array
    seed: jax.Array
    proj: dict[str, Any]
    value: jax.Array
    coeffs: jax.Array
    moments: dict[str, Any]


def zeroth_order(
    learning_rate: optax.ScalarOrSchedule | None,
    family: Family,
    *,
    num_queries: Count = 1,
    eps: Step = 1e-3,
    estimator: str = "central",
    refresh_every: int = 100,
    rule: Rule | None = None,
    reshape_core: Orthogonalizer | None = None,
    reshape_coeffs: Callable[[jax.Array], jax.Array] | None = None,
    aux_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    seed: int = 0,
    query_batch: Annotated[int | None, AT_LEAST_ONE] = None,
    query_axis: str | None = None,
    trainable: Trainable | None = None,
    matrices: Specs = None,
    layout: str = "in_out",
    factored: bool = True,
    rng_impl: str = "threefry2x32",
) -> optax.GradientTransformationExtraArgs:
    r"""The engine: perturb, evaluate, regenerate, step. Every method is a call of it.

    .. math::
        \theta \leftarrow \theta - \eta \left( \mathrm{rule}(\hat g) + \lambda \theta \right)

    ``update(None, state, params, value_fn=f)`` with ``f(params)`` a float32 scalar. Further extra
    arguments: ``layered_value_fn(params, layer_map)`` instead of ``value_fn`` for models that apply
    ``layer_map(layer_params, index)`` inside a scan over stacked layers (then no perturbed copy
    of the stack exists); ``factored_leaves``, the paths of leaves outside the stack that it takes
    as ``perturbations.Factored``; ``value``, the loss at ``params``, if known; ``coeffs`` ``(q,)``,
    to replay a logged step without any evaluation.

    With a family that has ``parts`` and q above 1 the losses take one more keyword, ``part=``, and
    return the loss of that part of the batch (``zeroth_order.parts``).

    Args:
        learning_rate: The learning rate eta, a number or a schedule; None returns the direction
            itself.
        family: The family of random directions.
        num_queries: The number q of directions per step.
        eps: The step epsilon along a direction.
        estimator: The estimator of the coefficients, "forward", "central" or "jvp".
        refresh_every: The number of steps between two draws of the arrays that the family keeps.
        rule: The rule that turns the estimate into a direction; None for the estimate itself.
        reshape_core: A function of matrices applied to the mean core of low-rank families.
        reshape_coeffs: A function of the q coefficients of a step, whose result replaces them.
        aux_learning_rate: The learning rate eta of vectors; None for ``learning_rate``.
        weight_decay: The decoupled weight decay lambda, for matrices whose name does not say norm,
            bias or scale.
        seed: The seed of all draws.
        query_batch: The number of evaluations at a time (activations grow with it); None for one.
        query_axis: The mesh axis over which evaluations are split.
        trainable: A function of a path that says whether the leaf is perturbed and updated; None
            for all leaves.
        matrices: The choice of matrices, ``MuonDimensionNumbers`` for all leaves; None for the
            rules of ``zeroth_order.leaves``.
        layout: The order of a kernel's axes, "in_out" or "out_in".
        factored: True to let ``layer_map`` return low-rank kernels as ``perturbations.Factored``.
        rng_impl: The random bit generator; one that gives other numbers under ``vmap`` is refused.

    Returns:
        A transformation with a :class:`ZOState`.

    Raises:
        ValueError: a bad argument, a masked tree, or a leaf that does not fit.
        TypeError: at ``update``, no ``value_fn``, or one that returns a 16-bit loss.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxlib_unlearn.optim.zeroth_order.perturbations import dense
        >>> tx = zeroth_order(0.1, dense(), estimator="jvp")
        >>> params = {"w": jnp.ones(2)}
        >>> def step(params, state):
        ...     return tx.update(None, state, params, value_fn=lambda p: jnp.sum(p["w"]))
        >>> updates, state = jax.jit(step)(params, tx.init(params))
        >>> float(state.value), state.coeffs.shape
        (2.0, (1,))

    References:
        Malladi et al., arXiv:2305.17333 (seed replay); the families name theirs.
    """
    _check(num_queries, eps, estimator, refresh_every, query_batch, rule, rng_impl)
    _check_family(family, estimator, rule, reshape_core)

    def read(params) -> Layout:
        return layout_of(params, trainable=trainable, matrices=matrices, layout=layout)

    def draw(plan, key):
        return draw_bases(family, plan, key)

    def scale(plan, draws):
        return norm_scales(family, plan, draws, num_queries)

    def move(plan, draws, arrays, query, offset):
        return perturbed(family, plan, draws, arrays, query, offset)

    def take(plan, *args):
        return steps(family, plan, rule, reshape_core, *args)

    # An eager step calls these compiled: one compilation for all steps.
    compiled = [jax.jit(fn, static_argnums=0) for fn in (draw, scale, move, take)]

    def init(params):
        plan = read(params)
        structure = jax.tree.structure(params)
        key = jax.eval_shape(lambda: jax.random.key(0, impl=rng_impl))
        bases = jax.eval_shape(lambda key: draw_bases(family, plan, key), key)
        proj = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), b) for b in bases]

        def start(fill):
            return jax.tree.unflatten(
                structure,
                [
                    jnp.full_like(x, fill, dtype=wide(x.dtype)) if leaf.trainable else None
                    for x, leaf in zip(jax.tree.leaves(params), plan.leaves, strict=True)
                ],
            )

        dtype = _value_dtype(plan)
        return ZOState(
            count=jnp.zeros([], jnp.int32),
            seed=jnp.array(_wrap(seed), jnp.uint32),
            proj=_by_number(structure, proj),
            value=jnp.zeros([], dtype),
            coeffs=jnp.zeros([num_queries], dtype),
            moments={k: start(fill) for k, fill in (rule.moments if rule else {}).items()},
        )

    def update(
        updates,
        state,
        params=None,
        *,
        value_fn=None,
        layered_value_fn=None,
        factored_leaves=(),
        value=None,
        coeffs=None,
        **extra_args,
    ):
        del updates, extra_args
        if params is None:
            raise ValueError("a zeroth-order update needs params: update(None, state, params, ...)")
        if value_fn is None and layered_value_fn is None and coeffs is None:
            raise TypeError(
                "a zeroth-order update needs value_fn (params -> float32 scalar) or "
                "layered_value_fn ((params, layer_map) -> float32 scalar) as a keyword"
            )
        plan = read(params)
        arrays, structure = jax.tree.flatten(params)
        dtype = _value_dtype(plan)
        base = jax.random.key(state.seed, impl=rng_impl)

        def stream(purpose, number):
            return jax.random.fold_in(jax.random.fold_in(base, purpose), number)

        eager = concrete(arrays, state)
        draw_now, scale_now, move_now, take_now = compiled if eager else (draw, scale, move, take)
        draw_all = whole(lambda key: draw_now(plan, key), () if eager else arrays)
        proj = _refresh(
            lambda: draw_all(stream(perturbations.BASIS, state.count // refresh_every)),
            _by_leaf(structure, state.proj),
            state.count % refresh_every == 0,
        )
        moments: list[dict[str, jax.Array]] = [{} for _ in arrays]
        for name, tree in state.moments.items():
            for entry, moment in zip(moments, structure.flatten_up_to(tree), strict=True):
                if moment is not None:
                    entry[name] = moment
        draws = Draws(
            stream(perturbations.QUERY, state.count),
            stream(perturbations.MASK, 0 if family.static_mask else state.count),
            proj,
            moments,
        )
        if family.normalize:
            draws = draws._replace(scales=scale_now(plan, draws))

        curvatures = None
        if coeffs is None:
            # If all queries read a table whole, a copy of the table is cheaper: its factors would
            # add a term of the size of the logits.
            takes = frozenset(factored_leaves) if family.parts else frozenset()
            # Forward mode takes a tangent of the factors, and rows of their own kernels share the
            # product with the kernel: both need the factors.
            thin = Factored if family.parts or estimator == "jvp" else Perturbed
            losses = _losses(value_fn, layered_value_fn, num_queries if family.parts else 1)
            value, coeffs, curvatures = estimate(
                _loss_at(
                    family, plan, structure, move_now, *losses, thin if factored else None, takes
                ),
                num_queries,
                eps,
                estimator=estimator,
                context=(arrays, draws),
                value=value,
                curvature=rule is not None and rule.curvature,
                query_batch=query_batch,
                query_axis=query_axis,
                dtype=dtype,
            )
            if reshape_coeffs is not None:
                coeffs = reshape_coeffs(coeffs)
        elif rule is not None and rule.curvature:
            raise ValueError("coeffs alone cannot replay a step that measures curvatures")
        value = jnp.asarray(jnp.nan if value is None else value, dtype)
        coeffs = jnp.asarray(coeffs).astype(dtype)
        if coeffs.shape != (num_queries,):
            raise ValueError(f"coeffs have shape {coeffs.shape}, num_queries is {num_queries}")

        count = jnp.asarray(optax.safe_increment(state.count))
        rates = [
            rate(state.count) if callable(rate) else rate
            for rate in (
                learning_rate,
                learning_rate if aux_learning_rate is None else aux_learning_rate,
            )
        ]
        results = take_now(plan, draws, arrays, coeffs, curvatures, rates, weight_decay, count)
        new = [results[i][0] if i in results else jnp.zeros_like(x) for i, x in enumerate(arrays)]
        kept = {
            name: jax.tree.unflatten(
                structure,
                [results[i][1][name] if i in results else None for i in range(len(arrays))],
            )
            for name in state.moments
        }
        new_state = ZOState(
            count=count,
            seed=state.seed,
            proj=_by_number(structure, proj),
            value=value,
            coeffs=coeffs,
            moments=kept,
        )
        return jax.tree.unflatten(structure, new), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_zeroth_order(family: Family, **options: Any) -> optax.GradientTransformationExtraArgs:
    """The bare estimate of a family, with the gradient's sign: no learning rate, no decay.

    Args:
        family: The family of random directions.
        options: The options of :func:`zeroth_order`.

    Returns:
        A transformation; chain it with ``optax.scale_by_adam()`` and the like.

    Example:
        >>> import optax
        >>> from jaxlib_unlearn.optim.zeroth_order.perturbations import dense
        >>> tx = optax.chain(scale_by_zeroth_order(dense()), optax.scale_by_learning_rate(0.1))
    """
    return zeroth_order(None, family, **options)


def _by_number(structure: Any, bases: Any) -> dict[str, Any]:
    """Tuples of arrays, one per leaf, as trees like the parameters, which survive ``nnx.State``."""
    return {
        str(i): jax.tree.unflatten(structure, [b[i] if i < len(b) else None for b in bases])
        for i in range(max(map(len, bases)))
    }


def _by_leaf(structure: Any, proj: dict[str, Any]) -> list[Any]:
    """The inverse of `_by_number`."""
    columns = [structure.flatten_up_to(proj[name]) for name in sorted(proj)]
    rows = zip(*columns, strict=True) if columns else [()] * structure.num_leaves
    return [tuple(x for x in row if x is not None) for row in rows]


def _losses(value_fn, layered_value_fn, parts):
    """Both losses with the query, which is the number of a part, as their first argument."""

    def of_part(fn):
        if fn is None:
            return None
        if parts == 1:
            return lambda query, *args: fn(*args)
        return lambda query, *args: fn(*args, part=Part(query, parts))

    return of_part(value_fn), of_part(layered_value_fn)


def _loss_at(family, plan, structure, move, value_fn, layered_value_fn, factored, outer):
    def loss_at(context, query, offset):
        arrays, draws = context
        if layered_value_fn is None:
            if query is not None:
                arrays = move(plan, draws, arrays, query, offset)
            return value_fn(query, jax.tree.unflatten(structure, arrays))
        layer_map = _same_layer
        if query is not None:
            arrays, layer_map = layered(family, plan, draws, arrays, query, offset, factored, outer)
        return layered_value_fn(query, jax.tree.unflatten(structure, arrays), layer_map)

    return loss_at


def _same_layer(layer, index):
    del index
    return layer


def _refresh(draw, kept, now):
    if not jax.tree.leaves(kept):
        return kept
    if concrete(now):
        return draw() if now else kept
    return jax.lax.cond(now, draw, lambda: kept)


def _value_dtype(plan: Layout) -> Any:
    return jnp.result_type(*(wide(leaf.dtype) for leaf in plan.leaves if leaf.trainable))


def _wrap(seed: Any) -> Any:
    return seed % 2**32 if isinstance(seed, int) else seed


def _check(num_queries, eps, estimator, refresh_every, query_batch, rule, rng_impl) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is one of {ESTIMATORS}, got {estimator!r}")
    for name, number in (
        ("num_queries", num_queries),
        ("refresh_every", refresh_every),
        ("query_batch", 1 if query_batch is None else query_batch),
    ):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} is a whole number of at least 1, got {number!r}")
    if isinstance(eps, int | float) and not eps > 0:
        raise ValueError(f"eps is positive, got {eps}")
    if rule is not None and rule.curvature and estimator != "central":
        raise ValueError(f"curvatures need the estimator 'central', got {estimator!r}")
    if rng_impl != "threefry2x32" and not _regenerates(rng_impl):
        raise ValueError(
            f"rng_impl={rng_impl!r} gives other numbers under vmap than alone, so directions could "
            "not be regenerated; use 'threefry2x32'"
        )


def _check_family(family, estimator, rule, reshape_core) -> None:
    if family.parts and estimator == "forward":
        raise ValueError(
            f"{family.name!r} has a loss for every part, and 'forward' differences need each of "
            "them at the parameters: as many evaluations as 'central', which is more exact"
        )
    if not family.linear and (reshape_core is not None or (rule is not None and rule.curvature)):
        raise ValueError(
            f"{family.name!r} is not linear in what it draws, so there is no mean core or square "
            "to reshape; use another family, or neither reshape_core nor curvatures"
        )


def _regenerates(rng_impl: str) -> bool:
    """Whether a key draws the same numbers alone and under vmap."""
    with jax.ensure_compile_time_eval():
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0, impl=rng_impl), i))(
            jnp.arange(2)
        )
        together = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
        alone = jnp.stack([jax.random.normal(keys[i], (4,)) for i in range(2)])
        return bool(jnp.all(together == alone))
