"""What is planned: a run without its layout, and the devices that it is for."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.config import CHOSEN_FIELDS, Config, LayoutConfig
from jaxtrain.data import registry
from jaxtrain.data.augment import train_inputs
from jaxtrain.data.base import nbytes
from jaxtrain.errors import ConfigError
from jaxtrain.host.links import LINKS, Link
from jaxtrain.host.targets import Target, cpu_target, gpu_target
from jaxtrain.parallel.layout import Placement
from jaxtrain.parallel.mesh import Device
from jaxtrain.precision import resolve_precision
from jaxtrain.recipes import change
from jaxtrain.step.footprint import Footprint, Pass, layer_footprint
from jaxtrain.step.layer_wrap import rematerialized
from jaxtrain.step.pipeline import partition
from jaxtrain.step.pipeline.partition import LayerCall, LayerCost, Partition
from jaxtrain.step.pipeline.plan import layer_calls
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.input_pipeline import RESIDENT_BYTES, RESIDENT_SHARE, is_resident
from jaxtrain.training.program_report import RESERVE, usable_memory
from jaxtrain.training.setup import RunSpec, make_run_spec, resolve_for_machine

GIB = 1 << 30
_OF_LAYOUT = (*(name for name in CHOSEN_FIELDS if name != "remat"), "boundaries", "strategy", "keep", "rules")
_HOST_MEMORY = Link("host memory", 5e9, 2e-6)  # between the CPU devices of a host: nominal
_SAMPLES = (4, 8)  # examples on a device that a layer's costs are taken at; between and beyond them they are on a line


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices that are planned for.

    Attributes:
      target: how many, and what each has.
      usable: bytes of a device that a run may take; cuDNN's reserve is not among them.
      within: the link between the devices of a host.
      between: the link between hosts, for each device.
    """

    target: Target
    usable: int
    within: Link
    between: Link

    @classmethod
    def of(cls, target: Target, limit: float = 0.0, within: Link | None = None, between: Link | None = None) -> Machine:
        """The machine of a target.

        Args:
          target: of `parse_target`, or of devices that are there.
          limit: GiB that a run may take of a device; 0 is what JAX takes.
          within: the link inside a host; None is what such GPUs have.
          between: the link between hosts; None is InfiniBand NDR, one adapter a GPU.
        """
        cpu = target.platform == "cpu"
        usable = int(limit * GIB) if limit else target.memory if cpu else usable_memory(target.memory)
        reserve = 0 if cpu else RESERVE
        own = _HOST_MEMORY if target.platform == "cpu" else LINKS[target.link]
        return cls(target, usable - reserve, within or own, between or LINKS["infiniband-ndr"])


def target_of(devices: Sequence[Device], hosts: int = 1) -> Target:
    """Devices that are there, as a target; with as many on each of `hosts`."""
    first, per_host = devices[0], len(devices) // hosts
    if first.platform == "cpu":
        return cpu_target(hosts, per_host)
    limit = (first.memory_stats() or {}).get("bytes_limit", 0)
    return gpu_target(
        first.device_kind, hosts, per_host,
        cores=first.core_count, capability=first.compute_capability, memory=int(limit / usable_memory(1000) * 1000),
    )  # fmt: skip


def kept_fields(config: Config) -> frozenset[str]:
    """The chosen fields that stay: those in `layout.keep`, and those that differ from their default."""
    default = LayoutConfig()
    defaults = {name: getattr(default, name) for name in CHOSEN_FIELDS if name != "remat"}
    differing = {name for name, value in defaults.items() if getattr(config.layout, name) != value}
    remat = {"remat"} if config.train.remat != "none" else set()
    return frozenset(differing | remat | set(config.layout.keep))


class Problem:
    """A run without its layout, on a machine. What costs time is computed once."""

    def __init__(self, config: Config, machine: Machine):
        """Inside `jax_settings.settings(config)`.

        Raises:
          ConfigError: the run is wrong with any layout.
        """
        if config.data.batch_per_device:
            raise ConfigError(
                f"config.data.batch_per_device={config.data.batch_per_device}: a plan keeps the global batch and chooses the "
                "layout; set config.data.global_batch instead."
            )
        self.machine, self.asked, self.kept = machine, config, kept_fields(config)
        default = LayoutConfig()
        plain = {f"layout.{name}": getattr(default, name) for name in _OF_LAYOUT}
        if config.model.drop_path != 0:
            plain["model.drop_path"] = 0.0  # else each block would be another, and be traced by itself
        devices = jax.local_devices()[:1]
        precision = resolve_precision(config.train.precision, machine.target.platform)
        plain_config = resolve_for_machine(change(config, **plain, **{"train.precision": precision}), None, devices)
        dataset = registry.outline(config.data, image_size=config.data.image_size)
        self.run: RunSpec = make_run_spec(plain_config, dataset, devices)
        self.config = self.run.config
        self.state: TrainState = jax.eval_shape(self.run.init, 0)
        self.has_batch_norm = bool(jax.tree.leaves(self.run.task.moving(self.state.batch_stats)))
        self.layers = len(self.run.task.model.layers)
        # Of layers, whatever the devices: a copy for another machine shares them.
        self._costs: list[LayerCost] = []
        self._sampled: dict[str, tuple[list[Footprint], list[Footprint]]] = {}
        self._footprints: dict[tuple[int, str], list[Footprint]] = {}
        # Of layouts that differ in other respects.
        self.cuts: dict[Any, Partition] = {}
        self.tables: dict[Any, dict[str, list[Placement]]] = {}

    def on(self, machine: Machine) -> Problem:
        """The same run on another machine of the same platform."""
        other = copy.copy(self)
        other.machine = machine
        return other

    def with_batch(self, batch: int) -> Problem:
        """The same run with another global batch; what its layers cost is not computed again."""
        other = copy.copy(self)
        other.config, other.asked = (change(each, **{"data.global_batch": batch}) for each in (self.config, self.asked))
        other.cuts = {}  # they are of microbatches
        return other

    @property
    def batch(self) -> int:
        """Examples in a global batch."""
        return self.config.data.global_batch

    @property
    def resident_bytes(self) -> int:
        """Bytes of the data set on each device; 0 where it is streamed."""
        data, target = self.run.dataset, self.machine.target
        limit = RESIDENT_BYTES if target.platform == "cpu" else usable_memory(target.memory) * RESIDENT_SHARE
        if not is_resident(data, self.config.data.residency, limit):
            return 0
        return sum(nbytes(source) for source in (data.train, data.validation, data.test))

    @property
    def image_bytes(self) -> int:
        """Bytes of an example as it comes to the devices."""
        height, width, channels = self.run.dataset.train.shape
        return height * width * channels

    # ------------------------------------------------------------------------------------------------------ layers

    def calls(self, examples: int) -> list[LayerCall]:
        """The layers on `examples` of one device."""
        task, data = self.run.task, self.run.dataset
        side = task.preprocess.image_size
        shape = (examples, side, side, data.train.shape[2])
        return layer_calls(task.model, self.state.params, self.state.batch_stats, shape, task.preprocess.dtype, 1, 1)

    @property
    def costs(self) -> list[LayerCost]:
        """What the layers cost for `_SAMPLES[1]` examples of one device, as the partition counts it."""
        if not self._costs:
            cpu = self.machine.target.platform == "cpu"
            self._costs += partition.measure(self.calls(_SAMPLES[1]), timed=False, cpu=cpu)
        return self._costs

    def costs_at(self, examples: float) -> list[LayerCost]:
        """The same for another number of examples."""
        factor = examples / _SAMPLES[1]

        def scaled(cost: LayerCost) -> LayerCost:
            weights = 3 * cost.parameter_bytes
            return dataclasses.replace(
                cost,
                flops=cost.flops * factor,
                moved=weights + round((cost.moved - weights) * factor),
                residuals=round(cost.residuals * factor),
                output=round(cost.output * factor),
            )

        return [scaled(cost) for cost in self.costs]

    def _sample(self, remat: str) -> tuple[list[Footprint], list[Footprint]]:
        """The footprints of the layers at both `_SAMPLES`, and before them that of the augmentation."""
        known: dict[Any, Footprint] = {}
        found = []
        for examples in _SAMPLES:
            rows = [self._augmentation(examples)]
            for call in self.calls(examples):
                key = (call.key, call.first)
                if key not in known:
                    function = call.function if remat == "none" else rematerialized(call.function, remat)
                    known[key] = layer_footprint(
                        function, call.params, call.x, first=call.first, platform=self.machine.target.platform
                    )
                rows.append(known[key])
            found.append(rows)
        return found[0], found[1]

    def _augmentation(self, examples: int) -> Footprint:
        """That of turning images uint8 into the first layer's input; it has no backward pass."""
        preprocess, data = self.run.task.preprocess, self.run.dataset
        images = jax.ShapeDtypeStruct((examples, *data.train.shape), jnp.uint8)

        def function(images: jax.Array) -> jax.Array:
            rows, labels = jnp.arange(examples, dtype=jnp.int32), jnp.zeros(examples, jnp.int32)
            return train_inputs(preprocess, images, labels, rows, jax.random.key(0))[0]

        y = jax.eval_shape(function, images)
        size = y.size * y.dtype.itemsize
        moved = images.size + 2 * size
        return Footprint(Pass(size, moved, 0, 2), Pass(), 0, size, keeps_input=False, keeps_output=False)

    def footprints(self, examples: int, remat: str) -> list[Footprint]:
        """Of the augmentation and of every layer, for `examples` of one device and microbatch."""
        if (examples, remat) in self._footprints:
            return self._footprints[examples, remat]
        if remat not in self._sampled:
            self._sampled[remat] = self._sample(remat)
        first, second = self._sampled[remat]
        slope = (examples - _SAMPLES[0]) / (_SAMPLES[1] - _SAMPLES[0])

        def between(a: Any, b: Any) -> Any:
            if isinstance(a, bool):
                return b
            if dataclasses.is_dataclass(a):
                names = [field.name for field in dataclasses.fields(a)]
                return dataclasses.replace(
                    b,  # pyright: ignore[reportArgumentType]
                    **{name: between(getattr(a, name), getattr(b, name)) for name in names},
                )
            return max(type(a)(a + (b - a) * slope), 0)

        found = [between(a, b) for a, b in zip(first, second, strict=True)]
        self._footprints[examples, remat] = found
        return found
