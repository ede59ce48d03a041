"""Collectives and bytes of a Muon update on eight devices: ours against `optax.contrib.muon`.

    python tests/bench/collectives_table.py [--output runs/bench]

Compiled for eight virtual CPU devices, nothing runs. 16 matrices 512 x 512 and 16 of 512 x 2048 in
float32, as 32 leaves or as two stacked ones, sharded along their rows, their columns or over a
(4, 2) mesh. MiB are what one device puts into its collectives or gets out of them in one update;
collectives in loops count once per trip.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn.optim.spectral.muon import scale_by_muon
from train.costs.collectives import collectives, summary

REPO = Path(__file__).resolve().parent.parent.parent
LAYERS, D, F = 16, 512, 2048
LAYOUTS = {
    "P('fsdp', None)": ((8,), ("fsdp",), ("fsdp", None)),
    "P(None, 'fsdp')": ((8,), ("fsdp",), (None, "fsdp")),
    "P('fsdp', 'tp')": ((4, 2), ("fsdp", "tp"), ("fsdp", "tp")),
}


def optax_muon() -> optax.GradientTransformation:
    def numbers(params):
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), params)

    return optax.contrib.scale_by_muon(weight_dimension_numbers=numbers)


def tree(stacked: bool, mesh: Mesh, spec: tuple) -> Any:
    lead = (LAYERS,) if stacked else ()

    def leaf(columns):
        sharding = NamedSharding(mesh, P(*(None,) * len(lead), *spec))
        return jax.ShapeDtypeStruct((*lead, D, columns), jnp.float32, sharding=sharding)

    def one():
        return {"square": {"kernel": leaf(D)}, "up": {"kernel": leaf(F)}}

    return one() if stacked else {f"block{i}": one() for i in range(LAYERS)}


def compiled(tx: optax.GradientTransformation, grads: Any) -> Any:
    """The update, with a state that has the layout of the gradients before and after."""
    mesh = jax.tree.leaves(grads)[0].sharding.mesh
    everywhere = NamedSharding(mesh, P())
    like = {x.shape: x.sharding for x in jax.tree.leaves(grads)}
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.get(x.shape, everywhere)),
        jax.eval_shape(tx.init, grads),
    )
    where = jax.tree.map(lambda x: x.sharding, (grads, state))
    return jax.jit(tx.update, out_shardings=where).lower(grads, state).compile()


def rows() -> Iterator[str]:
    """The lines of the table, one by one as they are measured."""
    yield "| parameters | optimizer | collectives | MiB / device | temporary MiB |"
    yield "|---|---|---|---|---|"
    for layout, (sizes, names, spec) in LAYOUTS.items():
        mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
        for stacked in (False, True):
            for name, tx in {"optax": optax_muon(), "ours": scale_by_muon()}.items():
                program = compiled(tx, tree(stacked, mesh, spec))
                found = collectives(program)
                kinds = ", ".join(f"{n} {kind}" for kind, (n, _) in summary(found).items())
                size = sum(c.times * c.bytes for c in found) / 2**20
                memory = program.memory_analysis().temp_size_in_bytes / 2**20
                leaves = "2 stacked leaves" if stacked else "32 leaves"
                loop = " (in a loop)" if any(c.in_loop for c in found) else ""
                yield (
                    f"| {leaves}, {layout} | {name} | {kinds}{loop} | {size:.0f} | {memory:.0f} |"
                )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=REPO / "runs" / "bench")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    found = []
    for row in rows():
        print(row, flush=True)
        found.append(row)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "collectives.md").write_text("\n".join(found) + "\n")


if __name__ == "__main__":
    main()
