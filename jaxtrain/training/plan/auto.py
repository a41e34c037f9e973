"""`layout.strategy=auto`: a run chooses its layout for the devices that it has, and keeps it while they stay the same."""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain.config import CHOSEN_FIELDS, Config, LayoutConfig
from jaxtrain.distributed import coordination
from jaxtrain.errors import ConfigError, DeviceMemoryError, JaxtrainError
from jaxtrain.host.files import atomic_write
from jaxtrain.observability.rendering import size
from jaxtrain.parallel.mesh import Device
from jaxtrain.recipes import change
from jaxtrain.training.plan.problem import GIB, Machine, kept_fields, target_of
from jaxtrain.training.plan.search import plan

log = logging.getLogger("jaxtrain")

_COMPILED = 2  # layouts: the run waits for them
_LESS = 0.8  # of what a run that was out of memory should have needed: what needs so much may fit
_SECONDS = 1800  # that the other processes wait for the plan of process 0


def choose_layout(config: Config, file: Path, devices: Sequence[Device]) -> Config:
    """The config with the layout that its run takes; as it is where `layout.strategy` is not `auto`.

    Process 0 plans and tells the others. The plan is stored in `file`, and kept while the devices and what was asked for are
    the same: a run that goes on has the layout that it had.

    Args:
      config: as the user gave it.
      file: plan.json of the work directory.
      devices: of the run.

    Raises:
      ConfigError: no layout is possible.
      DeviceMemoryError: none fits the devices.
    """
    if config.layout.strategy != "auto":
        return config
    names = coordination.allgather_str(coordination.unique_key("hosts"), socket.gethostname(), _SECONDS)
    hosts, answer = len(set(names)), ""
    if coordination.index() == 0:
        try:
            answer = json.dumps(_chosen(config, file, devices, hosts))
        except (ConfigError, DeviceMemoryError) as error:
            answer = json.dumps({"error": type(error).__name__, "text": str(error)})
    found = json.loads(coordination.broadcast_str("the layout", answer, _SECONDS))
    if "error" in found:
        kind = ConfigError if found["error"] == "ConfigError" else DeviceMemoryError
        raise kind(found["text"])
    return change(config, **found["fields"], **{"layout.strategy": "manual", "layout.keep": ()})


def _chosen(config: Config, file: Path, devices: Sequence[Device], hosts: int) -> dict[str, Any]:
    """`fields` of the layout, by dotted name; says what was chosen and why."""
    target = target_of(devices, hosts)
    asked = _asked(config, devices, hosts)
    stored = _stored(file)
    if stored is not None and stored["asked"] == asked:
        log.info("layout (chosen at an earlier start, for the same devices): %s", stored["flags"] or "one device")
        return stored
    report = plan(config, target, compiled=_COMPILED, said=lambda text: log.debug("%s", text))
    best = report["best"]
    if best is None:
        nearest = report["layouts"][0]
        raise DeviceMemoryError(
            f"layout.strategy=auto: no layout of {target.name} fits {size(report['usable_bytes'])} a device; what needs least, "
            f"{nearest['flags'] or 'the config as it is'}, needs {size(nearest['peak_bytes'])}. Use more devices or a smaller "
            "config.data.global_batch."
        )
    how = "compiled" if best["compiled"] else "estimated"
    log.info(
        "layout chosen for %s: %s a device of %s usable (%s), %.1f ms a step (modelled), limited by %s; of %d layouts",
        target.name,
        size(best["peak_bytes"]),
        size(report["usable_bytes"]),
        how,
        1000 * best["step_seconds"],
        best["limit"],
        len(report["layouts"]),
    )
    log.info("the same without layout.strategy=auto: %s", best["flags"] or "(no flag)")
    for other in report["layouts"][1:3]:
        log.info("not taken: %s (%s)", other["flags"] or "(no flag)", other["why_not"])
    chosen = {"asked": asked, "fields": best["fields"], "flags": best["flags"], "report": report}
    atomic_write(file, json.dumps(chosen, indent=1))
    return chosen


def memory_remedies(config: Config, devices: Sequence[Device]) -> list[str]:
    """Up to three layouts, as flags, for a run that was out of memory: those that need a fifth less, the fastest first.

    By formulas. Fields that the user set may change too. [] where nothing is known to help.
    """
    now = change(config, **{"layout.keep": CHOSEN_FIELDS, "layout.memory_limit": 0.0})
    try:
        target = target_of(devices, len({device.process_index for device in devices}))
        needs = plan(now, target, compiled=0)["layouts"][0]["peak_bytes"]
        default = LayoutConfig()
        free = {name: getattr(default, name) for name in ("replica", "tensor", "zero", "stages", "schedule", "chunks")}
        wanted = {f"layout.{name}": value for name, value in free.items()} | {
            "layout.data": -1,
            "layout.boundaries": (),
        }
        anew = change(now, **wanted, **{"layout.keep": (), "layout.microbatches": 1, "train.remat": "none"})
        machine = Machine.of(target)
        limit = min(_LESS * needs, machine.usable) / GIB
        rows = plan(change(anew, **{"layout.memory_limit": limit}), target, compiled=0)["layouts"]
    except JaxtrainError:
        return []
    return [row["flags"] for row in rows if row["step_seconds"] is not None and row["peak_bytes"] <= limit * GIB][:3]


def _asked(config: Config, devices: Sequence[Device], hosts: int) -> dict[str, Any]:
    """What a plan was made for: the devices, and what of the config decides."""
    kept = sorted(kept_fields(config))
    values = {name: getattr(config.train if name == "remat" else config.layout, name) for name in kept}
    return json.loads(
        json.dumps(
            {
                "devices": len(devices),
                "hosts": hosts,
                "kind": devices[0].device_kind,
                "batch": config.data.global_batch,
                "limit": config.layout.memory_limit,
                "precision": config.train.precision,
                "model": dataclasses.asdict(config.model),
                "kept": values,
            }
        )
    )


def _stored(file: Path) -> dict[str, Any] | None:
    """The plan of an earlier start; None where there is none that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"asked", "fields", "flags"} <= set(found) else None
