"""Jobs for the schedulers of clusters and clouds. Each is given to its own command, with the scripts of launch/."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxtrain.errors import ConfigError, EnvironmentMismatchError, JaxtrainError
from jaxtrain.jobs.job import Job

_PORT = 61440


@dataclasses.dataclass(frozen=True)
class Submission:
    """What a scheduler is given."""

    command: tuple[str, ...]
    manifest: str = ""
    """What the command reads: from a file, whose name is added to it."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Variables of the command's own process, which the scheduler hands on: their values are in no file and no list of
    processes."""


class SubmitError(JaxtrainError):
    """A scheduler's command has refused a job."""


def submission(job: Job) -> Submission:
    """What the scheduler of `job` is given. Raises `ConfigError` where it cannot run such a job."""
    return _SCHEDULERS[job.scheduler](job)


def submit(job: Job) -> str:
    """Gives a job to its scheduler, and returns what that says.

    Raises:
      EnvironmentMismatchError: the scheduler's command is not on this machine.
      SubmitError: the command has refused the job.
    """
    given = submission(job)
    if shutil.which(given.command[0]) is None:
        raise EnvironmentMismatchError(
            f"Job {job.name}: {given.command[0]} is not on this machine; submit it where {job.scheduler} is, or take "
            "another scheduler (scheduler: local)."
        )
    with tempfile.TemporaryDirectory() as folder:  # which this user alone can read
        words = list(given.command)
        if given.manifest:
            file = Path(folder, f"{job.name}.yaml")
            file.write_text(given.manifest)
            words.append(str(file))
        done = subprocess.run(
            words,
            cwd=job.directory,
            env={**os.environ, **given.environment},
            text=True,
            capture_output=True,
            check=False,
        )
    if done.returncode:
        raise SubmitError(
            f"Job {job.name}: {given.command[0]} refused it (exit code {done.returncode}): "
            f"{' '.join((done.stderr or done.stdout).split())}"
        )
    return done.stdout.strip()


# ---------------------------------------------------------------------------------------------------------- schedulers


def _slurm(job: Job) -> Submission:
    tasks = max(job.resources.gpu, 1) if job.config else 1  # a process a GPU, as launch/slurm.sbatch expects it
    options = {
        "job-name": job.name, "comment": job.description, "partition": job.queue, "nodes": job.nodes,
        "ntasks-per-node": tasks, "gpus-per-node": job.resources.gpu, "cpus-per-task": max(job.resources.cpu // tasks, 1),
        "mem": f"{job.resources.gibibytes}G" if job.resources.memory else "", "time": job.time_limit,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in options.items() if value != ""]
    if job.config:
        return Submission(
            ("sbatch", *words, str(launch_file("slurm.sbatch")), *job.train_arguments()), environment=job.environment
        )
    return Submission(("sbatch", *words, f"--wrap=exec {shlex.join(job.command)}"), environment=job.environment)


def _pbs(job: Job) -> Submission:
    if job.nodes > 1:
        raise ConfigError(f"Job {job.name}: nodes={job.nodes}: with PBS, submit launch/pbs.sh itself; docs/deploy.md.")
    memory = f":mem={job.resources.gibibytes}gb" if job.resources.memory else ""
    gpus = f":ngpus={job.resources.gpu}" if job.resources.gpu else ""
    words = ["qsub", "-V", "-N", job.name[:15], "-l", f"select=1:ncpus={job.resources.cpu}{gpus}{memory}"]
    words += ["-q", job.queue] if job.queue else []
    environment = dict(job.environment)
    if job.time_limit:
        hours, minutes, _ = map(int, job.time_limit.split(":"))
        words += ["-l", f"walltime={job.time_limit}"]
        environment["TRAIN_MINUTES"] = str(max(60 * hours + minutes - 5, 1))
    if job.command:
        return Submission((*words, "--", *job.command), environment=environment)
    if any(set(word) & set(" \t\n") for word in job.train_arguments()):
        raise ConfigError(f"Job {job.name}: for PBS no argument may hold a space; {job.train_arguments()} do.")
    environment["JAXTRAIN_ARGS"] = " ".join(job.train_arguments())
    return Submission((*words, str(launch_file("pbs.sh"))), environment=environment)


def _kubernetes(job: Job) -> Submission:
    if not job.image or not job.config:
        raise ConfigError(f"Job {job.name}: for Kubernetes it needs an image (of launch/Dockerfile) and a config.")
    manifest = yaml.safe_load(launch_file("kubernetes/jobset.yaml").read_text())
    manifest["metadata"] = {"name": job.name, "annotations": {"description": job.description}}
    if job.queue:
        manifest["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
        manifest["spec"]["suspend"] = True  # Kueue starts it
    manifest["spec"]["network"]["subdomain"] = job.name
    workers = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    workers |= {"completions": job.nodes, "parallelism": job.nodes}
    (container,) = workers["template"]["spec"]["containers"]
    requests = {"cpu": str(job.resources.cpu)} | ({"memory": str(job.resources.memory)} if job.resources.memory else {})
    container |= {
        "image": job.image,
        "args": ["train", *_in_container(job)],
        "resources": {
            "requests": requests,
            "limits": {"nvidia.com/gpu": job.resources.gpu} if job.resources.gpu else {},
        },
    }
    variables = {each["name"]: each for each in container["env"]}
    variables["JAXTRAIN_COORDINATOR"]["value"] = f"{job.name}-workers-0-0.{job.name}:{_PORT}"
    variables["JAXTRAIN_NUM_PROCESSES"]["value"] = str(job.nodes)
    documents = [manifest]
    if job.environment:  # in a Secret, since everybody who may look at jobs sees what is in them
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": job.name},
            "stringData": dict(job.environment),
        }
        container["envFrom"] = [{"secretRef": {"name": job.name}}]
        documents.insert(0, secret)
    return Submission(("kubectl", "apply", "-f"), yaml.safe_dump_all(documents, sort_keys=False))


def _in_container(job: Job) -> list[str]:
    """The arguments of training with the work directory on the volume that all pods share."""
    words = job.train_arguments()
    words[words.index("--workdir") + 1] = job.workdir if job.workdir.startswith("/") else f"/shared/runs/{job.name}"
    return words


def _skypilot(job: Job) -> Submission:
    if not job.config or (job.resources.gpu and not job.resources.accelerator):
        raise ConfigError(f"Job {job.name}: for SkyPilot it needs a config, and resources.accelerator, such as A100.")
    task: dict[str, Any] = yaml.safe_load(launch_file("skypilot.yaml").read_text())
    resources: dict[str, Any] = {**task["resources"], "cpus": f"{job.resources.cpu}+"}
    resources.pop("accelerators")
    if job.resources.gpu:
        resources["accelerators"] = {job.resources.accelerator: job.resources.gpu}
    if job.resources.memory:
        resources["memory"] = f"{job.resources.gibibytes}+"
    if job.image:
        resources["image_id"] = f"docker:{job.image}"
    before, _, after = task["run"].partition("--config ")
    connect = after[after.index("--coordinator") :]
    task |= {"name": job.name, "num_nodes": job.nodes, "resources": resources}
    task["run"] = f"{before}{shlex.join(_in_container(job))} \\\n  {connect}"
    task["envs"] = {**task["envs"], **job.environment}
    if job.requirements:
        task["setup"] += f".venv/bin/pip install {shlex.join(job.requirements)}\n"
    return Submission(("sky", "jobs", "launch", "--yes"), yaml.safe_dump(task, sort_keys=False))


_SCHEDULERS: dict[str, Callable[[Job], Submission]] = {
    "slurm": _slurm, "pbs": _pbs, "kubernetes": _kubernetes, "skypilot": _skypilot,
}  # fmt: skip


def launch_file(name: str) -> Path:
    """A file of launch/: of an installed package, or of the checkout that it is run from."""
    package = Path(__file__).resolve().parents[1]
    return next(path for folder in (package, package.parent) if (path := folder / "launch" / name).is_file())
