"""Prepare a data set (download it, once), or verify every byte of one."""

import argparse
import dataclasses

from jaxtrain.config import DataConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """prepare|verify NAME."""
    parser.add_argument("action", choices=("prepare", "verify"))
    parser.add_argument("name", help="digits, synthetic, cifar10, cifar100, folder:PATH, or a TFDS name")
    parser.add_argument(
        "--dir", default="", help="data directory; default $JAXTRAIN_DATA_DIR, then ~/.cache/jaxtrain/data"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints where the data set is, or how many examples of each split are sound."""
    from jaxtrain.data import sources  # noqa: PLC0415

    config = dataclasses.replace(DataConfig(), name=arguments.name, dir=arguments.dir)
    path = sources.prepare(config)
    if arguments.action == "prepare":
        print(f"{arguments.name}: {path or 'made as it is read, nothing on disk'}")
        return
    counts = sources.verify(config)
    print(f"{arguments.name}: sound; " + ", ".join(f"{count} {split}" for split, count in counts.items()))
