"""The process of one sink: gives rows to Weights & Biases, MLflow or Trackio. Started by `sinks`, whose lines it reads.

python -m jaxtrain.observability.sink_process wandb

Standard input has a JSON object a line: first `SinkRun`'s fields, then rows {"step", "values"}, last {"complete"}. Standard
output has the answers: {"id"} once the sink has begun, {"sent"} after each row, {"done"} at the end, or {"failed"}. A sink gets
the config and the rows; what the packages would collect by themselves (environment, command line, code, host) is off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class SinkRun:
    """What a sink begins with."""

    project: str
    name: str
    """Of the run, for people."""
    folder: str
    """Where files of the package may lie: the work directory."""
    run_id: str
    """The sink's name of the run, the same at every start; "" where the sink gives it at the first one."""
    config: dict[str, Any]
    """Flat, by dotted names."""
    seconds: float
    """That the end may take."""


class Sink(Protocol):
    """A run, as one of the packages has it."""

    run_id: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes a row."""

    def finish(self, *, complete: bool) -> None:
        """Sends what is left, and says whether the run is complete or may go on later."""


class WandbSink:
    """Weights & Biases. Rows have their own `step`: those of steps that a killed run makes again would be dropped otherwise."""

    def __init__(self, run: SinkRun):
        wandb: Any = importlib.import_module("wandb")
        quiet = {"console": "off", "silent": True, "disable_job_creation": True, "init_timeout": 600.0}
        own = {
            "x_disable_meta": True,
            "x_disable_stats": True,
            "x_disable_machine_info": True,
            "x_save_requirements": False,
        }
        code = {"disable_git": True, "disable_code": True, "save_code": False}
        options = {"project": run.project, "name": run.name, "dir": run.folder, "config": run.config}
        settings = wandb.Settings(**quiet, **own, **code)
        self._run = wandb.init(id=run.run_id, resume="allow", settings=settings, **options)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.run_id = run.run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def finish(self, *, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


class MlflowSink:
    """MLflow, by its client: it adds no tags of the user, the host or the code."""

    def __init__(self, run: SinkRun):
        mlflow: Any = importlib.import_module("mlflow")
        self._client, self._metric, param = mlflow.MlflowClient(), mlflow.entities.Metric, mlflow.entities.Param
        if run.run_id:
            self.run_id = run.run_id
            self._client.update_run(self.run_id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        self.run_id = self._client.create_run(number, run_name=run.name).info.run_id
        params = [param(key, str(value)[:500]) for key, value in run.config.items()]
        for first in range(0, len(params), 100):
            self._client.log_batch(self.run_id, params=params[first : first + 100])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(key, value, now, step) for key, value in values.items()]
        for first in range(0, len(metrics), 1000):  # MLflow's limit for one request
            self._client.log_batch(self.run_id, metrics=metrics[first : first + 1000])

    def finish(self, *, complete: bool) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if complete else "KILLED")


class TrackioSink:
    """Trackio."""

    def __init__(self, run: SinkRun):
        trackio: Any = importlib.import_module("trackio")
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self._run = trackio.init(run.project, name=run.run_id, config=run.config, resume="allow", **quiet)
        self.run_id = run.run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, *, complete: bool) -> None:
        del complete  # Trackio has no such status
        self._run.finish()


SINKS: Mapping[str, Callable[[SinkRun], Sink]] = {"wandb": WandbSink, "mlflow": MlflowSink, "trackio": TrackioSink}

_SECRET = re.compile("KEY|TOKEN|SECRET|PASS|PWD|CREDENTIAL|AUTH", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)\S+@")


def redacted(text: str, environment: Mapping[str, str]) -> str:
    """`text` without the secrets of the environment, and without the logins of addresses."""
    secrets = {value for name, value in environment.items() if _SECRET.search(name) and len(value) >= 4}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _LOGIN.sub("***@", text)


def main() -> None:
    """Runs until standard input ends, or the training process is gone."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # what packages print
    os.dup2(nothing, 2)
    name = sys.argv[1]

    def answer(**values: Any) -> None:
        with contextlib.suppress(OSError):  # the training process is gone
            answers.write(json.dumps(values) + "\n")

    try:
        run = SinkRun(**json.loads(sys.stdin.readline()))
        _end_with_the_run(run.seconds)
        sink, complete = SINKS[name](run), False
        answer(id=sink.run_id)
        for count, line in enumerate(sys.stdin, 1):
            row = json.loads(line)
            if "complete" in row:
                complete = row["complete"]
                break
            sink.log(row["step"], row["values"])
            answer(sent=count)
        sink.finish(complete=complete)
        answer(done=True)
    except BaseException as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        answer(failed=redacted(text, os.environ)[:500])
    os._exit(0)  # a package may have threads that do not end


def _end_with_the_run(seconds: float) -> None:
    """Ends this process, and those that it has started, `seconds` after the training process is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        time.sleep(seconds)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
