"""JAX toolkit for unlearning: losses, objectives, optimizers and metrics.

Subpackages are imported one by one, e.g. ``from jaxlib_unlearn import losses``.
"""

__version__ = "0.1.0"
