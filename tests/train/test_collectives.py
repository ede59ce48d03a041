"""Collectives of programs whose traffic is known by construction, and of handwritten texts."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from train.costs.collectives import Collective, collectives, summary

on_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

ROWS = tuple((2 * i, 2 * i + 1) for i in range(4))
COLUMNS = ((0, 2, 4, 6), (1, 3, 5, 7))
GROUPS = {"a": COLUMNS, "b": ROWS}


def compiled(fn, shape, in_spec, out_spec):
    """`fn` on the shards of one float32 array over a (4, 2) mesh with axes a and b."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()


# What one device of (4, 2) holds of a (16, 32) array, in bytes.
WHOLE = 16 * 32 * 4
CASES = {
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x, "b", 1, 0, tiled=True),
        (P("b"), P(None, "b")),
        WHOLE // 2,
        "b",
    ),
    "all-gather": (
        lambda x: jax.lax.all_gather(x, "a", tiled=True),
        (P("a"), P()),
        WHOLE,
        "a",
    ),
    "reduce-scatter": (
        lambda x: jax.lax.psum_scatter(x, "b", tiled=True),
        (P(), P("b")),
        WHOLE,
        "b",
    ),
    "all-reduce": (lambda x: jax.lax.psum(x, "a"), (P("a"), P()), WHOLE // 4, "a"),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "a", [(0, 1), (1, 2), (2, 3), (3, 0)]),
        (P("a"), P("a")),
        WHOLE // 4,
        None,
    ),
}


@on_devices
@pytest.mark.parametrize("kind", CASES)
def test_kind_bytes_and_groups(kind):
    fn, specs, size, axis = CASES[kind]
    groups = GROUPS[axis] if axis else ()
    (found,) = collectives(compiled(fn, (16, 32), *specs))
    assert found._replace(scope="") == Collective(kind, size, 1, False, True, groups)
    assert "shard_map" in found.scope.split("/")


def loops(x):
    """A psum that runs 3 x 7 times, another 5 times, and one outside of loops."""

    def inner(c, _):
        return jnp.sin(jax.lax.psum(c, "a")), None

    def outer(c, _):
        return jnp.cos(jax.lax.scan(inner, c, length=7)[0]), None

    x = jax.lax.scan(outer, x, length=3)[0]
    x = jax.lax.fori_loop(0, 5, lambda i, c: jnp.tan(jax.lax.psum(c, "b")), x)
    return jax.lax.psum(x, ("a", "b"))


@on_devices
@pytest.mark.parametrize("noted", [True, False], ids=["trip counts noted", "read off conditions"])
def test_loops_count_by_their_trips(noted):
    text = compiled(loops, (16, 32), P("a"), P()).as_text()
    if not noted:  # as in programs for TPUs
        text, count = re.subn(r',?"known_trip_count":\{"n":"\d+"\}', "", text)
        assert count == 3
    found = sorted(collectives(text), key=lambda c: -c.times)
    size = WHOLE // 4
    assert [(c.kind, c.bytes, c.times, c.in_loop, c.known) for c in found] == [
        ("all-reduce", size, 21, True, True),
        ("all-reduce", size, 5, True, True),
        ("all-reduce", size, 1, False, True),
    ]
    assert summary(found) == {"all-reduce": (27, 27 * size)}


@on_devices
def test_a_loop_that_the_data_ends():
    def fn(x):
        return jax.lax.while_loop(
            lambda c: jax.lax.psum(jnp.sum(c), ("a", "b")) > 1,
            lambda c: 0.5 * jax.lax.psum(c, "a"),
            x,
        )

    found = collectives(compiled(fn, (16, 32), P("a"), P("a")))
    # The condition's own collective is inside the loop as well.
    assert sorted((c.bytes, c.times, c.in_loop, c.known) for c in found) == [
        (4, 1, True, False),
        (WHOLE // 4, 1, True, False),
    ]


@on_devices
def test_branches_are_all_counted():
    def fn(x):
        return jax.lax.cond(
            jax.lax.axis_index("a") >= 0,
            lambda x: jax.lax.psum(x, "b"),
            lambda x: jax.lax.all_to_all(x, "b", 0, 0, tiled=True),
            x,
        )

    found = collectives(compiled(fn, (16, 32), P("a"), P("a")))
    assert sorted(c.kind for c in found) == ["all-reduce", "all-to-all"]
    assert not any(c.in_loop for c in found)


# As accelerators print them: asynchronous pairs, groups as iotas, narrow types.
ASYNC = """\
HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%wrapped (p: bf16[16,8]) -> bf16[16,8] {
  %p = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %a = bf16[16,8]{1,0:T(8,128)(2,1)} all-to-all(%p), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

ENTRY %main (q: bf16[16,8], t: f8e4m3fn[3], b: pred[5]) -> bf16[16,8] {
  %q = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  %t = f8e4m3fn[3]{0} parameter(1)
  %b = pred[5]{0} parameter(2)
  %g = (bf16[16,8]{1,0}, bf16[64,8]{1,0:T(8,128)(2,1)}) all-gather-start(%q), replica_groups=[2,4]<=[8], dimensions={0}
  %gd = bf16[64,8]{1,0} all-gather-done(%g)
  %r = (f8e4m3fn[3]{0}, pred[5]{0}) all-reduce-start(%t, %b), replica_groups={}, to_apply=%add
  %rd = (f8e4m3fn[3]{0}, pred[5]{0}) all-reduce-done(%r)
  %s = ((bf16[16,8]{1,0}), bf16[16,8]{1,0}, u32[]) async-start(%q), calls=%wrapped
  ROOT %d = bf16[16,8]{1,0} async-done(%s), calls=%wrapped
}
"""  # noqa: E501


def test_asynchronous_text():
    assert collectives(ASYNC) == [
        Collective("all-gather", 64 * 8 * 2, 1, False, True, ((0, 1, 2, 3), (4, 5, 6, 7))),
        Collective("all-reduce", 3 + 5, 1, False, True, ()),
        Collective("all-to-all", 16 * 8 * 2, 1, False, True, COLUMNS),
    ]


@pytest.mark.parametrize(
    "text, groups",
    [
        ("mesh['a'=4,'b'=2] {'a'}", COLUMNS),
        ("mesh['x'=2,'y'=4,'z'=1], device_ids=([4,2]T(1,0)) {'x'}", ROWS),
        ("mesh['a'=4,'b'=2] {'a','b'}", (tuple(range(8)),)),
    ],
)
def test_groups_as_axes_of_a_mesh(text, groups):
    program = (
        "ENTRY %main (q: f32[8]) -> f32[8] {\n  %q = f32[8]{0} parameter(0)\n"
        f"  ROOT %a = f32[8]{{0}} all-to-all(%q), replica_groups={text}, dimensions={{0}}\n}}\n"
    )
    assert collectives(program) == [Collective("all-to-all", 32, 1, False, True, groups)]


def test_text_of_something_else():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("module @jit_f {\n}\n")
