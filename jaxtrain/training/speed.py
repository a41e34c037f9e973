"""How many floating point operations a second a run computes, and which share that is of what its devices could."""

from __future__ import annotations

import concurrent.futures
import functools
import logging

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxtrain.host.targets import GPUS, products_per_second
from jaxtrain.models.classifier import Classifier
from jaxtrain.models.layers import Context
from jaxtrain.step.footprint import product_operations
from jaxtrain.training.setup import RunSpec
from jaxtrain.trees import PyTree

log = logging.getLogger("jaxtrain")


class Speed:
    """Model FLOP/s and their utilization (MFU; Chowdhery 2022, arXiv:2204.02311, appendix B), from images per second."""

    def __init__(self, run: RunSpec, executor: concurrent.futures.Executor):
        """Begins to count the operations of the model of `run`. executor: where that is done, beside what comes next."""
        self._operations, self._said = executor.submit(forward_operations, run), False
        self._trains_all = run.config.optim.freeze == () and run.config.optim.freeze_layers == 0
        kind, precision = run.layout.mesh.devices.flat[0].device_kind, run.config.train.precision
        peaks = [products_per_second(gpu.teraflops, precision) for gpu in GPUS.values() if gpu.name == kind]
        self._peak = sum(peaks) * run.layout.mesh.size

    def numbers(self, throughput: float) -> dict[str, float]:
        """The speed of training, where it is known.

        Args:
          throughput: images per second.

        Returns:
          `flops_per_second` of all devices, as if the backward pass took twice what the forward pass takes; what `train.remat`
          computes again does not count. `mfu`, their share of the peak of GPUs that `host/targets.py` knows. Nothing while
          the operations are counted, and where parameters are frozen, which have no gradients to compute.
        """
        if not (self._trains_all and self._operations.done()):
            return {}
        if error := self._operations.exception():  # of a layer of the user's own: a run does not end for that
            if not self._said:
                log.warning("FLOP/s are not known: counting the model's operations failed (%s)", error)
            self._said = True
            return {}
        flops = 3 * self._operations.result() * throughput
        return {"flops_per_second": flops} | ({"mfu": flops / self._peak} if self._peak else {})


def forward_operations(run: RunSpec) -> float:
    """Floating point operations of the matrix products and convolutions of the model's forward pass, for one example.

    They are counted in the model's jaxpr: XLA does not count those that a GPU's libraries compute.
    """
    inputs = run.task.preprocess
    return _forward_operations(run.task.model, inputs.image_size, len(inputs.mean), inputs.dtype)


@functools.lru_cache(maxsize=8)  # a program may train many times
def _forward_operations(model: Classifier, side: int, channels: int, dtype: DTypeLike) -> float:
    shape = (1, side, side, channels)
    params, batch_stats = jax.eval_shape(lambda: model.init(jax.random.key(0), shape, dtype))

    def forward(params: PyTree, batch_stats: PyTree, images: jax.Array) -> jax.Array:
        context = Context(example=jnp.zeros(1, jnp.int32), train=False)
        return model.apply(params, batch_stats, images, context)[0]

    return product_operations(forward, params, batch_stats, jax.ShapeDtypeStruct(shape, dtype))
