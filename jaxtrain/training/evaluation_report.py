"""What an evaluation finds beside its means: the confusion matrix, the calibration, the examples it is most wrong about."""

from __future__ import annotations

import base64
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtrain.data import images
from jaxtrain.data.base import Source
from jaxtrain.data.folder import file_of
from jaxtrain.step.answers import Answers
from jaxtrain.step.eval_step import EvalResult

BINS = 15
"""Of the calibration, as Guo 2017 takes them."""
_WORST = 24
_PICTURE = 128  # pixels a side, at most


@dataclasses.dataclass(frozen=True)
class CalibrationBin:
    """The examples whose confidence lies in (low, high]; the first bin has those at 0 too."""

    low: float
    high: float
    examples: int
    confidence: float
    """Mean; NaN without examples. So is `accuracy`."""
    accuracy: float


@dataclasses.dataclass(frozen=True)
class WorstExample:
    """An example with a high loss."""

    index: int
    """In its split."""
    file: str
    """Its path below the folder of images; "" where it is no file."""
    label: str
    predicted: str
    confidence: float
    """Of `predicted`."""
    loss: float
    picture: bytes
    """PNG."""


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """What `evaluate(report=True)` finds. Classes are in the order of the model's outputs."""

    result: EvalResult
    class_names: tuple[str, ...]
    confusion: np.ndarray
    """int64 [classes, classes]: how many examples of the row's class were taken for the column's."""
    bins: tuple[CalibrationBin, ...]
    calibration_error: float
    """ECE, see `calibration`."""
    worst: tuple[WorstExample, ...]
    """The examples with the highest loss, the highest first."""

    def to_json(self, *, pictures: bool = False) -> dict[str, Any]:
        """In types that JSON has; what is not finite is None. pictures: with the images, as data URLs."""
        result = self.result
        accuracies = zip(self.class_names, self.confusion.sum(1).tolist(), result.per_class, strict=True)
        found = {
            "examples": result.examples,
            "accuracy": result.accuracy,
            "top5": result.top5,
            "loss": result.loss,
            "classes": [{"class": name, "examples": n, "accuracy": accuracy} for name, n, accuracy in accuracies],
            "confusion": self.confusion.tolist(),
            "calibration": {
                "expected_calibration_error": self.calibration_error,
                "bins": [dataclasses.asdict(each) for each in self.bins],
            },
            "worst": [
                {key: value for key, value in dataclasses.asdict(each).items() if key != "picture"} for each in self.worst
            ],
        }  # fmt: skip
        if pictures:
            for row, each in zip(found["worst"], self.worst, strict=True):
                row["picture"] = f"data:image/png;base64,{base64.b64encode(each.picture).decode()}"
        return _finite(found)


def make_report(result: EvalResult, answers: Answers, class_names: Sequence[str], source: Source) -> EvaluationReport:
    """The report of an evaluation.

    Args:
      result: its means.
      answers: to each example, NumPy arrays [N] in the split's order.
      class_names: one for each output of the model.
      source: the split.
    """
    classes = len(class_names)
    confusion = np.bincount(answers.label * classes + answers.predicted, minlength=classes**2).reshape(classes, classes)
    bins, error = calibration(answers.confidence, answers.predicted == answers.label)
    order = np.argsort(-np.nan_to_num(answers.loss.astype(np.float64), nan=np.inf), kind="stable")[:_WORST]
    pixels, _ = source.read(order.astype(np.int64))
    worst = tuple(
        WorstExample(
            index=int(i),
            file=os.path.normpath(name) if (name := file_of(source, int(i))) else "",
            label=class_names[int(answers.label[i])],
            predicted=class_names[int(answers.predicted[i])],
            confidence=float(answers.confidence[i]),
            loss=float(answers.loss[i]),
            picture=images.as_png(picture, _PICTURE),
        )
        for i, picture in zip(order, pixels, strict=True)
    )
    return EvaluationReport(result, tuple(class_names), confusion, bins, error, worst)


def calibration(confidence: np.ndarray, correct: np.ndarray) -> tuple[tuple[CalibrationBin, ...], float]:
    """The reliability of the confidences, and the expected calibration error (Guo et al. 2017, arXiv:1706.04599).

    ECE = sum over the bins m of |B_m| / n * |acc(B_m) - conf(B_m)| (their equation 3), over `BINS` bins of equal width:
    bin m has the examples whose confidence lies in ((m - 1) / BINS, m / BINS].

    Args:
      confidence: float [N], the probability of each predicted class.
      correct: bool [N].
    """
    confidence = confidence.astype(np.float64)
    which = np.clip(np.ceil(np.nan_to_num(confidence) * BINS).astype(np.int64) - 1, 0, BINS - 1)
    bins, error = [], 0.0
    for m in range(BINS):
        inside = which == m
        count = int(inside.sum())
        mean = float(confidence[inside].mean()) if count else math.nan
        accuracy = float(correct[inside].mean()) if count else math.nan
        bins.append(CalibrationBin(m / BINS, (m + 1) / BINS, count, mean, accuracy))
        error += count / len(confidence) * abs(accuracy - mean) if count else 0.0
    return tuple(bins), error


def _finite(value: Any) -> Any:
    """`value` with None for each float that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
