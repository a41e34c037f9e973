"""Start a run's processes on this host, and restart them when one dies: `jaxtrain launch --nproc 2 -- train --config ...`."""

import argparse
from pathlib import Path

from jaxtrain.distributed.supervisor import Options, Supervisor, missing_gpus, say
from jaxtrain.errors import ConfigError
from jaxtrain.host.gpus import Gpus
from jaxtrain.host.processes import package_command
from jaxtrain.observability.goodput import end_start

_COMMAND = package_command(
    "from jaxtrain.host.processes import end_with_launcher; end_with_launcher(); from jaxtrain.cli import main; "
    "sys.exit(main())"
)

_LAUNCHED = ("train", "bench")  # the commands that join processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--nproc, --gpus-per-process, --max-restarts, --grace, --hang, --min-devices; the command stands after --."""
    default = Options()
    parser.add_argument("--nproc", "--nproc_per_node", type=int, default=1, metavar="N", help="processes on this host")
    parser.add_argument(
        "--gpus-per-process",
        type=int,
        default=0,
        metavar="N",
        help="GPUs of each process; default: all GPUs, divided evenly",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=default.max_restarts,
        metavar="N",
        help="restarts in a row without any progress, after which the job is given up",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=default.grace,
        metavar="S",
        help="seconds that processes have to save after SIGTERM or Ctrl-C",
    )
    parser.add_argument(
        "--hang",
        type=float,
        default=default.hang,
        metavar="S",
        help="seconds without a heartbeat after which a process is ended; 0: never",
    )
    parser.add_argument(
        "--min-devices",
        type=int,
        default=default.min_devices,
        metavar="N",
        help="give the job up when fewer GPUs than this work",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the job and returns its exit code. Raises `ConfigError` for wrong arguments."""
    if not arguments.rest or arguments.rest[0] not in _LAUNCHED:
        raise ConfigError("jaxtrain launch needs a command after --: jaxtrain launch --nproc 2 -- train --config FILE.")
    for name in ("nproc", "gpus_per_process", "max_restarts", "grace", "hang", "min_devices"):
        value, low = getattr(arguments, name), 1 if name == "nproc" else 0
        if value < low:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {low}.")
    options = Options(
        processes=arguments.nproc,
        gpus_per_process=arguments.gpus_per_process,
        max_restarts=arguments.max_restarts,
        grace=arguments.grace,
        hang=arguments.hang,
        min_devices=arguments.min_devices,
    )
    gpus = Gpus()
    if missing := missing_gpus(Path("machine.json"), gpus):
        say(f"machine.json lists GPUs that are not found now: {', '.join(missing)}")
    return Supervisor([*_COMMAND, *arguments.rest], options, gpus, end_start).run()
