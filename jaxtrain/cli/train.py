"""Train, or go on training: the run resumes by itself from what its work directory holds."""

import argparse

from jaxtrain.cli import start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The same as those of `python -m jaxtrain.main`."""
    start.add_config_argument(parser)
    parser.add_argument(
        "--workdir", default="", metavar="DIR", help="everything of the run; default artifacts/<recipe>"
    )
    start.add_device_arguments(parser)
    start.add_process_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Checks the config, then starts devices and processes, then trains."""
    resolved = start.resolved(arguments)
    if resolved.config.train.deterministic:
        from jaxtrain.determinism import ask_for_determinism  # noqa: PLC0415

        ask_for_determinism()
    start.start_devices(arguments)
    start.start_processes(arguments)
    from jaxtrain.trainer import train  # noqa: PLC0415  JAX is set up by now

    train(resolved.config, arguments.workdir or start.default_workdir(resolved.name), num_devices=arguments.devices)
