"""Evaluate a run's checkpoint: accuracy, top-5, and the accuracy of each class."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from jaxtrain.cli import start
from jaxtrain.errors import ConfigError
from jaxtrain.host.files import atomic_write, writing
from jaxtrain.host.paths import require_local
from jaxtrain.observability.evaluation_page import evaluation_page
from jaxtrain.workdir import Workdir, named

if TYPE_CHECKING:
    from jaxtrain.training.evaluate import Evaluated

_WEIGHTS = {"ema": "the average of the weights (EMA)", "raw": "raw weights", "file": "weights of a file"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN or --config, --split, --data, --checkpoint, --ema, --allow-changes, --json, --tta, --report, --trust, devices."""
    parser.add_argument(
        "workdir",
        nargs="?",
        default="",
        metavar="RUN",
        help="the work directory of a run; without one, --config FILE --config.model.init_from=FILE names weights",
    )
    start.add_config_argument(parser)
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument(
        "--data",
        default="",
        metavar="DIR|NAME",
        help="where the run's data is now; or other data with the same classes: a folder of images, or a name as data.name",
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="evaluate although the data set has changed since training, and warn of what has changed",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--tta",
        choices=("flip",),
        default="",
        help="test-time augmentation: the mean of the probabilities of each image and of its mirror image",
    )
    parser.add_argument(
        "--report",
        action="append",
        nargs="?",
        const="",
        default=[],
        metavar="FILE",
        help="also write the confusion matrix, the calibration and the worst examples: FILE.html or FILE.json; may come twice. "
        "Without FILE both are kept in RUN/evaluation, where the dashboard and `jaxtrain report` find them",
    )
    start.add_weights_arguments(parser)
    start.add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints the loss, the accuracies, and a row for each class, the worst first."""
    _check_reports([name for name in arguments.report if name])
    reports = _report_files(arguments)
    found = _evaluated(arguments)
    from jaxtrain.training.trained import output_names  # noqa: PLC0415

    for path in reports:
        _write_report(path, arguments, found)
    result = found.result
    names = output_names(found.class_names, len(result.per_class))
    if arguments.json:
        classes = {n: None if math.isnan(a) else a for n, a in zip(names, result.per_class, strict=True)}
        numbers = {"loss": result.loss, "accuracy": result.accuracy, "top5": result.top5, "examples": result.examples}
        what = {"step": found.step, "split": arguments.split, "weights": found.weights}
        what |= {"tta": arguments.tta} if arguments.tta else {}
        print(json.dumps({**what, **numbers, "per_class": classes}, indent=2))
        return
    console = start.console()
    named = f" ({arguments.checkpoint})" if arguments.checkpoint in ("best", "latest") else ""
    which = f"step {found.step}{named}, {_WEIGHTS[found.weights]}" if arguments.workdir else _WEIGHTS[found.weights]
    if arguments.tta:
        which += ", mean probability of each image and its mirror image"
    console.print(f"{which}, {arguments.split}: {result.examples:,} examples")
    console.print(f"accuracy {result.accuracy:.4f}, top-5 {result.top5:.4f}, loss {result.loss:.4f}")
    console.print()
    table = Table("class, the worst first", "accuracy", box=None, pad_edge=False)
    for name, accuracy in sorted(zip(names, result.per_class, strict=True), key=_worst_first):
        table.add_row(name, "-" if math.isnan(accuracy) else f"{accuracy:.4f}")
    console.print(table)


def _evaluated(arguments: argparse.Namespace) -> Evaluated:
    """Of a run's checkpoint, or of the weights that a config names."""
    asked = {"split": arguments.split, "tta": arguments.tta, "report": bool(arguments.report)}
    of_run = {
        "data": arguments.data, "checkpoint": arguments.checkpoint, "ema": arguments.ema,
        "allow_changes": arguments.allow_changes, "trust": arguments.trust,
    }  # fmt: skip
    if arguments.workdir and (arguments.config or arguments.yaml or arguments.overrides):
        raise ConfigError("jaxtrain evaluate takes a run or --config, and not both: a run has its own config.")
    if not (arguments.workdir or arguments.config or arguments.yaml):
        raise ConfigError("jaxtrain evaluate needs a run, or --config FILE and --config.model.init_from=FILE.")
    if not arguments.workdir:
        defaults = {"data": "", "checkpoint": "best", "ema": None, "allow_changes": False, "trust": False}
        for name in (name for name, value in of_run.items() if value != defaults[name]):
            raise ConfigError(
                f"--{name.replace('_', '-')} is of a run; with --config, the config says what to evaluate."
            )
        config = start.resolved(arguments).config
        start.say_what_flags_are(arguments)
    start.start_devices(arguments)
    from jaxtrain.training.evaluate import evaluate, evaluate_weights  # noqa: PLC0415

    with start.warnings_shown():
        if not arguments.workdir:
            return evaluate_weights(config, num_devices=arguments.devices, **asked)
        return evaluate(arguments.workdir, num_devices=arguments.devices, **of_run, **asked)


def _report_files(arguments: argparse.Namespace) -> list[Path]:
    """The files of --report; without a name those in the run's directory, where there is a folder for them then."""
    paths = [Path(name) for name in arguments.report if name]
    if len(paths) == len(arguments.report):
        return paths
    if not arguments.workdir:
        raise ConfigError("--report needs a FILE, since no run is evaluated.")
    workdir = Workdir(named(arguments.workdir))
    kept = workdir.evaluation(arguments.split)
    if workdir.config.is_file():
        with writing(kept.parent):
            kept.parent.mkdir(exist_ok=True)
    return [*paths, kept, kept.with_suffix(".html")]


def _check_reports(names: Sequence[str]) -> None:
    """Raises `ConfigError` for a file that cannot be written in the end."""
    for name in names:
        require_local(name, f"--report {name}", ConfigError)
        if Path(name).suffix not in (".html", ".json"):
            raise ConfigError(f"--report {name}: must end with .html or .json.")
        if not Path(name).absolute().parent.is_dir():
            raise ConfigError(f"--report {name}: there is no such directory.")


def _write_report(path: Path, arguments: argparse.Namespace, found: Evaluated) -> None:
    assert found.report is not None
    about = {
        "run": arguments.workdir or arguments.config or arguments.yaml, "step": found.step, "weights": found.weights,
        "split": found.split, "tta": arguments.tta or "none",
    }  # fmt: skip
    if path.suffix == ".json":
        atomic_write(path, json.dumps({**about, **found.report.to_json(pictures=True)}) + "\n")
        return
    title = f"Evaluation of {about['run']}"
    atomic_write(path, evaluation_page(title, about, found.report.to_json(pictures=True)))


def _worst_first(row: tuple[str, float]) -> float:
    """The key of a class's name and accuracy; classes without examples come last."""
    return math.inf if math.isnan(row[1]) else row[1]
