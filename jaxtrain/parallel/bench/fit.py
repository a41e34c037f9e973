"""Fits latency and bandwidth to measured times: the alpha and beta of `collective_cost`, by which `jaxtrain plan` estimates."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import nnls

from jaxtrain.host.links import Link
from jaxtrain.parallel.bench.measure import Result


@dataclasses.dataclass(frozen=True)
class Fit:
    """A link that was fitted.

    Attributes:
      link: latency and bandwidth.
      median_error: of the modelled times against those that were fitted, as a share of these; the median.
    """

    link: Link
    median_error: float


def fit_link(name: str, messages: Sequence[float], sent: Sequence[float], seconds: Sequence[float]) -> Fit | None:
    """The link whose modelled times `messages * latency + sent / bandwidth` are nearest to `seconds`, in relative terms.

    Least squares with neither below 0 (Lawson and Hanson 1974). None where the times do not grow with the bytes, or where
    there are fewer than two.

    Args:
      name: of the link.
      messages: one after the other, of each time.
      sent: bytes that a device sends, of each time.
      seconds: measured.
    """
    if len(seconds) < 2:
        return None
    times = np.array(seconds)
    columns = np.stack([np.array(messages), np.array(sent)], 1)
    scale = columns.max(0)  # so that both unknowns are of one size
    (latency, per_byte), _ = nnls(columns / scale / times[:, None], np.ones(len(times)))
    latency, per_byte = float(latency / scale[0]), float(per_byte / scale[1])
    if per_byte == 0 or not math.isfinite(1 / per_byte):
        return None
    errors = np.abs(columns @ (latency, per_byte) / times - 1)
    return Fit(Link(name, 1 / per_byte, latency), statistics.median(errors.tolist()))


def fit_methods(results: Iterable[Result]) -> dict[str, Fit]:
    """The link of each method, fitted to all of its sizes and meshes; without those that have none (`fit_link`)."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.program.case.method.name, []).append(result)
    found = {
        name: fit_link(
            name, [r.program.case.messages for r in rows], [r.program.sent for r in rows], [r.median for r in rows]
        )
        for name, rows in by_name.items()
    }
    return {name: fit for name, fit in found.items() if fit is not None}
