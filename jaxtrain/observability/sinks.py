"""Sends rows of metrics to Weights & Biases, MLflow or Trackio. A sink that fails or hangs neither stops nor slows the run.

Each sink is a process of its own (`sink_process`), behind a queue of bounded length. The loop only puts rows into it. At the
end of a start a sink has `sinks.close_seconds` to send what is left; then it is killed. What was not sent is counted and said.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtrain.config import Config, flatten, to_dict
from jaxtrain.errors import ConfigError, JaxtrainError
from jaxtrain.host.files import atomic_write, parse_json
from jaxtrain.host.text import printable
from jaxtrain.observability.sink_process import SinkRun
from jaxtrain.workdir import Workdir

log = logging.getLogger("jaxtrain")

QUEUE_ROWS = 1000
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny", "trackio": "trackio"}


def require_packages(names: Sequence[str]) -> None:
    """Raises `ConfigError` where the package of a sink is not installed; says how to install it."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder `wandb/`, which that package makes, is none
            raise ConfigError(
                f"config.sinks.names={tuple(names)!r}: the package {_PACKAGES[name]} is not installed; "
                f"pip install 'jaxtrain[{name}]'."
            )


class Sinks:
    """The sinks of a start of the run."""

    def __init__(self, config: Config, directory: Workdir):
        """Starts their processes, each with the run's identity at that sink, which the work directory keeps."""
        self._seconds, self._directory, self._lock = config.sinks.close_seconds, directory, threading.Lock()
        self._ids = _read_ids(directory) if config.sinks.names else {}
        self._sinks: list[_SinkProcess] = []
        for name in config.sinks.names:
            if name != "mlflow" and name not in self._ids:  # whose server gives it
                self._keep_id(name, secrets.token_hex(8))
            run = SinkRun(
                project=config.sinks.project,
                name=directory.path.name,
                folder=str(directory.path),
                run_id=self._ids.get(name, ""),
                config=flatten(to_dict(config)),
                seconds=self._seconds,
            )
            try:
                self._sinks.append(_SinkProcess(name, run, self._keep_id))
            except OSError as error:
                log.warning("the sink %s cannot be started (%s); the run goes on without it", name, error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Gives a row to each sink; never waits."""
        for sink in self._sinks:
            sink.log(step, values)

    def close(self, *, complete: bool) -> None:
        """Ends the sinks, within `sinks.close_seconds` for all of them. complete: whether the run is."""
        deadline = time.monotonic() + self._seconds
        for sink in self._sinks:
            sink.end(complete=complete)
        for sink in self._sinks:
            sink.wait(deadline)
        self._sinks = []

    def _keep_id(self, name: str, run_id: str) -> None:
        with self._lock:
            if self._ids.get(name) == run_id:
                return
            self._ids[name] = run_id
            try:
                atomic_write(self._directory.sinks, json.dumps(self._ids, indent=2) + "\n")
            except JaxtrainError as error:
                log.warning("the next start will be another run of the sink %s: %s", name, error)


def _read_ids(directory: Workdir) -> dict[str, str]:
    """The run's identities at its sinks; {} with a warning where they cannot be read."""
    try:
        ids = parse_json(directory.sinks.read_bytes())
        if isinstance(ids, dict) and all(isinstance(value, str) for value in ids.values()):
            return ids
        raise ValueError("it holds something else")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): the run is a new one at its sinks", directory.sinks, error)
        return {}


class _SinkProcess:
    """One sink: its process, and the two threads that write to it and read from it."""

    def __init__(self, name: str, run: SinkRun, keep_id: Callable[[str, str], None]):
        self._name, self._keep_id = name, keep_id
        self._rows: queue.Queue[dict[str, Any]] = queue.Queue(QUEUE_ROWS)
        self._given = self._sent = 0
        self._failed, self._done, self._end = "", False, threading.Event()
        # Not in the terminal's group: Ctrl-C must not end it before it has sent what is left.
        command = [sys.executable, "-P", "-m", "jaxtrain.observability.sink_process", name]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)
        self._threads = [
            threading.Thread(target=self._write, args=(dataclasses.asdict(run),), daemon=True),
            threading.Thread(target=self._read, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._given += 1
        with contextlib.suppress(queue.Full):  # it is then not sent, and counted at the end
            if not self._failed:
                self._rows.put_nowait({"step": step, "values": dict(values)})

    def end(self, *, complete: bool) -> None:
        """Asks it to send what is left."""
        self._complete = complete
        self._end.set()

    def wait(self, deadline: float) -> None:
        """Returns when it has ended, or at the deadline (`time.monotonic`), when it is killed. Says what was not sent."""
        try:
            self._process.wait(max(deadline - time.monotonic(), 0.0))
            self._threads[1].join(1.0)
        except subprocess.TimeoutExpired:
            self._failed = self._failed or "it did not end in time, and was stopped"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if missing := self._given - self._sent:
            why = f" ({self._failed})" if self._failed else ", which was too slow"
            log.warning("%d of %d rows were not sent to the sink %s%s", missing, self._given, self._name, why)
        elif self._failed or not self._done:
            log.warning("the sink %s may lack its last rows (%s)", self._name, self._failed or "its process has ended")

    def _write(self, run: dict[str, Any]) -> None:
        """Writes rows to the process until the end is asked for and none is left, or nobody reads them."""
        pipe: Any = self._process.stdin
        with contextlib.suppress(OSError, ValueError):  # the process is gone
            pipe.write(json.dumps(run) + "\n")
            pipe.flush()
            while not (self._end.is_set() and self._rows.empty()):
                with contextlib.suppress(queue.Empty):
                    pipe.write(json.dumps(self._rows.get(timeout=0.1)) + "\n")
                    pipe.flush()
            pipe.write(json.dumps({"complete": self._complete}) + "\n")
            pipe.close()

    def _read(self) -> None:
        """Follows what the process answers, to its end."""
        for line in self._process.stdout or ():
            said = json.loads(line)
            if "id" in said:
                self._keep_id(self._name, said["id"])
            self._done = "done" in said
            if "sent" in said:
                self._sent = said["sent"]
            if "failed" in said:
                self._failed = "it has failed, see above"
                why = printable(said["failed"])
                log.warning("the sink %s failed (%s); the run goes on without it", self._name, why)
        if not self._done and not self._failed:
            self._failed = "its process has ended"
