"""Runs of several real processes on this host (gloo): the same numbers, and an answer when one of them is amiss."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import runs
from runs import EXACT, SMALL, here

LAST = 12  # the last step of `SMALL` and `EXACT`
TOLERANCE = 1e-12  # relative, in f64; a wrong scale, order or random key shows at 1e-3 and above

# Gradients accumulated over four microbatches, BatchNorm over four groups, and every save kept.
SAVED = EXACT | {"layout.microbatches": 4}

shares_saved = pytest.mark.xdist_group("saved")


@contextlib.contextmanager
def several(folder: Path, devices: int, *commands: Sequence[str]) -> Iterator[list[runs.Started]]:
    """Starts a process for each command: the program that it runs (see `PROGRAM`), with `devices` CPU devices."""
    port = runs.free_port()
    with contextlib.ExitStack() as stack:
        found = []
        for process, command in enumerate(commands):
            place = ["--simulate-devices", str(devices), *runs.joined(process, len(commands), port)]
            found.append(stack.enter_context(runs.main(folder / f"{process}.txt", *command, *place)))
        yield found
