"""Tables of compiled programs, which nothing runs: `plan` (TPU slices), `collectives` (Muon)."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tables import ROOT, Make, Page, Run, Table, head, row, slug

from jaxlib_unlearn.optim.spectral.muon import scale_by_muon
from train.costs.collectives import collectives, summary

GIB = 2**30
SMALL, LARGE = "tofu-npo-llama3-8b", "tofu-npo-llama3-70b"


def planned(preset: str, topology: str, optimizer: str, *more: str) -> tuple[str, ...]:
    args = ("--topology", topology, "--optimizer.name", optimizer, "--programs", "train")
    return (preset, *args, *more, "--json")


def scaled(topology: str, chips: int) -> tuple[str, ...]:
    return planned(SMALL, topology, "muon", "--unlearn.batch-size", str(chips))


PLANS: dict[str, tuple[str, ...]] = {
    "8B, v5e, AdamW": planned(SMALL, "v5e:8x8", "adamw"),
    "8B, v5e, Muon": planned(SMALL, "v5e:8x8", "muon"),
    "8B, v5e, SIFT": planned(SMALL, "v5e:8x8", "sift"),
    "8B, v5e, optax Muon": planned(SMALL, "v5e:8x8", "optax-muon"),
    "8B, v6e, Muon": planned(SMALL, "v6e:8x8", "muon"),
    "8B, v6e, optax Muon": planned(SMALL, "v6e:8x8", "optax-muon"),
    "70B, v5p, Muon": planned(LARGE, "v5p:8x8x8", "muon"),
    "weak scaling, 8 chips": scaled("v5p:2x2x2", 8),
    "weak scaling, 64 chips": scaled("v5p:4x4x4", 64),
    "weak scaling, 256 chips": scaled("v5p:4x8x8", 256),
}
HEAD = (
    "run", "slice", "optimizer", "arguments GiB", "temporaries GiB", "peak GiB of HBM", "fits",
    "model TFLOP", "update TFLOP", "step / no update", "collectives GiB",
    "compute / HBM / links s", "compile s",
)  # fmt: skip


def code_digest() -> str:
    """The digest of the sources that determine what is compiled."""
    digest = hashlib.sha256()
    for folder in ("jaxlib_unlearn", "models", "train"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def start(run: Run, folder: Path, options: Sequence[str]) -> None:
    """Plan in a process of its own, unless the same code did; the plan is what is printed."""
    path = folder / run.name / "plan.json"
    if path.exists():
        return
    words = ["-m", run.program, *run.argv, *options]
    print(f"python {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(done.stdout)


def plan(make: Make, args: argparse.Namespace) -> Page:
    """A line a plan."""
    code, lines = code_digest(), head(*HEAD)
    for name in args.only:
        run = Run("train.plan", f"plans/{slug(name)}-{code}", PLANS[name])
        lines.append(row(name, *cells(make(run))))
    return Page(lines)


def cells(found: dict[str, Any]) -> list[str]:
    """The cells of a plan."""
    step = found["programs"]["train"]
    work, update = step["flops_per_chip"] / 1e12, step["optimizer_flops_per_chip"] / 1e12
    moved = sum(c["bytes"] for c in step["collectives"].values()) / GIB
    times = step["roofline_seconds"]
    known = step["compiled"]
    return [
        found["topology"],
        found["optimizer"],
        f"{step['argument_bytes'] / GIB:.2f}",
        f"{step['temp_bytes'] / GIB:.2f}",
        f"{step['peak_bytes'] / GIB:.2f} of {found['hbm_bytes_per_chip'] / GIB:.2f}",
        "yes" if step["fits"] else "**no**",
        f"{work - update:.1f}",
        f"{update:.2f}" if known else f"at least {update:.2f}",
        f"{work / (work - update):.3f}" if known else "-",
        f"{moved:.1f}" if known else "-",
        " / ".join(f"{times[k]:.2f}" for k in times) if known else "-",
        f"{step['compile_seconds']:.0f}",
    ]


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


def muon_collectives(make: Make, args: argparse.Namespace) -> Page:
    """Our update and Optax's for every layout of 16 square and 16 wide matrices."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    lines = head("parameters", "optimizer", "collectives", "MiB / device", "temporary MiB")
    for layout, (sizes, names, spec) in LAYOUTS.items():
        mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
        for stacked in (False, True):
            for name, tx in {"optax": optax_muon(), "ours": scale_by_muon()}.items():
                program = compiled(tx, tree(stacked, mesh, spec))
                found = collectives(program)
                kinds = ", ".join(f"{n} {kind}" for kind, (n, _) in summary(found).items())
                kinds += " (in a loop)" if any(c.in_loop for c in found) else ""
                size = sum(c.times * c.bytes for c in found) / 2**20
                memory = program.memory_analysis().temp_size_in_bytes / 2**20
                leaves = "2 stacked leaves" if stacked else "32 leaves"
                lines.append(
                    row(f"{leaves}, {layout}", name, kinds, f"{size:.0f}", f"{memory:.0f}")
                )
    return Page(lines)


TABLES = {
    "plan": Table(
        "Plans of large runs on TPU slices that need not be present (a quarter of an hour).",
        plan,
        tuple(PLANS),
        start=start,
        read=lambda folder: json.loads((folder / "plan.json").read_text()),
    ),
    "collectives": Table(
        "Collectives of a Muon update compiled for eight devices, ours against Optax's: MiB that a "
        "device puts in or gets out; collectives in loops count once a trip.",
        muon_collectives,
    ),
}
