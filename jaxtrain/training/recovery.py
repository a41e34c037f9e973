"""What a run does about numbers that are not as they should be: it goes on, goes back to a checkpoint, or stops."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from jaxtrain.checkpoint.manifest import manifested_steps, read_manifest
from jaxtrain.checkpoint.resume_point import CheckpointStep, Position, ResumePoint
from jaxtrain.config import Config, from_dict, to_dict
from jaxtrain.distributed import coordination
from jaxtrain.errors import NumericError
from jaxtrain.observability.anomaly import Anomaly
from jaxtrain.observability.events import event
from jaxtrain.parallel.replicas import ReplicaCheck
from jaxtrain.trees import PyTree

log = logging.getLogger("jaxtrain")

_REPLICAS_SECONDS = 60.0

Response = Literal["go on", "roll back", "stop"]


class RollBack(Exception):
    """The run goes on from an older checkpoint, after the examples that spoiled it."""

    def __init__(self, resume: ResumePoint):
        super().__init__()
        self.resume = resume


def respond(anomaly: Anomaly, rollbacks_left: int) -> Response:
    """What to do about an anomaly while so many roll-backs are allowed.

    A spike that may not be rolled back is passed over; numbers that are not finite, or copies that differ, stop the run.
    """
    if anomaly.action == "go on" or rollbacks_left:
        return "go on" if anomaly.action == "go on" else "roll back"
    return "stop" if anomaly.action == "stop" else "go on"


def rollback_point(checkpoints: Path, anomaly: Anomaly, examples: int, config: Config) -> ResumePoint:
    """The newest checkpoint before an anomaly, with the position moved past the examples that led to it.

    Args:
      checkpoints: the run's directory of checkpoints.
      anomaly: its `first` step and all later ones are undone.
      examples: consumed by now; training goes on after them.
      config: the run's.

    Returns:
      The point to go on from: the first step of the run where no checkpoint is old enough.
    """
    older = [step for step in manifested_steps(checkpoints) if step < anomaly.first]
    start = CheckpointStep(checkpoints, older[-1]) if older else None
    values = read_manifest(checkpoints / str(older[-1])).position if older else Position().to_json(to_dict(config))
    stored = Position.from_json(values)
    text = "rolled back to step %d; the %d examples since are passed over"
    log.warning(text, stored.step, examples - stored.examples, extra=event("roll_back", stored.step))
    return ResumePoint(start, dataclasses.replace(stored, examples=examples), from_dict(values["config"]))


def refused_update(step: int, metrics: Mapping[str, float]) -> Anomaly:
    """The anomaly of an update that was refused, because its loss or gradient norm is not finite."""
    loss, norm = metrics["loss"], metrics["grad_norm"]
    return Anomaly(f"the update of step {step} was refused: loss {loss:g}, gradient norm {norm:g}", "stop", step)


def compare_replicas(check: ReplicaCheck, params: PyTree, step: int, every: int) -> Anomaly:
    """The anomaly of copies of a weight that differ on any process; one without text where all are alike.

    Args:
      check: compares the copies that are here.
      params: the weights.
      step: after which they are compared.
      every: steps between two comparisons.
    """
    key = coordination.unique_key("replicas")
    told = coordination.allgather_str(key, json.dumps(check(params)), _REPLICAS_SECONDS)
    differences = [text for texts in told for text in json.loads(texts)]
    return replicas_differ(step, every, differences[0]) if differences else Anomaly()


def replicas_differ(step: int, every: int, difference: str) -> Anomaly:
    """The anomaly of copies of a weight that differ after `step`.

    How long they have differed is not known: it concerns all steps since the comparison before.

    Args:
      step: the step after which they were compared.
      every: steps between two comparisons.
      difference: which leaf differs on which devices.
    """
    text = f"after step {step} {difference}: a device's memory or arithmetic is at fault"
    return Anomaly(text, "stop", max(step - every, 0) + 1)


def what_is_kept(step: int) -> str:
    """What of the run is there after `step`, where an update was refused that comes next."""
    return f"the state after step {step} is kept" if step else "the last checkpoint is as it was"


def not_finite(step: int, metrics: Mapping[str, float], kept: str) -> NumericError:
    """The error that ends a run at such an update.

    Args:
      step: the update's number.
      metrics: its `loss` and `grad_norm`.
      kept: what of the run is kept, for the sentence.
    """
    return NumericError(
        f"The loss ({metrics['loss']:g}) or the gradient norm ({metrics['grad_norm']:g}) of step {step} is not finite; the "
        f"run stopped before that update, and {kept}. Try a lower "
        "config.optim.learning_rate, config.optim.clip_norm=1.0, a longer config.optim.warmup, or precision f32."
    )


def out_of_rollbacks(anomaly: Anomaly) -> NumericError:
    """The error that ends a run where `train.rollbacks` allows no more."""
    return NumericError(
        f"The run stops: {anomaly.text}, and config.train.rollbacks allows no more roll-back; the last checkpoint is as it was."
    )
