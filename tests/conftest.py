"""Every test sees eight simulated CPU devices. Programs are compiled with little optimization: here compiling is what costs."""

import os
import tempfile

QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILE}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="jaxtrain-tests-"))
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402  after the environment is set

jax.config.update("jax_num_cpu_devices", 8)
