"""Where a run starts: a checkpoint of its own, another's, or nothing; and whether its config may go on from there."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain import workdir as workdir_lib
from jaxtrain.checkpoint import Start, find_start, names_path
from jaxtrain.checkpoint_files import discard_unfinished, manifested_steps, problems, quarantine, read_manifest
from jaxtrain.config import Config, from_dict
from jaxtrain.data.base import Dataset, follow_classes
from jaxtrain.data.record import changed_sentence, differences, refuse_other_rule, same_split
from jaxtrain.distributed import processes
from jaxtrain.distributed.place import jobs
from jaxtrain.errors import CheckpointError, ConfigError, DataError, WorkdirError
from jaxtrain.run import make_schedule
from jaxtrain.workdir import Workdir

log = logging.getLogger("jaxtrain")


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run has come.

    examples: consumed so far. epoch_*: sums since the epoch began. best_accuracy: so far, or -1. owes_validation: the run
    was stopped before the validation that is due after this step. dataset: what is remembered of the data set (`data.record`);
    of a run that is older than that its `fingerprint` alone. data_since: the step after which the run has trained on it.
    jobs: what names the job that came so far (`place.jobs`).
    """

    step: int = 0
    examples: int = 0
    epoch_loss: float = 0.0
    epoch_correct: float = 0.0
    epoch_examples: int = 0
    best_accuracy: float = -1.0
    owes_validation: bool = False
    dataset: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data_since: int = 0
    jobs: tuple[str, ...] = ()

    def to_json(self, config: dict[str, Any]) -> dict[str, Any]:
        """As stored in a checkpoint, with the config of the run beside it."""
        return dataclasses.asdict(self) | {"config": config}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Position:
        """The inverse of `to_json`."""
        if values.get("data"):  # a checkpoint that is older than `dataset`
            values = {**values, "dataset": {"fingerprint": values["data"]}}
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})


@dataclasses.dataclass(frozen=True)
class Resume:
    """What a run goes on from. start: `None` for a fresh run. stored: the config there, if any."""

    start: Start | None
    position: Position
    stored: Config | None


def find(directory: Workdir, config: Config) -> Resume:
    """Looks for what `checkpoint.resume` names, and checks its files; of several processes each checks a part.

    A job that is started again by itself goes on from what it has saved, wherever it began (`_wanted`). A damaged checkpoint
    of this directory is moved to `corrupt/` and the next older one is taken, where the step was not
    chosen by number. Raises `CheckpointError` when nothing is there, or nothing whole.
    """
    wanted = _wanted(directory, config.checkpoint.resume)
    start = find_start(directory.checkpoints, wanted)
    while start is not None and (found := _damage(start)):
        start = _without(directory, wanted, start, found)
    if start is None:
        values = directory.read_config() if wanted != "none" else None
        return Resume(None, Position(), _stored(values, directory.config) if values else None)
    folder = start.directory / str(start.step)
    values = read_manifest(folder).position
    return Resume(start, Position.from_json(values), _stored(values["config"], folder))


_VERIFY_SECONDS = 1800.0


def _wanted(directory: Workdir, resume: str) -> str:
    """`checkpoint.resume`, but `auto` where that was only where this directory's own run began.

    That is: its newest checkpoint is of this very job, which a launcher or Slurm has started again, or of a run that began at
    the same path. Else each restart would throw away what the one before it has done.
    """
    steps = manifested_steps(directory.checkpoints)
    if resume == "auto" or not steps:
        return resume
    try:
        made = read_manifest(directory.checkpoints / str(steps[-1])).position
    except CheckpointError:
        return resume
    same_job = not jobs(again=True).isdisjoint(Position.from_json(made).jobs)
    same_path = names_path(resume) and made["config"]["checkpoint"]["resume"] == resume
    if not (same_job or same_path):
        return resume
    text = (
        "this run began at checkpoint.resume=%s and goes on from step %d; choose another --workdir to begin there again"
    )
    log.info(text, resume, steps[-1])
    return "auto"


def how_to_go_on(config: Config) -> str:
    """What to do after a stop: a command that names where to begin would begin there again."""
    resume = config.checkpoint.resume
    if resume == "auto" or names_path(resume):
        return "the same command goes on from there"
    return f"--config.checkpoint.resume=auto instead of {resume} goes on from there"


def _damage(start: Start) -> list[str]:
    """What is wrong with a checkpoint's files, as all processes have found together."""
    own = problems(start.directory / str(start.step), (processes.index(), processes.count()))
    said = processes.from_all(processes.next_word("verify"), json.dumps(own), _VERIFY_SECONDS)
    return sorted({problem for text in said for problem in json.loads(text)})


def _without(directory: Workdir, wanted: str, start: Start, found: list[str]) -> Start:
    """The next older checkpoint, after process 0 has moved the damaged one away."""
    folder = start.directory / str(start.step)
    text = f"{folder} is damaged ({found[0]}" + (f", and {len(found) - 1} more" if len(found) > 1 else "") + ")"
    others = [step for step in manifested_steps(directory.checkpoints) if step != start.step]
    by_rule = wanted in ("auto", "latest", "best")
    if not by_rule or not others:
        advice = "choose another with --config.checkpoint.resume" if others else "no other one is there"
        raise CheckpointError(f"{text}; {advice}, or start again with --config.checkpoint.resume=none.")

    def move() -> None:
        log.error("%s; it was moved to %s, and an older one is used.", text, quarantine(folder, found))

    processes.first_on_process_zero("quarantine", move, _VERIFY_SECONDS)
    try:
        older = find_start(directory.checkpoints, wanted)
    except CheckpointError:  # the best one was damaged, and no other was evaluated
        older = find_start(directory.checkpoints, "latest")
    assert older is not None
    return older


def _stored(values: dict[str, Any], path: Path) -> Config:
    try:
        return from_dict(values)
    except ConfigError as error:
        raise WorkdirError(
            f"{path} is damaged, or of another version of jaxtrain ({error}); choose another --workdir."
        ) from error


def refuse_changes(directory: Workdir, resume: Resume, config: Config) -> None:
    """Raises `WorkdirError` where `config` differs from the stored one in what changes the numbers of the run.

    The run's length is not looked at here: `refuse_length` needs the data set.
    """
    if resume.stored is None or config.checkpoint.allow_changes:
        return
    found = workdir_lib.changes(_plain(resume.stored), _plain(config))
    refused = workdir_lib.refused(found, same_rates=True)
    if refused:
        raise _refusal(directory, resume, refused)


def refuse_length(directory: Workdir, resume: Resume, config: Config, train_examples: int) -> None:
    """Raises `WorkdirError` where another length of the run would have given a step already run another learning rate."""
    if resume.stored is None or config.checkpoint.allow_changes:
        return
    found = [c for c in workdir_lib.changes(_plain(resume.stored), _plain(config)) if c.kind == "length"]
    if not found:
        return
    position = resume.position
    steps = np.arange(position.step)
    old, new = (
        np.asarray(make_schedule(c, train_examples, position.step, position.examples)(steps))
        for c in (resume.stored, config)
    )
    refused = workdir_lib.refused(found, same_rates=np.array_equal(old, new))
    if refused:
        raise _refusal(directory, resume, refused)


def refuse_other_data(directory: Workdir, resume: Resume, config: Config, dataset: Dataset) -> None:
    """Raises `DataError` where the data set holds something else than when the checkpoint was made."""
    stored, run = resume.position.dataset, resume.start.directory.parent if resume.start else directory.path
    if not stored:
        return
    where = f"step {resume.position.step} of {run}"
    if resume.stored is not None and resume.stored.data.name == config.data.name:  # else weights from another data set
        refuse_other_rule(stored, dataset, where)
    if stored["fingerprint"] == dataset.fingerprint or config.checkpoint.allow_changes:
        return
    remedy = "bring the old one back, choose another --workdir, or go on with --config.checkpoint.allow_changes=true."
    raise DataError(changed_sentence(config.data.name, stored, dataset, where, remedy))


def go_on_with(dataset: Dataset, resume: Resume, num_classes: int) -> tuple[Dataset, Resume]:
    """The data set with its classes numbered as the run knows them, and where it goes on on it.

    On other training examples than before, the epoch's sums and the rows of epochs begin anew: a mean over two data sets
    would be of neither. On other validation examples the best accuracy does.

    num_classes: `model.num_classes`. Raises `DataError` where the run has too few outputs for the classes.
    """
    position = resume.position
    stored = position.dataset
    if not set(stored.get("class_names", ())).isdisjoint(dataset.class_names):
        followed = follow_classes(dataset, stored["class_names"], extend=True)
        for note in followed.notes[len(dataset.notes) :]:
            log.warning("data %s: %s", dataset.name, note)
        dataset = followed
        if (outputs := stored["num_classes"]) < dataset.num_classes and not num_classes:
            raise DataError(
                f"The data set {dataset.name} has {dataset.num_classes} classes and the run {outputs} outputs, one for each "
                "class that there was; leave out the new ones, or start a fresh run with another --workdir."
            )
    if found := differences(stored, dataset):
        log.warning("data %s: since step %d %s", dataset.name, position.step, "; ".join(found))
    if stored and not same_split(stored, dataset, "train"):
        log.warning("the rows of metrics.csv begin anew: its epochs are of other training examples")
        position = dataclasses.replace(
            position, epoch_loss=0.0, epoch_correct=0.0, epoch_examples=0, data_since=position.step
        )
    if stored and not same_split(stored, dataset, "validation"):
        position = dataclasses.replace(position, best_accuracy=-1.0)
    return dataset, dataclasses.replace(resume, position=position)


def _refusal(directory: Workdir, resume: Resume, refused: list[workdir_lib.Change]) -> WorkdirError:
    if resume.start is None or _is_own(directory, resume.start):
        return WorkdirError(workdir_lib.refuse_text(directory.path, refused))
    checkpoint = resume.start.directory / str(resume.start.step)
    return WorkdirError(workdir_lib.refuse_text(checkpoint, refused, foreign=True))


def set_aside(directory: Workdir, resume: Resume, config: Config, steps: int, this_start: Path | None = None) -> None:
    """Moves what a run that starts here would overwrite to `superseded/<time>/`: later checkpoints, and copies of the metrics;
    and the result of a shorter run. steps: the length of this one. this_start: its file of times, which stays.

    A run with another history (fresh, with `checkpoint.resume=none`, or another directory's) moves everything; one that goes
    on on other data leaves a copy of its metrics. Nothing is lost: move it back to undo this. Only process 0 may call it.
    What a killed run left unfinished is deleted.
    """
    discard_unfinished(directory.checkpoints)
    folder = _new_folder(directory.path / "superseded" / time.strftime("%Y%m%d-%H%M%S"))
    metrics = [path for path in (directory.metrics_csv, directory.metrics_jsonl) if path.exists()]
    step = resume.position.step
    if _is_another_history(directory, resume, config):
        own = (
            directory.config,
            directory.dataset,
            *metrics,
            directory.tensorboard,
            directory.result,
            *(path for path in directory.starts.glob("*.json") if path != this_start),
            directory.checkpoints,
        )
        copied, moved = [], [path for path in own if path.exists()]
    else:
        later = [saved for saved in manifested_steps(directory.checkpoints) if saved > step]
        moved = [directory.checkpoints / str(saved) for saved in later]
        copied = metrics if moved or resume.position.data_since == step > 0 else []
        # Who waits for the result must not see the old one while the run goes on.
        moved += [directory.result] if step < steps and directory.result.exists() else []
    if not (copied or moved):
        return
    folder.mkdir(parents=True)
    # Copies first: a kill in between must leave the later steps here, so that the next start comes by again.
    for path in copied:
        shutil.copy2(path, folder)
    for path in moved:
        to = folder / path.relative_to(directory.path)
        to.parent.mkdir(exist_ok=True)
        shutil.move(path, to)  # a linked directory may be on another disk
    if moved:
        log.warning("What this directory held after step %d was moved to %s; move it back to undo this.", step, folder)
    else:
        log.warning("The metrics up to step %d were copied to %s.", step, folder)


def _is_another_history(directory: Workdir, resume: Resume, config: Config) -> bool:
    if resume.start is None:
        return config.checkpoint.resume == "none"
    return not _is_own(directory, resume.start)


def _is_own(directory: Workdir, start: Start) -> bool:
    return directory.checkpoints.exists() and directory.checkpoints.samefile(start.directory)


def _new_folder(path: Path) -> Path:
    """`path`, or the first of `path`-2, `path`-3, ... that is not there: two starts within a second."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists())


def _plain(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)
