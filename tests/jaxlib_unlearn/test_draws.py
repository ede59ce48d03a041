"""Normal numbers: JAX's own bits, any shape, batch of keys and mesh, in one loop of a program."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn.optim import mezo
from jaxlib_unlearn.optim.draws import drawn_once, normal, threefry
from train.costs import hlo

SHAPES = [(), (1,), (2, 0), (7, 33, 5), (1000,), (3, 1, 129)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 2**31 + 5])
def test_bits_are_those_of_jax(shape, seed):
    key = jax.random.fold_in(jax.random.key(seed), 3)
    want = np.asarray(jax.random.normal(key, shape))
    np.testing.assert_array_equal(normal(key, shape), want)
    np.testing.assert_array_equal(jax.jit(normal, static_argnums=1)(key, shape), want)


def test_known_answers():
    """Those of the authors' implementation (Random123, `kat_vectors`): threefry2x32, 20 rounds."""
    for key, count, want in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ):
        words = (jnp.full((1,), word, jnp.uint32) for word in count)
        found = threefry(jnp.array(key, jnp.uint32), *words)
        assert tuple(int(x[0]) for x in found) == want


def test_a_batch_of_keys():
    keys = jax.random.split(jax.random.key(1), 4)
    got = jax.vmap(lambda key: normal(key, (3, 5)))(keys)
    np.testing.assert_array_equal(got, jnp.stack([jax.random.normal(key, (3, 5)) for key in keys]))


@pytest.mark.parametrize(
    ("impl", "dtype"), [("rbg", jnp.float32), ("threefry2x32", jnp.bfloat16)], ids=str
)
def test_what_is_not_ours_is_left_to_jax(impl, dtype):
    key = jax.random.key(2, impl=impl)
    got = normal(key, (4, 6), dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, jax.random.normal(key, (4, 6), dtype))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_devices_draw_their_own_part(kind):
    """Added to a sharded parameter: the numbers of one device, without communication."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind,) * 2)
    x = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    placed = jax.device_put(x, NamedSharding(mesh, P("fsdp", "tp")))
    key = jax.device_put(jax.random.key(5), NamedSharding(mesh, P()))
    add = jax.jit(lambda key, x: x + 0.5 * normal(key, x.shape)).lower(key, placed).compile()
    got = add(key, placed)
    np.testing.assert_allclose(got, x + 0.5 * jax.random.normal(key, x.shape), atol=1e-6)
    assert got.sharding.is_equivalent_to(placed.sharding, 2)
    assert "all-" not in add.as_text() and "collective" not in add.as_text()


@pytest.mark.fused
def test_no_array_of_numbers_is_kept():
    """On one device a draw is part of the loop that adds it: no temporary of the array's size."""
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = jax.jit(lambda key, x: x + normal(key, x.shape)).lower(key, x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**16
    assert not any(v.line.opcode == "while" for v in hlo.visits(hlo.parse(program)))


def test_what_is_drawn_once_is_the_same_and_an_array_of_its_own():
    """Under vmap, too; and broadcast over tokens it is read, not drawn again for each."""
    args = jax.random.split(jax.random.key(0), 3), jnp.ones((3, 50, 1)), jax.random.key(7)

    def once(key, tokens, step):
        return tokens * drawn_once(lambda: normal(key, (40,)), step)

    def again(key, tokens, step):
        del step
        return tokens * normal(key, (40,))

    shared = (0, 0, None)
    compiled = [jax.jit(jax.vmap(fn, shared)).lower(*args).compile() for fn in (once, again)]
    # Which products and sums XLA contracts differs from loop to loop: the last bit may too.
    np.testing.assert_allclose(*(program(*args) for program in compiled), rtol=3e-7)
    if jax.default_backend() == "cpu":
        assert ["while(" in program.as_text() for program in compiled] == [True, False]


@pytest.mark.fused
def test_a_step_draws_a_vector_once_and_not_for_every_token():
    """No loop with the generator in it gives more numbers than the largest leaf has."""
    block = {"up": {"kernel": jnp.ones((2, 8, 8)), "bias": jnp.ones((2, 8))}}
    params = {"layers": block | {"norm": {"scale": jnp.ones((2, 8))}}, "shift": jnp.ones(8)}
    tokens = jnp.ones((50, 8))

    def loss(params, layer_map):
        def body(x, inputs):
            layer = layer_map(*inputs)
            inner = (x * layer["norm"]["scale"]) @ layer["up"]["kernel"]
            return jax.nn.gelu(inner + layer["up"]["bias"]), None

        x, _ = jax.lax.scan(body, tokens, (params["layers"], jnp.arange(2)))
        return jnp.mean(jnp.square(x + params["shift"]))

    tx = mezo(1e-3)
    step = jax.jit(lambda params, state: tx.update(None, state, params, layered_value_fn=loss))
    program = hlo.parse(step.lower(params, tx.init(params)).compile())
    drawn = {
        math.prod(hlo.shape_of(computation.lines[-1].type))
        for computation in program.computations.values()
        if sum(line.opcode == "xor" for line in computation.lines) > 15  # rounds, not a key
    }
    assert drawn and max(drawn) <= block["up"]["kernel"].size
