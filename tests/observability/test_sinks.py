"""Sinks: rows reach them under one identity; one that is missing, fails or hangs harms no run; secrets stay here.

The packages are stand-ins in a folder of their own, which write down what they are asked. `sink_process` finds them as it would
find the real ones.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
from runs import SMALL, command_line, here, losses
from runs import arguments as words_of

from jaxtrain.config import Config, SinksConfig
from jaxtrain.errors import ConfigError
from jaxtrain.observability import sinks
from jaxtrain.observability.sink_process import redacted
from jaxtrain.observability.sinks import Sinks, require_packages
from jaxtrain.workdir import Workdir

# When a sink fails or hangs: one in the default suite, the others with the faults.
MOMENTS = [pytest.param("init", marks=pytest.mark.faults), "log", pytest.param("finish", marks=pytest.mark.faults)]

COMMON = """
import json, os, socket, time

def say(*what):
    with open(os.environ["SINK_CALLS"], "a") as file:
        file.write(json.dumps(what) + "\\n")

def misbehave(at):
    mode = os.environ.get("SINK_MODE", "")
    if mode == "fail " + at:
        raise RuntimeError("no access with " + os.environ.get("WANDB_API_KEY", "") + " to https://me:word@host/x")
    if mode == "hang " + at:
        with socket.create_connection(("127.0.0.1", int(os.environ["SINK_PORT"]))) as server:
            server.recv(1)
"""
WANDB = """
class Settings:
    def __init__(self, **options):
        self.options = options

class Run:
    def define_metric(self, *names, **options):
        say("define", *names)
    def log(self, values):
        misbehave("log")
        say("log", values)
    def finish(self, exit_code=0):
        misbehave("finish")
        say("finish", exit_code)

def init(*, settings, **options):
    print("wandb: prints a lot")
    misbehave("init")
    say("init", options | {"settings": settings.options})
    return Run()
"""
MLFLOW = """
class entities:
    class Metric:
        def __init__(self, *what):
            self.what = what
    Param = Metric

class MlflowClient:
    def get_experiment_by_name(self, name):
        return None
    def create_experiment(self, name):
        say("experiment", name)
        return "7"
    def create_run(self, experiment, run_name):
        say("create", experiment, run_name)
        class info:
            run_id = "given-by-the-server"
        class run:
            pass
        run.info = info
        return run
    def update_run(self, run_id, status):
        say("update", run_id, status)
    def log_batch(self, run_id, metrics=(), params=()):
        say("batch", run_id, [each.what for each in metrics], [each.what for each in params])
    def set_terminated(self, run_id, status):
        say("end", run_id, status)
"""
TRACKIO = """
class Run:
    def log(self, values, step):
        say("log", values, step)
    def finish(self):
        say("finish")

def init(project, **options):
    say("init", project, options)
    return Run()
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The stand-ins can be imported; returns what reads the calls that were made."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, code in (("wandb", WANDB), ("mlflow", MLFLOW), ("trackio", TRACKIO)):
        (folder / f"{name}.py").write_text(COMMON + code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("SINK_CALLS", str(tmp_path / "calls.jsonl"))
    monkeypatch.setenv("WANDB_API_KEY", "a-key-that-nobody-may-see")

    def read() -> list[list]:
        path = tmp_path / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return read


def fit(workdir: Path, *names: str, **fields):
    return here(workdir, SMALL | {"sinks.names": names, "checkpoint.every": "4"}, **fields)


def log_of(workdir: Path) -> str:
    return (workdir / "logs" / "process_0.log").read_text()


# ------------------------------------------------------------------------------------------------------- what they get


def test_wandb_gets_the_rows_and_the_config_and_nothing_else(tmp_path, calls):
    fit(tmp_path / "run", "wandb", train__epochs=1, sinks__project="digits")
    options = calls()[0][1]
    assert options["project"] == "digits"
    assert options["name"] == "run"
    assert options["resume"] == "allow"
    assert options["config"]["optim.name"] == "sgd"
    for name in ("x_disable_meta", "x_disable_stats", "x_disable_machine_info", "disable_git", "disable_code"):
        assert options["settings"][name] is True
    sent = [call[1] for call in calls() if call[0] == "log"]
    trained = [row for row in sent if "train/loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    assert [row["train/loss"] for row in trained] == losses(tmp_path / "run").tolist()
    for key in ("train/epoch/loss", "val/accuracy", "test/accuracy"):
        assert [row["step"] for row in sent if key in row] == [4]
    assert calls()[-1] == ["finish", 0]
    assert "rows were not sent" not in log_of(tmp_path / "run")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_run_has_one_identity_through_all_of_its_starts(tmp_path, calls, name):
    fit(tmp_path / "run", name, train__epochs=1)
    first = calls()
    fit(tmp_path / "run", name, train__epochs=2)
    second = calls()[len(first) :]
    stored = json.loads((tmp_path / "run" / "sinks.json").read_text())[name]
    if name == "mlflow":
        assert ["create", "7", "run"] in first
        assert stored == "given-by-the-server"
        assert second[0] == ["update", stored, "RUNNING"]
        assert second[-1] == ["end", stored, "FINISHED"]
        params = [param for call in first if call[0] == "batch" for param in call[3]]
        assert ["optim.name", "sgd"] in params
        assert not any(call[3] for call in second if call[0] == "batch")
    else:
        key = {"wandb": "id", "trackio": "name"}[name]
        assert first[0][-1][key] == second[0][-1][key] == stored
        assert second[0][-1]["resume"] == "allow"
    # one that begins anew is another run
    fit(tmp_path / "run", name, train__epochs=1, checkpoint__resume="none")
    again = json.loads((tmp_path / "run" / "sinks.json").read_text())[name]
    assert again != stored or name == "mlflow"
    assert list((tmp_path / "run" / "superseded").glob("*/sinks.json"))


def test_a_damaged_file_of_identities_begins_new_ones(tmp_path, calls):
    fit(tmp_path / "run", "wandb", train__epochs=1)
    (tmp_path / "run" / "sinks.json").write_text("{")
    fit(tmp_path / "run", "wandb", train__epochs=2)
    assert "the run is a new one at its sinks" in log_of(tmp_path / "run")
    assert len({call[1]["id"] for call in calls() if call[0] == "init"}) == 2


# --------------------------------------------------------------------------------------------------- what may go wrong


def test_a_sink_without_its_package_is_refused_before_the_data_are_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb").mkdir()  # what the package itself leaves in a directory is not the package
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"the package wandb is not installed; pip install 'jaxtrain\[wandb\]'"):
        require_packages(("wandb",))
    words = words_of(tmp_path / "run", SMALL | {"sinks.names": "('wandb',)"})
    assert command_line(["train", *words]) == 64
    assert "jaxtrain[wandb]" in capsys.readouterr().err


@pytest.mark.parametrize("at", MOMENTS)
def test_a_sink_that_fails_is_said_and_the_run_goes_on(tmp_path, calls, monkeypatch, at):
    monkeypatch.setenv("SINK_MODE", f"fail {at}")
    found = fit(tmp_path / "run", "wandb", "trackio", train__epochs=1)
    assert found.result["steps"] == 4
    text = log_of(tmp_path / "run")
    assert "the sink wandb failed (RuntimeError: no access with *** to https://***@host/x); the run goes on" in text
    assert ("rows were not sent to the sink wandb" in text) == (at != "finish")
    assert ["finish"] in calls(), "the other one has all"
    everything = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and b"a-key-that" in p.read_bytes()]
    assert everything == []


@pytest.mark.parametrize("at", MOMENTS)
def test_a_sink_whose_server_never_answers_ends_with_the_run(tmp_path, calls, monkeypatch, at):
    """A real socket that accepts, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("SINK_PORT", str(server.getsockname()[1]))
        monkeypatch.setenv("SINK_MODE", f"hang {at}")
        found = fit(tmp_path / "run", "wandb", train__epochs=1, sinks__close_seconds=0.5)
    assert found.result["steps"] == 4
    text = log_of(tmp_path / "run")
    assert ("rows were not sent to the sink wandb" in text) == (at != "finish")
    assert "it did not end in time, and was stopped" in text


def test_rows_that_do_not_fit_the_queue_are_dropped_and_counted(tmp_path, calls, monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("SINK_PORT", str(server.getsockname()[1]))
        monkeypatch.setenv("SINK_MODE", "hang init")
        monkeypatch.setattr(sinks, "QUEUE_ROWS", 10)
        config = Config(sinks=SinksConfig(names=("wandb",), close_seconds=0.2))
        made = Sinks(config, Workdir(tmp_path))
        for step in range(20_000):  # more than the queue and a pipe hold
            made.log(step, {"train/loss": 1.0})
        began = time.monotonic()
        made.close(complete=True)
    assert "20000 of 20000 rows were not sent to the sink wandb" in caplog.text
    assert time.monotonic() - began < 60  # bounded, on any machine


def test_secrets_are_taken_out_of_what_a_sink_says():
    environment = {"MY_TOKEN": "abcd1234", "HOME": "/home/me", "DB_PASSWORD": "hunter22", "KEY": "x"}
    text = "abcd1234 hunter22 /home/me x http://me:pw@host"
    assert redacted(text, environment) == "*** *** /home/me x http://***@host"
    for login in ("me:p@ss", "u:a/b", "u:a@b/c@d"):
        assert redacted(f"no https://{login}@host/x today", environment) == "no https://***@host/x today"
    assert redacted("hunter33", {"PGPWD": "hunter33"}) == "***"
