"""The scripts and manifests of launch/. What a script starts is recorded by stand-ins for the programs that it calls."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxtrain import errors
from jaxtrain.cli import parse
from jaxtrain.config import Config
from jaxtrain.distributed.cluster import ProcessInfo, detect_process
from jaxtrain.recipes import resolve

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SECONDS = 300  # that a script may take; one that waits for what does not come would take longer
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
NOT_MENDED = {64, 65, 66, 73, 76, 78}  # by another start

# Notes its name, arguments and some variables; then does what $NAME_does says, else ends with $NAME_ends.
STAND_IN = r"""#!/usr/bin/env bash
name=${0##*/}
printf '%s\0' "$name" "${OMP_NUM_THREADS-}" "${JAX_LOCAL_DEVICE_IDS-}" "$@" $'\036' >>"$RECORD"
does=${name}_does ends=${name}_ends
eval "${!does-}"
exit "${!ends-0}"
"""
SRUN = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
SSH = 'shift 3; exec sh -c "$*"'  # behind -o BatchMode=yes and the host's name
# Two processes with OpenMPI's variables; its own options end before the word bash.
MPIRUN = """
while [[ $1 != bash ]]; do shift; done
for rank in 0 1; do
  OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=$rank OMPI_COMM_WORLD_LOCAL_SIZE=2 "$@" &
done
wait
exit 0
"""


# A process that waits for SIGTERM, once it has made a file that says so.
SAVES = f"""exec {sys.executable} -c '
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(os.environ["RECORD"] + f".{{os.getpid()}}", "w").close()
time.sleep(600)
'"""


class Stage:
    """A folder of stand-ins, first on the PATH."""

    def __init__(self, folder: Path):
        self.folder, self._record = folder, folder / "record"
        self._variables = {"PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(self._record), "VENV": "none"}
        self.stand_in("python")

    def stand_in(self, name: str, *, does: str = "", ends: int = 0, path: str = "") -> None:
        file = self.folder / (path or name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(STAND_IN)
        file.chmod(0o755)
        self._variables |= {f"{name}_does": does, f"{name}_ends": str(ends)}

    def start(self, *words: str, cwd: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
        foreign = ("SLURM_", "PBS_", "JAXTRAIN_", "JAX_", "XLA_", "OMPI_")
        outside = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        environment = outside | self._variables | variables
        return subprocess.Popen(
            ["bash", *words], env=environment, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, *words: str, cwd: Path = ROOT, **variables: str) -> tuple[int, str]:
        process = self.start(*words, cwd=cwd, **variables)
        output, _ = process.communicate(timeout=SECONDS)
        return process.returncode, output

    def calls(self, name: str) -> list[dict[str, Any]]:
        """Of each call of a stand-in: `arguments`, `threads`, `devices`."""
        text = self._record.read_text() if self._record.exists() else ""
        words = [call.split("\0") for call in text.split("\x1e\0") if call]
        found = [call[:-1] for call in words if call[0] == name]
        return [{"threads": call[1], "devices": call[2], "arguments": call[3:]} for call in found]

    def trained(self) -> list[Any]:
        """The parsed arguments of each `python -m jaxtrain train` that was started, by process."""
        runs = [call["arguments"] for call in self.calls("python")]
        assert all(words[:3] == ["-m", "jaxtrain", "train"] for words in runs)
        return sorted((parse(words[2:]) for words in runs), key=lambda arguments: arguments.process_id)


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path)


def config_of(arguments: Any) -> Config:
    return resolve(arguments.config, arguments.overrides).config


def assert_is_vgg19(arguments: Any) -> None:
    config = config_of(arguments)
    assert config.model.name == "vgg19_bn"
    assert (config.train.epochs, config.data.global_batch, config.data.workers) == (30, 512, 8)
    assert config.checkpoint.milestone_every.replace(" ", "") == "5epochs"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash_and_says_what_it_is_for(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert any(f"launch/{script.name}" in line for line in lines[1:10]), "the command that uses it"


# ------------------------------------------------------------------------------------------------------------ one host


@pytest.mark.parametrize("processes", [(), ("2",)])
def test_local_launches_one_process_or_as_many_as_it_is_told(stage, processes):
    code, _ = stage.run(
        "launch/local.sh", *processes, "--config", "configs/quickstart.py", "--workdir", "a b", python_ends="76"
    )
    assert code == 76
    (call,) = stage.calls("python")
    arguments = parse(call["arguments"][2:])
    assert (arguments.command, arguments.nproc) == ("launch", int(*processes or "1"))
    train = parse(arguments.rest)
    assert (train.command, train.config, train.workdir) == ("train", "configs/quickstart.py", "a b")


def test_local_says_how_to_use_it(stage):
    assert stage.run("launch/local.sh")[0] == 64
    assert not stage.calls("python")


# --------------------------------------------------------------------------------------------------------------- Slurm


def test_slurm_asks_for_what_the_job_needs():
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    assert dict(options) == {
        "job-name": "jaxtrain-vgg19", "nodes": "1", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "8",
        "time": "02:00:00", "output": "%x-%j.log", "open-mode": "append", "requeue": "", "signal": "TERM@180",
    }  # fmt: skip


def slurm(stage: Stage, *arguments: str, ends: int = 0, **variables: str) -> tuple[int, str]:
    stage.stand_in("srun", does=SRUN)
    stage.stand_in("scontrol")
    stage.stand_in("python", ends=ends)
    of_slurm = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_GPUS_ON_NODE": "4"}
    return stage.run("launch/slurm.sbatch", *arguments, **of_slurm, **{"SLURM_NTASKS_PER_NODE": "4"} | variables)


def test_slurm_trains_vgg19(stage):
    assert slurm(stage, SLURM_CPUS_PER_TASK="8")[0] == 0
    (arguments,) = stage.trained()
    assert_is_vgg19(arguments)
    (call,) = stage.calls("python")
    assert (call["threads"], call["devices"]) == ("8", "")
    (srun,) = stage.calls("srun")
    options = {"--cpus-per-task=8", "--gpu-bind=none", "--kill-on-bad-exit=0", "--wait=120"}
    assert options <= set(srun["arguments"])


def test_slurm_trains_what_it_is_told(stage):
    code, _ = slurm(stage, "--config", "configs/quickstart.py:zero1", "--config.train.steps=5", WORKDIR="some where")
    assert code == 0
    (arguments,) = stage.trained()
    assert (arguments.config, arguments.workdir) == ("configs/quickstart.py:zero1", "some where")
    assert arguments.overrides == [("train.steps", "5")]


def test_slurm_gives_a_task_that_is_alone_on_its_node_all_gpus(stage):
    slurm(stage, SLURM_NTASKS_PER_NODE="1")
    assert stage.calls("python")[0]["devices"] == "0,1,2,3"


@pytest.mark.parametrize("code", [0, 64, 65, 66, 70, 73, 75, 76, 78, 130, 137, 143])
def test_slurm_requeues_a_saved_run_and_nothing_else(stage, code):
    found, _ = slurm(stage, ends=code)
    assert found == code
    requeued = [call["arguments"] for call in stage.calls("scontrol")]
    assert requeued == ([["requeue", "17"]] if code in (75, 143) else [])


def test_slurm_does_not_requeue_for_ever(stage):
    code, output = slurm(stage, ends=75, SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
    assert code == 75
    assert "is not any more" in output
    assert not stage.calls("scontrol")


def test_slurm_goes_on_without_a_module(stage):
    code, output = slurm(stage, **{"BASH_FUNC_module%%": "() { return 1; }", "MODULES": "cuda/12.4 nccl"})
    assert code == 0
    assert "there is no module cuda/12.4" in output
    assert "there is no module nccl" in output
    assert len(stage.trained()) == 1


# ------------------------------------------------------------------------------------------------------- ssh, PBS, MPI


def assert_joined(runs: list[Any], coordinator: str) -> None:
    assert [arguments.process_id for arguments in runs] == list(range(len(runs)))
    assert {arguments.num_processes for arguments in runs} == {len(runs)}
    assert {arguments.coordinator for arguments in runs} == {coordinator}


def hosts(stage: Stage) -> str:
    path = stage.folder / "hosts"
    path.write_text("# two of them\nme@alpha slots=4\n\nbeta  # the other")
    return str(path)


def test_ssh_starts_a_process_on_each_host(stage):
    stage.stand_in("ssh", does=SSH)
    workdir = 'it\'s "a"\n$HOME'
    arguments = ["--config", "configs/quickstart.py", "--workdir", workdir]
    code, output = stage.run("launch/ssh.sh", hosts(stage), *arguments, PORT="7000", OMP_NUM_THREADS="3", JAX_X="a'b")
    assert code == 0, output
    assert sorted(call["arguments"][2] for call in stage.calls("ssh")) == ["beta", "me@alpha"]
    assert all("export JAX_X='a'\\''b' ; " in call["arguments"][3] for call in stage.calls("ssh"))
    assert_joined(stage.trained(), "alpha:7000")
    assert {arguments.workdir for arguments in stage.trained()} == {workdir}
    assert {call["threads"] for call in stage.calls("python")} == {"3"}


def test_ssh_ends_with_the_code_of_the_cause(stage):
    stage.stand_in("ssh", does=SSH)
    stage.stand_in("python", does='[[ "$*" == *"--process-id 1"* ]] && { sleep 0.5; exit 65; }', ends=70)
    code, output = stage.run("launch/ssh.sh", hosts(stage), "--config", "configs/quickstart.py")
    assert code == 65
    assert "process 0 on me@alpha ended with exit code 70" in output


def test_ssh_passes_sigterm_on(stage):
    stage.stand_in("ssh", does=SSH)
    stage.stand_in("python", does=SAVES)
    process = stage.start("launch/ssh.sh", hosts(stage), "--config", "configs/quickstart.py")
    deadline = time.monotonic() + SECONDS
    while len(list(stage.folder.glob("record.*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, output


def test_ssh_wants_hosts(stage):
    empty = stage.folder / "empty"
    empty.write_text("# none\n")
    assert stage.run("launch/ssh.sh", str(empty), "--config", "x")[0] == 64
    assert stage.run("launch/ssh.sh", "no-such-file", "--config", "x")[0] == 64


def pbs(stage: Stage, *nodes: str, **variables: str) -> tuple[int, str]:
    stage.stand_in("ssh", does=SSH)
    (stage.folder / "nodes").write_text("".join(f"{node}\n" for node in nodes))
    of_pbs = {"PBS_JOBID": "1203.server01", "PBS_O_WORKDIR": str(ROOT), "PBS_NODEFILE": str(stage.folder / "nodes")}
    return stage.run("launch/pbs.sh", **of_pbs, **variables)


def test_pbs_trains_vgg19_on_one_node(stage):
    assert pbs(stage, "n1", "n1", python_ends="75")[0] == 75
    (arguments,) = stage.trained()
    assert_is_vgg19(arguments)
    assert arguments.standalone
    assert not stage.calls("ssh")


def test_pbs_starts_a_process_on_each_node(stage):
    given = "--config configs/quickstart.py:zero1,bf16 --workdir runs/x"
    code, output = pbs(stage, "n1", "n1", "n2", "n2", JAXTRAIN_ARGS=given)
    assert code == 0, output
    assert_joined(stage.trained(), f"n1:{61440 + 203 * 8}")
    assert {(each.config, each.workdir) for each in stage.trained()} == {("configs/quickstart.py:zero1,bf16", "runs/x")}


def test_pbs_saves_before_its_time_is_up(stage):
    stage.stand_in("python", does=SAVES)
    assert pbs(stage, "n1", TRAIN_MINUTES="0.05")[0] == 75


def test_mpirun_gives_each_process_its_place(stage):
    stage.stand_in("mpirun", does=MPIRUN)
    arguments = ["--config", "configs/quickstart.py", "--workdir", "a b"]
    code, output = stage.run("launch/mpirun.sh", "-n", "2", "--map-by", "x", "--", *arguments, PORT="7000")
    assert code == 0, output
    assert all(call["arguments"][:4] == ["-n", "2", "--map-by", "x"] for call in stage.calls("mpirun"))
    assert_joined(stage.trained(), "127.0.0.1:7000")
    assert {arguments.workdir for arguments in stage.trained()} == {"a b"}
    assert sorted(call["devices"] for call in stage.calls("python")) == ["0", "1"]


def test_mpirun_takes_another_coordinator(stage):
    stage.stand_in("mpirun", does=MPIRUN)
    stage.run(
        "launch/mpirun.sh", "-n", "2", "--", "--config", "configs/quickstart.py", JAXTRAIN_COORDINATOR="10.0.0.7:7000"
    )
    assert_joined(stage.trained(), "10.0.0.7:7000")


def test_mpirun_wants_two_dashes(stage):
    assert stage.run("launch/mpirun.sh", "-n", "2", "--config", "x")[0] == 64


# ----------------------------------------------------------------------------------------------------------- manifests


def test_the_codes_that_no_restart_mends_are_those_of_the_errors():
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.JaxtrainError)
    ]
    assert {kind.exit_code for kind in kinds} == NOT_MENDED | {70, 75, 130}
    assert not any(kind.retry for kind in kinds if kind.exit_code in NOT_MENDED)


def test_the_jobset_joins_its_pods_and_restarts_what_a_restart_mends():
    """What it leaves out of the whole schema was checked with that of JobSet's own definition."""
    jobset = yaml.safe_load((LAUNCH / "kubernetes" / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, spec = jobset["metadata"]["name"], jobset["spec"]
    assert spec["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name}
    assert spec["failurePolicy"]["maxRestarts"] > 0
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (group,) = spec["replicatedJobs"]
    job = group["template"]["spec"]
    assert (group["replicas"], job["completionMode"], job["backoffLimit"]) == (1, "Indexed", 0)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"], codes["containerName"]) == ("FailJob", "In", container["name"])
    assert set(codes["values"]) == NOT_MENDED
    assert pod["restartPolicy"] == "Never", "podFailurePolicy wants it"
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 1000
    assert container["resources"]["limits"]["nvidia.com/gpu"] > 0
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}

    arguments = parse(container["args"])
    assert config_of(arguments).model.name == "vgg19_bn"
    assert arguments.workdir.startswith(mounts["shared"])
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert variables["JAXTRAIN_DATA_DIR"].startswith(mounts["shared"])
    count = job["completions"]
    assert job["parallelism"] == count
    places = [detect_process(environment=variables | {"JOB_COMPLETION_INDEX": str(index)}) for index in range(count)]
    coordinator = f"{name}-{group['name']}-0-0.{name}:{container['ports'][0]['containerPort']}"
    assert [(place.coordinator, place.processes, place.index) for place in filter(None, places)] == [
        (coordinator, count, index) for index in range(count)
    ]


def test_skypilot_joins_the_machines(stage):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "envs", "setup", "run"}
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [70, 75]
    assert subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=False).returncode == 0
    assert "cuda12" in task["setup"]
    stage.stand_in("jaxtrain", path=".venv/bin/jaxtrain")
    for rank in range(task["num_nodes"]):
        variables = {
            "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": str(rank),
        }
        code, output = stage.run("-c", task["run"], cwd=stage.folder, **variables)
        assert code == 0, output
    found = [parse(call["arguments"]) for call in stage.calls("jaxtrain")]
    assert_joined(found, "10.0.0.7:61440")
    assert {arguments.config for arguments in found} == {"configs/vgg19_cifar10.py"}
    assert {config_of(arguments).data.global_batch for arguments in found} == {512}


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (LAUNCH / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines()) if name]


def test_the_image_trains_as_a_user_without_rights():
    found = instructions()
    assert found[0] == ("FROM", "python:3.12-slim")
    assert [rest for name, rest in found if name == "USER"] == ["1000:1000"]
    assert [name for name, _ in found if name in ("RUN", "COPY", "USER")][-1] == "USER", "all before is root's"
    assert json.loads(dict(found)["ENTRYPOINT"]) == ["jaxtrain"], "the exec form: signals reach it"
    parse([*json.loads(dict(found)["ENTRYPOINT"])[1:], "train", "--config", "configs/quickstart.py"])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (installed,) = re.findall(r'pip install "\.\[(\w+)\]"', " ".join(rest for name, rest in found if name == "RUN"))
    assert installed in extras
    allowed = {
        line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {word for name, rest in found if name == "COPY" for word in shlex.split(rest)[:-1]}
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)


# ------------------------------------------------------------------------------------------------------- docs/deploy.md


def test_the_guide_names_what_there_is():
    text = (ROOT / "docs" / "deploy.md").read_text()
    named = set(re.findall(r"launch/[\w./-]*\w", text))
    assert {str(path.relative_to(ROOT)) for path in LAUNCH.rglob("*") if path.is_file()} - {
        "launch/Dockerfile.dockerignore"
    } <= named
    assert all((ROOT / path).exists() for path in named)
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    commands = [line for line in blocks.splitlines() if line.startswith(("jaxtrain ", "python -m jaxtrain.main "))]
    assert commands
    for line in commands:
        words = shlex.split(line, comments=True)
        parse(words[1:] if words[0] == "jaxtrain" else ["train", *words[3:]])


def test_a_place_needs_no_more_than_the_guide_says():
    variables = {"JAXTRAIN_COORDINATOR": "h:1", "JAXTRAIN_NUM_PROCESSES": "2", "JAXTRAIN_PROCESS_ID": "1"}
    assert detect_process(environment=variables) == ProcessInfo("h:1", 2, 1)
