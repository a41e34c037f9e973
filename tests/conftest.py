"""Every test sees eight simulated CPU devices. Programs are compiled with little optimization: here compiling is what costs."""

import atexit
import ctypes
import gc
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false"  # a third to a half less to compile; gone in 0.11
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILE}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache = tempfile.mkdtemp(prefix="jaxtrain-tests-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402  after the environment is set
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", int(os.environ.get("JAXTRAIN_TEST_DEVICES", "8")))
jax.devices()  # from here on XLA's flags are fixed: those of a run would slow down f64, in which most layouts are compared


# What must fail first: the numbers, then what happens when something breaks, then what is said. Other files are numbers.
FAULTS = ("faults", "distributed", "checkpoint", "test_start", "test_workdir")
WORDS = (
    "cli", "doctor", "host", "observability", "test_api", "test_benchmarks", "test_config", "test_deploy", "test_documents",
    "test_layers", "test_order", "test_recipes", "scaling",
)  # fmt: skip
DEAREST = ("test_parity", "test_pipeline")  # begun first, so that no worker waits for them at the end


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Numbers first, then faults, then words; the tests of a file stay together, in its order."""

    def rank(item: pytest.Item) -> int:
        names = {item.path.stem, item.path.parent.name}
        return next((i for i, of in ((0, DEAREST), (2, FAULTS), (3, WORDS)) if names & set(of)), 1)

    items.sort(key=rank)


gc.set_threshold(
    50_000
)  # of what tracing makes most lives: looked at after every 700 objects it takes 5 % more CPU time


@pytest.fixture(autouse=True)
def _flags_of_a_run_end_with_its_test(monkeypatch) -> None:
    """A run adds to $XLA_FLAGS, which every later process would inherit."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])


@pytest.fixture(scope="module", autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    yield
    give_back_memory()


def give_back_memory() -> None:
    """Drops compiled programs: those of a whole suite would fill 10 GiB of a worker's memory.

    And glibc gives back what is free in its arenas, a third of what a test of layouts leaves; by itself it keeps it.
    """
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
