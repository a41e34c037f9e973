"""Evaluates a finished or running run: `evaluate("runs/r50")`."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from jaxtrain import xla_flags
from jaxtrain.checkpoint import Checkpoints, find_start
from jaxtrain.checkpoint_files import manifested_steps, problems, read_manifest
from jaxtrain.config import LayoutConfig, from_dict
from jaxtrain.engine import Evaluation
from jaxtrain.errors import CheckpointError, ConfigError
from jaxtrain.evaluator import EvalResult
from jaxtrain.feed import make_feed
from jaxtrain.parallel.mesh import batch_ways, make_mesh
from jaxtrain.run import load_data, make_run, select_devices, settings
from jaxtrain.state import state_shapes

SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """The result, the checkpoint's step, and the names of the classes (of `result.per_class`)."""

    result: EvalResult
    step: int
    class_names: tuple[str, ...]


def evaluate(
    workdir: str | Path, split: str = "test", *, checkpoint: str = "best", ema: bool = False, num_devices: int = 0
) -> Evaluated:
    """Evaluates a checkpoint of the run in `workdir`, with the layout that fits these devices.

    Args:
      workdir: the run's work directory.
      split: `train`, `val` or `test`.
      checkpoint: `best`, `latest`, a step, `epoch:N` or a path.
      ema: use the moving average of the weights.
      num_devices: use the first so many devices of each host; 0 uses all.

    Raises:
      CheckpointError: the run has no such checkpoint. ConfigError: no such split, or the run keeps no average.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}: must be one of train, val, test.")
    directory = Path(workdir) / "checkpoints"
    start = find_start(directory, checkpoint, "checkpoint") if manifested_steps(directory) else None
    if start is None:
        raise CheckpointError(f"{workdir} holds no checkpoint.")
    folder = start.directory / str(start.step)
    if found := problems(folder):
        raise CheckpointError(f"{folder} is damaged ({found[0]}); choose another with --checkpoint.")
    config = from_dict(read_manifest(folder).position["config"])
    xla_flags.set_flags(xla_flags.for_run(config.train.precision))
    with contextlib.closing(Checkpoints(start.directory, read_only=True)) as checkpoints:
        devices = select_devices(num_devices)
        # Numbers do not depend on the layout: weights shared out among the devices, and a batch that they divide.
        config = dataclasses.replace(
            config, layout=LayoutConfig(zero=3), model=dataclasses.replace(config.model, bn_groups=1)
        )
        ways = batch_ways(make_mesh(config.layout, devices))
        batch = -(-config.data.global_batch // ways) * ways
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, global_batch=batch))
        if ema and not config.optim.ema:
            raise ConfigError(f"{workdir} keeps no moving average of the weights (config.optim.ema=0).")
        with settings(config):
            dataset = load_data(config.data)
            if not len(getattr(dataset, SPLITS[split])):
                raise ConfigError(f"The data set {dataset.name} has no {split} split.")
            run = make_run(config, dataset, devices)
            state = checkpoints.restore_weights(start.step, state_shapes(run.init, run.layout))
            feed = make_feed(dataset, run.layout, config.data.residency, config.data.workers)
            weights = state.ema if ema else {"params": state.params, "batch_stats": state.batch_stats}
            result = Evaluation(run, feed)(SPLITS[split], weights["params"], weights["batch_stats"])
    return Evaluated(result, start.step, dataset.class_names)
