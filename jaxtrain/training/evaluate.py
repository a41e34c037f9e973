"""Evaluates a finished or running run: `evaluate("runs/r50")`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from jaxtrain.checkpoint.checkpointer import Checkpointer
from jaxtrain.checkpoint.config_changes import may_be_one_data_set
from jaxtrain.checkpoint.manifest import DeletedError, unless_deleted
from jaxtrain.checkpoint.resume_point import Position
from jaxtrain.config import Config, DataConfig, LayoutConfig, flatten, to_dict
from jaxtrain.data import record, registry
from jaxtrain.data.base import Dataset, follow_classes
from jaxtrain.errors import ConfigError, DataError, WeightsError, WorkdirError
from jaxtrain.host import xla_flags
from jaxtrain.host.files import ELSEWHERE, closing
from jaxtrain.observability.progress import Progress
from jaxtrain.observability.text_log import make_console
from jaxtrain.parallel.mesh import Device, batch_ways, make_mesh
from jaxtrain.plugins import refuse_code
from jaxtrain.precision import resolve_precision
from jaxtrain.step.eval_step import EvalResult
from jaxtrain.step.train_state import state_shapes
from jaxtrain.training.compiled import Evaluator
from jaxtrain.training.evaluation_report import EvaluationReport, make_report
from jaxtrain.training.inference import find_stored, for_inference, uses_average
from jaxtrain.training.initial_weights import initial_weights
from jaxtrain.training.input_pipeline import InputPipeline, make_input_pipeline
from jaxtrain.training.jax_settings import compile_cache_note, settings
from jaxtrain.training.setup import RunSpec, check_names, load_data, make_run_spec, resolve_for_machine, select_devices
from jaxtrain.training.trained import output_names
from jaxtrain.training.weights_source import open_source
from jaxtrain.trees import PyTree, path_of
from jaxtrain.workdir import Workdir, named

SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
log = logging.getLogger("jaxtrain")


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluated:
    """The result, and what it is of.

    step: the checkpoint's; 0 of a file. split: `train`, `validation` or `test`. weights: `raw`, `ema` for their moving
    average, or `file` for those of a file.
    class_names: of `result.per_class`. report: where it was asked for.
    """

    result: EvalResult
    step: int
    split: str
    weights: str
    class_names: tuple[str, ...]
    report: EvaluationReport | None = dataclasses.field(default=None, compare=False)

    def __repr__(self) -> str:
        """The result in a line: the classes of a large data set would fill a page."""
        numbers = f"accuracy {self.result.accuracy:.4f}, top-5 {self.result.top5:.4f}, loss {self.result.loss:.4f}"
        return f"Evaluated(step {self.step}, {self.weights} weights, {self.split}: {numbers}, {self.result.examples} examples)"


def evaluate(
    workdir: str | Path,
    split: str = "test",
    *,
    data: str | Path = "",
    checkpoint: str = "best",
    ema: bool | None = None,
    num_devices: int = 0,
    allow_changes: bool = False,
    trust: bool = False,
    quiet: bool = False,
    tta: str = "",
    report: bool = False,
) -> Evaluated:
    """Evaluates a checkpoint of the run in `workdir`, with the layout that fits these devices.

    Classes are those of the run, by their names; of the data set only this split is read, and it must hold what it held.

    Args:
      workdir: the run's work directory.
      split: `train`, `val` or `test`.
      data: the directory where the run's data is now; or another data set with the same classes: a directory of images,
        or a name as `data.name`. A folder without splits is then evaluated as a whole. "" is where it was.
      checkpoint: `best`, `latest`, a step, `epoch:N` or a path.
      ema: whether to take the moving average of the weights; None: where the run keeps one, since the best checkpoint is
        chosen by it.
      num_devices: use the first so many devices of each host; 0 uses all.
      allow_changes: evaluate on a data set that has changed since, and say what has.
      trust: run the code that the run's config names (a model, optimizer, loss or data set of the user's own).
      quiet: show no bar.
      tta: test-time augmentation: `flip` takes the mean of the probabilities of each image and of its mirror image.
      report: also find the confusion matrix, the calibration and the examples with the highest loss.

    Raises:
      CheckpointError: the run has no such checkpoint. ConfigError: no such split, the run keeps no average, or its config names
        code and `trust` is not set.
      DataError: the split does not hold what it held when the checkpoint was made, or `data` has other classes.
    """
    check_question(split, tta)
    how = (num_devices, allow_changes, trust, quiet, tta, report)
    while True:
        try:
            return _evaluate(named(workdir), split, str(data), checkpoint, ema, *how)
        except DeletedError as error:  # its run goes on meanwhile, and has another
            log.warning("%s", error)


def _evaluate(
    workdir: Path,
    split: str,
    data: str,
    checkpoint: str,
    ema: bool | None,
    num_devices: int,
    allow_changes: bool,
    trust: bool,
    quiet: bool,
    tta: str,
    report: bool,
) -> Evaluated:
    """As `evaluate`, once: `DeletedError` where the run deletes the checkpoint meanwhile."""
    start, position, config = find_stored(workdir, checkpoint)
    config = dataclasses.replace(config, data=_where_it_was(config.data, workdir))
    folder = start.directory / str(start.step)
    place = registry.found_at(config.data, data) if data else config.data
    if not trust:
        not_run = {"callbacks.names": ()} | ({"data.name": ""} if place.name != config.data.name else {})
        refuse_code(flatten(to_dict(config)) | not_run, folder)
    config = dataclasses.replace(config, data=place)
    average = uses_average(workdir, config, ema)
    xla_flags.set_flags(xla_flags.for_run(config.train.precision))
    showing = contextlib.closing(Progress(make_console(quiet=quiet)))
    with showing as progress, closing(Checkpointer(start.directory, read_only=True)) as checkpoints:
        devices = select_devices(num_devices)
        config = _on_these(devices, config)
        with settings(config):
            where = f"step {start.step} of {workdir}"
            with progress.activity(f"reading the data set {config.data.name}"):
                dataset = _load(config.data, position, split, bool(data), where, allow_changes)
            run = make_run_spec(*_as_trained(config, dataset, position), devices)
            with unless_deleted(folder):
                state = checkpoints.restore_weights(start.step, state_shapes(run.init, run.layout))
            feed = make_input_pipeline(dataset, run.layout, config.data.residency, config.data.workers)
            weights = state.ema if average else {"params": state.params, "batch_stats": state.batch_stats}
            result, made = _shown(run, feed, SPLITS[split], weights, progress, tta, report)
    return Evaluated(result, start.step, SPLITS[split], "ema" if average else "raw", dataset.class_names, made)


def evaluate_weights(
    config: Config,
    split: str = "test",
    *,
    num_devices: int = 0,
    quiet: bool = False,
    tta: str = "",
    report: bool = False,
) -> Evaluated:
    """Evaluates the weights of `config.model.init_from` on `config.data`, without a run.

    Classes are matched by their names where the file has the same ones as the data; else output k is the data's class k.

    Args:
      config: as for a run.
      split: as of `evaluate`; so are the others.
      num_devices: how many devices of each host.
      quiet: show no bar.
      tta: test-time augmentation.
      report: also find what a report has.

    Raises:
      ConfigError: no such split, or the config names no weights. WeightsError: these do not fit the model, or have no head
        for so many classes. DataError: the data set cannot be read.
    """
    check_question(split, tta)
    if not config.model.init_from:
        raise ConfigError("config.model.init_from='': name the weights to evaluate, or a run: jaxtrain evaluate RUN.")
    check_names(config)
    xla_flags.set_flags(xla_flags.for_run(resolve_precision(config.train.precision, jax.default_backend())))
    with contextlib.closing(Progress(make_console(quiet=quiet))) as progress, settings(config):
        devices = select_devices(num_devices)
        config = _on_these(devices, resolve_for_machine(for_inference(config, LayoutConfig(zero=3)), None, devices))
        with progress.activity(f"reading the data set {config.data.name}"):
            dataset = _split_with_known_classes(config, split)
        run = make_run_spec(config, dataset, devices)
        shapes = state_shapes(run.init, run.layout)
        given, found = initial_weights(run, shapes)
        if found["new"]:
            raise WeightsError(
                f"{found['file']}: {next(iter(found['new'].values()))}, so that there is nothing to evaluate."
            )
        trees = {"params": shapes.params, "batch_stats": shapes.batch_stats}
        weights = jax.tree.map_with_path(lambda path, _: given[path_of(path)], trees)
        feed = make_input_pipeline(dataset, run.layout, config.data.residency, config.data.workers)
        result, made = _shown(run, feed, SPLITS[split], weights, progress, tta, report)
    return Evaluated(result, 0, SPLITS[split], "file", dataset.class_names, made)


def _split_with_known_classes(config: Config, split: str) -> Dataset:
    """The split, with its classes in the order of the weights' outputs where these have the same names."""
    name = SPLITS[split]
    dataset = load_data(config.data, name)
    if not len(getattr(dataset, name)):
        raise ConfigError(f"The data set {dataset.name} has no {split} split.")
    with open_source(config.model.init_from) as source:
        known = source.config().class_names
    if set(known) == set(dataset.class_names):
        dataset = follow_classes(dataset, known, extend=False)
    elif known:
        log.warning(
            "the classes of %s have other names than those of the data: they are matched by number",
            config.model.init_from,
        )
    return dataset.only(name)


def check_question(split: str, tta: str) -> None:
    """Raises `ConfigError` for a split or a test-time augmentation that there is not."""
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}: must be one of train, val, test.")
    if tta not in ("", "flip"):
        raise ConfigError(f"tta={tta!r}: must be flip, or '' for none.")


def _on_these(devices: Sequence[Device], config: Config) -> Config:
    """The run's config for an evaluation: weights shared out among the devices, and a batch that they divide.

    Numbers do not depend on the layout.
    """
    config = for_inference(config, LayoutConfig(zero=3))
    ways = batch_ways(make_mesh(config.layout, devices))
    batch = -(-config.data.global_batch // ways) * ways
    return dataclasses.replace(config, data=dataclasses.replace(config.data, global_batch=batch))


def _shown(
    run: RunSpec,
    feed: InputPipeline,
    split: str,
    weights: Mapping[str, PyTree],
    progress: Progress,
    tta: str,
    report: bool,
) -> tuple[EvalResult, EvaluationReport | None]:
    """Evaluates weights on a split, with a bar over its batches; until the first one comes, the program is compiled."""
    with progress.activity("compiling the evaluation", note=compile_cache_note()) as activity:

        def before_batch() -> None:
            if not activity.total:
                activity.what, activity.total = split, run.num_evaluation_batches(split)
                activity.began = time.monotonic()
            activity.done += 1

        evaluator, arguments = Evaluator(run, feed), (split, weights["params"], weights["batch_stats"], before_batch)
        if not (tta or report):
            return evaluator(*arguments), None
        result, answers = evaluator.answers(*arguments, flip=tta == "flip")
    if not report:
        return result, None
    names = output_names(run.dataset.class_names, len(result.per_class))
    return result, make_report(result, answers, names, getattr(run.dataset, split))


def _where_it_was(config: DataConfig, workdir: Path) -> DataConfig:
    """`config` with the place of the data at the run's latest start: the folder may have moved since a checkpoint."""
    latest = (Workdir(workdir).read_config() or {}).get("data", {})
    if not isinstance(latest, dict):
        raise WorkdirError(f"{Workdir(workdir).config} is damaged (its data is {latest!r}); {ELSEWHERE}.")
    name = latest.get("name", config.name)
    if not may_be_one_data_set(name, config.name):
        return config
    return dataclasses.replace(config, name=name, dir=latest.get("dir", config.dir))


def _load(config: DataConfig, position: Position, split: str, named: bool, where: str, allow_changes: bool) -> Dataset:
    """The split of a data set.

    named: the user has named it, and it may be another than the run's. The other arguments are those of `_same_data`.
    """
    stored, name = position.dataset, SPLITS[split]
    if not named:
        return _same_data(load_data(config, name, stored.drawn), position, split, where, allow_changes)
    config = dataclasses.replace(config, image_size=stored.image_size or config.image_size)
    try:
        dataset = load_data(config, name, stored.drawn)
    except ConfigError:
        if not config.splits:
            raise
        config = dataclasses.replace(config, splits="")  # another's have other names
        dataset = load_data(config, name, stored.drawn)
    known = not stored.fingerprint or any(record.same_split(stored, dataset, each) for each in SPLITS.values())
    if known:
        return _same_data(dataset, position, split, where, allow_changes)
    if dataset.drawn and registry.undivided(dataset) is None:
        dataset = load_data(config, name, ())  # only the run's own data is split as the run has split it
    return _other_data(dataset, position, split, where, allow_changes)


def _other_data(dataset: Dataset, position: Position, split: str, where: str, allow_changes: bool) -> Dataset:
    """The split of a data set that is not the run's, with the classes as the run knows them.

    Args:
      dataset: another data set than the run's.
      position: the run's.
      split: `train`, `val` or `test`.
      where: names the run in errors.
      allow_changes: whether to leave out the examples of classes that the run does not know.

    Raises:
      ConfigError: there is no such split.
      DataError: it has classes that the run does not know, or images of another kind.
    """
    stored, name = position.dataset, SPLITS[split]
    whole = registry.undivided(dataset)
    if whole is not None:
        dataset = dataclasses.replace(dataset, **{name: whole})
    count = len(getattr(dataset, name))
    if not count:
        there = (
            ", ".join(each for each in SPLITS if each != "validation" and len(getattr(dataset, SPLITS[each]))) or "none"
        )
        raise ConfigError(f"The data set {dataset.name} has no {split} split; of train, val and test it has {there}.")
    if (channels := getattr(dataset, name).shape[2]) != len(stored.mean):
        raise DataError(
            f"The data set {dataset.name} has images of {channels} channel{'s' * (channels > 1)}, and {where} was trained on "
            f"images of {len(stored.mean)}."
        )
    unknown = [each for each in dataset.class_names if each not in stored.class_names]
    missing = [each for each in stored.class_names if each not in dataset.class_names]
    if not dataset.class_names or len(unknown) == len(dataset.class_names) or (unknown and not allow_changes):
        raise DataError(
            f"The data set {dataset.name} has classes that {where} does not know: {_names(unknown)} (of the run's, it lacks "
            f"{_names(missing)}); they are matched by their names, so rename or remove them"
            + (", or leave them out with --allow-changes." if len(unknown) < len(dataset.class_names) else ".")
        )
    followed = follow_classes(dataset, stored.class_names, extend=False).only(name)
    known = len(getattr(followed, name))
    log.warning(
        "data %s: not the data of %s; evaluated are %s examples of %s%s",
        dataset.name,
        where,
        f"the {count:,}" if known == count else f"{known:,} of the {count:,}",
        "the whole folder" if whole is not None else f"its {name}",
        f", which has no class {_names(missing)}" if missing else "",
    )
    return followed


def _names(classes: Sequence[str]) -> str:
    return (", ".join(map(repr, classes[:5])) + f" and {len(classes) - 5} more" * (len(classes) > 5)) or "none"


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
