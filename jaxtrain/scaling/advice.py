"""Which part of a step keeps more devices from doing more, and what would help: sentences with the numbers they come from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from jaxtrain.config import Config
from jaxtrain.scaling.measuring import SIMULATED, Point
from jaxtrain.scaling.protocol import LinkFit
from jaxtrain.scaling.targets import ModelledPoint
from jaxtrain.step.pipeline.timeline import ideal_bubble

GOOD = 0.95
"""An efficiency from which on nothing is called a bottleneck."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What limits a run.

    Attributes:
      name: of the part; `none`, `unknown`.
      text: how much of the step it costs.
      advice: what would help.
    """

    name: str
    text: str
    advice: str


_ONE_NUMBER = Verdict("none", "one number of devices alone shows no scaling", "Give --devices several numbers.")


def of_points(kind: str, mode: str, base: Point, point: Point, config: Config, link: LinkFit | None) -> Verdict:
    """The verdict on a measured point.

    Args:
      kind: `measured` or `simulated`.
      mode: `strong` or `weak`.
      base: the smallest number of devices.
      point: the largest.
      config: of the run.
      link: that was fitted, if one was.
    """
    times = 1.0 if kind == SIMULATED else point.devices / base.devices
    efficiency = point.speedup / times
    where = f"{kind}, {mode} scaling, {point.devices} devices: efficiency {100 * efficiency:.0f} %"
    if point is base:
        return _ONE_NUMBER
    if efficiency >= GOOD:
        return Verdict("none", f"{where}; nothing but the devices' own work takes long", "More devices help.")
    # What a step of the base's would take if its parts shrank and grew as they ideally do.
    scale = point.batch / base.batch / times
    ideal = base.step.median * scale
    lost = _lost(point, base, scale)
    if not lost:
        return Verdict(
            "unknown",
            f"{where}; without a profile nothing is known of its parts",
            "jaxtrain train --config.profile.steps=... of the same config says why there is none.",
        )
    name = max(lost, key=lambda part: lost[part])
    text = (
        f"{where}; a step takes {1e3 * point.step.median:.1f} ms and would ideally take {1e3 * ideal:.1f} ms, and most of the "
        f"difference is {_WORDS[name]}: {1e3 * lost[name]:.1f} ms"
    )
    return Verdict(name, text, _advice(name, point, base, config, link))


def _lost(point: Point, base: Point, scale: float) -> dict[str, float]:
    """Seconds of a step by part beyond `scale` times those of the base's; {} where the parts are not known.

    What computing takes longer where communication runs beside it is communication's.
    """
    parts, ideal = _known(point), _known(base)
    if not parts or not ideal:
        return {}
    beside, ideal_beside = parts.pop("overlap"), ideal.pop("overlap")
    lost = {name: value - scale * ideal.get(name, 0.0) for name, value in parts.items()}
    lost["compute"] += beside - scale * ideal_beside
    slowed = min(max(lost["compute"], 0.0), beside)
    lost["compute"] -= slowed
    lost["communication"] += slowed
    return lost


def of_model(base: ModelledPoint, point: ModelledPoint, mode: str, config: Config) -> Verdict:
    """The verdict on a modelled point."""
    efficiency = point.batch / point.seconds / point.devices * base.devices * base.seconds / base.batch
    where = f"modelled, {mode} scaling, {point.devices:,} GPUs: efficiency {100 * efficiency:.0f} %"
    if point is base:
        return _ONE_NUMBER
    if efficiency >= GOOD:
        return Verdict("none", f"{where}; nothing but the GPUs' own work takes long", "More GPUs help.")
    scale = point.batch / base.batch / point.devices * base.devices
    lost = {name: value - scale * base.parts[name] for name, value in point.parts.items()}
    name = max(lost, key=lambda part: lost[part])
    text = f"{where}; of a step of {1e3 * point.seconds:.2f} ms {_WORDS[name]} costs {1e3 * lost[name]:.2f} ms"
    return Verdict(name, text, _modelled_advice(name, point, config))


_WORDS: Mapping[str, str] = {
    "compute": "the devices' own work, which takes longer than its share of the base's",
    "communication": "communication",
    "batch_norm": "BatchNorm's reductions over the whole batch",
    "input": "waiting for batches",
    "bubble": "the pipeline's idle stages",
    "host": "the host between steps",
}


def _known(point: Point) -> dict[str, float]:
    return {name: value for name, value in point.parts.items() if value is not None}


def _advice(name: str, point: Point, base: Point, config: Config, link: LinkFit | None) -> str:
    if name == "communication":
        return _less_communication(point, config, link)
    if name == "bubble":
        return _more_microbatches(config, point.traffic.microbatches)
    if name == "compute":
        share, base_share = point.batch / point.devices, base.batch / base.devices
        text = f"A device has {share:g} examples, and {base_share:g} at the base"
        text += "." if share >= base_share else ": a larger config.data.global_batch keeps it busier."
        on_cpu = point.traffic.devices == "cpu"
        return (
            f"{text} Devices of one CPU also share its memory's bandwidth, which no setting changes."
            if on_cpu
            else text
        )
    waits = 1e3 * (point.parts["input"] or 0.0)
    return {
        "input": f"A step waits {waits:.2f} ms for its batch: raise config.data.workers, or keep the data set on the devices "
        "with config.data.residency=device.",
        "host": "Raise config.train.log_every; where the model is tiny, config.train.steps_per_call makes several steps one "
        "program.",
    }[name]


def _less_communication(point: Point, config: Config, link: LinkFit | None) -> str:
    """What would make communication a smaller part."""
    known = _known(point)
    alone, spent = known["communication"], known["communication"] + known["overlap"]
    doubled = spent / (2 * point.step.median - alone)  # what collectives take does not grow with the examples
    sent, messages = point.traffic.sent_bytes, point.traffic.messages
    size = "" if sent is None else f"; a device sends {sent / 1e6:.1f} MB in {point.traffic.collectives} of them"
    text = (
        f"Collectives run for {100 * spent / point.step.median:.0f} % of a step, {100 * alone / point.step.median:.0f} % of it "
        f"with nothing beside{size}. With twice the examples a device they would run for {100 * doubled:.0f} %."
    )
    if point.devices == config.layout.stages * config.layout.tensor:
        return f"{text} They are the layout's own: no gradients are sent, which could be compressed."
    if link is None or messages is None or sent is None:
        return f"{text} config.optim.compress=bf16 sends half of the bytes."
    waits, moves = messages * link.latency, sent / link.bandwidth
    if waits > moves:
        return (
            f"{text} By the fitted link most of it is latency ({messages} messages of {1e6 * link.latency:.0f} us make "
            f"{1e3 * waits:.1f} ms, the bytes {1e3 * moves:.1f} ms): fewer messages help "
            f"(config.model.bn_groups={point.devices}, where the model has BatchNorm; config.optim.sync_every), "
            "compression does not."
        )
    return (
        f"{text} By the fitted link most of it is bandwidth ({1e3 * moves:.1f} ms at {link.bandwidth / 1e9:.2f} GB/s, "
        f"{1e3 * waits:.1f} ms are latency): config.optim.compress=bf16 sends half of the bytes, int8 about a quarter."
    )


def _more_microbatches(config: Config, microbatches: int) -> str:
    layout = config.layout
    now, then = (
        ideal_bubble(layout.schedule, layout.stages, count, layout.chunks) for count in (microbatches, 2 * microbatches)
    )
    return (
        f"With config.layout.microbatches={2 * microbatches} in place of {microbatches} the schedule's idle share falls from "
        f"{100 * now:.0f} % to {100 * then:.0f} %."
    )


def _modelled_advice(name: str, point: ModelledPoint, config: Config) -> str:
    if name == "batch_norm":
        return (
            f"config.model.bn_groups={point.devices} (or a multiple) lets each GPU take its statistics of its own examples: no "
            "reduction is left to wait for, and the run's numbers are others."
        )
    if name == "bubble":
        return _more_microbatches(config, max(config.layout.microbatches, 1))
    if name == "communication":
        sent = point.sent_bytes / 1e6
        share = point.parts[name] / point.seconds
        doubled = point.parts[name] / (
            2 * point.seconds - math.fsum(point.parts[each] for each in ("communication", "batch_norm"))
        )
        return (
            f"A GPU sends {sent:,.0f} MB in a step. With twice the examples a GPU that is {100 * doubled:.0f} % of the step in "
            f"place of {100 * share:.0f} %; --link says what a faster network would give."
        )
    return (
        f"A GPU has {point.batch / point.devices:g} examples; a larger config.data.global_batch keeps it busier (its update "
        "and the start of its kernels do not shrink with the batch)."
    )
