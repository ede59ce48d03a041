"""Plans of large runs, as the table of the README: `make plan` (a quarter of an hour on two cores).

    python tests/bench/plan_table.py [--only WORD]

Every row is one `python -m train.plan ... --json` in a process of its own, for a slice that need
not be present. Rows planned before by the same code are read from `runs/bench/plans/`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "runs" / "bench"
GIB = 2**30

SMALL, LARGE = "tofu-npo-llama3-8b", "tofu-npo-llama3-70b"


def row(preset: str, topology: str, optimizer: str, *more: str) -> tuple[str, ...]:
    args = ("--topology", topology, "--optimizer.name", optimizer, "--programs", "train")
    return (preset, *args, *more)


def scaled(topology: str, chips: int) -> tuple[str, ...]:
    return row(SMALL, topology, "muon", "--unlearn.batch-size", str(chips))


ROWS: dict[str, tuple[str, ...]] = {
    "8B, v5e, AdamW": row(SMALL, "v5e:8x8", "adamw"),
    "8B, v5e, Muon": row(SMALL, "v5e:8x8", "muon"),
    "8B, v5e, SIFT": row(SMALL, "v5e:8x8", "sift"),
    "8B, v5e, optax Muon": row(SMALL, "v5e:8x8", "optax-muon"),
    "8B, v6e, Muon": row(SMALL, "v6e:8x8", "muon"),
    "8B, v6e, optax Muon": row(SMALL, "v6e:8x8", "optax-muon"),
    "70B, v5p, Muon": row(LARGE, "v5p:8x8x8", "muon"),
    "weak scaling, 8 chips": scaled("v5p:2x2x2", 8),
    "weak scaling, 64 chips": scaled("v5p:4x4x4", 64),
    "weak scaling, 256 chips": scaled("v5p:4x8x8", 256),
}


def code_digest() -> str:
    """The digest of the sources that determine what is compiled."""
    digest = hashlib.sha256()
    for folder in ("jaxlib_unlearn", "models", "train"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def plan(args: tuple[str, ...], code: str) -> dict[str, Any]:
    """The JSON of one plan, computed unless it is stored."""
    key = hashlib.sha256(json.dumps([code, *args]).encode()).hexdigest()[:16]
    path = OUT / "plans" / f"{key}.json"
    if not path.exists():
        command = [sys.executable, "-m", "train.plan", *args, "--json"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(done.stdout)
    return json.loads(path.read_text())


def cells(found: dict[str, Any]) -> list[str]:
    """A line of the table."""
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


HEAD = [
    "run", "slice", "optimizer", "arguments GiB", "temporaries GiB", "peak GiB of HBM", "fits",
    "model TFLOP", "update TFLOP", "step / no update", "collectives GiB",
    "compute / HBM / links s", "compile s",
]  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose name has it")
    only = parser.parse_args(argv).only
    code, found = code_digest(), {}
    for name, args in ROWS.items():
        if only in name:
            print(f"planning {name}: {' '.join(args)}", flush=True)
            found[name] = plan(args, code)
    lines = [
        " | ".join(["", *HEAD, ""]).strip(),
        " | ".join(["", *["---"] * len(HEAD), ""]).strip(),
    ]
    lines += [" | ".join(["", name, *cells(f), ""]).strip() for name, f in found.items()]
    text = "\n".join(lines) + "\n"
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "plan.md").write_text(text)
    (OUT / "plan.json").write_text(json.dumps(found, indent=1))
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
