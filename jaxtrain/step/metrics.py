"""What a step reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class StepMetrics:
    """What a step reports, or several: one array [..., names], since each one would be a transfer of its own."""

    numbers: jax.Array
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def __getitem__(self, name: str) -> jax.Array:
        """[...]: one of the numbers."""
        return self.numbers[..., self.names.index(name)]

    def rows(self) -> list[dict[str, float]]:
        """A row for each step, on the host; waits for them."""
        return [dict(zip(self.names, row, strict=True)) for row in np.atleast_2d(jax.device_get(self.numbers)).tolist()]


def stack_metrics(values: Mapping[str, Any]) -> StepMetrics:
    """Scalars by name, in the type of the loss; in the names' order, which is the same for all engines."""
    names = tuple(sorted(values))
    return StepMetrics(jnp.stack([jnp.asarray(values[name], values["loss"].dtype) for name in names]), names)
