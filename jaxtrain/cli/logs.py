"""Show the logs of all processes of a run, merged by time; or what a job of the local queue has printed."""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jaxtrain.host.files import reading
from jaxtrain.host.text import indented, printable
from jaxtrain.jobs.queue import ENDED, Entry
from jaxtrain.jobs.run_status import RUNNING, read_status
from jaxtrain.jobs.target import refuse_many, run_or_job
from jaxtrain.observability import merged_logs
from jaxtrain.workdir import SWEEP_FILE

_LOOK_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN|JOB, --follow, --json."""
    parser.add_argument("name", metavar="RUN|JOB", help="a work directory, or a job's id, number or name")
    parser.add_argument("--follow", "-f", action="store_true", help="go on with what is new, until it ends or Ctrl-C")
    parser.add_argument("--json", action="store_true", help="of a run: print one JSON object a line")


def run(arguments: argparse.Namespace) -> None:
    """Prints every entry, in the order of time. Raises `JaxtrainError`."""
    folder = Path(arguments.name)
    is_path = os.sep in arguments.name or ((folder / "logs").is_dir() and not (folder / SWEEP_FILE).exists())
    found = folder if is_path else run_or_job(arguments.name)
    if isinstance(found, Entry):
        for text in _of_job(found, follow=arguments.follow):
            sys.stdout.write(printable(text, lines=True))
            sys.stdout.flush()
        return
    refuse_many(found)
    for entry in _of_run(found, follow=arguments.follow):
        if arguments.json:
            print(json.dumps(dataclasses.asdict(entry)), flush=arguments.follow)
        else:
            print(indented(f"{entry.time} {entry.process} {entry.level} {entry.message}"), flush=arguments.follow)


def _of_run(folder: Path, *, follow: bool) -> Iterator[merged_logs.Entry]:
    lives = follow and read_status(folder).state == RUNNING
    if not lives:
        yield from merged_logs.merged(folder)
        return
    logs = merged_logs.Follower(folder)
    while lives:
        lives = read_status(folder).state == RUNNING  # before what it has written, or its last words would be lost
        yield from logs.new(last=not lives)
        if lives:
            time.sleep(_LOOK_SECONDS)


def _of_job(job: Entry, *, follow: bool) -> Iterator[str]:
    """What it has printed, in pieces of whole lines."""
    offset, lives = 0, True
    while lives:
        lives = follow and job.state().status not in ENDED
        text = b""
        if job.log.exists():
            with reading(job.log), open(job.log, "rb") as file:
                file.seek(offset)
                text = file.read()
        whole = text[: text.rfind(b"\n") + 1] if lives else text
        offset += len(whole)
        yield whole.decode("utf-8", "replace")
        if lives:
            time.sleep(_LOOK_SECONDS)
