"""The numbers that optimizers' rows show of their state, found in the state of a whole chain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn.optim.hybrid import AlternateState
from jaxlib_unlearn.optim.spectral.sift_direction import SiftState
from jaxlib_unlearn.optim.zeroth_order.engine import ZOState
from train.options.optimizers import OPTIMIZERS, build
from train.options.optimizers import options_of as optimizer_of

# A matrix in each of three layers, and a leaf of AdamW.
PARAMS = {
    "layers": {"mlp": {"up": {"kernel": jnp.ones((3, 4, 6))}}},
    "final_norm": {"scale": jnp.ones(4)},
}
COS, FUSED = np.float32([-0.5, 0.0, 0.25]), np.array([True, False, False])
COEFFS = np.float32([3.0])
UP = "layers/mlp/up/kernel"

# Options of the row, fields of its states, and what is shown of them.
ROWS = {
    "sift": (
        {"clip_norm": 1.0},
        {SiftState: {"cos": COS, "fused": FUSED}},
        {f"cos/{UP}": COS, f"fused/{UP}": FUSED},
    ),
    "hizoo": ({}, {ZOState: {"coeffs": COEFFS}}, {"coefficients": COEFFS}),
    "hybrid": (
        {},
        {AlternateState: {"count": np.int32(25)}, ZOState: {"coeffs": COEFFS, "count": 5}},
        {"first_order_steps": 20, "zeroth_order_steps": 5, "coefficients": COEFFS},
    ),
}


def filled(tree, fields):
    """A state whose parts of these types have these values in their fields."""

    def known(x):
        return type(x) in fields

    def put(x):
        if not known(x):
            return x
        inner = {name: filled(part, fields) for name, part in x._asdict().items()}
        for name, value in fields[type(x)].items():
            inner[name] = jax.tree.map(lambda x, v=value: np.full_like(x, v), inner[name])
        return x._replace(**inner)

    return jax.tree.map(put, tree, is_leaf=known)


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.observe])
def test_rows_show_their_state(name):
    options, fields, want = ROWS[name]
    tx = build(optimizer_of(name, **options), 40)[0]
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(tx.init, PARAMS))
    observe = OPTIMIZERS[name].observe
    assert observe is not None
    found = observe(filled(state, fields))
    assert found.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
