"""Real runs of two processes through `jaxtrain launch`: killed, stopped, frozen, failing; against one that nobody disturbed."""

from __future__ import annotations

import functools
import os
import re
import signal
import time
from pathlib import Path

import pytest
import runs
from runs import SMALL, here

from jaxtrain.distributed.watchdog import Watchdog
from jaxtrain.observability.goodput import read_starts

# Two processes of one device compute bit for bit what one process of two does.
FIELDS = SMALL | {
    "data.name": "faulty:digits", "data.residency": "stream", "data.workers": 0, "data.examples": 128, "train.steps": 24,
    "train.eval_every": "8 steps", "checkpoint.every": "5",
}  # fmt: skip

# The digits, of which no more than fifteen batches a start are read while there is a file `hold`: what is done to a run hits it
# before its end. And with a fault of choice, on one process, at one step.
FAULTY = """
import dataclasses, ctypes, os, pathlib, time

from jaxtrain.config import DataConfig
from jaxtrain.data import registry
from jaxtrain.distributed.interrupt import Interrupt

class Faulty:
    def __init__(self, base, fault):
        self.base, self.shape, self.fault, self.reads = base, base.shape, fault, 0

    def __len__(self):
        return len(self.base)

    def read(self, indices):
        self.reads += 1
        time.sleep(0.05)
        while self.reads > 15 and hold.exists():
            time.sleep(0.01)
        if self.fault and self.reads == 6 and os.environ.get("JAXTRAIN_ERROR_FILE", "").endswith("-1.json"):
            self.fault()
        return self.base.read(indices)

agree = Interrupt._stop

def heard(self, number):
    agree(self, number)
    hold.with_name(f"heard-{os.getpid()}").touch()

Interrupt._stop = heard

def loader(fault=None):
    def load(config, image_size):
        found = registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
        return dataclasses.replace(found, train=Faulty(found.train, fault))
    return load

def fail():
    raise ValueError("a disk that is not there")

hold = pathlib.Path(__file__).with_name("hold")

def hold_the_lock():
    ctypes.PyDLL(None).sleep(600)  # the interpreter's lock stays with this thread

digits, failing, frozen, stuck = loader(), loader(fail), loader(hold_the_lock), loader(lambda: time.sleep(600))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    result = here(path, FIELDS | {"data.name": "digits"}, devices=2)
    return path, result


def launch(tmp_path: Path, *options: str, **changes: object) -> runs.Started:
    """`jaxtrain launch` of two processes in `tmp_path`, to be used in a with block."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "hold").touch()
    fields = FIELDS | {name.replace("__", "."): value for name, value in changes.items()}
    arguments = runs.arguments(tmp_path / "run", fields, "--simulate-devices", "1")
    command = ["-m", "jaxtrain", "launch", "--nproc", "2", *options, "--", "train", *arguments]
    return runs.Started(tmp_path / "output.txt", command, cwd=tmp_path)


def wait_until_heard(job: runs.Started, tmp_path: Path) -> None:
    """Lets the run go on once both processes know that they stop."""
    job.wait_for(lambda: len(list(tmp_path.glob("heard-*"))) == 2, "that both have heard of it")
    for path in tmp_path.glob("heard-*"):
        path.unlink()
    (tmp_path / "hold").unlink()


def worker(job: runs.Started, process: int) -> int:
    """The process number of a worker that runs now."""
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            words = _words(path)
            own = "--process-id" in words and words[words.index("--process-id") + 1] == str(process)
            if own and _parent(path) == job.pid:
                return int(path.name)
    return 0


def _words(path: Path) -> list[str]:
    try:
        return (path / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []


def _parent(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def has_rows(workdir: Path, count: int) -> bool:
    return runs.count_rows(workdir) >= count


def assert_undisturbed(run: Path, undisturbed) -> None:
    """The same rows, the same last weights, bit for bit; each example as often as it should be."""
    assert runs.rows(run) == runs.rows(undisturbed[0])
    assert runs.rows(run, "val") == runs.rows(undisturbed[0], "val")
    assert runs.rows(run, "test") == runs.rows(undisturbed[0], "test")


@pytest.mark.parametrize("process", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(tmp_path, undisturbed, process):
    begun = "none" if process else "auto"  # where the job begins, not each start of it
    with launch(tmp_path, checkpoint__resume=begun) as job:
        job.wait_for(lambda: any((tmp_path / "run").glob("checkpoints/*/manifest.json")), "a checkpoint")
        os.kill(worker(job, process), signal.SIGKILL)
        (tmp_path / "hold").unlink()
        assert job.end() == 0, job.output
        assert f"process {process} (pid" in job.output
        assert "was killed by SIGKILL" in job.output
        resumed = re.findall(r"resumed from .*/(\d+)", job.output)
        assert len(resumed) == 1
        assert int(resumed[0]) >= 5
    assert_undisturbed(tmp_path / "run", undisturbed)
    ends = [start.end for start in read_starts(tmp_path / "run" / "starts")]
    assert [(end.code, end.by) for end in ends if end] == [(137, "its launcher"), (0, "itself")]
    assert ends[0] is not None
    assert re.fullmatch(rf"process {process} \(pid \d+\) was killed by SIGKILL.*", ends[0].message)


@pytest.mark.faults
def test_sigterm_to_the_launcher_saves_and_the_next_launch_goes_on(tmp_path, undisturbed):
    with launch(tmp_path) as job:
        job.wait_for(functools.partial(has_rows, tmp_path / "run", 6), "six steps")
        job.send(signal.SIGTERM)
        wait_until_heard(job, tmp_path)
        assert job.end() == 75, job.output
        (step,) = set(re.findall(r"Stopped after step (\d+) and saved it", job.output))
    assert runs.checkpoints(tmp_path / "run")[-1] == int(step)
    assert not (tmp_path / "run" / "lock.json").exists()
    with launch(tmp_path) as job:
        (tmp_path / "hold").unlink()
        assert job.end() == 0, job.output
        assert f"checkpoints/{step}" in job.output
    assert_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.faults
def test_pipeline_stages_are_stopped_killed_and_resumed_like_any_run(tmp_path):
    """A stage on each process: stopped by SIGTERM to one of them, started again, and one killed."""
    stages, run = {"layout__stages": 2, "layout__microbatches": 2}, tmp_path / "run"
    with launch(tmp_path, **stages) as job:
        job.wait_for(functools.partial(has_rows, run, 6), "six steps")
        os.kill(worker(job, 1), signal.SIGTERM)
        wait_until_heard(job, tmp_path)
        assert job.end() == 75, job.output
    stopped = runs.checkpoints(run)[-1]
    with launch(tmp_path, **stages) as job:
        job.wait_for(
            lambda: runs.checkpoints(run)[-1] > stopped and (run / "checkpoints" / "15").exists(), "a checkpoint"
        )
        os.kill(worker(job, 1), signal.SIGKILL)
        (tmp_path / "hold").unlink()
        assert job.end() == 0, job.output
        assert "was killed by SIGKILL" in job.output
    whole = tmp_path / "whole"
    here(whole, FIELDS | {"data.name": "digits", "layout.stages": 2, "layout.microbatches": 2}, devices=2)
    assert_undisturbed(run, (whole, None))


@pytest.mark.faults
def test_an_error_of_one_process_ends_all_soon_and_is_named(tmp_path):
    with launch(tmp_path, "--max-restarts", "1", data__name="faulty:failing") as job:
        assert job.end() == 65, "no restart mends the data"
        # Process 0 heard or saw it: it did not wait until JAX missed the other, nor until it was killed for saying nothing.
        assert re.search(r"^jaxtrain: (Process 1 on \S+ failed|Another process of this run)", job.output, re.MULTILINE)
        assert re.search(r"process 1 \(pid \d+\) on \S+ ended with DataError: .*a disk that is not there", job.output)


# Named before any other, it is what `import jax` finds: an import that does not end.
NO_JAX = """
import os, pathlib, time

pathlib.Path(__file__).parents[2].joinpath(f"imports-{os.getpid()}").touch()
time.sleep(600)
"""


def importing(tmp_path: Path, monkeypatch, *words: str) -> runs.Started:
    """`jaxtrain ...`, to be used in a with block, whose training processes do not get past `import jax`."""
    (tmp_path / "fake" / "jax").mkdir(parents=True)
    (tmp_path / "fake" / "jax" / "__init__.py").write_text(NO_JAX)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    return runs.Started(tmp_path / "output.txt", ["-m", "jaxtrain", *words, *runs.arguments(tmp_path / "run", FIELDS)])


def test_a_sigterm_during_the_import_of_jax_ends_as_a_saved_run_does(tmp_path, monkeypatch):
    with importing(tmp_path, monkeypatch, "train") as run:
        run.wait_for(lambda: any(tmp_path.glob("imports-*")), "the import")
        run.send(signal.SIGTERM)
        assert run.end() == 75
        assert run.output.splitlines()[-1].startswith("jaxtrain: Stopped before the run began")


def test_processes_end_with_their_launcher_while_they_import(tmp_path, monkeypatch):
    with importing(tmp_path, monkeypatch, "launch", "--nproc", "2", "--", "train") as job:
        job.wait_for(lambda: len(list(tmp_path.glob("imports-*"))) == 2, "the imports")
        job.send(signal.SIGKILL)
        job.end()
        deadline = time.monotonic() + runs.SECONDS
        while any(_runs(int(path.name.partition("-")[2])) for path in tmp_path.glob("imports-*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["stuck", "frozen", "stopped"])
def test_a_process_that_stands_still_is_found(tmp_path, fault):
    """Stuck: its own watchdog ends it, with its stacks. With the interpreter's lock, or by SIGSTOP: the launcher does."""
    options, limit = ["--max-restarts", "0", "--hang", "6"], 60 if fault == "stopped" else 4
    name = "faulty:digits" if fault == "stopped" else f"faulty:{fault}"
    with launch(tmp_path, *options, data__name=name, train__hang_seconds=limit) as job:
        if fault == "stopped":
            job.wait_for(functools.partial(has_rows, tmp_path / "run", 3), "a few steps")
            os.kill(worker(job, 1), signal.SIGSTOP)
        assert job.end() == 70, job.output
        if fault == "stuck":
            assert "HangError: No progress for" in job.output
            assert 'File "' in (tmp_path / "run" / "logs" / "process_1.log").read_text(), "a stack"
        else:
            assert "process 1 (pid" in job.output
            assert "gave no sign of life" in job.output


@pytest.mark.faults
def test_a_job_that_was_stopped_as_a_whole_goes_on(tmp_path, undisturbed):
    """As by Slurm's suspend and resume, for longer than a process may stand still, for itself and for the launcher."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "hold").touch()
    fields = FIELDS | {"data.name": "faulty:digits", "train.hang_seconds": 15}
    arguments = runs.arguments(tmp_path / "run", fields, "--simulate-devices", "1")
    command = [
        "-m",
        "jaxtrain",
        "launch",
        "--nproc",
        "2",
        "--max-restarts",
        "0",
        "--hang",
        "15",
        "--",
        "train",
        *arguments,
    ]
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as job:
        job.wait_for(functools.partial(has_rows, tmp_path / "run", 3), "a few steps")
        pids = [job.pid, *(int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split())]
        assert len(pids) == 3
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(25)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        (tmp_path / "hold").unlink()
        assert job.end() == 0, job.output
    assert_undisturbed(tmp_path / "run", undisturbed)


def test_only_time_in_which_the_process_ran_counts_as_a_hang(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watchdog = Watchdog(limit=60)
    watchdog.feed("step", 7, step_seconds=1.0)
    now += 1.0
    watchdog.wakes.look()
    now += 500.0  # nothing of this process ran
    watchdog.wakes.look()
    assert not watchdog.complaint()
    for _ in range(70):
        now += 1.0
        watchdog.wakes.look()
    assert "No progress for 70 s in 'step' after step 7" in watchdog.complaint()
