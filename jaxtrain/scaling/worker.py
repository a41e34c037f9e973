"""A process that is measured: the public trainer, with a callback that makes steps when it is told to."""

from __future__ import annotations

import os
import sys
import traceback
from multiprocessing.connection import Connection

from jaxtrain.config import flatten, to_dict
from jaxtrain.errors import JaxtrainError
from jaxtrain.host.processes import end_with
from jaxtrain.host.search_path import add_working_directory
from jaxtrain.plugins import code_in
from jaxtrain.scaling.protocol import Failure, Job


def main() -> None:
    """`sys.argv` has the descriptor of the connection, and the parent's process number. Never returns."""
    end_with(int(sys.argv[2]))
    pipe = Connection(int(sys.argv[1]))
    try:
        _run(pipe, pipe.recv())
    except (EOFError, BrokenPipeError):  # `scale` is gone
        os._exit(0)
    except JaxtrainError as error:
        _say(pipe, Failure(error.exit_code, str(error)))
    except BaseException:
        _say(pipe, Failure(70, traceback.format_exc()))
    os._exit(0)


def _say(pipe: Connection, failure: Failure) -> None:
    try:
        pipe.send(failure)
    except OSError:
        os._exit(0)


def _run(pipe: Connection, job: Job) -> None:
    if job.cores:
        os.sched_setaffinity(0, job.cores)  # before a library starts its threads
    if code_in(flatten(to_dict(job.config))):
        add_working_directory()
    import jax  # noqa: PLC0415  the affinity is set by now

    from jaxtrain.distributed.cluster import ProcessInfo  # noqa: PLC0415
    from jaxtrain.distributed.initialize import initialize, set_threads  # noqa: PLC0415
    from jaxtrain.scaling.paced import Paced  # noqa: PLC0415
    from jaxtrain.training.jax_settings import check_compile_cache, set_environment  # noqa: PLC0415
    from jaxtrain.training.session import train  # noqa: PLC0415

    set_environment(job.config)
    check_compile_cache()
    if job.cores or job.simulated:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", job.devices)
    if job.processes > 1:
        initialize(ProcessInfo(f"127.0.0.1:{job.port}", job.processes, job.index), {}, 120)
    elif job.cores:
        set_threads()  # as `initialize` does, so that joining adds nothing but communication
    train(job.config, job.workdir, num_devices=job.devices, quiet=True, callbacks=[Paced(pipe)])
