"""The launch scripts on a real Slurm, of two nodes emulated on this machine, and a real OpenMPI; skipped where they are not.

Needs root, and Debian's packages slurm-wlm (with munge) and openmpi-bin: `apt-get install slurm-wlm openmpi-bin`, then
`pytest -m slow tests/faults/test_slurm.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import yaml

pytestmark = pytest.mark.slow

LAUNCH = runs.ROOT / "launch"
NODES = ("n1", "n2")

# The digits, read slowly enough that a signal hits a step.
SLOW = """
import dataclasses, time

from jaxtrain.data import registry

class Slow:
    def __init__(self, base):
        self.base, self.shape = base, base.shape

    def __len__(self):
        return len(self.base)

    def read(self, indices):
        time.sleep(0.1)
        return self.base.read(indices)

def digits(config, image_size):
    found = registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
    return dataclasses.replace(found, train=Slow(found.train))
"""
SLOW_FIELDS = runs.SMALL | {
    "data.name": "slow:digits", "data.residency": "stream", "data.workers": 0, "train.eval_every": "0",
    "checkpoint.every": "1000",
}  # fmt: skip


def find(program: str) -> str:
    """Its path; `sbin` is not on every PATH."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or ""


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """For the scripts: this interpreter as `python`, and what `tmp_path` holds to import."""
    (tmp_path / "slow.py").write_text(SLOW)
    paths = os.pathsep.join([str(runs.ROOT), str(tmp_path)])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"} | more


class Slurm:
    """A controller and two nodes, with all they write in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._key, self._socket = folder / "munge.key", folder / "munge.socket"
        self._key.write_bytes(os.urandom(1024))
        self._key.chmod(0o600)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={runs.free_port()} CPUs=8 Gres=gpu:4"
            for name in NODES
        )
        for number in range(4):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={folder}/gpu[0-3]\n")
        self.conf = folder / "slurm.conf"
        # cred_expire: a requeued job starts so long after its end, else two minutes.
        self.conf.write_text(f"""\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={runs.free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={self._socket},cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=10
ReturnToService=2
{nodes}
PartitionName=main Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP
""")

    def start(self) -> None:
        """Starts the daemons; returns once both nodes are there."""
        folder = self.folder
        (folder / "state").mkdir()
        munge = (
            f"--key-file {self._key} --socket {self._socket} --pid-file {folder}/munge.pid --seed-file {folder}/seed"
        )
        self._start("munged", "--foreground", "--force", "--log-file", folder / "munge.log", *munge.split())
        _wait(self._socket.exists, 20, "munged")
        self._start("slurmctld", "-D", "-f", self.conf)
        for name in NODES:
            self._start("slurmd", "-D", "-f", self.conf, "-N", name)
        _wait(lambda: self.run("sinfo", "--noheader", "-o", "%T %D").split() == ["idle", "2"], 60, "the nodes")

    def _start(self, program: str, *arguments: object) -> None:
        with (self.folder / f"{program}-{len(self._daemons)}.log").open("w") as log:
            command = [find(program), *map(str, arguments)]
            self._daemons.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=self.environment({**os.environ}))
            )

    def environment(self, base: dict[str, str]) -> dict[str, str]:
        """`base` with what the commands of this Slurm need."""
        outside = {name: value for name, value in base.items() if not name.startswith("SLURM_")}
        return outside | {"SLURM_CONF": str(self.conf)}

    def run(self, *command: object) -> str:
        """Runs a command of Slurm; returns what it printed, or '' where it failed."""
        words = list(map(str, command))
        found = subprocess.run(
            words, capture_output=True, text=True, env=self.environment({**os.environ}), timeout=60, check=False
        )
        return found.stdout if found.returncode == 0 else ""

    def stop(self) -> None:
        """Ends all jobs, then the daemons."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.run("scancel", "--signal=KILL", "--full", "--user=root")
            self.run("scancel", "--user=root")
            time.sleep(2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def submit(self, tmp_path: Path, options: list[str], arguments: list[str]) -> Job:
        """launch/slurm.sbatch with two tasks on the two nodes."""
        variables = {
            "JAXTRAIN_COORDINATOR": f"127.0.0.1:{runs.free_port()}", "VENV": str(tmp_path / "none"), "MODULES": "",
        }  # fmt: skip
        output = tmp_path / "output.txt"
        shape = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={output}"]
        done = subprocess.run(
            ["sbatch", "--parsable", *shape, *options, str(LAUNCH / "slurm.sbatch"), *arguments],
            cwd=runs.ROOT,
            env=self.environment(environment(tmp_path, **variables)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), output)


class Job:
    """A job of `Slurm`."""

    def __init__(self, slurm: Slurm, number: str, output: Path):
        self._slurm, self.number, self._output = slurm, number, output

    @property
    def output(self) -> str:
        """What it printed so far, in all its starts."""
        return self._output.read_text() if self._output.exists() else ""

    def field(self, name: str) -> str:
        """What `scontrol show job` says."""
        found = re.search(rf"\b{name}=(\S+)", self._slurm.run("scontrol", "show", "job", self.number))
        return found[1] if found else ""

    def end(self, seconds: float = 500) -> str:
        """Waits for it; returns its state and exit code."""
        states = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        _wait(lambda: self.field("JobState") in states, seconds, f"end of the job: {self.output}")
        return f"{self.field('JobState')} {self.field('ExitCode')}"


def _wait(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {seconds:.0f} s"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    missing = [program for program in ("slurmctld", "slurmd", "munged", "sbatch") if not find(program)]
    if missing:
        pytest.skip(f"Slurm is not installed (no {', '.join(missing)}): apt-get install slurm-wlm")
    if os.geteuid():
        pytest.skip("emulating Slurm's nodes needs root")
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


def saved_and_resumed(text: str) -> tuple[list[int], list[int]]:
    """The steps that a job saved at, and those it went on from, as process 0 said."""
    saved = re.findall(r"^0: .*Stopped after step (\d+) and saved it", text, re.MULTILINE)
    resumed = re.findall(r"^0: .*resumed from .*/(\d+)", text, re.MULTILINE)
    return [int(step) for step in saved], [int(step) for step in resumed]


def test_two_tasks_on_two_nodes_reach_the_end(slurm, tmp_path):
    arguments = ["--config", "configs/quickstart.py", "--simulate-devices", "1", "--config.train.steps=20"]
    job = slurm.submit(tmp_path, [], [*arguments, "--workdir", str(tmp_path / "run")])
    assert job.end() == "COMPLETED 0:0", job.output
    assert runs.checkpoints(tmp_path / "run")[-1] == 20
    assert {path.name for path in (tmp_path / "run" / "logs").iterdir()} == {"process_0.log", "process_1.log"}


def test_an_error_that_no_restart_mends_ends_the_job_with_its_code(slurm, tmp_path):
    arguments = [
        "--config",
        "configs/quickstart.py",
        "--config.data.global_batch=0",
        "--workdir",
        str(tmp_path / "run"),
    ]
    job = slurm.submit(tmp_path, [], arguments)
    assert job.end() == "FAILED 64:0", job.output
    assert job.field("Restarts") == "0"


def test_scancel_with_a_signal_saves_and_the_job_is_requeued(slurm, tmp_path):
    workdir = tmp_path / "run"
    arguments = runs.arguments(workdir, SLOW_FIELDS | {"train.steps": 60}, "--simulate-devices", "1")
    job = slurm.submit(tmp_path, [], arguments)
    _wait(lambda: runs.count_rows(workdir) >= 6, 200, f"six steps: {job.output}")
    slurm.run("scancel", "--signal=TERM", job.number)
    assert job.end() == "COMPLETED 0:0", job.output
    assert job.field("Restarts") == "1"
    saved, resumed = saved_and_resumed(job.output)
    assert len(saved) == 1
    assert resumed == saved, job.output
    assert len(runs.losses(workdir)) == 60, "each step once"


def test_scancel_saves_and_the_job_is_gone(slurm, tmp_path):
    workdir = tmp_path / "run"
    arguments = runs.arguments(workdir, SLOW_FIELDS | {"train.steps": 600}, "--simulate-devices", "1")
    job = slurm.submit(tmp_path, [], arguments)
    _wait(lambda: runs.count_rows(workdir) >= 6, 200, f"six steps: {job.output}")
    slurm.run("scancel", job.number)
    assert job.end().startswith("CANCELLED")
    _wait(lambda: saved_and_resumed(job.output)[0], 30, f"checkpoint: {job.output}")
    (saved,), _ = saved_and_resumed(job.output)
    assert runs.checkpoints(workdir)[-1] == saved
    assert job.field("Restarts") == "0"


def test_the_time_limit_saves_and_the_job_is_requeued(slurm, tmp_path):
    """Slurm looks at time limits every half minute or so, so the signal comes some time in the first minute."""
    workdir = tmp_path / "run"
    arguments = runs.arguments(workdir, SLOW_FIELDS | {"train.steps": 700}, "--simulate-devices", "1")
    job = slurm.submit(tmp_path, ["--time=2", "--signal=TERM@60"], arguments)
    assert job.end() == "COMPLETED 0:0", job.output
    assert int(job.field("Restarts")) >= 1
    saved, resumed = saved_and_resumed(job.output)
    assert saved
    assert resumed == saved, job.output
    assert len(runs.losses(workdir)) == 700, "each step once"


def test_a_job_that_is_submitted_trains_on_two_nodes(slurm, tmp_path):
    """`jaxtrain submit` of a job file, whose variables reach the tasks."""
    variables = {"JAXTRAIN_COORDINATOR": f"127.0.0.1:{runs.free_port()}", "VENV": "none", "MODULES": ""}
    job = {
        "name": "two-nodes", "config": "quickstart", "overrides": {"train.steps": 20}, "scheduler": "slurm", "nodes": 2,
        "resources": {"cpu": 1}, "time_limit": "00:10:00", "environment": variables,
    }  # fmt: skip
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    done = subprocess.run(
        [sys.executable, "-m", "jaxtrain", "submit", str(file)],
        env=slurm.environment(environment(tmp_path)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    number = re.search(r"Submitted batch job (\d+)", done.stdout)
    assert number, done.stdout
    submitted = Job(slurm, number[1], tmp_path / f"two-nodes-{number[1]}.log")
    assert submitted.end() == "COMPLETED 0:0", submitted.output
    run = tmp_path / "runs" / "two-nodes"
    assert runs.checkpoints(run)[-1] == 20
    assert {path.name for path in (run / "logs").iterdir()} == {"process_0.log", "process_1.log"}


# ------------------------------------------------------------------------------------------------------------- OpenMPI


@contextlib.contextmanager
def mpirun(tmp_path: Path, arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """launch/mpirun.sh with two processes; its output goes to output.txt."""
    if not find("mpirun"):
        pytest.skip("OpenMPI is not installed (no mpirun): apt-get install openmpi-bin")
    variables = {"PORT": str(runs.free_port())}
    if os.geteuid() == 0:
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [str(LAUNCH / "mpirun.sh"), "--oversubscribe", "-n", "2", "--", *arguments]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, text=True, env=environment(tmp_path, **variables)
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_two_processes_of_openmpi_reach_the_end(tmp_path):
    arguments = ["--config", str(runs.RECIPE), "--simulate-devices", "1", "--config.train.steps=20"]
    with mpirun(tmp_path, [*arguments, "--workdir", str(tmp_path / "run")]) as process:
        assert process.wait(runs.SECONDS) == 0, (tmp_path / "output.txt").read_text()
    assert runs.checkpoints(tmp_path / "run")[-1] == 20
    assert {path.name for path in (tmp_path / "run" / "logs").iterdir()} == {"process_0.log", "process_1.log"}


def test_sigterm_to_the_mpirun_script_saves(tmp_path):
    workdir = tmp_path / "run"
    arguments = runs.arguments(workdir, SLOW_FIELDS | {"train.steps": 600}, "--simulate-devices", "1")
    with mpirun(tmp_path, arguments) as process:
        _wait(lambda: runs.count_rows(workdir) >= 6, 200, "six steps")
        process.send_signal(signal.SIGTERM)
        output = tmp_path / "output.txt"
        assert process.wait(60) == 75, output.read_text()
        (step,) = set(re.findall(r"Stopped after step (\d+) and saved it", output.read_text()))
    assert runs.checkpoints(workdir)[-1] == int(step)
