"""The work directory of a run: the names of its files, and whether they can be written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.errors import WorkdirError
from jaxtrain.host.files import ELSEWHERE, atomic_write, read_json, write_synced, writing
from jaxtrain.host.paths import require_local
from jaxtrain.host.text import printable

SWEEP_FILE = "sweep.json"
"""In the directory of a sweep, whose runs are in directories below it."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Where each file of a run is. Process 0 alone writes the shared ones; every process writes its own log."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config of the first start."""
        return self.path / "config.json"

    @property
    def dataset(self) -> Path:
        """What the run has recorded of its data set (`data.record`)."""
        return self.path / "dataset.json"

    @property
    def skipped_images(self) -> Path:
        """The images that the latest start has left out (`data.skip_bad`), and why: one a line."""
        return self.path / "skipped_images.txt"

    @property
    def metrics_csv(self) -> Path:
        """One row an epoch and phase."""
        return self.path / "metrics.csv"

    @property
    def metrics_jsonl(self) -> Path:
        """One object a logged step or evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def bad_batches(self) -> Path:
        """One object a batch with a non-finite number or a spike, with its examples."""
        return self.path / "bad_batches.jsonl"

    @property
    def events(self) -> Path:
        """One object a checkpoint, anomaly, roll-back and the like (`observability.events`)."""
        return self.path / "events.jsonl"

    @property
    def layout(self) -> Path:
        """What each device of the latest start stores (`training.layout_report.overview`)."""
        return self.path / "layout.json"

    @property
    def schedule(self) -> Path:
        """A picture of its pipeline's planned step; only with several stages."""
        return self.path / "schedule.svg"

    def evaluation(self, split: str) -> Path:
        """What `jaxtrain evaluate --report` found on `train`, `val` or `test`; a page with it lies beside."""
        return self.path / "evaluation" / f"{split}.json"

    @property
    def plan(self) -> Path:
        """The layout that `layout.strategy=auto` chose, with its plan."""
        return self.path / "plan.json"

    @property
    def sinks(self) -> Path:
        """The run's identity at each of its sinks (`sinks.names`)."""
        return self.path / "sinks.json"

    @property
    def manifest(self) -> Path:
        """What each start ran on."""
        return self.path / "manifest.json"

    @property
    def result(self) -> Path:
        """Written once, when the run is complete."""
        return self.path / "result.json"

    @property
    def starts(self) -> Path:
        """How each start spent its time (`jaxtrain goodput`)."""
        return self.path / "starts"

    @property
    def checkpoints(self) -> Path:
        """One directory a saved step."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Event files in `train`, `val` and `test`."""
        return self.path / "tensorboard"

    @property
    def logs(self) -> Path:
        """Files that each process writes for itself."""
        return self.path / "logs"

    def trace(self, process: int) -> Path:
        """The times of one step's operations in one process (`layout.trace_step`)."""
        return self.logs / f"pipeline_trace_{process}.json"

    def profile(self, first: int, last: int, process: int) -> Path:
        """The profile of the steps from `first` to `last` in one process: a trace, and `summary.txt`."""
        return self.path / "profile" / f"steps_{first}_{last}" / f"process_{process}"

    def log(self, process: int) -> Path:
        """The text log of one process."""
        return self.logs / f"process_{process}.log"

    def refuse_sweep(self) -> None:
        """Raises `WorkdirError` where the directory is that of a sweep, which would not go on beside a run's files."""
        if (self.path / SWEEP_FILE).exists():
            raise WorkdirError(f"{self.path} is the directory of a sweep; choose another --workdir for the run.")

    def refuse_what_is_in_the_way(self) -> None:
        """Raises `WorkdirError` where a file has the name of a directory of the run, or a directory that of a file."""
        folders = [self.checkpoints, self.tensorboard, self.starts, self.path / "superseded", self.path / "corrupt"]
        files = [
            self.config,
            self.dataset,
            self.metrics_csv,
            self.metrics_jsonl,
            self.bad_batches,
            self.manifest,
            self.events,
        ]
        for path in (*folders, *files, self.result, self.skipped_images, self.layout, self.schedule):
            wanted, is_wanted = ("directory", path.is_dir()) if path in folders else ("file", path.is_file())
            if os.path.lexists(path) and not is_wanted and (path in folders or path.exists()):
                raise WorkdirError(f"{path} is no {wanted}; move it away, or choose another --workdir.")

    def read_config(self) -> dict[str, Any] | None:
        """The stored config as nested dicts, None where no run has started here. Raises `WorkdirError` when damaged."""
        if not self.config.exists():
            return None
        values = read_json(self.config)
        if not isinstance(values, dict):
            raise WorkdirError(f"{self.config} is damaged (it holds no JSON object); {ELSEWHERE}.")
        return values

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Stores the resolved config (`config.to_dict`)."""
        atomic_write(self.config, json.dumps(values, indent=2, allow_nan=False) + "\n")

    def write_layout(self, layout: Mapping[str, Any], schedule: str) -> None:
        """Stores what each device stores, and the picture of the pipeline's step; '' where there is no pipeline."""
        atomic_write(self.layout, json.dumps(layout, indent=2, allow_nan=False) + "\n")
        self._write_or_remove(self.schedule, schedule)

    def write_dataset(self, record: Mapping[str, Any]) -> None:
        """Stores the record of the data set (`data.record`)."""
        atomic_write(self.dataset, json.dumps(record, indent=2, allow_nan=False) + "\n")

    def write_skipped_images(self, sentences: Sequence[str]) -> None:
        """Stores what was left out; removes the file where nothing was."""
        self._write_or_remove(self.skipped_images, "".join(f"{printable(sentence)}\n" for sentence in sentences))

    @staticmethod
    def _write_or_remove(path: Path, text: str) -> None:
        if text:
            atomic_write(path, text)
        else:
            with writing(path):
                path.unlink(missing_ok=True)


def named(path: str | Path) -> Path:
    """The path of a work directory that a user has named. Raises `WorkdirError` for an address."""
    require_local(path, f"The work directory {path}", WorkdirError)
    return Path(path)


def prepare(path: str | Path) -> Workdir:
    """Creates the directory and checks that files in it can be written, synced and renamed.

    So a full or read-only file system is found now, not at the first save: Orbax notices it only when it waits for an
    asynchronous save to finish. Every process may call it, in any order.

    Raises:
      WorkdirError: the name cannot be that of a local directory, or a file in it cannot be written, synced or renamed.
    """
    name = str(path)
    if not name.strip():
        raise WorkdirError("The work directory has an empty name; choose one with --workdir.")
    if _CONTROL.search(name):
        raise WorkdirError(f"The work directory {name!r} has a control character in its name; choose another name.")
    workdir = Workdir(named(path).expanduser().absolute())
    directory = workdir.path
    try:
        workdir.log(0).parent.mkdir(parents=True, exist_ok=True)
        for directory in (workdir.path, workdir.logs, workdir.checkpoints):  # these two may be on other disks
            if directory.is_dir():
                _probe(directory)
    except OSError as error:
        # a component of the path that is a file: EEXIST when it is the last one, ENOTDIR above that
        reason = "a file is in its way" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        raise WorkdirError(
            f"The work directory {directory} cannot be written ({reason}); choose another with --workdir."
        ) from error
    workdir.refuse_what_is_in_the_way()
    return workdir


def _probe(directory: Path) -> None:
    """Writes, syncs and renames a file in a directory, and leaves none there. Raises `OSError`."""
    probe = directory / f".probe.{os.getpid()}.{os.urandom(4).hex()}"
    renamed = probe.with_name(probe.name + ".renamed")
    try:
        write_synced(probe, "probe")
        os.replace(probe, renamed)
    finally:
        for leftover in (probe, renamed):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
