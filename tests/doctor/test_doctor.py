"""`jaxtrain doctor`: finds this machine in order, and each planted fault with its fix."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs

from jaxtrain.doctor import checks, facts
from jaxtrain.doctor.facts import Devices, Machine
from jaxtrain.host.backend import PACKAGES
from jaxtrain.host.gpus import Gpu

GIB = 1 << 30
FOUR = tuple(Gpu(f"GPU-{index}", "H100", 80 * GIB) for index in range(4))
CPU = Devices("cpu", 1, {"cpu": 1}, "cpu")
GPU = Devices("gpu", 4, {"H100": 4}, "cuda 12090")
VERSIONS = dict.fromkeys(PACKAGES, "1.0") | {"jax": "0.10.2", "jaxlib": "0.10.2"}
CUDA = VERSIONS | {"jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2", "nvidia-nccl-cu12": "2.27.3"}
# four GPUs, and nothing is wrong
SOUND = Machine(
    host="node1", system="Linux", python="3.11.7", cores=64, memory=512 * GIB, memory_free=400 * GIB, shared_memory=64 * GIB,
    versions=CUDA, gpus=FOUR, gpu_nodes=4, driver="570.1", devices=GPU,
)  # fmt: skip

# One GPU, in the place of NVML.
FAKE_NVML = """
class NVMLError(Exception): pass
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 1
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUUID(handle): return "GPU-7"
def nvmlDeviceGetName(handle): return "H100"
def nvmlDeviceGetMemoryInfo(handle): return type("Info", (), {"total": 80 << 30})
def nvmlDeviceGetTotalEccErrors(handle, *_): return 0
def nvmlEventSetCreate(): raise NVMLError("not supported")
def nvmlSystemGetDriverVersion(): return "570.1"
"""


def machine(**changes) -> Machine:
    """The sound one with changes."""
    return dataclasses.replace(SOUND, **changes)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """No other process is started: JAX finds a CPU, and two processes add right. Data and cache lie in `tmp_path`."""
    monkeypatch.setattr(facts, "find_devices", lambda: CPU)
    monkeypatch.setattr(checks, "add_over_loopback", lambda: [{"sum": 11}, {"sum": 11}])
    monkeypatch.setenv("JAXTRAIN_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return tmp_path


def examined(capsys, workdir: Path, *more: str) -> tuple[int, dict[str, dict], str]:
    """Exit code, the checks by name, and what was said on standard error."""
    code = runs.command_line(["doctor", "--json", "--workdir", str(workdir), *more])
    said = capsys.readouterr()
    return code, {check["name"]: check for check in json.loads(said.out)["checks"]}, said.err


# -------------------------------------------------------------------------------------------------------- whole command


def test_this_machine_is_in_order(capsys, tmp_path, monkeypatch):
    """For real: JAX is asked, and two processes join."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    code, results, said = examined(capsys, tmp_path / "runs", "--write")
    assert code == 0, said
    assert {check["state"] for check in results.values()} <= {"ok", "warning"}
    assert results["devices"]["found"].startswith("1 x cpu")
    assert results["collective"]["found"] == "2 processes joined over loopback (gloo) and added 11 for 11"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["machine.json"]
    facts = json.loads((tmp_path / "runs" / "machine.json").read_text())
    assert facts["devices"] == {"backend": "cpu", "count": 1, "kinds": {"cpu": 1}, "runtime": "cpu", "error": ""}
    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert facts["memory"] >= facts["memory_free"] > 0
    assert facts["versions"]["jax"] == facts["versions"]["jaxlib"]


def test_lines_for_a_person_and_nothing_left_behind(capsys, quick):
    assert runs.command_line(["doctor", "--workdir", str(quick)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok       devices: 1 x cpu") for line in lines)
    assert list(quick.iterdir()) == []


def test_a_gpu_that_jax_does_not_see(capsys, quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", runs.module("pynvml", FAKE_NVML))
    monkeypatch.delenv("JAX_PLATFORMS")
    code, results, said = examined(capsys, quick, "--write")
    assert code == 78
    assert results["devices"]["state"] == "problem"
    assert "1 x H100 and JAX sees none" in results["devices"]["found"]
    assert "cuda12" in results["devices"]["fix"]
    assert said.startswith("jaxtrain: 1 of 14 checks found a problem (devices: ")
    assert said.count("\n") == 1
    facts = json.loads((quick / "machine.json").read_text())  # the facts are kept all the same
    assert facts["gpus"] == [{"uuid": "GPU-7", "name": "H100", "memory": 80 * GIB, "fault": ""}]


def test_a_work_directory_that_cannot_be_written(capsys, quick):
    (quick / "file").write_text("")
    code, results, _ = examined(capsys, quick / "file" / "runs")
    assert code == 78
    assert results["work directory"]["state"] == "problem"
    assert "cannot be written" in results["work directory"]["found"]
    assert "--workdir" in results["work directory"]["fix"]
    assert runs.command_line(["doctor", "--workdir", str(quick / "file" / "runs"), "--write"]) == 73


def test_a_collective_that_adds_wrong(capsys, quick, monkeypatch):
    monkeypatch.setattr(checks, "add_over_loopback", lambda: [{"sum": 11}, {"sum": 10}])
    code, results, _ = examined(capsys, quick)
    assert code == 78
    assert "process 1 of 2 over loopback added 10 for 11" in results["collective"]["found"]


def test_a_collective_that_a_proxy_stops(capsys, quick, monkeypatch):
    monkeypatch.setattr(checks, "add_over_loopback", lambda: [{"error": "no answer"}, {"error": "no answer"}])
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    code, results, _ = examined(capsys, quick)
    assert code == 78
    assert results["proxies"]["state"] == "warning"
    assert results["collective"]["found"] == "process 0 of 2 over loopback: no answer"
    assert results["collective"]["fix"].startswith("export no_proxy=localhost,127.0.0.1,")


def test_an_option_that_there_is_not(capsys):
    assert runs.command_line(["doctor", "--wirte"]) == 64
    assert "Did you mean '--write'?" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- other processes


def test_a_jax_that_does_not_answer_in_time():
    assert facts.find_devices(seconds=0.01).error == "no answer within 0 s"


def test_why_a_process_ended():
    def ended(code: int, out: str, errors: str):
        return SimpleNamespace(returncode=code, communicate=lambda timeout: (out, errors))

    fatal = "W1 x\nF1120 19:35:09.773417   21091 parse_flags_from_env.cc:234] Unknown flag in XLA_FLAGS: --x\n*** trace ***\n"
    for process, wanted in [
        (ended(0, '[Gloo] Rank 0\n{"sum": 11}\n[Gloo] bye\n', "noise"), {"sum": 11}),
        (ended(1, "", fatal), {"error": "Unknown flag in XLA_FLAGS: --x"}),
        (ended(1, '{"sum": 11}\n', "Traceback\nRuntimeError: no\n\n"), {"error": "RuntimeError: no"}),
        (ended(-9, "", ""), {"error": "exit code -9 and no word"}),
        (ended(0, "", ""), {"error": "exit code 0 and no word"}),
    ]:
        assert facts._answer(process, 1.0) == wanted  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ each check

OLD = VERSIONS | {"flax": "0.9"}
LIMITED = machine(memory_free=GIB)


@pytest.mark.parametrize(
    ("check", "state", "found", "fix"),
    [
        (checks.check_devices(SOUND, {}), "ok", "4 x H100 (gpu)", ""),
        (checks.check_devices(machine(gpus=(), gpu_nodes=0, devices=CPU), {}), "ok", "1 x cpu", ""),
        (
            checks.check_devices(machine(devices=Devices(error="Unknown flag")), {"XLA_FLAGS": "--x"}),
            "problem", "JAX does not start: Unknown flag", "unset XLA_FLAGS=--x",
        ),
        (
            checks.check_devices(machine(gpus=(*FOUR[:3], dataclasses.replace(FOUR[3], fault="Xid 79"))), {}),
            "problem", "GPU-3 (Xid 79)", "replaced",
        ),
        (
            checks.check_devices(machine(devices=CPU), {"JAX_PLATFORMS": "cpu"}),
            "problem", "4 x H100 and JAX sees none", "unset JAX_PLATFORMS (cpu)",
        ),
        (
            checks.check_devices(machine(devices=CPU), {"CUDA_VISIBLE_DEVICES": ""}),
            "problem", "JAX sees none", "unset CUDA_VISIBLE_DEVICES",
        ),
        (checks.check_devices(machine(devices=CPU, versions=VERSIONS), {}), "problem", "sees none", "[cuda12]"),
        (checks.check_devices(machine(devices=CPU), {}), "problem", "sees none", "driver is too old"),
        (
            checks.check_devices(machine(devices=Devices("gpu", 3, {"H100": 3})), {}),
            "problem", "3 x H100 (gpu), of 4 GPUs", "nvidia-smi",
        ),
        (
            checks.check_devices(machine(devices=Devices("gpu", 2, {"H100": 2})), {"CUDA_VISIBLE_DEVICES": "0,1"}),
            "ok", "2 x H100 (gpu), of 4 GPUs", "",
        ),
        (checks.check_devices(machine(gpus=()), {}), "warning", "NVML does not answer", "nvidia-ml-py"),
        (
            checks.check_devices(machine(gpus=(), devices=CPU, versions=VERSIONS), {}),
            "warning", "/dev has 4 NVIDIA GPUs", "[cuda12]",
        ),
        (checks.check_driver(SOUND), "ok", "NVIDIA driver 570.1, jax-cuda12-plugin 0.10.2", ""),
        (checks.check_driver(machine(driver="470.82")), "problem", "470.82", "driver 525 or newer"),
        (
            checks.check_driver(machine(versions=VERSIONS | {"jax-cuda13-plugin": "0.10.2"})),
            "problem", "570.1", "driver 580 or newer",
        ),
        (checks.check_driver(machine(driver="")), "warning", "unknown", "nvidia-smi"),
        (checks.check_driver(machine(gpus=(), devices=CPU)), "ok", "no NVIDIA GPU", ""),
        (checks.check_memory(SOUND), "ok", "512.0 GiB, 400.0 GiB free", ""),
        (checks.check_memory(LIMITED), "warning", "1.0 GiB free", "end other programs"),
        (checks.check_memory(machine(shared_memory=64 << 20)), "warning", "/dev/shm 0.1 GiB", "--shm-size"),
        (checks.check_versions(CUDA, {"flax": "0.12.8"}), "ok", "jax 0.10.2", ""),
        (checks.check_versions(OLD, {"flax": "0.12.8"}), "problem", "too old: flax", "pip install"),
        (checks.check_versions({"jax": "0.10.2"}, {}), "problem", "missing: jaxtrain, jaxlib", "pip install"),
        (
            checks.check_versions(VERSIONS | {"jaxlib": "0.9.1"}, {}),
            "problem", "jax 0.10.2 does not go with jaxlib 0.9.1", "jaxlib==0.10.2",
        ),
        (
            checks.check_versions(CUDA | {"jax-cuda12-plugin": "0.10.0"}, {}),
            "problem", "jax-cuda12-plugin 0.10.0", "jax-cuda12-plugin==0.10.2",
        ),
        (checks.check_tensorflow(SOUND, False, {}), "ok", "not installed", ""),
        (checks.check_tensorflow(SOUND, True, {}), "warning", "all memory of the GPUs", "ALLOW_GROWTH=true"),
        (checks.check_tensorflow(SOUND, True, {"TF_FORCE_GPU_ALLOW_GROWTH": "true"}), "ok", "as it needs it", ""),
        (checks.check_tensorflow(machine(gpus=(), devices=CPU), True, {}), "ok", "no GPU", ""),
        (
            checks.check_xla_flags({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}),
            "warning", "simulates CPU devices", "--simulate-devices",
        ),
        (checks.check_xla_flags({"XLA_FLAGS": "--xla_dump_to=x"}), "ok", "--xla_dump_to=x", ""),
        (checks.check_visible_gpus(SOUND, {"CUDA_VISIBLE_DEVICES": "0,4"}), "problem", "names GPU 4", "name GPUs"),
        (checks.check_visible_gpus(SOUND, {"CUDA_VISIBLE_DEVICES": "-1"}), "warning", "hides every GPU", "unset"),
        (checks.check_visible_gpus(SOUND, {"CUDA_VISIBLE_DEVICES": "3"}), "ok", "'3'", ""),
        (checks.check_proxies("node1", {"HTTPS_PROXY": "x"}), "warning", "leaves out localhost", "no_proxy="),
        (
            checks.check_proxies("node1", {"http_proxy": "x", "no_proxy": "localhost, 127.0.0.1"}),
            "warning", "leaves out node1", "no_proxy=",
        ),
        (
            checks.check_proxies("node1.hpc", {"http_proxy": "x", "no_proxy": "localhost,127.0.0.1,.hpc"}),
            "ok", "excepts this host", "",
        ),
        (checks.check_proxies("node1", {"http_proxy": "x", "no_proxy": "*"}), "ok", "excepts this host", ""),
        (checks.check_scheduler({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}), "warning", "4 tasks", "srun"),
        (
            checks.check_scheduler({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}),
            "ok", "process 1 of 2 by RANK and WORLD_SIZE, coordinator a:1", "",
        ),
        (checks.check_scheduler({"SLURM_JOB_ID": "1"}), "ok", "SLURM_JOB_ID: a run here is one process", ""),
    ],
)  # fmt: skip
def test_each_fault_is_found_with_its_fix(check, state, found, fix):
    assert check.state == state, check
    assert found in check.found
    assert fix in check.fix
    assert bool(check.fix) == (state != "ok")


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    for free, state in ((GIB // 2, "problem"), (5 * GIB, "warning"), (50 * GIB, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert checks.check_disk("work directory", tmp_path, "choose another").state == state


def test_a_compile_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    check = checks.check_compile_cache({"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file" / "cache")})
    assert check.state == "warning"
    assert "JAX_COMPILATION_CACHE_DIR" in check.fix
    assert checks.check_compile_cache({"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}).state == "ok"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "jit_step-sha256-cache").write_bytes(b"what is this?")
    check = checks.check_compile_cache({"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")})
    assert (check.state, "1 entries are damaged" in check.found) == ("warning", True)
    assert "--clear-cache" in check.fix


def test_the_compile_cache_is_cleared_of_its_entries_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("jaxtrain.cli.doctor.examine", lambda *_: SimpleNamespace(checks=[]))
    for name in ("jit_step-sha256-cache", "jit_step-cache", "notes.txt"):
        (tmp_path / name).touch()
    assert runs.command_line(["doctor", "--clear-cache"]) == 0
    assert f"deleted 2 programs from {tmp_path}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_host_name_without_an_address(monkeypatch):
    def nobody(*_):
        raise socket.gaierror(-2, "Name or service not known")

    assert checks.check_network(socket.gethostname()).state == "ok"
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    check = checks.check_network("node1")
    assert check.state == "warning"
    assert "/etc/hosts" in check.fix
