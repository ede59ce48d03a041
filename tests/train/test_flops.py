"""The count against closed forms, and its report of work that has none."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxlib_unlearn.optim import orthogonalize
from models.decoder.model import REMAT, Decoder, DecoderConfig
from train.costs.flops import Count, count, flops


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


@jax.custom_vjp
def cubed(x):
    return x @ x @ x


cubed.defvjp(lambda x: (x @ x @ x, x), lambda x, g: (g @ x @ x,))


@jax.custom_jvp
def squared(x):
    return x @ x


squared.defjvp(lambda primals, tangents: (squared(*primals), primals[0] @ tangents[0]))

SQUARE = 2 * 4**3  # a product of two (4, 4)
CASES = {
    "matmul": (jnp.matmul, [shape(3, 5), shape(5, 7)], 2 * 3 * 5 * 7),
    "vector": (jnp.vdot, [shape(9), shape(9)], 2 * 9),
    "batched": (jnp.matmul, [shape(2, 6, 3, 5), shape(2, 6, 5, 7)], 2 * 12 * 3 * 5 * 7),
    "vmapped": (jax.vmap(jnp.matmul), [shape(6, 3, 5), shape(6, 5, 7)], 2 * 6 * 3 * 5 * 7),
    "two axes contracted": (
        lambda x, y: jnp.einsum("aijk,jkb->aib", x, y),
        [shape(2, 3, 4, 5), shape(4, 5, 6)],
        2 * (2 * 3 * 6) * (4 * 5),
    ),
    "complex": (jnp.matmul, [shape(3, 5, dtype=jnp.complex64)] * 1 + [shape(5, 7)], 8 * 3 * 5 * 7),
    "element-wise": (lambda x: jnp.sin(x) + x**2, [shape(8, 8)], 0),
    "jit": (jax.jit(jnp.matmul), [shape(4, 4)] * 2, SQUARE),
    "scan": (
        lambda x, ws: jax.lax.scan(lambda h, w: (h @ w, None), x, ws)[0],
        [shape(2, 4), shape(7, 4, 4)],
        7 * 2 * 2 * 4 * 4,
    ),
    "scan in scan": (
        lambda x: jax.lax.fori_loop(
            0, 3, lambda _, y: jax.lax.fori_loop(0, 5, lambda _, z: z @ z, y), x
        ),
        [shape(4, 4)],
        15 * SQUARE,
    ),
    "map in blocks": (
        lambda xs: jax.lax.map(lambda x: x @ x, xs, batch_size=3),
        [shape(8, 4, 4)],
        8 * SQUARE,
    ),
    "remat": (jax.checkpoint(lambda x: x @ x), [shape(4, 4)], SQUARE),
    "custom_vjp": (cubed, [shape(4, 4)], 2 * SQUARE),
    "custom_vjp with backward": (
        jax.value_and_grad(lambda x: cubed(x).sum()), [shape(4, 4)], 4 * SQUARE
    ),
    # Its value is not used, and its backward pass does not need it.
    "custom_vjp backward": (jax.grad(lambda x: cubed(x).sum()), [shape(4, 4)], 2 * SQUARE),
    "custom_jvp": (squared, [shape(4, 4)], SQUARE),
    "convolution": (
        lambda x, k: jax.lax.conv_general_dilated(x, k, (2, 2), "VALID"),
        [shape(3, 4, 9, 9), shape(8, 4, 3, 3)],
        2 * (3 * 8 * 4 * 4) * (4 * 3 * 3),
    ),
    "depthwise": (
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1,), "SAME", feature_group_count=4),
        [shape(3, 4, 10), shape(4, 1, 3)],
        2 * (3 * 4 * 10) * 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_closed_forms(name):
    fn, args, want = CASES[name]
    assert count(fn, *args) == Count(want, 0, {})
    assert flops(fn, *args) == want


def test_branches():
    def choose(p, x):
        return jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x)

    args = shape(dtype=jnp.bool_), shape(4, 4)
    assert flops(choose, *args) == flops(choose, *args, branches="max") == 2 * SQUARE
    assert flops(choose, *args, branches="min") == SQUARE
    with pytest.raises(ValueError, match="'both'"):
        flops(choose, *args, branches="both")


def test_switch_of_decompositions():
    """No branch has products: the one with the most decompositions counts."""

    def choose(i, x):
        return jax.lax.switch(i, [lambda x: x, lambda x: jnp.linalg.svd(x)[0], lambda x: -x], x)

    args = shape(dtype=jnp.int32), shape(5, 4, 4)
    assert count(choose, *args) == Count(0, 0, {"svd": 5})
    assert count(choose, *args, branches="min") == Count(0, 0, {})


def test_unknown_trip_counts_are_said():
    def until_small(x):
        return jax.lax.while_loop(lambda y: jnp.sum(y @ y) > 1, lambda y: 0.5 * y @ y, x)

    assert count(until_small, shape(4, 4)) == Count(2 * SQUARE, 1, {})
    repeated = count(lambda x: jax.lax.scan(lambda c, _: (until_small(c), None), x, length=3)[0],
                     shape(4, 4))  # fmt: skip
    assert repeated == Count(6 * SQUARE, 1, {})
    no_products = count(lambda x: jax.lax.while_loop(lambda y: y > 1, lambda y: y / 2, x), 9.0)
    assert no_products == Count(0, 0, {})


def test_decompositions_are_named():
    def fn(xs):
        return jax.lax.map(lambda x: jnp.linalg.qr(x @ x)[0] + jnp.linalg.svd(x)[0], xs)

    assert count(fn, shape(3, 2, 4, 4)) == Count(3 * 2 * SQUARE, 0, {"qr": 6, "svd": 6})


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_shard_map_counts_all_devices():
    """(8, 4) @ (4, 4) in four shards of two rows, done by both halves of the other axis."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("a")

    def over(names):
        return jax.shard_map(
            jnp.matmul,
            mesh=mesh,
            in_specs=(spec, jax.sharding.PartitionSpec()),
            out_specs=spec,
            axis_names=names,
        )

    args = shape(8, 4), shape(4, 4)
    assert flops(over({"a", "b"}), *args) == 2 * 8 * 4 * 4 * 2
    assert flops(over({"a"}), *args) == 2 * 8 * 4 * 4


CONFIG = DecoderConfig(64, 16, 48, 5, 4, 2, 4)
BATCH, LENGTH = 3, 10


def block_flops():
    """A block's forward: q, k, v, o, gate, up, down; scores and mixing of the values."""
    c = CONFIG
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    weights = c.hidden_size * (2 * q + 2 * kv) + 3 * c.hidden_size * c.intermediate_size
    return 2 * BATCH * LENGTH * (weights + 2 * q * LENGTH)


@pytest.mark.parametrize("layers", [5, 40])
def test_decoder_forward(layers):
    decoder = Decoder(DecoderConfig(64, 16, 48, layers, 4, 2, 4))
    tokens = shape(BATCH, LENGTH, dtype=jnp.int32)
    rotary = flops(lambda p, t: decoder.forward(p, t, depth=0)[0], decoder.shapes(), tokens)
    got = flops(lambda p, t: decoder.forward(p, t)[0], decoder.shapes(), tokens)
    assert rotary < 0.01 * block_flops()
    assert got - rotary == layers * block_flops()


@pytest.mark.parametrize("remat", REMAT)
def test_decoder_gradient(remat):
    """Two products backward for each one forward, plus the products that the policy recomputes."""
    decoder = Decoder(CONFIG, remat=remat)
    tokens = shape(BATCH, LENGTH, dtype=jnp.int32)

    def loss(params, tokens):
        return jnp.sum(decoder.forward(params, tokens)[0] ** 2)

    back = flops(jax.grad(loss), decoder.shapes(), tokens)
    blocks = CONFIG.num_layers * block_flops()
    # The result of the last product in a block's recomputation is not needed.
    unused = CONFIG.num_layers * 2 * BATCH * LENGTH * CONFIG.hidden_size * CONFIG.intermediate_size
    width = CONFIG.num_heads * CONFIG.head_dim
    attention = CONFIG.num_layers * 2 * BATCH * LENGTH * 2 * width * LENGTH  # scores and mixing
    again = {"none": 0, "dots": attention, "full": blocks - unused}
    rotary = flops(lambda p, t: decoder.forward(p, t, depth=0)[0], decoder.shapes(), tokens)
    assert back - rotary == 3 * blocks + again[remat]


@pytest.mark.parametrize("r, c", [(8, 24), (24, 8), (16, 16)])
def test_newton_schulz(r, c):
    small, large = sorted((r, c))
    want = 5 * (4 * small**2 * large + 2 * small**3)
    stack = functools.partial(flops, orthogonalize.newton_schulz())
    for platform in ("tpu", "gpu"):
        assert stack(shape(r, c), platform=platform) == want
        assert stack(shape(12, r, c), platform=platform) == 12 * want
    # CPUs use the Gram matrix where that costs less.
    here = want if small == large else 28 * small**3 + 8 * small**2 * large
    assert stack(shape(r, c), platform="cpu") == here
    assert stack(shape(12, r, c), platform="cpu") == 12 * here


def test_a_choice_by_platform_is_no_condition():
    def fn(x):
        return jax.lax.platform_dependent(
            x, cpu=lambda x: x @ x, cuda=lambda x: x @ x @ x, default=lambda x: x
        )

    x = shape(8, 8)
    found = {name: flops(fn, x, platform=name) for name in ("cpu", "gpu", "tpu")}
    assert found == {"cpu": 2 * 8**3, "gpu": 4 * 8**3, "tpu": 0}
    assert flops(fn, x) == found["cpu"]


def test_gram_newton_schulz():
    """As in its docstring: 28 r^3 + 8 r^2 c (the last step's Gram matrix is not computed)."""
    r, c = 8, 24
    assert flops(orthogonalize.gram_newton_schulz(), shape(r, c)) == 28 * r**3 + 8 * r**2 * c
