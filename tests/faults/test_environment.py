"""An environment that is amiss: clocks apart, secrets in it, other versions, other data, directories that are not shared."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
from runs import SMALL, draw_folder, here
from test_launch import FAULTY, FIELDS, worker

from jaxtrain import evaluate
from jaxtrain.checkpoint.lease import held, wait_to_see
from jaxtrain.errors import DataError, WorkdirError
from jaxtrain.training.results import TrainResult

# Python runs a module of this name when it starts: process 1 believes that it is an hour later.
ONE_HOUR_AHEAD = """
import pathlib, time
words = pathlib.Path("/proc/self/cmdline").read_text().split("\\0")
if "--process-id" in words and words[words.index("--process-id") + 1] == "1":
    real, real_ns = time.time, time.time_ns
    time.time, time.time_ns = (lambda: real() + 3600), (lambda: real_ns() + 3600 * 10**9)
"""
CANARY = "correct-horse-battery-staple"


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of two processes that ended well. listening: addresses at which they listened meanwhile."""

    folder: Path
    output: str
    listening: set[str]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    (folder / "sitecustomize.py").write_text(ONE_HOUR_AHEAD)
    (folder / "faulty.py").write_text(FAULTY)
    secrets = {
        "AWS_SECRET_ACCESS_KEY": CANARY,
        "WANDB_API_KEY": CANARY,
        "HTTPS_PROXY": f"http://me:{CANARY}@proxy.invalid",
    }
    secrets["JAX_ACCESS_TOKEN"] = CANARY
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (secrets | {"PYTHONPATH": str(folder)}).items():
            patch.setenv(name, value)
        command = ["-m", "jaxtrain", "launch", "--nproc", "2", "--", "train"]
        command += runs.arguments(folder / "run", FIELDS, "--simulate-devices", "1")
        with runs.Started(folder / "output.txt", command, cwd=folder) as started:
            started.wait_for(lambda: runs.count_rows(folder / "run") > 3, "a few steps")
            listening = set().union(*(listens_at(pid) for pid in (started.pid, worker(started, 0), worker(started, 1))))
            assert started.end() == 0, started.output
            return Job(folder, started.output, listening)


def listens_at(pid: int) -> set[str]:
    """The local addresses of a process's listening TCP sockets."""
    links = (os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink())
    own = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[3] == "0A" and cells[9] in own:
                words = bytes.fromhex(cells[1].partition(":")[0])
                address = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.add(socket.inet_ntop(family, address))
    return found


@pytest.mark.faults
def test_a_clock_an_hour_ahead_is_told_of_and_changes_nothing(job, tmp_path):
    assert re.search(r"the clock of process 1 on \S+ is 3600 s ahead of that of process 0", job.output)
    here(tmp_path / "whole", FIELDS | {"data.name": "digits"}, devices=2)
    assert runs.rows(job.folder / "run") == runs.rows(tmp_path / "whole")
    assert runs.checkpoints(job.folder / "run") == runs.checkpoints(tmp_path / "whole")


@pytest.mark.faults
def test_secrets_of_the_environment_are_written_nowhere(job):
    assert CANARY not in job.output
    files = [path for path in (job.folder / "run").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


@pytest.mark.faults
def test_processes_of_one_host_listen_on_the_loopback_alone(job):
    assert job.listening
    assert {address for address in job.listening if address not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")} == set()


def test_another_jax_is_named_before_anything_starts(tmp_path):
    """JAXTRAIN_OTHER_PYTHON: an interpreter in whose environment jaxtrain is installed with another version of jax."""
    other = os.environ.get("JAXTRAIN_OTHER_PYTHON")
    if not other:
        pytest.skip("JAXTRAIN_OTHER_PYTHON names no second environment with another jax")
    port = runs.free_port()
    command = ["-m", "jaxtrain.main", *runs.arguments(tmp_path / "run", SMALL, "--start-timeout", "60")]
    path = os.pathsep.join([str(runs.ROOT), str(runs.ROOT / "tests")])
    with runs.main(tmp_path / "0.txt", *command[2:], *runs.joined(0, 2, port)) as first:
        second = subprocess.run(
            [other, *command, *runs.joined(1, 2, port)], capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": path, "XLA_FLAGS": ""},  # which may not know the tests' own
        )  # fmt: skip
        assert (first.end(), second.returncode) == (78, 78), second.stderr
        for said in (first.output, second.stderr):
            assert re.search(r"process 1 on \S+ has another versions \(.*jax is '.*' there and '.*' on process 0", said)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_the_hosts_do_not_share(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with held(tmp_path / "here") as lease:
        wait_to_see(tmp_path / "here", lease.token, 1)
        with pytest.raises(WorkdirError, match=r"Process 1 on .* must be on a file system that all hosts share"):
            wait_to_see(tmp_path / "there", lease.token, 1, patience=0.1)


OTHER_ON_ONE = """
import dataclasses, jax, tiny
def digits(config, image_size):
    return dataclasses.replace(tiny.digits(config, image_size=image_size), fingerprint=f"{jax.process_index()}" * 64)
"""


def test_other_data_on_one_host(tmp_path):
    (tmp_path / "other.py").write_text(OTHER_ON_ONE)
    arguments = runs.arguments(tmp_path / "run", SMALL | {"data.name": "other:digits"}, "--simulate-devices", "1")
    with runs.Started(
        tmp_path / "output.txt", ["-m", "jaxtrain", "launch", "--nproc", "2", "--", "train", *arguments], cwd=tmp_path
    ) as job:
        assert job.end() == 78, job.output
        assert re.search(r"Process 1 on \S+ found another data set other:digits than process 0", job.output)


def test_data_that_has_changed_since_the_last_start(tmp_path, monkeypatch):
    run, real = tmp_path / "run", tiny.digits
    here(run, SMALL, train__steps=4)
    monkeypatch.setattr(tiny, "digits", lambda *a, **k: dataclasses.replace(real(*a, **k), fingerprint="another" * 9))
    with pytest.raises(DataError, match="The data set tiny:digits is not the one of step 4 of "):
        here(run, SMALL, train__steps=8)
    here(run, SMALL, train__steps=8, checkpoint__allow_changes=True)
    assert len(runs.losses(run)) == 8


FOLDER = SMALL | {"data.image_size": 8, "data.examples": 0, "data.global_batch": 8, "train.eval_every": "1 epoch"}


def folder_run(top: Path, images: int, **more: Any) -> TrainResult:
    """A run on TOP/data/{train,val,test}, of so many training images in each of two classes."""
    data = top / "data"
    draw_folder(data / "train", "ab", 0, images)
    for split in ("val", "test"):
        draw_folder(data / split, "ab", 200, 204)
    return here(top / "run", FOLDER | {"data.name": f"folder:{data}"}, checkpoint__every="5", **more)


@pytest.mark.parametrize(("first", "second"), [pytest.param(20, 50, marks=pytest.mark.faults), (40, 20)])
def test_data_that_grew_or_shrank_loses_no_row_and_mixes_none(tmp_path, first, second):
    """120 examples of the first data set, then 120 of the second: a row of an epoch is of one of them alone."""
    folder_run(tmp_path, first, train__steps=15)
    before = (tmp_path / "run/metrics.csv").read_text(), (tmp_path / "run/metrics.jsonl").read_text()
    for path in (tmp_path / "data/train").glob("*/*"):
        path.unlink()
    with pytest.raises(DataError, match=f"train had {2 * first} examples and has {2 * second}"):
        folder_run(tmp_path, second, train__steps=30)
    folder_run(tmp_path, second, train__steps=30, checkpoint__allow_changes=True)
    (folder,) = (tmp_path / "run/superseded").glob("*")
    assert ((folder / "metrics.csv").read_text(), (folder / "metrics.jsonl").read_text()) == before

    losses = runs.losses(tmp_path / "run")  # every step is there once
    assert losses[:15].tolist() == [json.loads(line)["loss"] for line in before[1].splitlines() if '"train"' in line]
    found = [line.split(",") for line in runs.epochs(tmp_path / "run")[1:]]
    rows = {int(epoch): float(loss) for epoch, phase, loss, _ in found if phase == "train"}
    ends = [step for step in range(16, 31) if 8 * step // (2 * second) > 8 * (step - 1) // (2 * second)]
    starts = [15, *ends]
    for epoch, begin, end in zip(sorted(rows), starts, [*ends, 30], strict=False):
        np.testing.assert_allclose(rows[epoch], losses[begin:end].mean(), atol=2e-6)

    again = folder_run(tmp_path, second, train__steps=34)
    assert [row["step"] for row in again.history if row["phase"] == "train"] == [31, 32, 33, 34]
    whole = [line for line in found if int(line[0]) < 8 * 30 // (2 * second) and line[1] != "test"]
    assert [line.split(",") for line in runs.epochs(tmp_path / "run")[1:]][: len(whole)] == whole


@pytest.mark.faults
def test_a_renamed_class_keeps_its_output_on_resume(tmp_path):
    """Classes are numbered by the run's names, so that no other changes its meaning with them."""
    folder_run(tmp_path, 20, train__steps=15)
    for split in ("train", "val", "test"):
        (tmp_path / "data" / split / "a").rename(tmp_path / "data" / split / "z")
    fields = FOLDER | {"data.name": f"folder:{tmp_path / 'data'}", "checkpoint.every": "5", "train.steps": 20}
    with pytest.raises(DataError, match="the class 'a' is gone; the class 'z' is new"):
        here(tmp_path / "run", fields)
    here(tmp_path / "run", fields, checkpoint__allow_changes=True)
    record = json.loads((tmp_path / "run/dataset.json").read_text())
    assert record["class_names"] == ["z", "b"]
    found = evaluate(tmp_path / "run", "train", checkpoint="latest", num_devices=1)
    assert found.class_names == ("z", "b")
    assert found.result.accuracy > 0.9
    here(tmp_path / "run", fields, train__steps=22)  # and on the next start as well
    assert evaluate(tmp_path / "run", "train", checkpoint="latest", num_devices=1).result.accuracy > 0.9


LITTLE_MEMORY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4000 << 20, 4000 << 20))
from jaxtrain.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.faults
def test_a_model_that_does_not_fit_the_memory_is_not_tried_again(tmp_path):
    arguments = runs.arguments(tmp_path / "run", SMALL | {"model.width": 60_000, "train.steps": 1})
    command = ["-c", LITTLE_MEMORY, "launch", "--", "train", *arguments]
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as job:
        assert job.end() == 70, job.output
        assert "ended with DeviceMemoryError: The run does not fit the devices' memory." in job.output
        assert "config.layout.microbatches" in job.output
        assert job.output.count("work directory:") == 1
