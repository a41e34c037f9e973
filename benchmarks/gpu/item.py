"""One item of a call on a GPU machine: a command with a limit of time, of which no process stays behind.

    OUT=DIR CALL_BEGAN=$(date +%s) CALL_SECONDS=530 KEEP=DIR python -m benchmarks.gpu.item NAME PERCENT COMMAND ...

The command may take PERCENT of the call's seconds, and no more than is left of them. Then it gets SIGTERM, a little later
SIGKILL, as does every process that it has started, whatever its session. `ITEM_SECONDS`, `ITEM_RESULTS` and `ITEM_SCRATCH`
tell it what it may take and where to write (`parts.add_options`). Afterwards $OUT has a line more in call.log, the ends of
its logs in items.log, its result in gpu.json, and its compile caches in caches_NAME.tar.gz, if they are small enough.

The exit code is 1 where the command failed or was left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.parts import Session

MARK = "GPU_ITEM"  # in the environment of all that an item starts
# Shares of the call: an item that has less is left out; what an item leaves for the end of the call; what a command has
# less than its item, to end by itself.
LEAST, LAST, MARGIN = 0.04, 0.02, 0.03
GRACE = 3.0  # seconds between SIGTERM and SIGKILL, of a long call
LOG_BYTES = 300_000  # of each log
CACHE_BYTES = 15 << 20  # of a packed cache: some machines give back only eight files of 16 MiB


@dataclasses.dataclass(frozen=True)
class Call:
    """What the items share. ends: in seconds of `time.time`."""

    out: Path
    keep: Path
    seconds: float
    ends: float

    @property
    def left(self) -> float:
        """Seconds until the call must end."""
        return self.ends - time.time()

    def say(self, text: str) -> None:
        """A line on the screen and in call.log."""
        line = f"{time.strftime('%H:%M:%S')} +{self.seconds - self.left:3.0f} s  {text}"
        print(line, flush=True)
        with open(self.out / "call.log", "a") as file:
            file.write(line + "\n")


def main() -> None:
    """Reads the call from the environment, runs the item, says how it ended."""
    name, percent, *command = sys.argv[1:]
    seconds = float(os.environ["CALL_SECONDS"])
    call = Call(Path(os.environ["OUT"]), Path(os.environ["KEEP"]), seconds, float(os.environ["CALL_BEGAN"]) + seconds)
    session = Session(call.out / "gpu.json", {"device": "", "command": " ".join(sys.argv[1:])})
    grace = min(GRACE, LAST * seconds)
    least, limit = max(1.0, LEAST * seconds), min(float(percent) / 100 * seconds, call.left - LAST * seconds - grace)
    if limit < least:
        session.leave_out(name, f"{call.left:.0f} s were left of the call")
        call.say(f"{name}: left out, {call.left:.0f} s were left")
        sys.exit(1)
    call.say(f"{name}: at most {limit:.0f} s")
    scratch = call.keep / name
    scratch.mkdir(parents=True, exist_ok=True)
    for log in _logs(scratch):  # of an earlier call on this machine
        log.unlink()
    given = {
        "ITEM_SECONDS": f"{limit - MARGIN * seconds * (limit > 2 * MARGIN * seconds):.1f}",
        "ITEM_RESULTS": str(call.out / "gpu.json"),
        "ITEM_SCRATCH": str(scratch),
    }
    began = time.monotonic()
    code = bounded(command, limit, grace, given, scratch / "item.log")
    took = time.monotonic() - began
    lines = (scratch / "item.log").read_text(errors="replace").strip().splitlines()
    row = {"kind": "item", "name": name, "seconds": took, "limit_seconds": limit, "code": code}
    if code:
        row["error"] = (f"ended after {limit:.0f} s: " if took >= limit else "") + " / ".join(lines[-5:])[-1500:]
    session.put(row)
    _collect(call, name, scratch)
    call.say(f"{name}: {'failed' if code else 'done'}, exit code {code}, {took:.0f} s; {(lines or [''])[-1][:200]}")
    sys.exit(1 if code else 0)


def bounded(command: Sequence[str], limit: float, grace: float, given: Mapping[str, str], log: Path) -> int:
    """Runs `command` until its limit, and ends all that it has started.

    Args:
      command: with its arguments.
      limit: seconds, after which it gets SIGTERM.
      grace: seconds from then to SIGKILL.
      given: environment variables, beside those of this process.
      log: for what it prints.

    Returns:
      Its exit code, 124 after the limit, 127 if it cannot be started.
    """
    mark = f"{MARK}={os.getpid()}-{time.time()}"
    environment = {**os.environ, **given, MARK: mark.partition("=")[2]}
    with open(log, "wb") as file:
        try:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        except OSError as error:
            file.write(f"{error}\n".encode())
            return 127
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            process.kill()
            return 124
        finally:
            _end_all(process.pid, mark)


def _end_all(group: int, mark: str) -> None:
    """SIGKILL to the process group, and to whatever has the mark in its environment, until nothing has."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    for _ in range(20):  # a process that the driver holds cannot be ended: do not wait for it
        marked = [path for path in Path("/proc").glob("[0-9]*") if _has(path / "environ", mark)]
        if not marked:
            return
        for path in marked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.name), signal.SIGKILL)
        time.sleep(0.05)


def _has(environ: Path, mark: str) -> bool:
    try:
        return mark.encode() in environ.read_bytes().split(b"\0")
    except OSError:  # it has ended, or belongs to somebody else
        return False


def _logs(scratch: Path) -> list[Path]:
    return sorted(path for ending in ("*.log", "*.output") for path in scratch.rglob(ending))


def _collect(call: Call, name: str, scratch: Path) -> None:
    """Logs and caches of an item into the folder that comes back. Few files: the logs are one."""
    with open(call.out / "items.log", "ab") as file:
        for path in _logs(scratch):
            file.write(f"\n==> {name}/{path.relative_to(scratch)}\n".encode() + path.read_bytes()[-LOG_BYTES:])
    caches, packed = scratch / "caches", call.out / f"caches_{name}.tar.gz"
    size = sum(path.stat().st_size for path in caches.rglob("*") if path.is_file())
    if 0 < size < 10 * CACHE_BYTES:  # packing more would take the next item's seconds
        with tarfile.open(packed, "w:gz", compresslevel=1) as tar:
            tar.add(caches, f"{name}/caches")
        size = packed.stat().st_size
    if size > CACHE_BYTES:
        call.say(f"{name}: caches of {size / 2**20:.0f} MiB are not kept")
        packed.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
