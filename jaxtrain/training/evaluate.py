"""Evaluates a finished or running run: `evaluate("runs/r50")`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from pathlib import Path

from jaxtrain.checkpoint.checkpointer import Checkpointer
from jaxtrain.checkpoint.manifest import manifested_steps, problems, read_manifest
from jaxtrain.checkpoint.resume_point import CheckpointStep, Position, find_checkpoint
from jaxtrain.config import Config, LayoutConfig, flatten, from_dict, to_dict
from jaxtrain.data import record
from jaxtrain.data.base import Dataset, follow_classes
from jaxtrain.errors import CheckpointError, ConfigError, DataError
from jaxtrain.host import xla_flags
from jaxtrain.observability.progress import Progress
from jaxtrain.observability.text_log import make_console
from jaxtrain.parallel.mesh import batch_ways, make_mesh
from jaxtrain.plugins import refuse_code
from jaxtrain.step.eval_step import EvalResult
from jaxtrain.step.train_state import state_shapes
from jaxtrain.training.compiled import Evaluator
from jaxtrain.training.input_pipeline import make_input_pipeline
from jaxtrain.training.jax_settings import compile_cache_note, settings
from jaxtrain.training.setup import load_data, make_run_spec, select_devices
from jaxtrain.trees import PyTree
from jaxtrain.workdir import named

SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
log = logging.getLogger("jaxtrain")


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluated:
    """The result, and what it is of.

    step: the checkpoint's. split: `train`, `validation` or `test`. weights: `raw`, or `ema` for their moving average.
    class_names: of `result.per_class`.
    """

    result: EvalResult
    step: int
    split: str
    weights: str
    class_names: tuple[str, ...]

    def __repr__(self) -> str:
        """The result in a line: the classes of a large data set would fill a page."""
        numbers = f"accuracy {self.result.accuracy:.4f}, top-5 {self.result.top5:.4f}, loss {self.result.loss:.4f}"
        return f"Evaluated(step {self.step}, {self.weights} weights, {self.split}: {numbers}, {self.result.examples} examples)"


def evaluate(
    workdir: str | Path,
    split: str = "test",
    *,
    checkpoint: str = "best",
    ema: bool | None = None,
    num_devices: int = 0,
    allow_changes: bool = False,
    trust: bool = False,
    quiet: bool = False,
) -> Evaluated:
    """Evaluates a checkpoint of the run in `workdir`, with the layout that fits these devices.

    Classes are those of the run, by their names; of the data set only this split is read, and it must hold what it held.

    Args:
      workdir: the run's work directory.
      split: `train`, `val` or `test`.
      checkpoint: `best`, `latest`, a step, `epoch:N` or a path.
      ema: whether to take the moving average of the weights; None: where the run keeps one, since the best checkpoint is
        chosen by it.
      num_devices: use the first so many devices of each host; 0 uses all.
      allow_changes: evaluate on a data set that has changed since, and say what has.
      trust: run the code that the run's config names (a model, optimizer, loss or data set of the user's own).
      quiet: show no bar.

    Raises:
      CheckpointError: the run has no such checkpoint. ConfigError: no such split, the run keeps no average, or its config names
        code and `trust` is not set.
      DataError: the split does not hold what it held when the checkpoint was made.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}: must be one of train, val, test.")
    start, position, config = _find(named(workdir), checkpoint)
    if not trust:
        refuse_code(flatten(to_dict(config)), start.directory / str(start.step))
    if ema and not config.optim.ema:
        raise ConfigError(f"{workdir} keeps no moving average of the weights (config.optim.ema=0).")
    ema = bool(config.optim.ema) if ema is None else ema
    xla_flags.set_flags(xla_flags.for_run(config.train.precision))
    progress = Progress(make_console(quiet=quiet))
    with contextlib.closing(Checkpointer(start.directory, read_only=True)) as checkpoints:
        devices = select_devices(num_devices)
        # Numbers do not depend on the layout: weights shared out among the devices, and a batch that they divide.
        config = dataclasses.replace(
            config, layout=LayoutConfig(zero=3), model=dataclasses.replace(config.model, bn_groups=1)
        )
        ways = batch_ways(make_mesh(config.layout, devices))
        batch = -(-config.data.global_batch // ways) * ways
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, global_batch=batch))
        with settings(config):
            with progress.activity(f"reading the data set {config.data.name}"):
                dataset = load_data(config.data, needed=SPLITS[split], drawn=position.dataset.drawn)
            dataset = _same_data(dataset, position, split, f"step {start.step} of {workdir}", allow_changes)
            run = make_run_spec(*_as_trained(config, dataset, position), devices)
            state = checkpoints.restore_weights(start.step, state_shapes(run.init, run.layout))
            feed = make_input_pipeline(dataset, run.layout, config.data.residency, config.data.workers)
            weights = state.ema if ema else {"params": state.params, "batch_stats": state.batch_stats}
            result = _shown(Evaluator(run, feed), SPLITS[split], weights["params"], weights["batch_stats"], progress)
    return Evaluated(result, start.step, SPLITS[split], "ema" if ema else "raw", dataset.class_names)


def _shown(evaluator: Evaluator, split: str, params: PyTree, batch_stats: PyTree, progress: Progress) -> EvalResult:
    """Evaluates weights on a split, with a bar over its batches; until the first one comes, the program is compiled."""
    with progress.activity("compiling the evaluation", note=compile_cache_note()) as activity:

        def before_batch() -> None:
            if not activity.total:
                activity.what, activity.total, activity.began = split, evaluator.batches(split), time.monotonic()
            activity.done += 1

        return evaluator(split, params, batch_stats, before_batch)


def _find(workdir: Path, checkpoint: str) -> tuple[CheckpointStep, Position, Config]:
    """The checkpoint that is meant, whose files are whole; what is stored with it."""
    directory = workdir / "checkpoints"
    start = find_checkpoint(directory, checkpoint, "checkpoint") if manifested_steps(directory) else None
    if start is None:
        raise CheckpointError(f"{workdir} holds no checkpoint.")
    folder = start.directory / str(start.step)
    if found := problems(folder):
        raise CheckpointError(f"{folder} is damaged ({found[0]}); choose another with --checkpoint.")
    stored = read_manifest(folder).position
    return start, Position.from_json(stored), from_dict(stored["config"])


def _same_data(dataset: Dataset, position: Position, split: str, where: str, allow_changes: bool) -> Dataset:
    """The split of `dataset`, with the classes as the run knows them. Raises `DataError` where it is another than it was."""
    stored, name = position.dataset, SPLITS[split]
    if not len(getattr(dataset, name)):
        raise ConfigError(f"The data set {dataset.name} has no {split} split.")
    if not stored.fingerprint:
        return dataset.only(name)
    record.refuse_other_rule(stored, dataset, where)
    if not record.same_split(stored, dataset, name) and not allow_changes:
        remedy = "bring the old one back, or evaluate what is there with --allow-changes."
        raise DataError(record.changed_sentence(dataset.name, stored, dataset, where, remedy))
    if found := record.differences(stored, dataset):
        kept = f"; {name} is as it was" if record.same_split(stored, dataset, name) else ""
        log.warning("data %s: since %s %s%s", dataset.name, where, "; ".join(found), kept)
    followed = follow_classes(dataset, stored.class_names or dataset.class_names, extend=False)
    count, known = len(getattr(dataset, name)), len(getattr(followed, name))
    if known < count:
        left_out = f"{count - known:,} of {count:,} examples of {name} are of classes that the run does not know"
        if not known or not allow_changes:
            raise DataError(
                f"{left_out}; bring back the classes that there were, or leave those out with --allow-changes."
            )
        log.warning("%s, and are left out", left_out)
    return followed.only(name)


def _as_trained(config: Config, dataset: Dataset, position: Position) -> tuple[Config, Dataset]:
    """Both with what the run had from its data set when it trained: image size, number of classes, normalization."""
    stored = position.dataset
    if not stored.mean:
        return config, dataset
    data = dataclasses.replace(config.data, image_size=stored.image_size)
    model = dataclasses.replace(config.model, num_classes=stored.num_classes)
    dataset = dataclasses.replace(dataset, mean=stored.mean, std=stored.std)
    return dataclasses.replace(config, data=data, model=model), dataset
