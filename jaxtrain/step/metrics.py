"""The metrics of a train step, in one array."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class StepMetrics:
    """The metrics of one step or of several, in one array: every array that the host reads is a transfer.

    Attributes:
      numbers: float [metrics] of one step, or [steps, metrics] of several; in `Task.sums_dtype`.
      names: of the metrics.
    """

    numbers: jax.Array
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def __getitem__(self, name: str) -> jax.Array:
        """One metric: [] of one step, [steps] of several."""
        return self.numbers[..., self.names.index(name)]

    def rows(self) -> list[dict[str, float]]:
        """A dict of metrics for each step, as Python floats. Waits for the device."""
        return [dict(zip(self.names, row, strict=True)) for row in np.atleast_2d(jax.device_get(self.numbers)).tolist()]


def stack_metrics(values: Mapping[str, Any]) -> StepMetrics:
    """Stacks scalars [], by name, in the dtype of `values["loss"]`.

    They are sorted by name, so that the order is the same with pipeline stages and without.
    """
    names = tuple(sorted(values))
    return StepMetrics(jnp.stack([jnp.asarray(values[name], values["loss"].dtype) for name in names]), names)
