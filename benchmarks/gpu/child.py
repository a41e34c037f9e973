"""Two processes that measure in turns, driven over pipes by a third: one JSON object a line, each way.

A child's own standard output becomes its standard error, whatever its libraries print, and that goes to a log file.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import ROOT


class ChildError(Exception):
    """A command that failed, or a child that died or did not answer; in one text. aside: more of it, that is no cause."""

    def __init__(self, text: str, aside: str = ""):
        super().__init__(f"{text} {aside}".rstrip())
        self._cause = text

    @property
    def out_of_memory(self) -> bool:
        """Whether the device's memory was too small."""
        text = self._cause.lower()
        return any(sign in text for sign in ("resource_exhausted", "out of memory", "outofmemory"))


class Child:
    """A module of this folder that calls `serve`, as a process of its own; it starts at once and is waited for later."""

    def __init__(self, module: str, log: Path, environment: Mapping[str, str]):
        self._log, self._answers, self._asked = log, queue.Queue[str | None](), ""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.gpu.{module}"],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def ask(self, command: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """What `command` returns; `send` and `answer` at once."""
        self.send(command, **arguments)
        return self.answer(timeout)

    def send(self, command: str, **arguments: Any) -> None:
        """Has the child begin with `command`. Raises `ChildError` if it has ended."""
        assert self._process.stdin is not None
        self._asked = command
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # the pipe is broken, or closed after a time-out
            raise ChildError(f"{command}: the process has ended. {self._tail()}") from None

    def answer(self, timeout: float) -> dict[str, Any]:
        """What the command returns that was sent last. Raises `ChildError`; after a time-out the child is ended."""
        command = self._asked
        try:
            line = self._answers.get(timeout=max(timeout, 1.0))
        except queue.Empty:
            self.close(wait=0)
            raise ChildError(f"{command}: no answer in {timeout:.0f} s.", self._tail()) from None
        if line is None:
            raise ChildError(f"{command}: the process ended with code {self._process.wait()}. {self._tail()}")
        try:
            answer = json.loads(line)
        except ValueError:
            raise ChildError(f"{command}: {line.strip()[:200]!r} is no answer.") from None
        if "error" in answer:
            raise ChildError(f"{command}: {answer['error']}")
        return answer["result"]

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "Its last words: " + " / ".join(line.strip()[:200] for line in lines[-5:])

    def close(self, wait: float = 5.0) -> None:
        """Ends the process and all that it started; the device's memory is free afterwards."""
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(wait)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(commands: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """The child's loop: answers until standard input ends. An error is an answer too."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        name = arguments.pop("command")
        print(f"{time.strftime('%H:%M:%S')} {name} {arguments}", file=sys.stderr, flush=True)
        try:
            answer = {"result": commands[name](**arguments)}
        except Exception as error:  # the parent goes on with the next model
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:1000]}"}
        answers.write(json.dumps(answer) + "\n")
    os._exit(0)  # no teardown of threads and devices: it can hang, and nothing is left to save
