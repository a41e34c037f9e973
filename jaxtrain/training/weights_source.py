"""Where weights come from: a file of weights, or a checkpoint of another run. Both have a table of tensors, and place them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxtrain.checkpoint.checkpointer import Checkpointer, restore_leaves
from jaxtrain.checkpoint.manifest import MANIFEST, problems, read_manifest
from jaxtrain.checkpoint.resume_point import CheckpointStep, Position, find_checkpoint
from jaxtrain.errors import CheckpointError, ConfigError, WeightsError
from jaxtrain.host.files import closing
from jaxtrain.weights import reading
from jaxtrain.weights.file import WeightsFile, open_weights
from jaxtrain.weights.matching import Matched
from jaxtrain.weights.pretrained import PretrainedConfig, pretrained_config
from jaxtrain.weights.tensors import Tensor


class Source(Protocol):
    """Weights that can be matched with a model's leaves, and placed."""

    @property
    def path(self) -> Path:
        """Of the file, or of the checkpoint."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The types and shapes of what is there, by name."""
        ...

    @property
    def sha256(self) -> str:
        """Of the file; of a checkpoint's manifest, which has those of its files."""
        ...

    def config(self) -> PretrainedConfig:
        """What is known of the images that the weights were trained on."""
        ...

    def place(self, matched: Matched, targets: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The leaves, by path; `targets` has their shapes, dtypes and shardings."""
        ...


@dataclasses.dataclass(frozen=True)
class _File:
    file: WeightsFile

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self.file.tensors

    @property
    def sha256(self) -> str:
        return self.file.sha256

    def config(self) -> PretrainedConfig:
        return pretrained_config(self.file)

    def place(self, matched: Matched, targets: Mapping[str, Any]) -> dict[str, jax.Array]:
        return reading.place(self.file, matched, targets)


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """The weights of a checkpoint: their moving average, where its run keeps one. Orbax reads them where they belong."""

    start: CheckpointStep
    checkpoints: Checkpointer
    prefix: str
    tensors: Mapping[str, Tensor]

    @property
    def path(self) -> Path:
        return self.start.directory / str(self.start.step)

    @property
    def sha256(self) -> str:
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    def config(self) -> PretrainedConfig:
        position = read_manifest(self.path).position
        known = Position.from_json(position).dataset
        name = position["config"]["model"]["name"]
        return PretrainedConfig(
            architecture=name,
            image_size=known.image_size,
            mean=known.mean,
            std=known.std,
            class_names=known.class_names,
        )

    def place(self, matched: Matched, targets: Mapping[str, Any]) -> dict[str, jax.Array]:
        """A table of another window is read whole by every process, and resized there."""
        wanted = {match.row.ours: targets[match.row.ours] for match in matched.of("loaded")}
        for match in matched.of("resized"):
            target, stored = targets[match.row.ours], self.tensors[match.row.theirs[0]]
            everywhere = jax.sharding.NamedSharding(target.sharding.mesh, P())
            wanted[match.row.ours] = jax.ShapeDtypeStruct(stored.shape, target.dtype, sharding=everywhere)
        named = {f"{self.prefix}{path}": target for path, target in wanted.items()}
        mesh = next(iter(named.values())).sharding.mesh
        placed = restore_leaves(self.checkpoints, self.start.step, named, mesh)
        placed = {name.removeprefix(self.prefix): leaf for name, leaf in placed.items()}
        for match in matched.of("resized"):
            placed[match.row.ours] = _resized(placed[match.row.ours], targets[match.row.ours])
        return placed


def _resized(table: jax.Array, target: Any) -> jax.Array:
    """A table that every device of a stage has, for another window. A process without a part of it has none to make either."""

    def part(index: Any) -> np.ndarray:
        stored = np.asarray(table.addressable_shards[0].data)
        return reading.resized_table(stored, target.shape[0]).astype(target.dtype)[index]

    return jax.make_array_from_callback(target.shape, target.sharding, part, dtype=target.dtype)


@contextlib.contextmanager
def open_source(path: str | Path) -> Iterator[Source]:
    """Opens a file of weights, a checkpoint, or the latest checkpoint of a work directory (RUN/checkpoints/best: its best).

    Raises:
      WeightsError: there is none, or it is damaged. CheckpointError: the checkpoint is.
    """
    path = Path(path).expanduser().absolute()
    try:
        start = find_checkpoint(path, str(path), setting="config.model.init_from") if not path.is_file() else None
    except ConfigError:  # `open_weights` says what is there instead
        start = None
    if start is None:
        with open_weights(path) as file:
            yield _File(file)
        return
    folder = start.directory / str(start.step)
    if found := problems(folder):
        raise CheckpointError(f"{folder} is damaged ({found[0]}); choose another with --config.model.init_from.")
    with closing(Checkpointer(start.directory, read_only=True)) as checkpoints:
        shapes = checkpoints.stored_shapes(start.step)
        prefix = "ema/" if any(name.startswith("ema/") for name in shapes) else ""
        tensors = {
            name.removeprefix(prefix): Tensor(np.dtype(dtype), shape, 0)
            for name, (shape, dtype) in shapes.items()
            if name.startswith((f"{prefix}params/", f"{prefix}batch_stats/"))
        }
        if not tensors:
            raise WeightsError(f"{folder} holds no parameters.")
        yield _Checkpoint(start, checkpoints, prefix, tensors)
