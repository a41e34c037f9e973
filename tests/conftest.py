"""Every test sees eight simulated CPU devices. Programs are compiled with little optimization: here compiling is what costs."""

import atexit
import gc
import importlib.metadata
import os
import shutil
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


@pytest.fixture(autouse=True)
def _flags_of_a_run_end_with_its_test(monkeypatch) -> None:
    """A run adds to $XLA_FLAGS, which every later process would inherit."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])


@pytest.fixture(scope="module", autouse=True)
def _programs_do_not_pile_up() -> Iterator[None]:
    """Compiled programs of a whole suite would fill 10 GiB of a worker's memory."""
    yield
    jax.clear_caches()
    gc.collect()
