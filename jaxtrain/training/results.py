"""What a run says at its end: `result.json`, and the lines that are printed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.checkpoint.manifest import read_manifest
from jaxtrain.checkpoint.resume_point import Position
from jaxtrain.config import Config, from_dict
from jaxtrain.data.base import SPLITS, Dataset
from jaxtrain.observability.clock import Span, explain
from jaxtrain.observability.goodput import Goodput
from jaxtrain.observability.rendering import percent, short_duration
from jaxtrain.step.eval_step import EvalResult
from jaxtrain.step.train_state import TrainState
from jaxtrain.training.setup import RunSpec
from jaxtrain.workdir import Workdir

SplitResults = Mapping[str, Mapping[str, EvalResult]]
"""By split (`validation`, `test`), then by weights (`raw`, `ema`)."""


@dataclasses.dataclass(frozen=True, repr=False)
class TrainResult:
    """What `train` returns.

    Attributes:
      state: the last state, on the devices.
      history: the rows that this start added to `metrics.jsonl`, without telemetry (the names with a slash).
      result: what `result.json` holds.
      workdir: the paths of the run's files.
    """

    state: TrainState
    history: list[dict[str, Any]]
    result: dict[str, Any]
    workdir: Workdir

    def __repr__(self) -> str:
        """The run in a line: its arrays and rows would fill a notebook's page."""
        accuracies = _accuracies(self.result["best"])
        best = f"best step {self.result['best']['step']}{f': {accuracies}' if accuracies else ''}"
        return f"TrainResult({self.result['steps']} steps, {best}; {self.workdir.path})"


def _accuracies(figures: Mapping[str, Any]) -> str:
    """`validation 98.6 %, test 99.2 %` of the weights that were chosen, as far as there is such."""
    key = "_ema" if figures.get("weights") == "ema" else ""
    found = [(split, figures.get(split + key)) for split in ("validation", "test")]
    return ", ".join(f"{split} {percent(of['accuracy'])}" for split, of in found if of)


def figures(results: SplitResults, *, tested: bool) -> dict[str, Any]:
    """What `result.json` says of one set of weights: loss, accuracy, top-5 and of how many examples they are.

    They stand under `test`, `test_ema`, `validation` and so on.

    tested: whether there is a test split; where there is none, `test` is null.
    """
    summary: dict[str, Any] = {} if tested else {"test": None}
    for split, by_weights in results.items():
        for weights, result in by_weights.items():
            key = split if weights == "raw" else f"{split}_{weights}"
            summary[key] = {name: getattr(result, name) for name in ("loss", "accuracy", "top5", "examples")}
    return summary


def deciding_figures(validation: Mapping[str, EvalResult]) -> dict[str, float | None]:
    """The figures of a validation that `checkpoint.best` may name: of the average of the weights, or else of themselves.

    None for one that is not finite. validation: results by weights, `raw` and perhaps `ema`.
    """
    of = validation.get("ema") or validation["raw"]
    values = {"val_accuracy": of.accuracy, "val_loss": of.loss, "val_top5": of.top5}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class Best:
    """Which weights are the best: those after `step`, chosen by a figure of their average (`ema`) or of themselves.

    by: the figure (`checkpoint.best`); None where nothing was chosen, so that they are the last ones.
    """

    step: int
    ema: bool
    by: str | None


_WORDS = {"val_accuracy": "accuracy", "val_loss": "loss", "val_top5": "top-5 accuracy"}


def on_both_splits(
    evaluate: Callable[[TrainState, str], dict[str, EvalResult]],
    state: TrainState,
    dataset: Dataset,
    validation: dict[str, EvalResult] | None = None,
) -> SplitResults:
    """The results of weights on the validation and the test split, where there are such.

    Args:
      evaluate: results of a state on a split, by weights.
      state: whose weights.
      dataset: its splits.
      validation: the results on the validation split, where they are known.
    """
    results = {}
    if len(dataset.validation):
        results["validation"] = validation or evaluate(state, "validation")
    if len(dataset.test):
        results["test"] = evaluate(state, "test")
    return results


def best_weights(checkpoints: Path, best_step: int | None, position: Position, config: Config) -> Best:
    """Which weights are the best, and what chose them: the config that their checkpoint was made with.

    Args:
      checkpoints: the run's directory of checkpoints.
      best_step: that of the best one; None where none was chosen, so that the last weights are the best.
      position: the end of the run.
      config: the run's.
    """
    if best_step is None:
        return Best(position.step, ema=config.optim.ema > 0, by=None)
    stored = read_manifest(checkpoints / str(best_step)).position["config"]
    return Best(best_step, ema=from_dict(stored).optim.ema > 0, by=config.checkpoint.best)


def final_result(
    run: RunSpec,
    position: Position,
    span: Span,
    last: SplitResults,
    best: SplitResults,
    chosen: Best,
    goodput: Goodput | None,
    callbacks: Mapping[str, Any],
) -> dict[str, Any]:
    """What `result.json` holds.

    Args:
      run: what was trained.
      position: the end of it.
      span: this start's time.
      last: results of the last weights.
      best: results of the best weights.
      chosen: which those are.
      goodput: of all starts of the run; None where it is not known.
      callbacks: what they have to say, by name.
    """
    tested = len(run.dataset.test) > 0
    of_all_starts = {}
    if goodput:
        of_all_starts = {"goodput": goodput.share, "starts": goodput.starts}
        of_all_starts |= {"gpu_hours": goodput.gpu_hours, "cost": goodput.cost}
    of_callbacks: dict[str, Any] = {"callbacks": callbacks} if callbacks else {}
    if position.ended:
        of_callbacks["ended"] = {name: position.ending[name] for name in ("by", "reason")}
    return {
        "steps": position.step,
        "examples": position.examples,
        "epochs": position.examples / len(run.dataset.train),
        "splits": {split: len(getattr(run.dataset, split)) for split in SPLITS},
        "last": {"step": position.step} | figures(last, tested=tested),
        "best": {"step": chosen.step, "weights": "ema" if chosen.ema else "raw", "by": chosen.by}
        | figures(best, tested=tested),
        "wall_seconds": span.wall,
        "seconds": dict(span.seconds),
        "throughput": span.throughput,
        "devices": run.layout.mesh.size,
        "device_kind": run.layout.mesh.devices.flat[0].device_kind,
        "precision": run.config.train.precision,
        **of_all_starts,
        **of_callbacks,
    }


def parts_evaluated(examples: int, splits: Mapping[str, int]) -> str:
    """Says of which splits the run evaluates a part, and how large it is; "" where it evaluates the whole of each.

    Args:
      examples: `train.eval_examples`.
      splits: how many examples each split has.
    """
    parts = [
        f"{examples:,} of {splits[split]:,} {split} examples"
        for split in ("validation", "test")
        if 0 < examples < splits[split]
    ]
    return f"evaluated on {' and '.join(parts)} (config.train.eval_examples)" if parts else ""


def closing_lines(
    result: Mapping[str, Any], config: Config, span: Span, *, tested: bool, has_best: bool
) -> Iterator[str]:
    """What is printed at the end: accuracies of the last and the best weights with what chose them, and where the time went.

    Args:
      result: what `result.json` holds.
      config: the run's.
      span: this start's time.
      tested: whether there is a test split.
      has_best: whether a checkpoint was chosen by its validation.
    """
    chosen = "EMA" if result["best"]["weights"] == "ema" else "raw"
    by = _WORDS.get(result["best"]["by"], "")
    why = {"last": "", "best": f", by the validation {by} of the {chosen} weights"}
    keys = {"": "", "EMA ": "_ema"} if config.optim.ema else {"": ""}
    for name in ("last", "best") if has_best else ("last",):
        accuracies = [
            f"{label}{split} accuracy {result[name][split + key]['accuracy']:.4f}"
            for split in ("validation", "test")
            for label, key in keys.items()
            if result[name].get(split + key)
        ]
        if accuracies:
            yield f"{name}, step {result[name]['step']}{why[name]}: {', '.join(accuracies)}"
    if parts := parts_evaluated(config.train.eval_examples, result["splits"]):
        yield f"{parts}; jaxtrain evaluate takes the whole split"
    yield from _ended(result)
    if not tested:
        yield f"nothing was tested: {config.data.name} has no test examples"
    yield explain(span, "this run")
    if result.get("starts", 1) > 1:
        yield f"goodput {result['goodput']:.1%} over {result['starts']} starts (jaxtrain goodput)"


def _ended(result: Mapping[str, Any]) -> Iterator[str]:
    if ended := result.get("ended"):
        yield f"ended by {ended['by']}: {ended['reason']}"


def done_lines(
    result: Mapping[str, Any], config: Config, span: Span, epoch_of: Callable[[int], int], path: Path
) -> Iterator[str]:
    """The end as it is shown on a screen: the best weights, where the time went, where the result is.

    Args:
      result: what `result.json` holds.
      config: the run's.
      span: this start's time.
      epoch_of: the epoch of a step, as people count.
      path: of `result.json`.
    """
    best, last = result["best"], result["last"]
    chosen = "best" if {"validation", "validation_ema"} & best.keys() else "last"
    average = "average of the weights, " if best["weights"] == "ema" else ""
    which = [f"{chosen} {average}epoch {epoch_of(best['step'])} (step {best['step']})", _accuracies(best)]
    yield f"done in {short_duration(span.wall, 1)}: {', '.join(filter(None, which))}"
    if best["step"] != last["step"] and (accuracies := _accuracies(last | {"weights": best["weights"]})):
        yield f"last step {last['step']}: {accuracies}"
    if parts := parts_evaluated(config.train.eval_examples, result["splits"]):
        yield f"{parts}; jaxtrain evaluate takes the whole split"
    yield from _ended(result)
    if "test" in last and last["test"] is None:
        yield "nothing was tested: the data set has no test examples"
    names = {"step": "steps", "checkpoint": "saves"}
    seconds = {names.get(key, key): each for key, each in span.seconds.items() if each >= 0.05}
    yield ", ".join(f"{name} {short_duration(each, 1)}" for name, each in seconds.items())
    yield explain(span, "this run")
    if result.get("starts", 1) > 1:
        yield f"goodput {result['goodput']:.1%} over {result['starts']} starts (jaxtrain goodput)"
    yield str(path)
