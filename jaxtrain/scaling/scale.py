"""`scale`: how throughput grows with devices, where a step's time goes, and what would help."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxtrain import config as config_lib
from jaxtrain.config import Config
from jaxtrain.errors import ConfigError
from jaxtrain.host.backend import versions
from jaxtrain.host.cpus import cpu_name, usable_cpus
from jaxtrain.host.gpus import visible_gpus
from jaxtrain.host.targets import Target, parse_target
from jaxtrain.host.text import did_you_mean
from jaxtrain.observability.start_record import git_state
from jaxtrain.parallel.topology import compiler_problem
from jaxtrain.scaling import advice, formulas, measuring, tables, targets
from jaxtrain.scaling.measuring import MEASURED, SIMULATED, Machine, Point
from jaxtrain.scaling.protocol import LinkFit
from jaxtrain.scaling.study import STRONG, WEAK, Study, check_there, counts_of, powers_up_to
from jaxtrain.training.setup import check_names

REPEATS = 5
"""Blocks of steps of each run, in turns."""

_HOW = ("auto", "processes", "simulated")
_MOST_SIMULATED = 8  # devices, where nobody asks for more
_MOST_REPEATS, _MOST_STEPS = 1000, 100_000

Said = Callable[[str], None]


def scale(
    config: Config | ConfigDict | Mapping[str, Any],
    devices: Sequence[int] = (),
    *,
    how: str = "auto",
    modes: Sequence[str] = (STRONG, WEAK),
    target: str = "",
    links: Sequence[str] = (),
    steps: int = 0,
    repeats: int = REPEATS,
    said: Said = lambda _: None,
) -> dict[str, Any]:
    """Scales a run over numbers of devices.

    Args:
      config: a `Config`, or nested mappings of its fields such as the `ConfigDict` that `load_config` returns.
      devices: how many, the smallest is the base; () is 1, 2, 4, ... up to what there is.
      how: `auto` measures over GPUs, or over processes with cores of their own, and simulates larger numbers on a CPU;
        `processes` only measures; `simulated` only simulates.
      modes: `strong` keeps the global batch, `weak` that of a device.
      target: GPUs that need not be there, such as "8xh100": then nothing is run, but modelled, and compiled where that works.
      links: of the target, as `plan` takes them.
      steps: of a block; 0 chooses about 1.5 s.
      repeats: blocks of each run.
      said: takes a line on what is done now.

    Returns:
      Plain values: `title`; `tables`, each with `kind` (measured, simulated, compiled or modelled), `scaling`, `caption`,
      `columns` and `rows`; `fits`, sentences, and `fitted`, their numbers; `bottleneck` and `advice`, sentences; `notes`;
      `environment`.

    Raises:
      ConfigError: the run cannot be on one of these numbers, or there are not so many.
      JaxtrainError: what the run itself raises.
    """
    config = config if isinstance(config, Config) else config_lib.from_dict(config_lib.nested_dicts(config))
    check_names(config)
    for name, value, known in (("how", how, _HOW), *(("modes", mode, (STRONG, WEAK)) for mode in modes)):
        if value not in known:
            raise ConfigError(f"{name}={value!r}: must be one of {', '.join(known)}.{did_you_mean(value, known)}")
    counts = counts_of(",".join(map(str, devices))) if devices else ()
    if not 1 <= repeats <= _MOST_REPEATS:
        raise ConfigError(f"--repeats {repeats}: must be from 1 to {_MOST_REPEATS:,}.")
    if not 0 <= steps <= _MOST_STEPS:
        raise ConfigError(f"--steps {steps}: must be from 0 to {_MOST_STEPS:,}; 0 chooses.")
    if target:
        scaled = _on_target(config, counts, parse_target(target), modes, links, said)
    elif links:
        raise ConfigError("--link is of the GPUs of --target; links of this machine are measured.")
    else:
        scaled = _here(config, counts, how, modes, steps, repeats, said)
    title = f"{config.model.name} on {config.data.name}, global batch {config.data.global_batch}"
    return {"title": f"Scaling of {title}"} | scaled | {"environment": _environment()}


def _environment() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": usable_cpus(),
        "gpus": _gpus(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions(),
        "git": git_state(Path(__file__).resolve().parents[1]),
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
    }


def _gpus() -> int:
    return 0 if os.environ.get("JAX_PLATFORMS", "cuda").startswith("cpu") else visible_gpus()


# ------------------------------------------------------------------------------------------------------------ this machine


@dataclasses.dataclass(frozen=True)
class _Series:
    """The points of a mode. what: a device is."""

    kind: str
    mode: str
    what: str
    points: list[Point]
    link: LinkFit | None


def _here(
    config: Config, counts: tuple[int, ...], how: str, modes: Sequence[str], steps: int, repeats: int, said: Said
) -> dict[str, Any]:
    """What this machine measures, and simulates."""
    series = []
    planned = _planned(counts, how)
    studies = [Study(config, each, tuple(modes)) for _, each, _ in planned]  # all are checked before anything is run
    for study, (machine, _, what) in zip(studies, planned, strict=True):
        for mode in modes:
            points, link = measuring.measure(study, mode, machine, repeats, steps, said)
            series.append(_Series(machine.kind, mode, what, points, link))
    first = next((each for each in series if each.mode == STRONG), series[0])
    verdict = advice.of_points(first.kind, first.mode, first.points[0], first.points[-1], config, first.link)
    return {
        "tables": [tables.of_points(each.mode, each.points, config, each.kind, each.what) for each in series],
        **_with_texts([fit for each in series for fit in _fits(each)]),
        "bottleneck": verdict.text,
        "advice": verdict.advice,
        "notes": [_note(repeats, [point for each in series for point in each.points])],
    }


def _note(repeats: int, points: Sequence[Point]) -> str:
    """How the times came about."""
    least, most = (choose(point.steps for point in points) for choose in (min, max))
    steps = f"{least} steps" if least == most else f"{least} to {most} steps, about as long in time"
    return f"medians of {repeats} blocks of each run, in turns; a block has {steps}"


def _planned(counts: tuple[int, ...], how: str) -> list[tuple[Machine, tuple[int, ...], str]]:
    """What is measured on what: (machine, numbers of devices, what a device is).

    Raises:
      ConfigError: there are fewer than asked for.
    """
    gpus, cores = _gpus(), sorted(os.sched_getaffinity(0))
    simulated = (Machine(SIMULATED), counts or powers_up_to(_MOST_SIMULATED), "simulated devices")
    if how == "simulated":
        return [simulated]
    if gpus and how == "auto":
        check_there(counts or (1,), gpus, "GPUs", "--target models more, and --simulate makes CPU devices")
        return [(Machine(MEASURED), counts or powers_up_to(gpus), "GPUs")]
    if how == "processes":
        check_there(
            counts or (1,), len(cores), "cores", "each process has at least one of its own; --simulate needs none"
        )
    here = tuple(count for count in counts or powers_up_to(len(cores)) if count <= len(cores))
    planned = []
    if here:
        each = len(cores) // here[-1]
        pinned = tuple(tuple(cores[i * each : (i + 1) * each]) for i in range(here[-1]))
        planned.append((Machine(MEASURED, pinned), here, "processes"))
    if how == "auto" and here != counts:
        planned.append(simulated)
    return planned


def _fits(series: _Series) -> list[dict[str, Any]]:
    """Amdahl's or Gustafson's law, and the link; of simulated devices neither, which gain nothing."""
    if series.kind == SIMULATED:
        return []
    base = series.points[0].devices
    found = _serial_fit(series.kind, series.mode, [(p.devices / base, p.speedup) for p in series.points])
    if series.link is not None:
        found.append(_link_fit(series.points[-1], series.link, series.mode))
    return found


def _with_texts(fits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`fits`, the sentences, and `fitted`, their numbers."""
    return {"fits": [f"{fit['kind']}, {fit['scaling']}: {fit.pop('text')}" for fit in fits], "fitted": list(fits)}


def _serial_fit(kind: str, mode: str, points: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    law, fit = (
        ("Amdahl", formulas.fit_amdahl(points)) if mode == STRONG else ("Gustafson", formulas.fit_gustafson(points))
    )
    if fit is None:
        return []
    share = f"{law}: {100 * fit.share:.1f} % of the base's time is not shared out"
    if fit.fitted < 0:
        share += f" (fitted {100 * fit.fitted:.1f} %: more devices gained more than there are of them)"
    elif fit.fitted > 1:
        share += f" (fitted {100 * fit.fitted:.0f} %: more devices made it slower, which the law does not have)"
    bounded = mode == STRONG and 0 < fit.fitted <= 1
    limit = f", so that no number of devices is over {fit.limit:.1f} times as fast" if bounded else ""
    error = f"; the law is within {100 * fit.error:.1f} % of the {fit.points} points"
    if fit.points == 1:
        error = "; it is fitted to one point, which says nothing of others"
    return [
        {
            "name": law,
            "kind": kind,
            "scaling": mode,
            "serial_share": fit.share,
            "fitted": fit.fitted,
            "limit": fit.limit if math.isfinite(fit.limit) else None,
            "error": fit.error,
            "points": fit.points,
            "text": share + limit + error,
        }
    ]


def _link_fit(point: Point, link: LinkFit, mode: str) -> dict[str, Any]:
    """Latency and bandwidth, and what they say of the step's collectives."""
    told = point.traffic
    text = (
        f"alpha-beta: a message takes {1e6 * link.latency:.0f} us and then {link.bandwidth / 1e9:.3f} GB/s (median error "
        f"{100 * link.median_error:.0f} % of {len(link.points)} sums over {point.devices} devices)"
    )
    modelled = None
    if told.messages is not None and told.sent_bytes is not None:
        modelled = told.messages * link.latency + told.sent_bytes / link.bandwidth
        text += f"; a step's {told.messages} messages and {told.sent_bytes / 1e6:.2f} MB take {1e3 * modelled:.2f} ms by that"
        if point.parts:
            alone, beside = point.parts["communication"] or 0.0, point.parts["overlap"] or 0.0
            text += f", and ran for {1e3 * (alone + beside):.2f} ms, {1e3 * alone:.2f} of them with nothing beside"
    return {
        "name": "alpha-beta",
        "kind": MEASURED,
        "scaling": mode,
        "alpha_seconds": link.latency,
        "beta_seconds_per_byte": 1 / link.bandwidth,
        "median_error": link.median_error,
        "step_seconds": modelled,
        "points": [list(each) for each in link.points],
        "text": text,
    }


# ------------------------------------------------------------------------------------------------------------------ a target


def _on_target(
    config: Config, counts: tuple[int, ...], target: Target, modes: Sequence[str], links: Sequence[str], said: Said
) -> dict[str, Any]:
    """What is modelled and compiled for GPUs that need not be there."""
    counts = counts or powers_up_to(target.devices)
    study = Study(config, counts, tuple(modes))
    for count in counts:
        targets.target_of(target, count)
    made, fits, first = [], [], None
    for mode in modes:
        points = targets.model(study, mode, target, links, said)
        examples = targets.train_examples(config)
        made.append(tables.of_model(mode, points, config, examples))
        base = points[0]
        rates = [(p.devices / base.devices, p.batch / p.seconds * base.seconds / base.batch) for p in points]
        fits += _serial_fit(tables.MODELLED, mode, rates)
        if first is None or mode == STRONG:
            first = advice.of_model(base, points[-1], mode, config)
    notes = []
    if problem := compiler_problem():
        notes.append(f"nothing was compiled: {problem}")
    else:
        made += [tables.of_programs(mode, targets.compile_points(study, mode, target, said)) for mode in modes]
    assert first is not None
    verdict = {"bottleneck": first.text, "advice": first.advice, "notes": notes}
    return {"tables": made, **_with_texts(fits), **verdict}
