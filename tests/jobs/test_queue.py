"""The local queue through its commands: jobs that are submitted, run, die, are stopped; GPUs that are not there are NVML's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml

from jaxtrain.checkpoint import lease
from jaxtrain.cli import main
from jaxtrain.errors import ConfigError
from jaxtrain.jobs.job import read_job
from jaxtrain.jobs.queue import Entry, Queue
from jaxtrain.jobs.run_status import is_run, read_status
from jaxtrain.jobs.schedulers import submission

# Two GPUs. A file memory-N beside the module has the bytes in use on GPU N, whatever processes NVML may list.
NVML = """
import pathlib
class NVMLError(Exception): pass
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = nvmlEventTypeXidCriticalError = 1
nvmlMemory_v2 = 2
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUUID(handle): return f"GPU-{handle}"
def nvmlDeviceGetName(handle): return "H100"
def nvmlDeviceGetMemoryInfo(handle, version=1):
    file = pathlib.Path(__file__).with_name(f"memory-{handle}")
    return type("Info", (), {"total": 80 << 30, "used": int(file.read_text()) if file.exists() else 0})
def nvmlDeviceGetTotalEccErrors(handle, *_):
    return pathlib.Path(__file__).with_name(f"broken-{handle}").exists()
def nvmlEventSetCreate(): return object()
def nvmlDeviceRegisterEvents(*_): pass
def nvmlEventSetWait_v2(*_): raise NVMLError("timeout")
"""


class Desk:
    """A folder with jobs, a queue of its own, and the servers that were started on it."""

    def __init__(self, folder: Path):
        self.folder, self.queue = folder, Queue(folder / "queue")
        self.modules = folder / "modules"
        self.modules.mkdir()
        (self.modules / "pynvml.py").write_text(NVML)
        path = f"{self.modules}:{runs.ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}:{runs.ROOT}"
        self.environment = {"JAXTRAIN_QUEUE_DIR": str(self.queue.path), "PYTHONPATH": path, "TMPDIR": str(folder)}
        self.servers: list[subprocess.Popen[str]] = []

    def submit(self, name: str, **values: Any) -> Entry:
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"name": name, **values}))
        assert main(["submit", str(file)]) == 0
        return self.queue.find(name)

    def script(self, name: str, text: str, **values: Any) -> Entry:
        return self.submit(name, command=["sh", "-c", text], **values)

    def serve(self, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jaxtrain", "queue", "serve", *more]
        environment = os.environ | self.environment
        self.servers.append(
            subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, cwd=self.folder)
        )
        return self.servers[-1]

    def work_through(self) -> str:
        """Serves until nothing is left, and returns what the server said."""
        _, said = self.serve("--until-empty").communicate(timeout=runs.SECONDS)
        return said

    def kill(self) -> None:
        """Ends servers and runners as a power cut does."""
        for server in self.servers:
            server.kill()
            server.wait()
        for entry in self.queue.entries():
            subprocess.run(["pkill", "-9", "-f", str(entry.path)], check=False)


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Iterator[Desk]:
    made = Desk(tmp_path)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(made.modules))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    yield made
    made.kill()
    sys.modules.pop("pynvml", None)


def wait_for(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + runs.SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------------------ the walk


@pytest.mark.faults
def test_a_run_from_init_to_its_end(desk, capsys, monkeypatch):
    """init, submit, status, a killed process, stop, resume, logs, status."""
    monkeypatch.chdir(desk.folder)
    assert main(["init", "walk"]) == 0
    file = desk.folder / "walk" / "job.yaml"
    values = yaml.safe_load(file.read_text())
    fields = runs.SMALL | {
        "data.name": "slow:digits",
        "data.residency": "stream",
        "data.workers": 0,
        "train.epochs": 10,
    }
    (desk.modules / "slow.py").write_text(SLOW)
    file.write_text(yaml.safe_dump(values | {"overrides": fields, "environment": {"SECRET_WORD": "xyzzy"}}))
    assert main(["submit", str(file)]) == 0
    run, server = file.parent / "runs" / "walk", desk.serve()

    def status() -> dict[str, Any]:
        capsys.readouterr()
        assert main(["status", "--root", str(desk.folder), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    wait_for(
        lambda: (found := status())["runs"] and found["runs"][0]["state"] == "running" and found["runs"][0]["step"] > 2
    )
    before = status()["runs"][0]
    assert (before["path"], before["last_step"], before["devices"]) == (str(run), 40, "1 x cpu")
    os.kill(before["pid"], signal.SIGKILL)
    wait_for(lambda: (now := status()["runs"][0])["state"] == "running" and now["pid"] != before["pid"])
    assert main(["stop", str(run)]) == 0
    found = status()
    assert (found["jobs"][0]["state"]["status"], found["runs"][0]["state"]) == ("stopped", "stopped")
    (desk.modules / "fast").touch()
    assert main(["resume", "walk"]) == 0
    wait_for(lambda: status()["jobs"][0]["state"]["status"] == "done")
    assert status()["runs"][0]["step"] == 40
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "train"] == list(range(1, 41))
    capsys.readouterr()
    assert main(["logs", str(run)]) == 0
    assert capsys.readouterr().out.count("work directory: ") == 3  # the first start, after the kill, after the stop
    server.terminate()
    assert server.wait(runs.SECONDS) == 0
    told = subprocess.run(
        ["grep", "-rl", "xyzzy", str(run), str(desk.queue.path)], capture_output=True, text=True, check=False
    )
    assert [Path(line).name for line in told.stdout.split()] == ["job.json"]
    assert desk.queue.find("walk").path.joinpath("job.json").stat().st_mode & 0o077 == 0


@pytest.mark.faults
def test_a_sweep_is_one_job(desk, capsys, monkeypatch):
    """It is killed and tried again, stopped and resumed, and does nothing twice. Its directory is called as the job."""
    monkeypatch.chdir(desk.folder)
    (desk.modules / "slow.py").write_text(SLOW)
    slow = {"data.name": "slow:digits", "data.residency": "stream", "data.workers": 0, "train.epochs": 6}
    source = {"config": str(runs.RECIPE), "overrides": runs.SMALL | slow, "grid": {"optim.learning_rate": [0.05, 0.1]}}
    (desk.folder / "rates.sweep.yaml").write_text(yaml.safe_dump(source | {"workdir": "rates"}))
    job = desk.submit("rates", command=[sys.executable, "-m", "jaxtrain", "sweep", "rates.sweep.yaml"])
    server, folder = desk.serve(), desk.folder / "rates"
    first = folder / "learning_rate=0.05"
    wait_for(lambda: is_run(first) and read_status(first).step > 2)
    holder = lease.look(folder)
    assert holder is not None
    os.kill(holder.owner.pid, signal.SIGKILL)
    wait_for(lambda: (now := lease.look(folder)) is not None and now.lives and now.owner != holder.owner)
    wait_for(lambda: read_status(first).state == "running" and len(list((first / "starts").glob("*.json"))) == 2)
    assert main(["stop", "rates"]) == 0
    assert (job.state().status, read_status(first).state) == ("stopped", "stopped")
    (desk.modules / "fast").touch()
    assert main(["resume", "rates"]) == 0
    wait_for(lambda: job.state().status in ("done", "failed"))
    assert job.state().status == "done", job.log.read_text()
    for run in (first, folder / "learning_rate=0.1"):
        assert [row["step"] for row in runs.rows(run, "train")] == list(range(1, 25))
    capsys.readouterr()
    assert main(["logs", "rates"]) == 0
    assert "learning_rate=0.1 done at step 24" in capsys.readouterr().out
    server.terminate()
    assert server.wait(runs.SECONDS) == 0


# The digits, a tenth of a second a batch until there is a file `fast`.
SLOW = """
import dataclasses, pathlib, time
import tiny

class Slow:
    def __init__(self, base): self.base, self.shape = base, base.shape
    def __len__(self): return len(self.base)
    def read(self, indices):
        if not pathlib.Path(__file__).with_name("fast").exists():
            time.sleep(0.1)
        return self.base.read(indices)

def digits(config, image_size):
    found = tiny.digits(config, image_size=image_size)
    return dataclasses.replace(found, train=Slow(found.train))
"""


def test_jobs_run_fail_are_tried_again_and_stopped(desk):
    good = desk.script("good", "echo $WORD >> good.txt", environment={"WORD": "hello"})
    bad = desk.script("bad", "echo x >> bad.txt; echo the reason; exit 3", retries=1)
    mended = desk.script("mended", "echo x >> mended.txt; test $(wc -l < mended.txt) = 2", retries=2)
    missing = desk.submit("missing", command=["no-such-program"], retries=0)
    never = desk.script("never", "echo x > never.txt")
    never.ask_to_stop()
    said = desk.work_through()
    states = {entry.id.partition("-")[2]: entry.state() for entry in (good, bad, mended, missing, never)}
    assert {name: state.status for name, state in states.items()} == {
        "good": "done", "bad": "failed", "mended": "done", "missing": "failed", "never": "stopped"
    }  # fmt: skip
    assert (states["bad"].code, states["bad"].tries, states["bad"].reason) == (3, 2, "exit code 3: the reason")
    assert (states["mended"].tries, states["good"].tries, states["never"].tries) == (2, 1, 0)
    assert (desk.folder / "good.txt").read_text() == "hello\n"
    assert "bad is failed: exit code 3: the reason" in said
    assert not (desk.folder / "never.txt").exists()


def test_a_reboot_loses_and_repeats_nothing(desk):
    done = desk.script("done", "echo x >> done.txt")
    cut = desk.script("cut", "echo x >> cut.txt; while test $(wc -l < cut.txt) = 1; do sleep 0.1; done", retries=0)
    later = desk.script("later", "echo x >> later.txt", resources={"cpu": len(os.sched_getaffinity(0))})
    desk.serve()
    wait_for(lambda: done.state().status == "done" and (desk.folder / "cut.txt").exists())
    desk.kill()
    wait_for(lambda: not cut.is_running())
    (state,) = (cut.state(),)
    values = json.loads((cut.path / "state.json").read_text())
    (cut.path / "state.json").write_text(json.dumps(values | {"boot": "another"}))  # the kernel has booted anew
    assert (state.status, later.state().status) == ("running", "waiting")
    desk.work_through()
    assert [entry.state().status for entry in (done, cut, later)] == ["done"] * 3
    assert (cut.state().tries, cut.state().failures) == (2, 0)
    assert [len((desk.folder / f"{name}.txt").read_text().split()) for name in ("done", "cut", "later")] == [1, 2, 1]


@pytest.mark.faults
def test_jobs_outlive_their_server_and_end_with_their_runner(desk):
    job = desk.script("long", "echo $$ > pid; while ! test -e go; do sleep 0.1; done; echo x >> long.txt")
    first = desk.serve()
    wait_for(lambda: (desk.folder / "pid").exists() and (desk.folder / "pid").read_text())
    second = desk.serve()
    assert second.wait(runs.SECONDS) == 73  # one server is enough
    first.terminate()
    assert first.wait(runs.SECONDS) == 0
    assert job.is_running()
    desk.serve()
    (desk.folder / "go").touch()
    wait_for(lambda: job.state().status == "done")
    assert (desk.folder / "long.txt").read_text() == "x\n"
    (desk.folder / "go").unlink()
    (desk.folder / "pid").unlink()
    job.start_again()
    wait_for(lambda: (desk.folder / "pid").exists() and (desk.folder / "pid").read_text())
    pid = int((desk.folder / "pid").read_text())
    desk.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


# ---------------------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.faults
def test_two_jobs_never_share_a_gpu_and_a_busy_one_is_never_leased(desk):
    """Six jobs of a GPU each on two; each fails where another one has its GPU at that moment."""
    alone = """mkdir "on-$CUDA_VISIBLE_DEVICES" && echo "$CUDA_VISIBLE_DEVICES" >> gpus.txt
        sleep 0.2 && rmdir "on-$CUDA_VISIBLE_DEVICES" """
    for number in range(6):
        desk.script(f"job-{number}", alone, resources={"gpu": 1, "cpu": 1}, retries=0)
    desk.work_through()
    assert [entry.state().status for entry in desk.queue.entries()] == ["done"] * 6
    assert set((desk.folder / "gpus.txt").read_text().split()) == {"GPU-0", "GPU-1"}
    (desk.modules / "memory-0").write_text(str(1 << 30))  # a stranger's, in another container
    (desk.folder / "gpus.txt").unlink()
    for number in range(2):
        desk.script(f"more-{number}", alone, resources={"gpu": 1}, retries=0)
    both = desk.script("both", "true", resources={"gpu": 2})
    desk.serve()
    wait_for(
        lambda: (
            both.state().reason == "needs 2 GPUs, and 1 are free" and desk.queue.find("more-1").state().status == "done"
        )
    )
    assert (desk.folder / "gpus.txt").read_text().split() == ["GPU-1"] * 2
    (desk.modules / "memory-0").unlink()
    wait_for(lambda: both.state().status == "done")


@pytest.mark.faults
def test_submits_at_one_moment_are_all_kept_and_two_queues_share_no_gpu(desk):
    """Eight commands at once for two queues of this user, each with a server; a job fails where its GPU is another's too."""
    alone = "mkdir on-$CUDA_VISIBLE_DEVICES && sleep 0.3 && rmdir on-$CUDA_VISIBLE_DEVICES"
    queues, submits, servers = [Queue(desk.folder / f"queue-{number}") for number in range(2)], [], []
    command = [sys.executable, "-m", "jaxtrain"]
    for number in range(8):
        file = desk.folder / f"job-{number}.yaml"
        values = {"name": "same", "command": ["sh", "-c", alone], "resources": {"gpu": 1, "cpu": 1}, "retries": 0}
        file.write_text(yaml.safe_dump(values))
        environment = os.environ | desk.environment | {"JAXTRAIN_QUEUE_DIR": str(queues[number % 2].path)}
        submits.append(subprocess.Popen([*command, "submit", str(file)], env=environment, stdout=subprocess.DEVNULL))
    assert [process.wait(runs.SECONDS) for process in submits] == [0] * 8
    assert [len(set(queue.entries())) for queue in queues] == [4, 4]
    for queue in queues:
        environment = os.environ | desk.environment | {"JAXTRAIN_QUEUE_DIR": str(queue.path)}
        servers.append(subprocess.Popen([*command, "queue", "serve", "--until-empty"], env=environment))
    assert [process.wait(runs.SECONDS) for process in servers] == [0, 0]
    assert [entry.state().status for queue in queues for entry in queue.entries()] == ["done"] * 8


def test_a_job_that_dies_is_tried_on_another_gpu_where_nvml_blames_its_own(desk):
    dies = "echo $CUDA_VISIBLE_DEVICES >> gpus.txt; test $CUDA_VISIBLE_DEVICES = GPU-1 || { touch modules/broken-0; exit 1; }"
    job = desk.script("dies", dies, resources={"gpu": 1}, retries=1)
    desk.work_through()
    assert (job.state().status, (desk.folder / "gpus.txt").read_text().split()) == ("done", ["GPU-0", "GPU-1"])


# ------------------------------------------------------------------------------------------------------- the job's file

BAD = {
    "name: Upper": "small letters",
    "name: x\nconfigs: quickstart": "Did you mean 'config'?",
    "name: x": "a config (a recipe) or a command",
    "name: x\nconfig: quickstart\ncommand: [a]": "and not both",
    "config: quickstart": "the job has no name",
    "name: x\nname: y\nconfig: quickstart": "is there twice",
    "name: x\nconfig: quickstart\nresources: {gpus: 1}": "Did you mean 'gpu'?",
    "name: x\nconfig: quickstart\nresources: {memory: 8Gb}": "a unit",
    "name: x\nconfig: quickstart\nresources: {gpu: -1}": "at least 0",
    "name: x\nconfig: quickstart\nresources: {gpu: true}": "a whole number",
    "name: x\nconfig: quickstart\nscheduler: slrum": "one of local, slurm",
    "name: x\nconfig: quickstart\ntime_limit: soon": "hours, minutes and seconds",
    "name: x\nconfig: quickstart\nenvironment: {A: [hidden-word]}": "environment: its value must be",
    "name: x\nconfig: quickstart\nenvironment: {A: 'hidden-word}": "is no YAML (line",
    "name: x\nconfig: quickstart\noverrides: {train.epoch: 3}": "train.epochs",
    "name: x\ncommand: [a]\noverrides: {train.epochs: 3}": "overrides belongs to a config",
    "name: x\ncommand: []": "a command",
    "name: x\nconfig: quickstart\nnodes: 2": "take another scheduler",
    "name: x\nconfig: quickstart\nresources: {cpu: 100000}": "this host has",
    "name: x\nconfig: quickstart\nrequirements: [no-such-package-at-all]": "pip install",
    "- a list": "must hold keys and values",
    "!!python/object/apply:os.system [echo]": "is no YAML",
}


def test_a_wrong_job_is_refused_in_a_sentence_and_nothing_is_queued(desk, capsys):
    for text, wanted in BAD.items():
        file = desk.folder / "job.yaml"
        file.write_text(text)
        code = main(["submit", str(file)])
        said = capsys.readouterr().err
        assert code in (64, 78), text
        assert wanted in said, text
        assert said.count("\n") == 1, text
        assert "hidden-word" not in said
    assert not desk.queue.entries()
    assert main(["init", str(desk.folder / "Not Good")]) == 64
    assert main(["submit", str(desk.folder / "absent.yaml")]) == 64


@pytest.mark.parametrize("name", ["single", "multi", "production"])
def test_the_jobs_that_are_shipped(name):
    job = read_job(runs.ROOT / "launch" / "jobs" / f"{name}.yaml")
    gpu, cpu, memory = {"single": (1, 4, 8), "multi": (4, 16, 32), "production": (8, 32, 64)}[name]
    assert (job.resources.gpu, job.resources.cpu, job.resources.gibibytes) == (gpu, cpu, memory)
    assert main(["config", "--config", job.config]) == 0


# ---------------------------------------------------------------------------------------------------------- schedulers


def job_file(folder: Path, **values: Any) -> Path:
    file = folder / "job.yaml"
    base = {
        "name": "swin",
        "config": "swin_tiny_cifar10",
        "workdir": "/shared/runs/swin",
        "overrides": {"train.epochs": 3},
    }
    limits = {"resources": {"gpu": 4, "cpu": 16, "memory": "32Gi"}, "environment": {"TOKEN": "xyzzy"}, "queue": "long"}
    file.write_text(yaml.safe_dump(base | limits | values))
    return file


def test_slurm_and_pbs_get_their_options_and_the_variables_by_the_environment(tmp_path):
    job = read_job(job_file(tmp_path, scheduler="slurm", nodes=2, time_limit="02:30:00"))
    given = submission(job)
    words = " ".join(given.command)
    assert words.startswith("sbatch --job-name=swin")
    for option in (
        "--partition=long",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=4",
        "--mem=32G",
        "--time=02:30:00",
    ):
        assert option in given.command
    assert words.endswith("slurm.sbatch --config swin_tiny_cifar10 --workdir /shared/runs/swin --config.train.epochs=3")
    assert "xyzzy" not in words
    assert given.environment["TOKEN"] == "xyzzy"
    given = submission(read_job(job_file(tmp_path, scheduler="pbs", time_limit="02:30:00")))
    assert "select=1:ncpus=16:ngpus=4:mem=32gb" in given.command
    assert given.environment["TRAIN_MINUTES"] == "145"
    assert given.environment["JAXTRAIN_ARGS"].endswith("--config.train.epochs=3")


def test_kubernetes_and_skypilot_get_a_manifest(tmp_path):
    job = read_job(job_file(tmp_path, scheduler="kubernetes", image="me/jaxtrain:1", nodes=2))
    secret, jobset = yaml.safe_load_all(submission(job).manifest)
    assert secret["stringData"] == {"TOKEN": "xyzzy"}
    assert "xyzzy" not in json.dumps(jobset)
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "long"}
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = pod["template"]["spec"]["containers"]
    assert (pod["completions"], container["image"], container["resources"]["limits"]) == (
        2,
        "me/jaxtrain:1",
        {"nvidia.com/gpu": 4},
    )
    assert {"name": "JAXTRAIN_COORDINATOR", "value": "swin-workers-0-0.swin:61440"} in container["env"]
    with pytest.raises(ConfigError, match=r"resources\.accelerator"):
        submission(read_job(job_file(tmp_path, scheduler="skypilot")))
    resources = {"gpu": 4, "cpu": 16, "memory": "32Gi", "accelerator": "A100"}
    task = yaml.safe_load(submission(read_job(job_file(tmp_path, scheduler="skypilot", resources=resources))).manifest)
    assert task["resources"]["accelerators"] == {"A100": 4}
    run = re.sub(r"\\\n\s*", "", task["run"])
    assert "--config swin_tiny_cifar10 --workdir /shared/runs/swin --config.train.epochs=3 --coordinator" in run


def test_a_scheduler_that_is_not_there_or_refuses(desk, tmp_path, capsys, monkeypatch):
    file = job_file(tmp_path, scheduler="slurm")
    bin = tmp_path / "bin"
    bin.mkdir()
    monkeypatch.setenv("PATH", str(bin))
    assert main(["submit", str(file)]) == 78
    assert "sbatch is not on this machine" in capsys.readouterr().err
    sbatch = bin / "sbatch"
    sbatch.write_text("#!/bin/sh\necho no such partition >&2; exit 1\n")
    sbatch.chmod(0o755)
    assert main(["submit", str(file)]) == 70
    assert "no such partition" in capsys.readouterr().err
    sbatch.write_text('#!/bin/sh\necho "Submitted batch job 7 $TOKEN"\n')
    assert main(["submit", str(file)]) == 0
    assert "Submitted batch job 7 xyzzy" in capsys.readouterr().out  # the scheduler's own word; it has the variable
    assert main(["submit", str(file), "--dry-run"]) == 0
    assert "xyzzy" not in capsys.readouterr().out
