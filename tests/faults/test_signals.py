"""A signal at any moment: during an evaluation, during a save, twice to several processes."""

from __future__ import annotations

import contextlib
import re
import signal

import pytest
import runs
from runs import SMALL, here

from jaxtrain.checkpoint.manifest import read_manifest
from jaxtrain.observability.goodput import read_starts

# While there is a file `hold`, a validation with so many rows before it does not end; who has heard of a signal says so.
SLOW = """
import dataclasses, os, pathlib, time

from jaxtrain.data import registry
from jaxtrain.distributed.interrupt import Interrupt

hold = pathlib.Path(__file__).with_name("hold")
rows = pathlib.Path(__file__).parent / "run" / "metrics.jsonl"
agree = Interrupt._stop

def heard(self, number):
    agree(self, number)
    hold.with_name(f"heard-{os.getpid()}").touch()

Interrupt._stop = heard

class Slow:
    def __init__(self, base):
        self.base, self.shape = base, base.shape

    def __len__(self):
        return len(self.base)

    def read(self, indices):
        while hold.exists() and len(rows.read_text().splitlines()) >= int(hold.read_text()):
            hold.with_name(f"held-{os.getpid()}").touch()
            time.sleep(0.01)
        return self.base.read(indices)

def digits(config, image_size):
    found = registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
    return dataclasses.replace(found, validation=Slow(found.validation))
"""

FIELDS = SMALL | {
    "data.name": "slow:digits", "data.residency": "stream", "data.workers": 0, "data.examples": 128, "train.epochs": 3,
    "train.eval_every": "1 epoch", "checkpoint.every": "0",
}  # fmt: skip


def held(run, tmp_path, processes):
    """Waits until each process is in the validation that is held."""
    run.wait_for(lambda: len(list(tmp_path.glob("held-*"))) == processes, "the validation")


def wait_until_heard(run, tmp_path, processes):
    run.wait_for(lambda: len(list(tmp_path.glob("heard-*"))) == processes, "that all have heard of it")


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
def test_a_validation_that_was_cut_short_is_made_up_for(tmp_path, processes):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "hold").write_text("9")  # 4 + validation + 4
    arguments = runs.arguments(tmp_path / "run", FIELDS, "--simulate-devices", str(3 - processes))
    command = ["-m", "jaxtrain", *(["launch", "--nproc", "2", "--"] if processes == 2 else []), "train", *arguments]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as run:
        signal.signal(signal.SIGHUP, before)
        held(run, tmp_path, processes)
        run.send(signal.SIGTERM if processes == 1 else signal.SIGHUP)  # of a scheduler; of an ssh that is closed
        wait_until_heard(run, tmp_path, processes)
        (tmp_path / "hold").unlink()
        assert run.end() == 75, run.output
        assert "Stopped after step 8 and saved it" in run.output
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / "8")
    assert manifest.position["owes_validation"]
    assert len(runs.rows(tmp_path / "run", "val")) == 1
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as run:
        assert run.end() == 0, run.output
    here(tmp_path / "whole", FIELDS | {"data.name": "digits"}, devices=2)
    for phase in ("train", "val", "test"):
        assert runs.rows(tmp_path / "run", phase) == runs.rows(tmp_path / "whole", phase)
    best = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert best == {path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()} | {"8"}


@pytest.mark.faults
def test_a_second_signal_ends_all_processes_at_once(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "hold").write_text("4")
    arguments = runs.arguments(tmp_path / "run", FIELDS, "--simulate-devices", "1")
    command = ["-m", "jaxtrain", "launch", "--nproc", "2", "--grace", str(2 * runs.SECONDS), "--", "train", *arguments]
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as run:
        held(run, tmp_path, 2)
        run.send(signal.SIGINT)
        wait_until_heard(run, tmp_path, 2)
        run.send(signal.SIGINT)
        assert run.end() == 130, run.output  # long before `--grace` is over


@pytest.mark.faults
@pytest.mark.parametrize("launcher", [[], ["launch", "--"]])
def test_a_run_under_nohup_outlives_its_terminal(tmp_path, launcher):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "hold").write_text("4")
    arguments = runs.arguments(tmp_path / "run", FIELDS, "--simulate-devices", "1")
    nohup = "import os, sys; os.execvp('nohup', ['nohup', sys.executable, *sys.argv[1:]])"
    command = ["-c", nohup, "-m", "jaxtrain", *launcher, "train", *arguments]
    with runs.Started(tmp_path / "output.txt", command, cwd=tmp_path) as run:
        held(run, tmp_path, 1)
        run.send(signal.SIGHUP)
        (tmp_path / "hold").unlink()
        assert run.end() == 0, run.output
    assert len(runs.losses(tmp_path / "run")) == 12


# Process 1 leaves its reader in a way that is no error.
WAYS = """
import dataclasses, sys

from jaxtrain.data import registry

class Leaves:
    def __init__(self, base, way):
        self.base, self.shape, self.way, self.reads = base, base.shape, way, 0

    def __len__(self):
        return len(self.base)

    def read(self, indices):
        self.reads += 1
        if self.reads == 6 and sys.argv[sys.argv.index("--process-id") + 1] == "1":
            raise self.way
        return self.base.read(indices)

def loader(way):
    def load(config, image_size):
        found = registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
        return dataclasses.replace(found, train=Leaves(found.train, way))
    return load

done, stopped = loader(SystemExit(0)), loader(KeyboardInterrupt())
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    ("way", "code", "said"),
    [("done", 70, "sys.exit(0) was called in the middle of the run"), ("stopped", 130, "Stopped at once; the last")],
)
def test_every_way_out_of_one_process_is_told_to_the_other(tmp_path, way, code, said):
    (tmp_path / "ways.py").write_text(WAYS)
    arguments = runs.arguments(tmp_path / "run", FIELDS | {"data.name": f"ways:{way}"}, "--simulate-devices", "1")
    port = runs.free_port()
    with contextlib.ExitStack() as stack:
        zero, one = (
            stack.enter_context(
                runs.Started(
                    tmp_path / f"{i}.txt", ["-m", "jaxtrain.main", *arguments, *runs.joined(i, 2, port)], cwd=tmp_path
                )
            )
            for i in range(2)
        )
        assert (zero.end(), one.end()) == (70, code), zero.output + one.output
        assert re.search(rf"^jaxtrain: Process 1 on \S+ failed: {re.escape(said)}", zero.output, re.MULTILINE)
        assert said in one.output
    (start,) = read_starts(tmp_path / "run" / "starts")
    assert start.end is not None
    assert said in start.end.message
