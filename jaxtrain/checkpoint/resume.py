"""Decides whether a run may resume from a checkpoint, and moves away the files that it would overwrite."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxtrain.checkpoint import config_changes
from jaxtrain.checkpoint.manifest import best_of, discard_unfinished, later_folders, manifested_steps
from jaxtrain.checkpoint.resume_point import CheckpointStep, Position, ResumePoint, find_resume_point, readable
from jaxtrain.config import Config, to_dict
from jaxtrain.data.base import Dataset, follow_classes
from jaxtrain.data.record import changed_sentence, differences, refuse_other_rule, same_split
from jaxtrain.distributed import coordination
from jaxtrain.errors import DataError, WorkdirError
from jaxtrain.host.files import move, writing
from jaxtrain.optim.schedules import make_schedule
from jaxtrain.workdir import Workdir

log = logging.getLogger("jaxtrain")


def refuse_changes(directory: Workdir, resume: ResumePoint, config: Config) -> None:
    """Refuses settings that change the run's numbers. `refuse_length` checks its length, which needs the data set.

    Args:
      directory: the work directory.
      resume: where the run starts, with the stored config.
      config: of this run.

    Raises:
      WorkdirError: `config` differs from the stored one in such a setting.
    """
    if resume.stored is None or config.checkpoint.allow_changes:
        return
    changes = config_changes.changes(to_dict(resume.stored), to_dict(config))
    if not resume.position.dataset.fingerprint:  # then nothing tells whether another folder holds the same
        changes = [dataclasses.replace(c, kind="numbers") if c.key == "data.name" else c for c in changes]
    refused = config_changes.refused(changes, same_rates=True)
    if refused:
        raise _refusal(directory, resume, refused)


def refuse_length(directory: Workdir, resume: ResumePoint, config: Config, train_examples: int) -> None:
    """Refuses another length of the run, with which an earlier step would have had another learning rate.

    Args:
      directory: the work directory.
      resume: where the run starts, with the stored config.
      config: of this run.
      train_examples: how many the data set has.

    Raises:
      WorkdirError: the learning rate of an earlier step would differ.
    """
    if resume.stored is None or config.checkpoint.allow_changes:
        return
    changes = [c for c in config_changes.changes(to_dict(resume.stored), to_dict(config)) if c.kind == "length"]
    if not changes:
        return
    position = resume.position
    steps = np.arange(position.step)
    old, new = (
        np.asarray(make_schedule(c, train_examples, position.step, position.examples)(steps))
        for c in (resume.stored, config)
    )
    refused = config_changes.refused(changes, same_rates=np.array_equal(old, new))
    if refused:
        raise _refusal(directory, resume, refused)


def refuse_other_data(directory: Workdir, resume: ResumePoint, config: Config, dataset: Dataset) -> None:
    """Refuses a data set that has changed since the checkpoint was made.

    Args:
      directory: the work directory.
      resume: where the run starts, with the record of the data set.
      config: of this run; `checkpoint.allow_changes` allows it.
      dataset: as it is loaded now.

    Raises:
      DataError: the data set has changed, or is split by another rule.
    """
    stored, run = resume.position.dataset, resume.start.directory.parent if resume.start else directory.path
    if not stored.fingerprint:
        return
    where = f"step {resume.position.step} of {run}"
    # Else the weights are from another data set.
    if resume.stored is not None and config_changes.may_be_one_data_set(resume.stored.data.name, config.data.name):
        refuse_other_rule(stored, dataset, where)
    if stored.fingerprint == dataset.fingerprint or config.checkpoint.allow_changes:
        return
    remedy = "bring the old one back, choose another --workdir, or go on with --config.checkpoint.allow_changes=true."
    raise DataError(changed_sentence(config.data.name, stored, dataset, where, remedy))


def go_on_with(dataset: Dataset, resume: ResumePoint, config: Config) -> tuple[Dataset, ResumePoint]:
    """Adapts the data set to the run, and the run's position to the data set.

    If the training examples have changed, the epoch's sums and the rows of epochs start again: a mean over two data sets
    would be of neither. The best figure is that on the validation examples that the run takes now.

    Args:
      dataset: as it is loaded now.
      resume: where the run resumes, with the config that is stored there.
      config: of this run.

    Returns:
      The data set, its classes numbered as in the run; and the resume point with its new position.

    Raises:
      DataError: the run has fewer outputs than there are classes now.
    """
    position = resume.position
    stored = position.dataset
    if not set(stored.class_names).isdisjoint(dataset.class_names):
        followed = follow_classes(dataset, stored.class_names, extend=True)
        for note in followed.notes[len(dataset.notes) :]:
            log.warning("data %s: %s", dataset.name, note)
        dataset = followed
        if (outputs := stored.num_classes) < dataset.num_classes and not config.model.num_classes:
            raise DataError(
                f"The data set {dataset.name} has {dataset.num_classes} classes and the run {outputs} outputs, one for each "
                "class that there was; leave out the new ones, or start a fresh run with another --workdir."
            )
    if changed := differences(stored, dataset):
        log.warning("data %s: since step %d %s", dataset.name, position.step, "; ".join(changed))
    if stored.fingerprint and not same_split(stored, dataset, "train"):
        log.warning("the rows of metrics.csv begin anew: its epochs are of other training examples")
        position = dataclasses.replace(
            position, epoch_loss=0.0, epoch_correct=0.0, epoch_examples=0, data_since=position.step
        )
    return dataset, dataclasses.replace(resume, position=_with_best(position, dataset, resume, config))


def _with_best(position: Position, dataset: Dataset, resume: ResumePoint, config: Config) -> Position:
    """The position with the best figure so far by `checkpoint.best`, None where it was on other validation examples.

    The arguments are those of `go_on_with`.
    """
    stored, by = position.dataset, config.checkpoint.best
    before, now = (stored.part("validation", each.train.eval_examples) for each in (resume.stored or config, config))
    if before != now or (stored.fingerprint and not same_split(stored, dataset, "validation")):
        return dataclasses.replace(position, best=None)
    if resume.start is None or position.best is None or position.best_by == by:
        return position
    steps = manifested_steps(resume.start.directory)
    manifests = readable(resume.start.directory, [step for step in steps if step <= resume.start.step])
    best = next((getattr(m, by) for m in manifests if m.step == best_of(manifests, by)), None)
    return dataclasses.replace(position, best=best, best_by=by)


def warn_of_other_products(resume: ResumePoint, config: Config, platform: str) -> None:
    """Warns where the products of f32 are computed otherwise than until now.

    Args:
      resume: where the run resumes.
      config: of this run.
      platform: of its devices.
    """
    precisions = {each.train.precision for each in (config, resume.stored) if each}
    if resume.schema > 1 or platform != "gpu" or precisions != {"f32"}:
        return
    log.warning(
        "step %d is of an older version, which rounded the products of f32 to TF32 on GPUs that have it; they are exact from "
        "here on, and slower; for TF32 as before: --config.train.precision=tf32 --config.checkpoint.allow_changes=true",
        resume.position.step,
    )


def _refusal(directory: Workdir, resume: ResumePoint, refused: list[config_changes.Change]) -> WorkdirError:
    if resume.start is None or _is_of_this_run(directory, resume.start):
        return WorkdirError(config_changes.refuse_text(directory.path, refused))
    checkpoint = resume.start.directory / str(resume.start.step)
    return WorkdirError(config_changes.refuse_text(checkpoint, refused, foreign=True))


def set_aside(
    directory: Workdir, resume: ResumePoint, config: Config, steps: int, this_start: Path | None = None
) -> None:
    """Moves the files that this run would overwrite to `superseded/<time>/`. Only process 0 may call it.

    These are later checkpoints, with copies of the metrics, and the result of a shorter run. A run with another history (a
    fresh one, with `checkpoint.resume=none`, or one from another directory's checkpoint) moves everything. One that goes on
    with other data copies its metrics. Nothing is lost: the files can be moved back. Incomplete checkpoints are deleted.

    Args:
      directory: the work directory.
      resume: where this run starts.
      config: of this run.
      steps: the length of this run.
      this_start: the file with the times of this start, which stays.
    """
    discard_unfinished(directory.checkpoints)
    folder = _new_folder(directory.path / "superseded" / time.strftime("%Y%m%d-%H%M%S"))
    metrics = [path for path in (directory.metrics_csv, directory.metrics_jsonl) if path.exists()]
    step = resume.position.step
    if _is_another_history(directory, resume, config):
        everything = (
            directory.config,
            directory.dataset,
            *metrics,
            directory.tensorboard,
            directory.result,
            directory.sinks,
            *_own_starts(directory, this_start),
            directory.checkpoints,
        )
        copied, moved = [], [path for path in everything if path.exists()]
    else:
        moved = later_folders(directory.checkpoints, step)
        copied = metrics if moved or resume.position.data_since == step > 0 else []
        # A script that waits for the result must not see the old one while the run goes on.
        moved += [directory.result] if step < steps and directory.result.exists() else []
    if not (copied or moved):
        return
    with writing(folder):
        folder.mkdir(parents=True)
        # Copies first: after a kill in between, the later steps are still here, and the next start does this again.
        for path in copied:
            shutil.copy2(path, folder)
        for path in moved:
            to = folder / path.relative_to(directory.path)
            to.parent.mkdir(exist_ok=True)
            move(path, to)  # a linked directory may be on another disk
    if moved == [directory.result]:
        log.info(
            "this run goes on after its last step, %d; the result of the shorter run was moved to %s", step, folder
        )
    elif moved:
        log.warning("What this directory held after step %d was moved to %s; move it back to undo this.", step, folder)
    else:
        log.warning("The metrics up to step %d were copied to %s.", step, folder)


def _own_starts(directory: Workdir, this_start: Path | None) -> list[Path]:
    """The files of earlier starts; none where their folder is a link: it may be another run's too."""
    if directory.starts.is_symlink():
        return []
    return [path for path in directory.starts.glob("*.json") if path != this_start]


def _is_another_history(directory: Workdir, resume: ResumePoint, config: Config) -> bool:
    if resume.start is None:
        return config.checkpoint.resume == "none"
    return not _is_of_this_run(directory, resume.start)


def _is_of_this_run(directory: Workdir, start: CheckpointStep) -> bool:
    return directory.checkpoints.exists() and directory.checkpoints.samefile(start.directory)


def _new_folder(path: Path) -> Path:
    """`path`, or the first of `path`-2, `path`-3, ... that does not exist: two starts may be within a second."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists())


# ------------------------------------------------------------------------------------------------ the two questions


def where_to_start(
    directory: Workdir, config: Config, resolve: Callable[[Config, Config | None], Config]
) -> tuple[ResumePoint, Config]:
    """Before the data is read: where the run starts, and the config that it goes on with.

    Args:
      directory: the run's.
      config: as the user gave it.
      resolve: fills in what depends on the machine, from the config and the stored one.

    Raises:
      CheckpointError: what `checkpoint.resume` names is not there, or not whole.
      WorkdirError: the config differs from the stored one in what changes the run's numbers.
    """
    resume = find_resume_point(directory, config)
    config = resolve(config, resume.stored)
    refuse_changes(directory, resume, config)
    return resume, config


def may_go_on(directory: Workdir, resume: ResumePoint, config: Config, dataset: Dataset) -> tuple[Dataset, ResumePoint]:
    """Once the data is there: whether the run may go on on it; returns both as `go_on_with` does.

    Raises:
      WorkdirError: another length would have given a step already run another learning rate.
      DataError: the data set holds something else than when the checkpoint was made.
    """
    by, first = config.checkpoint.best, coordination.index() == 0
    if first and resume.stored and resume.start and resume.stored.checkpoint.best != by:
        log.warning(
            "checkpoint.best was %s and is %s: among the checkpoints that are here and those to come, it decides what the best "
            "weights are",
            resume.stored.checkpoint.best,
            by,
        )
    refuse_length(directory, resume, config, len(dataset.train))
    refuse_other_data(directory, resume, config, dataset)
    return go_on_with(dataset, resume, config)
