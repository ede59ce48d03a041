"""Optimizers as Optax transformations, many of them for the matrices of a model.

``scale_by_x`` is the bare direction (chain it yourself); ``x(learning_rate, ...)`` is the whole
optimizer. The module ``optim.matrices`` decides which leaves are matrices, and
``optim.orthogonalize`` builds polar factors. ``dir(optim)`` lists the transformations and their
helpers; modules are attributes as usual.

- Spectral: ``muon``, ``teon``, with ``post=normuon()`` or ``split={"attn/q/": 9}``.
- Two gradients (``update`` also takes ``constraint_grads``): ``sift``; ``blur``, ``pcgrad`` and
  ``weighted_sum`` in front of any other.
- Zeroth order (``value_fn``): ``mezo``, ``sparse_mezo``, ``lozo``, ``subzero``, ``hizoo``,
  ``subspace_mezo``, ``zo_muon``, ``rada_zo``, ``fzoo``, ``rowwise``.
- Optimizer grade, smoothing (``value_fn``, ``grad_fn``): ``sign_momentum``, ``quantize_updates``,
  ``sophia``; ``sam``, ``randomised_smoothing``; ``alternate``.
- Wrappers: ``accumulate``, ``finite``, ``clip_streams``.

Each is a ``GradientTransformationExtraArgs``. Arguments that ``optax.inject_hyperparams`` must not
trace are in ``STATIC_ARGS[name]``. Random state is a seed and a count: checkpoints are arrays.

Optax's wrappers see ``updates`` alone, which is silently wrong with two gradients: ``MultiSteps``
keeps the last ``constraint_grads`` only (use ``accumulate(tx, k)``), ``apply_if_finite`` lets a NaN
in them pass (use ``finite(tx)``), ``clip_by_global_norm`` clips the primary gradient alone (use
``clip_streams(max_norm, tx)``), and ``partition`` and ``masked`` need
``mask_compatible_extra_args=True`` (``sift`` splits by itself). A combiner or a clip without its
``inner`` before another transformation that takes two gradients raises. Zeroth-order
transformations see the whole model through ``value_fn``: inside ``partition`` or ``masked`` they
raise; choose leaves with ``trainable=``. ``TrainState.apply_gradients`` of linen drops extra
arguments: call ``tx.update`` yourself; ``nnx.Optimizer.update(model, grads, constraint_grads=...)``
passes them on.
"""

import inspect
import types

from jaxlib_unlearn.optim import matrices, orthogonalize
from jaxlib_unlearn.optim.combine import blur, pcgrad, weighted_sum
from jaxlib_unlearn.optim.first_moments import keep_first_moments
from jaxlib_unlearn.optim.hybrid import alternate, ends_on_zeroth_order, round_to_zeroth_order
from jaxlib_unlearn.optim.sharpness import randomised_smoothing, sam
from jaxlib_unlearn.optim.sign import (
    quantize_updates,
    scale_by_sign_momentum,
    sign_momentum,
)
from jaxlib_unlearn.optim.signatures import static_args
from jaxlib_unlearn.optim.sophia import scale_by_sophia, sophia
from jaxlib_unlearn.optim.spectral.muon import MuonState, muon, scale_by_muon
from jaxlib_unlearn.optim.spectral.post import Post, normuon
from jaxlib_unlearn.optim.spectral.sift import scale_by_sift, sift
from jaxlib_unlearn.optim.spectral.sift_direction import SiftState
from jaxlib_unlearn.optim.spectral.splitting import Split
from jaxlib_unlearn.optim.spectral.teon import scale_by_teon, teon
from jaxlib_unlearn.optim.wrappers import accumulate, clip_streams, finite
from jaxlib_unlearn.optim.zeroth_order.bare import (
    scale_by_fzoo,
    scale_by_hizoo,
    scale_by_lozo,
    scale_by_mezo,
    scale_by_rada_zo,
    scale_by_rowwise,
    scale_by_sparse_mezo,
    scale_by_subspace_mezo,
    scale_by_subzero,
)
from jaxlib_unlearn.optim.zeroth_order.engine import ZOState
from jaxlib_unlearn.optim.zeroth_order.methods import (
    fzoo,
    hizoo,
    lozo,
    mezo,
    rada_zo,
    rowwise,
    sparse_mezo,
    subspace_mezo,
    subzero,
)
from jaxlib_unlearn.optim.zeroth_order.zo_muon import scale_by_zo_muon, zo_muon

__all__ = [
    "STATIC_ARGS",
    "MuonState",
    "Post",
    "SiftState",
    "Split",
    "ZOState",
    "accumulate",
    "alternate",
    "blur",
    "clip_streams",
    "ends_on_zeroth_order",
    "finite",
    "fzoo",
    "hizoo",
    "keep_first_moments",
    "lozo",
    "matrices",
    "mezo",
    "muon",
    "normuon",
    "orthogonalize",
    "pcgrad",
    "quantize_updates",
    "rada_zo",
    "randomised_smoothing",
    "round_to_zeroth_order",
    "rowwise",
    "sam",
    "scale_by_fzoo",
    "scale_by_hizoo",
    "scale_by_lozo",
    "scale_by_mezo",
    "scale_by_muon",
    "scale_by_rada_zo",
    "scale_by_rowwise",
    "scale_by_sift",
    "scale_by_sign_momentum",
    "scale_by_sophia",
    "scale_by_sparse_mezo",
    "scale_by_subspace_mezo",
    "scale_by_subzero",
    "scale_by_teon",
    "scale_by_zo_muon",
    "sift",
    "sign_momentum",
    "sophia",
    "sparse_mezo",
    "subspace_mezo",
    "subzero",
    "teon",
    "weighted_sum",
    "zo_muon",
]

STATIC_ARGS: dict[str, tuple[str, ...]] = {
    name: static_args(function)
    for name in __all__
    if inspect.isfunction(function := globals().get(name))
}
"""The arguments that are no arrays, by name of a function.

``optax.inject_hyperparams(optim.muon, static_args=optim.STATIC_ARGS["muon"])`` does not trace them.
"""


def __dir__() -> list[str]:
    return [name for name in __all__ if not isinstance(globals()[name], types.ModuleType)]
