"""Finds where a run starts: its own last checkpoint, another checkpoint, or nothing."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.checkpoint.manifest import (
    SCHEMA,
    DeletedError,
    Manifest,
    best_of,
    is_complete,
    manifested_steps,
    problems,
    quarantine,
    read_manifest,
    step_of,
    unless_deleted,
)
from jaxtrain.config import Config, from_dict
from jaxtrain.data.record import DatasetRecord
from jaxtrain.distributed import coordination
from jaxtrain.distributed.cluster import job_ids
from jaxtrain.errors import CheckpointError, ConfigError, UnreadableError, WorkdirError
from jaxtrain.host.paths import require_local
from jaxtrain.workdir import Workdir

log = logging.getLogger("jaxtrain")


@dataclasses.dataclass(frozen=True)
class CheckpointStep:
    """A checkpoint to start from."""

    directory: Path
    """Of checkpoints."""
    step: int


def names_path(resume: str) -> bool:
    """Whether `checkpoint.resume` is a path, and not a rule for the run's own directory."""
    return not re.fullmatch(r"auto|latest|best|none|[0-9]+|epoch:[0-9]{1,18}", resume)


def find_checkpoint(
    directory: Path, resume: str, best_by: str = "", setting: str = "config.checkpoint.resume"
) -> CheckpointStep | None:
    """The checkpoint that `checkpoint.resume` names; None for a fresh run.

    Args:
      directory: the run's checkpoints.
      resume: the value of the setting.
      best_by: which figure decides what the best checkpoint in `directory` is (`checkpoint.best`); "": as its run has stored
        it. In a directory that a path names, the run there decides.
      setting: its name, for the errors.

    Raises:
      CheckpointError: there is no such checkpoint.
      ConfigError: `resume` is neither a rule nor the path of a checkpoint.
    """
    if resume == "none":
        return None
    directory = directory.absolute()
    if not names_path(resume):
        steps = manifested_steps(directory)
        if not steps:
            if resume == "auto":
                return None
            raise CheckpointError(f"{setting}={resume!r}: {directory} holds no checkpoint.")
        return CheckpointStep(directory, _named_step(directory, steps, resume, best_by, setting))
    require_local(resume, f"{setting}={resume!r}", ConfigError)
    return _start_at_path(Path(resume).absolute(), setting)


def _named_step(directory: Path, steps: list[int], resume: str, best_by: str, setting: str) -> int:
    if resume in ("auto", "latest"):
        return steps[-1]
    if re.fullmatch("[0-9]+", resume):
        if (step := step_of(resume.lstrip("0") or "0")) in steps:
            return step
        raise CheckpointError(f"{setting}={resume}: {directory} has only the steps {', '.join(map(str, steps))}.")
    manifests = readable(directory, steps)
    if resume == "best":
        by = best_by or stored_best_by(directory, manifests)
        best = best_of(manifests, by)
        if best is None:
            older = best_of(manifests, "val_accuracy") is not None
            why = f"has a {by}: they were validated by an older version" if older else "was evaluated"
            raise CheckpointError(f"{setting}=best: of the checkpoints in {directory} none {why}.")
        return best
    epoch = int(resume.removeprefix("epoch:"))
    after = [m.step for m in manifests if m.epoch == epoch]
    if not after:
        there = ", ".join(str(m.epoch) for m in manifests if m.epoch >= 0) or "none"
        raise CheckpointError(f"{setting}={resume}: {directory} has checkpoints after epochs {there}.")
    return after[-1]


def readable(directory: Path, steps: list[int]) -> list[Manifest]:
    """The manifests of `steps`; a warning for each that is damaged. One that was deleted meanwhile is left out."""
    manifests = []
    for step in steps:
        try:
            manifests.append(read_manifest(directory / str(step)))
        except UnreadableError:  # who chooses among the others might choose another
            raise
        except CheckpointError as error:
            if is_complete(directory / str(step)):
                log.warning("%s", error)
    return manifests


def stored_best_by(directory: Path, manifests: Sequence[Manifest]) -> str:
    """`checkpoint.best` of the run's last start; of its newest checkpoint, where the work directory holds nothing else.

    directory: of its checkpoints. manifests: theirs, in the order of their steps.
    """
    workdir = Workdir(directory.parent)
    values = workdir.read_config() or (manifests[-1].position["config"] if manifests else {})
    return _stored(values, workdir.path).checkpoint.best


def _start_at_path(path: Path, setting: str) -> CheckpointStep:
    if (step := step_of(path.name)) is not None and step in manifested_steps(path.parent):
        return CheckpointStep(path.parent, step)
    if path.name in ("latest", "best") and (steps := manifested_steps(path.parent)):
        return CheckpointStep(path.parent, _named_step(path.parent, steps, path.name, "", setting))
    if os.path.isfile(path):  # which raises nothing for a name that is too long
        raise ConfigError(
            f"{setting}={str(path)!r}: is a file, and a checkpoint of jaxtrain is a directory; those of other programs "
            "cannot be read."
        )
    for directory in (path, path / "checkpoints"):
        if steps := manifested_steps(directory):
            return CheckpointStep(directory, steps[-1])
    raise ConfigError(
        f"{setting}={str(path)!r}: must be auto, latest, best, a step, epoch:N, none, or the path of a "
        "checkpoint or a work directory that exists."
    )


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0
    """Updates done."""
    examples: int = 0
    """Training examples used."""
    epoch_loss: float = 0.0
    """Sum over the examples of the epoch so far."""
    epoch_correct: float = 0.0
    """Correct answers in the epoch so far."""
    epoch_examples: int = 0
    """Examples of the epoch so far."""
    best: float | None = None
    """The best of all validations, None before the first."""
    best_by: str = "val_accuracy"
    """Which figure `best` is: the value of `checkpoint.best` that decided."""
    owes_validation: bool = False
    """The run was stopped before the validation that is due after this step."""
    dataset: DatasetRecord = dataclasses.field(default_factory=DatasetRecord)
    """What the run has trained on."""
    data_since: int = 0
    """The step after which the run has trained on this data set."""
    jobs: tuple[str, ...] = ()
    """The jobs that brought the run this far (`cluster.job_ids`)."""
    weights: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the run's first weights were taken from (`model.init_from`); empty where they were drawn."""
    callbacks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The state of each callback, by its name, as JSON has it."""
    ending: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Where a callback has asked that the run ends: its name (`by`), the `reason`, and once it has ended, the `step`."""

    @property
    def ended(self) -> bool:
        """Whether a callback has ended the run here."""
        return self.ending.get("step") == self.step

    def after_step(self, step: int, batch: int, loss: float, correct: float, *, skipped: bool) -> Position:
        """The position once update `step` is done, with its batch in the epoch's totals.

        Args:
          step: the update's number.
          batch: examples in its batch.
          loss: their mean loss.
          correct: how many answers were right.
          skipped: the batch was passed over: it is used up, but it updated nothing, and its loss may be infinite.
        """
        moved = dataclasses.replace(self, step=step, examples=self.examples + batch)
        if skipped:
            return moved
        return dataclasses.replace(
            moved,
            epoch_loss=self.epoch_loss + loss * batch,
            epoch_correct=self.epoch_correct + correct,
            epoch_examples=self.epoch_examples + batch,
        )

    def epoch_means(self) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch so far; zeros where every batch of it was passed over."""
        count = max(self.epoch_examples, 1)
        return self.epoch_loss / count, self.epoch_correct / count

    def at_new_epoch(self) -> Position:
        """The same position with the epoch's totals at zero."""
        return dataclasses.replace(self, epoch_loss=0.0, epoch_correct=0.0, epoch_examples=0)

    def to_json(self, config: dict[str, Any]) -> dict[str, Any]:
        """As a checkpoint stores it, together with the run's config."""
        return dataclasses.asdict(self) | {"config": config}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Position:
        """The inverse of `to_json`."""
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
        if (accuracy := values.get("best_accuracy")) is not None and accuracy >= 0:  # of schema 1, where -1 was none
            fields["best"] = accuracy
        if values.get("data"):  # a checkpoint from before `dataset`: the fingerprint alone
            fields["dataset"] = {"fingerprint": values["data"]}
        if "dataset" in fields:
            fields["dataset"] = DatasetRecord.from_json(fields["dataset"])
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """Where a run resumes."""

    start: CheckpointStep | None
    """None for a fresh run."""
    position: Position
    stored: Config | None
    """The config of the checkpoint, or else of the work directory; None if there is none."""
    schema: int = SCHEMA
    """That of the checkpoint's manifest."""


def find_resume_point(directory: Workdir, config: Config) -> ResumePoint:
    """Finds the checkpoint that `checkpoint.resume` names, and checks its files. Several processes divide the reading.

    A job that a launcher or a scheduler has restarted goes on from its own last checkpoint, wherever it began
    (`_effective_resume`). A damaged checkpoint of this directory is moved to `corrupt/`. Then the next older one is used,
    unless the step was chosen by number. One of another run may be deleted while it is read; then that run has a newer one.
    Raises `CheckpointError` if no checkpoint is there, or all are damaged.
    """
    wanted, best_by = _effective_resume(directory, config.checkpoint.resume), config.checkpoint.best
    start = find_checkpoint(directory.checkpoints, wanted, best_by)
    while start is not None and (damage := _damage(start)):
        if _DELETED in damage:
            log.warning("step %d of %s was deleted by its run while it was read", start.step, start.directory)
            start = find_checkpoint(directory.checkpoints, wanted, best_by)
        else:
            start = _next_older(directory, wanted, best_by, start, damage)
    if start is None:
        values = directory.read_config() if wanted != "none" else None
        return ResumePoint(None, Position(), _stored(values, directory.config) if values else None)
    folder = start.directory / str(start.step)
    found = read_manifest(folder)
    return ResumePoint(
        start, Position.from_json(found.position), _stored(found.position["config"], folder), found.schema
    )


_DELETED = "deleted"  # stands for the damage of a checkpoint that is not there any more
_VERIFY_SECONDS = 1800.0  # in which every process must have read its part of the files


def _effective_resume(directory: Workdir, resume: str) -> str:
    """`checkpoint.resume`, or `auto` if this directory's own run began there and has saved something since.

    That is so if the newest checkpoint is of this same job, which a launcher or Slurm has restarted, or of a run that began at
    the same path. Otherwise each restart would discard the work of the start before.
    """
    steps = manifested_steps(directory.checkpoints)
    if resume == "auto" or not steps:
        return resume
    manifests = readable(directory.checkpoints, steps)  # the newest may be damaged: the run's is then that before it
    if not manifests:
        return resume
    position = manifests[-1].position
    same_job = not job_ids(again=True).isdisjoint(Position.from_json(position).jobs)
    same_path = names_path(resume) and position["config"]["checkpoint"]["resume"] == resume
    if not (same_job or same_path):
        return resume
    text = (
        "this run began at checkpoint.resume=%s and goes on from step %d; choose another --workdir to begin there again"
    )
    log.info(text, resume, manifests[-1].step)
    return "auto"


def how_to_go_on(config: Config) -> str:
    """How to continue after a stop, in words. A command that names a start would begin there again."""
    resume = config.checkpoint.resume
    if resume == "auto" or names_path(resume):
        return "the same command goes on from there"
    return f"--config.checkpoint.resume=auto instead of {resume} goes on from there"


def _damage(start: CheckpointStep) -> list[str]:
    """What is wrong with a checkpoint's files, as found by all processes together."""
    folder = start.directory / str(start.step)
    try:
        with unless_deleted(folder):
            mine = problems(folder, (coordination.index(), coordination.count()))
    except DeletedError:
        mine = [_DELETED]
    texts = coordination.allgather_str(coordination.unique_key("verify"), json.dumps(mine), _VERIFY_SECONDS)
    return sorted({problem for text in texts for problem in json.loads(text)})


def _next_older(
    directory: Workdir, wanted: str, best_by: str, start: CheckpointStep, damage: list[str]
) -> CheckpointStep:
    """The next older checkpoint, after process 0 has moved the damaged one away."""
    folder = start.directory / str(start.step)
    text = f"{folder} is damaged ({damage[0]}" + (f", and {len(damage) - 1} more" if len(damage) > 1 else "") + ")"
    others = [step for step in manifested_steps(directory.checkpoints) if step != start.step]
    by_rule = wanted in ("auto", "latest", "best")
    if not by_rule or not others:
        advice = "choose another with --config.checkpoint.resume" if others else "no other one is there"
        raise CheckpointError(f"{text}; {advice}, or start again with --config.checkpoint.resume=none.")

    def move() -> None:
        log.error("%s; it was moved to %s, and an older one is used.", text, quarantine(folder, damage))

    coordination.first_on_process_zero("quarantine", move, _VERIFY_SECONDS)
    try:
        older = find_checkpoint(directory.checkpoints, wanted, best_by)
    except CheckpointError:  # the best one was damaged, and no other was evaluated
        older = find_checkpoint(directory.checkpoints, "latest", best_by)
    assert older is not None
    return older


def _stored(values: dict[str, Any], path: Path) -> Config:
    try:
        return from_dict(values)
    except ConfigError as error:
        raise WorkdirError(
            f"{path} is damaged, or of another version of jaxtrain ({error}); choose another --workdir."
        ) from error
