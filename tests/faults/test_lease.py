"""Two runs never write to one work directory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from runs import SMALL, here

from jaxtrain.checkpoint import lease as lease_lib
from jaxtrain.checkpoint.lease import acquire, held
from jaxtrain.errors import WorkdirError

HOLD = """
import pathlib, sys, time
from jaxtrain.checkpoint.lease import acquire
lease = acquire(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


UNREAD = ("position", "versions", "config_sha256", "epoch", "val_accuracy", "milestone", "owner")


@pytest.fixture
def another(tmp_path):
    """A process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease_lib, "LEASE_SECONDS", 2.0)


def test_a_living_run_keeps_its_directory(tmp_path, another):
    with pytest.raises(WorkdirError, match=rf"in use by another run \(process {another.pid} on "):
        here(tmp_path, SMALL)
    assert not (tmp_path / "config.json").exists()


def test_a_dead_run_is_succeeded_at_once(tmp_path, another, monkeypatch):
    another.kill()
    another.wait()
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited"))
    with held(tmp_path) as mine:
        mine.check()
    assert not (tmp_path / "lock.json").exists()


def test_a_frozen_run_is_succeeded_and_finds_out(tmp_path, another, quick):
    another.send_signal(signal.SIGSTOP)
    mine = acquire(tmp_path)
    another.send_signal(signal.SIGCONT)
    time.sleep(1)
    mine.check()
    token = json.loads((tmp_path / "lock.json").read_text())["token"]
    assert token == mine.token
    mine.release()
    other = acquire(tmp_path)
    with pytest.raises(WorkdirError, match="Another run has taken"):
        mine.check()
    other.release()


def test_a_run_on_another_host_is_waited_for(tmp_path, another, quick):
    """Its process cannot be looked at from here: only the renewals tell."""
    path = tmp_path / "lock.json"
    lock = json.loads(path.read_text())
    another.kill()
    another.wait()
    path.write_text(json.dumps(lock | {"host": "elsewhere", "boot": "another"}))
    began = time.monotonic()
    acquire(tmp_path).release()
    assert time.monotonic() - began >= 2.0


def test_a_run_whose_lock_was_taken_commits_nothing(tmp_path):
    from jaxtrain.checkpoint import manifest  # noqa: PLC0415

    mine = acquire(tmp_path)
    folder = tmp_path / "checkpoints" / "5"
    folder.mkdir(parents=True)
    (folder / "data").write_text("x")
    (tmp_path / "lock.json").unlink()
    other = acquire(tmp_path)
    with pytest.raises(WorkdirError, match="Another run has taken"):
        manifest.write_manifest(folder, mine.check, **dict.fromkeys(UNREAD), step=5)
    assert not (folder / "manifest.json").exists()
    other.release()
