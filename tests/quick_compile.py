"""How the programs of the tests are compiled: quickly, and kept where that is safe.

Most of a test's time is XLA's. Tests want its semantics, not its speed: without LLVM's optimiser,
without fused kernels and in few modules a program compiles in a third of the time.

JAX has no public setting for these options of XLA that a test may change, nor for what the cache of
programs keeps, so one private function of JAX is wrapped, here alone. A newer JAX may lack it: then
the tests run as well, slower, keep no program, and say so in their header.
"""

import contextlib
import functools
from typing import Any

import jax

QUICK = jax.config.jax_platforms == "cpu"
FUSIONS = ("xla_cpu_use_fusion_emitters", False)
MODULES = ("xla_cpu_parallel_codegen_split_count", 1)  # XLA makes up to 32 of a program
KEPT = 0.05  # seconds of compilation from which on a program is kept
NEVER = 1e9
CACHE = "jax_persistent_cache_min_compile_time_secs"


class State:
    """What the compilations of this process are told, and how many there were."""

    wrapped = False
    fused = True
    known: tuple[tuple[str, int], ...] = ()  # options that this XLA has
    programs = 0


def install() -> bool:
    """Wrap JAX's function, try it, and take it off again where this JAX has another.

    Returns:
        Whether the wrapper is in place.
    """
    if QUICK:
        State.known = tuple(one for one in (FUSIONS, MODULES) if _compiles(dict([one])))
    try:
        from jax._src import compiler

        real = compiler.get_compile_options
    except (ImportError, AttributeError):
        real = None
    if real is not None:
        compiler.get_compile_options = functools.partial(_options, real)
        count = State.programs
        State.wrapped = _compiles({}) and State.programs > count
        if not State.wrapped:
            compiler.get_compile_options = real
    if not State.wrapped:
        jax.config.update(CACHE, NEVER)
    return State.wrapped


def _compiles(options: dict[str, Any]) -> bool:
    with contextlib.suppress(jax.errors.JaxRuntimeError, AttributeError, TypeError):
        jax.jit(lambda x: x).lower(1.0).compile(compiler_options=options)
        return True
    return False


def _options(real: Any, *args: Any, **options: Any) -> Any:
    """JAX's own, and those that compile quickly.

    Programs that are measured are not kept, nor those of several devices: from the cache, XLA's CPU
    programs run their collectives in any order, one device waits in one all-reduce, another in the
    next, and after 40 s the process is aborted.
    """
    made = real(*args, **options)
    alone = made.num_replicas == made.num_partitions == 1
    mine = [one for one in State.known if one != FUSIONS or not State.fused]
    made.env_option_overrides = [*made.env_option_overrides, *mine]
    jax.config.update(CACHE, KEPT if alone and not (QUICK and State.fused) else NEVER)
    State.programs += 1
    return made


def compile_quickly(quick: bool, fused: bool) -> None:
    """How the next programs are compiled.

    Args:
        quick: without optimisations.
        fused: with XLA's fusions.
    """
    State.fused = fused
    jax.config.update("jax_disable_most_optimizations", quick)


def environment() -> dict[str, str]:
    """The same settings for programs that a test starts on one device."""
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in State.known)
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": flags, CACHE.upper(): str(KEPT)}
