"""`fit`: on how few of which GPUs a run fits, and what an epoch takes and costs there; by formulas alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtrain.config import Config
from jaxtrain.errors import ConfigError
from jaxtrain.host.targets import GPUS, parse_target
from jaxtrain.training.plan.problem import Problem
from jaxtrain.training.plan.search import machine_of, make_problem, plan_problem

_COUNTS = (1, 2, 4, 8)
_MOST_HOSTS = 8


def fit(
    config: Config,
    target: str = "",
    *,
    links: Sequence[str] = (),
    prices: Mapping[str, float] | None = None,
    said: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """The fewest of each GPU on which a run fits: one host of 1, 2, 4, 8, then hosts of 8.

    Args:
      config: of the run.
      target: one GPU alone, such as "h100"; "" for all that are known.
      links: as of `plan`.
      prices: of a GPU an hour, by GPU; "" is any other.
      said: takes a line on what is being done.

    Returns:
      For each GPU `gpu`, `devices` (0 where it does not fit), `target`, `usable_bytes`, `peak_bytes`, `flags`, `epoch_seconds`
      (modelled), `gpu_hours` and `cost` (of an epoch; None without a price), and `why_not`. What is cheapest, or takes the
      fewest GPU hours, is first.

    Raises:
      ConfigError: there is no such GPU, or the run is wrong on any.
    """
    if target and target not in GPUS:
        raise ConfigError(f"--target {target}: --fit counts GPUs itself; give one of {', '.join(GPUS)}.")
    prices = prices or {}
    if unknown := set(prices) - {"", *GPUS}:
        raise ConfigError(f"--price {sorted(unknown)[0]}=...: there is no such GPU; known are {', '.join(GPUS)}.")
    names, limit = [target] if target else list(GPUS), config.layout.memory_limit
    said("tracing the layers")
    problem = make_problem(config, machine_of(parse_target(names[0]), limit, links))
    rows = []
    for name in names:
        said(f"planning for {name}")
        rows.append(_of_gpu(problem, name, links, prices.get(name, prices.get(""))))
    return sorted(rows, key=lambda row: (not row["devices"], row["cost"] or 0.0, row["gpu_hours"] or 0.0))


def _of_gpu(problem: Problem, gpu: str, links: Sequence[str], price: float | None) -> dict[str, Any]:
    why, usable, limit = "", 0, problem.asked.layout.memory_limit
    for hosts, count in [(1, count) for count in _COUNTS] + [(2**i, 8) for i in range(1, _MOST_HOSTS.bit_length())]:
        machine = machine_of(parse_target(f"{hosts}x{count}x{gpu}"), limit, links)
        try:
            report = plan_problem(problem.on(machine), compiled=0, said=lambda _: None)
        except ConfigError as error:
            why = str(error)
            continue
        usable, first = report["usable_bytes"], report["layouts"][0]
        why = first["why_not"]
        if first["fits"]:
            seconds = first["step_seconds"] * report["steps_per_epoch"]
            hours = seconds / 3600 * hosts * count
            return {
                "gpu": gpu, "devices": hosts * count, "target": report["target"], "usable_bytes": usable,
                "peak_bytes": first["peak_bytes"], "flags": first["flags"], "epoch_seconds": seconds, "gpu_hours": hours,
                "cost": None if price is None else price * hours, "why_not": "",
            }  # fmt: skip
    return {
        "gpu": gpu, "devices": 0, "target": "", "usable_bytes": usable, "peak_bytes": None, "flags": "",
        "epoch_seconds": None, "gpu_hours": None, "cost": None, "why_not": why,
    }  # fmt: skip
