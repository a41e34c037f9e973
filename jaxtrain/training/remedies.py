"""What to set where a run does not fit its devices' memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain.config import Config
from jaxtrain.errors import ConfigError
from jaxtrain.parallel.mesh import Device
from jaxtrain.recipes import change
from jaxtrain.training.setup import RunSpec, make_run_spec

_Alternatives = Sequence[Mapping[str, Any]]
_MOST = 64  # times as many microbatches as there are


def remedies(run: RunSpec, devices: list[Device], state_bytes: int, peak_bytes: int, usable_bytes: int) -> list[str]:
    """Up to three changes, as flags, that a run takes and that lower its memory, what costs least time first.

    ZeRO and stages split what the state takes, microbatches and remat what the activations take. The changes for the larger
    of the two come first.

    Args:
      run: that does not fit.
      devices: of the run.
      state_bytes: of the state a device, at rest.
      peak_bytes: a device needs.
      usable_bytes: a device has.
    """
    config = run.config
    wanted = (peak_bytes - state_bytes) / max(usable_bytes - state_bytes, peak_bytes // _MOST)
    remats = {"none": ("dots", "full"), "dots": ("full",)}.get(config.train.remat, ())
    for_activations: list[_Alternatives] = [
        _microbatches(config, wanted),
        *([{"train.remat": remat}] for remat in remats),
    ]
    for_state: list[_Alternatives] = []
    if len(devices) > 1 and config.layout.zero < 3:
        for_state.append([{"layout.zero": 3}])
    if len(devices) > 1 and run.layout.stages == 1:
        for_state.append([{"layout.stages": 2, "layout.microbatches": 0}])
    activations_first = state_bytes < peak_bytes / 2
    ways = [*for_activations, *for_state] if activations_first else [*for_state, *for_activations]
    return [text for alternatives in ways if (text := _first_taken(run, devices, alternatives))][:3]


def _microbatches(config: Config, wanted: float) -> _Alternatives:
    """Powers of two times those that there are: the least that is enough first, then more, then fewer."""
    now = config.layout.microbatches
    factors = [2**i for i in range(1, _MOST.bit_length())]
    ordered = [f for f in factors if f >= wanted] + [f for f in reversed(factors) if f < wanted]
    return [{"layout.microbatches": now * factor} for factor in ordered]


def _first_taken(run: RunSpec, devices: list[Device], alternatives: _Alternatives) -> str:
    """The first of the alternatives that a run takes, as flags; or ""."""
    for fields in alternatives:
        try:
            make_run_spec(change(run.config, **fields), run.dataset, devices)
        except ConfigError:
            continue
        return " ".join(f"--config.{name}={value}" for name, value in fields.items())
    return ""
