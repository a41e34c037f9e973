"""Detects which process of a run this one is: from the flags, or the variables of Slurm, OpenMPI, Kubernetes or torchrun."""

from __future__ import annotations

import dataclasses
import os
import re
import zlib
from collections.abc import Mapping

from jaxtrain.errors import ConfigError, EnvironmentMismatchError

# Above the ports that Linux gives to outgoing connections (32768 - 60999), so that a job's port is rarely taken.
_FIRST_PORT, _PORTS = 61440, 4096

FLAGS = "the flags"
PROCESS_VARIABLES = {
    "coordinator": "JAXTRAIN_COORDINATOR",
    "processes": "JAXTRAIN_NUM_PROCESSES",
    "index": "JAXTRAIN_PROCESS_ID",
}

JOB = "JAXTRAIN_JOB"  # set by `jaxtrain launch`: the same for all of its starts
_RESTARTS = {"SLURM_JOB_ID": "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID": "TORCHELASTIC_RESTART_COUNT"}


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """One of a run's processes."""

    coordinator: str
    """HOST:PORT at which process 0 waits for the others."""
    processes: int
    """How many the run has."""
    index: int
    """Of this one, from 0."""
    source: str = FLAGS
    """Where this comes from, for error texts."""

    def __str__(self) -> str:
        return f"process {self.index} of {self.processes}"

    @property
    def is_local(self) -> bool:
        """Whether all processes are on one host, so that no other host needs to reach the coordinator."""
        return self.address[0] in ("127.0.0.1", "localhost")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port. Raises `ConfigError` where the coordinator is not HOST:PORT."""
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"--coordinator {self.coordinator!r}: must be HOST:PORT.")
        return host.strip("[]"), int(port)


def detect_process(
    coordinator: str = "", processes: int = 0, index: int = -1, environment: Mapping[str, str] = os.environ
) -> ProcessInfo | None:
    """Which process this is, or None in a run of one process.

    The flags come first, then their variables (`PROCESS_VARIABLES`), then what the scheduler sets.

    Args:
      coordinator: --coordinator; '' where it was not given.
      processes: --num-processes; 0 where it was not given.
      index: --process-id; -1 where it was not given.
      environment: the environment variables.

    Raises:
      ConfigError: the flags do not fit together.
      EnvironmentMismatchError: a scheduler started several processes, and its variables do not say enough to join them; or
        it gave the job several tasks, and the command was started once.
    """
    coordinator = coordinator or environment.get(PROCESS_VARIABLES["coordinator"], "")
    processes = processes or _number(environment, PROCESS_VARIABLES["processes"], 0)
    index = index if index >= 0 else _number(environment, PROCESS_VARIABLES["index"], -1)
    if processes or index >= 0:
        if index < 0 and "JOB_COMPLETION_INDEX" in environment:  # Kubernetes numbers the pods of an indexed job
            index = _number(environment, "JOB_COMPLETION_INDEX", -1)
        return _from_flags(coordinator, processes, index)
    for detect in (_slurm, _openmpi, _kubernetes, _torchrun):
        if (process := detect(environment, coordinator)) is not None:
            _ = process.address  # checks it
            return process
    if coordinator:
        raise ConfigError("--coordinator, --num-processes and --process-id go together.")
    return None


def _from_flags(coordinator: str, processes: int, index: int) -> ProcessInfo:
    if not (coordinator and processes > 0 and index >= 0):
        raise ConfigError("--coordinator, --num-processes and --process-id go together.")
    if index >= processes:
        raise ConfigError(f"--process-id {index}: must be below --num-processes {processes}.")
    process = ProcessInfo(coordinator, processes, index)
    _ = process.address  # checks it
    return process


def job_ids(environment: Mapping[str, str] = os.environ, *, again: bool = False) -> set[str]:
    """Identifies the jobs that may have started this run, and may start it again: the launcher's, Slurm's, torchrun's.

    again: only the jobs of which this may not be the first start.
    """
    ids = {JOB: environment.get(JOB, "")}
    for name, restarts in _RESTARTS.items():
        if not again or _number(environment, restarts, 0) > 0:
            ids[name] = environment.get(name, "")
    return {f"{name}={value}" for name, value in ids.items() if value}


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.lstrip("-").isdigit():
        raise EnvironmentMismatchError(f"The variable {name} is {text!r} and must be a whole number.")
    return int(text)


def _port(job: str) -> int:
    """A port for the job: the same on all its processes, and most probably not that of another job."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS


def _slurm(environment: Mapping[str, str], coordinator: str) -> ProcessInfo | None:
    if "SLURM_JOB_ID" not in environment:
        return None
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 0)
    if tasks == 0:
        asked = _number(environment, "SLURM_NTASKS", 1)
        if asked > 1:
            raise EnvironmentMismatchError(
                f"Slurm gave this job {asked} tasks and the command was started once: start it with srun, or with "
                "--standalone to train in this process alone."
            )
        return None
    if tasks == 1:
        return None
    job = f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_STEP_ID', '0')}"
    host = first_host(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))
    return ProcessInfo(coordinator or f"{host}:{_port(job)}", tasks, _number(environment, "SLURM_PROCID", -1), "Slurm")


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: 'gpu[003-007,12],cpu1' is gpu003."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise EnvironmentMismatchError("Slurm does not say which nodes this job has: set --coordinator HOST:PORT.")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _openmpi(environment: Mapping[str, str], coordinator: str) -> ProcessInfo | None:
    processes = _number(environment, "OMPI_COMM_WORLD_SIZE", 0)
    if processes <= 1:
        return None
    index = _number(environment, "OMPI_COMM_WORLD_RANK", -1)
    if not coordinator:
        # OpenMPI 4: "<job>;tcp://<address>[,<address>...]:<port>" of mpirun, on whose host the first process is
        uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
        address = re.search(r"tcp://([^,:;]+)", uri)
        if address is None:
            raise EnvironmentMismatchError(
                f"OpenMPI started {processes} processes and does not say where the first one is: set "
                "JAXTRAIN_COORDINATOR=HOST:PORT (as launch/mpirun.sh does), or --standalone to train in this process alone."
            )
        coordinator = f"{address[1]}:{_port(uri.partition(';')[0])}"
    return ProcessInfo(coordinator, processes, index, "OpenMPI")


def _kubernetes(environment: Mapping[str, str], coordinator: str) -> ProcessInfo | None:
    if "KUBERNETES_SERVICE_HOST" not in environment or "JOB_COMPLETION_INDEX" not in environment:
        return None
    raise EnvironmentMismatchError(
        "This pod belongs to an indexed job, and "
        + (
            "JAXTRAIN_NUM_PROCESSES is not set"
            if coordinator
            else "JAXTRAIN_COORDINATOR and JAXTRAIN_NUM_PROCESSES are not"
        )
        + ": set both as launch/kubernetes/jobset.yaml does, or --standalone to train in this pod alone."
    )


def _torchrun(environment: Mapping[str, str], coordinator: str) -> ProcessInfo | None:
    processes = _number(environment, "WORLD_SIZE", 0)
    if processes <= 1 or "RANK" not in environment:
        return None
    if not coordinator and not ("MASTER_ADDR" in environment and "MASTER_PORT" in environment):
        raise EnvironmentMismatchError(
            f"WORLD_SIZE is {processes}, and MASTER_ADDR or MASTER_PORT is not set: set both, or --standalone to train in "
            "this process alone."
        )
    coordinator = coordinator or f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    return ProcessInfo(coordinator, processes, _number(environment, "RANK", -1), "RANK and WORLD_SIZE")


__all__ = ["FLAGS", "PROCESS_VARIABLES", "ProcessInfo", "detect_process", "first_host"]
