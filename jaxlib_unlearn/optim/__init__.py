"""How a step is taken: Optax transformations for the matrices of a model.

``scale_by_x`` is the bare direction (chain it yourself); ``x(learning_rate, ...)`` is the whole
optimizer. ``matrices`` decides which leaves are matrices, ``orthogonalize`` builds polar factors.
"""

from jaxlib_unlearn.optim import matrices, orthogonalize
from jaxlib_unlearn.optim.muon import MUON_STATIC_ARGS, MuonState, muon, scale_by_muon

__all__ = [
    "MUON_STATIC_ARGS",
    "MuonState",
    "matrices",
    "muon",
    "orthogonalize",
    "scale_by_muon",
]
