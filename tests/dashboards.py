"""Real dashboards on free ports, for tests; and the files of runs that nobody has run."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.checkpoint.lease import Owner
from jaxtrain.observability.goodput import StartEnd, StartTimes

PATIENCE = 30.0  # seconds; what is waited for takes two


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the server has answered."""

    status: int
    headers: Mapping[str, str]
    """With names in lower case."""
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclasses.dataclass(frozen=True)
class Served:
    """A dashboard that runs."""

    process: subprocess.Popen[str]
    address: str
    """That it has printed, with the token."""
    state: Path

    @property
    def port(self) -> int:
        return int(urllib.parse.urlsplit(self.address).port or 0)

    @property
    def token(self) -> str:
        return urllib.parse.parse_qs(urllib.parse.urlsplit(self.address).query)["token"][0]

    def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """Asks without a token; the path is sent as it stands."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)) as connection:
            connection.request(method, path, headers={name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())

    def get(self, path: str) -> Answer:
        """Asks with the token."""
        return self.ask(path, Authorization=f"Bearer {self.token}")

    def json(self, path: str) -> Any:
        answer = self.get(path)
        assert answer.status == 200, (answer.status, answer.body)
        return answer.json()

    def rows(self) -> dict[str, Any]:
        """The rows of the overview by name, once the first look is over."""
        overview = until(lambda: self.json("/api/runs"), lambda found: not found["server"]["scanning"])
        return {row["name"]: row for row in overview["runs"]}


def until(look: Callable[[], Any], good: Callable[[Any], object] = bool) -> Any:
    """What `look` gives as soon as it is good."""
    deadline = time.monotonic() + PATIENCE
    while not good(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def serving(root: Path, state: Path, *arguments: str) -> Iterator[Served]:
    """A dashboard of `root` on a free port. Its token and its queue are below `state`; it ends with the block."""
    environment = os.environ | {"JAXTRAIN_STATE_DIR": str(state), "JAXTRAIN_QUEUE_DIR": str(state / "queue")}
    command = [sys.executable, "-m", "jaxtrain", "dashboard", "--root", str(root), "--port", "0", *arguments]
    with open(state.with_suffix(".err"), "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, state.with_suffix(".err").read_text()
        yield Served(process, address, state)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)


def row(step: int, phase: str = "train", **numbers: Any) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    return {
        "step": step,
        "epoch": step // 10,
        "phase": phase,
        "loss": 2.0 / (1 + step),
        "time": 1000.0 + step,
        **numbers,
    }


def write_run(path: Path, rows: list[dict[str, Any]] | None = None, code: int | None = 0, **config: Any) -> Path:
    """The files of a run that has ended with `code`; None: it is still running, in this process."""
    (path / "starts").mkdir(parents=True)
    (path / "logs").mkdir()
    values = {
        "seed": 0,
        "data": {"name": "digits", "global_batch": 64},
        "model": {"name": "mlp"},
        "train": {"epochs": 10, "steps": 0},
    }
    (path / "config.json").write_text(json.dumps(values | config))
    end = None if code is None else StartEnd(time.time(), code, "As it ended." if code else "", 50, "here", "itself")
    seconds = {"start": 3.0, "compile": 7.0, "step": 90.0}
    start = StartTimes(time.time() - 100.0, 0, 50, 0, seconds, "here", end, last_step=100)
    (path / "starts" / "000001.json").write_text(json.dumps(dataclasses.asdict(start)))
    append(path, rows if rows is not None else [row(step) for step in range(0, 50, 5)])
    if code is None:
        (path / "lock.json").write_text(json.dumps(dataclasses.asdict(Owner.here())))
    return path


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to the metrics of a run."""
    with open(path / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)
