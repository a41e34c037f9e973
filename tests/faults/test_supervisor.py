"""The supervisor, with processes that do nothing but end as they are told, and with GPUs that are not there."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import runs

from jaxtrain.distributed import supervisor
from jaxtrain.distributed.supervisor import (
    Ended,
    Gang,
    Options,
    Supervisor,
    TooFewGpusError,
    missing_gpus,
    root_cause,
    share,
)
from jaxtrain.host.gpus import Gpu, Gpus

# Counts its own starts, tells where it is, and then does what its argument says.
WORKER = textwrap.dedent(
    """
    import json, os, pathlib, signal, sys, time
    words = sys.argv[1:]
    process = int(words[words.index("--process-id") + 1]) if "--process-id" in words else 0
    starts = pathlib.Path(words[1]) / f"starts-{process}"
    count = len(starts.read_text().splitlines()) if starts.exists() else 0
    with starts.open("a") as file:
        file.write(os.environ.get("CUDA_VISIBLE_DEVICES", "") + "\\n")

    def beat(step, age=0.0):
        beat = {"time": time.monotonic() - age, "pid": os.getpid(), "phase": "step", "step": step}
        path = pathlib.Path(os.environ["JAXTRAIN_HEARTBEAT"])
        path.with_suffix(".part").write_text(json.dumps(beat))
        path.with_suffix(".part").replace(path)

    def wait_for_beat(process):
        path = pathlib.Path(os.environ["JAXTRAIN_HEARTBEAT"])
        while not path.with_name(f"beat-{process}.json").exists():
            time.sleep(0.01)

    def end(code, error, retry):
        report = {"process": process, "host": "here", "pid": 1, "time": 0.0, "code": code, "error": error,
                  "message": f"{error} of {process}", "retry": retry}
        pathlib.Path(os.environ["JAXTRAIN_ERROR_FILE"]).write_text(json.dumps(report))
        sys.exit(code)

    exec(words[0])
    """
)


@pytest.fixture(autouse=True)
def _short_reports(monkeypatch):
    monkeypatch.setattr(supervisor, "_REPORT_SECONDS", 0.5)  # of workers that have nothing to say


def command(tmp_path: Path, script: str) -> list[str]:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    return [sys.executable, str(worker), textwrap.dedent(script), str(tmp_path)]


def supervise(tmp_path: Path, script: str, gpus: Gpus | None = None, **options: object) -> int:
    return Supervisor(command(tmp_path, script), Options(**{"processes": 2, **options}), gpus or NoGpus()).run()


class NoGpus(Gpus):
    def __init__(self, *found: Gpu) -> None:
        self.found = list(found)

    def all(self) -> list[Gpu]:
        return self.found


def starts(tmp_path: Path, process: int = 0) -> list[str]:
    return (tmp_path / f"starts-{process}").read_text().splitlines()


def test_all_goes_well(tmp_path):
    assert supervise(tmp_path, "pass") == 0
    assert len(starts(tmp_path, 0)) == len(starts(tmp_path, 1)) == 1


def test_all_start_again_when_one_is_killed(tmp_path, capfd):
    script = """
        beat(5 * count)
        if count < 3 and process:
            wait_for_beat(0)
            os.kill(os.getpid(), signal.SIGKILL)
        if count < 3:
            time.sleep(600)
    """
    assert supervise(tmp_path, script) == 0
    assert len(starts(tmp_path, 0)) == len(starts(tmp_path, 1)) == 4
    said = capfd.readouterr().err
    assert said.count("was killed by SIGKILL") == 3
    assert "process 1 (pid " in said


def test_the_first_failure_is_the_cause_and_not_its_echo(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(supervisor, "_REPORT_SECONDS", runs.SECONDS)
    script = """
        if process == 0:
            beat(0)
            end(70, "PeerError", True)
        wait_for_beat(0)
        time.sleep(0.2)
        end(66, "CheckpointError", False)
    """
    assert supervise(tmp_path, script) == 66
    assert "process 1 (pid" in capfd.readouterr().err
    assert len(starts(tmp_path)) == 1, "no restart can mend that"


@pytest.mark.parametrize("code", [75, 130])
def test_a_run_that_was_stopped_and_saved_is_not_started_again(tmp_path, code):
    assert supervise(tmp_path, f"end({code}, 'PreemptedError', False)") == code
    assert len(starts(tmp_path)) == 1


def test_a_crash_loop_ends(tmp_path, capfd):
    script = """
        beat(37)
        if process:
            wait_for_beat(0)
            end(70, "RuntimeError", True)
        time.sleep(600)
        (starts.parent / "waited for").touch()
    """
    assert supervise(tmp_path, script) == 70
    assert len(starts(tmp_path)) == 3
    assert "giving up" in capfd.readouterr().err
    assert not (tmp_path / "waited for").exists()


def test_restarts_are_bounded_where_nothing_gets_further(tmp_path):
    script = "os.kill(os.getpid(), signal.SIGKILL)"
    assert supervise(tmp_path, script, processes=1, max_restarts=2) == 70
    assert len(starts(tmp_path)) == 3


def test_a_process_without_signs_of_life_is_replaced(tmp_path, capfd):
    script = """
        if not count:
            if process == 0:
                wait_for_beat(1)
            while not starts.with_name("starts-0").exists():  # the other one counts its starts before it is ended
                time.sleep(0.01)
            beat(7, age=3600 if process else 0)
            time.sleep(600)
    """
    assert supervise(tmp_path, script, hang=1) == 0
    said = capfd.readouterr().err
    assert re.search(r"process 1 \(pid \d+\) gave no sign of life for 36\d\d s, in 'step' after step 7", said), said
    assert len(starts(tmp_path, 0)) == len(starts(tmp_path, 1)) == 2


@pytest.mark.parametrize("longest", [0, 1, 2])
def test_of_several_silent_processes_the_longest_silent_is_named(tmp_path, longest):
    """All are found at once, and the supervisor has run for less time than any was silent. The fourth has yet to say a word."""
    script = f"""
        if process != 3:
            beat(process, age=3000 if process == {longest} else 1000)
        (starts.parent / f"told-{{process}}").touch()
        time.sleep(600)
    """
    with Gang(command(tmp_path, script), [()] * 4, Options(hang=0.1), "job") as gang:
        deadline = time.monotonic() + runs.SECONDS
        while len(list(tmp_path.glob("told-*"))) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        cause = root_cause(gang.watch([]))
    assert cause is not None
    assert (cause.process, cause.report) == (longest, None)
    age = re.match(rf"gave no sign of life for (\d+) s, in 'step' after step {longest} \(", cause.hung)
    assert age is not None, cause.hung
    assert int(age[1]) >= 3000
    others = {int(n): int(seconds) for n, seconds in re.findall(r"process (\d): (\d+) s", cause.hung)}
    assert others.keys() == {0, 1, 2} - {longest}
    assert all(1000 <= seconds < int(age[1]) for seconds in others.values())
    assert "process 3: none yet" in cause.hung


@pytest.mark.parametrize(
    ("end", "word"),
    [
        ("os.abort()", "SIGABRT"),
        ("end(70, 'HangError', True)", "HangError"),
        ("end(70, 'PeerError', True)", "PeerError"),
    ],
)
@pytest.mark.parametrize("hang", [0, 600])
def test_who_gave_up_waiting_for_a_silent_process_is_not_the_cause(tmp_path, end, word, hang):
    """JAX aborts a process that waits for one which is frozen, long before `--hang`."""
    cause = cause_of(tmp_path, hang, f"{end} if process == 0 else beat(7, age=25)")
    assert cause.process == 1
    assert re.search(rf"gave no sign of life for \d\d s, in 'step' after step 7 \(process 0: {word}\)", str(cause))


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
        ("end(70, 'ValueError', True)", "ended with ValueError"),
    ],
)
def test_who_failed_by_himself_is_the_cause_beside_a_silent_process(tmp_path, end, said):
    cause = cause_of(tmp_path, 600, f"{end} if process == 0 else beat(7, age=25)")
    assert (cause.process, said in str(cause)) == (0, True)


def cause_of(tmp_path: Path, hang: float, script: str) -> Ended:
    """Why a gang of two ended, of which process 1 tells of itself before process 0 begins."""
    waiting = "wait_for_beat(1) if process == 0 else None\n"
    with Gang(command(tmp_path, f"{waiting}{script}\ntime.sleep(600)"), [()] * 2, Options(hang=hang), "job") as gang:
        cause = root_cause(gang.watch([]))
    assert cause is not None
    return cause


def test_sigterm_is_passed_on_and_then_enforced(tmp_path):
    script = """
        def stop(*_):
            (starts.parent / "told").touch()
            end(75, "PreemptedError", False)

        signal.signal(signal.SIGTERM, signal.SIG_IGN if process else stop)
        (starts.parent / f"ready-{process}").touch()
        time.sleep(600)
        (starts.parent / "waited for").touch()
    """

    def send() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    assert supervise(tmp_path, script, grace=2) == 75
    assert (tmp_path / "told").exists()
    assert not (tmp_path / "waited for").exists()


MEMORY = Path("/sys/fs/cgroup/memory")  # control groups of version 1; where there are others, the test is skipped


@pytest.fixture
def little_memory():
    """A control group of 200 MB, to be entered by writing one's process number."""
    group = MEMORY / f"jaxtrain-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(200 << 20))
        (group / "memory.oom_control").read_text().index("oom_kill ")
    except (OSError, ValueError):
        pytest.skip("no memory control group can be made here (needs root and cgroup v1)")
    yield group / "cgroup.procs"
    group.rmdir()


def test_a_process_that_the_kernel_killed_for_memory_is_said_to_be_that(tmp_path, little_memory):
    (tmp_path / "worker.py").write_text("rows = []\nwhile True: rows.append(bytearray(b'x') * (8 << 20))\n")
    (tmp_path / "job.py").write_text(
        textwrap.dedent(
            f"""
            import os, pathlib, sys
            from jaxtrain.distributed.supervisor import Options, Supervisor
            pathlib.Path({str(little_memory)!r}).write_text(str(os.getpid()))
            sys.exit(Supervisor([sys.executable, {str(tmp_path / "worker.py")!r}], Options(max_restarts=1)).run())
            """
        )
    )
    job = subprocess.run([sys.executable, tmp_path / "job.py"], capture_output=True, text=True, check=False)
    assert job.returncode == 70, job.stderr
    assert job.stderr.count("was killed by SIGKILL (probably out of memory: the kernel killed it") == 2


# --------------------------------------------------------------------------------------------------------------- GPUs

FOUR = [Gpu(f"GPU-{i}", "H100", 80 << 30) for i in range(4)]


@pytest.mark.parametrize(
    ("count", "processes", "group", "sizes"),
    [
        (4, 4, 0, [1, 1, 1, 1]),
        (4, 2, 0, [2, 2]),
        (4, 1, 0, [4]),
        (3, 4, 0, [1, 1, 1]),
        (3, 2, 0, [1, 1]),
        (4, 1, 2, [2]),
        (5, 4, 2, [2, 2]),
    ],
)
def test_gpus_are_shared_out(count, processes, group, sizes):
    found = share([f"GPU-{i}" for i in range(count)], processes, group)
    assert [len(each) for each in found] == sizes
    assert len({uuid for each in found for uuid in each}) == sum(sizes)


def test_a_gpu_that_a_process_dies_on_twice_is_left_out(tmp_path, capfd):
    script = """
        beat(count)
        if "GPU-2" in os.environ["CUDA_VISIBLE_DEVICES"]:
            wait_for_beat(0), wait_for_beat(1), wait_for_beat(3)
            os.kill(os.getpid(), signal.SIGSEGV)
        if count < 2:
            time.sleep(600)
    """
    assert supervise(tmp_path, script, NoGpus(*FOUR), processes=4) == 0
    assert starts(tmp_path, 2) == ["GPU-2", "GPU-2", "GPU-3"]
    assert "GPU-2 is left out: 2 processes died on it" in capfd.readouterr().err


def test_a_gpu_with_a_fault_is_left_out_and_too_few_end_the_job(tmp_path, capfd):
    gpus = NoGpus(*FOUR[:3], Gpu("GPU-3", "H100", 80 << 30, "Xid 79"))
    assert supervise(tmp_path, "pass", gpus, processes=4) == 0
    assert [starts(tmp_path, i) for i in range(3)] == [["GPU-0"], ["GPU-1"], ["GPU-2"]]
    assert not (tmp_path / "starts-3").exists()
    assert "GPU-3 is left out: Xid 79" in capfd.readouterr().err
    with pytest.raises(TooFewGpusError, match=r"3 of 4 GPUs can be used .* GPU-3 \(Xid 79\)"):
        supervise(tmp_path, "pass", gpus, processes=4, min_devices=4)


def test_a_batch_that_three_gpus_cannot_share_is_given_to_two(tmp_path, capfd):
    script = """
        beat(count)
        gpus = int(words[words.index("--num-processes") + 1])
        if gpus > 2:
            [wait_for_beat(other) for other in range(gpus)]
        if gpus == 4:
            time.sleep(600) if process != 3 else os.kill(os.getpid(), signal.SIGKILL)
        if gpus == 3:
            end(64, "ConfigError", False)
    """
    assert supervise(tmp_path, script, NoGpus(*FOUR), processes=4) == 0
    assert starts(tmp_path, 3) == ["GPU-3"] * 2
    assert starts(tmp_path, 2) == ["GPU-2"] * 3
    assert starts(tmp_path, 1) == ["GPU-1"] * 4
    assert "the run does not fit 3 GPUs; trying 2 of those that are left" in capfd.readouterr().err


def test_a_config_that_is_wrong_on_all_gpus_is_tried_once(tmp_path):
    script = "beat(0), [wait_for_beat(other) for other in range(4)], end(64, 'ConfigError', False)"
    assert supervise(tmp_path, script, NoGpus(*FOUR), processes=4) == 64
    assert starts(tmp_path) == ["GPU-0"]


def test_a_gpu_that_the_machine_had_is_missed(tmp_path):
    path = tmp_path / "machine.json"
    assert missing_gpus(path, NoGpus()) == []
    path.write_text(json.dumps({"host": socket.gethostname(), "gpus": [{"uuid": "GPU-0"}, {"uuid": "GPU-9"}]}))
    assert missing_gpus(path, NoGpus(*FOUR)) == ["GPU-9"]
    path.write_text(json.dumps({"host": "another", "gpus": [{"uuid": "GPU-9"}]}))
    assert missing_gpus(path, NoGpus(*FOUR)) == []


FAKE_NVML = """
class NVMLError(Exception): pass
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = nvmlEventTypeXidCriticalError = 1
class Event:
    def __init__(self, device, data): self.device, self.eventData = device, data
events = []
ecc = {}
lost = set()
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 3
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUUID(handle): return f"GPU-{handle}".encode()
def nvmlDeviceGetName(handle):
    if handle in lost: raise NVMLError("GPU is lost")
    return "H100"
def nvmlDeviceGetMemoryInfo(handle): return type("Info", (), {"total": 80 << 30})
def nvmlDeviceGetTotalEccErrors(handle, *_): return ecc.get(handle, 0)
def nvmlEventSetCreate(): return object()
def nvmlDeviceRegisterEvents(*_): pass
def nvmlEventSetWait_v2(events_, _):
    if not events: raise NVMLError("timeout")
    return events.pop()
def nvmlSystemGetDriverVersion(): return "570.1"
"""


def test_health_is_read_from_nvml(monkeypatch):
    pynvml: Any = runs.module("pynvml", FAKE_NVML)
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    gpus = Gpus()
    assert [(gpu.uuid, gpu.fault) for gpu in gpus.all()] == [("GPU-0", ""), ("GPU-1", ""), ("GPU-2", "")]
    assert gpus.driver() == "570.1"
    pynvml.events += [pynvml.Event(0, 13), pynvml.Event(1, 79)]  # 13 is the program's own fault
    pynvml.ecc[2] = 4
    assert [gpu.fault for gpu in gpus.all()] == ["", "Xid 79", "4 uncorrectable memory errors"]
    pynvml.lost.add(0)
    assert gpus.all()[0].fault == "it does not answer: GPU is lost"


@pytest.mark.parametrize(
    ("named", "used"),
    [("GPU-1", "GPU-1"), ("2,0", "GPU-2,GPU-0"), ("GPU-2,7,GPU-0", "GPU-2"), ("", ""), ("MIG-1/2/3", "MIG-1/2/3")],
)
def test_gpus_that_are_hidden_are_not_used(tmp_path, monkeypatch, named, used):
    """By whoever started the launcher: a queue that has leased others, or a user."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    gpus = NoGpus(*(Gpu(f"GPU-{number}", "H100", 80 << 30) for number in range(3)))
    assert supervise(tmp_path, "pass", gpus, processes=1) == 0
    assert starts(tmp_path) == [used]


def test_a_host_without_nvml_has_no_gpus(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Gpus().all() == []


def test_what_a_process_says_forges_no_line(tmp_path, capfd):
    """Its last words, which may name a file of anybody, and what it prints."""
    script = r"""
        end(3, "DataError", False)
    """
    hostile = "\\x1b[2Jx\\u2028jaxtrain launch: forged\\u202e"
    assert supervise(tmp_path, script.replace('"DataError"', f'"{hostile}"')) == 3
    text = capfd.readouterr().err
    assert r"\x1b[2Jx\u2028jaxtrain launch: forged\u202e" in text
    assert text.replace("\n", "").isprintable()
