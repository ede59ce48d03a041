"""The cost of a run on an accelerator that is not present: memory, FLOPs, traffic, time.

python -m train.plan tofu-npo-llama3-8b --topology v5e:8x8
python -m train.plan llama-1b --topology v5e:4x4
python -m train.plan sst2-opt-13b --topology v5e:4x4 --length 256
python -m train.plan sd14 --topology v5e:2x2 --programs train attack sample decode
python -m train.plan PRESET --topology KIND:SHAPE [any option of the preset's program] [--json]

The programs of the run are compiled ahead of time for the slice; no TPU and no weights are needed.
Kinds: v4, v5e, v5p, v6e, tpu7x (pip install -e '.[tpu]'); cpu:8; gpu:8 (GPUs that are present).
"""

from __future__ import annotations

import json
import math
import re
import time
from typing import Any

from jaxlib_unlearn.errors import UserError
from train.costs.topology import GIB, Topology, check_topology, find_topology
from train.options import cli
from train.runtime import suggest

# The share of a collective's bytes that a chip of a group of n sends over its links.
WIRE = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
}


def main(argv: list[str]) -> None:
    """The program."""
    from train.planning.planned import PLANNERS

    presets = {preset: row for row in PLANNERS.values() for preset in row.presets}
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        for program, row in PLANNERS.items():
            print(f"Presets of {program}: {', '.join(row.presets)}")
        return
    if not argv[0].startswith("-"):
        suggest.choose(argv[0], presets, "preset")
    row = presets.get(argv[0], PLANNERS["train.unlearn"])
    config = row.read(argv, row.config, "train.plan")
    check(config)
    found = plan(config, say=None if config.json else lambda text: print(text, flush=True))
    print(json.dumps(found, indent=1) if config.json else table(found))


def check(config: Any) -> None:
    """Raise `UserError` for wrong options, before any device is looked for."""
    from train.planning.planned import planner_of

    if not config.topology:
        raise UserError("give --topology, a TPU slice such as v5e:8x8, or cpu:8")
    check_topology(config.topology)
    planner_of(config).check(config)


def plan(config: Any, say: Any = None) -> dict[str, Any]:
    """Compile the programs of a run for a slice and compute their costs.

    Args:
        config: the run and the slice (`costs.planned`).
        say: a function that is called with a line before each compilation; None: silent.

    Returns:
        Plain values: the costs of the first program (the training step, if planned) at the top, and
        the costs of all under `programs`.

    Raises:
        UserError: the slice does not exist, or the run cannot use it.
    """
    from train.planning.planned import planner_of

    topology = find_topology(config.topology)
    planned, mesh = planner_of(config).planned(config, list(topology.devices))
    done = {}
    for program in planned.programs:
        if say is not None:
            say(f"compiling {program.name} for {topology.name}: {program.unit}")
        done[program.name] = account(program, topology, mesh.size)
    if "train" in done:
        done["train"] |= optimizer_work(planned.update(), mesh, done["train"])
    first = next(iter(done.values()))
    return {
        "preset": config.preset,
        "model": planned.model,
        "optimizer": config.optimizer.name,
        "topology": topology.name,
        "chips": topology.chips,
        "devices": len(topology.devices),
        "mesh": dict(mesh.shape),
        "hbm_bytes_per_chip": topology.chip.hbm_bytes,
        **first,
        "fits": all(p["fits"] for p in done.values()),
        "knobs": planned.knobs(done),
        "forward": planned.forward(),
        "programs": done,
    }


def account(program: Any, topology: Topology, devices: int) -> dict[str, Any]:
    """Compile one program and sum up the memory, work and communication of a chip."""
    from train.costs import collectives, flops, hlo, hlo_flops
    from train.engine.loop import step_bytes
    from train.engine.step import OPTIMIZER_SCOPE

    per_chip = len(topology.devices) // topology.chips
    room = topology.hbm_bytes_per_device
    start = time.monotonic()
    traced = program.call.trace(*program.args, **program.static)
    # Counted for the whole mesh; each device does its part.
    platform = topology.devices[0].platform
    asked = flops.count_jaxpr(traced.jaxpr, platform=platform).flops / devices
    result: dict[str, Any] = {"unit": program.unit}
    try:
        compiled = traced.lower().compile()
    except Exception as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        # The compiler gave up: there is no program to analyse, but the error gives its memory.
        arguments = argument_bytes(program.args)
        temporaries = max(0, needed - arguments) if needed > arguments else needed
        return result | {
            "compiled": False,
            "compile_seconds": round(time.monotonic() - start, 1),
            "argument_bytes": arguments * per_chip,
            "temp_bytes": temporaries * per_chip,
            "peak_bytes": (arguments + temporaries) * per_chip,
            "flops_per_chip": asked * per_chip,
            "asked_flops_per_chip": asked * per_chip,
            "optimizer_flops_per_chip": None,
            "hbm_traffic_bytes": None,
            "collectives": {},
            "roofline_seconds": {"compute": None, "hbm": None, "interconnect": None},
            "fits": False,
        }
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    parsed = hlo.parse(compiled)
    done = hlo_flops.device_flops(parsed)
    scoped = hlo_flops.device_flops(parsed, OPTIMIZER_SCOPE).flops
    found = collectives.collectives(parsed)
    peak = step_bytes(compiled) or 0
    traffic = hlo_flops.device_bytes(parsed)
    update = [c for c in found if OPTIMIZER_SCOPE in c.scope.split("/")]

    def by_kind(some: list[Any]) -> dict[str, dict[str, int]]:
        total = collectives.summary(some).items()
        return {kind: {"count": n, "bytes": size * per_chip} for kind, (n, size) in total}

    return result | {
        "compiled": True,
        "compile_seconds": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes * per_chip,
        "temp_bytes": memory.temp_size_in_bytes * per_chip,
        "peak_bytes": peak * per_chip,
        "flops_per_chip": done.flops * per_chip,
        "asked_flops_per_chip": asked * per_chip,
        "optimizer_flops_per_chip": scoped * per_chip,
        "hbm_traffic_bytes": traffic * per_chip,
        "collectives": by_kind(found),
        "optimizer_collectives": by_kind(update),
        "roofline_seconds": roofline(topology, done.flops, traffic, found, per_chip),
        "fits": peak <= room,
    }


def optimizer_work(made: Any, mesh: Any, step: dict[str, Any]) -> dict[str, Any]:
    """The FLOPs of the update: as compiled, or, if compilation failed, as counted by the jaxpr.

    `made` is the update and its shapes; None: it evaluates the loss.
    """
    from train.costs import flops

    if made is None:
        return {"optimizer_flops_per_chip": step["optimizer_flops_per_chip"] or 0}
    platform = mesh.devices.flat[0].platform
    asked = flops.count(made[0], *made[1], platform=platform).flops / mesh.size
    compiled = step["optimizer_flops_per_chip"]
    return {
        "optimizer_flops_per_chip": asked if compiled is None else compiled,
        "asked_optimizer_flops_per_chip": asked,
    }


def roofline(
    topology: Topology, flops: int, traffic: int, found: list[Any], per_chip: int
) -> dict[str, float | None]:
    """Seconds that each resource of a chip needs by itself; None: its speed is not known."""
    chip = topology.chip
    wire = 0.0
    for c in found:
        n = len(c.groups[0]) if c.groups else len(topology.devices)
        wire += c.times * c.bytes * (WIRE[c.kind](n) if c.kind in WIRE else 1.0)

    def at(amount: float, speed: float | None) -> float | None:
        return None if speed is None else amount * per_chip / speed

    return {
        "compute": at(flops, chip.flops),
        "hbm": at(traffic, chip.hbm_bandwidth),
        "interconnect": at(wire, chip.ici_bandwidth),
    }


_NEEDED = (
    re.compile(r"memory required for HLO temporaries \(([\d.]+)([KMG])\)"),
    re.compile(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm"),
    re.compile(r"[Aa]ttempting to (?:allocate|reserve) ([\d.]+)([KMG])"),
)


def needed_bytes(message: str) -> int | None:
    """The bytes that a compiler's out-of-memory message asks for; None if it gives no number.

    Example:
        >>> needed_bytes("Used 19.5G of 15.75G hbm. Exceeded hbm capacity by 3.75G") / 2**30
        19.5
    """
    for pattern in _NEEDED:
        if match := pattern.search(message):
            return int(float(match[1]) * 1024 ** ("KMG".index(match[2]) + 1))
    return None


def argument_bytes(args: Any) -> int:
    """Bytes of a program's arguments on one device."""
    import jax

    total = 0
    for leaf in jax.tree.leaves(args):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
            total += math.prod(shape) * getattr(leaf.dtype, "itemsize", 4)
    return total


def table(found: dict[str, Any]) -> str:
    """A plan as lines for a terminal."""
    mesh = " x ".join(f"{name} {n}" for name, n in found["mesh"].items())
    lines = [
        f"{found['preset']}: {found['model']}, {found['optimizer']}, on {found['topology']} "
        f"({found['chips']} chips, mesh {mesh}, {found['hbm_bytes_per_chip'] / GIB:.2f} GiB each)",
    ]
    for name, p in found["programs"].items():
        verdict = "fits" if p["fits"] else "DOES NOT FIT"
        spare = (found["hbm_bytes_per_chip"] - p["peak_bytes"]) / GIB
        lines += [
            "",
            f"{name}: {p['unit']}; compiled in {p['compile_seconds']} s",
            f"  memory a chip   {p['peak_bytes'] / GIB:8.2f} GiB  ({p['argument_bytes'] / GIB:.2f} "
            f"arguments, {p['temp_bytes'] / GIB:.2f} temporaries): {verdict}, "
            f"{abs(spare):.2f} GiB {'to spare' if spare >= 0 else 'too much'}",
            f"  products        {p['flops_per_chip'] / 1e12:8.2f} TFLOP a chip"
            + _optimizer(p)
            + _repeated(p),
        ]
        for kind, c in p["collectives"].items():
            lines.append(f"  {kind:15} {c['bytes'] / GIB:8.2f} GiB a chip in {c['count']} calls")
        times = {k: v for k, v in p["roofline_seconds"].items() if v is not None}
        if times:
            slowest = max(times, key=lambda k: times[k])
            lines.append(
                "  at best         "
                + ", ".join(f"{k} {v:.3f} s" for k, v in times.items())
                + f": bound by {slowest}"
            )
    for i, (name, work) in enumerate(found["forward"].items()):
        lines += [""] * (i == 0) + [_forward(name, work)]
    if found["knobs"]:
        lines += ["", "left to turn: " + "; ".join(found["knobs"])]
    return "\n".join(lines)


def _forward(name: str, work: dict[str, Any]) -> str:
    """The work of a part of the model, beside another count of it."""
    line = f"{name}, one row forward: {work['flops'] / 1e9:.0f} GFLOP"
    if work["counted"] is None:
        return line
    off = work["flops"] / work["counted"] - 1
    return (
        f"{line} ({off:+.1%} of the {work['counted'] / 1e9:.0f} that XLA counts, without padding)"
    )


def _optimizer(p: dict[str, Any]) -> str:
    spent = p.get("optimizer_flops_per_chip")
    evaluates = "asked_optimizer_flops_per_chip" not in p
    what = "the update and the losses it asks for" if evaluates else "the update"
    return f", {spent / 1e12:.2f} of them {what}" if spent else ""


def _repeated(p: dict[str, Any]) -> str:
    """The share of work that is repeated on several chips, if it exceeds 5 %."""
    more = p["flops_per_chip"] / p["asked_flops_per_chip"] - 1 if p["asked_flops_per_chip"] else 0
    return f" ({more:.0%} repeated on several chips)" if more > 0.05 else ""


if __name__ == "__main__":
    cli.main(main)


__all__ = ["account", "check", "main", "plan", "table"]
