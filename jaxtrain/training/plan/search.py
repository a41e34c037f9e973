"""`plan`: every legal layout of a run on some devices, what it needs, how fast it should be, and which is best."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxtrain import config as config_lib
from jaxtrain.config import Config
from jaxtrain.errors import ConfigError
from jaxtrain.host.links import parse_link
from jaxtrain.host.targets import Target, parse_target
from jaxtrain.observability.rendering import size
from jaxtrain.parallel.topology import compiler_problem
from jaxtrain.precision import resolve_precision
from jaxtrain.recipes import change
from jaxtrain.training.jax_settings import settings
from jaxtrain.training.plan.candidates import Axes, Legal, candidates
from jaxtrain.training.plan.compiling import compile_layouts
from jaxtrain.training.plan.estimate import Estimate, Estimator
from jaxtrain.training.plan.problem import Machine, Problem

COMPILED = 4
"""How many layouts are compiled, as a rule."""
NEAR = 0.3
"""A layout whose estimated peak is within this share of the limit is compiled before it is said to fit, or not to."""
ALIKE = 0.1
"""Of layouts whose modelled times differ by less than this share, the simplest is taken."""
_MOST_COMPILED = 12
_MOST_DEVICES_COMPILED = 64
_REFUSED = 1 << 62  # bytes of a program that XLA refuses: it fits nowhere

Said = Callable[[str], None]


@dataclasses.dataclass
class _Row:
    """A layout of the report: the fastest numbers of microbatches and `remat` that fit, or those that need least."""

    legal: Legal
    best: Estimate
    grid: list[Estimate]
    compiled: dict[str, Any] | None = None

    def peak(self) -> int:
        return self.compiled["peak_bytes"] if self.compiled else self.best.peak


def plan(
    config: Config | ConfigDict | Mapping[str, Any],
    target: str | Target,
    *,
    links: Sequence[str] = (),
    compiled: int = COMPILED,
    said: Said = lambda _: None,
) -> dict[str, Any]:
    """Plans the layout of a run on devices that need not be there.

    Fields of `config.layout` that are not at their default, or are named in `layout.keep`, are kept; the others are chosen.

    Args:
      config: a `Config`, or nested mappings of its fields such as the `ConfigDict` that `load_config` returns.
      target: such as "8xh100"; see `host.targets.parse_target`.
      links: "within=LINK" and "between=LINK" (`host.links.parse_link`), of the GPUs of a host and of hosts.
      compiled: how many layouts to compile, the fastest first, and those that may not fit; 0 for formulas alone.
      said: takes a line on what is being done.

    Returns:
      Plain values. `target`, `devices`, `usable_bytes`, `how` (whether layouts were compiled, or why not), `kept`, `best` (an
      entry of `layouts`, or None where none fits), and `layouts`, the best first. Each has `flags` (what sets it), `fits`
      (True, False, or None where only compiling could tell and it was not), `peak_bytes`, `step_seconds` (modelled), `limit`
      (what takes most of the step), `why_not` (about five words, "" for the best), `compiled` (whether the peak is the
      compiled programs'), `memory` and `seconds` (by cause), `wire_bytes` (a device sends in a step, by axis), `fields`, and
      with them `microbatch_grid`, the layout with other microbatches and `remat`.

    Raises:
      ConfigError: the run is wrong with any layout, or no layout is legal.
    """
    config = config if isinstance(config, Config) else config_lib.from_dict(config_lib.nested_dicts(config))
    target = parse_target(target) if isinstance(target, str) else target
    machine = machine_of(target, config.layout.memory_limit, links)
    said("tracing the layers")
    return plan_problem(make_problem(config, machine), compiled=compiled, said=said)


def make_problem(config: Config, machine: Machine) -> Problem:
    """The problem; raises `ConfigError` where the run is wrong with any layout."""
    with settings(_with_precision(config, machine)):
        return Problem(config, machine)


def plan_problem(problem: Problem, *, compiled: int, said: Said) -> dict[str, Any]:
    """As `plan`, of a problem that was made before."""
    target = problem.machine.target
    with settings(_with_precision(problem.asked, problem.machine)):
        rows, refused = _estimated(problem, said)
    if not rows:
        raise ConfigError(_none_legal(problem, refused))
    why = _cannot_compile(target) if compiled else "formulas alone"
    if not why:
        _compile(problem, rows, compiled, said)
    return _report(problem, rows, refused, why)


def _with_precision(config: Config, machine: Machine) -> Config:
    return change(config, **{"train.precision": resolve_precision(config.train.precision, machine.target.platform)})


def machine_of(target: Target, limit: float, links: Sequence[str]) -> Machine:
    """The machine of a target, with links of one's own. Raises `ConfigError` for a link that there is not."""
    given = {}
    for text in links:
        where, equals, link = text.partition("=")
        if not equals or where not in ("within", "between"):
            raise ConfigError(f"--link {text}: must be within=LINK (the GPUs of a host) or between=LINK (hosts).")
        given[where] = parse_link(link)
    return Machine.of(target, limit, **given)


def _cannot_compile(target: Target) -> str:
    if target.devices > _MOST_DEVICES_COMPILED:
        return f"formulas alone: more than {_MOST_DEVICES_COMPILED} devices"
    problem = compiler_problem() if target.platform == "cuda" else ""
    return f"formulas alone: {problem}" if problem else ""


def _estimated(problem: Problem, said: Said) -> tuple[list[_Row], list[Any]]:
    """The legal layouts by modelled throughput, those that fit first; and those that the run refuses."""
    estimator, rows, refused = Estimator(problem), [], []
    for each in candidates(problem):
        if not isinstance(each, Legal):
            refused.append(each)
            continue
        grid = [estimator.estimate(each, count, "none") for count in each.microbatches if "none" in each.remats]
        if not any(_fits(problem, estimate) for estimate in grid):
            others = [remat for remat in each.remats if remat != "none"]
            grid += [estimator.estimate(each, count, remat) for count in each.microbatches for remat in others]
        rows.append(_Row(each, _fastest(problem, grid), grid))
        said(f"{len(rows):,} layouts by formulas")
    _sort(problem, rows)
    return rows, refused


def _fits(problem: Problem, estimate: Estimate) -> bool:
    return estimate.peak <= problem.machine.usable


def _fastest(problem: Problem, grid: Sequence[Estimate]) -> Estimate:
    """The fastest that fits; else the one that needs least."""
    fitting = [each for each in grid if _fits(problem, each)]
    if fitting:
        return min(fitting, key=lambda each: (each.step_seconds, each.peak))
    return min(grid, key=lambda each: (each.peak, each.step_seconds))


def _sort(problem: Problem, rows: list[_Row]) -> None:
    """Sorts by modelled time what fits, then by memory what does not; of nearly equal times the simplest layout is first."""

    def simple(row: _Row) -> tuple[Any, ...]:
        axes = row.legal.axes
        return (axes.stages, axes.tensor, axes.zero, axes.replica, axes.chunks, row.best.microbatches)

    def key(row: _Row) -> tuple[Any, ...]:
        fits = row.peak() <= problem.machine.usable
        return (not fits, row.best.step_seconds if fits else row.peak(), *simple(row))

    rows.sort(key=key)
    fitting = [row for row in rows if row.peak() <= problem.machine.usable]
    if fitting:
        alike = [row for row in fitting if row.best.step_seconds <= (1 + ALIKE) * fitting[0].best.step_seconds]
        rows[: len(alike)] = sorted(alike, key=simple)


def _compile(problem: Problem, rows: list[_Row], count: int, said: Said) -> None:
    """Compiles the fastest layouts, those near the limit, and then what is the best as long as that is a guess."""
    usable, room = problem.machine.usable, _MOST_COMPILED
    chosen = rows[:count] + [row for row in rows[count:] if abs(row.best.peak - usable) <= NEAR * usable]
    while chosen and room > 0:
        chosen = chosen[:room]
        room -= len(chosen)
        configs = [config_of(problem, row.legal.axes, row.best) for row in chosen]
        for row, compiled in zip(chosen, compile_layouts(configs, problem.machine.target, said), strict=True):
            row.compiled = compiled or {"peak_bytes": _REFUSED, "kernels": 0, "gigabytes": 0.0}
            _make_smaller(problem, row)
        _sort(problem, rows)
        chosen = [row for row in rows[:1] if row.compiled is None]


def _make_smaller(problem: Problem, row: _Row) -> None:
    """Gives a layout that was compiled and does not fit the next microbatches or `remat` that should, if there are any."""
    usable = problem.machine.usable
    off = row.peak() / max(row.best.peak, 1)
    smaller = [each for each in row.grid if each.peak * off <= usable and each.peak < row.best.peak]
    if row.peak() > usable and smaller:
        row.best, row.compiled = min(smaller, key=lambda each: (each.step_seconds, each.peak)), None


def fields_of(axes: Axes, estimate: Estimate) -> dict[str, Any]:
    """The fields of the config that a layout sets, by dotted name."""
    fields = {f"layout.{name}": value for name, value in dataclasses.asdict(axes).items()}
    return fields | {"layout.microbatches": estimate.microbatches, "train.remat": estimate.remat}


def config_of(problem: Problem, axes: Axes, estimate: Estimate) -> Config:
    """The config of the run with that layout."""
    return change(problem.asked, **fields_of(axes, estimate), **{"layout.strategy": "manual", "layout.keep": ()})


# ---------------------------------------------------------------------------------------------------------- report


def _report(problem: Problem, rows: list[_Row], refused: list[Any], how: str) -> dict[str, Any]:
    target, usable = problem.machine.target, problem.machine.usable
    layouts = [_described(problem, row, rows[0]) for row in rows]
    best = layouts[0] if layouts[0]["fits"] is not False else None
    return {
        "target": target.name,
        "devices": target.devices,
        "usable_bytes": usable,
        "global_batch": problem.batch,
        "steps_per_epoch": math.ceil(len(problem.run.dataset.train) / problem.batch),
        "precision": problem.config.train.precision,
        "how": how or "compiled where it says so, times modelled",
        "kept": sorted(problem.kept),
        "within": problem.machine.within.name,
        "between": problem.machine.between.name,
        "best": best,
        "layouts": [*layouts, *(_described_refusal(problem, each) for each in refused)],
    }


def _described(problem: Problem, row: _Row, first: _Row) -> dict[str, Any]:
    usable, peak = problem.machine.usable, row.peak()
    fits: bool | None = peak <= usable
    if row.compiled is None and abs(peak - usable) <= NEAR * usable:
        fits = None
    fields = fields_of(row.legal.axes, row.best)
    return {
        "flags": flags_of(problem, fields),
        "fields": fields,
        "mesh": dict(row.legal.layout.mesh.shape),
        "fits": fits,
        "peak_bytes": peak,
        "estimated_peak_bytes": row.best.peak,
        "compiled": row.compiled is not None,
        "kernels": row.compiled["kernels"] if row.compiled else None,
        "gigabytes": row.compiled["gigabytes"] if row.compiled else None,
        "step_seconds": row.best.step_seconds,
        "examples_per_second": problem.batch / row.best.step_seconds,
        "limit": row.best.limit,
        "why_not": "" if row is first and fits is not False else _why_not(problem, row, first, fits),
        "memory": dict(row.best.memory),
        "seconds": dict(row.best.seconds),
        "wire_bytes": dict(row.best.wire),
        "microbatch_grid": [
            {
                "microbatches": each.microbatches,
                "remat": each.remat,
                "peak_bytes": each.peak,
                "step_seconds": each.step_seconds,
            }
            for each in row.grid
        ],
    }


def _described_refusal(problem: Problem, refused: Any) -> dict[str, Any]:
    axes = refused.axes
    fields = {f"layout.{name}": value for name, value in dataclasses.asdict(axes).items()}
    return {
        "flags": flags_of(problem, fields),
        "fields": fields,
        "mesh": {"stage": axes.stages, "replica": axes.replica, "data": axes.data, "tensor": axes.tensor},
        "fits": False,
        "peak_bytes": None,
        "step_seconds": None,
        "limit": "",
        "why_not": refused.why,
        "compiled": False,
    }


def flags_of(problem: Problem, fields: Mapping[str, Any]) -> str:
    """What to add to the command to have these fields: those that differ from the defaults, and not from what was asked."""
    asked, default = (config_lib.flatten(config_lib.to_dict(c)) for c in (problem.asked, Config()))
    unneeded = {"layout.schedule", "layout.chunks"} if fields["layout.stages"] == 1 else set()
    shown = {
        name: value
        for name, value in fields.items()
        if name not in unneeded and (value != default[name] or asked[name] != value) and name != "layout.data"
    }
    return " ".join(f"--config.{name}={value}" for name, value in shown.items())


def _why_not(problem: Problem, row: _Row, first: _Row, fits: bool | None) -> str:
    if row.peak() == _REFUSED:
        return "XLA does not compile it"
    if fits is False:
        return f"needs {size(row.peak())}, has {size(problem.machine.usable)}"
    ours, best = row.best, first.best
    if ours.step_seconds <= best.step_seconds * (1 + 1e-9):
        return "as fast, less simple"
    slower = {
        name: ours.seconds.get(name, 0.0) - best.seconds.get(name, 0.0) for name in {*ours.seconds, *best.seconds}
    }
    cause = max(sorted(slower), key=lambda name: slower[name])
    times = ours.step_seconds / best.step_seconds
    return f"{times:.2f} x as long: {cause}"


def _none_legal(problem: Problem, refused: Sequence[Any]) -> str:
    reasons = list(dict.fromkeys(each.why for each in refused)) or ["the kept fields do not fit the devices"]
    kept = ", ".join(sorted(problem.kept)) or "none"
    return (
        f"No layout of {problem.machine.target.devices} devices is possible for this run (kept fields: {kept}): "
        f"{'; '.join(reasons[:3])}."
    )
