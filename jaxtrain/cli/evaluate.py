"""Evaluate a run's checkpoint: accuracy, top-5, and the accuracy of each class."""

import argparse
import json
import math

from rich.table import Table

from jaxtrain.cli import start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, --split, --data, --checkpoint, --ema, --allow-changes, --json, --trust, devices."""
    parser.add_argument("workdir", metavar="RUN", help="the work directory of a run")
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
    start.add_weights_arguments(parser)
    start.add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints the loss, the accuracies, and a row for each class, the worst first."""
    start.start_devices(arguments)
    from jaxtrain.training.evaluate import evaluate  # noqa: PLC0415

    with start.warnings_shown():
        found = evaluate(
            arguments.workdir,
            split=arguments.split,
            data=arguments.data,
            checkpoint=arguments.checkpoint,
            ema=arguments.ema,
            num_devices=arguments.devices,
            allow_changes=arguments.allow_changes,
            trust=arguments.trust,
        )
    result = found.result
    # A model may have more outputs than the data has classes.
    names = [*found.class_names, *(f"class {i}" for i in range(len(found.class_names), len(result.per_class)))]
    names = [name if names.count(name) == 1 else f"{name} (class {i})" for i, name in enumerate(names)]
    if arguments.json:
        classes = {n: None if math.isnan(a) else a for n, a in zip(names, result.per_class, strict=True)}
        numbers = {"loss": result.loss, "accuracy": result.accuracy, "top5": result.top5, "examples": result.examples}
        what = {"step": found.step, "split": arguments.split, "weights": found.weights}
        print(json.dumps({**what, **numbers, "per_class": classes}, indent=2))
        return
    console = start.console()
    which = f"step {found.step}{f' ({arguments.checkpoint})' if arguments.checkpoint in ('best', 'latest') else ''}"
    weights = "the average of the weights (EMA)" if found.weights == "ema" else "raw weights"
    console.print(f"{which}, {weights}, {arguments.split}: {result.examples:,} examples")
    console.print(f"accuracy {result.accuracy:.4f}, top-5 {result.top5:.4f}, loss {result.loss:.4f}")
    console.print()
    table = Table("class, the worst first", "accuracy", box=None, pad_edge=False)
    for name, accuracy in sorted(zip(names, result.per_class, strict=True), key=_worst_first):
        table.add_row(name, "-" if math.isnan(accuracy) else f"{accuracy:.4f}")
    console.print(table)


def _worst_first(row: tuple[str, float]) -> float:
    """The key of a class's name and accuracy; classes without examples come last."""
    return math.inf if math.isnan(row[1]) else row[1]
