"""The child that runs jaxtrain's training step; needs JAX, Flax and optax alone.

The step is the trainer's own (`jaxtrain.step.train_step.make_train_step`), on a uint8 batch that lies on the device:
augmentation, forward, backward, metrics, optimizer, one program with a donated state.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from benchmarks.gpu.child import serve
from benchmarks.gpu.parts import CASES, Case, profile, read_trace
from jaxtrain.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, from_dict, to_dict
from jaxtrain.models import registry
from jaxtrain.models.layers import Context
from jaxtrain.optim.schedules import learning_rate_schedule
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.precision import precision_policy
from jaxtrain.step.batch import RATES, Batch, Hyperparams, Resident
from jaxtrain.step.task import make_task
from jaxtrain.step.train_state import create_state, initial_state
from jaxtrain.step.train_step import MeshTrainStep, make_train_step

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def config_of(case: Case, changes: Mapping[str, Any] | None = None) -> Config:
    """The run's config; `changes` by dotted names."""
    config = Config(
        data=DataConfig(name="synthetic", global_batch=case.batch, image_size=case.image, augmentation="light"),
        model=ModelConfig(case.model, num_classes=case.classes, **(case.small if case.smoke else {})),
        optim=OptimConfig(
            name=case.optimizer,
            learning_rate=1e-3,  # small, since the images are noise: a loss that is not finite would stop the updates
            lr_scaling="none",
            nesterov=case.optimizer == "sgd",
            weight_decay=5e-4 if case.optimizer == "sgd" else 0.05,
        ),
        train=TrainConfig(steps=100_000, precision="bf16"),
    )
    values = to_dict(config)
    for name, value in (changes or {}).items():
        section, _, key = name.rpartition(".")
        values[section][key] = value
    return from_dict(values)


@dataclasses.dataclass
class Training:
    """A compiled step, its state, and a batch on the device. many: batches for several steps a call. at: updates so far."""

    step: MeshTrainStep
    state: Any
    batch: Batch
    many: Batch | None = None
    at: int = 0

    @classmethod
    def make(cls, config: Config) -> Training:
        """As `jaxtrain.training.setup` and `jaxtrain.training.compiled` do it, without a data set."""
        size, batch, classes = config.data.image_size, config.data.global_batch, config.model.num_classes
        types, shape = precision_policy(config.train.precision), (size, size, 3)
        model = registry.build(config.model, shape, classes, types.compute_dtype, types.param_dtype)
        rate = learning_rate_schedule(config.optim, config.train.steps, 0, batch)
        task = make_task(config, model, rate, side=size, classes=classes, mean=MEAN, std=STD, dtype=types.compute_dtype)
        layout = Layout(make_mesh(config.layout, jax.devices()[:1]), config.layout, model.tensor_rules)
        init = functools.partial(initial_state, task=task, policy=types, input_shape=shape)
        state = create_state(init, layout, config.seed)
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (1, batch, *shape), np.uint8)  # never zeros: products of zeros run faster
        labels = draw.integers(0, classes, (1, batch), np.int32)
        rates = np.full(RATES, config.optim.learning_rate, np.float32)
        numbers = (rates, np.int32(0), np.float32(config.optim.weight_decay), np.int32(config.seed))
        hyperparams = Hyperparams(*(_replicated(layout, number) for number in numbers))
        first = Batch(
            _replicated(layout, np.int32(0)), hyperparams, images=_put(layout, images), labels=_put(layout, labels)
        )
        several = config.train.steps_per_call
        step = make_train_step(task, layout, state, first, Resident(), several)
        many = None
        if "call" in step.programs:
            places = step.programs["call"].input_shardings[0][1]
            one = dataclasses.replace(first, hyperparams=())
            repeated = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], several, 0), one)
            many = jax.device_put(repeated, dataclasses.replace(places, hyperparams=()))
            many = dataclasses.replace(many, hyperparams=hyperparams)
        return cls(step, state, first, many)

    def batches(self, steps: int) -> list[Batch]:
        """The same images for the next updates, or for whole calls of several that make as many at least."""
        batch = self.batch if self.many is None else self.many
        place, shape = batch.step.sharding, batch.step.shape
        found = []
        while steps > 0:
            number = np.arange(self.at, self.at + batch.step.size, dtype=np.int32).reshape(shape)
            found.append(dataclasses.replace(batch, step=jax.device_put(number, place)))
            self.at, steps = self.at + number.size, steps - number.size
        return jax.block_until_ready(found)

    def run(self, batches: list[Batch]) -> Any:
        """An update for each batch; waits for the last and returns its metrics."""
        metrics: Any = None
        for batch in batches:
            self.state, metrics = self.step(self.state, batch, Resident())
        return jax.block_until_ready((metrics, self.state))[0]


def _put(layout: Layout, value: np.ndarray) -> jax.Array:
    return jax.device_put(value, layout.images if value.ndim > 2 else layout.batch)


def _replicated(layout: Layout, value: np.ndarray | np.generic) -> jax.Array:
    return jax.device_put(value, layout.sharding())


def macs(function: Any, *arguments: Any) -> int:
    """Multiply-adds of the products and convolutions of `function`, from its jaxpr."""
    return _macs(jax.make_jaxpr(function)(*arguments).jaxpr)


def _macs(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in equation.invars]
        out = equation.outvars[0].aval.shape
        match equation.primitive.name:
            case "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                total += int(np.prod(out)) * int(np.prod([shapes[0][d] for d in contracted]))
            case "conv_general_dilated":
                kernel = equation.params["dimension_numbers"].rhs_spec
                taps = np.prod(shapes[1]) // shapes[1][kernel[0]]  # of one output channel
                total += int(np.prod(out)) * int(taps)
            case "cond":  # a branch for each platform
                total += max(_macs(branch.jaxpr) for branch in equation.params["branches"])
            case _:
                total += sum(_macs(inner) for inner in core.jaxprs_in_params(equation.params))
    return total


def forward_macs(case: Case) -> int:
    """Of one image's forward pass through our model, in evaluation."""
    config = config_of(case)
    types, shape = precision_policy("bf16"), (case.image, case.image, 3)
    model = registry.build(config.model, shape, case.classes, types.compute_dtype, types.param_dtype)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), (1, *shape), types.compute_dtype))
    x = jax.ShapeDtypeStruct((1, *shape), types.compute_dtype)
    context = Context(example=jnp.arange(1, dtype=jnp.int32))
    return macs(lambda params, stats, x: model.apply(params, stats, x, context)[0], *variables, x)


# ------------------------------------------------------------------------------------------------------------- commands


class Commands:
    """What the parent may ask."""

    def __init__(self) -> None:
        self._training: Training | None = None
        self._hits = 0
        jax.monitoring.register_event_listener(self._count)

    def _count(self, event: str, **_: Any) -> None:
        self._hits += event == "/jax/compilation_cache/cache_hits"

    @property
    def training(self) -> Training:
        """What `build` made."""
        assert self._training is not None, "build comes first"
        return self._training

    def info(self) -> dict[str, Any]:
        """The device and the versions."""
        packages = ("jax", "jaxlib", "flax", "optax")
        device = jax.devices()[0]
        return {
            "device": device.device_kind,
            "platform": device.platform,
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }

    def build(self, case: str, batch: int, smoke: bool, changes: Mapping[str, Any]) -> dict[str, Any]:
        """State, compiled step, first update. seconds: of all that, since the devices were there."""
        jax.block_until_ready(jnp.zeros(()))
        began = time.perf_counter()
        shape = CASES[case].shrunk() if smoke else CASES[case]
        self._training = Training.make(config_of(dataclasses.replace(shape, batch=batch), changes))
        compiled = time.perf_counter()
        metrics = self.training.run(self.training.batches(1))
        seconds = time.perf_counter() - began
        program = self.training.step.programs["step"].memory_analysis()
        temporary = getattr(program, "temp_size_in_bytes", None)
        return {
            "seconds": seconds,
            "compile_seconds": compiled - began,
            "cache_hits": self._hits,
            "loss": _last_loss(metrics),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.training.state.params)),
            "temporary_bytes": temporary,
        }

    def block(self, steps: int) -> dict[str, Any]:
        """Seconds a step of `steps` updates, dispatched one after the other and waited for at the end."""
        batches = self.training.batches(steps)
        began = time.perf_counter()
        metrics = self.training.run(batches)
        seconds = time.perf_counter() - began
        return {"seconds": seconds / sum(batch.step.size for batch in batches), "loss": _last_loss(metrics)}

    def memory(self) -> dict[str, Any]:
        """Bytes of the device's memory at most, by the allocator."""
        stats = jax.devices()[0].memory_stats() or {}
        return {"peak_bytes": stats.get("peak_bytes_in_use"), "limit_bytes": stats.get("bytes_limit")}

    def profile(self, steps: int, step_seconds: float) -> dict[str, Any]:
        """See `parts.profile`."""
        batches = self.training.batches(steps)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                self.training.run(batches)
            made = sum(batch.step.size for batch in batches)
            traces = sorted(Path(folder).rglob("*.trace.json.gz"))
            if not traces:
                return {"error": "the profiler wrote no trace"}
            return profile(read_trace(traces[0]), made, step_seconds)

    def ceilings(self, size: int) -> dict[str, Any]:
        """What a large product and a large copy reach, both on random data."""
        a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
        seconds = _best(jax.jit(jnp.dot), a, b)
        values = jax.random.normal(jax.random.key(2), (size * size * 4,), jnp.float32)
        copying = _best(jax.jit(lambda x: x + 1), values)
        images = jax.random.normal(jax.random.key(3), (8, 32, 32, 16), jnp.bfloat16)
        kernel = jax.random.normal(jax.random.key(4), (3, 3, 16, 16), jnp.bfloat16)

        def convolve(kernel: jax.Array) -> jax.Array:
            y = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return jnp.sum(y.astype(jnp.float32))

        jax.block_until_ready(jax.jit(jax.grad(convolve))(kernel))  # fails at once where cuDNN cannot be used
        return {
            "matrix_tflops": 2 * size**3 / seconds / 1e12,
            "copy_tb_per_second": 2 * values.nbytes / copying / 1e12,
        }


def _last_loss(metrics: Any) -> float:
    return float(np.ravel(metrics["loss"])[-1])


def _best(function: Any, *arguments: Any, calls: int = 10, repeats: int = 5) -> float:
    jax.block_until_ready(function(*arguments))
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready([function(*arguments) for _ in range(calls)])
        found.append((time.perf_counter() - began) / calls)
    return min(found)


def main() -> None:
    """Answers the parent."""
    commands = Commands()
    names = ("info", "build", "block", "memory", "profile", "ceilings")
    serve({name: getattr(commands, name) for name in names})


if __name__ == "__main__":
    main()
