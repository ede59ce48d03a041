"""Effort of compilation: full for long runs, low for a first look on a CPU."""

from __future__ import annotations

from typing import Any

import jax

# XLA's kernels for CPUs without its fusions: slower, and compiled in a third of the time.
QUICK = {"xla_cpu_use_fusion_emitters": False}


def compile_quickly() -> None:
    """Compile in little time from here on, where that takes longer than the few steps of a run.

    It starts the backend, so processes must have joined before. Accelerators are left as they are.
    """
    if jax.default_backend() == "cpu":
        jax.config.update("jax_disable_most_optimizations", True)


def effort() -> str:
    """The effort of compiling from here on, "quickly" or "fully": results differ in last bits."""
    return "quickly" if jax.config.values.get("jax_disable_most_optimizations") else "fully"


def compiled(lowered: Any) -> Any:
    """A lowered program, compiled; quickly after `compile_quickly`.

    Args:
        lowered: The result of `jax.jit(f).lower(...)`.
    """
    if effort() == "quickly":
        try:
            return lowered.compile(compiler_options=QUICK)
        except jax.errors.JaxRuntimeError:  # an XLA without that option
            pass
    return lowered.compile()
