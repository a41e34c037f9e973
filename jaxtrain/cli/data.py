"""Prepare a data set (download it once), or verify every record of one."""

import argparse
import dataclasses
from collections.abc import Iterable

from rich.console import Console
from rich.progress import track

from jaxtrain.cli import start
from jaxtrain.config import DataConfig
from jaxtrain.errors import ConfigError
from jaxtrain.host.paths import require_local
from jaxtrain.host.text import printable
from jaxtrain.observability.text_log import can_redraw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """prepare|verify NAME, --dir, --splits."""
    parser.add_argument("action", choices=("prepare", "verify"))
    parser.add_argument("name", help="digits, synthetic, cifar10, cifar100, folder:PATH, or a TFDS name")
    parser.add_argument(
        "--dir", default="", help="data directory; default $JAXTRAIN_DATA_DIR, then ~/.cache/jaxtrain/data"
    )
    parser.add_argument(
        "--splits", default="", help="which splits of a folder or a TFDS data set are used, as config.data.splits"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints where the data set is, or how many examples of each split were read and are as recorded."""
    from jaxtrain.data import registry  # noqa: PLC0415
    from jaxtrain.data.folder import UnreadableImages  # noqa: PLC0415

    require_local(arguments.dir, f"--dir {arguments.dir}", ConfigError)
    config = dataclasses.replace(DataConfig(), name=arguments.name, dir=arguments.dir, splits=arguments.splits)
    path = registry.prepare(config)
    if arguments.action == "prepare":
        print(printable(f"{arguments.name}: {path or 'made as it is read, nothing on disk'}"))
        if arguments.name.startswith("folder:"):
            dataset = registry.load(config, image_size=32)
            for note in dataset.notes:
                print(printable(f"{arguments.name}: {note}"))
            print(printable(registry.record_contents(config, dataset, afresh=True, progress=_progress)))
        return
    recorded = registry.recorded_on(config)
    try:
        with start.warnings_shown():
            counts = registry.verify(config, _progress)
    except UnreadableImages as error:
        for sentence in error.images:
            print(printable(sentence))
        raise
    print(printable(f"{arguments.name}: sound; " + ", ".join(f"{count} {split}" for split, count in counts.items())))
    if arguments.name.startswith("folder:"):
        now = "recorded now, to be compared with from now on" if registry.recorded_on(config) else "not recorded"
        print(f"contents: as on {recorded}" if recorded else f"contents: {now}")


def _progress(files: Iterable[str]) -> Iterable[str]:
    console = Console(stderr=True)
    return track(list(files), "reading", console=console, transient=True, disable=not can_redraw(console))
