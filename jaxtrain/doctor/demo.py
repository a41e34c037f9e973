"""Shows in a minute that this machine can train: a Swin on synthetic images, on all devices, and four checks of the result.

It calls `train(...)`, data-parallel, in a work directory that is deleted afterwards. It needs no network.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.distributed.self_test import all_reduce, wrong_sums
from jaxtrain.errors import NumericError
from jaxtrain.host.backend import on_cpu
from jaxtrain.host.gpus import Gpu, Gpus
from jaxtrain.observability.progress import Progress
from jaxtrain.parallel.mesh import Device
from jaxtrain.training.session import train
from jaxtrain.training.setup import select_devices
from jaxtrain.trees import PyTree

DEVICES, ALL_REDUCE, LOSS, REPLICAS = "devices found", "all-reduce", "loss falls", "gradients finite, replicas equal"
STEPS = 24
_COMPARED = 4  # the mean losses of so many first and last steps are compared
_ENOUGH = 0.5  # the last mean must be below this share of the first
_NUMBERS = 1 << 18  # f32 numbers that each device adds: 1 MiB


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    passed: bool
    found: str
    """The numbers; for a failed check also what they mean."""


def run_demo(
    num_devices: int = 0, report: Callable[[Check], object] = lambda check: None, progress: Progress | None = None
) -> list[Check]:
    """Trains for one short epoch and returns the four checks, whether they passed or not.

    Args:
      num_devices: how many devices to use; 0 uses all.
      report: called with each check as soon as it is made.
      progress: shows what is done between the checks.

    Raises:
      ConfigError: there are fewer devices than `num_devices`.
    """
    checks = []
    for check in _checks(num_devices, progress or Progress()):
        report(check)
        checks.append(check)
    return checks


def _checks(num_devices: int, progress: Progress) -> Iterator[Check]:
    devices = select_devices(num_devices)
    yield check_devices(devices, Gpus().all(), asked=getattr(jax.config, "jax_platforms", None) or "")
    with progress.activity(f"adding numbers over {_devices(len(devices))}"):
        sums = all_reduce(devices, _NUMBERS)
    yield check_all_reduce(sums)
    training = f"compiling a small Swin and training it for {STEPS} steps"
    try:
        with progress.activity(training), tempfile.TemporaryDirectory(prefix="jaxtrain-demo-") as directory:
            result = train(demo_config(devices), directory, num_devices=num_devices, quiet=True)
    except NumericError as error:
        yield from (Check(name, False, f"the training stopped: {error}") for name in (LOSS, REPLICAS))
        return
    rows = [row for row in result.history if row["phase"] == "train"]
    yield check_loss([row["loss"] for row in rows])
    yield check_replicas([row["grad_norm"] for row in rows], (result.state.params, result.state.opt_state))


def demo_config(devices: Sequence[Device]) -> Config:
    """One epoch of `STEPS` steps: Swin-T at 32 px, 64 images a device; on CPU devices a narrow one at 16 px, 64 in all."""
    small = on_cpu(devices)
    batch = max(64 // len(devices), 1) * len(devices) if small else 64 * len(devices)
    narrow: Mapping[str, Any] = {"width": 32, "depths": (2, 1, 1, 1), "drop_path": 0.0} if small else {}
    return Config(
        data=DataConfig(
            name="synthetic",
            image_size=16 if small else 32,
            global_batch=batch,
            examples=STEPS * batch,
            validation=1 / STEPS,
        ),
        model=ModelConfig(name="swin_tiny", **narrow),
        optim=OptimConfig(
            name="adamw",
            learning_rate=1e-3 if small else 5e-4,
            lr_scaling="none",
            weight_decay=0.05,
            warmup=f"{STEPS // 8} steps",
            clip_norm=5.0,
        ),
        train=TrainConfig(epochs=1, log_every=1, eval_every="0"),
        checkpoint=CheckpointConfig(every="0"),
    )


# -------------------------------------------------------------------------------------------------------------- checks


def check_devices(devices: Sequence[Device], gpus: Sequence[Gpu], asked: str) -> Check:
    """Fails if the host has GPUs and JAX uses the CPU, unless the user asked for that.

    Args:
      devices: those that JAX uses.
      gpus: those that NVML finds.
      asked: the setting jax_platforms; it may name the CPU first.
    """
    kinds = collections.Counter(device.device_kind for device in devices)
    names = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if not gpus or not on_cpu(devices) or asked.startswith("cpu"):
        return Check(DEVICES, True, names)
    why = (
        f"{names}, although the host has {len(gpus)} x {gpus[0].name}: `jaxtrain doctor` says how to have JAX use them"
    )
    return Check(DEVICES, False, why)


def check_all_reduce(sums: np.ndarray) -> Check:
    """Fails unless every sum is exact. sums: f32 [devices, numbers], from `all_reduce`."""
    over = _devices(len(sums))
    if (wrong := wrong_sums(sums, len(sums))) is None:
        return Check(ALL_REDUCE, True, f"{sums.shape[1]:,} numbers added over {over}, every sum is exact")
    return Check(
        ALL_REDUCE,
        False,
        f"{wrong.count:,} of {sums.size:,} sums over {over} are wrong, the first {wrong.value:g} for {wrong.exact:g} on "
        f"device {wrong.device}: do not train on these devices with this driver and build of jax",
    )


def check_loss(losses: Sequence[float]) -> Check:
    """Fails unless the mean of the last losses is below half of that of the first."""
    first, last = statistics.fmean(losses[:_COMPARED]), statistics.fmean(losses[-_COMPARED:])
    numbers = f"{len(losses)} steps, mean of the first {_COMPARED} losses {first:.4f}, of the last {last:.4f}"
    passed = last < _ENOUGH * first
    return Check(LOSS, passed, numbers if passed else f"{numbers}, which is not below {_ENOUGH:g} times the first")


def check_replicas(grad_norms: Sequence[float], state: PyTree) -> Check:
    """Fails if a gradient norm or a leaf of `state` is not finite, or if a leaf's copies on the devices differ in a bit.

    The copies are equal only if all devices had the same sum of gradients at every step.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    copies = {
        jax.tree_util.keystr(path): [np.asarray(s.data) for s in leaf.addressable_shards] for path, leaf in leaves
    }
    bad = [name for name, of_leaf in copies.items() if not all(np.isfinite(copy).all() for copy in of_leaf)]
    if bad or not all(map(math.isfinite, grad_norms)):
        return Check(
            REPLICAS, False, f"{', '.join(bad[:3]) or 'a gradient norm'} is not finite after {len(grad_norms)} steps"
        )
    other = [name for name, (first, *rest) in copies.items() if any(c.tobytes() != first.tobytes() for c in rest)]
    largest = max(_difference(of_leaf) for of_leaf in copies.values())
    count = len(next(iter(copies.values())))
    if other:
        why = (
            f"{len(other)} of {len(copies)} leaves of the state differ between the {count} devices by up to {largest:g}"
        )
        return Check(REPLICAS, False, f"{why}, the first {other[0]}: a device or its link computes wrong")
    return Check(
        REPLICAS,
        True,
        f"gradient norm at most {max(grad_norms):.3f} in {len(grad_norms)} steps; {len(copies)} leaves on {_devices(count)}, "
        f"largest difference between copies {largest:g}",
    )


def _difference(copies: Sequence[np.ndarray]) -> float:
    first = copies[0].astype(np.float64)
    return max(float(np.abs(copy - first).max(initial=0.0)) for copy in copies)


def _devices(count: int) -> str:
    return f"{count} device{'s' if count > 1 else ''}"
