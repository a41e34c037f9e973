"""Arguments and set-up that commands share: the recipe, the devices, the other processes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from jaxtrain.cli import flags
from jaxtrain.config import flatten, to_dict
from jaxtrain.distributed.cluster import detect_process
from jaxtrain.errors import ConfigError, EnvironmentMismatchError
from jaxtrain.host import xla_flags
from jaxtrain.host.gpus import device_files, driver_missing
from jaxtrain.host.native import cuda_messages_dropped
from jaxtrain.host.search_path import add_working_directory
from jaxtrain.host.targets import GPUS, Target, parse_target
from jaxtrain.host.text import note, printable
from jaxtrain.observability.progress import Progress
from jaxtrain.observability.text_log import make_console
from jaxtrain.plugins import code_in
from jaxtrain.recipes import Resolved, resolve

if TYPE_CHECKING:
    from jaxtrain.distributed.rendezvous import Fingerprint


class _Printable(Console):
    """Escapes what would control a terminal (`printable`) in each line and table cell: names of classes and files may."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def console() -> Console:
    """Standard output. Where it is a file or a pipe, lines are not cut to the width of a screen."""
    width = None if sys.stdout.isatty() else 1_000_000
    return _Printable(width=width, highlight=False, markup=False, emoji=False)


def progress() -> Progress:
    """The line of what a command does now; where it cannot be drawn, a line when that takes long."""
    return Progress(make_console(), prints=True)


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """Inside the context, a logged warning is a line on standard error, as an error is."""
    logger, handler = logging.getLogger("jaxtrain"), logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("jaxtrain: %(message)s"))
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """--config FILE[:ARGUMENTS]; overrides are taken out before argparse sees them."""
    parser.add_argument(
        "--config",
        metavar="FILE[:ARGUMENT,...]",
        help="a recipe and its arguments (dp, zero1, zero2, zero3, tensor2, hybrid, pipeline2, pipeline4, or its own): a "
        "file, or the name of one that comes with jaxtrain, such as resnet50_cifar100; --config.KEY=VALUE changes any field, "
        "see `jaxtrain config --explain KEY`",
    )
    parser.add_argument(
        "--yaml",
        default="",
        metavar="FILE",
        help="fields of the config, as `train: {epochs: 3}` or `train.epochs: 3`; they come after the recipe and before the "
        "flags. Without --config the other fields have their defaults",
    )
    flags.add_arguments(parser)


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """RUN, for commands that use what it has trained."""
    parser.add_argument(
        "run", metavar="RUN", help="the work directory of a run, or one of its checkpoints (RUN/checkpoints/STEP)"
    )


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, --ema, --trust: which weights of a run."""
    parser.add_argument("--checkpoint", default="best", help="best, latest, a step, or epoch:N (default: best)")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="take the moving average of the weights, or the weights; default: the average if the run keeps one",
    )
    parser.add_argument(
        "--trust", action="store_true", help="run the code that the run's config names, as package.module:attribute"
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """--devices and --simulate-devices."""
    parser.add_argument("--devices", type=int, default=0, metavar="N", help="use the first N devices of the host")
    parser.add_argument("--simulate-devices", type=int, default=0, metavar="N", help="make N CPU devices")


def add_target_argument(parser: argparse.ArgumentParser) -> None:
    """--target."""
    parser.add_argument(
        "--target",
        default="",
        metavar="[[HOSTSx]COUNTx]GPU",
        help="GPUs that need not be there: 8xh100, 2x8xh200, ...; "
        f"GPU is one of {', '.join(GPUS)}, or the file of an XLA target",
    )


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """--coordinator, --num-processes, --process-id, --standalone, --start-timeout, --allow-version-skew."""
    parser.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="process 0's address, in a run of several processes; under Slurm, OpenMPI or torchrun it is detected",
    )
    parser.add_argument("--num-processes", type=int, default=0, metavar="P")
    parser.add_argument("--process-id", type=int, default=-1, metavar="I")
    parser.add_argument(
        "--start-timeout", type=int, default=300, metavar="S", help="seconds to wait for the other processes"
    )
    parser.add_argument("--standalone", action="store_true", help="run one process, even inside a scheduler's job")
    parser.add_argument(
        "--allow-version-skew", action="store_true", help="let processes with other versions of Python or packages join"
    )


def resolved(arguments: argparse.Namespace) -> Resolved:
    """The config that the arguments name. Raises `ConfigError`, also where they name none."""
    if not arguments.config and not arguments.yaml:
        raise ConfigError(f"jaxtrain {arguments.command} needs --config FILE; see jaxtrain {arguments.command} --help.")
    settings, translations = flags.read_yaml(arguments.yaml) if arguments.yaml else ([], [])
    found = resolve(arguments.config or "", arguments.overrides, settings)
    arguments.translations = [*translations, *arguments.translations]
    return found if arguments.config else dataclasses.replace(found, name=Path(arguments.yaml).stem)


def say_what_flags_are(arguments: argparse.Namespace) -> None:
    """Prints a line on standard error that says which fields the flags of other trainers are; after `resolved`."""
    if arguments.translations:
        note("; ".join(arguments.translations))


def check_devices(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for a negative number of devices."""
    for name in ("devices", "simulate_devices"):
        if getattr(arguments, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1.")


def start_devices(arguments: argparse.Namespace) -> None:
    """Starts JAX's devices, of a command of one process. Raises `ConfigError` for a negative number of devices."""
    configure_devices(arguments)
    start_backend()


def configure_devices(arguments: argparse.Namespace) -> None:
    """Configures JAX before its backend starts. Raises `ConfigError` for a negative number of devices, or an unknown flag."""
    check_devices(arguments)
    xla_flags.refuse_unknown()
    with cuda_messages_dropped():
        import jax  # noqa: PLC0415  wrong arguments are refused before JAX is loaded

        from jaxtrain.training.jax_settings import check_compile_cache  # noqa: PLC0415
    check_compile_cache()  # also for what is compiled before `train`
    if arguments.simulate_devices:
        jax.config.update("jax_num_cpu_devices", arguments.simulate_devices)
    if arguments.simulate_devices or (driver_missing() and "JAX_PLATFORMS" not in os.environ):
        jax.config.update("jax_platforms", "cpu")


def planned_devices(arguments: argparse.Namespace) -> list[Any]:
    """The devices of --target, or those of this machine that --devices and --simulate-devices choose."""
    if not arguments.target:
        start_devices(arguments)
        from jaxtrain.training.setup import select_devices  # noqa: PLC0415

        return select_devices(arguments.devices)
    target = _target(arguments)
    without_devices()
    from jaxtrain.parallel.topology import target_devices  # noqa: PLC0415

    return target_devices(target)


def planned_target(arguments: argparse.Namespace) -> Target:
    """The target of --target, or this machine's devices as one."""
    if arguments.target:
        target = _target(arguments)
        without_devices()
        return target
    devices = planned_devices(arguments)
    from jaxtrain.training.plan.problem import target_of  # noqa: PLC0415

    return target_of(devices)


def _target(arguments: argparse.Namespace) -> Target:
    """That of --target. Raises `ConfigError` where devices of this machine are chosen too."""
    for option in ("devices", "simulate_devices"):
        if getattr(arguments, option):
            raise ConfigError(f"--target has its own devices; leave out --{option.replace('_', '-')}.")
    return parse_target(arguments.target)


def start_backend() -> None:
    """Starts JAX's devices; where this is a run of several processes, after these are connected."""
    import jax  # noqa: PLC0415  `configure_devices` has loaded it

    try:
        with cuda_messages_dropped():
            jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that there is one, where it was told of GPUs alone
        platforms = os.environ.get("JAX_PLATFORMS", "")
        unknown = "not in the list of known backends" in str(error)
        if not platforms or not (unknown or not device_files()):
            raise
        why = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0].rstrip(".") or "there is none"
        raise EnvironmentMismatchError(
            f"JAX_PLATFORMS={platforms!r}: JAX finds no such devices on {socket.gethostname()} ({why}); unset it, or set it to "
            "cpu or cuda. `jaxtrain doctor` says what is there."
        ) from error


def without_devices() -> None:
    """Configures JAX for a command that runs nothing on an accelerator: its devices stay free for a run."""
    xla_flags.refuse_unknown()
    with cuda_messages_dropped():
        import jax  # noqa: PLC0415  wrong arguments are refused before JAX is loaded

    jax.config.update("jax_platforms", "cpu")


def start_processes(arguments: argparse.Namespace, resolved: Resolved, workdir: str, met: Callable[[], None]) -> None:
    """Connects to the other processes of the run, if it has several.

    Args:
      arguments: of the command.
      resolved: the config; processes compare theirs.
      workdir: processes compare theirs.
      met: called when all have met (`initialize`).

    Raises:
      EnvironmentMismatchError: another process does not come in time, or was started with other settings.
    """

    def fingerprint() -> Fingerprint:
        from jaxtrain.distributed.initialize import fingerprint_of  # noqa: PLC0415  a single process loads JAX later

        config = flatten(to_dict(resolved.config))
        if names := [name for _, name in code_in(config)]:
            add_working_directory()
        modules = [name.partition(":")[0] for name in names]
        return fingerprint_of(config, str(Path(workdir)), modules)

    join_processes(arguments, fingerprint, met)


def join_processes(
    arguments: argparse.Namespace, fingerprint: Callable[[], Fingerprint], met: Callable[[], None]
) -> None:
    """Connects to the other processes of the command, if it has several.

    Args:
      arguments: of the command.
      fingerprint: what must be the same on all; called where there are several.
      met: called when all have met (`initialize`).

    Raises:
      EnvironmentMismatchError: another process does not come in time, or was started with something else.
    """
    if arguments.standalone:
        return
    place = detect_process(arguments.coordinator, arguments.num_processes, arguments.process_id)
    if place is None or place.processes == 1:
        return
    from jaxtrain.distributed.initialize import initialize  # noqa: PLC0415  a single process loads JAX later

    skew = arguments.allow_version_skew
    initialize(place, fingerprint(), arguments.start_timeout, allow_version_skew=skew, met=met)


def default_workdir(name: str) -> Path:
    """artifacts/<recipe>."""
    return Path("artifacts") / name
